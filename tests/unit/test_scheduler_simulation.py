"""The scheduler under 2,000 random lives: a device that computes in stages, tenants that flood, die, and are given other quotas.

The clock is passed in and everything else is the production code, so each seed is one life to the last bit. Checked at every
event: one outcome for each request that was taken, no cap exceeded, nothing late begun, the device never idle while something
could run; and of whoever waited all the time, that others did not get more than their shares allow.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from dataclasses import dataclass, field

import pytest
from trunkline.errors import CapacityError, DeadlineUnreachable, QueueFull, QuotaExceeded

from sidecar.scheduler import Scheduler
from sidecar.shares import LEAST_SHARE, QUANTUM_S, Contender
from sidecar.tenants import Quotas, Tenant

SEEDS = 2000
EVENTS = 500
MOST_RUNNING = 3
QUEUE_LIMIT = 12


@dataclass(eq=False)
class Request:
    tenant: Tenant
    deadline: float
    input_bytes: int
    stages_s: list[float]
    kind: int
    session: int
    done: int = 0
    outcomes: list[str] = field(default_factory=list)


@dataclass
class Watch:
    """A tenant that has something to run all the time since, and what everybody has had since then."""

    since_had_s: dict[str, float]
    # The device's time since, but for what was left over of tenants that are no more.
    total_s: float = 0.0


class Life:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 0.0
        self.quotas = self.some_quotas()
        self.scheduler: Scheduler[Request] = Scheduler(QUEUE_LIMIT, self.quotas)
        self.running: list[Request] = []
        self.accepted: list[Request] = []
        # Those that had no outcome when this was last looked through.
        self.live: list[Request] = []
        self.had_s: dict[str, float] = {}
        self.watches: dict[str, Watch] = {}
        self.costs_s = [[self.random.uniform(0.001, 0.03) for _ in range(self.random.randint(1, 5))] for _ in range(4)]
        self.longest_s = max(itertools.chain(*self.costs_s))

    def some_quotas(self) -> Quotas:
        def limit(low: int, high: int) -> float:
            return self.random.randint(low, high) if self.random.random() < 0.4 else math.inf

        tenants = [
            Tenant(
                name=f"t{number}",
                domain="",
                weight=self.random.choice([0.25, 1.0, 1.0, 3.0]),
                priority=self.random.choice([5, 5, 5, 2, 8]),
                in_flight_limit=limit(1, 8),
                queued_limit_bytes=limit(100, 1000),
            )
            for number in range(self.random.randint(1, 5))
        ]
        return Quotas({tenant.name: tenant for tenant in tenants})

    # --- what may happen -------------------------------------------------------------------------------------------------------

    def arrive(self) -> None:
        # The first are asked most, as a flood is.
        tenant = list(self.quotas.tenants.values())[min(int(self.random.expovariate(1.0)), len(self.quotas.tenants) - 1)]
        kind = self.random.randrange(len(self.costs_s))
        patience_s = self.random.choice([0.01, 0.1, 1.0, 100.0, 100.0])
        request = Request(
            tenant, self.now + patience_s, self.random.randint(0, 200), self.costs_s[kind], kind, self.random.randrange(6)
        )
        self.live = [each for each in self.live if not each.outcomes]
        own = [each for each in self.live if each.tenant.name == tenant.name]
        waiting = sum(1 for each in own if each not in self.running)
        held_bytes = sum(each.input_bytes for each in own)
        too_many = len(own) >= tenant.in_flight_limit
        too_large = bool(own) and held_bytes + request.input_bytes > tenant.queued_limit_bytes
        try:
            self.scheduler.submit(request, self.now, kind)
        except QueueFull:
            assert waiting == QUEUE_LIMIT
        except QuotaExceeded:
            assert too_many or too_large
        except DeadlineUnreachable as error:
            assert error.details["predicted_s"] >= error.details["left_s"]  # type: ignore[operator]
        except CapacityError as error:
            pytest.fail(error.message)
        else:
            assert waiting < QUEUE_LIMIT
            assert not too_many
            assert not too_large
            self.accepted.append(request)
            self.live.append(request)
        self.watch()

    def end_session(self) -> None:
        session = self.random.randrange(6)
        waiting = [each for each in self.live if not each.outcomes and each not in self.running and each.session == session]
        assert self.scheduler.drop(lambda request: request.session == session) == len(waiting)
        for request in [each for each in self.running if each.session == session]:
            self.running.remove(request)
            self.scheduler.leave(request)
            waiting.append(request)
        for request in waiting:
            request.outcomes.append("dropped")
        self.watch()

    def change_quotas(self) -> None:
        self.quotas = self.some_quotas()
        self.scheduler.use(self.quotas)
        # Everybody begins anew.
        self.watches.clear()
        self.watch()

    def work(self) -> None:
        """Take up what may be taken up, and let the device work on one stage."""
        while True:
            counts: dict[str, int] = {}
            for request in self.running:
                counts[request.tenant.name] = counts.get(request.tenant.name, 0) + 1

            def admits(tenant: Tenant, counts: dict[str, int] = counts) -> bool:
                return counts.get(tenant.name, 0) < MOST_RUNNING

            could = self.scheduler.can_take(admits)
            late, request_or_none = self.scheduler.take(self.now, admits)
            for request in late:
                assert request.deadline <= self.now
                request.outcomes.append("expired")
                self.scheduler.leave(request)
            if request_or_none is None:
                assert late or not could, "somebody waits who could be taken up"
                break
            assert admits(request_or_none.tenant)
            assert request_or_none.deadline > self.now
            if self.random.random() < 0.02:
                self.scheduler.put_back(request_or_none)
                break
            self.running.append(request_or_none)
        self.watch()
        if not self.running:
            return
        contenders = [Contender((each.tenant.name,), self.scheduler.order(each), each) for each in self.running]
        request = self.scheduler.shares.first(contenders).what
        self.scheduler.shares.begin((request.tenant.name,))
        seconds = request.stages_s[request.done] * self.random.uniform(0.8, 1.2)
        self.now += seconds
        self.scheduler.charge(request, seconds)
        self.had_s[request.tenant.name] = self.had_s.get(request.tenant.name, 0.0) + seconds
        if request.tenant.name in self.quotas.tenants:
            for watch in self.watches.values():
                watch.total_s += seconds
        self.check_shares(request)
        request.done += 1
        if request.done == len(request.stages_s):
            self.running.remove(request)
            request.outcomes.append("answered")
            self.scheduler.leave(request, self.now)
        self.watch()

    # --- what must be so ----------------------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Begin to watch those who have something that could run, and end with those who have not."""
        ready = {each.tenant.name for each in self.running} & self.quotas.tenants.keys()
        for name in self.watches.keys() - ready:
            del self.watches[name]
        for name in ready - self.watches.keys():
            self.watches[name] = Watch(dict(self.had_s))

    def check_shares(self, ran: Request) -> None:
        heaviest = max(tenant.weight for tenant in self.quotas.tenants.values())
        mine = self.quotas.tenants.get(ran.tenant.name)
        if mine is None:
            return
        for name, watch in self.watches.items():
            tenant = self.quotas.tenants[name]
            own_s = self.had_s.get(name, 0.0) - watch.since_had_s.get(name, 0.0)
            other_s = self.had_s[mine.name] - watch.since_had_s.get(mine.name, 0.0)
            # By weight: two quanta saved up, one that either may be ahead by, and the stage that brought it there.
            if name != mine.name and tenant.priority == mine.priority:
                lead_s = (other_s / mine.weight - own_s / tenant.weight) * heaviest
                stages_s = 1.2 * self.longest_s * heaviest * (1 / mine.weight + 1 / tenant.weight)
                most_s = 4 * QUANTUM_S + stages_s
                assert lead_s <= most_s, f"{mine.name} is {lead_s:.3f} s ahead of {name}, which had work all the time"
            # A priority that always had something to do gets its least share, whoever else wants what.
            priority_s = sum(
                self.had_s.get(each.name, 0.0) - watch.since_had_s.get(each.name, 0.0)
                for each in self.quotas.tenants.values()
                if each.priority >= tenant.priority
            )
            lower = len({each.priority for each in self.quotas.tenants.values() if each.priority < tenant.priority})
            due_s = (
                watch.total_s * (1 - lower * LEAST_SHARE) if tenant.priority == self.highest() else watch.total_s * LEAST_SHARE
            )
            assert priority_s >= due_s - 3 * QUANTUM_S - 3 * self.longest_s, (
                f"the priority of {name} got {priority_s:.3f} of {due_s:.3f} s"
            )

    def highest(self) -> int:
        return max(tenant.priority for tenant in self.quotas.tenants.values())

    def check(self) -> None:
        self.scheduler.check_invariants()
        for request in self.accepted:
            assert len(request.outcomes) <= 1, request.outcomes

    def finish(self) -> None:
        """Let everything come to an end, and see that it does."""
        for _ in range(100_000):
            if not self.running and not len(self.scheduler):
                break
            self.work()
        assert all(len(request.outcomes) == 1 for request in self.accepted)
        assert not any(load.waiting_count or load.running_count for load in self.scheduler.loads().values())
        self.check()


@pytest.mark.parametrize("block", range(20))
def test_two_thousand_lives(block: int) -> None:
    outcomes: dict[str, int] = {}
    for seed in range(block * SEEDS // 20, (block + 1) * SEEDS // 20):
        life = Life(seed)
        arrivals = [(life.random.expovariate(25.0), number) for number in range(3)]
        heapq.heapify(arrivals)
        for event in range(EVENTS):
            chance = life.random.random()
            if chance < 0.01:
                life.end_session()
            elif chance < 0.013:
                life.change_quotas()
            elif arrivals[0][0] <= life.now or (not life.running and not len(life.scheduler)):
                at_s, number = heapq.heappop(arrivals)
                life.now = max(life.now, at_s)
                life.arrive()
                heapq.heappush(arrivals, (life.now + life.random.expovariate(25.0), number))
            else:
                life.work()
            if not event % 50:
                life.check()
        life.finish()
        for request in life.accepted:
            outcomes[request.outcomes[0]] = outcomes.get(request.outcomes[0], 0) + 1
    # A simulation in which nothing goes wrong would prove nothing.
    assert min(outcomes.get(each, 0) for each in ("answered", "expired", "dropped")) > 10, outcomes
