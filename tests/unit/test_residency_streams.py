"""Leases on plans of which only a window is held."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.residency import Residency

LARGE = {f"l{number}": 10 for number in range(10)}
SMALL = {"s0": 10, "s1": 10}


def made(budget_bytes: int) -> Residency:
    residency = Residency(budget_bytes)
    residency.add_plan("large", LARGE)
    residency.add_plan("small", SMALL)
    return residency


def run(residency: Residency, kept: int = 2, ahead: int = 2) -> list[str]:
    """Run the large plan through, two stages at a time; return what was fetched, in order."""
    names, fetched = [*LARGE], []
    residency.begin_stream("large")
    for front in range(len(names)):
        residency.spend("large", names[max(kept, front - 1) : front])
        grant = residency.hold("large", names[front : front + ahead], names[:kept])
        assert grant is not None
        fetched += grant.fetch
        for digest in grant.fetch:
            residency.arrived(digest)
        residency.check_invariants()
        assert all(residency.is_resident(digest) for digest in names[front : front + ahead])
    residency.release("large")
    return fetched


def test_a_plan_larger_than_the_budget_runs_through_it_and_its_first_weights_stay() -> None:
    residency = made(50)
    assert run(residency) == [*LARGE]
    again = run(residency)
    assert again[0] not in ("l0", "l1")
    assert {"l0", "l1"}.isdisjoint(again)
    # Of the last two, one at least is still there, and leaves last.
    assert len(again) <= 8
    residency.check_invariants()


def test_what_a_window_holds_stays_when_others_expire() -> None:
    residency = Residency(50, clock=lambda: 100.0)
    residency.add_plan("large", LARGE)
    residency.add_plan("sibling", {"l0": 10, "l1": 10, "own": 10}, ttl_s=0)
    grant = residency.lease("sibling")
    assert grant is not None
    for digest in grant.fetch:
        residency.arrived(digest)
    residency.release("sibling")
    residency.begin_stream("large")
    assert residency.hold("large", ["l0", "l1"]) is not None
    assert residency.expire() == ("own",)
    assert residency.is_resident("l0")
    residency.check_invariants()
    residency.release("large")


def test_what_others_hold_is_never_taken() -> None:
    residency = made(50)
    assert residency.lease("small") is not None
    run(residency, kept=1)
    assert residency.is_ready("small") or residency.is_held("small")
    residency.begin_stream("large")
    assert residency.hold("large", ["l4", "l5", "l6", "l7"]) is None
    assert residency.hold("large", ["l4", "l5", "l6"]) is not None
    assert residency.is_leased_beside("large")
    residency.release("small")
    assert not residency.is_leased_beside("large")
    grant = residency.hold("large", ["l4", "l5", "l6", "l7"])
    assert grant is not None
    assert grant.evict == ("s1",)


def test_what_was_run_leaves_first_the_latest_before_the_others() -> None:
    residency = made(60)
    assert residency.lease("small") is not None
    residency.release("small")
    residency.begin_stream("large")
    assert residency.hold("large", ["l0", "l1", "l2", "l3"]) is not None
    residency.spend("large", ["l0", "l1"])
    grant = residency.hold("large", ["l2", "l3", "l4"])
    assert grant is not None
    assert grant.evict == ("l1",)
    # What nobody has spent goes by the policy: the small one was used longest ago.
    grant = residency.hold("large", ["l2", "l3", "l4", "l5", "l6"])
    assert grant is not None
    assert grant.evict == ("l0", "s1")


def test_what_a_window_holds_stays_when_memory_is_needed() -> None:
    residency = made(60)
    assert residency.lease("small") is not None
    residency.release("small")
    residency.begin_stream("large")
    assert residency.hold("large", ["l0", "l1", "l2", "l3"]) is not None
    residency.spend("large", ["l0"])
    assert residency.hold("large", ["l1", "l2", "l3"]) is not None
    assert residency.relieve(15) == ("l0", "s1")
    assert residency.relieve(1 << 40) == ("s0",)
    assert residency.relieve(1 << 40) == ()
    assert residency.committed_bytes == 30
    residency.check_invariants()


def test_what_another_plan_has_too_is_not_spent() -> None:
    residency = made(50)
    residency.add_plan("sibling", {"l0": 10, "own": 10})
    assert residency.lease("sibling") is not None
    residency.release("sibling")
    residency.begin_stream("large")
    assert residency.hold("large", ["l0", "l1", "l2"]) is not None
    residency.spend("large", ["l0"])
    grant = residency.hold("large", ["l1", "l2", "l3", "l4"])
    assert grant is not None
    assert grant.evict == ("own",)


def test_a_plan_that_is_held_does_not_stream() -> None:
    residency = made(50)
    residency.lease("small")
    with pytest.raises(AssertionError, match="does not stream"):
        residency.begin_stream("small")


def test_pins_leave_less_room() -> None:
    residency = made(50)
    assert residency.room_bytes == 50
    residency.pin("small")
    assert residency.room_bytes == 30
    assert residency.pinned_weights() == set(SMALL)
    assert residency.weights("large")["l3"] == 10


@given(st.integers(0, 2**32), st.integers(4, 12))
@settings(max_examples=100, deadline=None)
def test_books_balance_whatever_is_leased_beside(seed: int, room: int) -> None:
    chosen = random.Random(seed)
    residency = made(10 * room)
    residency.add_plan("sibling", {"l2": 10, "l7": 10, "x": 10})
    leased: list[str] = []
    names = [*LARGE]
    for _ in range(3):
        residency.begin_stream("large")
        kept = chosen.randrange(3)
        for front in range(len(names)):
            if chosen.random() < 0.4:
                name = chosen.choice(["small", "sibling"])
                if (beside := residency.lease(name)) is not None:
                    leased.append(name)
                    for digest in beside.fetch:
                        residency.arrived(digest)
            if leased and chosen.random() < 0.6:
                residency.release(leased.pop())
            residency.spend("large", names[max(kept, front - 1) : front])
            window = names[front : front + 1 + chosen.randrange(3)]
            grant = residency.hold("large", window, names[:kept])
            for digest in grant.fetch if grant is not None else ():
                residency.arrived(digest)
            residency.check_invariants()
            assert grant is None or all(residency.is_resident(digest) for digest in window)
        residency.release("large")
    while leased:
        residency.release(leased.pop())
    residency.check_invariants()
    assert run(residency) is not None
