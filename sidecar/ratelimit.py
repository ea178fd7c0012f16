"""How often something may be done: a token bucket."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Bucket:
    """So many at once, and then so many a second. Any thread."""

    def __init__(self, burst: int, per_second: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._left = float(burst)
        self._at_s = clock()
        self._lock = threading.Lock()

    def take(self) -> float:
        """Take one, and return 0; or take none, and return in how many seconds there is one."""
        with self._lock:
            now_s = self._clock()
            self._left = min(self._burst, self._left + (now_s - self._at_s) * self._per_second)
            self._at_s = now_s
            if self._left < 1:
                return (1 - self._left) / self._per_second
            self._left -= 1
            return 0.0
