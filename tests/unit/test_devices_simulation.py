"""Several devices under random lives: models move, are constrained and pinned, callers leave, engines die and devices vanish.

What chooses a device and moves models (``engines``, ``placing``, ``placement``, ``constraints``, ``places``, ``relays``), whose
turn it is on each (``scheduler``), what is in its memory (``residency``), and the caps on all of them together (``inflight``) are
the production code; only what computes and reads is simulated, and the clock is passed in, so each seed is one life.
Checked at every event: one answer at most for each request, no cap and no memory budget exceeded, nobody asked where it may not
be; and at the end that everybody was answered, in a bounded time.
"""

from __future__ import annotations

import heapq
import itertools
import math
import queue
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import BudgetExceeded, CapacityError, InvalidInput, QuotaExceeded, TrunklineError, UnknownModel

from sidecar.constraints import Constraints
from sidecar.engines import Engines
from sidecar.inflight import InFlight
from sidecar.placement import Cost
from sidecar.placing import LOOK_EVERY_S, _Mean
from sidecar.ports import Session, Work
from sidecar.residency import Residency
from sidecar.scheduler import Scheduler
from sidecar.shares import Contender
from sidecar.tenants import Quotas, Tenant

LIVES = 80
EVENTS = 500
MOST_RUNNING = 3
QUEUE_LIMIT = 12
PACE = 1000.0  # bytes of weights that are read in a second
NAMES = ("cpu:0", "cpu:1", "cuda:0")


class Clock:
    """The time, and what is going to happen."""

    def __init__(self) -> None:
        self.now = 0.0
        self._numbers = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []

    def __call__(self) -> float:
        return self.now

    def after(self, seconds: float, act: Callable[[], None]) -> None:
        self.at(self.now + seconds, act)

    def at(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), act))

    def step(self) -> None:
        self.now, _, act = heapq.heappop(self._events)
        act()


class Caller:
    """A session, and what it was told of each of its requests."""

    def __init__(self) -> None:
        self.told: dict[int, str] = {}
        self.released_count = 0
        self.document_or_error: object = None

    def _tell(self, request_id: int, outcome: str) -> None:
        assert request_id not in self.told, "two answers for one request"
        assert not self.released_count, "an answer after all of it was let go of"
        self.told[request_id] = outcome

    def answer(self, request_id: int, specs: Any, outputs: Any, read: Any) -> None:
        self._tell(request_id, "answered")

    def document(self, request_id: int, plain: object) -> None:
        self._tell(request_id, "told")
        self.document_or_error = plain

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self._tell(request_id, error.code)
        self.document_or_error = error

    def released(self) -> None:
        self.released_count += 1


