"""What HTTP costs: inference over the Open Inference Protocol, and what operators ask while functions are served.

Over HTTP (with the functions' own client) against the socket, and against the same model in a Flask function with torch; one
client, then eight; the admin endpoint asked without rest beside clients that never rest, and with many blocks. Variants of
one measurement take turns in short blocks.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import requests
import torch
from torch import nn

from benchmarks.comparators.admin_calls import ROUTES, session_of
from benchmarks.harness import Bench, Sidecar, free_port, interleaved
from benchmarks.models import SIDE, build
from benchmarks.report import Report, arguments, summary
from sidecar.bundle import Graph, graph_digest, write_bundle
from sidecar.export import PackedModel, convert

SHAPE = (1, 3, SIDE, SIDE)
CLIENTS = 8
Call = Callable[[], object]


class HttpBench(Bench):
    """One sidecar with an HTTP port, and functions that hold the same models themselves."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)
        self.image = np.random.default_rng(seed).random(SHAPE).astype(np.float32)
        # Every variant has one thread for a model; the sidecar's and the function's are never busy at the same time.
        torch.set_num_threads(1)
        self.ours = self.sidecar(port=free_port())

    def push(self, name: str) -> None:
        packed = convert(build(name, self.seed), (torch.zeros(SHAPE),), name=name)
        write_bundle(self.folder / name, packed.bundle, packed.blobs)
        self.ours.admin.push(self.folder / name)

    def flask(self, name: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start comparator A, and wait for its answer."""
        path = self.folder / f"{name}.pt"
        torch.save(build(name, self.seed).state_dict(), path)
        process, url = self.torch_function(name, [path], THREADS="1", OMP_NUM_THREADS="1")
        self.answers(url, self.image.tobytes())
        return process, url

    def variants(self, name: str, url: str) -> Mapping[str, Callable[[], Call]]:
        """Return what makes a client of each kind; clients of one kind run in threads of their own."""
        body = self.image.tobytes()

        def flask_client() -> Call:
            session = requests.Session()
            return lambda: session.post(url, data=body).raise_for_status()

        socket, http = self.ours.model(name), self.ours.model_over_http(name)
        # They may be served in one form and then in another.
        np.testing.assert_allclose(socket(self.image), http(self.image), rtol=1e-4, atol=1e-4)
        return {
            "socket": lambda: lambda: socket(self.image),
            "oip": lambda: lambda: http(self.image),
            "flask": flask_client,
        }


def one_client(bench: HttpBench, name: str, count: int) -> None:
    """One call at a time, 602 KB in, against the same forward in this process."""
    bench.push(name)
    process, url = bench.flask(name)
    model, image = build(name, bench.seed), torch.from_numpy(bench.image)

    def in_process() -> None:
        with torch.inference_mode():
            model(image)

    times = interleaved({"in_process": in_process} | {k: make() for k, make in bench.variants(name, url).items()}, count)
    bench.stop(process)
    found = {variant: summary(samples) for variant, samples in times.items()}
    bench.report.raw[f"one_client_us_{name}"] = found
    for variant in ("socket", "oip", "flask"):
        for quantile, shown in (("median", "p50"), ("p99", "p99")):
            added_us = found[variant][quantile] - found["in_process"][quantile]
            bench.report.figures[f"added_{shown}_us_{variant}_{name}"] = added_us
    bench.report.figures[f"oip_over_flask_p50_{name}"] = found["oip"]["median"] / found["flask"]["median"]


class Clients:
    """Threads that call without rest while they are let; ``times`` has how long each call took, in seconds."""

    def __init__(self, make: Callable[[], Call], count: int) -> None:
        self.times: list[float] = []
        self._going = threading.Event()
        self._ended = False
        self._threads = [threading.Thread(target=self._run, args=(make(),)) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def run(self, seconds: float) -> list[float]:
        """Let the clients call for so long; return the times of the calls that ended meanwhile."""
        self.times = []
        self._going.set()
        time.sleep(seconds)
        found = list(self.times)
        self._going.clear()
        return found

    def _run(self, call: Call) -> None:
        while True:
            self._going.wait()
            if self._ended:
                return
            began = time.perf_counter()
            call()
            self.times.append(time.perf_counter() - began)

    def close(self) -> None:
        self._ended = True
        self._going.set()
        for thread in self._threads:
            thread.join()


def eight_clients(bench: HttpBench, name: str, rounds: int, seconds: float) -> None:
    """Answers per second of eight clients that never rest."""
    process, url = bench.flask(name)
    clients = {variant: Clients(make, CLIENTS) for variant, make in bench.variants(name, url).items()}
    counts: dict[str, list[float]] = {variant: [] for variant in clients}
    for _ in range(rounds):
        for variant, each in clients.items():
            each.run(seconds / 4)
            counts[variant].append(len(each.run(seconds)) / seconds)
    for each in clients.values():
        each.close()
    bench.stop(process)
    bench.report.raw[f"per_s_{CLIENTS}_clients_{name}"] = counts
    rates = {variant: float(np.median(found)) for variant, found in counts.items()}
    for variant, rate in rates.items():
        bench.report.figures[f"per_s_{variant}_{name}_k{CLIENTS}"] = rate
    bench.report.figures[f"oip_over_flask_throughput_{name}_k{CLIENTS}"] = rates["oip"] / rates["flask"]
    bench.report.figures[f"oip_over_socket_throughput_{name}_k{CLIENTS}"] = rates["oip"] / rates["socket"]


# What a Prometheus, an open page and a `trunkline top` ask together, about: a call each quarter of a second.
PACED_S = 0.25


def beside_admin_calls(bench: HttpBench, name: str, rounds: int, seconds: float, *, rest_s: float) -> None:
    """Calls over the socket by clients that never rest, with and without a process that asks the admin endpoint.

    That rests for ``rest_s`` after each call; without rest, it takes a core from whoever else wants one.
    """
    model = bench.ours.model(name)
    clients = Clients(lambda: lambda: model(bench.image), os.cpu_count() or 1)
    command = [sys.executable, "-m", "benchmarks.comparators.admin_calls", str(bench.ours.admin_socket), str(rest_s)]
    caller = bench.start(command, talks=True)
    assert caller.stdin is not None
    assert caller.stdout is not None
    times: dict[str, list[float]] = {"alone": [], "beside": []}
    asked = 0
    clients.run(seconds)
    for _ in range(rounds):
        times["alone"] += clients.run(seconds)
        caller.stdin.write(b"begin\n")
        caller.stdin.flush()
        times["beside"] += clients.run(seconds)
        caller.stdin.write(b"end\n")
        caller.stdin.flush()
        asked += int(caller.stdout.readline())
    clients.close()
    bench.stop(caller)
    found = {variant: summary([1e6 * each for each in samples]) for variant, samples in times.items()}
    kind = "admin" if rest_s else "restless_admin"
    bench.report.raw[f"beside_{kind}_calls_us_{name}"] = found
    figures = bench.report.figures
    figures[f"{kind}_calls_per_s"] = asked / (rounds * seconds)
    for quantile, shown in (("median", "p50"), ("p99", "p99")):
        figures[f"{kind}_{shown}_ratio"] = found["beside"][quantile] / found["alone"][quantile]
    figures[f"{kind}_throughput_ratio"] = found["beside"]["n"] / found["alone"]["n"]


class Chain(nn.Module):
    """Layers of 256 KiB, each a block of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(256, 256, bias=False), nn.ReLU())))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x)


