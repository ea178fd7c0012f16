"""Into how many lanes a device is divided, found by trying other numbers on what is served. Pure: the clock is passed in.

What several lanes are worth depends on the models, on how many ask at a time, and on whether batches do as well. Nothing of that
is reckoned. While at least two rows are under way, the *work* that the device does in a second of its time is measured: of each
run of a stage, its rows, times the seconds that a row of that stage took when it was first known. So the unit is the same
whatever mix is asked, and one window can be compared with the next.

A number is *on trial* for up to five windows, with one of the chosen number before and after each, since others on the machine
come and go: a window speaks for it in which more work was done than in the mean of those two. It is chosen when four have
spoken for it, with a tenth more in the median; when two have spoken against it, the trial ends. All other numbers are tried in
one round, the nearest first. Then the device rests from trials for nineteen times as long as it was divided otherwise than
chosen, so that trials have a twentieth of its busy time at most; twice as long after each round that changed nothing, but not
when what is asked, or how much of it at a time, has become something else.

A trial costs what the other number is worse for a second or two, and as often as the device is divided otherwise, that what is
under way is finished first. Owned by the engine thread.
"""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Final

# How much more work another number of lanes must do.
GAIN: Final = 1.1
# Device seconds of a window, and those before it in which lanes are warming up.
WINDOW_S: Final = 0.5
SETTLE_S: Final = 0.2
# Windows that must speak for a number that is on trial, and against it.
FOR: Final = 4
AGAINST: Final = 2
# The part of the device's busy time in which it may be divided otherwise than chosen.
SHARE: Final = 0.05
# How often the rest is doubled.
_MOST_DOUBLINGS: Final = 6
# A window that lasts longer, because little is asked, says nothing; nor does a trial that waits for longer.
PATIENCE_S: Final = 60.0
# Runs of a stage until what a row of it takes is known, and stages that are remembered.
_FEW: Final = 3
_MOST: Final = 8192
# What is asked is something else when less than this part of the work is for what it was for, or so many times as much, or as
# little, is under way.
_OVERLAP: Final = 0.5
_FACTOR: Final = 2.0
# How much of what was asked before the last window still counts, and after how many windows that is compared.
_FADING: Final = 0.75
_WINDOWS_OF_A_MIX: Final = 5


