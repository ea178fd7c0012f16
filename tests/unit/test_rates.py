"""Rates and percentiles of counters, and numbers as people read them."""

from __future__ import annotations

from sidecar import units
from sidecar.rates import RATE_S, WINDOW_S, History, Totals, added, quantile


def test_a_percentile_lies_between_the_bounds_of_its_bucket():
    bounds = (1.0, 2.0, 4.0)
    assert quantile(bounds, [0, 0, 0, 0], 0.5) is None
    assert quantile(bounds, [], 0.5) is None
    assert quantile(bounds, [10, 0, 0, 0], 0.5) == 0.5
    assert quantile(bounds, [5, 0, 5, 0], 0.99) == 2 + 2 * (9.9 - 5) / 5
    # Beyond the last bound nothing is known.
    assert quantile(bounds, [0, 0, 0, 3], 0.5) == 4.0


def test_counts_grow():
    assert added([3, 4], [1, 2], -1) == [2, 2]
    assert added([3, 4], ()) == [3, 4]
    assert added((), [1]) == [1]


def at(seconds: float, life: str = "a") -> Totals:
    return Totals(seconds, life)


def test_history_keeps_a_minute_of_one_engine():
    history = History()
    assert history.before(0) is None
    for second in range(200):
        history.note(at(float(second)))
    latest, before, window = (history.before(seconds) for seconds in (0, RATE_S, WINDOW_S))
    assert latest is not None
    assert before is not None
    assert window is not None
    assert latest.at_s == 199
    assert RATE_S <= latest.at_s - before.at_s <= RATE_S + 2
    assert WINDOW_S <= latest.at_s - window.at_s <= WINDOW_S + 2
    # Less than thirty-five are kept, however often somebody looks.
    assert len(history._kept) < 35
    history.note(at(200.0, "b"))
    assert history.before(RATE_S) is None


def test_history_forgets_what_was_before_a_pause():
    history = History()
    history.note(at(0.0))
    history.note(at(1.0))
    assert history.before(RATE_S) == at(0.0)
    history.note(at(100.0))
    assert history.before(0) is None


def test_numbers_are_short():
    assert [units.size(n) for n in (0, 999, 1000, 4_200_000, 3e12)] == ["0 B", "999 B", "1.0 kB", "4.2 MB", "3000.0 GB"]
    assert [units.duration(s) for s in (None, 0, 0.00025, 0.0123, 0.9, 3.21, 90, 600)] == [
        *(units.NONE, "0 ms", "0.2 ms", "12 ms", "900 ms", "3.2 s", "90 s", "10 min"),
    ]
    assert [units.rate(r) for r in (None, 0, 0.04, 0.5, 12.3)] == [units.NONE, "0/s", "0.04/s", "0.5/s", "12/s"]
    assert [units.percent(p) for p in (None, 0, 0.004, 0.5, 1)] == [units.NONE, "0 %", "0.4 %", "50 %", "100 %"]