def many_blocks(bench: HttpBench, models: int, layers: int, count: int) -> None:
    """What is asked of a sidecar that holds ``models`` times ``layers`` blocks, none of them alike."""
    sidecar = bench.sidecar("many", TRUNKLINE_PACKING="off", TRUNKLINE_MEMORY_BUDGET_BYTES="256MiB")
    packed = convert(Chain(layers), (torch.zeros(1, 256),), name="chain0")
    for number in range(models):
        push_altered(bench.folder, sidecar, packed, number)
    bench.report.figures["many_blocks"] = sidecar.admin.get("blocks?limit=1")["total"]
    ask = session_of(sidecar.admin_socket)
    # Others are asked for by operators, and by the page.
    for route in (*ROUTES, "/admin/v1/graph", "/"):
        (times,) = interleaved({route: lambda route=route: ask(route)}, count).values()
        found, name = summary(times), route.rpartition("/")[2] or "page"
        bench.report.raw[f"many_blocks_us_{name}"] = found
        bench.report.figures[f"many_blocks_p50_ms_{name}"] = found["median"] / 1000


def push_altered(folder: Path, sidecar: Sidecar, packed: PackedModel, number: int) -> None:
    """Push a model with weights of its own: those of ``packed``, with its number in the first bytes."""
    name = f"chain{number}"
    contents = {}
    weights = []
    for position, (_, content) in enumerate(packed.blobs):
        altered = np.array([number, position], np.int32).tobytes() + bytes(content)[8:]
        digest = hashlib.sha256(altered).hexdigest()
        weights.append(replace(packed.bundle.graph.weights[position], digest=digest, crc32=zlib.crc32(altered)))
        contents[digest] = altered
    graph: Graph = replace(packed.bundle.graph, weights=tuple(weights))
    bundle = replace(packed.bundle, name=name, graph=graph, graph_digest=graph_digest(graph))
    write_bundle(folder / name, bundle, contents.items())
    sidecar.admin.push(folder / name)


def main() -> None:
    chosen = arguments(__doc__ or "")
    report = Report("http", chosen.quick, chosen.device)
    with HttpBench(report, chosen.seed) as bench:
        if chosen.quick:
            one_client(bench, "tiny", 40)
            eight_clients(bench, "tiny", 2, 0.6)
            beside_admin_calls(bench, "tiny", 3, 0.5, rest_s=PACED_S)
            beside_admin_calls(bench, "tiny", 3, 0.5, rest_s=0)
            many_blocks(bench, 3, 4, 10)
            report.lack("left out of --quick", "added_p50_us_oip_mobilenet", "per_s_oip_mobilenet_k8", "10,000 blocks")
        else:
            for name in ("tiny", "mobilenet"):
                one_client(bench, name, 2000 if name == "tiny" else 300)
                eight_clients(bench, name, 6, 3.0)
            beside_admin_calls(bench, "mobilenet", 20, 3.0, rest_s=PACED_S)
            beside_admin_calls(bench, "mobilenet", 6, 3.0, rest_s=0)
            many_blocks(bench, 500, 20, 50)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
