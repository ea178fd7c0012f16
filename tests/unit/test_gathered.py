"""What several devices tell, as one document."""

from __future__ import annotations

from typing import Any

from sidecar import gathered


def described(state: str, **facts: Any) -> dict[str, Any]:
    return {"name": "m", "state": state, "pinned": False, "leases": 1, "requests": 2, "last_used_s": None, "bytes": 7} | facts


def test_numbers_are_added_and_all_else_is_the_first() -> None:
    one = {"a": 1, "b": {"c": 0.5, "name": "one"}, "yes": True, "total_bytes": 8}
    other = {"a": 2, "b": {"c": 0.25, "d": 4}, "yes": False, "total_bytes": 8}
    assert gathered.added([one, other]) == {"a": 3, "b": {"c": 0.75, "name": "one", "d": 4}, "yes": True, "total_bytes": 8}


def test_a_model_is_in_the_best_of_its_states() -> None:
    found = {"one": described("stored", last_used_s=5.0), "other": described("resident", last_used_s=3.0, pinned=True)}
    assert gathered.model(found) == described(
        "resident", last_used_s=3.0, pinned=True, leases=2, requests=4, resident_on=["other"]
    )
    assert gathered.model({"one": described("loading"), "other": described("stored")})["state"] == "loading"


def test_a_load_is_as_far_as_on_the_device_that_has_most() -> None:
    found = {"one": described("stored", resident_bytes=0), "other": described("loading", resident_bytes=5)}
    assert gathered.model(found)["resident_bytes"] == 5


def test_a_model_is_tried_when_all_devices_have_tried_it() -> None:
    for last in (False, True):
        assert gathered.model({"one": described("stored", tried=True), "other": described("stored", tried=last)})["tried"] is last


def test_a_model_that_cannot_be_served_is_described_as_it_is() -> None:
    broken = {"name": "m", "state": "corrupt", "error": {"message": "damaged"}}
    assert gathered.models({"one": [broken], "other": [broken]}) == [broken]


def test_of_models_in_domains_each_device_tells_the_same() -> None:
    plain = {"name": "m", "deployed": []}
    assert gathered.model({"one": plain, "other": plain}) == plain


def test_one_more_request_goes_where_it_waits_least() -> None:
    def told(wait_s: float, actual_s: float) -> dict[str, Any]:
        tenant = {"waiting": 1, "running": 2, "input_bytes": 3, "wait_s": wait_s, "device_s": 1.0}
        return {"forecast": {"predicted_p99_s": 1.0, "actual_p99_s": actual_s}, "tenants": {"anyone": tenant}}

    one, other = told(0.5, 2.0), told(0.25, 3.0)
    other["tenants"]["more"] = other["tenants"]["anyone"]
    found = gathered.queues({"one": one, "other": other})
    assert found["tenants"]["anyone"] == {"waiting": 2, "running": 4, "input_bytes": 6, "wait_s": 0.25, "device_s": 2.0}
    assert found["tenants"]["more"] == other["tenants"]["more"]
    assert found["forecast"]["actual_p99_s"] == 3.0


def test_what_is_counted_stays_each_devices_own() -> None:
    one, other = {"devices": {"one": {"stalled_s": 1.0}}}, {"devices": {"other": {"stalled_s": 2.0}}}
    told = {"devices": {"one": {"stalled_s": 1.0}, "other": {"stalled_s": 2.0}}}
    assert gathered.apart({"one": one, "other": other}) == told


def test_a_node_is_drained_when_each_device_is() -> None:
    def told(drained: bool, running: int) -> dict[str, Any]:
        return {"draining": True, "drained": drained, "waiting": 1, "running": running}

    one, other = told(True, 0), told(False, 2)
    assert gathered.intake({"one": one, "other": other}) == {"draining": True, "drained": False, "waiting": 2, "running": 2}
    assert gathered.intake({"one": one, "other": one | {"draining": False}})["draining"] is False
