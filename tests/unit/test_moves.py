"""Moves: what happens again within a second is one, and whoever asks is told what is new or has grown."""

from __future__ import annotations

from sidecar.moves import FETCH, Moves
from sidecar.residency import Residency


def test_what_happens_again_within_a_second_is_one_move():
    moves = Moves()
    moves.note(FETCH, ["b", "a"], 1, 10, 1.0)
    first = moves.last
    moves.note(FETCH, ["a", "b"], 2, 5, 1.5)
    (only,) = moves.since(0)
    assert (only.plans, only.weight_count, only.size_bytes, only.id) == (("a", "b"), 3, 15, 1)
    # It grew after it was told.
    assert moves.since(first) == [only]
    assert moves.since(moves.last) == []
    moves.note(FETCH, ["a", "b"], 1, 1, 2.0)
    moves.note("room", ["a", "b"], 1, 1, 2.0)
    moves.note(FETCH, ["a"], 1, 1, 2.0)
    assert [(move.id, move.reason, move.plans) for move in moves.since(0)] == [
        (1, FETCH, ("a", "b")),
        (3, FETCH, ("a", "b")),
        (4, "room", ("a", "b")),
        (5, FETCH, ("a",)),
    ]


def test_there_are_only_so_many():
    moves = Moves()
    for number in range(1000):
        moves.note(FETCH, [str(number)], 1, 1, 0.0)
    assert [move.id for move in moves.since(0)] == list(range(937, 1001))


def test_residency_notes_who_fetches_and_who_loses():
    residency = Residency(30)
    residency.add_plan("a", {"trunk": 10, "x": 10})
    residency.add_plan("b", {"trunk": 10, "y": 10})
    residency.add_plan("c", {"z": 20})
    for plan in ("a", "b", "c"):
        assert residency.lease(plan) is not None
        residency.release(plan)
    residency.evict("c")
    told = [(move.reason, move.plans, move.weight_count, move.size_bytes) for move in residency.moves.since(0)]
    assert told == [
        (FETCH, ("a",), 2, 20),
        (FETCH, ("b",), 1, 10),
        ("room", ("a", "b"), 2, 20),
        (FETCH, ("c",), 1, 20),
        ("operator", ("c",), 1, 20),
    ]
