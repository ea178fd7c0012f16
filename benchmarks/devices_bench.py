"""Section ``devices`` of `benchmarks.tenancy`: two devices as one, against each of them alone.

A device here is one of the machine's cores. Alone, a device's sidecar and its clients have the other core to run on; together
nobody has. So two sidecars of one device each, asked at the same time, show what two devices could give at most here.
"""

from __future__ import annotations

import os

from benchmarks.harness import Sidecar
from benchmarks.lanes_bench import NO_BATCHES, clients, workloads
from benchmarks.tenancy_bench import TenancyBench, closed_loop

# Enough for every device to have something to do, all the time.
_CLIENTS = 4
# How long both are asked before they are measured: what is asked is seen, and a model that was moved may be moved again.
_SETTLING_S = {True: 2.0, False: 20.0}


def devices(bench: TenancyBench) -> None:
    """Answers per second of two devices in one sidecar, of each alone, and of both in sidecars of their own at the same time."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if bench.report.device != "cpu" or len(cores) < 2:
        bench.report.lack("run on a CPU with two cores or more", "two devices together")
        return
    names = [f"cpu:{core}" for core in cores]
    alone = [bench.start_sidecar(f"device-{number}", device=name, **NO_BATCHES) for number, name in enumerate(names)]
    both = bench.start_sidecar("devices", len(cores), device=",".join(names), **NO_BATCHES)
    bench.fill(*alone, both)
    figures, raw = bench.report.figures, bench.report.raw.setdefault("devices", {"devices": names})
    for workload, wanted in workloads(bench).items():
        models = [name for name in wanted if name in bench.families]
        together = clients(bench, both, models, _CLIENTS)
        closed_loop(together, _SETTLING_S[bench.report.quick])
        asked = [clients(bench, each, models, _CLIENTS) for each in alone]
        found = bench.rates({"both": together, "first": asked[0], "second": asked[1], "apart": [*asked[0][::2], *asked[1][1::2]]})
        raw[workload] = found | {"placed": _placed(both)}
        total = found["first"] + found["second"]
        figures[f"devices_sum_{workload}"] = found["both"] / total
        figures[f"devices_ceiling_{workload}"] = found["apart"] / total
        figures[f"devices_better_{workload}"] = found["both"] / max(found["first"], found["second"])
    for sidecar in (*alone, both):
        bench.end(sidecar)


def _placed(sidecar: Sidecar) -> dict[str, list[str]]:
    return {entry["name"]: entry["devices"] for entry in sidecar.admin.get("placement")["models"]}