class Simulated:
    """An engine on a device: it computes in stages, and reads weights one request's after the other's."""

    def __init__(self, node: Node, name: str) -> None:
        self.name = name
        self.budget_bytes = node.budgets[name]
        self.pace = PACE
        self.dead = False
        self._node = node
        self._clock = node.clock
        self.scheduler: Scheduler[Work] = Scheduler(QUEUE_LIMIT, node.quotas, node.in_flight)
        self.residency = Residency(self.budget_bytes, clock=node.clock)
        for model, weights in node.weights.items():
            self.residency.add_plan(model, weights)
        self._loads: list[tuple[str, Callable[[TrunklineError | None], None]]] = []
        # Those with a lease, by whether all of their weights are there; and how many stages each has had.
        self._parked: list[Work] = []
        self.running: dict[int, tuple[Work, int]] = {}
        self._read_until_s = 0.0
        self._is_computing = False
        # Somebody waits for memory, and is the next to have some.
        self._first: Work | None = None
        self._seconds: dict[str, float] = {}

    # --- what ``Engines`` and ``Placing`` ask of an engine -------------------------------------------------------------

    @property
    def backlog_s(self) -> float:
        return self.scheduler.backlog_s()

    def names(self) -> list[str]:
        return list(self._node.weights)

    def check_deployed(self, name: str) -> None:
        if name not in self._node.weights:
            raise UnknownModel("there is no such model", model=name)

    def is_pinned(self, name: str) -> bool:
        return self.residency.is_pinned(name)

    def costs(self, names: Sequence[str]) -> dict[str, Cost]:
        return {
            name: Cost(
                self._seconds.get(name),
                self._node.costs_s[name] * self._node.slowness[self.name],
                (name,),
                (self._node.weights[name],),
                sum(size for digest, size in self._node.weights[name].items() if self.residency.is_resident(digest)),
                self.residency.is_pinned(name),
            )
            for name in names
        }

    def tell_costs(self, names: Sequence[str], told: Callable[[Mapping[str, Cost]], None]) -> None:
        told(self.costs(names))

    def bring(self, name: str, over: Callable[[TrunklineError | None], None]) -> None:
        self._loads.append((name, over))
        self.go_on()

    def submit(self, work: Work) -> None:
        missing_bytes = sum(
            size for digest, size in self._node.weights[work.model].items() if not self.residency.is_resident(digest)
        )
        try:
            self.scheduler.submit(work, self._clock(), work.model, missing_bytes / PACE, work.model)
        except CapacityError as error:
            work.session.fail(work.request_id, error)
        self.go_on()

    def session_closed(self, session: Session) -> None:
        self.scheduler.drop(lambda work: work.session is session)
        aside = [] if self._first is None else [self._first]
        for work in [*aside, *self._parked, *(work for work, _ in self.running.values())]:
            if work.session is session:
                self._is_over(work, lambda: None)
        session.released()
        self.go_on()

    # --- its life ----------------------------------------------------------------------------------------------------

    def go_on(self) -> None:
        if self.dead:
            return
        while self._loads:
            name, over = self._loads[0]
            try:
                grant = self._lease(name)
            except BudgetExceeded as error:
                del self._loads[0]
                over(error)
                continue
            if grant is None:
                break
            del self._loads[0]
            self._read(name, grant, lambda name=name, over=over: self._brought(name, over))  # type: ignore[misc]
        while (work := self._next()) is not None:
            try:
                grant = self._lease(work.model)
            except BudgetExceeded as error:
                self._is_over(work, lambda work=work, error=error: work.session.fail(work.request_id, error))  # type: ignore[misc]
                continue
            if grant is None:
                # Nobody else has memory before it.
                self._first = work
                break
            self._first = None
            self._parked.append(work)
            self._read(work.model, grant, lambda work=work: self._ready(work))  # type: ignore[misc]
        self._compute()

    def _next(self) -> Work | None:
        if self._first is not None:
            return self._first
        counts = Counter(work.tenant.name for work in (*self._parked, *(work for work, _ in self.running.values())))
        late, work = self.scheduler.take(self._clock(), lambda tenant: counts[tenant.name] < MOST_RUNNING)
        for each in late:
            assert each.deadline <= self._clock()
            self._is_over(each, lambda each=each: each.session.fail(each.request_id, QuotaExceeded("late")))  # type: ignore[misc]
        return work

    def _lease(self, name: str) -> Any:
        grant = self.residency.lease(name)
        assert self.residency.committed_bytes <= self.budget_bytes
        return grant

    def _read(self, name: str, grant: Any, then: Callable[[], None]) -> None:
        weights = self._node.weights[name]
        self._read_until_s = max(self._read_until_s, self._clock()) + sum(weights[digest] for digest in grant.fetch) / PACE

        def arrive() -> None:
            if not self.dead:
                for digest in filter(self.residency.is_committed, grant.fetch):
                    # Others may have left when nobody waited for them any more.
                    self.residency.arrived(digest)
                then()
                self.go_on()

        # Also what others have ordered is there by then.
        self._clock.at(self._read_until_s, arrive)

    def _brought(self, name: str, over: Callable[[TrunklineError | None], None]) -> None:
        self.residency.release(name)
        over(None)

    def _ready(self, work: Work) -> None:
        # Its caller may have left.
        if work in self._parked:
            self._parked.remove(work)
            assert self.residency.is_ready(work.model), "it would be computed without its weights"
            self.running[id(work)] = work, 0

    def _compute(self) -> None:
        if self._is_computing or not self.running:
            return
        contenders = [
            Contender((work.tenant.name,), self.scheduler.order(work), (work, done)) for work, done in self.running.values()
        ]
        work, done = self.scheduler.shares.first(contenders).what
        self.scheduler.shares.begin((work.tenant.name,))
        seconds = self._node.costs_s[work.model] * self._node.slowness[self.name] / 3 * self._node.random.uniform(0.8, 1.2)
        self._is_computing = True

        def ran() -> None:
            self._is_computing = False
            if self.dead:
                return
            self.scheduler.charge(work, seconds)
            if id(work) in self.running:
                self.running[id(work)] = work, done + 1
                if done + 1 == 3:
                    self._is_over(work, lambda: work.session.answer(work.request_id, (), (), lambda *_: None), answered=True)
            self.go_on()

        self._clock.after(seconds, ran)

    def _is_over(self, work: Work, tell: Callable[[], None], *, answered: bool = False) -> None:
        tell()
        charged_s = self.scheduler.leave(work, self._clock() if answered else None)
        if answered:
            known_s = self._seconds.get(work.model, charged_s)
            self._seconds[work.model] = known_s + 0.1 * (charged_s - known_s)
        if work is self._first:
            self._first = None
        elif work in self._parked or id(work) in self.running:
            self.running.pop(id(work), None)
            self._parked = [each for each in self._parked if each is not work]
            self.residency.release(work.model)

    def check(self) -> None:
        self.residency.check_invariants()
        self.scheduler.check_invariants()
        assert self.residency.committed_bytes <= self.budget_bytes


