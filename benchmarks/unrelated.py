"""Rows of `benchmarks.sharing` about models that have nothing in common: what serving them together is worth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from benchmarks.comparators.wrapped import wrapped
from benchmarks.harness import Sidecar
from benchmarks.memory import pss_bytes
from benchmarks.models import resnet
from benchmarks.sharing_bench import Sharing, geometric_mean
from benchmarks.siblings import Family
from benchmarks.variants import Call, asking


def _shapes(bench: Sharing) -> list[tuple[int, int]]:
    """Return width and units per stage of each of the unrelated ResNets; the first has the sizes of the shared trunk's."""
    first = (16, 1) if bench.report.quick else (64, 2)
    return [first, *((width, 1) for width in bench.scale.unrelated_widths)]


def _unrelated(bench: Sharing) -> dict[str, tuple[Family, nn.Module]]:
    found: dict[str, tuple[Family, nn.Module]] = {}
    for number, (width, units) in enumerate(_shapes(bench)):
        family = Family(resnet(width, units), bench.images.example, bench.seed + 50 + number)
        found[f"unrelated{number}"] = (family, family.base)
    return found


def fused(bench: Sharing) -> None:
    """K unrelated models asked in one call, against each by itself and against one traced graph of all."""
    models: dict[str, nn.Module] = {}
    for name, (family, model) in _unrelated(bench).items():
        models[name] = model
        bench.push(family, {name: model}, [bench.on])
    array = bench.random(bench.images)
    ratios: dict[str, dict[str, float]] = {"time": {}, "wrapped_time": {}, "bytes": {}}
    for k in range(2, len(models) + 1):
        names, chosen = list(models)[:k], [model.to(bench.device) for model in list(models.values())[:k]]
        joint = bench.on.models(*names)
        medians = bench.timed(
            f"fused_k{k}",
            {
                "joint": asking(joint, array),
                "separate_eager": bench.one_by_one(chosen, [array] * k),
                "separate_sidecar": _in_turn(bench.on, names, array),
                "wrapped": _run_of_wrapped(bench, chosen, array, frozen=False),
                "wrapped_frozen": _run_of_wrapped(bench, chosen, array, frozen=True),
            },
            models=k,
        )
        ratios["time"][f"k{k}"] = medians["joint"] / medians["separate_eager"]
        ratios["wrapped_time"][f"k{k}"] = medians["joint"] / medians["wrapped"]
        bench.evict_all()
        joint(array)
        ratios["bytes"][f"k{k}"] = bench.on.admin.get("memory")["resident_bytes"] / sum(map(_bytes, chosen))
    bench.report.raw["fused"] = ratios
    bench.report.figures["fused_time_ratio"] = geometric_mean(ratios["time"].values())
    bench.report.figures["fused_weights_ratio"] = geometric_mean(ratios["bytes"].values())
    bench.report.figures["wrapped_time_ratio"] = geometric_mean(ratios["wrapped_time"].values())


def _run_of_wrapped(bench: Sharing, models: Sequence[nn.Module], array: np.ndarray, frozen: bool) -> Call:
    """Return one run of comparator C on one input."""
    graph = wrapped(models, torch.from_numpy(array).to(bench.device), frozen)

    def run() -> list[np.ndarray]:
        with torch.inference_mode():
            return [output.cpu().numpy() for output in graph(torch.from_numpy(array).to(bench.device))]

    return run


def _in_turn(sidecar: Sidecar, names: Sequence[str], array: np.ndarray) -> Call:
    """Return models asked one after another, each by itself."""
    calls = [asking(sidecar.model(name), array) for name in names]
    return lambda: [call() for call in calls]


def _bytes(model: nn.Module) -> int:
    """Return the bytes of the weights a model computes with."""
    return sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.is_floating_point())


def processes(bench: Sharing) -> None:
    """Memory of K unrelated models after one call each: a sidecar that holds them all, against a process of torch for each."""
    shapes, array = _shapes(bench), bench.random(bench.images)
    names = [f"unrelated{number}" for number in range(len(shapes))]
    sidecar = bench.sidecar("together", bench.threads)
    for name, (family, model) in _unrelated(bench).items():
        bench.push(family, {name: model}, [sidecar])
    started: list[subprocess.Popen[bytes]] = []
    found: dict[str, dict[str, float]] = {}
    for k, (width, units) in enumerate(shapes, 1):
        command = [sys.executable, "-m", "benchmarks.comparators.lone_model", *map(str, (width, units, bench.scale.side))]
        process = bench.start([*command, str(bench.threads), bench.report.device], talks=True)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        started.append(process)
        if k == 1:
            continue
        for name in names:
            sidecar.admin.post(f"models/{name}/evict")
        sidecar.models(*names[:k])(array)
        separate_bytes, together_bytes = pss_bytes(each.pid for each in started), pss_bytes([sidecar.process.pid])
        found[f"k{k}"] = {"separate": separate_bytes, "together": together_bytes, "ratio": together_bytes / separate_bytes}
    for process in started:
        bench.stop(process)
    bench.end(sidecar)
    bench.report.raw["fused_pss"] = found
    bench.report.figures["fused_bytes_ratio"] = geometric_mean(each["ratio"] for each in found.values())
