"""Division: into how many lanes the device is divided. Part of the engine thread.

An operator says how many there are to be, or leaves it to ``sidecar.lanecount``, which is told what is run and tries other
numbers now and then. Before the device is divided otherwise, all that is under way is finished (``is_due``). What was chosen is
kept for the next start.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

from sidecar.lanecount import LaneChoice
from sidecar.ports import Device
from sidecar.runs import Runs
from sidecar.trials import Trials
from sidecar.turns import Turns
from sidecar.underway import Call
from sidecar.verdicts import Verdicts
from sidecar.wavefront import Wavefront

log = logging.getLogger("trunkline.engine")


def choice_for(device: Device, verdicts: Verdicts) -> LaneChoice | None:
    """Return what chooses the number of lanes, which begins with the last one on this machine; None where there is one only."""
    counts = device.lane_counts
    known = (verdicts.find("lanes", "count") or {}).get("count")
    chosen = known if isinstance(known, int) and known in counts else 1
    return LaneChoice(counts, chosen) if len(counts) > 1 else None


class Division:
    """The lanes there are, and why."""

    def __init__(
        self,
        device: Device,
        wavefront: Wavefront[Call],
        turns: Turns[Call],
        runs: Runs,
        trials: Trials | None,
        verdicts: Verdicts | None,
        choice: LaneChoice | None,
        *,
        count: int,
        batch_limit: int,
    ) -> None:
        """Without a ``choice``, for which there must be trials and verdicts, there are ``count`` lanes."""
        self._device = device
        self._wavefront = wavefront
        self._turns = turns
        self._runs = runs
        self._trials = trials
        self._verdicts = verdicts
        self._batch_limit = batch_limit
        self._choice = choice
        self._count = count if choice is None else choice.count
        self._chosen = self._count

    def divide(self) -> None:
        """Divide the device into as many lanes as there are to be. Nothing is under way."""
        found = self._runs.divide(self._count)
        self._turns.most = 2 * max(self._batch_limit, found)
        if self._choice is not None and found != self._count:
            self._choice.cannot(self._count)
            # One lane there is now; if others are to be, they are next.
            self._count = found

    @property
    def is_due(self) -> bool:
        """Say whether what is under way is to be finished before the device is divided otherwise."""
        return self._choice is not None and self._choice.count != self._count

    @property
    def chosen(self) -> int:
        """Return how many lanes there are but for trials of other numbers."""
        return self._count if self._choice is None else self._choice.chosen

    def rates(self) -> Mapping[int, float]:
        """Return the work in a second of the device's time, as last measured with each number of lanes."""
        return {} if self._choice is None else self._choice.rates

    def choose(self) -> None:
        """Divide the device otherwise where that is due, and nothing is under way any more."""
        choice, verdicts = self._choice, self._verdicts
        if choice is None or verdicts is None or self._trials is None:
            return
        if choice.chosen != self._chosen:
            was, self._chosen = self._chosen, choice.chosen
            rates = ", ".join(f"{count}: {rate:.2f}" for count, rate in sorted(choice.rates.items()))
            log.info(
                "%s is divided into %d lanes instead of %d from now on; work in a second by the number of lanes: %s",
                *(self._device.name, choice.chosen, was, rates),
            )
            self._trials.then(functools.partial(verdicts.end, "lanes", "count", {"count": choice.chosen}))
        if self.is_due and not self._wavefront and not self._runs.running:
            self._count = choice.count
            self.divide()
