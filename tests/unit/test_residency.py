"""What is in memory and what leaves: budget, leases, least recently used, shared weights."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from trunkline.errors import BudgetExceeded

from sidecar.policies import POLICIES, Either, GreedyDualSizeFrequency, LeastOften, Policy, WholeModelLeastRecentlyUsed
from sidecar.residency import Grant, Leaving, Residency
from sidecar.rivals import AdaptiveResidency


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def residency(budget_bytes: int, policy: Policy | None = None, **plans: dict[str, int]) -> Residency:
    made = Residency(budget_bytes, policy)
    for plan, weights in plans.items():
        made.add_plan(plan, weights)
    return made


def use(made: Residency, plan: str) -> Grant:
    grant = made.lease(plan)
    assert grant is not None
    for digest in grant.fetch:
        made.arrived(digest)
    made.release(plan)
    made.check_invariants()
    return grant


def test_the_least_recently_used_plan_leaves_first() -> None:
    made = residency(20, a={"a": 10}, b={"b": 10}, c={"c": 10})
    use(made, "a")
    use(made, "b")
    use(made, "a")
    assert use(made, "c") == Grant(evict=("b",), fetch=("c",))


def test_a_resident_plan_costs_nothing() -> None:
    made = residency(20, a={"a": 10})
    use(made, "a")
    assert use(made, "a") == Grant((), ())


def test_shared_weights_count_once_and_stay_while_someone_needs_them() -> None:
    made = residency(25, a={"trunk": 10, "a": 5}, b={"trunk": 10, "b": 5}, c={"c": 8})
    use(made, "a")
    assert use(made, "b") == Grant((), ("b",))
    assert made.committed_bytes == 20
    assert use(made, "c") == Grant(evict=("a",), fetch=("c",))
    assert made.is_ready("b")


def test_weights_the_newcomer_needs_are_not_evicted_to_make_room_for_it() -> None:
    made = residency(15, a={"trunk": 10, "a": 5}, b={"trunk": 10, "b": 5})
    use(made, "a")
    assert use(made, "b") == Grant(evict=("a",), fetch=("b",))


def test_only_the_shortfall_leaves_the_last_weights_first() -> None:
    made = residency(40, a={"a0": 4, "a1": 4, "a2": 4, "a3": 8}, b={"b": 20}, c={"c": 9}, d={"d": 12})
    for plan in "ab":
        use(made, plan)
    assert use(made, "c").evict == ("a3", "a2")
    assert not made.is_held("a")
    assert not made.is_ready("a")
    assert use(made, "a") == Grant(evict=("b",), fetch=("a2", "a3"))
    assert made.is_ready("a")


def test_a_plan_of_which_nothing_is_left_is_forgotten_as_a_user() -> None:
    made = residency(15, a={"trunk": 10, "a": 5}, b={"b": 15}, c={"trunk": 10})
    for plan in "abc":
        use(made, plan)
    assert made.evict("c") == ("trunk",)


def test_a_shared_weight_is_as_recent_as_the_latest_of_its_users() -> None:
    made = residency(30, a={"t0": 5, "a": 5, "t1": 5}, b={"t0": 5, "t1": 5, "b": 5}, c={"c": 10}, d={"d": 10})
    for plan in "acb":
        use(made, plan)
    assert use(made, "d").evict == ("a", "c")


def test_alternating_shared_and_own_weights_of_one_plan_leave_from_its_end() -> None:
    made = residency(40, old={"s0": 5, "s1": 5}, a={"s0": 5, "a0": 5, "s1": 5, "a1": 5}, b={"b": 20}, c={"c": 12})
    for plan in ("old", "a", "b"):
        use(made, plan)
    assert use(made, "c").evict == ("a1", "s1", "a0")


def test_whole_models_leave_with_the_comparator() -> None:
    plans = {"a": {"trunk": 10, "a0": 2, "a1": 2}, "b": {"trunk": 10, "b": 4}, "c": {"c": 1}}
    made = residency(18, WholeModelLeastRecentlyUsed(), **plans)
    use(made, "a")
    use(made, "b")
    assert set(use(made, "c").evict) == {"a0", "a1"}


def test_gdsf_keeps_what_is_asked_for_often() -> None:
    made = residency(20_000_000, GreedyDualSizeFrequency(), a={"a": 10_000_000}, b={"b": 10_000_000}, c={"c": 10_000_000})
    for plan in "aaab":
        use(made, plan)
    assert use(made, "c").evict == ("b",)
    assert use(made, "b").evict == ("c",)


def test_gdsf_lets_go_in_time_of_what_is_asked_for_no_more() -> None:
    made = residency(20_000_000, GreedyDualSizeFrequency(), a={"a": 10_000_000}, b={"b": 10_000_000}, c={"c": 10_000_000})
    for plan in "aaaa":
        use(made, plan)
    left = [weight for plan in "bcbcbcbc" for weight in use(made, plan).evict]
    assert "a" in left


def test_gdsf_adds_up_the_uses_of_a_trunk() -> None:
    plans = {name: {"trunk": 10_000_000, name: 1_000_000} for name in "abcd"}
    made = residency(25_000_000, GreedyDualSizeFrequency(), x={"x": 10_000_000}, y={"y": 10_000_000}, **plans)
    for plan in "abcdxx":
        use(made, plan)
    assert "trunk" not in use(made, "y").evict


def test_gdsf_prefers_weights_that_are_cheap_to_bring_back() -> None:
    many = {f"m{number}": 10_000 for number in range(100)}
    made = residency(2_000_000, GreedyDualSizeFrequency(), many=many, one={"one": 1_000_000}, c={"c": 1_000_000})
    use(made, "many")
    use(made, "one")
    assert use(made, "c").evict == ("one",)


def test_by_rate_one_pass_pushes_out_nothing_that_is_asked_for_again_and_again() -> None:
    made = residency(20, LeastOften(), a={"a": 10}, b={"b": 10}, c={"c": 10}, d={"d": 10})
    for plan in "aaab":
        use(made, plan)
    assert use(made, "c").evict == ("b",)
    assert use(made, "d").evict == ("c",)


def test_by_rate_half_of_a_cycle_stays() -> None:
    made = residency(20, LeastOften(), a={"a": 10}, b={"b": 10}, c={"c": 10})
    fetched = [len(use(made, plan).fetch) for plan in "abc" * 10]
    assert sum(fetched[3:]) <= 15


def test_by_rate_what_is_asked_for_no_more_loses_its_rate() -> None:
    made = residency(20, LeastOften(), a={"a": 10}, b={"b": 10}, c={"c": 10})
    for plan in "aaaa":
        use(made, plan)
    left = [weight for plan in "bcbcbcbcbcbc" for weight in use(made, plan).evict]
    assert "a" in left


def test_of_two_policies_the_better_decides_and_the_other_again_when_it_is_better() -> None:
    made = AdaptiveResidency(20)
    for plan in ("a", "b", "c", "d", "gone"):
        made.add_plan(plan, {plan: 10})
    assert isinstance(made.policy, Either)
    chosen = made.policy.chosen
    cycle = [len(use(made, plan).fetch) for plan in "abc" * 40]
    assert (chosen, made.policy.chosen) == (0, 1)
    assert (sum(cycle[:6]), sum(cycle[-30:])) == (6, 15), "at first all of it is fetched, then half"
    draw = random.Random(1)
    for _ in range(100):
        awake = draw.sample("abcd", 2)
        for _ in range(12):
            use(made, draw.choice(awake))
    assert made.policy.chosen == 0
    made.set_priority("a", 1)
    made.set_ttl("a", 60.0)
    assert [each.priority("a") for each in made._rivals] == [1, 1]
    assert [each.ttl_s("a") for each in made._rivals] == [60.0, 60.0]
    made.remove_plan("gone")
    made.lease("a", "b")
    assert made.lease("c") is None
    made.check_invariants()


def test_policies_are_compared_only_while_not_everything_fits() -> None:
    made = AdaptiveResidency(30)
    made.add_plan("a", {"trunk": 10, "a": 10})
    made.add_plan("b", {"trunk": 10, "b": 10})
    use(made, "a")
    use(made, "b")
    made.check_invariants()
    assert [each.committed_bytes for each in made._rivals] == [0, 0]
    made.add_plan("c", {"c": 10})
    use(made, "c")
    assert [each.committed_bytes for each in made._rivals] == [10, 10]
    made.remove_plan("b")
    made.check_invariants()
    use(made, "a")
    assert [each.committed_bytes for each in made._rivals] == [10, 10]


def test_what_is_idle_too_long_leaves_the_books_of_all_policies() -> None:
    now = [0.0]
    made = AdaptiveResidency(20, lambda: now[0])
    for plan in "abc":
        made.add_plan(plan, {plan: 10}, ttl_s=60.0 if plan == "a" else None)
    use(made, "a")
    now[0] = 61.0
    assert made.expire() == ("a",)
    assert [each.committed_bytes for each in made._rivals] == [0, 0]
    made.check_invariants()


def test_lower_priority_leaves_first_and_a_shared_weight_has_the_highest_of_its_users() -> None:
    made = Residency(30)
    made.add_plan("dear", {"trunk": 10, "d": 5}, priority=9)
    made.add_plan("cheap", {"trunk": 10, "c": 5}, priority=0)
    made.add_plan("plain", {"p": 10})
    made.add_plan("x", {"x": 10})
    for plan in ("dear", "plain", "cheap"):
        use(made, plan)
    assert use(made, "x").evict == ("c", "p")
    made.set_priority("dear", 1)
    assert use(made, "plain").evict == ("d",)
    assert (made.priority("dear"), made.priority("plain")) == (1, 5)


def test_what_was_idle_for_too_long_leaves_first_and_on_its_own() -> None:
    clock = Clock()
    made = Residency(30, clock=clock)
    made.add_plan("a", {"trunk": 5, "a": 5}, priority=9, ttl_s=60)
    made.add_plan("b", {"trunk": 5, "b": 5})
    made.add_plan("c", {"c": 15})
    made.add_plan("d", {"d": 1})
    for plan in "cab":
        use(made, plan)
        clock.now_s += 10
    assert made.next_expiry_s() == 170
    assert made.expire() == ()
    clock.now_s = 170.5
    assert use(made, "d").evict == ("a",), "it has expired, dear as it is"
    use(made, "a")
    assert made.next_expiry_s() == 230.5
    made.lease("a")
    assert made.next_expiry_s() is None
    clock.now_s = 300
    made.release("a")
    clock.now_s = 359
    assert made.expire() == ()
    clock.now_s = 361
    assert made.expire() == ("a",)
    assert made.expire() == ()
    assert made.next_expiry_s() is None
    made.set_ttl("b", 1.0)
    assert made.ttl_s("b") == 1.0
    assert made.expire() == ("trunk", "b")
    assert made.counts.evictions == {"room": 2, "ttl": 3}


def test_a_pinned_plan_does_not_expire() -> None:
    clock = Clock()
    made = Residency(30, clock=clock)
    made.add_plan("a", {"a": 5}, ttl_s=1)
    made.pin("a")
    use(made, "a")
    clock.now_s += 10
    assert made.expire() == ()


def test_nobody_has_to_look_before_something_can_expire() -> None:
    clock = Clock()
    made = Residency(30, clock=clock)
    for plan, ttl_s in (("a", 60), ("b", 30), ("c", None)):
        made.add_plan(plan, {plan: 5}, ttl_s=ttl_s)
    start_s = clock.now_s
    assert made.quiet_until_s == math.inf
    use(made, "c")
    assert made.quiet_until_s == math.inf
    use(made, "a")
    assert made.quiet_until_s == start_s + 60
    use(made, "b")
    assert made.quiet_until_s == start_s + 30
    clock.now_s += 10
    use(made, "b")
    assert made.quiet_until_s == start_s + 30, "earlier than need be, once"
    assert made.expire() == ()
    assert made.quiet_until_s == start_s + 40
    made.pin("b")
    clock.now_s += 100
    assert made.expire() == ("a",)
    assert made.quiet_until_s == math.inf
    made.unpin("b")
    assert made.expire() == ("b",)
    made.set_ttl("c", 5)
    assert made.expire() == ("c",)


def test_what_an_earlier_life_left_behind_is_idle_since_it_was_taken_over() -> None:
    clock = Clock()
    made = Residency(30, clock=clock)
    made.add_plan("a", {"a": 5}, ttl_s=60)
    made.take_over("a", {"a"})
    assert made.expire() == ()
    assert made.quiet_until_s == clock.now_s + 60
    clock.now_s += 60
    assert made.expire() == ("a",)


def test_after_a_failed_load_nothing_is_committed_that_never_arrived() -> None:
    made = residency(20, a={"t0": 5, "t1": 5, "a": 1}, b={"t0": 5, "t1": 5}, c={"c": 15})
    use(made, "b")
    assert use(made, "c").evict == ("t1",)
    made.evict("c")
    assert made.lease("a") == Grant((), ("t1", "a"))
    made.arrived("a")
    made.release("a")
    assert made.evict("a", "failed") == ("t1", "a"), "b uses t1, but it is not there"
    made.check_invariants()
    assert made.is_resident("t0")


def test_what_happened_is_counted() -> None:
    clock = Clock()
    made = Residency(15, clock=clock)
    for plan, weights in {"a": {"trunk": 10, "a": 5}, "b": {"trunk": 10, "b": 5}, "c": {"c": 1}}.items():
        made.add_plan(plan, weights)
    assert made.metrics()["lru_age_s"] is None
    use(made, "a")
    clock.now_s += 7
    use(made, "b")
    use(made, "b")
    made.evict("b")
    use(made, "a")
    made.lease("a")
    made.lease_again("a")
    made.release("a")
    made.release("a")
    made.remove_plan("a")
    assert made.metrics() == {
        "policy": "lru",
        "hits": 1 + 2 + 1 + 2,
        "hit_bytes": 10 + 15 + 10 + 15,
        "misses": 2 + 1 + 1,
        "missed_bytes": 15 + 5 + 5,
        "evictions": {"room": 1, "ttl": 0, "operator": 1, "removed": 2, "failed": 0, "memory": 0, "quota": 0},
        "evicted_bytes": {"room": 5, "ttl": 0, "operator": 5, "removed": 15, "failed": 0, "memory": 0, "quota": 0},
        "lru_age_s": 7.0,
    }
    assert made.evicted_bytes == 25


def test_a_leased_plan_is_not_evicted_and_the_newcomer_waits() -> None:
    made = residency(15, a={"a": 10}, b={"b": 10})
    made.lease("a")
    assert made.lease("b") is None
    made.release("a")
    assert made.lease("b") == Grant(("a",), ("b",))


def test_a_plan_larger_than_the_budget_is_refused_with_both_numbers() -> None:
    made = residency(15, a={"a": 16})
    with pytest.raises(BudgetExceeded, match="16 bytes, the memory budget is 15") as caught:
        made.lease("a")
    assert caught.value.details == {"needed_bytes": 16, "budget_bytes": 15}


def test_a_plan_that_only_pins_keep_out_is_refused() -> None:
    made = residency(15, a={"a": 10}, b={"b": 10})
    made.pin("a")
    use(made, "a")
    with pytest.raises(BudgetExceeded, match="pinned"):
        made.lease("b")
    made.unpin("a")
    assert made.lease("b") is not None


def test_pins_that_do_not_fit_together_are_refused() -> None:
    made = residency(15, a={"a": 10}, b={"b": 10})
    made.pin("a")
    with pytest.raises(BudgetExceeded):
        made.pin("b")
    assert not made.is_pinned("b")


def test_evicting_leaves_what_others_use() -> None:
    made = residency(30, a={"trunk": 10, "a": 5}, b={"trunk": 10, "b": 5})
    use(made, "a")
    use(made, "b")
    assert made.evict("a") == ("a",)
    assert made.evict("a") == ()
    assert made.is_ready("b")


def test_what_would_leave_next_is_told_in_its_order() -> None:
    clock = Clock()
    made = Residency(100, clock=clock)
    for plan, weights in (("a", {"trunk": 10, "a": 5}), ("b", {"trunk": 10, "b": 6}), ("old", {"o1": 1, "o2": 2})):
        made.add_plan(plan, weights)
    made.add_plan("brief", {"s": 7}, ttl_s=1.0)
    made.add_plan("held", {"h": 9})
    for plan in ("old", "a", "b", "brief"):
        use(made, plan)
        clock.now_s += 10
    made.lease("held")
    clock.now_s += 2
    assert made.leased_for_s("held") == 2
    made.lease("held")
    assert made.leased_for_s("held") == 2
    assert made.leaving() == [
        Leaving(frozenset({"brief"}), 1, 7, None, 12),
        Leaving(frozenset({"old"}), 2, 3, 5, 42),
        Leaving(frozenset({"a"}), 1, 5, 5, 32),
        # Equal in all: of these, weights leave one by one, those used last first.
        *sorted([Leaving(frozenset({"a", "b"}), 1, 10, 5, 22), Leaving(frozenset({"b"}), 1, 6, 5, 22)], key=made.leaving().index),
    ]
    # And in just this order it leaves.
    assert [made.relieve(size_bytes) for size_bytes in (7, 3, 5, 6, 10)] == [("s",), ("o2", "o1"), ("a",), ("b",), ("trunk",)]
    assert made.leaving() == []
    made.release("held")
    made.release("held")
    made.lease("held")
    assert made.leased_for_s("held") == 0


def test_memory_for_something_else_is_freed_by_the_same_rule() -> None:
    made = residency(40, old={"o0": 5, "o1": 5}, new={"n": 8}, pinned={"p": 4}, leased={"l": 6})
    for plan in ("old", "new", "pinned"):
        use(made, plan)
    made.lease("leased")
    made.pin("pinned")
    age_s = made.lru_age_s
    assert made.relieve(3) == ("o1",)
    assert made.relieve(6) == ("o0", "n")
    assert made.relieve(1 << 40) == ()
    assert made.committed_bytes == 10
    assert (made.counts.evictions["memory"], made.counts.evicted_bytes["memory"]) == (3, 18)
    # How old what leaves is says nothing of the budget then.
    assert made.lru_age_s == age_s
    made.check_invariants()


def test_a_removed_plan_frees_its_weights() -> None:
    made = residency(30, a={"a": 10})
    use(made, "a")
    assert made.remove_plan("a") == ("a",)
    assert made.committed_bytes == 0


WEIGHTS = {f"w{number}": 3 + number for number in range(10)}


class Checked(Residency):
    """A residency that compares every lease with the rule, read off its books before."""

    def lease(self, *plans: str) -> Grant | None:
        needed = {digest: size for plan in plans for digest, size in self._plans[plan].weights.items()}
        before = dict(self._committed)
        in_use = set(self._in_use)
        leased = {digest for plan in self._leases.keys() | self._pinned for digest in self._plans[plan].weights}
        grant = super().lease(*plans)
        if grant is None:
            return None
        assert set(grant.fetch) == needed.keys() - before.keys(), "only what is missing is fetched"
        assert not set(grant.evict) & (leased | needed.keys()), "what is leased, pinned or wanted stays"
        missed_bytes = sum(needed[digest] for digest in grant.fetch)
        shortfall = sum(before.values()) + missed_bytes - self.budget_bytes
        freed = [before[digest] for digest in grant.evict]
        if self.policy.whole:
            return grant
        assert sum(freed[:-1]) < max(shortfall, 1), "one weight less would not have done"
        assert bool(freed) == (shortfall > 0)
        if self.policy.name != "lru" or any(self._plans[plan].ttl_s is not None for plan in in_use):
            return grant
        for plan in in_use - {user for user in in_use if self._shares(user, in_use)}:
            free = before.keys() - leased - needed.keys()
            gone = [digest in grant.evict for digest in self._plans[plan].weights if digest in free]
            assert gone == sorted(gone), "the first weights of a plan stay longest"
        if grant.evict:
            oldest_that_stayed = min(
                (self._latest(digest, in_use) for digest in before if digest not in {*grant.evict, *leased, *needed}),
                default=self._lease_count,
            )
            assert max(self._latest(digest, in_use) for digest in grant.evict) <= oldest_that_stayed
        return grant

    def _shares(self, plan: str, others: set[str]) -> bool:
        weights = self._plans[plan].weights.keys()
        return any(weights & self._plans[other].weights.keys() for other in others - {plan})

    def _latest(self, digest: str, plans: set[str]) -> int:
        users = [plan for plan in plans if plan in self._plans and digest in self._plans[plan].weights]
        # Taken after the lease, so its own plans do not count; none of what they need can have left.
        return max((self._plans[user].use.last for user in users), default=0)


class Random(RuleBasedStateMachine):
    """Plans over a few weights, used at random by several holders: the books balance after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.made = Checked(30, clock=self.clock)
        self.plans: set[str] = set()
        self.leases: list[str] = []

    @initialize(policy=st.sampled_from(sorted(POLICIES)))
    def choose(self, policy: str) -> None:
        self.made.policy = POLICIES[policy]()

    @rule(
        name=st.sampled_from("abcdef"),
        weights=st.lists(st.sampled_from(sorted(WEIGHTS)), min_size=1, max_size=4, unique=True),
    )
    def add(self, name: str, weights: list[str]) -> None:
        if name not in self.plans:
            self.made.add_plan(name, {weight: WEIGHTS[weight] for weight in weights})
            self.plans.add(name)

    @rule(size_bytes=st.integers(1, 40))
    def memory_is_needed(self, size_bytes: int) -> None:
        staying = {digest for plan in {*self.leases, *self.made._pinned} for digest in self.made.weights(plan)}
        before = dict(self.made._committed)
        freed = self.made.relieve(size_bytes)
        assert staying.isdisjoint(freed)
        free_bytes = sum(size for digest, size in before.items() if digest not in staying)
        assert sum(before[digest] for digest in freed) >= min(size_bytes, free_bytes)

    @rule(seconds=st.integers(0, 20))
    def time_passes(self, seconds: int) -> None:
        self.clock.now_s += seconds
        self.made.expire()

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), complete=st.booleans())
    def lease(self, data: st.DataObject, complete: bool) -> None:
        plan = data.draw(st.sampled_from(sorted(self.plans)))
        try:
            grant = self.made.lease(plan)
        except BudgetExceeded:
            return
        if grant is None:
            assert self.leases, "nothing is leased, so there was room"
            return
        assert not set(grant.evict) & set(grant.fetch)
        self.leases.append(plan)
        for digest in grant.fetch:
            self.made.arrived(digest)
        assert self.made.is_ready(plan)
        if complete:
            self.made.release(self.leases.pop())

    @precondition(lambda self: self.leases)
    @rule()
    def release(self) -> None:
        self.made.release(self.leases.pop(0))

    @precondition(lambda self: self.plans)
    @rule(data=st.data())
    def evict_or_remove(self, data: st.DataObject) -> None:
        plan = data.draw(st.sampled_from(sorted(self.plans)))
        if plan in self.leases:
            return
        if data.draw(st.booleans()):
            self.made.evict(plan)
        else:
            self.made.remove_plan(plan)
            self.plans.discard(plan)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), pin=st.booleans())
    def pin(self, data: st.DataObject, pin: bool) -> None:
        plan = data.draw(st.sampled_from(sorted(self.plans)))
        if not pin:
            self.made.unpin(plan)
            return
        try:
            self.made.pin(plan)
        except BudgetExceeded:
            assert not self.made.is_pinned(plan)

    @precondition(lambda self: self.plans)
    @rule(data=st.data(), ttl_s=st.none() | st.integers(1, 30))
    def set_ttl(self, data: st.DataObject, ttl_s: int | None) -> None:
        self.made.set_ttl(data.draw(st.sampled_from(sorted(self.plans))), ttl_s)

    @invariant()
    def the_books_balance(self) -> None:
        self.made.check_invariants()
        for plan in self.leases:
            assert self.made.is_ready(plan), "a leased plan lost a weight"


