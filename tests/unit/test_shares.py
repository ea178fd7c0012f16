"""Shares: who has had least goes first, equals in the order they came, and nobody waits for ever."""

from __future__ import annotations

import pytest

from sidecar.shares import LEAST_SHARE, QUANTUM_S, Contender, Shares
from sidecar.tenants import Tenant


def tenant(name: str, weight: float = 1.0, priority: int = 5) -> Tenant:
    return Tenant(name=name, domain=name, weight=weight, priority=priority)


def opened(*tenants: Tenant) -> Shares:
    shares = Shares()
    shares.use(tenants)
    for each in tenants:
        shares.enter(each)
    return shares


def first(shares: Shares, *names: str) -> str:
    """Return whose turn it is, of requests of which the first is the oldest."""
    return shares.first([Contender((name,), order, name) for order, name in enumerate(names)]).what


def run(shares: Shares, names: list[str], turns: int, seconds: float) -> dict[str, float]:
    """Let all of ``names`` want the device for so many turns; return what each has had."""
    had = dict.fromkeys(names, 0.0)
    for _ in range(turns):
        name = first(shares, *names)
        had[name] += seconds
        shares.charge(name, seconds)
    return had


def test_equals_are_served_in_the_order_they_came() -> None:
    shares = opened(tenant("a"), tenant("b"))
    assert first(shares, "a", "b") == "a"
    shares.charge("a", QUANTUM_S)
    assert first(shares, "a", "b") == "a"
    assert shares.equal(["a"], ["b"])
    shares.charge("a", QUANTUM_S / 2)
    assert first(shares, "a", "b") == "b"
    assert not shares.equal(["a"], ["b"])
    assert shares.equal(["a"], ["a"])


def test_time_goes_by_weight() -> None:
    shares = opened(tenant("a", 4.0), tenant("b", 1.0), tenant("c", 3.0))
    had = run(shares, ["a", "b", "c"], 8000, 0.01)
    assert had == pytest.approx({"a": 40.0, "b": 10.0, "c": 30.0}, abs=0.3)


def test_a_newcomer_goes_before_one_that_has_had_a_lot_and_has_not_saved_up_for_ever() -> None:
    flood, new = tenant("flood"), tenant("new")
    shares = Shares()
    shares.use([flood, new])
    shares.enter(flood)
    shares.charge("flood", 1000.0)
    shares.enter(new)
    assert first(shares, "flood", "new") == "new"
    had = run(shares, ["flood", "new"], 1000, 0.01)
    # What it has saved up are two quanta, and a third is what they may differ by.
    assert QUANTUM_S < had["new"] - had["flood"] <= 3 * QUANTUM_S + 0.02


def test_who_leaves_and_comes_back_gains_nothing_by_it() -> None:
    a, b = tenant("a"), tenant("b")
    shares = opened(a, b)
    shares.charge("a", 1.0)
    for _ in range(100):
        shares.leave("a")
        shares.enter(a)
    assert shares.served_s("a") == 1.0
    assert first(shares, "a", "b") == "b"


def test_a_higher_priority_goes_first_but_not_all_the_time() -> None:
    shares = opened(tenant("high", priority=9), tenant("low", priority=1), tenant("middle", priority=5))
    had = run(shares, ["low", "middle", "high"], 10_000, 0.01)
    assert had["low"] == pytest.approx(100 * LEAST_SHARE, rel=0.15)
    assert had["middle"] == pytest.approx(100 * LEAST_SHARE, rel=0.15)
    assert had["high"] > 80


def test_what_nobody_wants_is_not_put_by() -> None:
    high, low = tenant("high", priority=9), tenant("low", priority=1)
    shares = opened(high)
    shares.charge("high", 1000.0)
    shares.enter(low)
    assert first(shares, "low", "high") == "high"
    shares.charge("high", QUANTUM_S / LEAST_SHARE)
    assert first(shares, "low", "high") == "low"
    shares.charge("low", 2 * QUANTUM_S)
    assert first(shares, "low", "high") == "high"
    shares.leave("low")
    assert not shares.contended