class Node:
    """A node with several devices: models of which some have weights in common, tenants with caps, and callers."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.random = random.Random(seed)
        self.clock = Clock()
        self.folder = folder
        devices = self.random.randint(2, 3)
        self.slowness = {name: self.random.choice([1.0, 1.0, 1.5, 4.0]) for name in NAMES}
        self.weights: dict[str, dict[str, int]] = {}
        for number in range(self.random.randint(2, 6)):
            trunk = {f"trunk {self.random.randrange(2)}": 80} if self.random.random() < 0.5 else {}
            self.weights[f"m{number}"] = trunk | {f"own {number}": self.random.randint(10, 200)}
        self.costs_s = {name: self.random.uniform(0.02, 0.5) for name in self.weights}
        all_bytes = sum({digest: size for weights in self.weights.values() for digest, size in weights.items()}.values())
        # Some models may be too large for some devices, but each fits somewhere.
        largest = max(sum(weights.values()) for weights in self.weights.values())
        self.budgets = {name: max(50, int(all_bytes * self.random.choice([0.3, 0.6, 1.2]))) for name in NAMES}
        self.budgets[NAMES[0]] = max(self.budgets[NAMES[0]], largest)
        self.quotas = Quotas({tenant.name: tenant for tenant in self._some_tenants()})
        self.callers: dict[str, Caller] = {}
        # Unanswered requests: who asked, by whom, and when.
        self.open: dict[int, tuple[Caller, Work, float]] = {}
        self.outcomes: Counter[str] = Counter()
        self.moves: Counter[str] = Counter()
        self.longest_wait_s = 0.0
        # What operators were told is so: where models may be.
        self.promised: dict[str, frozenset[str]] = {}
        self._ids = itertools.count(1)
        self._generation = 0
        self.start(NAMES[:devices])

    def _some_tenants(self) -> list[Tenant]:
        def limit(low: int, high: int) -> float:
            return self.random.randint(low, high) if self.random.random() < 0.4 else math.inf

        return [
            Tenant(
                name=f"t{number}",
                domain="",
                in_flight_limit=limit(1, 8),
                queued_limit_bytes=limit(100, 1000),
            )
            for number in range(self.random.randint(1, 4))
        ]

    # --- engines -----------------------------------------------------------------------------------------------------

    def start(self, devices: Sequence[str]) -> None:
        """Start engines on these devices; those there were are dead."""
        self._generation += 1
        self.devices = list(devices)
        self.in_flight = InFlight()
        self.simulated = {name: Simulated(self, name) for name in devices}
        self.constraints = Constraints(self.folder / "constraints.json", self.devices)
        self.engines = Engines(self.simulated, self.constraints, self.folder / "places.json", self.clock)  # type: ignore[arg-type]
        self.callers = {}
        self.open = {}
        self.placing.begin()
        generation = self._generation

        def look() -> None:
            if generation == self._generation:
                self.placing._look()
                self.settle()
                self.clock.after(LOOK_EVERY_S, look)

        self.clock.after(LOOK_EVERY_S, look)
        # What was promised of devices that are gone holds no more, nor does it for models that may be on none of those left.
        self.promised = {name: frozenset(self.constraints.devices_of(name)) for name in self.weights}
        assert all(where and where <= self.placing.allowed(name) for name, where in self.placing.table.items())

    @property
    def placing(self) -> Any:
        return self.engines._placing

    def settle(self) -> None:
        """Do what was posted to the thread that moves models, and count its moves."""
        before = dict(self.placing.table)
        while True:
            try:
                job = self.placing._inbox.get_nowait()
            except queue.Empty:
                break
            job()
        for name, where in self.placing.table.items():
            assert where, "it is asked nowhere"
            if where != before.get(name, where):
                self.moves[name] += 1

    def crash(self) -> None:
        """All engines end at once, perhaps because a device is no more; another set of them is started."""
        for engine in self.simulated.values():
            engine.dead = True
        before = dict(self.placing.table)
        # Callers see their connections end, and ask again.
        again = [(work.tenant, work.model, work.input_bytes) for _, work, _ in self.open.values()]
        self.start([name for name in NAMES if self.random.random() < 0.7] or NAMES[:1])
        for name, where in before.items():
            kept = where & self.placing.allowed(name)
            assert not kept or self.placing.table[name] == kept, "its weights are where it was asked before"
        for tenant, model, input_bytes in again:
            self.ask(tenant, model, input_bytes)

    # --- callers -----------------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        # The first are asked most.
        tenants, models = list(self.quotas.tenants.values()), list(self.weights)
        tenant = tenants[min(int(self.random.expovariate(1.0)), len(tenants) - 1)]
        self.ask(tenant, models[min(int(self.random.expovariate(0.7)), len(models) - 1)], self.random.randint(0, 200))

    def ask(self, tenant: Tenant, model: str, input_bytes: int) -> None:
        # A connection has one request at a time.
        free = [name for name, caller in self.callers.items() if not any(caller is each for each, _, _ in self.open.values())]
        name = self.random.choice(free) if free else f"c{len(self.callers)}-{next(self._ids)}"
        caller = self.callers.setdefault(name, Caller())
        request_id = next(self._ids)
        patience_s = self.random.choice([1.0, 10.0, 1e6, 1e6])
        work = Work(caller, request_id, model, self.clock() + patience_s, inputs=(), tenant=tenant, input_bytes=input_bytes)
        held = self.in_flight.of(tenant.name)
        self.open[request_id] = caller, work, self.clock()
        before = {name: engine.scheduler.waiting_count(tenant) for name, engine in self.simulated.items()}
        sent_to = self.sent(work)
        self.collect()
        if request_id in self.open:
            assert held[0] < tenant.in_flight_limit
            assert not held[0] or held[1] + input_bytes <= tenant.queued_limit_bytes
            assert before[sent_to] < QUEUE_LIMIT
        assert sent_to in self.promised[model], f"{model} was asked on {sent_to}, where it must not be"

    def sent(self, work: Work) -> str:
        """Send a request; return the device that it was sent to."""
        before = {name: sum(self.engines._tallies[name].read()[0].values()) for name in self.devices}
        self.engines.submit(work)
        (device,) = [name for name in self.devices if sum(self.engines._tallies[name].read()[0].values()) > before[name]]
        self.settle()
        return device

    def leave(self) -> None:
        """A caller leaves, in the middle of its request perhaps."""
        if not self.callers:
            return
        name = self.random.choice(list(self.callers))
        caller = self.callers.pop(name)
        mine = [request_id for request_id, (each, _, _) in self.open.items() if each is caller]
        if not caller.told and not mine:
            return
        self.engines.session_closed(caller)  # type: ignore[arg-type]
        assert caller.released_count == 1
        for request_id in mine:
            if request_id not in caller.told:
                del self.open[request_id]
                self.outcomes["left"] += 1
        self.collect()
        self.settle()

    def collect(self) -> None:
        """Take note of who was answered."""
        for request_id in [each for each, (caller, _, _) in self.open.items() if each in caller.told]:
            caller, _, came_s = self.open.pop(request_id)
            outcome = caller.told[request_id]
            self.outcomes[outcome] += 1
            if outcome == "answered":
                self.longest_wait_s = max(self.longest_wait_s, self.clock() - came_s)

    # --- operators ---------------------------------------------------------------------------------------------------

    def constrain(self) -> None:
        """Say where a model may be; from when that is answered on, it holds."""
        name, operator = self.random.choice(list(self.weights)), Caller()
        some = self.random.sample(self.devices, self.random.randint(0, len(self.devices)))
        asked = self.random.choice([{"allow": some}, {"forbid": some}, {"allow": [], "forbid": []}])
        # What was said before may still be on its way; until then either is right.
        self.engines.command(operator, 1, "place", {"name": name, **asked}, math.inf)  # type: ignore[arg-type]
        self.settle()
        allowed = frozenset(self.constraints.devices_of(name))
        assert all(device in allowed for device in self.devices if self.simulated[device].is_pinned(name))
        if isinstance(operator.document_or_error, InvalidInput):
            return
        self.promised[name] = frozenset(self.devices)
        generation = self._generation

        def wait() -> None:
            if generation != self._generation or frozenset(self.constraints.devices_of(name)) != allowed:
                return
            if operator.told:
                assert self.placing.table[name] <= allowed
                self.promised[name] = allowed
            else:
                self.clock.after(0.1, wait)

        wait()

    def pin(self) -> None:
        """Keep a model in the memory of a device where it is; there it stays."""
        name = self.random.choice(list(self.weights))
        device = min(self.placing.table[name])
        residency = self.simulated[device].residency
        for engine in self.simulated.values():
            engine.residency.unpin(name)
        if self.random.random() < 0.5 and residency.is_held(name):
            try:
                residency.pin(name)
            except BudgetExceeded:
                return

    # --- what must be so ---------------------------------------------------------------------------------------------

    def check(self) -> None:
        for engine in self.simulated.values():
            engine.check()
        for tenant in self.quotas.tenants.values():
            mine = [work for _, work, _ in self.open.values() if work.tenant is tenant]
            count, size_bytes = self.in_flight.of(tenant.name)
            assert (count, size_bytes) == (len(mine), sum(work.input_bytes for work in mine))
            assert count <= tenant.in_flight_limit
        for device, tally in self.engines._tallies.items():
            held = sum(1 for _, work, _ in self.open.values() if work.session in self._lines(device))
            assert tally.under_way == held, f"{tally.under_way} are said to be on {device}, and {held} are"

    def _lines(self, device: str) -> list[Any]:
        return [relay.lines[device] for relay in self.engines._relays.values()]

    def finish(self) -> None:
        """Let everything come to an end, and see that it does."""
        for _ in range(200_000):
            if not self.open:
                break
            self.clock.step()
            self.collect()
            self.settle()
        assert not self.open, "somebody waits for ever"
        self.check()
        assert not any(tally.under_way for tally in self.engines._tallies.values())

    def longest_fair_wait_s(self) -> float:
        """Return how long anybody may wait: for as much of everybody as one queue may have before it, each with a load."""
        slowest_s = max(self.costs_s.values()) * 1.2 * max(self.slowness.values())
        load_s = max(sum(weights.values()) for weights in self.weights.values()) / PACE
        return (QUEUE_LIMIT + MOST_RUNNING) * len(self.quotas.tenants) * (slowest_s + 2 * load_s) + 1.0


@pytest.mark.parametrize("block", range(5))
def test_many_lives_on_several_devices(block: int, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    moves = 0
    for seed in range(block * LIVES // 5, (block + 1) * LIVES // 5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        node = Node(seed, folder)
        rate = node.random.choice([2.0, 5.0, 10.0])
        at_s = 0.0
        for event in range(EVENTS):
            at_s += node.random.expovariate(rate)
            while node.clock._events[0][0] <= at_s:
                node.clock.step()
                node.collect()
                node.settle()
            node.clock.now = at_s
            chance = node.random.random()
            if chance < 0.01:
                node.leave()
            elif chance < 0.02:
                node.constrain()
            elif chance < 0.025:
                node.pin()
            elif chance < 0.029:
                node.crash()
            else:
                node.arrive()
            if not event % 25:
                node.check()
        node.finish()
        assert node.longest_wait_s <= node.longest_fair_wait_s()
        outcomes += node.outcomes
        moves += node.moves.total()
    # A simulation in which nothing goes wrong would prove nothing.
    assert outcomes["answered"] > 1000, outcomes
    assert outcomes["left"] > 3, outcomes
    assert outcomes["quota_exceeded"] > 10, outcomes
    assert moves > 10


@pytest.mark.parametrize("seed", range(6))
def test_a_constant_mix_comes_to_rest(seed: int, tmp_path: Path) -> None:
    """What is asked evenly for ten minutes, half of what there could be, moves models now and then, and not to and fro."""
    node = Node(1000 + seed, tmp_path)
    node.quotas = Quotas({"t0": Tenant(name="t0", domain="")})
    node.start(NAMES[:2])
    capacity = sum(1 / node.slowness[name] for name in node.devices) / (sum(node.costs_s.values()) / len(node.costs_s))
    at_s, halves = 0.0, []
    for until_s in (300.0, 600.0):
        before = node.moves.total()
        while at_s < until_s:
            at_s += node.random.expovariate(0.5 * capacity)
            while node.clock._events[0][0] <= at_s:
                node.clock.step()
                node.collect()
                node.settle()
            node.clock.now = at_s
            node.ask(node.quotas.tenants["t0"], node.random.choice(list(node.weights)), 0)
        halves.append(node.moves.total() - before)
    node.finish()
    assert max(halves) <= 2 * len(node.weights), halves


def test_what_comes_seldom_is_no_change_each_time_that_it_comes() -> None:
    chance, mean, found = random.Random(1), _Mean(), []
    for second in range(600):
        mean.note(sum(chance.random() < 0.004 for _ in range(100)), 1.0)
        if second > 60:
            found.append(mean.value)
    assert 0.15 < min(found) < 0.4 < max(found) < 0.8


@pytest.mark.parametrize(("before", "after"), [(50.0, 25.0), (0.0, 5.0), (10.0, 0.0), (1.0, 8.0)])
def test_what_has_changed_is_seen_within_seconds(before: float, after: float) -> None:
    mean = _Mean()
    for _ in range(60):
        mean.note(before, 1.0)
    for _ in range(8):
        mean.note(after, 1.0)
    assert abs(mean.value - after) < 0.3 * abs(before - after)
