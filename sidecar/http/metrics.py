"""Metrics: what the engine counts, in the text format of Prometheus.

Counts nothing itself: for each scrape it asks the engine for one snapshot, the server for its connections and, where there are
several devices, placement; whatever serves HTTP may die without a count being lost. Labels are names that operators gave (models,
tenants, devices) and words of ours; nothing that a function makes up becomes one. Nothing is told of single blocks or weights, so
a scrape is as long as there are models and tenants.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata
from itertools import accumulate
from typing import Any, Final, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString
from trunkline.errors import TrunklineError

log = logging.getLogger("trunkline.admin")

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# Runs a command in the engine; raises TrunklineError.
Command = Callable[[str], Any]
# Returns what a process counts of spans (``sidecar.tracing``).
SpanCounts = Callable[[], Mapping[str, Any]]
# Returns what has come of the models that are pulled ahead (``sidecar.prepull.told_of``).
Listed = Callable[[], Mapping[str, Any]]


class Kind(NamedTuple):
    """What a metric is: counter, gauge or histogram, its labels, and what it tells."""

    type: str
    labels: tuple[str, ...]
    help: str


def _counter(help_text: str, *labels: str) -> Kind:
    return Kind("counter", labels, help_text)


def _gauge(help_text: str, *labels: str) -> Kind:
    return Kind("gauge", labels, help_text)


# All there are, as they are told one after the other. docs/metrics.md has the same table.
METRICS: Final[Mapping[str, Kind]] = {
    # The sidecar.
    "trunkline_up": _gauge("1 while the engine answers; with 0, nothing else is told but the build"),
    "trunkline_build_info": _gauge("1; which release of the sidecar this is, on which Python", "version", "python"),
    "trunkline_engine_generation": _gauge("Which engine of this sidecar it is: 1, and 1 more for each that was started again"),
    "trunkline_watchdog_kills_total": _counter(
        "Engines of this sidecar that were killed because a stage took longer than it may; not counted anew by the next engine"
    ),
    "trunkline_quarantines_total": _counter(
        "Times that a tenant's requests for a model were refused from then on, because engines ended with them; counted likewise"
    ),
    "trunkline_engine_uptime_seconds": _gauge("Seconds since this engine was started; all counters count since then"),
    "trunkline_draining": _gauge("1 once the sidecar is shutting down and takes no requests"),
    "trunkline_device_info": _gauge("1; what chooses evictions on a device, and the torch it runs", "device", "policy", "torch"),
    "trunkline_device_threads": _gauge("Threads of an operator on a device", "device"),
    # Models that are pulled ahead; absent without a list of them.
    "trunkline_listed_models": _gauge(
        "Models of pull_list: present, waiting to be pulled, or failed, which are tried again", "state"
    ),
    "trunkline_listed_fetched_bytes_total": _counter(
        "Bytes of weights that came for models of pull_list since the endpoint began"
    ),
    # Connections.
    "trunkline_clients": _gauge("Open connections; the empty tenant is the administrator, and who still shakes hands", "tenant"),
    "trunkline_connection_limit": _gauge("Connections that may be open, of all tenants together"),
    "trunkline_connections_refused_total": _counter("Connections that were not let in, by the code of the error", "reason"),
    "trunkline_arena_bytes": _gauge("Shared memory of connections and its private copies; tenants as in clients", "tenant"),
    "trunkline_arena_limit_bytes": _gauge("What the arenas of all connections may take together"),
    "trunkline_transport_info": _gauge(
        "1; how arenas are kept from being shrunk under the sidecar: sealed, or copy where the kernel does not seal", "transport"
    ),
    # Traces; absent where there are none.
    "trunkline_spans_exported_total": _counter(
        "Spans that a collector took, by the process they are from; of http, by one worker", "process"
    ),
    "trunkline_spans_dropped_total": _counter(
        "Spans that were lost: queue_full, more than may wait to be exported; export_failed, no collector took them",
        "process",
        "reason",
    ),
    # Requests.
    "trunkline_requests_asked_total": _counter(
        "Requests that came to a device, by how: sealed or copy, in shared memory; http. One that asks several models "
        "counts for each",
        "transport",
    ),
    "trunkline_requests_total": _counter(
        "Requests by what became of them: answered, or the code of the error. One that asks several models counts for each. "
        "Without a device: refused before there was one",
        "device",
        "model",
        "outcome",
    ),
    "trunkline_request_duration_seconds": Kind(
        "histogram", ("device", "model"), "Seconds from when a request was queued until it was answered, of those that were"
    ),
    "trunkline_requests_waiting": _gauge("Requests that wait to be taken up", "device"),
    "trunkline_requests_running": _gauge("Requests under way from stage to stage, once for each model they ask", "device"),
    "trunkline_model_requests_waiting": _gauge("Requests for a model that wait to be taken up", "device", "model"),
    "trunkline_model_request_device_seconds": _gauge(
        "Device seconds that a request for a model took of late; absent when it was not asked for ten minutes", "device", "model"
    ),
    "trunkline_queue_waiting": _gauge("Requests of a tenant that wait", "device", "tenant"),
    "trunkline_queue_running": _gauge("Requests of a tenant that were taken up", "device", "tenant"),
    "trunkline_queue_input_bytes": _gauge("Bytes of the inputs of a tenant's requests that wait or run", "device", "tenant"),
    "trunkline_queue_wait_seconds": _gauge(
        "Predicted seconds until the device would begin with one more request of a tenant", "device", "tenant"
    ),
    "trunkline_tenant_device_seconds_total": _counter("Seconds that the device has worked for a tenant", "device", "tenant"),
    "trunkline_forecast_predicted_p99_seconds": _gauge(
        "99th percentile of what the latest requests were predicted to take", "device"
    ),
    "trunkline_forecast_actual_p99_seconds": _gauge("99th percentile of what they took", "device"),
    # Computing.
    "trunkline_stages_total": _counter("Runs of stages", "device"),
    "trunkline_stage_rows_total": _counter("Rows that stages were run on; equal inputs are one row", "device"),
    "trunkline_stage_requests_total": _counter(
        "Requests that stages were run for: what nobody shares has one in each run", "device"
    ),
    "trunkline_stages_stacked_total": _counter("Stages that were run within another's run, their weights stacked", "device"),
    "trunkline_stages_joined_total": _counter(
        "Stages that were run within another's run, for a request that was alone", "device"
    ),
    "trunkline_programs": _gauge("Programs that are prepared; stages that differ in nothing but weights have one", "device"),
    "trunkline_lanes": _gauge("Stages that may run at the same time", "device"),
    "trunkline_lanes_running": _gauge("Stages that run in lanes now", "device"),
    "trunkline_lanes_measured_rate": _gauge("Work in a second as last measured, by the number of lanes", "device", "lanes"),
    "trunkline_stalled_seconds_total": _counter(
        "Seconds in which requests waited for weights, or for room, and nothing could be run", "device"
    ),
    "trunkline_stage_splits_total": _counter("Stages that were run in halves, for want of room to compute", "device"),
    "trunkline_reliefs_total": _counter("Times that weights had to leave so that there was room to compute", "device"),
    "trunkline_shortage_refused_total": _counter("Requests refused for want of room to compute", "device"),
    # Memory.
    "trunkline_memory_budget_bytes": _gauge("Bytes that weights may take in a tier: device, host, or disk", "device", "tier"),
    "trunkline_memory_resident_bytes": _gauge("Bytes of weights in a tier, or on their way there", "device", "tier"),
    "trunkline_memory_pinned_bytes": _gauge("Bytes of weights in a tier that pins protect", "device", "tier"),
    "trunkline_memory_weight_bytes": _gauge("Bytes that weights take on the device, whole pages included", "device"),
    "trunkline_memory_spare_bytes": _gauge("Pages of a tier that are kept for the next weights", "device", "tier"),
    "trunkline_memory_logical_bytes": _gauge("Bytes the resident models would take if they shared nothing", "device"),
    "trunkline_dedup_saved_bytes": _gauge("Of those, the bytes that sharing saves", "device"),
    "trunkline_device_memory_size_bytes": _gauge("Memory of the device in all", "device"),
    "trunkline_device_memory_free_bytes": _gauge("Memory of a GPU that nobody has", "device"),
    "trunkline_device_memory_allocated_bytes": _gauge("Memory that is allocated on the device, weights included", "device"),
    "trunkline_device_memory_reserved_bytes": _gauge("Memory of a GPU that torch holds", "device"),
    "trunkline_device_memory_span_bytes": _gauge("Memory of a GPU that is set aside for weights", "device"),
    "trunkline_fetched_bytes_total": _counter("Bytes of weights that were brought in", "device"),
    "trunkline_fetched_from_bytes_total": _counter(
        "Of those, where they came from: device (found there still), host, disk (block files), store", "device", "tier"
    ),
    "trunkline_block_files_left_out_bytes_total": _counter("Bytes that had no room in block files", "device"),
    "trunkline_compactions_total": _counter("Times that weights were moved together", "device"),
    "trunkline_compacted_bytes_total": _counter("Bytes that were moved for that", "device"),
    "trunkline_weight_hits_total": _counter("Weights that requests found in memory", "device"),
    "trunkline_weight_hit_bytes_total": _counter("Bytes of those", "device"),
    "trunkline_weight_misses_total": _counter("Weights that requests had to have fetched", "device"),
    "trunkline_weight_missed_bytes_total": _counter("Bytes of those", "device"),
    "trunkline_evictions_total": _counter("Weights that left memory, by why", "device", "reason"),
    "trunkline_evicted_bytes_total": _counter("Bytes of those", "device", "reason"),
    "trunkline_lru_age_seconds": _gauge(
        "How long ago the weight that last left for room had been used; absent while none had to", "device"
    ),
    "trunkline_stream_runs_total": _counter("Runs of models that do not fit into memory", "device"),
    "trunkline_stream_predicted_seconds_total": _counter("Seconds that those were predicted to take", "device"),
    "trunkline_stream_seconds_total": _counter("Seconds that those took", "device"),
    "trunkline_stream_starved_total": _counter("Times that one of those had to wait for room", "device"),
    # Models.
    "trunkline_models": _gauge(
        "Models that are resident, loading, stored, corrupt, or awaited (yet to be deployed)", "device", "state"
    ),
    "trunkline_model_resident": _gauge("1 while all weights of a model are in memory", "device", "model"),
    "trunkline_model_bytes": _gauge("Bytes of a model's weights", "device", "model"),
    "trunkline_model_shared_bytes": _gauge("Of those, bytes of weights that other models have, too", "device", "model"),
    "trunkline_model_leases": _gauge("Leases on a model: requests that keep it in memory", "device", "model"),
    "trunkline_model_pinned": _gauge("1 for a model that an operator has pinned", "device", "model"),
    "trunkline_model_priority": _gauge("How dear a model is, 0 to 9", "device", "model"),
    "trunkline_model_keep_alive_seconds": _gauge(
        "Seconds a model is kept without a request; absent: for ever", "device", "model"
    ),
    "trunkline_model_idle_seconds": _gauge("Seconds since a model was asked; absent when it was not yet", "device", "model"),
    # Several devices.
    "trunkline_placement_load": _gauge("The part of a device's time that is asked for", "device"),
    "trunkline_placement_under_way": _gauge("Requests that were sent to a device and are not over", "device"),
    "trunkline_models_moving": _gauge("Models on their way to other devices"),
    "trunkline_model_placed": _gauge("1 where a model is asked", "device", "model"),
    "trunkline_model_request_rate": _gauge("Requests per second for a model, of late, on all devices", "model"),
    "trunkline_model_under_way": _gauge("Requests for a model that are under way, of late, on all devices", "model"),
    "trunkline_model_predicted_seconds": _gauge("Device seconds that placement reckons a request takes", "device", "model"),
}

# What a snapshot of a device has, by group and field. Not every kind of memory has every field.
_FIELDS: Final = {
    ("requests", "waiting"): "trunkline_requests_waiting",
    ("requests", "running"): "trunkline_requests_running",
    ("requests", "fetched_bytes"): "trunkline_fetched_bytes_total",
    ("queues", "forecast", "predicted_p99_s"): "trunkline_forecast_predicted_p99_seconds",
    ("queues", "forecast", "actual_p99_s"): "trunkline_forecast_actual_p99_seconds",
    ("sharing", "stages"): "trunkline_stages_total",
    ("sharing", "stage_rows"): "trunkline_stage_rows_total",
    ("sharing", "stage_requests"): "trunkline_stage_requests_total",
    ("sharing", "stacked"): "trunkline_stages_stacked_total",
    ("sharing", "joined"): "trunkline_stages_joined_total",
    ("sharing", "programs"): "trunkline_programs",
    ("lanes", "count"): "trunkline_lanes",
    ("lanes", "running"): "trunkline_lanes_running",
    ("stalled_s",): "trunkline_stalled_seconds_total",
    ("shortage", "splits"): "trunkline_stage_splits_total",
    ("shortage", "reliefs"): "trunkline_reliefs_total",
    ("shortage", "refused"): "trunkline_shortage_refused_total",
    ("streams", "runs"): "trunkline_stream_runs_total",
    ("streams", "predicted_s"): "trunkline_stream_predicted_seconds_total",
    ("streams", "actual_s"): "trunkline_stream_seconds_total",
    ("streams", "starved"): "trunkline_stream_starved_total",
    ("engine", "threads"): "trunkline_device_threads",
    ("memory", "weight_bytes"): "trunkline_memory_weight_bytes",
    ("memory", "logical_bytes"): "trunkline_memory_logical_bytes",
    ("memory", "saved_bytes"): "trunkline_dedup_saved_bytes",
    ("memory", "total_bytes"): "trunkline_device_memory_size_bytes",
    ("memory", "free_bytes"): "trunkline_device_memory_free_bytes",
    ("memory", "allocated_bytes"): "trunkline_device_memory_allocated_bytes",
    ("memory", "reserved_bytes"): "trunkline_device_memory_reserved_bytes",
    ("memory", "span_bytes"): "trunkline_device_memory_span_bytes",
    ("memory", "block_files_left_out_bytes"): "trunkline_block_files_left_out_bytes_total",
    ("memory", "compactions"): "trunkline_compactions_total",
    ("memory", "compacted_bytes"): "trunkline_compacted_bytes_total",
    ("memory", "residency", "hits"): "trunkline_weight_hits_total",
    ("memory", "residency", "hit_bytes"): "trunkline_weight_hit_bytes_total",
    ("memory", "residency", "misses"): "trunkline_weight_misses_total",
    ("memory", "residency", "missed_bytes"): "trunkline_weight_missed_bytes_total",
    ("memory", "residency", "lru_age_s"): "trunkline_lru_age_seconds",
}
# Of memory, what is of one of several tiers.
_TIERS: Final = {
    "budget_bytes": ("trunkline_memory_budget_bytes", "device"),
    "host_budget_bytes": ("trunkline_memory_budget_bytes", "host"),
    "block_files_limit_bytes": ("trunkline_memory_budget_bytes", "disk"),
    "resident_bytes": ("trunkline_memory_resident_bytes", "device"),
    "host_weight_bytes": ("trunkline_memory_resident_bytes", "host"),
    "block_files_taken_bytes": ("trunkline_memory_resident_bytes", "disk"),
    "pinned_bytes": ("trunkline_memory_pinned_bytes", "device"),
    "spare_bytes": ("trunkline_memory_spare_bytes", "device"),
    "host_spare_bytes": ("trunkline_memory_spare_bytes", "host"),
    "kept_bytes": ("trunkline_fetched_from_bytes_total", "device"),
    "host_kept_bytes": ("trunkline_fetched_from_bytes_total", "host"),
    "block_file_bytes": ("trunkline_fetched_from_bytes_total", "disk"),
    "store_bytes": ("trunkline_fetched_from_bytes_total", "store"),
}
_QUEUES: Final = {
    "waiting": "trunkline_queue_waiting",
    "running": "trunkline_queue_running",
    "input_bytes": "trunkline_queue_input_bytes",
    "wait_s": "trunkline_queue_wait_seconds",
    "device_s": "trunkline_tenant_device_seconds_total",
}
_MODELS: Final = {
    "bytes": "trunkline_model_bytes",
    "shared_bytes": "trunkline_model_shared_bytes",
    "leases": "trunkline_model_leases",
    "pinned": "trunkline_model_pinned",
    "priority": "trunkline_model_priority",
    "keep_alive_s": "trunkline_model_keep_alive_seconds",
    "last_used_s": "trunkline_model_idle_seconds",
}
_FAMILIES: Final[Mapping[str, Any]] = {
    "counter": CounterMetricFamily,
    "gauge": GaugeMetricFamily,
    "histogram": HistogramMetricFamily,
}
_STATES: Final = ("resident", "loading", "stored")


class _Sheet:
    """Values by metric. What is not known (None) is not told."""

    def __init__(self) -> None:
        self._families: dict[str, Any] = {}

    def put(self, name: str, value: float | None, *labels: str) -> None:
        if value is not None:
            self._family(name).add_metric(labels, value)

    def put_histogram(self, name: str, bounds: Iterable[float], counts: Iterable[int], total: float, *labels: str) -> None:
        """Tell counts between bounds; the last is of what is beyond all."""
        buckets = list(zip([*map(floatToGoString, bounds), "+Inf"], accumulate(counts), strict=True))
        self._family(name).add_metric(labels, buckets, total)

    def _family(self, name: str) -> Any:
        found = self._families.get(name)
        if found is None:
            kind = METRICS[name]
            found = self._families[name] = _FAMILIES[kind.type](name, kind.help, labels=kind.labels)
        return found

    def families(self) -> Iterator[Metric]:
        """Yield what there is, in the order of the table."""
        return (self._families[name] for name in METRICS if name in self._families)


class EngineMetrics(Collector):
    """What a scrape is told."""

    def __init__(self, command: Command, spans: SpanCounts | None = None, listed: Listed | None = None) -> None:
        self._command = command
        self._spans = spans
        self._listed = listed

    def collect(self) -> Iterable[Metric]:
        sheet = _Sheet()
        sheet.put("trunkline_build_info", 1, _version(), platform.python_version())
        if self._spans is not None:
            _put_spans(sheet, "http", self._spans())
        try:
            devices, connections, placement = self._snapshot()
        except TrunklineError as error:
            # Whatever the reason, whoever scrapes is told that there is nothing to tell; the log has the rest.
            log.warning("no metrics: %s: %s", error.code, error.message)
            sheet.put("trunkline_up", 0)
            return sheet.families()
        sheet.put("trunkline_up", 1)
        _put_engine(sheet, next(iter(devices.values()))["engine"])
        _put_connections(sheet, connections)
        if self._listed is not None:
            _put_listed(sheet, self._listed())
        if connections.get("spans") is not None:
            _put_spans(sheet, "engine", connections["spans"])
        for device, found in devices.items():
            _put_device(sheet, device, found)
        if placement is not None:
            _put_placement(sheet, placement, next(iter(devices.values()))["models"])
        return sheet.families()

    def _snapshot(self) -> tuple[Mapping[str, Any], Mapping[str, Any], Mapping[str, Any] | None]:
        """Return what each device counts, what there is of connections, and where models are, if there is a choice."""
        devices = self._command("metrics")["devices"]
        return devices, self._command("connections"), self._command("placement") if len(devices) > 1 else None


def exposition(command: Command, spans: SpanCounts | None = None, listed: Listed | None = None) -> Callable[[], bytes]:
    """Return what gives the text of a scrape; ``spans`` counts those of this process, ``listed`` tells of models pulled ahead."""
    registry = CollectorRegistry()
    registry.register(EngineMetrics(command, spans, listed))
    return lambda: generate_latest(registry)


def _version() -> str:
    try:
        return metadata.version("trunkline")
    except metadata.PackageNotFoundError:
        # Run from its sources.
        return "unknown"


def _put_engine(sheet: _Sheet, engine: Mapping[str, Any]) -> None:
    sheet.put("trunkline_engine_generation", engine["generation"])
    sheet.put("trunkline_watchdog_kills_total", engine.get("watchdog_kills"))
    sheet.put("trunkline_quarantines_total", engine.get("quarantines"))
    sheet.put("trunkline_engine_uptime_seconds", engine["uptime_s"])
    sheet.put("trunkline_draining", engine["draining"])


def _put_connections(sheet: _Sheet, found: Mapping[str, Any]) -> None:
    for name, key in (("trunkline_clients", "connections"), ("trunkline_arena_bytes", "arena_bytes")):
        by_tenant = {tenant: each[key] for tenant, each in found["tenants"].items()}
        for tenant, value in {**by_tenant, "": found[key] - sum(by_tenant.values())}.items():
            sheet.put(name, value, tenant)
    sheet.put("trunkline_connection_limit", found["connection_limit"])
    sheet.put("trunkline_arena_limit_bytes", found["arena_limit_bytes"])
    sheet.put("trunkline_transport_info", 1, found["transport"])
    for reason, count in found["turned_away"].items():
        sheet.put("trunkline_connections_refused_total", count, reason)
    for transport, asked in found["asked"].items():
        sheet.put("trunkline_requests_asked_total", sum(asked.values()), transport)
    for reason, count in found["refused"].items():
        sheet.put("trunkline_requests_total", count, "", "", reason)


def _put_listed(sheet: _Sheet, found: Mapping[str, Any]) -> None:
    for state, count in found.get("models", {}).items():
        sheet.put("trunkline_listed_models", count, state)
    sheet.put("trunkline_listed_fetched_bytes_total", found.get("fetched_bytes"))


def _put_spans(sheet: _Sheet, process: str, found: Mapping[str, Any]) -> None:
    sheet.put("trunkline_spans_exported_total", found["exported"], process)
    for reason, count in found["dropped"].items():
        sheet.put("trunkline_spans_dropped_total", count, process, reason)


def _put_device(sheet: _Sheet, device: str, found: Mapping[str, Any]) -> None:
    memory = found["memory"]
    residency = memory["residency"]
    sheet.put("trunkline_device_info", 1, device, residency["policy"], str(found["engine"].get("torch", "")))
    for path, name in _FIELDS.items():
        sheet.put(name, _at(found, path), device)
    for key, (name, tier) in _TIERS.items():
        sheet.put(name, memory.get(key), device, tier)
    for key in ("evictions", "evicted_bytes"):
        for reason, value in residency[key].items():
            sheet.put(f"trunkline_{key}_total", value, device, reason)
    for lanes, rate in found["lanes"]["measured_rates"].items():
        sheet.put("trunkline_lanes_measured_rate", rate, device, str(lanes))
    for tenant, load in found["queues"]["tenants"].items():
        for key, name in _QUEUES.items():
            sheet.put(name, load[key], device, tenant)
    _put_models(sheet, device, found)
    _put_outcomes(sheet, device, found["outcomes"])


def _at(found: Any, path: tuple[str, ...]) -> float | None:
    for key in path:
        found = found.get(key)
        if found is None:
            return None
    return float(found)


def _put_models(sheet: _Sheet, device: str, found: Mapping[str, Any]) -> None:
    models = found["models"]
    states = [each["state"] for each in models.values()]
    for state in _STATES:
        sheet.put("trunkline_models", states.count(state), device, state)
    sheet.put("trunkline_models", len(found["corrupt"]), device, "corrupt")
    sheet.put("trunkline_models", found["awaited_count"], device, "awaited")
    for model, each in models.items():
        sheet.put("trunkline_model_requests_waiting", found["waiting"].get(model, 0), device, model)
        sheet.put("trunkline_model_request_device_seconds", found["device_s"].get(model), device, model)
        sheet.put("trunkline_model_resident", each["state"] == "resident", device, model)
        for key, name in _MODELS.items():
            sheet.put(name, each[key], device, model)


def _put_outcomes(sheet: _Sheet, device: str, outcomes: Mapping[str, Any]) -> None:
    for model, each in outcomes["models"].items():
        sheet.put("trunkline_requests_total", sum(each["counts"]), device, model, "answered")
        for reason, count in each["failed"].items():
            sheet.put("trunkline_requests_total", count, device, model, reason)
        sheet.put_histogram(
            "trunkline_request_duration_seconds", outcomes["bounds_s"], each["counts"], each["seconds"], device, model
        )


def _put_placement(sheet: _Sheet, placement: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for device, each in placement["devices"].items():
        sheet.put("trunkline_placement_load", each["load"], device)
        sheet.put("trunkline_placement_under_way", each["under_way"], device)
    # What functions ask together is placed together, under a name that they make up.
    models = [each for each in placement["models"] if each["name"] in known]
    sheet.put("trunkline_models_moving", sum(1 for each in models if each["moving_to"]))
    for each in models:
        for device in each["devices"]:
            sheet.put("trunkline_model_placed", 1, device, each["name"])
        sheet.put("trunkline_model_request_rate", each.get("rate"), each["name"])
        sheet.put("trunkline_model_under_way", each.get("under_way"), each["name"])
        for device, seconds in each.get("seconds", {}).items():
            sheet.put("trunkline_model_predicted_seconds", seconds, device, each["name"])
