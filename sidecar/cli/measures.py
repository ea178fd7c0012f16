"""What `trunkline top` shows, from two scrapes of the sidecar's metrics: rates and times are what changed between them. Pure.

Metrics, and not the status: they cost the engine least, and leave alone what it has still to deploy.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

from prometheus_client.parser import text_string_to_metric_families
from trunkline.errors import MalformedFrame

from sidecar.rates import quantile

# The tiers of memory, from the nearest to the device.
_TIERS: Final = ("device", "host", "disk")
Labels = Mapping[str, str]


class Scrape:
    """One answer of ``GET /metrics``."""

    def __init__(self, text: str) -> None:
        """Read it. Raises MalformedFrame for what is no such text."""
        try:
            self._read(text)
        except ValueError as error:
            raise MalformedFrame("what /metrics answered cannot be read as metrics; is this a sidecar's endpoint?") from error

    def _read(self, text: str) -> None:
        self._samples: dict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                self._samples[sample.name].append((sample.labels, sample.value))

    def all(self, name: str) -> Sequence[tuple[Labels, float]]:
        """Return every value of a metric with its labels."""
        return self._samples.get(name, ())

    def total(self, name: str, **labels: str) -> float:
        """Return the sum of the values that have these labels; 0 where there are none."""
        return sum(value for found, value in self.all(name) if labels.items() <= found.items())

    def by(self, label: str, name: str) -> dict[str, float]:
        """Return the sums of a metric's values for each value of one label."""
        found: dict[str, float] = defaultdict(float)
        for labels, value in self.all(name):
            found[labels[label]] += value
        return found

    @property
    def answers(self) -> bool:
        """Whether the engine told anything."""
        return self.total("trunkline_up") == 1

    @property
    def generation(self) -> int:
        """Which engine of the sidecar told it."""
        return int(self.total("trunkline_engine_generation"))

    @property
    def uptime_s(self) -> float:
        """Seconds since that engine was started."""
        return self.total("trunkline_engine_uptime_seconds")


def frame(now: Scrape, before: Scrape | None = None) -> dict[str, Any]:
    """Return what ``top`` shows. Rates and times are those since ``before``; without one of the same engine, since its start."""
    if before is not None and not (before.answers and before.generation == now.generation and before.uptime_s < now.uptime_s):
        before = None
    interval_s = now.uptime_s - (before.uptime_s if before else 0.0)
    models = sorted(_models(now, before, interval_s), key=lambda model: (-model["rate"], model["name"]))
    logical_bytes = now.total("trunkline_memory_logical_bytes")
    return {
        "state": "draining" if now.total("trunkline_draining") else "serving",
        "generation": now.generation,
        "uptime_s": now.uptime_s,
        "interval_s": round(interval_s, 3),
        "devices": sorted(labels["device"] for labels, _ in now.all("trunkline_device_info")),
        "connections": int(now.total("trunkline_clients")),
        "rate": round(sum(model["rate"] for model in models), 3),
        "failed_rate": round(sum(model["failed_rate"] for model in models), 3),
        "waiting": int(now.total("trunkline_requests_waiting")),
        "running": int(now.total("trunkline_requests_running")),
        "logical_bytes": int(logical_bytes),
        "saved_bytes": int(now.total("trunkline_dedup_saved_bytes")),
        "memory": list(_memory(now)),
        "models": models,
        "tenants": _tenants(now, before, interval_s),
    }


def _memory(now: Scrape) -> Iterator[dict[str, Any]]:
    budgets = [labels for labels, _ in now.all("trunkline_memory_budget_bytes")]
    for labels in sorted(budgets, key=lambda labels: (labels["device"], _TIERS.index(labels["tier"]))):
        yield {
            **{key: labels[key] for key in ("device", "tier")},
            "budget_bytes": int(now.total("trunkline_memory_budget_bytes", **labels)),
            "resident_bytes": int(now.total("trunkline_memory_resident_bytes", **labels)),
            "pinned_bytes": int(now.total("trunkline_memory_pinned_bytes", **labels)),
        }


