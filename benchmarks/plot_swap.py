"""Draw docs/swapping.svg from the committed results of `benchmarks.swap`: where swapping is free, and what it costs elsewhere.

Run as `python -m benchmarks.plot_swap`; needs the dependency group `bench`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "swap.json"
DRAWING = ROOT / "docs" / "swapping.svg"
_LABELS = {
    "ours": "Trunkline",
    "two_blocks": "two blocks at a time (SwapNet)",
    "pipelined": "one model, pipelined (PipeSwitch)",
    "whole_lru": "whole models, LRU",
    "ours_resident": "Trunkline, all in memory",
    "resident": "torch, all in memory",
}


def crossover(axes: Axes, results: Mapping[str, Any]) -> None:
    """Latency over latency in memory, by how long computing takes beside reading: of each task, and of one in larger batches."""
    raw = results["raw"]
    places = [
        (raw[label]["ms"]["ours_resident"][name]["median"] / disk_ms, raw[label]["latency_ratio"]["ours"][name])
        for label in raw
        if label.startswith("budget_")
        for name, disk_ms in raw[label]["disk_floor_ms"].items()
        if disk_ms
    ]
    axes.plot(*zip(*places, strict=True), ".", color="C0", label="eleven models, four budgets")
    rows = raw["crossover"]["rows"].values()
    line = [(row["compute_over_transfer"], row["latency_ratio"]) for row in rows]
    axes.plot(*zip(*line, strict=True), "o-", color="C1", label="ResNet-50 in 0.45 of its memory, batch 1 to 16")
    span = np.geomspace(min(x for x, _ in (*places, *line)), max(x for x, _ in (*places, *line)))
    axes.plot(span, np.maximum(1, 1 / span), "--", color="0.4", label="no schedule goes below")
    axes.axvspan(1, span[-1], color="C2", alpha=0.1)
    axes.set(xscale="log", yscale="log", xlabel="computing / reading", ylabel="latency / all in memory")
    axes.set_title("Free where computing covers reading (green)", fontsize=10)
    axes.legend(fontsize=7)


def budgets(axes: Axes, results: Mapping[str, Any]) -> None:
    """Latencies by budget: geometric mean over the models that everybody can serve in all of them."""
    labels = [label for label in results["raw"] if label.startswith("budget_")]
    tables = [results["raw"][label]["ms"] for label in labels]
    names = [name for name in tables[0]["ours"] if all(name in table[kind] for table in tables for kind in _LABELS)]
    divisors = [float(label.removeprefix("budget_")) for label in labels]
    for kind, label in _LABELS.items():
        heights = [statistics.geometric_mean(table[kind][name]["median"] for name in names) for table in tables]
        style = ":" if "resident" in kind else "o-" if kind == "ours" else "s--"
        axes.plot(divisors, heights, style, label=label)
    # Room for the legend.
    axes.set(ylim=(0, 1.5 * axes.get_ylim()[1]), xlabel="all models / memory budget", ylabel="milliseconds, geometric mean")
    axes.set_title(f"{len(names)} models, asked in turn", fontsize=10)
    axes.legend(fontsize=7, loc="upper left")


def main() -> None:
    results = json.loads(RESULTS.read_text())
    # Equal results make equal bytes.
    mpl.rcParams["svg.hashsalt"] = "trunkline"
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    crossover(left, results)
    budgets(right, results)
    figure.savefig(DRAWING, metadata={"Date": None})


if __name__ == "__main__":
    main()
