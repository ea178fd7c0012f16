"""Division: into how many lanes the device is divided, measured and chosen while the engine runs. Part of the engine thread.

An operator says how many there are to be, or leaves it to ``sidecar.lanecount``; then what runs of each model take in several
lanes is measured (``sidecar.sweeps``) while nobody waits for anything. Before the device is divided otherwise, all that is under
way is finished (``is_due``).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence

from sidecar.catalog import Deployed
from sidecar.lanecount import LaneChoice
from sidecar.lowering import Lowered
from sidecar.ports import Device
from sidecar.runs import Runs
from sidecar.sweeps import Sweeps
from sidecar.trials import Trials
from sidecar.turns import Turns
from sidecar.underway import Call
from sidecar.wavefront import Wavefront

log = logging.getLogger("trunkline.engine")


class Division:
    """The lanes there are, and why. ``post`` hands what was measured to the engine thread."""

    def __init__(
        self,
        device: Device,
        wavefront: Wavefront[Call],
        turns: Turns[Call],
        runs: Runs,
        trials: Trials | None,
        sweeps: Sweeps | None,
        choice: LaneChoice | None,
        post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float],
        *,
        count: int,
        batch_limit: int,
    ) -> None:
        """Without a ``choice``, for which there must be sweeps and trials, there are ``count`` lanes."""
        self._device = device
        self._wavefront = wavefront
        self._turns = turns
        self._runs = runs
        self._trials = trials
        self._sweeps = sweeps
        self._post = post
        self._clock = clock
        self._batch_limit = batch_limit
        self._choice = choice
        self._count = count if choice is None else choice.count
        # Models whose runs in several lanes are still to be measured, by name.
        self._unmeasured: dict[str, Callable[[], Mapping[int, float] | None]] = {}

    def divide(self) -> None:
        """Divide the device into as many lanes as there are to be. Nothing is under way."""
        self._turns.most = 2 * max(self._batch_limit, self._runs.divide(self._count))

    @property
    def is_due(self) -> bool:
        """Say whether what is under way is to be finished before the device is divided otherwise."""
        return self._choice is not None and self._choice.count != self._count

    def rates(self) -> Mapping[int, float]:
        """Return the requests per second that each number of lanes promises; empty where that is not known."""
        return {} if self._choice is None else self._choice.rates()

    def expect(self, deployed: Deployed, forms: Sequence[Lowered | None]) -> None:
        """Have a model measured, in the forms that it is served in, when the engine has rested."""
        if self._sweeps is not None:
            self._unmeasured[deployed.name] = functools.partial(self._sweeps.seconds, deployed.bundle, deployed.staged, forms)
            # That it has rested is seen when it has done something before.
            self._post(lambda: None)

    def measure(self) -> None:
        """Have it found out what runs of the next model take in several lanes, while nobody waits for anything."""
        choice, trials = self._choice, self._trials
        if choice is None or trials is None or not self._unmeasured:
            return
        name = next(iter(self._unmeasured))
        seconds_of = self._unmeasured.pop(name)

        def measure() -> None:
            seconds = seconds_of()
            # With this the engine is not idle; when it is again, the next has its turn.
            self._post(lambda: choice.learn(name, seconds or {}))

        trials.then(measure)

    def choose(self) -> None:
        """Divide the device otherwise where that suits what is asked better; first, what is under way is finished."""
        if self._choice is None or self._sweeps is None or self._trials is None:
            return
        count = self._choice.look(self._clock())
        if count == self._count or self._wavefront or self._runs.running:
            return
        log.info("%s is divided into %d lanes instead of %d from now on", self._device.name, count, self._count)
        self._count = count
        self.divide()
        self._trials.then(functools.partial(self._sweeps.keep_count, count))
