"""What a row costs in batches of different sizes, as measured. Pure; owned by the engine thread.

A batch pays on some hardware for some stages, and not for others: a transformer layer of short sequences reads its weights once
for all rows, while a convolution of large pictures is limited by arithmetic and may run worse when its activations leave the
cache. Nothing of that is assumed.

Others have the processor, too: some runs take twice as long as they should, and now and then one ten times. Those must not
decide, for what was refused is not measured any more. So the best of the first few runs counts; later a run that was slow moves
what is known by little, and a fast one by much.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Final

# How much the latest run counts against those before it, when it was faster and when it was slower.
_FASTER: Final = 0.3
_SLOWER: Final = 0.05
# Runs until a size counts as measured.
_FEW: Final = 3
# A batch may be this much slower per row: less is noise, and fewer runs leave more of the processor to others.
_TOLERATED: Final = 1.03
# What was refused so often is tried again, in case it was measured in a bad moment; the worse it was, the later.
_TRY_AGAIN: Final = 200
# Once in so many times rows that would be a batch are run apart: what nobody runs is not measured, and may cost less by now.
_APART: Final = 200
# Stages that might be run as one are run one by one so often first, and again after so many times as one.
_LOOKS: Final = 16
_LOOK_AGAIN: Final = 400
# Stages that are remembered.
_MOST: Final = 8192


class BatchCosts:
    """Seconds per row, by stage and size of batch; sizes that differ by less than a factor of two are one.

    They are those of one of ``lanes``, which has a part of the device: with other lanes, everything is measured anew.
    """

    def __init__(self) -> None:
        self.lanes = 1
        self._seconds: dict[tuple[Hashable, int], float] = {}
        # How many runs were measured of those that are not known yet.
        self._seen: dict[tuple[Hashable, int], int] = {}
        self._refused: dict[tuple[Hashable, int], int] = {}
        self._accepted: dict[tuple[Hashable, int], int] = {}
        # How often stages were run one by one, of which some were to be run as one.
        self._looked: dict[tuple[Hashable, int], int] = {}

    def record(self, key: Hashable, rows: int, seconds: float, lanes: int | None = None) -> None:
        """Note how long a stage took for a batch, in one of ``lanes`` if it were not as many as there are.

        The first time counts for nothing: something is always set up then.
        """
        place, each_s = ((lanes or self.lanes, key), _class(rows)), seconds / rows
        seen = self._seen.get(place)
        if seen is None:
            if len(self._seen) >= _MOST:
                for kept in (self._seconds, self._seen, self._refused, self._accepted, self._looked):
                    kept.clear()
            self._seen[place] = 0
            return
        known = self._seconds.get(place, each_s)
        if seen < _FEW:
            self._seen[place] = seen + 1
            self._seconds[place] = min(known, each_s)
        else:
            weight = _FASTER if each_s < known else _SLOWER
            self._seconds[place] = known + weight * (min(each_s, 2 * known) - known)

    def is_known(self, key: Hashable, rows: int) -> bool:
        """Say whether a stage was measured with a batch of this size."""
        return self._seen.get(((self.lanes, key), _class(rows)), 0) >= _FEW

    def expected_s(self, key: Hashable, rows: int, lanes: int) -> float:
        """Return how long a stage takes for a batch, by what was measured with that many ``lanes``; 0 where nothing was.

        Where no batch of this size was, by the next smaller one: that is more rather than less.
        """
        for size in range(_class(rows), -1, -1):
            each_s = self._seconds.get(((lanes, key), size))
            if each_s is not None:
                return each_s * rows
        return 0.0

    def pays(self, keys: Sequence[Hashable], apart: int, together: int, times: int = 1) -> bool:
        """Say whether rows should go through the stages ``keys`` as a batch of ``together``, instead of at most ``apart``.

        What was not measured yet is tried. If it does not pay, that is asked no more ``times`` - 1 times.
        """
        keys = [(self.lanes, key) for key in keys]
        small, large = _class(apart), _class(together)
        ratio = self._ratio(keys, small, large)
        place = (keys[0], large)
        if ratio <= _TOLERATED:
            self._accepted[place] = self._accepted.get(place, 0) + (ratio > 0)
            if self._accepted[place] < _APART:
                return True
            del self._accepted[place]
            self._doubt(keys, small)
            return False
        self._refused[place] = self._refused.get(place, 0) + times
        if self._refused[place] < _TRY_AGAIN * ratio:
            return False
        del self._refused[place]
        self._doubt(keys, large)
        return True

    def joins(self, keys: Sequence[Hashable], about: int, joined: Hashable, rows: int) -> bool:
        """Say whether the stages ``keys`` should be run as one, ``joined``, on ``rows``, where ``about`` might be a batch.

        One by one they cost what such batches were measured to: that is looked at first, and now and then again.
        """
        keys, joined, large = [(self.lanes, key) for key in keys], (self.lanes, joined), _class(about)
        looking, size = (joined, large), _class(rows)
        if self._looked.get(looking, 0) < _LOOKS:
            self._looked[looking] = self._looked.get(looking, 0) + 1
            return False
        stages_s = [self._least_s(key, large) for key in keys]
        if not all(stages_s):
            return False
        if self._seen.get((joined, size), 0) < _FEW:
            return True
        if pays := self._seconds[joined, size] <= sum(stages_s):
            taken, after = self._accepted, _LOOK_AGAIN
        else:
            taken, after = self._refused, _TRY_AGAIN
        place = (joined, size)
        taken[place] = taken.get(place, 0) + 1
        if taken[place] >= after:
            del taken[place]
            if pays:
                self._looked[looking] = 0
            else:
                self._doubt([joined], size)
        return pays

    def _least_s(self, key: Hashable, size: int) -> float:
        """Return the least that a row was measured to cost in batches that are not larger than a size; 0 where none was."""
        measured = [self._seconds[key, each] for each in range(size + 1) if self._seen.get((key, each), 0) >= _FEW]
        return min(measured, default=0.0)

    def _doubt(self, keys: Sequence[Hashable], size: int) -> None:
        """Have one run more decide what a row costs in batches of a size, if it is faster."""
        for key in keys:
            if (key, size) in self._seconds:
                self._seen[key, size] = min(self._seen[key, size], _FEW - 1)

    def _ratio(self, keys: Sequence[Hashable], small: int, large: int) -> float:
        """Return what a row costs in a large batch, in parts of what it costs in a small one, as far as that is known; or 0."""
        if small == large:
            return 0.0
        places = [((key, small), (key, large)) for key in keys]
        measured = [(one, other) for one, other in places if one in self._seconds and self._seen.get(other, 0) >= _FEW]
        if not measured:
            return 0.0
        return sum(self._seconds[other] for _, other in measured) / sum(self._seconds[one] for one, _ in measured)


def _class(rows: int) -> int:
    return max(rows - 1, 0).bit_length()
