"""Runs: stages on their way through the device, in the engine thread or in lanes, and what becomes of what they give.

With one lane the engine thread runs stages itself; with several (``sidecar.lanes``) it hands them over, goes on with its inbox,
and finds there what they gave. A stage beside which there is nothing to run it keeps, where one that has the whole device is done
sooner than in a lane. What becomes of the calls is for ``sidecar.underway``. Part of the engine thread.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from trunkline.errors import DeviceFault, DeviceOutOfMemory, TrunklineError, ValueOutOfBounds

from sidecar.catalog import Step
from sidecar.costs import BatchCosts
from sidecar.journal import Page
from sidecar.lanecount import LaneChoice
from sidecar.lanes import Lanes, Outcome, attempt
from sidecar.loads import Loads
from sidecar.ports import Device
from sidecar.shortage import Shortage, Splits
from sidecar.streams import Streams
from sidecar.stretches import Stretch, Unjoined
from sidecar.strides import Strides
from sidecar.turns import Turns
from sidecar.underway import Call, UnderWay
from sidecar.wavefront import Group, Wavefront

log = logging.getLogger("trunkline.engine")

# Where stacking did not pay, nobody looks for something to stack the next time, twice as often each time, so often at most.
_LONGEST_REST: Final = 64


@dataclass(slots=True)
class Counts:
    """Stages run, the rows they were run on, and the requests that each stage was run for: what nobody shares has one of each."""

    stages: int = 0
    stage_rows: int = 0
    stage_requests: int = 0
    # Stages that were run within another's run, their weights stacked.
    stacked: int = 0
    # Stages that were run within another's run, as one with it.
    joined: int = 0


@dataclass(slots=True, eq=False)
class _Run:
    """A stage on its way through the device: of one group, or of several whose weights are ``stacked``; or a ``stretch`` of them.

    What is noted of it is of when it began: meanwhile tickets come and go, and nobody may be left in its groups.
    """

    groups: tuple[Group[Call], ...]
    step: Step
    extent: int
    cost_key: tuple[object, ...]
    # Where it can be stacked, the names under which its cost is known for that: on one input, and on inputs of their own.
    structures: tuple[tuple[object, ...], ...]
    # The groups as they were: who left meanwhile is charged, too.
    seen: tuple[Group[Call], ...]
    # If it is stacked, the one of them that it is noted under.
    stacked: tuple[object, ...] | None = None
    stretch: Stretch | None = None
    # What the engine needs for it, beside the device: most of what small stages take.
    engine_s: float = 0.0
    splits: Splits = field(default_factory=Splits)
    # Whose inputs and weights it needs; and in a lane, whether other lanes computed at the same time.
    calls: tuple[Call, ...] = ()
    beside: bool = False
    # It has the whole device, with lanes or without.
    whole: bool = False
    # The stages of its groups, by the names under which their cost is known, with the rows of each; and how many were under way.
    stages: tuple[tuple[tuple[object, ...], int], ...] = ()
    under_way: int = 0
    # Where it is noted that the device is at it.
    place: int = -1
    # In device time: where several lanes compute at the same time, each has its part of that.
    began_s: float = 0.0

    @property
    def count(self) -> int:
        """Return how many stages are run for each of its groups."""
        return 1 if self.stretch is None else self.stretch.count


@dataclass(slots=True)
class _Rest:
    """For how long nobody looks for something to stack a stage with: ``left`` of ``length`` runs, ``among`` so many groups."""

    among: int
    length: int
    left: int

    def goes_on(self, group_count: int) -> bool:
        """Say whether nobody is to look this time."""
        if not self.left or group_count > self.among:
            return False
        self.left -= 1
        return True


class Runs:
    """What the device does, for the calls that are ``under_way``."""

    def __init__(
        self,
        device: Device,
        wavefront: Wavefront[Call],
        turns: Turns[Call],
        loads: Loads,
        streams: Streams,
        strides: Strides,
        shortage: Shortage,
        costs: BatchCosts,
        under_way: UnderWay,
        choice: LaneChoice | None,
        page: Page,
        post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float],
        *,
        stacking: bool,
        tracing: bool = False,
    ) -> None:
        """``choice`` is told what was run, where by that is chosen how many lanes there are; ``page``, what is being run.

        With ``tracing`` there may be requests of which is noted when they were run.
        """
        self.counts = Counts()
        # Set while everything in the wavefront waits, for weights or for a lane; whatever is posted may end that.
        self.stalled = False
        self.running: list[_Run] = []
        # A request that had no room beside what other lanes computed: it is run while none does.
        self.alone: Group[Call] | None = None
        self._device = device
        self._wavefront = wavefront
        self._turns = turns
        self._loads = loads
        self._streams = streams
        self._strides = strides
        self._shortage = shortage
        self._costs = costs
        self._under_way = under_way
        self._choice = choice
        self._page = page
        self._post = post
        self._clock = clock
        self._stacking = stacking
        self._tracing = tracing
        # None while stages are run here.
        self._lanes: Lanes | None = None
        # Device time that has passed, and when that was reckoned.
        self._device_s = 0.0
        self._reckoned_s = 0.0
        # Of structures that it did not pay for of late.
        self._rests: dict[int, _Rest] = {}

    def divide(self, count: int) -> int:
        """Divide the device into so many lanes; return how many there are. Nothing is under way."""
        self.stop()
        if count > 1:
            try:
                self._lanes = Lanes(self._device, count, self._post, self._clock)
            except TrunklineError as error:
                log.error(
                    "%s cannot be divided into %d lanes (%s); stages are run one at a time, until the sidecar is started again",
                    *(self._device.name, count, error.message),
                )
        self._wavefront.lanes = self._costs.lanes = 1 if self._lanes is None else self._lanes.count
        return self._wavefront.lanes

    def stop(self) -> None:
        """End the lanes' threads. Nothing is under way."""
        if self._lanes is not None:
            self._lanes.stop()
            self._lanes = None

    def go_on(self) -> None:
        """Run a stage, or have every idle lane run one."""
        while True:
            self.stalled = self._shortage.relieving or not self._idle_count()
            if self.stalled:
                return
            began_s = self._clock()
            self._under_way.look()
            try:
                group = self._choose()
            except Exception as error:  # noqa: BLE001 - what is not ours is logged
                # It would be chosen again, for ever.
                self._under_way.fail(self._wavefront.abandon(), error)
                return
            self.stalled = group is None
            if group is None:
                return
            try:
                run, compute = self._prepared(group)
                run.whole = self._lanes is None or self._is_alone(run)
                self._begin(run)
            except Exception as error:  # noqa: BLE001 - as above
                self.fail(group, error)
                return
            if self._choice is not None:
                run.stages = tuple(
                    (each.cost_key(step), each.extent or 1)
                    for each in run.groups
                    for step in each.first.steps[each.index : each.index + run.count]
                )
                run.under_way = self._wavefront.row_count
            run.engine_s = self._clock() - began_s
            if run.whole:
                try:
                    outcome = attempt(compute, self._clock)
                    # It has weights; what comes now may let go of them.
                    del compute
                    self._ran(run, outcome, outcome.seconds)
                    # An error knows this frame, which must not know the error.
                    del outcome
                finally:
                    self._page.end(run.place)
                return
            self._hand_over(run, compute)

    def _begin(self, run: _Run) -> None:
        """Note that the device is at a run, and for whom: until it is over, and those are answered whose last stage it is."""
        calls = [ticket.call for group in run.groups for row in group.rows for ticket in row.tickets]
        # One, mostly.
        run.calls = tuple(calls) if len(calls) == 1 else tuple(dict.fromkeys(calls))
        asked = [(work.tenant.name, work.model, work.call_id) for work in [call.work for call in run.calls]]
        run.place = self._page.begin(self._clock(), self._expected_s(run), asked)

    def _expected_s(self, run: _Run) -> float:
        """Return what a run was measured to take, or is reckoned to by what its model was tried with; 0 where nobody knows."""
        lanes = 1 if run.whole else self._wavefront.lanes
        if run.stacked is not None:
            return self._costs.expected_s(run.stacked, len(run.groups), lanes)
        return self._strides.expected_s(run.groups[0], run.cost_key, run.count, lanes)

    def _idle_count(self) -> int:
        """Return how many stages may be begun now."""
        if self._lanes is None:
            return 1
        return 0 if self.alone is not None and self.running else self._lanes.idle_count

    def _is_alone(self, run: _Run) -> bool:
        """Say whether the whole device is better for a run than a lane of it: nothing else could be run meanwhile."""
        return self._device.is_shared_by_lanes and not self.running and self._wavefront.has_only(run.groups, self._is_ready)

    def _choose(self) -> Group[Call] | None:
        if self._lanes is None:
            return self._turns.choose(self._wavefront, self._loads.is_ready, 1)
        alone = self.alone
        if alone is not None and alone in self._wavefront and self._is_ready(alone.step):
            return alone
        self.alone = None
        return self._turns.choose(self._wavefront, self._is_ready, self._idle_count())

    def _is_ready(self, step: Any) -> bool:
        """Say whether a stage may be run: its weights are there, and if its model streams, no lane is at another stage of it."""
        if not self._loads.is_ready(step):
            return False
        streams = self._streams.deployed
        return streams is None or step not in streams.steps or not self._under_way.is_in_lane(streams)

    def _prepared(self, group: Group[Call]) -> tuple[_Run, Callable[[], Sequence[Sequence[Any]]]]:
        """Return the next run of a group, and what computes the outputs of each group in it. Raises what a device raises."""
        step = group.step
        assert isinstance(step, Step)
        if (alone := self._prepared_stretch(group)) is not None:
            return alone
        # A lane must not look at what changes meanwhile.
        seen = group if self._lanes is None else group.frozen()
        structures = () if step.stacked is None else _structures(group, step)
        run = _Run((group,), step, group.extent, group.cost_key(step), structures, (seen,))
        if step.stacked is not None and (stacked := self._prepared_stacked(group, run)) is not None:
            return run, stacked
        weights, splits, program = self._loads.bind(step), run.splits, step.program
        return run, lambda: [self._shortage.run(seen, program, weights, splits)]

    def _prepared_stretch(self, group: Group[Call]) -> tuple[_Run, Callable[[], Sequence[Sequence[Any]]]] | None:
        """Have a group run through several stages as one; None where it is to be run through the next one."""
        if self._lanes is not None and (self.running or not self._device.is_shared_by_lanes):
            return None
        if (stride := self._strides.of(group)) is None:
            return None
        stretch, steps = stride.stretch, stride.steps
        run = _Run((group,), steps[0], group.extent, stride.key, (), (group,), stretch=stretch)
        weights, inputs = [self._loads.bind(step) for step in steps], [group.values[key] for key in stretch.takes]
        return run, lambda: [stretch.run(self._device.run, weights, inputs)]

    def _prepared_stacked(self, group: Group[Call], run: _Run) -> Callable[[], Sequence[Sequence[Any]]] | None:
        """Have a stage of several models run as one; None when there is nothing to stack, or it does not pay."""
        rest = self._rests.get(id(run.step.stacked))
        if not self._stacking or group.apart or (rest is not None and rest.goes_on(self._wavefront.group_count)):
            return None

        def alike(one: Any, other: Any) -> bool:
            return one.stacked is other.stacked and self._is_ready(other)

        beside, abreast = run.structures
        # Measured one by one as well, or nobody knows whether it pays.
        if not self._costs.is_known(beside, 1) or not (candidates := self._wavefront.others(group, alike)):
            return None
        if others := self._wavefront.beside(group, candidates):
            structure = beside
        else:
            others, structure = self._wavefront.abreast(group, candidates, self._turns.comes_along), abreast
            # Lanes that are idle get their part of them.
            del others[-(-(1 + len(others)) // self._idle_count()) - 1 :]
        count = 1 + len(others)
        length = 1 if rest is None else min(2 * rest.length, _LONGEST_REST)
        # To copy weights each time never does.
        if count == 1 or not self._loads.keeps(run.step, count) or not self._costs.pays([structure], 1, count, length):
            among = max(self._wavefront.group_count, 0 if rest is None else rest.among)
            self._rests[id(run.step.stacked)] = _Rest(among, length, length)
            return None
        self._rests.pop(id(run.step.stacked), None)
        groups = (group, *others)
        try:
            stacked = self._loads.stack([each.step for each in groups])  # type: ignore[misc]
        except DeviceFault as error:
            self._unstack(groups, error)
            return None
        run.groups, run.stacked = groups, structure
        run.seen = groups if self._lanes is None else (*run.seen, *(each.frozen() for each in groups[1:]))
        program, takes = run.step.stacked, {each.step.key: each.takes() for each in groups}
        places = [stacked.keys.index(each.step.key) for each in groups]
        # Who is among the copies and was not asked runs on what the first one runs on, for nobody.
        inputs = [group.takes()] if structure is beside else [takes.get(key, group.takes()) for key in stacked.keys]

        def compute() -> Sequence[Sequence[Any]]:
            outputs = self._device.run_stacked(program, stacked.weights, inputs)
            return [outputs[place] for place in places]

        return compute

    def _unstack(self, groups: Sequence[Group[Call]], error: DeviceFault) -> None:
        log.warning("stages of one structure are run one by one: %s", error.message)
        for each in groups:
            assert isinstance(each.step, Step)
            each.step.stacked = None

    def _hand_over(self, run: _Run, compute: Callable[[], Sequence[Sequence[Any]]]) -> None:
        """Have an idle lane run a stage."""
        assert self._lanes is not None
        for group in run.groups:
            group.running = True
        self._under_way.run_begins(run.calls)
        run.began_s = self._reckon()
        self.running.append(run)
        if len(self.running) > 1:
            for each in self.running:
                each.beside = True
        self._lanes.hand(compute, functools.partial(self._run_ended, run))

    def _run_ended(self, run: _Run, outcome: Outcome) -> None:
        """Take back what a lane was given. What others have waited for is done in any case."""
        device_s = self._reckon() - run.began_s
        self.running.remove(run)
        for group in run.groups:
            group.running = False
        self._under_way.run_ends(run.calls)
        try:
            self._ran(run, outcome, device_s)
        finally:
            self._page.end(run.place)
            self._under_way.settle()

    def _reckon(self) -> float:
        """Return the device time that has passed; called whenever a run begins or ends."""
        now = self._clock()
        if self.running:
            self._device_s += (now - self._reckoned_s) / len(self.running)
        self._reckoned_s = now
        return self._device_s

    def _ran(self, run: _Run, outcome: Outcome, device_s: float) -> None:
        """Go on after a run that took so much device time, with what it gave or without."""
        group, error = run.groups[0], outcome.error
        if error is not None:
            self._under_way.look_at_device(error)
        if self._tracing:
            self._note(run, outcome.seconds)
        self._shortage.ran(group if error is None else None, run.splits)
        if self.alone is group and not isinstance(error, DeviceOutOfMemory):
            self.alone = None
        # What failed took its time as well.
        for each in run.seen:
            self._turns.charge(each, device_s / len(run.seen))
        if run.stretch is not None:
            self._strides.ended(run.calls[0])
        if error is None:
            self._record_run(run, outcome.seconds)
            ended_s = self._clock()
            for each, outputs in zip(run.groups, outcome.given, strict=True):
                self._go_on_with(each, outputs, run.stretch)
            in_all_s = outcome.seconds + run.engine_s + self._clock() - ended_s
            if self._choice is not None:
                # In a lane, what the engine needs is hidden behind the others.
                busy_s = in_all_s if run.whole else device_s
                self._choice.ran(ended_s, self._wavefront.lanes, run.stages, busy_s, run.under_way)
            for structure in run.structures if run.stacked is None else (run.stacked,):
                self._costs.record(structure, len(run.groups), in_all_s, 1 if run.whole else None)
        elif run.stretch is not None and isinstance(error, TrunklineError | Unjoined):
            # Which stage it was, and whether there is room for each, shows when they are run one by one.
            group.apart = True
            if isinstance(error, Unjoined):
                log.info("stages are run one by one: %s", error)
                self._strides.give_up(run.cost_key)
        elif run.stacked is not None and isinstance(error, ValueOutOfBounds):
            # Whose index it was shows when each is run by itself.
            for each in run.groups:
                each.apart = True
        elif run.stacked is not None and isinstance(error, DeviceFault):
            # They are chosen again, and run one by one.
            self._unstack([each for each in run.groups if next(each.tickets(), None) is not None], error)
        elif next(group.tickets(), None) is None:
            log.info("a stage that nobody waits for any more failed: %s", error)
        elif isinstance(error, DeviceOutOfMemory):
            self._has_no_room(group, error, run.beside)
        else:
            self.fail(group, error)

    def _note(self, run: _Run, seconds: float) -> None:
        """Note it of the requests that are traced."""
        now = self._clock()
        for group in run.groups:
            works = {id(ticket.call): ticket.call.work for ticket in group.tickets()}
            for work in works.values():
                if work.notes is not None:
                    work.notes.ran(now - seconds, now, group.extent, len(works))

    def _record_run(self, run: _Run, seconds: float) -> None:
        """Note what a run has cost."""
        self.counts.stages += run.count
        self.counts.joined += run.count - 1
        if run.stacked is not None:
            self.counts.stacked += len(run.groups) - 1
            return
        self._costs.record(run.cost_key, run.extent, seconds, 1 if run.whole else None)
        if self._streams.deployed is not None:
            self._streams.ran(run.step, seconds)

    def _go_on_with(self, group: Group[Call], outputs: Sequence[Any], stretch: Stretch | None) -> None:
        if next(group.tickets(), None) is None:
            return  # its calls failed with another stage of theirs, or their callers left
        count = 1 if stretch is None else stretch.count
        self.counts.stage_rows += count * len(group.rows)
        self.counts.stage_requests += count * sum(1 for _ in group.tickets())
        index, values = group.index, group.values if stretch is None else dict(group.values)
        try:
            if stretch is not None:
                outputs = self._wavefront.leap(group, count, dict(zip(stretch.gives, outputs, strict=True)))
            self._under_way.advance(group, outputs)
        except Exception as error:  # noqa: BLE001 - what is not ours is logged
            # Its rows are run once more, each by itself, and must stand before a stage of which they have what it takes.
            group.index, group.values = index, values
            self.fail(group, error)

    def _has_no_room(self, group: Group[Call], error: DeviceOutOfMemory, beside: bool) -> None:
        if len(group.rows) > 1:
            # Each by itself.
            self.fail(group, error)
        elif self._shortage.relieve(group, error):
            pass
        elif beside:
            self.alone = group
        else:
            self.fail(group, self._shortage.refusal(group, error))

    def fail(self, group: Group[Call], error: Exception) -> None:
        self._under_way.fail(self._wavefront.fail(group), error)

    def check_invariants(self) -> None:
        """Raise AssertionError when runs and what waits for them do not fit together."""
        self._under_way.check_invariants([run.calls for run in self.running])


def _structures(group: Group[Call], step: Step) -> tuple[tuple[object, ...], ...]:
    name = (id(step.stacked), group.extent, group.first.scale)
    return ("beside", *name), ("abreast", *name)
