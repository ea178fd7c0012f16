"""The scheduler: which requests are taken, which is next, and which come too late. Pure: the clock is passed in.

Every tenant has a queue of its own, bounded in requests and in bytes, and *shares* (``sidecar.shares``) tell whose turn it is. A
request that cannot be answered in time, by what others like it took and by what is before it, is refused at once, with the
prediction, so that its function can go elsewhere; one that has become late is never run. The decisions are those of Clockwork
(Gujarati et al., 2020) for one node that does not know what will come. Owned by the engine thread.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Generic, NamedTuple, Protocol, TypeVar

from trunkline.errors import DeadlineUnreachable, QueueFull

from sidecar.forecast import Forecast
from sidecar.inflight import InFlight
from sidecar.shares import Contender, Shares
from sidecar.tenants import OPEN, Quotas, Tenant

# What a refused request is told to wait at least, where nothing better is known.
_SHORTEST_WAIT_S: Final = 0.05


class Scheduled(Protocol):
    """What the scheduler needs to know of a request; ``deadline`` is a time of the engine's clock, in seconds."""

    @property
    def deadline(self) -> float: ...
    @property
    def tenant(self) -> Tenant: ...
    @property
    def input_bytes(self) -> int: ...


R = TypeVar("R", bound=Scheduled)


@dataclass(slots=True, eq=False)
class _Record(Generic[R]):
    """A request that waits or runs, what it is reckoned to cost (None: unknown), and what it was charged so far, in seconds."""

    request: R
    order: int
    kind: Hashable
    cost_s: float | None
    # When it was submitted, how long it was reckoned to take, and by that and what came of others, said.
    submitted_s: float
    reckoned_s: float | None
    said_s: float = 0.0
    # Of which weights the time is reckoned in that they take to be there; "" for none.
    loads: str = ""
    # The request that this one is a part of.
    whole: R | None = None
    charged_s: float = 0.0

    @property
    def left_s(self) -> float:
        return max(0.0, (self.cost_s or 0.0) - self.charged_s)


@dataclass(slots=True)
class _Tenancy(Generic[R]):
    """What a tenant has here."""

    waiting: deque[_Record[R]] = field(default_factory=deque)
    # Requests that wait or run, and the bytes of their inputs.
    count: int = 0
    input_bytes: int = 0
    # Device time that its requests are reckoned to need yet, and what all of them have had.
    backlog_s: float = 0.0
    device_s: float = 0.0


class Load(NamedTuple):
    """How much a tenant waits for: requests, and the seconds until the device would begin with one more.

    ``device_s`` are the seconds that the device has worked for it, as long as it is a tenant.
    """

    waiting_count: int
    running_count: int
    input_bytes: int
    wait_s: float
    device_s: float


