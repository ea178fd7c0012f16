"""Waiting for what other threads and processes bring about."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

# Nothing takes as long, however busy the machine is: what has not come by then does not come.
PATIENCE_S: Final = 120.0


def soon() -> float:
    """Return a deadline that only what does not come at all misses."""
    return time.monotonic() + PATIENCE_S


def until(holds: Callable[[], object]) -> None:
    """Return when something holds. Raises AssertionError when it never does."""
    deadline = soon()
    while not holds():
        assert time.monotonic() < deadline, f"not so after {PATIENCE_S:.0f} s"
        time.sleep(0.005)
