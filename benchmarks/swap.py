"""What swapping costs: tasks that need several times the memory they get, against all of it in memory.

Every time is taken through the public interface, `trunkline serve` processes and clients in this process. Comparators are D, E
and F (`benchmarks.comparators.swappers`), each in the same budget and reading the same way. They take turns, task by task.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from trunkline.errors import BudgetExceeded

from benchmarks.comparators.swappers import KINDS
from benchmarks.harness import Sidecar
from benchmarks.report import Report, arguments, summary
from benchmarks.swap_bench import Swap
from benchmarks.swap_restart import cold_sibling, engine_restart

SWAPPING = ("ours", *KINDS[:-1])
# What each is compared with when it has everything in memory.
_RESIDENT = {"ours": "ours_resident"} | dict.fromkeys(KINDS[:-1], "resident")
# Little more than two of the largest blocks of a ResNet-50, which is the least it runs in.
_CROSSOVER_PART = 0.45
Samples = dict[str, dict[str, list[float]]]


def under(bench: Swap, divisor: float) -> None:
    """All tasks in turn, which is the worst order for an LRU, then some more often than others."""
    budget_bytes, figures = int(bench.resident_bytes / divisor), bench.report.figures
    label = f"budget_{divisor:g}"
    sidecar = bench.open(label, budget_bytes)
    bench.resize_comparators(budget_bytes)
    bench.measure_disk()
    seconds: Samples = {kind: {name: [] for name in bench.tasks} for kind in (*SWAPPING, *_RESIDENT.values())}
    read: Samples = {kind: {name: [] for name in bench.tasks} for kind in SWAPPING}
    for name in bench.tasks:
        # How long each stage takes to run is learned when it runs.
        _turn(bench, sidecar, name, {}, {})
    before = _streams(sidecar)
    for _ in range(bench.scale.rounds):
        for name in bench.tasks:
            _turn(bench, sidecar, name, seconds, read)
    after = _streams(sidecar)
    bench.measure_disk()
    resident_s = {name: statistics.median(times) for name, times in seconds["ours_resident"].items()}
    ratios = {kind: _over(seconds[kind], seconds[_RESIDENT[kind]]) for kind in SWAPPING}
    over_floor = {
        name: statistics.median(
            taken / max(size / bench.bytes_per_s, resident_s[name])
            for taken, size in zip(seconds["ours"][name], read["ours"][name], strict=True)
        )
        for name in bench.tasks
    }
    cycle_bytes = sum(statistics.fmean(sizes) for sizes in read["ours"].values())
    figures[f"swap_latency_ratio_{divisor:g}"] = statistics.geometric_mean(ratios["ours"].values())
    figures[f"swap_latency_ratio_worst_{divisor:g}"] = max(ratios["ours"].values())
    disk_s = {name: statistics.fmean(sizes) / bench.bytes_per_s for name, sizes in read["ours"].items()}
    covered = [ratio for name, ratio in ratios["ours"].items() if disk_s[name] <= resident_s[name]]
    if covered:
        figures[f"swap_covered_latency_ratio_{divisor:g}"] = statistics.geometric_mean(covered)
    else:
        bench.report.lack("the disk takes longer than every task's computing", f"swap_covered_latency_ratio_{divisor:g}")
    figures[f"swap_over_floor_{divisor:g}"] = statistics.geometric_mean(over_floor.values())
    figures[f"swap_over_floor_worst_{divisor:g}"] = max(over_floor.values())
    figures[f"swap_read_mb_{divisor:g}"] = cycle_bytes / len(bench.tasks) / 1e6
    # What is in memory at the end of a round need not be read in the next, and is no more than the budget.
    figures[f"swap_read_over_least_{divisor:g}"] = cycle_bytes / (bench.resident_bytes - budget_bytes)
    for kind in KINDS[:-1]:
        figures[f"{kind}_latency_ratio_{divisor:g}"] = statistics.geometric_mean(ratios[kind].values())
        taken = _over(seconds["ours"], seconds[kind])
        figures[f"swap_over_{kind}_{divisor:g}"] = statistics.geometric_mean(taken.values())
    zipf_s: list[float] = []
    asked = bench.zipf(bench.scale.zipf_requests)
    zipf_bytes = 0
    for name in asked:
        took_s, size_bytes = bench.timed(sidecar, name)
        zipf_s.append(took_s)
        zipf_bytes += size_bytes
    figures[f"swap_zipf_latency_ratio_{divisor:g}"] = sum(zipf_s) / sum(resident_s[name] for name in asked)
    figures[f"swap_zipf_read_mb_{divisor:g}"] = zipf_bytes / len(asked) / 1e6
    peak = bench.peak_bytes(sidecar, label)
    bench.report.raw[label] = {
        "budget_bytes": budget_bytes,
        "ms": _summaries(seconds),
        "zipf_ms": summary([1000 * each for each in zipf_s]),
        "latency_ratio": ratios,
        "over_floor": over_floor,
        "read_bytes": {
            kind: {name: sizes and statistics.fmean(sizes) for name, sizes in each.items()} for kind, each in read.items()
        },
        "disk_floor_ms": {name: 1000 * each for name, each in disk_s.items()},
        "streams": {"before": before, "after": after},
        "peak": peak,
        "refused": {kind: [name for name, times in each.items() if not times] for kind, each in seconds.items()},
        "counts": sidecar.admin.get("memory"),
    }
    _predicted(bench, before, after)
    _peak(bench, peak, budget_bytes)
    bench.end(sidecar)


def _turn(bench: Swap, sidecar: Sidecar, name: str, seconds: Mapping[str, Any], read: Mapping[str, Any]) -> None:
    """Ask for one task everywhere; keep the figures of those that are in ``seconds`` and ``read``."""
    for kind in ("ours", "ours_resident", *KINDS):
        if kind == "ours":
            found: tuple[float, int] | None = bench.timed(sidecar, name)
        elif kind == "ours_resident":
            found = bench.timed(bench.resident, name)
        else:
            found = bench.timed_comparator(kind, name)
        if found is not None and kind in seconds:
            seconds[kind][name].append(found[0])
        if found is not None and kind in read:
            read[kind][name].append(found[1])


def _over(one: Mapping[str, Sequence[float]], other: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return the ratio of medians for each task that both have served."""
    return {name: statistics.median(one[name]) / statistics.median(other[name]) for name in one if one[name] and other[name]}


