"""Which runs are overdue."""

from __future__ import annotations

import math

import pytest

from sidecar.journal import Running
from sidecar.watchdog import Watchdog


def run_of(began_s: float, expected_s: float = 0.001, *, place: int = 0, sequence: int = 1) -> Running:
    return Running(place, sequence, began_s, expected_s, 1)


def watched(dog: Watchdog, running: Running, until_s: float, *, step_s: float = 1.0) -> float | None:
    """Look at a run every so often; return when it is overdue, None when it is not before ``until_s``."""
    now = running.began_s
    dog.begin(now)
    while now < until_s:
        now += step_s
        if dog.look([running], now) is not None:
            return now
    return None


def test_a_run_may_take_as_long_as_is_set() -> None:
    assert watched(Watchdog(5.0), run_of(100.0), 200.0) == 106.0


def test_what_is_known_to_take_long_may_take_ten_times_as_long() -> None:
    assert watched(Watchdog(5.0), run_of(100.0, 3.0), 200.0) == 131.0


def test_what_nobody_has_measured_may_take_ten_times_as_long_as_is_set() -> None:
    assert watched(Watchdog(5.0), run_of(100.0, 0.0), 200.0) == 151.0


def test_many_runs_one_after_the_other_are_not_one() -> None:
    dog = Watchdog(2.0)
    dog.begin(0.0)
    for now in range(1, 100):
        assert dog.look([run_of(now - 0.9, sequence=2 * now + 1)], float(now)) is None


def test_of_several_the_one_that_is_longest_overdue_is_told() -> None:
    dog = Watchdog(2.0)
    dog.begin(0.0)
    runs = [run_of(0.0, place=0), run_of(0.0, 0.05, place=1), run_of(0.0, 50.0, place=2), run_of(1.9, place=3)]
    assert [dog.look(runs, now) for now in (1.0, 2.0)] == [None, None]
    overdue = dog.look(runs, 3.0)
    assert overdue is not None
    assert (overdue.running.place, overdue.took_s, overdue.allowed_s) == (0, 3.0, 2.0)


def test_a_machine_that_was_asleep_has_not_computed_meanwhile() -> None:
    """The clock of a frozen container goes on; nobody looked."""
    dog = Watchdog(10.0)
    dog.begin(0.0)
    assert dog.look([run_of(0.5)], 1.0) is None
    assert dog.look([run_of(0.5)], 3600.0) is None
    # Eight seconds more, then it has had its ten.
    assert [dog.look([run_of(0.5)], 3600.0 + second) for second in range(1, 8)] == [None] * 7
    assert dog.look([run_of(0.5)], 3608.0) is not None


def test_another_engine_begins_anew() -> None:
    dog = Watchdog(2.0)
    dog.begin(0.0)
    for now in (1.0, 2.0):
        assert dog.look([run_of(0.0)], now) is None
    dog.begin(2.5)
    for now in (3.0, 4.0):
        assert dog.look([run_of(2.6)], now) is None


def test_it_looks_once_a_second_and_oftener_where_less_is_set() -> None:
    dog = Watchdog(10.0)
    dog.begin(50.0)
    assert (dog.due_s(50.0), dog.due_s(50.4), dog.due_s(52.0)) == (1.0, pytest.approx(0.6), 0.0)
    assert (dog.is_due(50.9), dog.is_due(51.0)) == (False, True)
    assert Watchdog(0.5).look_s == 0.25


def test_without_a_limit_nobody_looks() -> None:
    dog = Watchdog(0.0)
    assert not dog.is_due(0.0)
    dog.begin(1.0)
    assert dog.due_s(1e9) == math.inf
    assert not dog.is_due(1e9)
