"""What sharing is worth: models asked together, equal and different inputs over one trunk, prepared programs, bytes.

Every time is taken through the public interface: a `trunkline serve` for each variant, clients in this process, functions of
the template over HTTP. Comparators: the same models in eager torch with as many threads; C, the models wrapped into one traced
graph (FusedInf); A, functions with private models; ONNX Runtime. Variants take turns in short blocks.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.comparators.onnx_session import onnx_session
from benchmarks.comparators.wrapped import wrapped
from benchmarks.eight_functions import eight_functions
from benchmarks.harness import Sidecar, interleaved
from benchmarks.memory import pss_bytes
from benchmarks.models import encoder, perceptron, resnet
from benchmarks.report import Report, arguments, summary
from benchmarks.siblings import Family, content_of
from benchmarks.variants import AT_ONCE, Call, VariantBench, asking
from sidecar.bundle import write_bundle
from sidecar.devices import open_device
from sidecar.export import convert


@dataclass(frozen=True)
class Scale:
    """How much one run does. ``rounds`` are repetitions of what takes as long as eight models, ``count`` of single calls."""

    side: int
    unrelated_widths: tuple[int, ...]
    heads: tuple[int, ...]
    tuned_units: tuple[int, ...]
    rounds: int
    count: int


QUICK = Scale(side=64, unrelated_widths=(20,), heads=(8, 16), tuned_units=(0, 2), rounds=3, count=20)
FULL = Scale(
    side=224,
    unrelated_widths=(16, 24, 32, 20, 40, 28, 48),
    heads=(4, 8, 16, 64),
    tuned_units=(0, 1, 2, 4, 9),
    rounds=8,
    count=60,
)


class Floor(nn.Module):
    """Takes what a model takes and computes next to nothing: what is left is transport."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :1].to(torch.float32)


