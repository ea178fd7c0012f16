"""What became of requests, counted by model."""

from __future__ import annotations

from typing import Any

from trunkline.protocol import JOINT

from sidecar import outcomes
from sidecar.outcomes import BOUNDS_S, Outcomes


def counted(made: Outcomes, model: str) -> Any:
    found: Any = made.to_plain()["models"]
    return found[model]


def test_an_answer_counts_in_the_first_bound_that_it_does_not_exceed() -> None:
    made = Outcomes(lambda name: True)
    for seconds in (BOUNDS_S[0], 0.0, 0.02, BOUNDS_S[-1], BOUNDS_S[-1] + 1):
        made.answered("m", seconds)
    expected = [0] * (len(BOUNDS_S) + 1)
    expected[0], expected[BOUNDS_S.index(0.025)], expected[-2], expected[-1] = 2, 1, 1, 1
    assert counted(made, "m") == {"counts": expected, "seconds": 21.0205, "failed": {}}
    assert made.to_plain()["bounds_s"] == list(BOUNDS_S)


def test_a_failure_counts_for_each_model_that_was_asked() -> None:
    made = Outcomes(lambda name: name in "ab")
    made.failed(JOINT.join("ab"), "draining")
    made.failed("a", "draining")
    made.failed("a", "device_fault")
    assert counted(made, "a")["failed"] == {"draining": 2, "device_fault": 1}
    assert counted(made, "b")["failed"] == {"draining": 1}
    assert not any(counted(made, "b")["counts"])


def test_names_that_are_nobodys_are_not_kept() -> None:
    made = Outcomes(lambda name: False)
    for number in range(10):
        made.failed(f"guess-{number}", "unknown_model")
    assert made.to_plain()["models"].keys() == {""}  # type: ignore[attr-defined]
    assert counted(made, "")["failed"] == {"unknown_model": 10}


def test_no_more_models_are_told_apart_than_can_be_told(monkeypatch: Any) -> None:
    monkeypatch.setattr(outcomes, "_MOST", 2)
    made = Outcomes(lambda name: True)
    for name in "abcd":
        made.answered(name, 1.0)
    made.failed("a", "draining")
    assert {name: sum(counted(made, name)["counts"]) for name in ("a", "b", "")} == {"a": 1, "b": 1, "": 2}
    assert counted(made, "a")["failed"] == {"draining": 1}