Random.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRandom = Random.TestCase


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_twenty_thousand_calls_over_a_budget_of_two_models_for_six_functions(policy: str) -> None:
    draw = random.Random(3)
    made = Checked(2 * 11_000, POLICIES[policy]())
    plans = [f"f{number}" for number in range(6)]
    for number, plan in enumerate(plans):
        trunk = {f"trunk{number // 3}.{layer}": 500 + layer for layer in range(8)}
        made.add_plan(plan, trunk | {f"{plan}.{layer}": 1000 + number + layer for layer in range(5)})
    under_way: list[tuple[str, ...]] = []
    waited = 0
    for call in range(20_000):
        wanted = tuple(draw.sample(plans, 1 + (draw.random() < 0.05)))
        grant = made.lease(*wanted)
        waited += grant is None
        if grant is not None:
            for digest in grant.fetch:
                made.arrived(digest)
            under_way.append(wanted)
        while under_way and (grant is None or len(under_way) > 2 or draw.random() < 0.6):
            ended = under_way.pop(draw.randrange(len(under_way)))
            assert all(made.is_ready(plan) for plan in ended), "nothing was evicted while it was used"
            for plan in ended:
                made.release(plan)
            if grant is None:
                break
        assert made.committed_bytes <= made.budget_bytes
        if call % 50 == 0:
            made.check_invariants()
    made.check_invariants()
    assert made.counts.evictions["room"] > 1000
    assert waited > 0