class Sharing(VariantBench):
    """The rows of this benchmark, and the models they have in common."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)
        self.scale = QUICK if report.quick else FULL
        image = torch.zeros(1, 3, self.scale.side, self.scale.side)
        self.architecture = "resnet10_narrow" if report.quick else "resnet18"
        self.images = Family(resnet(16, 1) if report.quick else resnet(), image, seed)
        layers, width = (2, 128) if report.quick else (6, 768)
        self.texts = self._encoder(width, width // 64, layers, 16)
        self.heads = {f"head{number}": self.images.with_head(seed + 1 + number) for number in range(max(self.scale.heads))}

    def _encoder(self, width: int, heads: int, layers: int, tokens: int) -> Family:
        model = encoder(width, heads, layers, tokens)
        return Family(model, torch.zeros(1, tokens, dtype=torch.int64), self.seed, {"x": (0, 8191)})

    def timed(self, section: str, variants: dict[str, Call], models: int = 1) -> dict[str, float]:
        """Time variants in turns, keep their summaries under ``section``, return their medians in microseconds.

        ``models`` are run by one call of each; the more they are, the fewer calls are made.
        """
        if models == 1:
            times = interleaved(variants, self.scale.count, block=5)
        else:
            times = interleaved(variants, max(3, round(min(2, AT_ONCE / models) * self.scale.rounds)), block=1, warm=1)
        summaries = {name: summary(samples) for name, samples in times.items()}
        self.report.raw.setdefault("us", {})[section] = summaries
        return {name: each["median"] for name, each in summaries.items()}

    # --- models that have nothing in common ---------------------------------------------------------------------------

    def fused(self) -> None:
        """K unrelated models asked in one call, against each by itself and against one traced graph of all."""
        models = {"unrelated0": self.images.tuned(len(self.images.base.units), self.seed + 50)}
        self.push(self.images, models, [self.on])
        for number, width in enumerate(self.scale.unrelated_widths, 1):
            family = Family(resnet(width, 1), self.images.example, self.seed + 50 + number)
            models[f"unrelated{number}"] = family.base
            self.push(family, {f"unrelated{number}": family.base}, [self.on])
        array = self.random(self.images)
        ratios: dict[str, dict[str, float]] = {"time": {}, "wrapped_time": {}, "bytes": {}}
        for k in range(2, len(models) + 1):
            names, chosen = list(models)[:k], [model.to(self.device) for model in list(models.values())[:k]]
            joint = self.on.models(*names)
            medians = self.timed(
                f"fused_k{k}",
                {
                    "joint": asking(joint, array),
                    "separate_eager": self.one_by_one(chosen, [array] * k),
                    "separate_sidecar": self.in_turn(self.on, names, array),
                    "wrapped": self.wrapped(chosen, array, frozen=False),
                    "wrapped_frozen": self.wrapped(chosen, array, frozen=True),
                },
                models=k,
            )
            ratios["time"][f"k{k}"] = medians["joint"] / medians["separate_eager"]
            ratios["wrapped_time"][f"k{k}"] = medians["joint"] / medians["wrapped"]
            self.evict_all()
            joint(array)
            ratios["bytes"][f"k{k}"] = self.on.admin.get("memory")["resident_bytes"] / sum(map(_bytes, chosen))
        self.report.raw["fused"] = ratios
        self.report.figures["fused_time_ratio"] = _mean(ratios["time"].values())
        self.report.figures["fused_bytes_ratio"] = _mean(ratios["bytes"].values())
        self.report.figures["wrapped_time_ratio"] = _mean(ratios["wrapped_time"].values())

    def wrapped(self, models: Sequence[nn.Module], array: np.ndarray, frozen: bool) -> Call:
        """Return one run of comparator C on one input."""
        graph = wrapped(models, torch.from_numpy(array).to(self.device), frozen)

        def run() -> list[np.ndarray]:
            with torch.inference_mode():
                return [output.cpu().numpy() for output in graph(torch.from_numpy(array).to(self.device))]

        return run

    def in_turn(self, sidecar: Sidecar, names: Sequence[str], array: np.ndarray) -> Call:
        """Return models asked one after another, each by itself."""
        calls = [asking(sidecar.model(name), array) for name in names]
        return lambda: [call() for call in calls]

    def evict_all(self) -> None:
        for model in self.on.admin.get("models")["models"]:
            self.on.admin.post(f"models/{model['name']}/evict")

    # --- one trunk, many heads ------------------------------------------------------------------------------------------

    def same_input(self) -> None:
        """N heads on one trunk asked about one input: in calls of up to eight models, and by N clients."""
        array = self.random(self.images)
        for count in self.scale.heads:
            names, arrays = list(self.heads)[:count], [array] * count
            variants = {"eager": self.one_by_one(list(self.heads.values())[:count], arrays)}
            for variant, sidecar in self.forms.items():
                if variant == "on" or count == AT_ONCE:
                    variants[f"calls_{variant}"] = self.in_calls(sidecar, names, array)
                    variants[f"clients_{variant}"] = self.by_clients(sidecar, names, arrays)
            before = self.counts(self.on)
            medians = self.timed(f"same_input_n{count}", variants, models=count)
            self.report.raw.setdefault("counts", {})[f"same_input_n{count}"] = {"before": before, "after": self.counts(self.on)}
            self.report.figures[f"same_input_speedup_n{count}"] = medians["eager"] / medians["calls_on"]
            self.report.figures[f"same_input_clients_speedup_n{count}"] = medians["eager"] / medians["clients_on"]

    def different_inputs(self, kind: str, family: Family, heads: dict[str, nn.Module]) -> None:
        """Eight clients with inputs of their own, against the same requests one by one."""
        arrays = [self.random(family, number) for number in range(AT_ONCE)]
        variants = {"eager": self.one_by_one(list(heads.values()), arrays)}
        for variant, sidecar in self.forms.items():
            variants[f"clients_{variant}"] = self.by_clients(sidecar, list(heads), arrays)
        medians = self.timed(f"different_input_{kind}", variants, models=AT_ONCE)
        self.report.figures[f"different_input_speedup_{kind}_n8"] = medians["eager"] / medians["clients_on"]

    def resident(self) -> None:
        """Bytes in memory after serving, against what the fused graph has, each weight once."""
        unique_bytes = self.on.admin.get("graph")["unique_bytes"]
        for model in self.on.admin.get("models")["models"]:
            self.on.admin.post(f"models/{model['name']}/load")
        memory = self.on.admin.get("memory")
        self.report.figures["resident_over_unique"] = memory["resident_bytes"] / unique_bytes
        grown_bytes = pss_bytes([self.on.process.pid]) - self.idle_pss_bytes
        self.report.raw["resident"] = memory | {"unique_bytes": unique_bytes, "pss_grown_bytes": grown_bytes}

    def unshared_overhead(self) -> None:
        """One model, one client: what the machinery of sharing costs where it finds nothing."""
        array = self.random(self.images)
        calls = {variant: asking(self.sidecars[variant].model("base"), array) for variant in ("on", "plain")}
        medians = self.timed("unshared", calls)
        self.report.figures["unshared_overhead"] = medians["on"] / medians["plain"] - 1

    def horizontal(self) -> None:
        """32 heads of one structure and different weights, asked about one input: stacked against one after another."""
        family = Family(perceptron(512, 256), torch.zeros(1, 256), self.seed)
        heads = {f"stack{number:02}": family.with_head(self.seed + number) for number in range(32)}
        sidecars = {name: self.sidecars[name] for name in ("on", "no_stacking")}
        self.push(family, heads, sidecars.values())
        array = self.random(family)
        variants = {"eager": self.one_by_one(list(heads.values()), [array] * len(heads))}
        variants |= {f"calls_{name}": self.in_calls(sidecar, list(heads), array) for name, sidecar in sidecars.items()}
        medians = self.timed("horizontal_n32", variants)
        self.report.figures["horizontal_speedup_n32"] = medians["calls_no_stacking"] / medians["calls_on"]

    # --- programs ---------------------------------------------------------------------------------------------------------

    def compiled(self) -> None:
        """The prepared form against the base form, one model alone."""
        speedups = {}
        for kind, family, name in (("cnn", self.images, "base"), ("transformer", self.texts, "text0")):
            array = self.random(family)
            calls = {variant: asking(self.sidecars[variant].model(name), array) for variant in ("on", "no_packing")}
            medians = self.timed(f"compiled_{kind}", calls)
            speedups[kind] = medians["no_packing"] / medians["on"]
        self.report.raw["compiled_speedup"] = speedups
        self.report.figures["compiled_speedup"] = _mean(speedups.values())

    def over_onnxruntime(self) -> None:
        """One model alone, batch 1, all cores, against ONNX Runtime; once more without what transport takes."""
        kinds = ("cnn", "transformer")
        figures = [f"cpu_over_onnxruntime_{kind}" for kind in kinds]
        if self.device.type != "cpu":
            self.report.lack("compared on the CPU only", *figures)
            return
        # The sizes of MiniLM, 32 tokens.
        texts = self.texts if self.report.quick else self._encoder(384, 12, 6, 32)
        families = dict(zip(kinds, (self.images, texts), strict=True))
        sidecars = {self.threads: self.on, os.cpu_count() or 1: self.all_cores}
        for kind, family in families.items():
            array = self.random(family)
            self.push(family, {kind: family.base}, sidecars.values())
            self.push_floor(f"floor_{kind}", family, sidecars.values())
            variants = {}
            for threads, sidecar in sidecars.items():
                try:
                    variants[f"onnxruntime_{threads}"] = asking(onnx_session(family.base, family.example, threads), array)
                except ImportError as error:
                    self.report.lack(f"{error.name} is not installed", *figures)
                    return
                variants[f"ours_{threads}"] = asking(sidecar.model(kind), array)
                variants[f"transport_{threads}"] = asking(sidecar.model(f"floor_{kind}"), array)
            medians = self.timed(f"onnxruntime_{kind}", variants)
            theirs = min(medians[f"onnxruntime_{threads}"] for threads in sidecars)
            ours = min(medians[f"ours_{threads}"] for threads in sidecars)
            compute = min(medians[f"ours_{threads}"] - medians[f"transport_{threads}"] for threads in sidecars)
            self.report.figures[f"cpu_over_onnxruntime_{kind}"] = ours / theirs
            self.report.raw.setdefault("over_onnxruntime_without_transport", {})[kind] = compute / theirs

    def push_floor(self, name: str, family: Family, sidecars: Iterable[Sidecar]) -> None:
        spec = family.graph.inputs[0]
        bounds = None if spec.minimum is None or spec.maximum is None else {spec.name: (spec.minimum, spec.maximum)}
        packed = convert(Floor(), (family.example,), name=name, input_bounds=bounds)
        folder = self.folder / "floor"
        write_bundle(folder, packed.bundle, packed.blobs)
        for sidecar in sidecars:
            sidecar.admin.push(folder)
        shutil.rmtree(folder)

    def switching(self) -> None:
        """One prepared program run with two sets of weights in turns, against always the same, in this process."""
        device = open_device(self.report.device, self.threads)
        # Little computation, so that binding is not lost in it.
        family = self.texts if self.report.quick else self._encoder(64, 2, 2, 8)
        program = device.prepare(family.graph)
        sets = []
        for model in (family.base, family.tuned(len(family.base.units), self.seed + 1)):
            pairs = family.weights(model)
            sets.append([device.new_weight(weight, _filling(content_of(tensor))) for weight, tensor in pairs])
        array = self.random(family)
        given = [device.view(memoryview(array).cast("B"), "int64", array.shape)]
        turn = 0

        def run(handles: Sequence[Tensor]) -> None:
            device.run(program, handles, given)[0].cpu()

        def alternating() -> None:
            nonlocal turn
            turn = 1 - turn
            run(sets[turn])

        times = interleaved({"same": lambda: run(sets[0]), "alternating": alternating}, 40 * self.scale.count)
        summaries = {name: summary(samples) for name, samples in times.items()}
        self.report.raw.setdefault("us", {})["switching"] = summaries
        self.report.figures["switch_us"] = summaries["alternating"]["median"] - summaries["same"]["median"]

    def siblings(self) -> None:
        """An original and a model tuned from it in its last k units, asked together; at last, nothing but structure is shared."""
        array = self.random(self.images)
        sweep = {}
        for k in self.scale.tuned_units:
            name, model = f"tuned{k}", self.images.tuned(k, self.seed + 200 + k)
            self.push(self.images, {name: model}, [self.on])
            joint = self.on.models("base", name)
            medians = self.timed(
                f"siblings_k{k}",
                {
                    "joint": asking(joint, array),
                    "eager": self.one_by_one([self.images.base, model], [array] * 2),
                },
                models=2,
            )
            stored = self.on.admin.get(f"models/{name}")
            sweep[f"k{k}"] = {
                "time_ratio": medians["joint"] / medians["eager"],
                "bytes_ratio": (stored["bytes"] + stored["unique_bytes"]) / (2 * stored["bytes"]),
            }
        self.report.raw["siblings"] = sweep

    def variants_per_compile(self) -> None:
        """Fully tuned siblings of one architecture, over the programs that the sidecar prepared for them."""
        if _prepared(self.counts(self.on)) is None:
            self.report.lack("the sidecar's status does not tell how many programs it prepared", "variants_per_compile")
            return
        family = Family(perceptron(64, 32), torch.zeros(1, 256), self.seed)
        before = _prepared(self.counts(self.on))
        tuned = {f"variant{number}": family.tuned(1, self.seed + number) for number in range(16)}
        self.push(family, tuned, [self.on])
        made = _prepared(self.counts(self.on)) - before
        self.report.raw["variants_per_compile"] = {"variants": len(tuned), "programs": made}
        self.report.figures["variants_per_compile"] = len(tuned) / max(1, made)

    # --- all of it ----------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        self.wait()
        self.report.raw["threads"] = self.threads
        eight = dict(list(self.heads.items())[:AT_ONCE])
        text_heads = {f"text{number}": self.texts.with_head(self.seed + 1 + number) for number in range(AT_ONCE)}
        self.push(self.images, {"base": self.images.base})
        self.push(self.images, eight, self.forms.values())
        self.push(self.images, dict(list(self.heads.items())[AT_ONCE:]), [self.on])
        self.push(self.texts, text_heads, self.forms.values())
        self.unshared_overhead()
        self.same_input()
        self.different_inputs("conv", self.images, eight)
        self.different_inputs("transformer", self.texts, text_heads)
        self.resident()
        self.compiled()
        self.horizontal()
        self.siblings()
        self.variants_per_compile()
        self.switching()
        self.over_onnxruntime()
        self.fused()
        if self.report.quick:
            figures = ("eight_functions_speedup", "eight_functions_same_input_speedup", "eight_functions_p99_ratio")
            self.report.lack("left out of --quick: 25 processes", *figures)
        else:
            eight_functions(self, self.images, self.architecture, eight, rounds=self.scale.rounds, count=2)
        self.report.raw["counts"]["end"] = {variant: self.counts(sidecar) for variant, sidecar in self.sidecars.items()}
        if self.device.type == "cpu":
            self.report.lack("run with --device cuda:0", "all of it on a GPU")


def _mean(ratios: Any) -> float:
    """Return the geometric mean."""
    return math.exp(float(np.mean(np.log(list(ratios)))))


def _bytes(model: nn.Module) -> int:
    """Return the bytes of the weights a model computes with."""
    return sum(tensor.nbytes for tensor in model.state_dict().values() if tensor.is_floating_point())


def _filling(content: memoryview) -> Any:
    def fill(target: memoryview) -> None:
        target[:] = content

    return fill


def _prepared(status: dict[str, Any]) -> Any:
    """Return how many programs a sidecar has prepared, None where it does not say."""
    return status.get("programs", {}).get("prepared")


def main() -> None:
    chosen = arguments(__doc__ or "")
    report = Report("sharing", chosen.quick, chosen.device)
    with Sharing(report, chosen.seed) as bench:
        bench.measure()
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
