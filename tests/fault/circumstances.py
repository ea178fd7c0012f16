"""Circumstances that a test machine is not in, and a sidecar has to bear: `tests.fault.launching` puts one in them."""

from __future__ import annotations

import errno
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from sidecar import tenantsockets

# What few_descriptors leaves.
FEW = 128
DAY_S = 86400.0
# The environment names a file with this; while it is there, memory is short.
SHORT = "MEMORY_IS_SHORT"
# For the two arenas of a session: a descriptor and pages for each.
CALLS = 4


def few_descriptors() -> None:
    """A limit on open files that cannot be raised."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (FEW, FEW))


def older_kernel() -> None:
    """A kernel that lets descriptors be sent to whoever does not want them."""
    tenantsockets._SO_PASSRIGHTS = 9999  # type: ignore[misc]


def memory_runs_out() -> None:
    """Shared memory that runs out at the first call for a session's arenas, the next time at the second, and so on in turns."""
    short = Path(os.environ[SHORT])
    times, calls = 0, 0

    def failing(name: str, error: int) -> Callable[..., object]:
        original = getattr(os, name)

        def fail(*arguments: object) -> object:
            nonlocal times, calls
            if not short.exists():
                times, calls = times + bool(calls), 0
                return original(*arguments)
            calls += 1
            if calls > times % CALLS:
                raise OSError(error, os.strerror(error))
            return original(*arguments)

        return fail

    os.memfd_create = failing("memfd_create", errno.ENOMEM)  # type: ignore[assignment]
    os.posix_fallocate = failing("posix_fallocate", errno.ENOSPC)  # type: ignore[assignment]


def jumping_clock() -> None:
    """A wall clock that somebody sets, a day back and a day ahead by turns, every tenth of a second."""
    wall = time.time

    def jumping() -> float:
        return wall() + DAY_S * (int(10 * time.monotonic()) % 3 - 1)

    time.time = jumping
