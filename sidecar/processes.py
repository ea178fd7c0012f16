"""What a child process owes its parent: to end when it does."""

from __future__ import annotations

import os
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


def end_within(seconds: float) -> None:
    """Have the kernel end this process after so many seconds, even if it does nothing else any more. The first call counts.

    For whoever has been told to end, and has no parent any more who would see to it.
    """
    if not signal.getitimer(signal.ITIMER_REAL)[0]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
