"""What sharing is worth: models asked together, equal and different inputs over one trunk, prepared programs, bytes.

Every time is taken through the public interface: a `trunkline serve` for each variant, clients in this process, functions of
the template over HTTP. Comparators: the same models in eager torch with as many threads; C, the models wrapped into one traced
graph (FusedInf); A, functions with private models; ONNX Runtime. Variants take turns in short blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from benchmarks.comparators.wrapped import wrapped
from benchmarks.eight_functions import eight_functions
from benchmarks.harness import Sidecar
from benchmarks.memory import pss_bytes
from benchmarks.models import perceptron, resnet
from benchmarks.programs import compiled, over_onnxruntime, switching, variants_per_compile
from benchmarks.report import Report, arguments
from benchmarks.sharing_bench import Sharing, geometric_mean
from benchmarks.siblings import Family
from benchmarks.variants import AT_ONCE, Call, asking


def unshared_overhead(bench: Sharing) -> None:
    """One model, one client: what the machinery of sharing costs where it finds nothing."""
    array = bench.random(bench.images)
    calls = {variant: asking(bench.sidecars[variant].model("base"), array) for variant in ("on", "plain")}
    medians = bench.timed("unshared", calls)
    bench.report.figures["unshared_overhead"] = medians["on"] / medians["plain"] - 1


def same_input(bench: Sharing) -> None:
    """N heads on one trunk asked about one input: in calls of up to eight models, and by N clients."""
    array = bench.random(bench.images)
    for count in bench.scale.heads:
        names, arrays = list(bench.heads)[:count], [array] * count
        variants = {"eager": bench.one_by_one(list(bench.heads.values())[:count], arrays)}
        for variant, sidecar in bench.forms.items():
            if variant == "on" or count == AT_ONCE:
                variants[f"calls_{variant}"] = bench.in_calls(sidecar, names, array)
                variants[f"clients_{variant}"] = bench.by_clients(sidecar, names, arrays)
        before = bench.counts(bench.on)
        medians = bench.timed(f"same_input_n{count}", variants, models=count)
        bench.report.raw.setdefault("counts", {})[f"same_input_n{count}"] = {"before": before, "after": bench.counts(bench.on)}
        bench.report.figures[f"same_input_speedup_n{count}"] = medians["eager"] / medians["calls_on"]
        bench.report.figures[f"same_input_clients_speedup_n{count}"] = medians["eager"] / medians["clients_on"]


def different_inputs(bench: Sharing, kind: str, family: Family, heads: dict[str, nn.Module]) -> None:
    """Eight clients with inputs of their own, against the same requests one by one."""
    arrays = [bench.random(family, number) for number in range(AT_ONCE)]
    variants = {"eager": bench.one_by_one(list(heads.values()), arrays)}
    for variant, sidecar in bench.forms.items():
        variants[f"clients_{variant}"] = bench.by_clients(sidecar, list(heads), arrays)
    medians = bench.timed(f"different_input_{kind}", variants, models=AT_ONCE)
    bench.report.figures[f"different_input_speedup_{kind}_n8"] = medians["eager"] / medians["clients_on"]


def resident(bench: Sharing) -> None:
    """Bytes in memory after serving, against what the fused graph has, each weight once."""
    unique_bytes = bench.on.admin.get("graph")["unique_bytes"]
    for model in bench.on.admin.get("models")["models"]:
        bench.on.admin.post(f"models/{model['name']}/load")
    memory = bench.on.admin.get("memory")
    bench.report.figures["resident_over_unique"] = memory["resident_bytes"] / unique_bytes
    grown_bytes = pss_bytes([bench.on.process.pid]) - bench.idle_pss_bytes
    bench.report.raw["resident"] = memory | {"unique_bytes": unique_bytes, "pss_grown_bytes": grown_bytes}


def horizontal(bench: Sharing) -> None:
    """32 heads of one structure and different weights, asked about one input: stacked against one after another."""
    family = Family(perceptron(128, 64), torch.zeros(1, 256), bench.seed)
    heads = {f"stack{number:02}": family.with_head(bench.seed + number) for number in range(32)}
    sidecars = {name: bench.sidecars[name] for name in ("on", "no_stacking")}
    bench.push(family, heads, sidecars.values())
    array = bench.random(family)
    variants = {"eager": bench.one_by_one(list(heads.values()), [array] * len(heads))}
    variants |= {f"calls_{name}": bench.in_calls(sidecar, list(heads), array) for name, sidecar in sidecars.items()}
    medians = bench.timed("horizontal_n32", variants)
    bench.report.figures["horizontal_speedup_n32"] = medians["calls_no_stacking"] / medians["calls_on"]


def siblings(bench: Sharing) -> None:
    """An original and a model tuned from it in its last k units, asked together; at last, nothing but structure is shared."""
    array = bench.random(bench.images)
    sweep = {}
    for k in bench.scale.tuned_units:
        name, model = f"tuned{k}", bench.images.tuned(k, bench.seed + 200 + k)
        bench.push(bench.images, {name: model}, [bench.on])
        joint = bench.on.models("base", name)
        medians = bench.timed(
            f"siblings_k{k}",
            {
                "joint": asking(joint, array),
                "eager": bench.one_by_one([bench.images.base, model], [array] * 2),
            },
            models=2,
        )
        stored = bench.on.admin.get(f"models/{name}")
        sweep[f"k{k}"] = {
            "time_ratio": medians["joint"] / medians["eager"],
            "bytes_ratio": (stored["bytes"] + stored["unique_bytes"]) / (2 * stored["bytes"]),
        }
    bench.report.raw["siblings"] = sweep


def fused(bench: Sharing) -> None:
    """K unrelated models asked in one call, against each by itself and against one traced graph of all."""
    models = {"unrelated0": bench.images.tuned(len(bench.images.base.units), bench.seed + 50)}
    bench.push(bench.images, models, [bench.on])
    for number, width in enumerate(bench.scale.unrelated_widths, 1):
        family = Family(resnet(width, 1), bench.images.example, bench.seed + 50 + number)
        models[f"unrelated{number}"] = family.base
        bench.push(family, {f"unrelated{number}": family.base}, [bench.on])
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
    bench.report.figures["fused_bytes_ratio"] = geometric_mean(ratios["bytes"].values())
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


def measure(bench: Sharing) -> None:
    bench.wait()
    bench.report.raw["threads"] = bench.threads
    eight = dict(list(bench.heads.items())[:AT_ONCE])
    text_heads = {f"text{number}": bench.texts.with_head(bench.seed + 1 + number) for number in range(AT_ONCE)}
    bench.push(bench.images, {"base": bench.images.base})
    bench.push(bench.images, eight, bench.forms.values())
    bench.push(bench.images, dict(list(bench.heads.items())[AT_ONCE:]), [bench.on])
    bench.push(bench.texts, text_heads, bench.forms.values())
    unshared_overhead(bench)
    same_input(bench)
    different_inputs(bench, "conv", bench.images, eight)
    different_inputs(bench, "transformer", bench.texts, text_heads)
    resident(bench)
    compiled(bench)
    horizontal(bench)
    siblings(bench)
    variants_per_compile(bench)
    switching(bench)
    over_onnxruntime(bench)
    fused(bench)
    if bench.report.quick:
        figures = ("eight_functions_speedup", "eight_functions_same_input_speedup", "eight_functions_p99_ratio")
        bench.report.lack("left out of --quick: 25 processes", *figures)
    else:
        eight_functions(bench, bench.images, bench.architecture, eight, rounds=bench.scale.rounds, count=2)
    bench.report.raw["counts"]["end"] = {variant: bench.counts(sidecar) for variant, sidecar in bench.sidecars.items()}
    if bench.device.type == "cpu":
        bench.report.lack("run with --device cuda:0", "all of it on a GPU")


def main() -> None:
    chosen = arguments(__doc__ or "")
    report = Report("sharing", chosen.quick, chosen.device)
    with Sharing(report, chosen.seed) as bench:
        measure(bench)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
