"""Rows of `benchmarks.sharing` about prepared programs: their speed alone, and how many models one of them serves."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.comparators.onnx_session import onnx_session
from benchmarks.harness import Sidecar, interleaved
from benchmarks.models import perceptron
from benchmarks.report import summary
from benchmarks.sharing_bench import Sharing, geometric_mean
from benchmarks.siblings import Family, content_of
from benchmarks.variants import asking
from sidecar.bundle import write_bundle
from sidecar.devices import open_device
from sidecar.export import convert

# So long threads of ONNX Runtime may go on spinning after a call: on cores of whoever is timed next, who has no such neighbour.
_SPINS_S: Final = 0.2


class Floor(nn.Module):
    """Takes what a model takes and computes next to nothing: what is left is transport."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1].to(torch.float32)


def compiled(bench: Sharing) -> None:
    """The prepared form against the base form, one model alone."""
    speedups = {}
    for kind, family, name in (("cnn", bench.images, "base"), ("transformer", bench.texts, "text0")):
        array = bench.random(family)
        calls = {variant: asking(bench.sidecars[variant].model(name), array) for variant in ("on", "no_packing")}
        medians = bench.timed(f"compiled_{kind}", calls)
        speedups[kind] = medians["no_packing"] / medians["on"]
    bench.report.raw["compiled_speedup"] = speedups
    bench.report.figures["compiled_speedup"] = geometric_mean(speedups.values())


def over_onnxruntime(bench: Sharing) -> None:
    """One model alone, batch 1, all cores, against ONNX Runtime; once more without what transport takes."""
    kinds = ("cnn", "transformer")
    figures = [f"cpu_over_onnxruntime_{kind}" for kind in kinds]
    if bench.device.type != "cpu":
        bench.report.lack("compared on the CPU only", *figures)
        return
    # The sizes of MiniLM, 32 tokens.
    texts = bench.texts if bench.report.quick else bench.encoder_family(384, 12, 6, 32)
    families = dict(zip(kinds, (bench.images, texts), strict=True))
    for kind, family in families.items():
        array = bench.random(family)
        bench.push(family, {kind: family.base}, [bench.on])
        _push_floor(bench, f"floor_{kind}", family, [bench.on])
        try:
            session = onnx_session(family.base, family.example, bench.threads)
        except ImportError as error:
            bench.report.lack(f"{error.name} is not installed", *figures)
            return
        medians = bench.timed(
            f"onnxruntime_{kind}",
            {
                "onnxruntime": asking(session, array),
                "ours": asking(bench.on.model(kind), array),
                "transport": asking(bench.on.model(f"floor_{kind}"), array),
            },
            rest_s=_SPINS_S,
        )
        bench.report.figures[f"cpu_over_onnxruntime_{kind}"] = medians["ours"] / medians["onnxruntime"]
        without = (medians["ours"] - medians["transport"]) / medians["onnxruntime"]
        bench.report.raw.setdefault("over_onnxruntime_without_transport", {})[kind] = without


def _push_floor(bench: Sharing, name: str, family: Family, sidecars: Iterable[Sidecar]) -> None:
    spec = family.graph.inputs[0]
    bounds = None if spec.minimum is None or spec.maximum is None else {spec.name: (spec.minimum, spec.maximum)}
    packed = convert(Floor(), (family.example,), name=name, input_bounds=bounds)
    folder = bench.folder / "floor"
    write_bundle(folder, packed.bundle, packed.blobs)
    for sidecar in sidecars:
        sidecar.admin.push(folder)
    shutil.rmtree(folder)


def switching(bench: Sharing) -> None:
    """One prepared program run with two sets of weights in turns, against always the same; and two eager modules likewise.

    Two modules have nothing to switch: what they take longer in turns is what the processor's caches miss.
    """
    device = open_device(bench.report.device, bench.threads)
    # Little computation, so that binding is not lost in it.
    family = bench.texts if bench.report.quick else bench.encoder_family(64, 2, 2, 8)
    program = device.prepare(family.graph)
    sets, models = [], (family.base, family.tuned(len(family.base.units), bench.seed + 1))
    for model in models:
        pairs = family.weights(model)
        sets.append([device.new_weight(weight, _filling(content_of(tensor))) for weight, tensor in pairs])
    array = bench.random(family)
    given = [device.view(memoryview(array).cast("B"), "int64", array.shape)]
    turn = 0

    def run(handles: Sequence[Tensor]) -> None:
        device.run(program, handles, given)[0].cpu()

    def eager(model: nn.Module) -> None:
        with torch.inference_mode():
            model(given[0]).cpu()

    def other() -> int:
        nonlocal turn
        turn = 1 - turn
        return turn

    variants = {
        "same": lambda: run(sets[0]),
        "alternating": lambda: run(sets[other()]),
        "eager_same": lambda: eager(models[0]),
        "eager_alternating": lambda: eager(models[other()]),
    }
    times = interleaved(variants, 40 * bench.scale.count)
    medians = {name: float(np.median(samples)) for name, samples in times.items()}
    bench.report.raw.setdefault("us", {})["switching"] = {name: summary(samples) for name, samples in times.items()}
    bench.report.figures["switch_us"] = medians["alternating"] - medians["same"]
    bench.report.figures["switch_eager_us"] = medians["eager_alternating"] - medians["eager_same"]


def variants_per_compile(bench: Sharing) -> None:
    """Fully tuned siblings of one architecture, over the programs that the sidecar keeps for them."""
    family = Family(perceptron(64, 32), torch.zeros(1, 256), bench.seed)
    before = bench.counts(bench.on)["sharing"]["programs"]
    tuned = {f"variant{number}": family.tuned(1, bench.seed + number) for number in range(16)}
    bench.push(family, tuned, [bench.on])
    made = bench.counts(bench.on)["sharing"]["programs"] - before
    bench.report.raw["variants_per_compile"] = {"variants": len(tuned), "programs": made}
    bench.report.figures["variants_per_compile"] = len(tuned) / max(1, made)


def _filling(content: memoryview) -> Any:
    def fill(target: memoryview) -> None:
        target[:] = content

    return fill
