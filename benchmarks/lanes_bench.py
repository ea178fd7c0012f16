"""Section ``lanes`` of `benchmarks.tenancy`: one lane with all threads against many with fewer, by the number of clients.

And what the sidecar makes of it when nobody says how many lanes there should be.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.harness import Sidecar
from benchmarks.tenancy_bench import TenancyBench, closed_loop

# What the clients ask for, in turn: one model, or all of them.
WORKLOADS = {"conv": ("conv0",), "transformer": ("text0",), "mixed": ("conv0", "text0", "conv1", "text1")}
NO_BATCHES = {"TRUNKLINE_BATCH_LIMIT": "1", "TRUNKLINE_COMPUTE_ONCE": "off"}
# How long a sidecar is asked without a pause until it has divided its device.
_PATIENCE_S = 240.0
_CLIENTS = 4


def workloads(bench: TenancyBench) -> dict[str, tuple[str, ...]]:
    """Return what clients ask for; in a quick run, only all of it."""
    return {"mixed": WORKLOADS["mixed"]} if bench.report.quick else WORKLOADS


def asking(sidecar: Sidecar, name: str, array: np.ndarray) -> Callable[[], object]:
    model = sidecar.model(name)
    return lambda: model(array)


def clients(bench: TenancyBench, sidecar: Sidecar, names: Sequence[str], count: int) -> list[Callable[[], object]]:
    """Return clients, each with a model and an input of its own."""
    return [
        asking(sidecar, names[number % len(names)], bench.inputs[names[number % len(names)]][number]) for number in range(count)
    ]


def lanes(bench: TenancyBench) -> None:
    """Answers per second at batch 1, and with batches across functions, with one lane and with as many as there are threads."""
    threads = bench.threads
    many = str(threads)
    # What one core does by itself: as many of it as there are would be the most that lanes could reach.
    single = bench.start_sidecar("single", 1, TRUNKLINE_LANES="1", **NO_BATCHES)
    one = bench.start_sidecar("one", threads, store="lanes", TRUNKLINE_LANES="1", **NO_BATCHES)
    bench.fill(one, single)
    # What the first has found out about models is there for the others.
    sidecars = {"one": one, "many": bench.start_sidecar("many", threads, store="lanes", TRUNKLINE_LANES=many, **NO_BATCHES)}
    if not bench.report.quick:
        sidecars["one_batched"] = bench.start_sidecar("one-batched", threads, store="lanes", TRUNKLINE_LANES="1")
        sidecars["many_batched"] = bench.start_sidecar("many-batched", threads, store="lanes", TRUNKLINE_LANES=many)
    bench.fill(*sidecars.values())
    figures, raw = bench.report.figures, bench.report.raw.setdefault("lanes", {"threads": threads})
    for workload, wanted in workloads(bench).items():
        names = [name for name in wanted if name in bench.families]
        found: dict[str, dict[str, float]] = {name: {} for name in sidecars}
        for count in bench.scale.clients:
            variants = {name: clients(bench, sidecar, names, count) for name, sidecar in sidecars.items()}
            if count == 1:
                variants["single"] = clients(bench, single, names, count)
            for name, rate in bench.rates(variants).items():
                found.setdefault(name, {})[f"k{count}"] = rate
        raw[workload] = found
        alone = found["one"]["k1"]
        figures[f"lanes_ceiling_{workload}"] = threads * found["single"]["k1"] / alone
        for count in bench.scale.clients:
            for name in sidecars:
                figures[f"lanes_throughput_{workload}_{name}_k{count}"] = found[name][f"k{count}"] / alone
    raw["counts"] = {name: sidecar.admin.get("status")["sharing"] for name, sidecar in sidecars.items()}
    for sidecar in (*list(sidecars.values())[1:], single):
        bench.end(sidecar)
    if bench.report.quick:
        batched = (
            f"lanes_throughput_mixed_{name}_k{count}" for name in ("one_batched", "many_batched") for count in bench.scale.clients
        )
        bench.report.lack("left out of --quick: two sidecars more", *batched)
        lacking = ("lanes_auto_after_s", "lanes_auto_mixed_k1", f"lanes_auto_mixed_k{_CLIENTS}")
        bench.report.lack("left out of --quick: a sidecar needs some ten seconds to divide its device", *lacking)
    else:
        _auto(bench, one)
    bench.end(one)


def _auto(bench: TenancyBench, one: Sidecar) -> None:
    """Ask for a mix until the number of lanes has been chosen, or for so long; then compare with one lane."""
    auto = bench.start_sidecar("auto", bench.threads, store="lanes", TRUNKLINE_LANES="auto", **NO_BATCHES)
    bench.fill(auto)
    names = WORKLOADS["mixed"]
    asking_it = clients(bench, auto, names, _CLIENTS)
    began_s = time.perf_counter()
    while auto.admin.get("status")["lanes"]["chosen"] == 1 and time.perf_counter() < began_s + _PATIENCE_S:
        closed_loop(asking_it, bench.scale.seconds)
    figures = bench.report.figures
    figures["lanes_auto_after_s"] = time.perf_counter() - began_s
    for count in (1, _CLIENTS):
        found = bench.rates({"one": clients(bench, one, names, count), "auto": clients(bench, auto, names, count)})
        figures[f"lanes_auto_mixed_k{count}"] = found["auto"] / found["one"]
    bench.report.raw["lanes"]["auto"] = auto.admin.get("status")["lanes"]
    bench.end(auto)
