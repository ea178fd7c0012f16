"""What sharing is worth: models asked together, equal and different inputs over one trunk, prepared programs, bytes.

Every time is taken through the public interface: a `trunkline serve` for each variant, clients in this process, functions of
the template over HTTP. Comparators: the same models in eager torch with as many threads; C, the models wrapped into one traced
graph (FusedInf); A, functions with private models; ONNX Runtime. Variants take turns in short blocks.
"""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.eight_functions import eight_functions
from benchmarks.memory import pss_bytes
from benchmarks.models import perceptron
from benchmarks.programs import compiled, over_onnxruntime, switching, variants_per_compile
from benchmarks.report import Report, arguments
from benchmarks.sharing_bench import Sharing
from benchmarks.siblings import Family
from benchmarks.unrelated import fused, processes
from benchmarks.variants import AT_ONCE, asking


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


def own_inputs(bench: Sharing) -> None:
    """Small heads on a small trunk, a client with an input of its own for each: stacked against one after another."""
    family = Family(perceptron(128, 64), torch.zeros(1, 256), bench.seed)
    sidecars = {name: bench.sidecars[name] for name in ("on", "no_stacking")}
    for count in (4, AT_ONCE, 4 * AT_ONCE):
        names = [f"stack{number:02}" for number in range(count)]
        arrays = [bench.random(family, number) for number in range(count)]
        before = {name: bench.counts(sidecar)["sharing"] for name, sidecar in sidecars.items()}
        calls = {name: bench.by_clients(sidecar, names, arrays) for name, sidecar in sidecars.items()}
        medians = bench.timed(f"own_inputs_n{count}", calls)
        bench.report.figures[f"own_inputs_speedup_n{count}"] = medians["no_stacking"] / medians["on"]
        after = {name: bench.counts(sidecar)["sharing"] for name, sidecar in sidecars.items()}
        bench.report.raw.setdefault("counts", {})[f"own_inputs_n{count}"] = {"before": before, "after": after}


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
    own_inputs(bench)
    siblings(bench)
    variants_per_compile(bench)
    switching(bench)
    over_onnxruntime(bench)
    fused(bench)
    processes(bench)
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
