"""Circumstances that a test machine is not in, and a sidecar has to bear: `tests.fault.launching` puts one in them."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

from sidecar import tenantsockets
from sidecar.libc import LIBC, failed

# What few_descriptors leaves.
FEW = 128
DAY_S = 86400.0
# The environment names a file with this; while it is there, memory is short.
SHORT = "MEMORY_IS_SHORT"
# For the two arenas of a session: a descriptor and pages for each.
CALLS = 4
# What little_room leaves for a file system, and the variable of the environment that names it.
LITTLE_BYTES = 16 << 20
LITTLE = "LITTLE_ROOM"
# Of linux/sched.h and linux/mount.h.
_NEW_MOUNTS, _NEW_USER, _PRIVATE, _RECURSIVE = 0x00020000, 0x10000000, 1 << 18, 1 << 14


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


def little_room() -> None:
    """A file system of 16 MiB where the environment says, which nobody but this sidecar sees: others by its processes' roots."""
    user, group = os.geteuid(), os.getegid()
    _succeeds(LIBC.unshare(_NEW_MOUNTS | (_NEW_USER if user else 0)))
    if user:
        # As before to everybody; but in here it may mount.
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    _succeeds(LIBC.mount(None, b"/", None, ctypes.c_ulong(_PRIVATE | _RECURSIVE), None))
    folder = os.environ[LITTLE].encode()
    _succeeds(LIBC.mount(b"tmpfs", folder, b"tmpfs", ctypes.c_ulong(0), f"size={LITTLE_BYTES},mode=1777".encode()))


def _succeeds(result: int) -> None:
    if result:
        raise failed()