class Scheduler(Generic[R]):
    """Waiting requests, and the books on those that run. At most ``limit`` wait for each tenant; a full queue refuses."""

    def __init__(self, limit: int, quotas: Quotas = OPEN, in_flight: InFlight | None = None) -> None:
        """Several schedulers may have one ``in_flight``: caps on what is under way then hold for all of them together."""
        self.forecast = Forecast()
        self.shares = Shares()
        self._limit = limit
        self._in_flight = in_flight or InFlight()
        self._quotas = quotas
        self._tenancies: dict[str, _Tenancy[R]] = {}
        self._records: dict[int, _Record[R]] = {}
        self._waiting_count = 0
        self._order = 0
        self.shares.use(quotas.tenants.values())

    def __len__(self) -> int:
        return self._waiting_count

    def waiting_count(self, tenant: Tenant) -> int:
        """Return how many requests of a tenant wait: all that it may be told of how busy others are."""
        tenancy = self._tenancies.get(tenant.name)
        return 0 if tenancy is None else len(tenancy.waiting)

    def use(self, quotas: Quotas) -> None:
        """Take up other quotas. What was accepted under the old ones is finished."""
        self._quotas = quotas
        self.shares.use(quotas.tenants.values())
        self._tenancies = {name: own for name, own in self._tenancies.items() if own.count or name in quotas.tenants}

    def submit(self, request: R, now: float, kind: Hashable = None, load_s: float = 0.0, loads: str = "") -> None:
        """Append a request; ``load_s`` is how long its weights, which ``loads`` names, take to be there.

        Raises QueueFull and QuotaExceeded, which the caller may retry after the seconds that they say, and DeadlineUnreachable.
        """
        tenant = request.tenant
        self.check_room(tenant, request.input_bytes)
        cost_s = self.forecast.cost_s(kind)
        reckoned_s, said_s = None, 0.0
        if cost_s is not None:
            # Whoever waits for it waits for its weights as well: where models push each other out, one is read after the other.
            # But those of one model are read once.
            if not load_s or (loads and self._is_loading(tenant, loads)):
                loads, load_s = "", 0.0
            cost_s += load_s
            reckoned_s = said_s = needed_s = self._wait_s(tenant, cost_s)
            # With nothing under way, what held up others says nothing of it.
            if self._records:
                said_s = self.forecast.likely_s(reckoned_s, tenant.name)
                needed_s = self.forecast.raised_s(reckoned_s, tenant.name)
            self._check_deadline(request, now, needed_s, kind, cost_s)
        self._order += 1
        record = _Record(request, self._order, kind, cost_s, now, reckoned_s, said_s, "" if cost_s is None else loads)
        self._in_flight.enter(tenant, request.input_bytes, self._retry_after_s(tenant))
        self._note(record).waiting.append(record)

    def _is_loading(self, tenant: Tenant, loads: str) -> bool:
        """Say whether the time that weights take is reckoned in with another request of a tenant."""
        return any(record.loads == loads and record.request.tenant.name == tenant.name for record in self._records.values())

    def follow(self, request: R, whole: R) -> None:
        """Put a request first in its tenant's queue, as a part of one that is under way; nothing is asked of it any more.

        What it is charged, the ``whole`` is reckoned to have cost.
        """
        record = _Record(request, 0, None, None, 0.0, None, whole=whole)
        self._in_flight.follow(request.tenant, request.input_bytes)
        self._note(record).waiting.appendleft(record)

    def _note(self, record: _Record[R]) -> _Tenancy[R]:
        request = record.request
        tenancy = self._tenancies.setdefault(request.tenant.name, _Tenancy())
        tenancy.count += 1
        tenancy.input_bytes += request.input_bytes
        tenancy.backlog_s += record.left_s
        self._waiting_count += 1
        self._records[id(request)] = record
        self.shares.enter(request.tenant)
        return tenancy

    def check_room(self, tenant: Tenant, input_bytes: int = 0) -> None:
        """Raise QueueFull or QuotaExceeded when no request of a tenant would be taken. Any thread: it reads numbers."""
        tenancy = self._tenancies.get(tenant.name)
        if tenancy is not None and (waiting := len(tenancy.waiting)) >= self._limit:
            raise QueueFull(
                f"{waiting} requests are waiting, the limit is {self._limit}; try again shortly",
                waiting_count=waiting,
                limit_count=self._limit,
                retry_after_s=self._retry_after_s(tenant),
            )
        self._in_flight.check(tenant, input_bytes, self._retry_after_s(tenant))

    def _retry_after_s(self, tenant: Tenant) -> float:
        # Until one of its requests is answered, about.
        tenancy = self._tenancies.get(tenant.name) or _Tenancy()
        return round(max(_SHORTEST_WAIT_S, tenancy.backlog_s / max(1, tenancy.count)), 3)

    def _check_deadline(self, request: R, now: float, needed_s: float, kind: Hashable, cost_s: float) -> None:
        left_s = request.deadline - now
        # What is late already is told so when it is its turn.
        if needed_s > left_s > 0 and not (cost_s > left_s and self.forecast.is_doubtful(kind)):
            waiting_count = self.waiting_count(request.tenant)
            raise DeadlineUnreachable(
                f"the answer would take about {needed_s:.3f} s, the deadline is in {left_s:.3f} s and {waiting_count} requests "
                "of the same tenant wait; try again later, or allow more time",
                predicted_s=round(needed_s, 6),
                left_s=round(left_s, 6),
                waiting_count=waiting_count,
                retry_after_s=round(max(_SHORTEST_WAIT_S, needed_s - left_s), 3),
            )

    def _wait_s(self, tenant: Tenant, cost_s: float) -> float:
        """Return how long it is until a request of a tenant that costs so much would be computed, if no others came."""
        own = self._tenancies.get(tenant.name)
        own_s = cost_s + (own.backlog_s if own is not None else 0.0)
        if not self.shares.contended and ((own is not None and own.count) or not self._records):
            return own_s
        wait_s = own_s
        for name, other in self._tenancies.items():
            if name != tenant.name and other.count:
                wait_s += min(other.backlog_s, self.shares.ahead_s(name, tenant, own_s))
        return wait_s

    def put_back(self, request: R) -> None:
        """Return a request that could not start to the head of its queue."""
        tenancy = self._tenancies[request.tenant.name]
        tenancy.waiting.appendleft(self._records[id(request)])
        self._waiting_count += 1

    def take(self, now: float, admits: Callable[[Tenant], bool] = lambda tenant: True) -> tuple[list[R], R | None]:
        """Return the requests whose deadline has passed, never to run, and the next one to run, if any.

        Only requests of tenants are taken of which ``admits`` says so. What is returned is *under way* until ``leave``, also
        what comes too late.
        """
        expired: list[R] = []
        contenders = []
        for tenancy in self._tenancies.values():
            while tenancy.waiting and tenancy.waiting[0].request.deadline <= now:
                expired.append(self._pop(tenancy).request)
            if tenancy.waiting and admits((head := tenancy.waiting[0]).request.tenant):
                contenders.append(Contender((head.request.tenant.name,), head.order, tenancy))
        if not contenders:
            return expired, None
        chosen = contenders[0] if len(contenders) == 1 else self.shares.first(contenders)
        return expired, self._pop(chosen.what).request

    def _pop(self, tenancy: _Tenancy[R]) -> _Record[R]:
        self._waiting_count -= 1
        return tenancy.waiting.popleft()

    def can_take(self, admits: Callable[[Tenant], bool]) -> bool:
        """Say whether ``take`` would return anything."""
        return any(tenancy.waiting and admits(tenancy.waiting[0].request.tenant) for tenancy in self._tenancies.values())

    def order(self, request: R) -> int:
        """Return how old a request is, the smaller the older; 0 for one that was never submitted."""
        record = self._records.get(id(request))
        return 0 if record is None else record.order

    def came_s(self, request: R) -> float | None:
        """Return when a request was submitted, or the one that it is a part of; None for one that is over, or never was."""
        record = self._records.get(id(request))
        if record is not None and record.whole is not None:
            record = self._records.get(id(record.whole))
        return None if record is None else record.submitted_s

    def waiting(self) -> Iterator[R]:
        """Yield the requests that wait."""
        for tenancy in self._tenancies.values():
            for record in tenancy.waiting:
                yield record.request

    def charge(self, request: R, seconds: float) -> None:
        """Note that the device has worked for a request."""
        name = request.tenant.name
        self.shares.charge(name, seconds)
        if name in self._tenancies:
            self._tenancies[name].device_s += seconds
        record = self._records.get(id(request))
        while record is not None:
            before_s = record.left_s
            record.charged_s += seconds
            self._tenancies[name].backlog_s += record.left_s - before_s
            # It may be over already, its caller having left.
            record = None if record.whole is None else self._records.get(id(record.whole))

    def leave(self, request: R, answered_s: float | None = None) -> float:
        """Note that a request is over; ``answered_s``: when it was answered. Return the device seconds it was charged.

        One that was never submitted is no matter.
        """
        record = self._records.pop(id(request), None)
        if record is None:
            return 0.0
        name = request.tenant.name
        tenancy = self._tenancies[name]
        tenancy.count -= 1
        tenancy.input_bytes -= request.input_bytes
        self._in_flight.leave(name, request.input_bytes)
        # Sums of floats drift; with nothing there, there is nothing to do.
        tenancy.backlog_s = tenancy.backlog_s - record.left_s if tenancy.count else 0.0
        self.shares.leave(name)
        if answered_s is not None:
            if record.kind is not None:
                self.forecast.learn(record.kind, record.charged_s)
            if record.reckoned_s:
                self.forecast.compare(record.reckoned_s, record.said_s, answered_s - record.submitted_s, name)
        if not tenancy.count and name not in self._quotas.tenants:
            del self._tenancies[name]
        return record.charged_s

    def backlog_s(self) -> float:
        """Return the device seconds that are reckoned to be needed for what waits and runs."""
        return sum(tenancy.backlog_s for tenancy in self._tenancies.values())

    def drop(self, belongs: Callable[[R], bool]) -> int:
        """Forget the waiting requests of which ``belongs`` says so; return how many."""
        dropped = [
            record.request for tenancy in self._tenancies.values() for record in tenancy.waiting if belongs(record.request)
        ]
        for tenancy in self._tenancies.values():
            tenancy.waiting = deque(record for record in tenancy.waiting if not belongs(record.request))
        self._waiting_count -= len(dropped)
        for request in dropped:
            self.leave(request)
        return len(dropped)

    def loads(self) -> Mapping[str, Load]:
        """Return how much every tenant waits for."""
        found = {}
        for tenant in self._all_tenants():
            tenancy = self._tenancies.get(tenant.name) or _Tenancy()
            waiting = len(tenancy.waiting)
            wait_s = self._wait_s(tenant, 0.0)
            found[tenant.name] = Load(waiting, tenancy.count - waiting, tenancy.input_bytes, wait_s, tenancy.device_s)
        return found

    def _all_tenants(self) -> Iterable[Tenant]:
        found = dict(self._quotas.tenants)
        for record in self._records.values():
            found.setdefault(record.request.tenant.name, record.request.tenant)
        return found.values()

    def check_invariants(self) -> None:
        """Raise AssertionError when the books do not balance."""
        self.shares.check_invariants()
        waiting = sum(len(tenancy.waiting) for tenancy in self._tenancies.values())
        assert waiting == self._waiting_count, f"{waiting} requests wait, {self._waiting_count} were counted"
        for name, tenancy in self._tenancies.items():
            own = [record for record in self._records.values() if record.request.tenant.name == name]
            assert tenancy.count == len(own), f"{name} has {len(own)} requests, {tenancy.count} were counted"
            assert tenancy.input_bytes == sum(record.request.input_bytes for record in own), f"{name} was lost count of"
            count, input_bytes = self._in_flight.of(name)
            assert count >= tenancy.count, f"{name} has {tenancy.count} requests here, {count} were counted in all"
            assert input_bytes >= tenancy.input_bytes, f"{name} has {tenancy.input_bytes} bytes here, {input_bytes} in all"
            assert math.isclose(tenancy.backlog_s, sum(record.left_s for record in own), abs_tol=1e-6), (
                f"{name}'s backlog is wrong"
            )
