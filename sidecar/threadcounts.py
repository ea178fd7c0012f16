"""On how many threads a stage runs: on as few as are as fast as more, as measured while it serves.

Threads that share an operator wait for each other at its end, and have to be woken for the next. Where operators take tens of
microseconds, that costs more than it brings, and keeps cores from the functions; a convolution of a large picture takes all it
can get. Pure; owned by the engine thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from typing import Final

# Runs from which the first choice is made, and the latest that count after it.
_FIRST: Final = 3
_LATEST: Final = 5
# Every so many runs the others are measured again: what else the machine does may have changed.
_AGAIN: Final = 64
# More threads must be faster by this much: they are taken from the functions on this machine.
_WORTH: Final = 1.05
# Stages that are remembered.
_MOST: Final = 8192


class _Known:
    def __init__(self, counts: Sequence[int]) -> None:
        self.seconds: dict[int, deque[float]] = {count: deque(maxlen=_LATEST) for count in counts}
        self.runs = 0
        self.best: int | None = None

    def next(self) -> int:
        self.runs += 1
        turn = self.runs // _AGAIN
        if self.best is None:
            # The first run sets things up; the median of three does without it.
            return min(self.seconds, key=lambda count: (len(self.seconds[count]), -count))
        return [*self.seconds][turn % len(self.seconds)] if self.runs % _AGAIN == 0 else self.best

    def note(self, count: int, seconds: float) -> None:
        self.seconds[count].append(seconds)
        if all(len(known) >= _FIRST for known in self.seconds.values()):
            medians = {count: sorted(known)[len(known) // 2] for count, known in self.seconds.items()}
            fastest = min(medians.values())
            self.best = min(count for count, median in medians.items() if median <= _WORTH * fastest)


class ThreadCounts:
    """Measured times of stages, by key, for each of ``counts`` threads."""

    def __init__(self, counts: Sequence[int]) -> None:
        self._counts = tuple(counts)
        self._known: dict[Hashable, _Known] = {}

    def choose(self, key: Hashable) -> int:
        """Return on how many threads to run a stage now; ``record`` is told how long that took."""
        if len(self._counts) == 1:
            return self._counts[0]
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _MOST:
                self._known.clear()
            known = self._known[key] = _Known(self._counts)
        return known.next()

    def record(self, key: Hashable, count: int, seconds: float) -> None:
        """Note how long a stage took on ``count`` threads."""
        if (known := self._known.get(key)) is not None:
            known.note(count, seconds)
