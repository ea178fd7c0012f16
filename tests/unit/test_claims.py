"""Claims: what a tenant's models have in memory stays within its quota, and nobody else pays for it."""

from __future__ import annotations

import math
import random

import pytest
from trunkline.errors import BudgetExceeded

from sidecar.claims import Claims
from sidecar.residency import Residency
from sidecar.tenants import Tenant


def tenant(name: str, limit_bytes: float = math.inf) -> Tenant:
    return Tenant(name=name, domain="", resident_limit_bytes=limit_bytes)


class Bench:
    """A residency with room for everything, and tenants that use plans."""

    def __init__(self, plans: dict[str, dict[str, int]], *tenants: Tenant) -> None:
        self.residency = Residency(10_000)
        for plan, weights in plans.items():
            self.residency.add_plan(plan, weights)
        self.claims = Claims(self.residency)
        self.claims.use(tenants)

    def lease(self, tenant: Tenant, *plans: str) -> set[str] | None:
        """Do what the engine does with a request; return what left."""
        freed = self.claims.make_room(tenant, plans)
        if freed is None:
            return None
        self.claims.prune()
        grant = self.residency.lease(*plans)
        assert grant is not None
        self.claims.claim(tenant, plans)
        for digest in grant.fetch:
            self.residency.arrived(digest)
        return set(freed)

    def use(self, tenant: Tenant, *plans: str) -> set[str] | None:
        freed = self.lease(tenant, *plans)
        for plan in plans if freed is not None else ():
            self.residency.release(plan)
        return freed

    def claimed(self, tenant: Tenant) -> list[str]:
        return list(self.claims._plans.get(tenant.name, ()))


PLANS = {name: {name + "1": 30, name + "2": 10} for name in "abcd"}


def test_what_was_not_used_for_longest_leaves() -> None:
    small, other = tenant("small", 100), tenant("other")
    bench = Bench(PLANS, small, other)
    for plan in "aba":
        assert bench.use(small, plan) == set()
    assert bench.use(small, "c") == {"b1", "b2"}
    assert bench.claimed(small) == ["a", "c"]
    assert bench.residency.metrics()["evicted_bytes"]["quota"] == 40  # type: ignore[index]


def test_what_others_use_stays_and_is_no_longer_claimed() -> None:
    small, other = tenant("small", 80), tenant("other")
    bench = Bench(PLANS, small, other)
    bench.use(small, "a")
    bench.use(other, "a")
    bench.use(small, "b")
    assert bench.use(small, "c") == set()
    assert bench.claimed(small) == ["b", "c"]
    assert bench.claimed(other) == ["a"]
    assert bench.residency.is_ready("a")


def test_what_a_request_of_its_own_holds_is_waited_for() -> None:
    small, other = tenant("small", 80), tenant("other")
    bench = Bench(PLANS, small, other)
    bench.lease(small, "a")
    bench.use(small, "b")
    assert bench.use(small, "c") is None
    assert bench.claimed(small) == ["a", "b"]
    bench.residency.release("a")
    assert bench.use(small, "c") == {"a1", "a2"}
    assert bench.claimed(small) == ["b", "c"]


def test_what_is_shared_counts_once_for_a_tenant_and_for_each_of_them() -> None:
    plans = {"a": {"trunk": 60, "a": 10}, "b": {"trunk": 60, "b": 10}, "c": {"c": 20}}
    small, tiny = tenant("small", 80), tenant("tiny", 75)
    bench = Bench(plans, small, tiny)
    bench.use(small, "a")
    assert bench.use(small, "b") == set()
    bench.use(tiny, "a")
    # It claims the trunk as well, so that there is no room for more beside it.
    assert bench.use(tiny, "c") == set()
    assert bench.claimed(tiny) == ["c"]
    # Nobody else uses what "a" has for itself; the trunk "b" has, too.
    assert bench.use(small, "c") == {"a", "trunk", "b"}
    assert bench.claimed(small) == ["c"]


def test_what_never_fits_is_refused_with_the_numbers() -> None:
    small = tenant("small", 30)
    bench = Bench(PLANS, small)
    with pytest.raises(BudgetExceeded, match="the weights of the model take 40 bytes, small may have 30 in memory"):
        bench.use(small, "a")
    with pytest.raises(BudgetExceeded, match="the weights of the 2 models take 80 bytes"):
        bench.use(tenant("small", 50), "a", "b")


def test_pinned_models_are_the_operators() -> None:
    small = tenant("small", 80)
    bench = Bench(PLANS, small)
    bench.residency.pin("a")
    for plan in "ab":
        bench.use(small, plan)
    assert bench.use(small, "c") == set()
    assert bench.use(small, "d") == {"b1", "b2"}
    assert bench.residency.is_ready("a")


def test_without_a_quota_nothing_is_kept() -> None:
    other, small = tenant("other"), tenant("small", 80)
    bench = Bench(PLANS, other)
    bench.use(other, "a")
    assert bench.claimed(other) == []
    bench.claims.use([other, small])
    bench.use(other, "a")
    assert bench.claimed(other) == ["a"]
    bench.claims.use([small])
    assert bench.claimed(other) == []


def test_what_left_or_was_removed_is_not_claimed_any_more() -> None:
    small, other = tenant("small", 80), tenant("other")
    bench = Bench(PLANS, small, other)
    for plan in "ab":
        bench.use(small, plan)
    bench.residency.evict("a")
    bench.residency.remove_plan("b")
    bench.claims.prune()
    assert bench.claimed(small) == []


def test_a_model_is_removed_of_which_others_have_all_weights() -> None:
    small = tenant("small", 80)
    bench = Bench({"a": {"trunk": 40}, "b": {"trunk": 40}, "c": {"c": 20}}, small)
    for plan in "ab":
        bench.use(small, plan)
    # Nothing leaves memory, so that nobody is told to look through claims.
    assert bench.residency.remove_plan("a") == ()
    assert bench.use(small, "c") == set()
    assert bench.claimed(small) == ["b", "c"]


@pytest.mark.parametrize("seed", range(40))
def test_the_quota_holds_whatever_is_asked(seed: int) -> None:
    chance = random.Random(seed)
    sizes = {f"w{number}": chance.randint(1, 40) for number in range(12)}
    plans = {
        f"p{number}": {digest: sizes[digest] for digest in chance.sample(sorted(sizes), chance.randint(1, 4))}
        for number in range(7)
    }
    tenants = [tenant("small", chance.randint(60, 200)), tenant("tiny", chance.randint(40, 90)), tenant("free")]
    bench = Bench(plans, *tenants)
    held: list[tuple[Tenant, str]] = []
    for _ in range(200):
        if held and chance.random() < 0.5:
            _, plan = held.pop(chance.randrange(len(held)))
            bench.residency.release(plan)
            continue
        who, plan = chance.choice(tenants), chance.choice(sorted(plans))
        before = set(bench.residency._committed)
        own_free = set(bench.claimed(tenants[2]))
        try:
            freed = bench.lease(who, plan)
        except BudgetExceeded:
            assert sum(plans[plan].values()) > who.resident_limit_bytes
            continue
        if freed is None:
            assert held
            assert set(bench.residency._committed) == before
            continue
        held.append((who, plan))
        # Who has no quota loses nothing to those who have one.
        assert who is tenants[2] or all(bench.residency.is_ready(each) for each in own_free)
        claimed = {digest: size for each in bench.claimed(who) for digest, size in plans[each].items()}
        assert sum(claimed.values()) <= who.resident_limit_bytes
        bench.residency.check_invariants()
