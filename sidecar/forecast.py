"""What a request will cost, and when it will be answered: reckoned from what others like it have taken. Pure.

Times are those of the device. What requests of one *kind* (the same model, inputs of the same shapes) have cost is kept as a
running mean of what they were charged, which in a batch is their part of it: that is how fast a queue of them goes down.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Final

# How much the latest request counts in a running mean.
_WEIGHT: Final = 0.2
# How far it may be beyond the mean, as a factor and in seconds: a host that stood still for minutes says nothing of the next.
_MOST_STEP: Final = 4.0
_SMALL_S: Final = 0.1
# Of those refused because one of their kind took too long by itself, every so manyth is let through: what is always refused is
# never measured again, and may have been measured in a bad moment.
_TRY_AGAIN: Final = 8
# Kinds that are remembered.
_MOST: Final = 4096
# How far off predictions are is told by the worst but one of so many requests that were said to take about as long; it is looked
# up anew after so many.
_COMPARED: Final = 256
_LOOKED_UP: Final = 16
# The furthest that a prediction is raised: what took longer still was held up by something that says nothing of the next.
_MOST_FACTOR: Final = 8.0
# Of so many of the latest requests is kept what was said and what came.
_LATEST: Final = 1000


@dataclass(slots=True)
class _Errors:
    """How long requests took, relative to what was said of them."""

    ratios: deque[float] = field(default_factory=lambda: deque(maxlen=_COMPARED))
    count: int = 0
    # Almost at the worst.
    factor: float = 1.0

    def note(self, ratio: float) -> None:
        self.ratios.append(min(ratio, _MOST_FACTOR))
        self.count += 1
        if self.count % _LOOKED_UP == 0:
            self.factor = max(1.0, heapq.nlargest(2, self.ratios)[1])


class Forecast:
    """Seconds by kind of request, and how far off what was said lately was."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = {}
        # Kinds of which one was seen: something is always set up for the first.
        self._seen_once: set[Hashable] = set()
        self._refused: dict[Hashable, int] = {}
        # By who asked, whom others may not make late on paper, and by how long it was said to take.
        self._errors: dict[tuple[Hashable, int], _Errors] = {}
        self._latest: deque[tuple[float, float]] = deque(maxlen=_LATEST)
        # The same in every run, as all else here.
        self._random = random.Random(0)  # noqa: S311 - nobody's secret

    def learn(self, kind: Hashable, seconds: float) -> None:
        """Note what a request was charged."""
        known = self._seconds.get(kind)
        if known is None:
            if len(self._seconds) >= _MOST:
                for kept in (self._seconds, self._seen_once, self._refused):
                    kept.clear()
            self._seconds[kind] = seconds
            self._seen_once.add(kind)
        elif kind in self._seen_once and seconds < known:
            self._seconds[kind] = seconds
        else:
            self._seconds[kind] = known + _WEIGHT * (min(seconds, max(_MOST_STEP * known, _SMALL_S)) - known)
        if known is not None:
            self._seen_once.discard(kind)
        self._refused.pop(kind, None)

    def is_doubtful(self, kind: Hashable) -> bool:
        """Say whether one is to be let through after all that is about to be refused for what its kind costs."""
        self._refused[kind] = self._refused.get(kind, 0) + 1
        return self._refused[kind] % _TRY_AGAIN == 0

    def cost_s(self, kind: Hashable) -> float | None:
        """Return what a request of this kind costs; None where none was seen."""
        return self._seconds.get(kind)

    def likely_s(self, reckoned_s: float, who: Hashable = None) -> float:
        """Return how long a request of somebody may well take that is reckoned to take so long: as far off as one before it was.

        Any one of those, so that many of these are spread as what comes of them, which a mean would not be.
        """
        errors = self._errors.get((who, math.frexp(reckoned_s)[1]))
        return reckoned_s if errors is None else reckoned_s * self._random.choice(errors.ratios)

    def raised_s(self, reckoned_s: float, who: Hashable = None) -> float:
        """Return by when almost every request of somebody is answered that is reckoned to take so long."""
        errors = self._errors.get((who, math.frexp(reckoned_s)[1]))
        return reckoned_s if errors is None else reckoned_s * errors.factor

    def compare(self, reckoned_s: float, said_s: float, actual_s: float, who: Hashable = None) -> None:
        """Note how long a request of somebody took, of which was reckoned, and by that said, how long it would."""
        self._latest.append((said_s, actual_s))
        # By powers of two: what is said to take a millisecond may well take three, and a queue of seconds hardly twice as long.
        self._errors.setdefault((who, math.frexp(reckoned_s)[1]), _Errors()).note(actual_s / reckoned_s)

    def percentiles(self, share: float) -> tuple[float, float]:
        """Return the seconds below which this share lies of what was said of the latest requests, and of what they took."""
        if not self._latest:
            return 0.0, 0.0
        place = min(len(self._latest) - 1, int(share * len(self._latest)))
        said, actual = (sorted(each) for each in zip(*self._latest, strict=True))
        return said[place], actual[place]
