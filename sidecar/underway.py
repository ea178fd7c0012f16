"""Under way: calls from the moment that the weights of their first stages are in memory until their leases are returned.

A call has a ticket in the wavefront for each of its models. It is answered when the last has its results; it may end before: its
deadline passes, a run or a load fails, its caller leaves. While a lane computes for it, its inputs and weights must stay in any
case: what would give them back waits until that run has ended (``when_ended``). Part of the engine thread.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from trunkline.errors import DeviceFault, DeviceOutOfMemory, TrunklineError
from trunkline.signature import Signature

from sidecar.catalog import Catalog, Deployed, Joint
from sidecar.loads import Parked
from sidecar.outcomes import Outcomes
from sidecar.ports import Device, Session, Work
from sidecar.quarantine import Suspects
from sidecar.refusals import Refusals, as_told, incident
from sidecar.requestcosts import RequestCosts
from sidecar.scheduler import Scheduler
from sidecar.wavefront import Group, Ticket, Wavefront


@dataclass(slots=True, eq=False)
class Call:
    """A request in the wavefront: one ticket for each of its models, and the results that are there already."""

    work: Work
    parts: tuple[Deployed, ...]
    signature: Signature
    tickets: list[Ticket[Call]] = field(default_factory=list)
    results: dict[Ticket[Call], list[Any]] = field(default_factory=dict)
    # Runs in lanes that read its inputs and need its weights.
    run_count: int = 0


class UnderWay:
    """The calls. ``describe`` says what is told of a model that was loaded, ``drop`` forgets evicted weights, ``unblock`` is
    called when something was given back, and ``device_lost`` when nothing can be computed any more.
    """

    def __init__(
        self,
        device: Device,
        catalog: Catalog,
        scheduler: Scheduler[Work],
        wavefront: Wavefront[Call],
        refusals: Refusals,
        costs: RequestCosts,
        outcomes: Outcomes,
        suspects: Suspects,
        device_lost: Callable[[Exception], None],
        clock: Callable[[], float],
        *,
        compute_once: bool,
        describe: Callable[[Deployed], object],
        drop: Callable[[Sequence[str]], None],
        unblock: Callable[[], None],
    ) -> None:
        self.answered_count = 0
        self._device = device
        self._catalog = catalog
        self._residency = catalog.residency
        self._scheduler = scheduler
        self._wavefront = wavefront
        self._refusals = refusals
        self._costs = costs
        self._outcomes = outcomes
        self._suspects = suspects
        self._device_lost = device_lost
        self._clock = clock
        self._compute_once = compute_once
        self._describe = describe
        self._drop = drop
        self._unblock = unblock
        # Calls that lanes compute for.
        self._in_lanes: dict[Call, None] = {}
        # What waits for runs to end, and for whose.
        self._deferred: list[tuple[Collection[Call], Callable[[], None]]] = []

    # --- on their way ------------------------------------------------------------------------------------------------

    def enter(self, parked: Parked) -> None:
        """Let a request whose weights are in memory into the wavefront."""
        work, parts = parked.work, parked.parts
        if work.inputs is None:
            self._conclude(work, parts, lambda: work.session.document(work.request_id, self._describe(parts[0])))
        elif work.deadline <= self._clock():
            self._refuse(work, parts, self._refusals.late(work, "waiting for its model to be loaded"))
        else:
            try:
                self._wavefront.add(self._call(work, parts, parked.joint, work.inputs).tickets)
            except Exception as error:  # noqa: BLE001 - incident logs it
                self._refuse(work, parts, incident(f"{work.model} (call {work.call_id})", error, work))

    def _call(self, work: Work, parts: tuple[Deployed, ...], joint: Joint | None, inputs: Sequence[Any]) -> Call:
        names = parts[0].staged.inputs if joint is None else joint.interface.values
        call = Call(work, parts, parts[0].signature if joint is None else joint.signature)
        named = dict(zip(names, inputs, strict=True))
        # The inputs of models asked together may have batch axes of their own; as rows of a batch they must go side by side.
        extents = {value.shape[0] if value.shape else 1 for value in inputs}
        extent = max(extents, default=1)
        if work.notes is not None:
            work.notes.rows = extent
        shares = self._compute_once and work.tenant.compute_once
        independent = all(deployed.layouts is not None for deployed in parts) and len(extents) == 1 and extent > 0
        for deployed in parts:
            own = {key: named[key] for key in deployed.staged.inputs} if joint is None else named
            layouts = deployed.layouts if independent else None
            results = deployed.staged.results
            padding = None if layouts is None else deployed.padding(own)
            ticket = Ticket(call, deployed.steps, results, own, extent, layouts, deployed.most_rows, shares, padding)
            call.tickets.append(ticket)
        return call

    def look(self) -> None:
        """Let go of requests whose deadline has passed; to be called before each choice: what is left of them need not be run."""
        now = self._clock()
        late = [ticket for ticket in self._wavefront.tickets() if ticket.call.work.deadline <= now]
        for call in dict.fromkeys(ticket.call for ticket in late):
            self._refusals.expired_count += 1
            self.fail(call.tickets, self._refusals.late(call.work, "being computed"))

    def advance(self, group: Group[Call], outputs: Sequence[Any]) -> None:
        """Go on after a run with what it gave; answer those that were at their last stage."""
        finished = self._wavefront.advance(group, outputs)
        for ticket, results in finished:
            call = ticket.call
            call.results[ticket] = results
            if len(call.results) == len(call.tickets):
                self._conclude(call.work, call.parts, functools.partial(self._answer, call))
                # Call and tickets know each other; results would stay until the collector comes round.
                call.results.clear()
                call.tickets.clear()

    # --- in lanes ----------------------------------------------------------------------------------------------------

    def run_begins(self, calls: Iterable[Call]) -> None:
        """Note that a lane computes for calls."""
        for call in calls:
            call.run_count += 1
            self._in_lanes[call] = None

    def run_ends(self, calls: Iterable[Call]) -> None:
        """Note that it does no more; ``settle`` does what has waited for that."""
        for call in calls:
            call.run_count -= 1
            if not call.run_count:
                del self._in_lanes[call]

    def settle(self) -> None:
        """Do what has waited for runs that have ended."""
        for each in [each for each in self._deferred if not any(call.run_count for call in each[0])]:
            self._deferred.remove(each)
            each[1]()

    def when_ended(self, calls: Collection[Call], act: Callable[[], None]) -> None:
        """Do something as soon as no lane computes for any of these calls: now, or later."""
        if any(call.run_count for call in calls):
            self._deferred.append((calls, act))
        else:
            act()

    def is_in_lane(self, deployed: Deployed) -> bool:
        """Say whether a lane computes for a call about a model."""
        return any(deployed in call.parts for call in self._in_lanes)

    def calls(self) -> list[Call]:
        """Return the calls under way, those included that are over but for a run that needs what they have."""
        return [*dict.fromkeys((*(ticket.call for ticket in self._wavefront.tickets()), *self._in_lanes))]

    # --- at their end ------------------------------------------------------------------------------------------------

    def fail(self, failed: Sequence[Ticket[Call]], error: Exception) -> None:
        """End the calls of these tickets; they are told an error."""
        for call in dict.fromkeys(ticket.call for ticket in failed):
            self._wavefront.drop(lambda ticket, call=call: ticket.call is call)  # type: ignore[misc]
            work = call.work
            self._suspects.clear(work.tenant.name, work.model)
            self.when_ended((call,), functools.partial(self._refuse, work, call.parts, as_told(work, error)))

    def look_at_device(self, error: Exception) -> None:
        """After an error of the device's, see whether it can still be used; an engine whose device is lost has to end."""
        if isinstance(error, DeviceFault) and not isinstance(error, DeviceOutOfMemory) and self._device.is_lost():
            self._device_lost(error)

    def load_failed(self, deployed: Deployed, concerned: Sequence[Parked], error: TrunklineError) -> None:
        """End what needs weights that cannot be loaded: the requests that wait for them, and calls about their model."""
        for parked in concerned:
            self._refuse(parked.work, parked.parts, error)
        # None of those under way has come to the stage whose weights are missing.
        self.fail([ticket for ticket in self._wavefront.tickets() if deployed in ticket.call.parts], error)
        self.release(deployed)
        own = [call for call in self._in_lanes if deployed in call.parts]
        self.when_ended(own, functools.partial(self._evict_failed, deployed))

    def _evict_failed(self, deployed: Deployed) -> None:
        # What did arrive goes too, so that the next request starts the load afresh.
        if not self._residency.lease_count(deployed.plan) and deployed in self._catalog.all():
            self._drop(self._residency.evict(deployed.plan, "failed"))

    def forget(self, sessions: Collection[Session], gone: Sequence[Parked], released: Callable[[], None]) -> None:
        """Let go of the calls of sessions that are no more, and of what waited for weights and is ``gone``.

        ``released`` is called when no lane computes for them any more.
        """
        calls = {ticket.call: None for ticket in self._wavefront.tickets() if ticket.call.work.session in sessions}
        self._wavefront.drop(lambda ticket: ticket.call in calls)
        for parked in gone:
            self._give_back(parked.work, parked.parts)
        for call in calls:
            self.when_ended((call,), functools.partial(self._give_back, call.work, call.parts))
        # Calls of theirs that failed may not be over either.
        own = [call for call in self._in_lanes if call.work.session in sessions]
        self.when_ended(own, released)

    def _answer(self, call: Call) -> None:
        outputs = [output for ticket in call.tickets for output in call.results[ticket]]
        specs = tuple(
            (spec.name, *self._device.output_spec(output)) for spec, output in zip(call.signature.outputs, outputs, strict=True)
        )
        # Before it is told: the last of several that are asked one after the other takes the whole call's record with it.
        came_s = self._scheduler.came_s(call.work)
        call.work.session.answer(call.work.request_id, specs, outputs, self._device.read_output)
        self._suspects.clear(call.work.tenant.name, call.work.model)
        self.answered_count += 1
        now = self._clock()
        self._costs.note(call.work.model, self._scheduler.leave(call.work, now), now)
        for deployed in call.parts:
            deployed.request_count += 1
            deployed.last_used_s = now
            if came_s is not None:
                self._outcomes.answered(deployed.name, now - came_s)

    def _refuse(self, work: Work, parts: tuple[Deployed, ...], error: TrunklineError) -> None:
        self._conclude(work, parts, functools.partial(self._refusals.fail, work, error))

    def _conclude(self, work: Work, parts: tuple[Deployed, ...], tell: Callable[[], None]) -> None:
        """Tell a request's session the outcome, whatever happens on the way, and return its leases."""
        try:
            tell()
        except Exception as error:  # noqa: BLE001 - what is not ours is logged
            self.look_at_device(error)
            self._refusals.fail(work, as_told(work, error))
        finally:
            # What was told of it is told: an error is no measure of how long an answer takes.
            self._give_back(work, parts)

    def _give_back(self, work: Work, parts: Sequence[Deployed]) -> None:
        """Let go of a request that is over."""
        self._scheduler.leave(work)
        for deployed in parts:
            self.release(deployed)

    def release(self, deployed: Deployed) -> None:
        """Return a lease on a model."""
        self._residency.release(deployed.plan)
        self._unblock()
        self._drop(self._catalog.let_go(deployed))

    def check_invariants(self, running: Sequence[Collection[Call]]) -> None:
        """Raise AssertionError when runs and what waits for them do not fit together; ``running`` are the calls of each run."""
        counts = Counter(call for calls in running for call in calls)
        for call in self.calls():
            assert call.run_count == counts[call], "a call's runs are miscounted"
        assert self._in_lanes.keys() == counts.keys(), "lanes compute for others than is known"
        assert running or not self._deferred, "something waits for runs that have ended"
