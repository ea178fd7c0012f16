"""Admission: which request is taken up next, and what it needs before. Part of the engine thread.

Tenants have their turns. What a request needs is room to compute, room in the quota of its tenant, and a lease on the weights of
its models; then it goes to ``sidecar.loads``. Where one of these is missing it goes back to the queue, and no other of its tenant
is taken up before something is given back (``unblock``). Who waits for a lease is first in line for the memory that it needs, and
nobody else is given any. Two kinds of requests go another way: a model that does not fit into memory streams, and models of one
call that do not fit together are asked one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence

from trunkline.errors import BudgetExceeded, SignatureMismatch, TrunklineError
from trunkline.protocol import JOINT
from trunkline.signature import Signature

from sidecar.activations import Activations
from sidecar.catalog import Catalog, Deployed, Joint
from sidecar.claims import Claims
from sidecar.deployments import Deployments
from sidecar.division import Division
from sidecar.inturn import AllInTurn
from sidecar.loads import Loads, Parked
from sidecar.ports import Session, Work
from sidecar.quarantine import Suspects
from sidecar.refusals import Refusals, incident
from sidecar.residency import Grant
from sidecar.scheduler import Scheduler
from sidecar.streams import Streams
from sidecar.tenants import Tenant
from sidecar.traces import Lease, Recorder
from sidecar.turns import Turns
from sidecar.underway import Call, UnderWay
from sidecar.wavefront import Ticket, Wavefront


class Admission:
    """What waits, and for what. ``drop`` forgets evicted weights."""

    def __init__(
        self,
        catalog: Catalog,
        scheduler: Scheduler[Work],
        turns: Turns[Call],
        wavefront: Wavefront[Call],
        under_way: UnderWay,
        loads: Loads,
        claims: Claims,
        streams: Streams,
        in_turn: AllInTurn,
        activations: Activations | None,
        division: Division,
        deployments: Deployments,
        refusals: Refusals,
        recorder: Recorder,
        suspects: Suspects,
        clock: Callable[[], float],
        *,
        batch_limit: int,
        drop: Callable[[Sequence[str]], None],
    ) -> None:
        """Without ``activations`` there is room to compute for everybody."""
        self._catalog = catalog
        self._residency = catalog.residency
        self._scheduler = scheduler
        self._turns = turns
        self._wavefront = wavefront
        self._under_way = under_way
        self._loads = loads
        self._claims = claims
        self._streams = streams
        self._in_turn = in_turn
        self._activations = activations
        self._division = division
        self._deployments = deployments
        self._refusals = refusals
        self._recorder = recorder
        self._suspects = suspects
        self._clock = clock
        self._started_s = clock()
        self._batch_limit = batch_limit
        self._drop = drop
        # Requests that wait for the run of a model that streams to end.
        self._aside: list[Work] = []
        # Set while a request waits to be the only one.
        self._blocked = False
        # The tenant that waits for a lease of somebody else to end; until then, nobody else gets memory that it needs.
        self._first_in_line: str | None = None
        # Set from then on until nobody does: meanwhile the model that streams takes no more than it must.
        self._is_short_of_memory = False
        # Tenants whose next request waits for room to compute, and those that wait for something else to be given back.
        self._short: set[str] = set()
        self._patient: set[str] = set()

    @property
    def aside_count(self) -> int:
        """Return how many requests wait for the run of a model that streams to end."""
        return len(self._aside)

    def waiting(self) -> Iterator[Work]:
        """Yield the requests that were not taken up yet."""
        yield from self._scheduler.waiting()
        yield from self._aside

    @property
    def is_open(self) -> bool:
        """Say whether nobody waits for memory, and there is nothing that all wait for."""
        return self._first_in_line is None and not self._is_shut()

    def can_take_up(self) -> bool:
        """Say whether there is a request that ``take_up`` would look at."""
        if not len(self._scheduler) or self._is_shut():
            return False
        return self._scheduler.can_take(self._admits())

    def take_up(self) -> None:
        """Take up what can be, in the order of turns."""
        self._take_up_all()
        if self._first_in_line is not None and self._streams.deployed is not None:
            # Who was refused has what the stream lets go of for it, before anybody else is asked.
            self.follow_stream()
            self._take_up_all()
        if self.is_open:
            self._is_short_of_memory = False

    def unblock(self) -> None:
        """Ask everybody again: something was given back."""
        self._blocked = False
        self._first_in_line = None
        self._short.clear()
        self._patient.clear()

    def follow_stream(self) -> None:
        """Have the model that streams follow its requests."""
        deployed = self._streams.deployed
        if deployed is None:
            return

        def belongs(ticket: Ticket[Call]) -> bool:
            return deployed in ticket.call.parts

        try:
            ended = self._streams.move(self._wavefront.standing(belongs), self._is_short_of_memory)
        except TrunklineError as error:
            self._under_way.fail([ticket for ticket in self._wavefront.tickets() if belongs(ticket)], error)
            ended = self._streams.move(())
        if self._is_short_of_memory and self._streams.gave_way:
            # There may be room now for who waits.
            self._first_in_line = None
            self._patient.clear()
        if ended:
            # In the order in which they came.
            for work in reversed(self._aside):
                self._scheduler.put_back(work)
            self._aside.clear()

    def forget(self, sessions: Collection[Session]) -> None:
        """Let go of what these sessions have waiting for a stream to end."""
        for work in self._aside:
            if work.session in sessions:
                self._scheduler.leave(work)
        self._aside = [work for work in self._aside if work.session not in sessions]

    def load(self, work: Work, parts: tuple[Deployed, ...], joint: Joint | None, tenant: Tenant, grant: Grant) -> None:
        """Have models loaded that were leased for a request, in the quota of a tenant."""
        if work.notes is not None:
            work.notes.taken(self._clock(), self._catalog.device.name)
        self._claims.claim(tenant, [deployed.plan for deployed in parts])
        self._record(grant, parts)
        self._drop(grant.evict)
        self._loads.want(work, parts, joint)

    def _is_shut(self) -> bool:
        """Say whether no request of anybody can be taken up before something is given back, or all that is under way is over."""
        return self._division.is_due or self._blocked or self._streams.starved

    def _admits(self) -> Callable[[Tenant], bool]:
        """Return what says of a tenant whether one of its requests can be taken up now."""
        aside = Counter(work.tenant.name for work in self._aside)
        full = {name for name, count in aside.items() if count >= 2 * self._batch_limit}
        excluded = self._turns.occupied(self._wavefront) | self._short | self._patient | full
        first = self._first_in_line
        if first is None:
            return lambda tenant: tenant.name not in excluded
        shares = self._scheduler.shares
        return lambda tenant: tenant.name not in excluded and shares.is_before(tenant.name, first)

    def _take_up_all(self) -> None:
        while len(self._scheduler) and not self._is_shut():
            expired, work = self._scheduler.take(self._clock(), self._admits())
            for late in expired:
                self._refusals.expired_count += 1
                self._refusals.turn_away(late, self._refusals.late(late, "waiting"))
            if work is None:
                break
            self._take_up(work)

    def _take_up(self, work: Work) -> None:
        try:
            self._admit(work)
        except Exception as error:  # noqa: BLE001 - incident logs it
            # Out of the queue, and nowhere else: whoever asked must not wait for ever.
            self._refusals.turn_away(work, incident(f"{work.model} (call {work.call_id})", error, work))

    def _admit(self, work: Work) -> None:
        try:
            signature = self._catalog.signature(work.model)
            parts = self._catalog.parts(work.model)
            self._deployments.complete_for(parts)
            joint = self._catalog.joint(work.model) if JOINT in work.model else None
        except TrunklineError as error:
            self._refusals.turn_away(work, error)
            return
        if work.signature is not None and not _takes_the_same(work.signature, signature):
            # What was checked is what is computed: these inputs were another version's.
            message = f"{work.model} became version {signature.version} while the request was waiting"
            self._refusals.turn_away(work, SignatureMismatch(message))
            return
        if self._first_in_line is not None and not all(deployed.loaded for deployed in parts):
            # Somebody waits for memory: what it waits for must not go to others, whose turn it may be.
            self._wait(work)
            return
        if self._suspects and self._must_wait_for_suspects(work):
            return
        if not self._has_room_to_compute(work, parts, joint):
            return
        try:
            for deployed in parts:
                self._catalog.prepare(deployed)
            if self._streams.deployed in parts:
                self._stream(work, parts)
                return
            plans = [deployed.plan for deployed in parts]
            if not self._has_room_in_quota(work, plans):
                return
            grant = self._residency.lease(*plans)
        except BudgetExceeded as error:
            if work.inputs is None:
                self._refusals.turn_away(work, error)
            elif joint is not None:
                self._in_turn.begin(work, parts, joint)
            else:
                self._stream(work, parts)
            return
        except TrunklineError as error:
            self._refusals.turn_away(work, error)
            return
        if grant is None:
            self._first_in_line = self._first_in_line or work.tenant.name
            self._is_short_of_memory = True
            self._wait(work)
            return
        self.load(work, parts, joint, work.tenant, grant)

    def _must_wait_for_suspects(self, work: Work) -> bool:
        """Say whether a request was put back to wait: a suspect until it is the only one, and all others until one is over."""
        if work.inputs is None:
            return False
        under_way = (*(call.work for call in self._under_way.calls()), *(parked.work for parked in self._loads.parked))
        busy = [each for each in under_way if each.inputs is not None]
        if not busy or not any(self._suspects.has(each.tenant.name, each.model) for each in (work, *busy)):
            return False
        self._scheduler.put_back(work)
        self._blocked = True
        return True

    def _has_room_to_compute(self, work: Work, parts: tuple[Deployed, ...], joint: Joint | None) -> bool:
        """Say whether what a call takes beside weights can be had now; if not, it was refused, or put back to wait."""
        if self._activations is None or work.inputs is None:
            return True
        reserves = self._activations.reserves
        needed = [
            self._activations.needed_bytes(
                deployed.bundle, work.inputs if joint is None else joint.inputs_of(deployed, work.inputs)
            )
            for deployed in parts
        ]
        most_bytes = reserves.most_bytes(work.tenant.name)
        for deployed, size_bytes in zip(parts, needed, strict=True):
            if size_bytes is not None and size_bytes > most_bytes:
                message = (
                    f"a call of {deployed.name} with inputs of these sizes takes about {size_bytes} bytes beside weights, of "
                    f"the activation budget it may have {most_bytes}; send less at a time, or start the sidecar with a larger "
                    "--activation-budget"
                )
                error = BudgetExceeded(message, needed_bytes=size_bytes, budget_bytes=most_bytes)
                self._refusals.turn_away(work, error)
                return False
        # What takes nobody knows how much takes all there is.
        work.activation_bytes = sum(reserves.budget_bytes if size_bytes is None else size_bytes for size_bytes in needed)
        if work.activation_bytes > most_bytes and joint is not None and None not in needed:
            # Each of them has room by itself. While that is not known they go alone, together: once may be all they are asked.
            self._in_turn.begin(work, parts, joint)
            return False
        taken: Counter[str] = Counter()
        for each in (*(call.work for call in self._under_way.calls()), *(parked.work for parked in self._loads.parked)):
            taken[each.tenant.name] += each.activation_bytes
        if work.activation_bytes > most_bytes:
            # It goes alone, and so that it ever does, all others wait for it.
            self._blocked = any(taken.values())
        elif not reserves.fits(work.tenant.name, work.activation_bytes, taken, waiting=bool(self._short)):
            self._scheduler.put_back(work)
            self._short.add(work.tenant.name)
            return False
        if self._blocked:
            self._scheduler.put_back(work)
        return not self._blocked

    def _has_room_in_quota(self, work: Work, plans: Sequence[str]) -> bool:
        """Say whether a tenant may have models in memory now; if not, the request was refused, or put back to wait."""
        try:
            freed = self._claims.make_room(work.tenant, plans)
        except BudgetExceeded as error:
            self._refusals.turn_away(work, error)
            return False
        if freed is None:
            # Until one of its own requests is answered.
            self._wait(work)
            return False
        self._drop(freed)
        return True

    def _wait(self, work: Work) -> None:
        """Have a tenant wait until something is given back."""
        self._scheduler.put_back(work)
        self._patient.add(work.tenant.name)

    def _stream(self, work: Work, parts: tuple[Deployed, ...]) -> None:
        """Take up a request for a model that does not fit, or put it aside until the run of one has ended."""
        try:
            entered = len(parts) == 1 and work.inputs is not None and self._streams.enter(parts[0])
        except TrunklineError as error:
            self._refusals.turn_away(work, error)
            return
        if entered:
            if work.notes is not None:
                work.notes.taken(self._clock(), self._catalog.device.name)
                self._loads.watch(parts[0], work.notes)
            self._under_way.enter(Parked(work, parts, None, set()))
        else:
            self._aside.append(work)

    def _record(self, grant: Grant, parts: Sequence[Deployed]) -> None:
        weights = [self._residency.weights(deployed.plan) for deployed in parts]
        lease = Lease(
            self._clock() - self._started_s,
            tuple(deployed.plan for deployed in parts),
            grant.hit_bytes,
            grant.missed_bytes,
            grant.evicted_bytes,
        )
        self._recorder.record(lease, weights)


def _takes_the_same(one: Signature, other: Signature) -> bool:
    return one is other or (one.inputs == other.inputs and one.symbols == other.symbols)