def _summaries(seconds: Samples) -> dict[str, dict[str, dict[str, float]]]:
    return {
        kind: {name: summary([1000 * each for each in times]) for name, times in every.items() if times}
        for kind, every in seconds.items()
    }


def _streams(sidecar: Sidecar) -> dict[str, float]:
    found: dict[str, float] = sidecar.admin.get("status")["streams"]
    return found


def _predicted(bench: Swap, before: Mapping[str, float], after: Mapping[str, float]) -> None:
    """Add up what runs of models that stream were predicted to take, and took."""
    sums = bench.report.raw.setdefault("streams", {"runs": 0, "predicted_s": 0.0, "actual_s": 0.0})
    for key in sums:
        sums[key] += after[key] - before[key]
    if sums["runs"]:
        bench.report.figures["predicted_over_actual"] = sums["predicted_s"] / sums["actual_s"]


def _peak(bench: Swap, peak: Mapping[str, int], budget_bytes: int) -> None:
    most = max(size for key, size in peak.items() if key.endswith("_bytes")) / budget_bytes
    bench.report.figures["peak_over_budget"] = max(most, bench.report.figures.get("peak_over_budget", 0.0))


def crossover(bench: Swap) -> None:
    """One model in a part of its memory, with ever more to compute: where reading is hidden."""
    name = bench.scale.batched
    size_bytes = _bytes_in_memory(bench, name)
    budget_bytes = int(_CROSSOVER_PART * size_bytes)
    sidecar = bench.open("crossover", budget_bytes)
    rows = {}
    try:
        bench.timed(sidecar, name)
    except BudgetExceeded as error:
        bench.report.lack(error.message, *(f"crossover_latency_ratio_b{batch}" for batch in bench.scale.batches))
        bench.end(sidecar)
        return
    for batch in bench.scale.batches:
        # Times of stages depend on the batch; a few runs until the predictions have followed.
        for _ in range(3):
            bench.timed(sidecar, name, batch)
        before = _streams(sidecar)
        ours, resident = [], []
        for _ in range(bench.scale.rounds):
            ours.append(bench.timed(sidecar, name, batch))
            resident.append(bench.timed(bench.resident, name, batch)[0])
        after = _streams(sidecar)
        compute_s, taken_s = statistics.median(resident), statistics.median(each for each, _ in ours)
        read_bytes = statistics.fmean(size for _, size in ours)
        transfer_s = (size_bytes - budget_bytes) / bench.bytes_per_s
        rows[f"b{batch}"] = {
            "compute_ms": 1000 * compute_s,
            "transfer_ms": 1000 * transfer_s,
            "read_bytes": read_bytes,
            "compute_over_transfer": compute_s / transfer_s,
            "latency_ratio": taken_s / compute_s,
            "over_floor": taken_s / max(compute_s, transfer_s),
            "predicted_over_actual": (after["predicted_s"] - before["predicted_s"]) / (after["actual_s"] - before["actual_s"]),
        }
        bench.report.figures[f"crossover_latency_ratio_b{batch}"] = taken_s / compute_s
        bench.report.figures[f"crossover_compute_over_transfer_b{batch}"] = compute_s / transfer_s
        _predicted(bench, before, after)
    bench.report.raw["crossover"] = {"model_bytes": size_bytes, "budget_bytes": budget_bytes, "rows": rows}
    bench.end(sidecar)


def _bytes_in_memory(bench: Swap, name: str) -> int:
    """Return what a model takes in the sidecar's memory, in the form it is served in."""
    admin = bench.resident.admin
    freed: int = admin.post(f"models/{name}/evict")["freed_bytes"]
    admin.post(f"models/{name}/load")
    return freed


def measure(bench: Swap) -> None:
    bench.prepare()
    bench.report.raw["threads"] = bench.threads
    bench.report.raw["resident_bytes"] = bench.resident_bytes
    bench.report.raw["source"] = bench.source
    for divisor in bench.scale.divisors:
        under(bench, divisor)
    crossover(bench)
    cold_sibling(bench)
    engine_restart(bench)
    bench.report.raw["bytes_per_s"] = bench.bytes_per_s
    bench.report.figures["disk_mb_per_s"] = bench.bytes_per_s / 1e6


def main() -> None:
    chosen = arguments(__doc__ or "")
    report = Report("swap", chosen.quick, chosen.device)
    with Swap(report, chosen.seed) as bench:
        measure(bench)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