class LaneChoice:
    """``chosen`` is how many lanes there should be, of ``counts``; ``count`` how many there are to be now: with a trial, others.

    ``rates`` has the work in a second of the device's time, as it was last measured with each number.
    """

    def __init__(self, counts: Sequence[int], chosen: int) -> None:
        self.count = self.chosen = chosen
        self.rates: dict[int, float] = {}
        self._counts = list(counts)
        # By stage: what a row takes at least, and the runs in which that was seen.
        self._known: dict[Hashable, tuple[float, int]] = {}
        # The numbers that are still to be tried in this round; the first is on trial. None while there is no round.
        self._rivals: list[int] | None = None
        # Work per second in the last window of the chosen number, and of its rival; and in each of a trial's windows, in parts of
        # what the chosen number did just before and after.
        self._own = self._other = 0.0
        self._ratios: list[float] = []
        # Since the number of lanes last changed, or the last window ended.
        self._settling_s = SETTLE_S
        self._busy_s = self._work = self._rows_s = 0.0
        self._began_s: float | None = None
        # Since the last round ended: busy time that has passed, and how much of it must; in the round, that of rivals.
        self._rested_s = self._rest_s = self._rivals_s = 0.0
        self._doublings = -1
        # Where work went of late, and how much was under way; and when the last round ended.
        self._mix = _Mix()
        self._last_mix: _Mix | None = None

    def ran(self, now_s: float, lanes: int, stages: Sequence[tuple[Hashable, int]], device_s: float, under_way: int) -> None:
        """Note a run that took ``device_s`` of the device's time, with so many ``lanes``.

        ``stages`` are those that were run, with the rows of each; so many rows were ``under_way`` when it began.
        """
        works = [self._worth(stage, rows, device_s / len(stages)) for stage, rows in stages]
        if lanes != self.count:
            return  # what is under way is being finished
        if self._began_s is not None and now_s > self._began_s + PATIENCE_S:
            self._give_up()
        if under_way < 2 or 0.0 in works:
            return
        if self._began_s is None:
            self._began_s = now_s
        if self.count != self.chosen:
            self._rivals_s += device_s
        else:
            self._rested_s += device_s
        if self._settling_s > 0:
            self._settling_s -= device_s
            return
        self._busy_s += device_s
        self._work += sum(works)
        self._rows_s += under_way * device_s
        self._mix.add([stage for stage, _ in stages], works)
        if self._busy_s >= WINDOW_S:
            self._window_ends()

    def cannot(self, count: int) -> None:
        """Note that the device cannot be divided so; a round ends with that."""
        self._counts.remove(count)
        if self.chosen == count:
            self.chosen = 1
        self._give_up()

    def _worth(self, stage: Hashable, rows: int, seconds: float) -> float:
        """Return what a run is worth, in seconds; 0 while that is not known."""
        least_s, seen = self._known.get(stage, (seconds / rows, 0))
        if seen < _FEW:
            if not seen and len(self._known) >= _MOST:
                self._known.clear()
            self._known[stage] = min(least_s, seconds / rows), seen + 1
            return 0.0
        return least_s * rows

    def _window_ends(self) -> None:
        rate = self._work / self._busy_s
        self.rates[self.count] = rate
        self._mix.end_window(self._rows_s / self._busy_s)
        if self.count != self.chosen:
            self._other = rate
            self._divide(self.chosen)
            return
        before, self._own = self._own, rate
        if self._rivals is not None:
            self._ratios.append(2 * self._other / (before + rate))
            self._judge()
            return
        if self._last_mix is not None and self._mix.differs(self._last_mix):
            self._doublings = 0
        self._begin_window()
        if self._rested_s >= self._rest_s * 2**self._doublings:
            self._rivals = sorted(
                (each for each in self._counts if each != self.chosen), key=lambda count: abs(count - self.chosen)
            )
            self._rivals_s = 0.0
            self._next_rival()

    def _judge(self) -> None:
        """Go on with a trial, or end it."""
        assert self._rivals, "nothing is on trial"
        spoke_for = sum(1 for ratio in self._ratios if ratio > 1)
        if spoke_for < FOR and len(self._ratios) - spoke_for < AGAINST:
            self._divide(self._rivals[0])
            return
        rival = self._rivals.pop(0)
        if spoke_for >= FOR and statistics.median(self._ratios) >= GAIN:
            # The round goes on from there.
            self.chosen, self._own = rival, self._other
            self._doublings = -1
        self._next_rival()

    def _next_rival(self) -> None:
        """Try the next number, or end the round."""
        self._ratios = []
        if self._rivals:
            self._divide(self._rivals[0])
            return
        if self._rivals is not None:
            self._rivals = None
            self._doublings = min(self._doublings + 1, _MOST_DOUBLINGS)
            self._rested_s, self._rest_s = 0.0, self._rivals_s * (1 / SHARE - 1)
            self._last_mix = self._mix.now()
        self._divide(self.chosen)

    def _divide(self, count: int) -> None:
        if count != self.count:
            self._settling_s = SETTLE_S
        self.count = count
        self._begin_window()

    def _begin_window(self) -> None:
        self._busy_s = self._work = self._rows_s = 0.0
        self._began_s = None

    def _give_up(self) -> None:
        """Go back to the chosen number, and begin a window of it."""
        if self._rivals is not None:
            self._rivals = []
        self._next_rival()


class _Mix:
    """What work was for of late, and how many rows were under way in the mean."""

    def __init__(self, works: Mapping[Hashable, float] | None = None, under_way: float = 0.0) -> None:
        self._works = dict(works or {})
        self._under_way = under_way
        self._window_count = 0

    def add(self, stages: Iterable[Hashable], works: Iterable[float]) -> None:
        for stage, work in zip(stages, works, strict=True):
            self._works[stage] = self._works.get(stage, 0.0) + work

    def end_window(self, under_way: float) -> None:
        self._under_way = _FADING * self._under_way + (1 - _FADING) * under_way if self._window_count else under_way
        self._window_count += 1
        # What is next to nothing is forgotten.
        least = sum(self._works.values()) / _MOST
        self._works = {stage: _FADING * work for stage, work in self._works.items() if work > least}

    def now(self) -> _Mix:
        """Return what it is now, to be compared with what it will be."""
        # First what it was before must have faded.
        self._window_count = 1
        return _Mix(self._works, self._under_way)

    def differs(self, then: _Mix) -> bool:
        """Say whether this is something else by now than it was ``then``."""
        if self._window_count <= _WINDOWS_OF_A_MIX:
            return False
        ratio = self._under_way / then._under_way
        return not 1 / _FACTOR <= ratio <= _FACTOR or _overlap(self._works, then._works) < _OVERLAP


def _overlap(one: Mapping[Hashable, float], other: Mapping[Hashable, float]) -> float:
    """Return the part that two distributions have in common, from 0 to 1."""
    totals = sum(one.values()), sum(other.values())
    return sum(min(work / totals[0], other.get(stage, 0.0) / totals[1]) for stage, work in one.items())
