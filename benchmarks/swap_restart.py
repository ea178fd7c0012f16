"""Rows of `benchmarks.swap` about first answers: a model that is new beside its sibling, and an engine that is new."""

from __future__ import annotations

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Sidecar
from benchmarks.swap_bench import STORE, Swap, read_bytes
from benchmarks.swap_tasks import SIBLING
from sidecar.disk import drop

# Longer than the supervisor takes for a life worth restarting at once.
_HEALTHY_S = 1.5


def cold_sibling(bench: Swap) -> None:
    """The first answer of a model whose trunk is in memory with another, against that of a model of which nothing is."""
    sidecar, admin = bench.resident, bench.resident.admin
    stored = admin.get("models/sibling")
    taken: dict[str, list[tuple[float, int]]] = {"sibling": [], SIBLING: []}
    for _ in range(bench.scale.rounds):
        admin.post(f"models/{SIBLING}/load")
        admin.post("models/sibling/evict")
        taken["sibling"].append(bench.timed(sidecar, "sibling"))
        for name in taken:
            admin.post(f"models/{name}/evict")
        taken[SIBLING].append(bench.timed(sidecar, SIBLING))
    admin.post("models/sibling/evict")
    warm = [bench.timed(sidecar, SIBLING)[0] for _ in range(bench.scale.rounds)]
    sibling_s, whole_s = (statistics.median(seconds for seconds, _ in taken[name]) for name in ("sibling", SIBLING))
    moved_bytes = max(size for _, size in taken["sibling"])
    figures = bench.report.figures
    figures["cold_sibling_bytes_ratio"] = moved_bytes / stored["unique_bytes"]
    figures["cold_sibling_private_part"] = stored["unique_bytes"] / stored["bytes"]
    figures["cold_sibling_over_whole"] = sibling_s / whole_s
    figures["cold_sibling_ms"] = 1000 * sibling_s
    bench.report.raw["cold_sibling"] = {
        "model": stored,
        "moved_bytes": moved_bytes,
        "whole_moved_bytes": max(size for _, size in taken[SIBLING]),
        "seconds": {"sibling": sibling_s, "whole": whole_s, "warm": statistics.median(warm)},
    }


def engine_restart(bench: Swap) -> None:
    """All tasks in memory; the first answer after the engine was killed, after a start with nothing in memory, and of torch."""
    budget_bytes = 2 * bench.resident_bytes
    warm: dict[str, list[float]] = {"first": [], "all": [], "read_mb": [], "kept_mb": []}
    sidecar = bench.open("restart", budget_bytes)
    _ask_all(bench, sidecar)
    for _ in range(bench.scale.restarts):
        time.sleep(_HEALTHY_S)
        first_s, all_s = _answers(bench, sidecar, lambda: _kill_engine(sidecar))
        memory = sidecar.admin.get("memory")
        for key, value in (
            ("first", first_s),
            ("all", all_s),
            ("read_mb", read_bytes(sidecar) / 1e6),
            ("kept_mb", memory["kept_bytes"] / 1e6),
        ):
            warm[key].append(value)
    cold: dict[str, list[float]] = {"first": [], "all": []}
    for _ in range(bench.scale.restarts):
        bench.end(sidecar)
        started_s = time.perf_counter()
        sidecar = bench.start_sidecar("restart", bench.threads, store=STORE, TRUNKLINE_MEMORY_BUDGET_BYTES=str(budget_bytes))
        first_s, all_s = _answers(bench, sidecar, lambda: None, started_s)
        cold["first"].append(first_s)
        cold["all"].append(all_s)
    bench.end(sidecar)
    torch_s = [_torch(bench) for _ in range(bench.scale.restarts)]
    figures = bench.report.figures
    figures["restart_warm_s"] = statistics.median(warm["first"])
    figures["restart_warm_all_s"] = statistics.median(warm["all"])
    figures["restart_warm_read_mb"] = max(warm["read_mb"])
    figures["restart_cold_s"] = statistics.median(cold["first"])
    figures["restart_cold_all_s"] = statistics.median(cold["all"])
    figures["restart_torch_s"] = statistics.median(torch_s)
    bench.report.raw["restart"] = {"warm": warm, "cold": cold, "torch_s": torch_s, "resident_bytes": bench.resident_bytes}


def _ask_all(bench: Swap, sidecar: Sidecar) -> None:
    for name in bench.tasks:
        bench.check(name, sidecar.model(name)(bench.inputs[name]))


def _kill_engine(sidecar: Sidecar) -> None:
    os.kill(int(sidecar.admin.get("status")["engine"]["pid"]), signal.SIGKILL)


def _answers(bench: Swap, sidecar: Sidecar, begin: Callable[[], None], started_s: float | None = None) -> tuple[float, float]:
    """Return the seconds from ``begin``, or ``started_s``, to the first answer of one model, and to one of each."""
    begin()
    started_s = time.perf_counter() if started_s is None else started_s
    found: list[Any] = []
    name = bench.scale.batched

    def ask() -> bool:
        found.append(sidecar.model(name)(bench.inputs[name]))
        return True

    bench.until(ask)
    first_s = time.perf_counter() - started_s
    bench.check(name, found[0])
    _ask_all(bench, sidecar)
    return first_s, time.perf_counter() - started_s


def _torch(bench: Swap) -> float:
    """Return the seconds from the start of a process of torch to the first answer of the model that it loads."""
    name = bench.scale.batched
    weights = bench.weights / f"{name}.pt"
    with weights.open("rb") as file:
        drop(file.fileno())
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.comparators.first_answer", name, bench.scale_name, str(weights)]
    process = bench.start([*command, str(bench.threads)], talks=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    seconds = time.perf_counter() - started_s
    bench.stop(process)
    return seconds