def test_a_lower_priority_pays_for_stages_that_take_more_than_was_put_by() -> None:
    high, low = tenant("high", priority=9), tenant("low", priority=1)
    shares = opened(high, low)
    had = {"high": 0.0, "low": 0.0}
    for _ in range(10_000):
        name = first(shares, "high", "low")
        seconds = 0.8 if name == "low" else 0.01
        had[name] += seconds
        shares.charge(name, seconds)
        if name == "low":
            # One request at a time: who leaves and comes back owes what it owed.
            shares.leave("low")
            shares.enter(low)
    assert had["low"] / sum(had.values()) == pytest.approx(LEAST_SHARE, rel=0.2)


def test_a_lower_priority_that_could_not_spend_its_part_does_not_spend_all_of_it_later() -> None:
    shares = opened(tenant("high", priority=9), tenant("low", priority=1))
    # Its weights are on their way for ten minutes.
    shares.charge("high", 600.0)
    assert run(shares, ["high", "low"], 100, 0.01)["low"] <= 4 * QUANTUM_S + 0.1


def test_who_wants_some_and_cannot_run_does_not_save_up_either() -> None:
    shares = opened(tenant("busy"), tenant("stuck"))
    for _ in range(1000):
        shares.begin(["busy"])
        shares.charge("busy", 0.1)
    had = run(shares, ["busy", "stuck"], 1000, 0.01)
    assert had["stuck"] - had["busy"] <= 3 * QUANTUM_S + 0.12


def test_a_batch_for_several_goes_when_one_of_them_would() -> None:
    shares = opened(tenant("a"), tenant("b"), tenant("c"))
    shares.charge("a", 1.0)
    shares.charge("c", 0.5)
    assert shares.first([Contender(("c",), 0, "c"), Contender(("a", "b"), 1, "both")]).what == "both"


def test_what_others_get_first_is_told_by_shares() -> None:
    a, b, high = tenant("a", 2.0), tenant("b"), tenant("high", priority=9)
    shares = opened(a, b, high)
    # Of b, half as much, for it has half the weight.
    assert shares.ahead_s("b", a, 4.0) == pytest.approx((4.0 + QUANTUM_S) / 2)
    shares.charge("b", 1.0)
    assert shares.ahead_s("b", a, 4.0) == pytest.approx((4.0 + QUANTUM_S - 2.0) / 2)
    assert shares.ahead_s("b", a, 1.0) == 0.0
    assert shares.ahead_s("high", a, 1.0) == float("inf")
    assert shares.ahead_s("a", high, 1.0) == LEAST_SHARE
    assert shares.ahead_s("b", tenant("new"), 4.0) == pytest.approx((4.0 + QUANTUM_S - 2.0 + shares.served_s("a")) / 2)


def test_who_cannot_run_is_overtaken_as_far_as_shares_go() -> None:
    shares = opened(tenant("a"), tenant("b"), tenant("high", priority=9))
    assert not shares.is_before("a", "b")
    shares.charge("b", 2 * QUANTUM_S)
    assert shares.is_before("a", "b")
    shares.charge("a", QUANTUM_S)
    assert not shares.is_before("a", "b")
    assert shares.is_before("high", "a")
    assert not shares.is_before("a", "high")
    # Until what is put by for the lower one is to be spent.
    shares.charge("high", QUANTUM_S / LEAST_SHARE)
    assert not shares.is_before("high", "a")


def test_other_tenants_begin_anew_and_what_is_under_way_counts() -> None:
    a, b = tenant("a"), tenant("b")
    shares = opened(a, b)
    shares.charge("a", 100.0)
    shares.use([tenant("a", 3.0, 7), tenant("c")])
    shares.check_invariants()
    assert shares.served_s("a") == 0.0
    assert shares.contended
    shares.leave("b")
    shares.leave("a")
    shares.check_invariants()
    assert not shares.contended
    shares.charge("nobody", 1.0)
