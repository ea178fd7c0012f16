"""Whether stages are run as one or one by one where batches might be made of what is about, by what was measured."""

from __future__ import annotations

import pytest

from sidecar import costs as module
from sidecar.costs import BatchCosts

STAGES = ["a", "b"]


def measured(costs: BatchCosts, key: str, rows: int, seconds: float) -> None:
    # The first time counts for nothing.
    for _ in range(4):
        costs.record(key, rows, seconds)


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch) -> BatchCosts:
    """Each of two stages takes 4 s for one row, and 8 s for four."""
    monkeypatch.setattr(module, "_LOOKS", 0)
    made = BatchCosts()
    for key in STAGES:
        measured(made, key, 1, 4.0)
        measured(made, key, 4, 8.0)
    return made


def test_stages_are_run_as_one_where_that_costs_a_row_less(costs: BatchCosts) -> None:
    measured(costs, "one", 1, 5.0)
    assert costs.joins(STAGES, 1, "one", 1), "5 s is less than 8 s"
    assert not costs.joins(STAGES, 4, "one", 1), "5 s is more than the 4 s of a row among four"
    measured(costs, "one", 4, 15.0)
    assert costs.joins(STAGES, 4, "one", 4)
    assert costs.joins(STAGES, 64, "one", 4), "what was not measured of larger batches is expected of smaller ones"


def test_both_ways_are_measured_before_one_is_chosen(monkeypatch: pytest.MonkeyPatch, costs: BatchCosts) -> None:
    assert not costs.joins([*STAGES, "unknown"], 4, "one", 1)
    # As one, nobody knows what it takes.
    assert costs.joins(STAGES, 4, "one", 1)
    monkeypatch.setattr(module, "_LOOKS", 3)
    looks = [costs.joins(STAGES, 4, "one", 1) for _ in range(5)]
    assert looks == [False, False, False, True, True]
    assert not costs.joins(STAGES, 2, "one", 1), "what batches come about is looked at for each number of rows"


def test_what_was_decided_is_looked_at_again(monkeypatch: pytest.MonkeyPatch, costs: BatchCosts) -> None:
    monkeypatch.setattr(module, "_LOOKS", 2)
    measured(costs, "one", 4, 15.0)
    decided = [costs.joins(STAGES, 4, "one", 4) for _ in range(2 + 400 + 2 + 1)]
    assert decided == [False] * 2 + [True] * 400 + [False] * 2 + [True]


def test_what_did_not_pay_is_measured_once_more(costs: BatchCosts) -> None:
    measured(costs, "one", 4, 17.0)
    assert not any(costs.joins(STAGES, 4, "one", 4) for _ in range(200))
    assert costs.joins(STAGES, 4, "one", 4)
    costs.record("one", 4, 12.0)
    assert costs.joins(STAGES, 4, "one", 4), "it had been disturbed"
