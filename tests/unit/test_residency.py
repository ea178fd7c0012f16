"""What is in memory and what leaves: budget, leases, least recently used, shared weights."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from trunkline.errors import BudgetExceeded

from sidecar.residency import Grant, Residency


def residency(budget_bytes: int, **plans: dict[str, int]) -> Residency:
    made = Residency(budget_bytes)
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


def test_only_the_shortfall_leaves() -> None:
    made = residency(30, a={"a": 10}, b={"b": 10}, c={"c": 10}, d={"d": 5})
    for plan in "abc":
        use(made, plan)
    assert use(made, "d").evict == ("a",)


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


def test_a_removed_plan_frees_its_weights() -> None:
    made = residency(30, a={"a": 10})
    use(made, "a")
    assert made.remove_plan("a") == ("a",)
    assert made.committed_bytes == 0


WEIGHTS = {f"w{number}": 3 + number for number in range(10)}


class Random(RuleBasedStateMachine):
    """Plans over a few weights, used at random by several holders: the books balance after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Residency(30)
        self.plans: set[str] = set()
        self.leases: list[str] = []

    @rule(name=st.sampled_from("abcdef"), weights=st.sets(st.sampled_from(sorted(WEIGHTS)), min_size=1, max_size=4))
    def add(self, name: str, weights: set[str]) -> None:
        if name not in self.plans:
            self.made.add_plan(name, {weight: WEIGHTS[weight] for weight in weights})
            self.plans.add(name)

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

    @invariant()
    def the_books_balance(self) -> None:
        self.made.check_invariants()
        for plan in self.leases:
            assert self.made.is_ready(plan), "a leased plan lost a weight"


Random.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestRandom = Random.TestCase
