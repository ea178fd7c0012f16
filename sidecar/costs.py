"""What a row costs in batches of different sizes, as measured. Pure; owned by the engine thread.

A batch pays on some hardware for some stages, and not for others: a transformer layer of short sequences reads its weights once
for all rows, while a convolution of large pictures is limited by arithmetic and may run worse when its activations leave the
cache. Nothing of that is assumed.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

# How much the latest run counts in a running mean.
_WEIGHT: Final = 0.3
# A batch may be this much slower per row: less is noise, and fewer runs leave more of the processor to others.
_TOLERATED: Final = 1.03
# What was refused so often is tried again, in case it was measured in a bad moment.
_TRY_AGAIN: Final = 200
# Stages that are remembered.
_MOST: Final = 8192


class BatchCosts:
    """Seconds per row, by stage and size of batch; sizes that differ by less than a factor of two are one."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[Hashable, int], float] = {}
        self._seen: set[tuple[Hashable, int]] = set()
        self._refused: dict[tuple[Hashable, int], int] = {}

    def record(self, key: Hashable, rows: int, seconds: float) -> None:
        """Note how long a stage took for a batch. The first time counts for nothing: something is always set up then."""
        place = (key, _class(rows))
        if place not in self._seen:
            if len(self._seen) >= _MOST:
                for kept in (self._seconds, self._seen, self._refused):
                    kept.clear()
            self._seen.add(place)
            return
        known = self._seconds.get(place, seconds / rows)
        self._seconds[place] = known + _WEIGHT * (seconds / rows - known)

    def is_known(self, key: Hashable, rows: int) -> bool:
        """Say whether a stage was measured with a batch of this size."""
        return (key, _class(rows)) in self._seconds

    def pays(self, keys: Sequence[Hashable], apart: int, together: int) -> bool:
        """Say whether rows should go through the stages ``keys`` as a batch of ``together``, instead of at most ``apart``.

        What was not measured yet is tried.
        """
        small, large = _class(apart), _class(together)
        if small == large:
            return True
        pairs = [(self._seconds.get((key, small)), self._seconds.get((key, large))) for key in keys]
        measured = [(one, other) for one, other in pairs if one is not None and other is not None]
        if sum(other for _, other in measured) <= _TOLERATED * sum(one for one, _ in measured):
            return True
        place = (keys[0], large)
        self._refused[place] = self._refused.get(place, 0) + 1
        if self._refused[place] >= _TRY_AGAIN:
            del self._refused[place]
            for key in keys:
                self._seconds.pop((key, large), None)
        return False


def _class(rows: int) -> int:
    return max(rows - 1, 0).bit_length()
