"""What a request will cost, and when it will be answered: reckoned from what others like it have taken. Pure.

Times are those of the device. What requests of one *kind* (the same model, inputs of the same shapes) have cost is kept as a
running mean of what they were charged, which in a batch is their part of it: that is how fast a queue of them goes down.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from typing import Final

# How much the latest request counts in a running mean.
_WEIGHT: Final = 0.2
# Kinds that are remembered.
_MOST: Final = 4096
# Of all requests, the part that may be answered later than is said.
_LATE: Final = 1 / 2000
# How fast what is said follows what happens.
_STEP: Final = 0.02
_MOST_FACTOR: Final = 8.0
# Of so many of the latest requests is kept what was said and what came.
_LATEST: Final = 1000


class Forecast:
    """Seconds by kind of request, and how far off what was said lately was."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}
        # Of the times that requests took, relative to what was said of them, all but very few were below this.
        self.factor = 1.0
        self._latest: deque[tuple[float, float]] = deque(maxlen=_LATEST)

    def learn(self, kind: Hashable, seconds: float) -> None:
        """Note what a request was charged."""
        known = self._seconds.get(kind)
        if known is None:
            if len(self._seconds) >= _MOST:
                self._seconds.clear()
            self._seconds[kind] = seconds
        else:
            self._seconds[kind] = known + _WEIGHT * (seconds - known)

    def cost_s(self, kind: Hashable) -> float | None:
        """Return what a request of this kind costs; None where none was seen."""
        return self._seconds.get(kind)

    def compare(self, said_s: float, actual_s: float) -> None:
        """Note how long a request took of which was said how long it would."""
        self._latest.append((said_s, actual_s))
        if actual_s > self.factor * said_s:
            self.factor = min(_MOST_FACTOR, self.factor * (1 + _STEP))
        else:
            # A quantile is where those above weigh as much as those below.
            self.factor = max(1.0, self.factor * (1 - _STEP * _LATE))

    def percentiles(self, share: float) -> tuple[float, float]:
        """Return the seconds below which this share lies of what was said of the latest requests, and of what they took."""
        if not self._latest:
            return 0.0, 0.0
        place = min(len(self._latest) - 1, int(share * len(self._latest)))
        said, actual = (sorted(each) for each in zip(*self._latest, strict=True))
        return said[place], actual[place]
