"""What `trunkline top` makes of two scrapes."""

from __future__ import annotations

import pytest
from trunkline.errors import MalformedFrame

from sidecar.cli.measures import Scrape, frame


def told(uptime_s: float, *, generation: int = 1, answered: int = 0, slow: int = 0, failed: int = 0, device: str = "cpu") -> str:
    """Return metrics of an engine that has answered requests within 10 ms, and some slow ones within 1 s."""
    model = f'device="{device}",model="m"'
    return f"""
trunkline_up 1
trunkline_engine_generation {generation}
trunkline_engine_uptime_seconds {uptime_s}
trunkline_draining 0
trunkline_device_info{{device="{device}",policy="lru",torch="2"}} 1
trunkline_clients{{tenant="a"}} 2
trunkline_clients{{tenant=""}} 1
trunkline_requests_waiting{{device="{device}"}} 3
trunkline_requests_total{{{model},outcome="answered"}} {answered + slow}
trunkline_requests_total{{{model},outcome="queue_full"}} {failed}
trunkline_requests_total{{device="",model="",outcome="unknown_model"}} 100
trunkline_request_duration_seconds_bucket{{{model},le="0.01"}} {answered}
trunkline_request_duration_seconds_bucket{{{model},le="0.1"}} {answered}
trunkline_request_duration_seconds_bucket{{{model},le="1"}} {answered + slow}
trunkline_request_duration_seconds_bucket{{{model},le="+Inf"}} {answered + slow}
trunkline_model_request_device_seconds{{{model}}} 0.005
trunkline_model_requests_waiting{{{model}}} 3
trunkline_model_resident{{{model}}} 1
trunkline_model_pinned{{{model}}} 0
trunkline_model_leases{{{model}}} 1
trunkline_model_bytes{{{model}}} 1000
trunkline_model_shared_bytes{{{model}}} 400
trunkline_tenant_device_seconds_total{{device="{device}",tenant="a"}} {uptime_s / 4}
trunkline_queue_waiting{{device="{device}",tenant="a"}} 3
trunkline_queue_running{{device="{device}",tenant="a"}} 1
trunkline_memory_budget_bytes{{device="{device}",tier="disk"}} 8000
trunkline_memory_budget_bytes{{device="{device}",tier="device"}} 4000
trunkline_memory_resident_bytes{{device="{device}",tier="device"}} 1000
trunkline_memory_logical_bytes{{device="{device}"}} 1400
trunkline_dedup_saved_bytes{{device="{device}"}} 400
"""


def test_the_first_look_is_since_the_start() -> None:
    found = frame(Scrape(told(10, answered=100, slow=20, failed=5)))
    assert (found["state"], found["generation"], found["interval_s"]) == ("serving", 1, 10.0)
    assert (found["rate"], found["failed_rate"], found["waiting"], found["connections"]) == (12.0, 0.5, 3, 3)
    assert (found["logical_bytes"], found["saved_bytes"]) == (1400, 400)
    (model,) = found["models"]
    assert model["p50_s"] == pytest.approx(0.006)
    # The slowest twenty are spread over the bucket from 100 ms to 1 s.
    assert model["p99_s"] == pytest.approx(0.1 + 0.9 * (0.99 * 120 - 100) / 20)
    assert (model["device_share"], model["state"], model["bytes"], model["shared_bytes"]) == (0.06, "resident", 1000, 400)
    assert [(memory["tier"], memory["resident_bytes"], memory["budget_bytes"]) for memory in found["memory"]] == [
        ("device", 1000, 4000),
        ("disk", 0, 8000),
    ]
    assert found["tenants"] == [{"name": "a", "waiting": 3, "running": 1, "device_share": 0.25}]


def test_later_looks_are_of_what_changed() -> None:
    before = Scrape(told(10, answered=100, slow=20, failed=5))
    (model,) = frame(Scrape(told(12, answered=104, slow=20, failed=6)), before)["models"]
    assert (model["rate"], model["failed_rate"]) == (2.0, 0.5)
    assert model["p99_s"] == pytest.approx(0.0099)
    (idle,) = frame(Scrape(told(12, answered=100, slow=20)), before)["models"]
    assert (idle["rate"], idle["p50_s"], idle["p99_s"], idle["device_share"]) == (0.0, None, None, 0.0)


def test_another_engine_counts_afresh() -> None:
    before = Scrape(told(10, answered=100))
    found = frame(Scrape(told(4, generation=2, answered=8)), before)
    assert (found["interval_s"], found["rate"]) == (4.0, 2.0)
    # One that was started again with its sidecar has the same number.
    assert frame(Scrape(told(4, answered=8)), before)["rate"] == 2.0


def test_devices_are_added_up() -> None:
    both = Scrape(
        told(10, answered=100) + told(10, answered=50, device="cuda:0").replace("trunkline_engine_uptime_seconds 10", "")
    )
    found = frame(both)
    (model,) = found["models"]
    assert (found["devices"], model["rate"], model["waiting"], model["bytes"]) == (["cpu", "cuda:0"], 15.0, 6, 1000)
    assert [memory["device"] for memory in found["memory"]] == ["cpu", "cpu", "cuda:0", "cuda:0"]


@pytest.mark.parametrize(("resident", "leases", "state"), [(1, 0, "resident"), (0, 1, "loading"), (0, 0, "stored")])
def test_what_requests_keep_and_is_not_whole_is_loading(resident: int, leases: int, state: str) -> None:
    text = told(1).replace('resident{device="cpu",model="m"} 1', f'resident{{device="cpu",model="m"}} {resident}')
    text = text.replace('leases{device="cpu",model="m"} 1', f'leases{{device="cpu",model="m"}} {leases}')
    assert frame(Scrape(text))["models"][0]["state"] == state


@pytest.mark.parametrize(
    ("reached", "p50_s", "p99_s"),
    [
        ([0, 0, 0, 0], None, None),
        ([10, 10, 10, 10], 0.005, 0.0099),
        ([0, 10, 10, 10], 0.055, 0.0991),
        # Beyond the last bound nothing is known.
        ([0, 0, 0, 10], 1.0, 1.0),
    ],
)
def test_percentiles_lie_within_their_bucket(reached: list[int], p50_s: float | None, p99_s: float | None) -> None:
    kept = [line for line in told(10).splitlines() if "duration_seconds_bucket" not in line]
    kept += [
        f'trunkline_request_duration_seconds_bucket{{device="cpu",model="m",le="{bound}"}} {count}'
        for bound, count in zip(("0.01", "0.1", "1", "+Inf"), reached, strict=True)
    ]
    (model,) = frame(Scrape("\n".join([*kept, ""])))["models"]
    assert (model["p50_s"], model["p99_s"]) == (pytest.approx(p50_s), pytest.approx(p99_s))


def test_an_engine_that_is_away_told_nothing() -> None:
    away = Scrape("trunkline_up 0\n")
    assert not away.answers
    assert frame(Scrape(told(10, answered=100)), away)["rate"] == 10.0


def test_what_is_no_metrics_is_refused() -> None:
    with pytest.raises(MalformedFrame, match="cannot be read as metrics"):
        Scrape("<html>{</html>")