def _models(now: Scrape, before: Scrape | None, interval_s: float) -> Iterator[dict[str, Any]]:
    answered, failed = _since(_requests(now), _requests(before)), _since(_failures(now), _failures(before))
    spread = _since(_counts(now), _counts(before))
    device_s = _by_model(now, "trunkline_model_request_device_seconds", "device")
    # A model has one size, told by each device.
    model_bytes = {labels["model"]: value for labels, value in now.all("trunkline_model_bytes")}
    shared_bytes = {labels["model"]: value for labels, value in now.all("trunkline_model_shared_bytes")}
    resident = now.by("model", "trunkline_model_resident")
    pinned = now.by("model", "trunkline_model_pinned")
    leases = now.by("model", "trunkline_model_leases")
    waiting = now.by("model", "trunkline_model_requests_waiting")
    for name in model_bytes:
        done = answered.get(name, {})
        worked_s = sum(count * device_s.get(name, {}).get(device, 0.0) for device, count in done.items())
        # The last bound is infinite: what is beyond the others.
        reached = [int(count) for count in spread.get(name, {}).values()]
        bounds, counts = [float(bound) for bound in spread.get(name, {})][:-1], [b - a for a, b in pairwise([0, *reached])]
        yield {
            "name": name,
            # What requests keep, and is not whole, is on its way.
            "state": "resident" if resident[name] else "loading" if leases[name] else "stored",
            "pinned": bool(pinned[name]),
            "rate": _per_second(sum(done.values()), interval_s),
            "failed_rate": _per_second(sum(failed.get(name, {}).values()), interval_s),
            "p50_s": quantile(bounds, counts, 0.50),
            "p99_s": quantile(bounds, counts, 0.99),
            "waiting": int(waiting[name]),
            "device_share": _per_second(worked_s, interval_s),
            "bytes": int(model_bytes[name]),
            "shared_bytes": int(shared_bytes[name]),
        }


# For each model, sums by another label.
_ByModel = dict[str, dict[str, float]]


def _requests(scrape: Scrape | None) -> _ByModel:
    return _by_model(scrape, "trunkline_requests_total", "device", lambda labels: labels["outcome"] == "answered")


def _failures(scrape: Scrape | None) -> _ByModel:
    return _by_model(scrape, "trunkline_requests_total", "outcome", lambda labels: labels["outcome"] != "answered")


def _counts(scrape: Scrape | None) -> _ByModel:
    # How many requests took no longer than each bound, on all devices.
    return _by_model(scrape, "trunkline_request_duration_seconds_bucket", "le")


def _by_model(scrape: Scrape | None, name: str, label: str, counts: Callable[[Labels], bool] = lambda labels: True) -> _ByModel:
    found: _ByModel = defaultdict(lambda: defaultdict(float))
    for labels, value in scrape.all(name) if scrape else ():
        if counts(labels):
            found[labels["model"]][labels[label]] += value
    return found


def _since(now: _ByModel, before: _ByModel) -> _ByModel:
    return {
        model: {key: value - before.get(model, {}).get(key, 0.0) for key, value in values.items()}
        for model, values in now.items()
    }


def _tenants(now: Scrape, before: Scrape | None, interval_s: float) -> list[dict[str, Any]]:
    waiting, running = now.by("tenant", "trunkline_queue_waiting"), now.by("tenant", "trunkline_queue_running")
    device_s = now.by("tenant", "trunkline_tenant_device_seconds_total")
    device_s_before = before.by("tenant", "trunkline_tenant_device_seconds_total") if before else {}
    return [
        {
            "name": name,
            "waiting": int(waiting[name]),
            "running": int(running[name]),
            "device_share": _per_second(device_s[name] - device_s_before.get(name, 0.0), interval_s),
        }
        for name in sorted(device_s)
    ]


def _per_second(count: float, interval_s: float) -> float:
    return round(max(0.0, count) / interval_s, 3) if interval_s > 0 else 0.0
