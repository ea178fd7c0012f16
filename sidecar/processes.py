"""What processes owe to others: a child to end when its parent does, all of them to leave no copy of what they hold."""

from __future__ import annotations

import os
import resource
import signal

# Loaded before it is needed: what a child does between fork and exec must not allocate more than it has to.
from sidecar.libc import LIBC

# linux/prctl.h
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int, by: signal.Signals = signal.SIGTERM) -> None:
    """Have the kernel send ``by`` to this process when its parent dies. Call in the child, right after the fork.

    Raises ProcessLookupError when the parent died before the call.
    """
    LIBC.prctl(_PR_SET_PDEATHSIG, by, 0, 0, 0)
    if os.getppid() != parent_pid:
        raise ProcessLookupError(f"process {parent_pid} died before its child was ready")


def forbid_core_dumps() -> None:
    """Have nothing written of this process's memory when it crashes, nor of what it forks: tenants' inputs and weights are in it.

    One byte, not none: a limit of zero does not keep the kernel from handing a dump to a program, this one does, and no file is
    that short.
    """
    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    # Where there may be none anyway it stays at that.
    resource.setrlimit(resource.RLIMIT_CORE, (1, 1) if most else (0, 0))


def end_within(seconds: float) -> None:
    """Have the kernel end this process after so many seconds, even if it does nothing else any more. The first call counts.

    For whoever has been told to end, and has no parent any more who would see to it.
    """
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
