"""The trace: what is kept of it, for how long, and that it describes all that a replay needs."""

from __future__ import annotations

from sidecar import traces
from sidecar.traces import Lease, Recorder


def test_leases_are_kept_with_the_weights_of_their_plans_each_once() -> None:
    recorder = Recorder()
    one, other = {"t": 10, "a": 1}, {"t": 10, "b": 2}
    recorder.record(Lease(0.5, ("a",), 0, 11, 0), [one])
    recorder.record(Lease(1.25, ("a", "b"), 11, 2, 3), [one, other])
    assert recorder.to_plain() == {
        "recorded": 2,
        "weights": [10, 1, 2],
        "models": {"a": [0, 1], "b": [0, 2]},
        "leases": [
            (0.5, [0], 0, 11, 0),
            (1.25, [0, 1], 11, 2, 3),
        ],
    }
    latest = recorder.to_plain(0)
    assert (latest["leases"], latest["models"], latest["weights"]) == ([], {}, [])


def test_the_oldest_leave_and_in_time_the_plans_that_only_they_used() -> None:
    recorder = Recorder(limit=3)
    recorder.record(Lease(0.0, ("old",), 0, 1, 0), [{"o": 1}])
    for number in range(traces.LIMIT - 1):
        recorder.record(Lease(float(number), ("new",), 0, 1, 0), [{"n": 1}])
    described = recorder.to_plain()
    assert described["recorded"] == traces.LIMIT
    assert described["models"] == {"new": [0]}
    assert len(recorder._leases) == 3
    assert recorder._weights.keys() == {"new"}
