"""Thin functions against functions that hold their model: added latency, HTTP end to end, memory, cold start.

Comparators: A, a Flask function with a private copy of its model; A mapped, the same over a memory-mapped file; B, the same over
shared memory, torch in every process (ShmFaas); H, the tensor sent over a Unix stream socket, or as JSON over HTTP; and the
floor of our own wire, the same system calls and the same copy with nothing around them. Variants of one measurement take
turns in short blocks, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import requests
import torch
from trunkline import client

from benchmarks.comparators.bare_wire import BareClient
from benchmarks.comparators.stream_server import REQUEST_BYTES, receive
from benchmarks.harness import Bench, interleaved
from benchmarks.memory import available_bytes, pss_bytes
from benchmarks.models import SIDE, SIZES_MB, build
from benchmarks.report import Report, arguments, summary
from sidecar.bundle import write_bundle
from sidecar.export import convert

SHAPE = (1, 3, SIDE, SIDE)


class ThinBench(Bench):
    """One sidecar, models by name, and functions that hold private, mapped or shared copies of them."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)
        self.shared = Path(tempfile.mkdtemp(prefix="trunkline-bench-", dir="/dev/shm"))
        self.image = np.random.default_rng(seed).random(SHAPE).astype(np.float32)
        self._weights: dict[str, Path] = {}
        self.ours = self.sidecar()

    def close(self) -> None:
        super().close()
        shutil.rmtree(self.shared, ignore_errors=True)

    def push(self, name: str) -> None:
        packed = convert(build(name, self.seed), (torch.zeros(SHAPE),), name=name)
        write_bundle(self.folder / name, packed.bundle, packed.blobs)
        self.ours.admin.push(self.folder / name)
        shutil.rmtree(self.folder / name)

    def thin(self, name: str) -> tuple[subprocess.Popen[bytes], str]:
        return self.thin_function(name, self.ours)

    def holding(self, name: str, copies: str) -> tuple[subprocess.Popen[bytes], str]:
        return self.torch_function(name, [self.weights(name)], copies, THREADS="1", OMP_NUM_THREADS="1")

    def weights(self, name: str) -> Path:
        """Return the state dict of a model, its shared segment beside it (a link into shared memory)."""
        if name not in self._weights:
            path = self.folder / f"{name}.pt"
            state = build(name, self.seed).state_dict()
            torch.save(state, path)
            segment = self.shared / f"{name}.segment"
            with segment.open("wb") as file:
                for tensor in state.values():
                    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
                    file.write(content + bytes(-len(content) % 64))
            os.symlink(segment, f"{path}.segment")
            self._weights[name] = path
        return self._weights[name]

    def scores(self, url: str) -> np.ndarray:
        """Wait for a function's first right answer and return it."""
        return np.frombuffer(self.answers(url, self.image.tobytes()), np.float32)


def added_latency(bench: ThinBench, count: int) -> None:
    """One call of a model that costs next to nothing, against the same forward in this process."""
    report = bench.report
    model = build("tiny", bench.seed)
    image = bench.image
    torch.set_num_threads(1)
    expected = model(torch.from_numpy(image)).detach().numpy()
    bench.push("tiny")
    ours = bench.ours.model("tiny")
    np.testing.assert_array_equal(ours(image), expected)

    def in_process() -> None:
        with torch.inference_mode():
            model(torch.from_numpy(image)).numpy()

    stream_path = bench.folder / "stream.sock"
    stream = bench.start(
        [sys.executable, "-m", "benchmarks.comparators.stream_server", str(stream_path), "tiny", str(bench.seed), "1"]
    )
    bench.until(stream_path.exists)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(stream_path))
    scores = bytearray(expected.nbytes)

    def over_stream() -> None:
        connection.sendall(image.data.cast("B"))
        receive(connection, memoryview(scores))

    bare_path = bench.folder / "bare.sock"
    bare_server = bench.start(
        [sys.executable, "-m", "benchmarks.comparators.bare_wire", str(bare_path), "tiny", str(bench.seed), "1"]
    )
    bench.until(bare_path.exists)
    bare = BareClient(str(bare_path))
    bare.request[: image.nbytes] = image.tobytes()
    bare.call()
    np.testing.assert_array_equal(np.frombuffer(bare.reply, np.float32, expected.size).reshape(1, -1), expected)

    over_stream()
    np.testing.assert_array_equal(np.frombuffer(scores, np.float32).reshape(1, -1), expected)
    assert image.nbytes == REQUEST_BYTES

    counts: dict[str, float] = {}
    with ours.request() as request:
        request["image"][...] = image

        def written_in_place() -> None:
            request.run()

        before = client.counters()
        written_in_place()
        counts["request"] = client.counters()["input_copies"] - before["input_copies"]
        before = client.counters()
        ours(image)
        counts["call"] = client.counters()["input_copies"] - before["input_copies"]
        times = interleaved(
            {
                "in_process": in_process,
                "request": written_in_place,
                "call": lambda: ours(image),
                "unix_stream": over_stream,
                "bare_wire": bare.call,
            },
            count,
        )
    connection.close()
    bare.socket.close()
    bench.stop(stream)
    bench.stop(bare_server)
    process, url = bench.holding("tiny", "private")
    bench.scores(url)
    session = requests.Session()
    plain = image.tolist()
    times |= interleaved({"http_json": lambda: session.post(url + "json", json=plain).raise_for_status()}, max(3, count // 50))
    bench.stop(process)
    summaries = {name: summary(samples) for name, samples in times.items()}
    report.raw["added_latency_us"] = summaries
    base = summaries["in_process"]
    for name in ("request", "call"):
        report.figures[f"added_p50_us_{name}"] = summaries[name]["median"] - base["median"]
        report.figures[f"added_p99_us_{name}"] = summaries[name]["p99"] - base["p99"]
        # What the client copied, and the sidecar's one private copy.
        report.figures[f"copies_{name}"] = counts[name] + 1
    report.figures["bare_wire_added_p50_us"] = summaries["bare_wire"]["median"] - base["median"]
    report.figures["unix_stream_added_p50_us"] = summaries["unix_stream"]["median"] - base["median"]
    report.figures["http_json_added_p50_us"] = summaries["http_json"]["median"] - base["median"]


def end_to_end(bench: ThinBench, count: int) -> None:
    """Raw bytes over HTTP, one client: a thin function against A, on the same model."""
    bench.push("mobilenet")
    ours, ours_url = bench.thin("mobilenet")
    private, private_url = bench.holding("mobilenet", "private")
    np.testing.assert_allclose(bench.scores(ours_url), bench.scores(private_url), rtol=1e-4, atol=1e-4)
    body = bench.image.tobytes()
    session = requests.Session()
    model = build("mobilenet", bench.seed)
    torch.set_num_threads(1)

    def forward() -> None:
        with torch.inference_mode():
            model(torch.from_numpy(bench.image))

    times = interleaved(
        {
            "ours": lambda: session.post(ours_url, data=body).raise_for_status(),
            "private": lambda: session.post(private_url, data=body).raise_for_status(),
            "forward": forward,
        },
        count,
    )
    bench.stop(ours)
    bench.stop(private)
    summaries = {name: summary(samples) for name, samples in times.items()}
    bench.report.raw["http_us"] = summaries
    figures = bench.report.figures
    figures["http_e2e_over_private_ms"] = (summaries["ours"]["median"] - summaries["private"]["median"]) / 1000
    figures["http_e2e_over_forward_ms"] = (summaries["ours"]["median"] - summaries["forward"]["median"]) / 1000
    figures["private_over_forward_ms"] = (summaries["private"]["median"] - summaries["forward"]["median"]) / 1000


def memory_of(bench: ThinBench, start: Callable[[], tuple[subprocess.Popen[bytes], str]], counts: list[int]) -> dict[int, int]:
    """Start functions up to each count, let each answer once, return the PSS of all of them."""
    running: list[subprocess.Popen[bytes]] = []
    found = {}
    for count in counts:
        while len(running) < count:
            process, url = start()
            running.append(process)
            bench.scores(url)
        found[count] = pss_bytes(process.pid for process in running)
    for process in running:
        bench.stop(process)
    return found


def memory(bench: ThinBench, names: list[str], counts: list[int], comparators: list[str]) -> None:
    """PSS of N functions and the sidecar, against A, A mapped and B."""
    report = bench.report
    table: dict[str, dict[str, dict[int, float]]] = {}
    for name in names:
        size = f"{SIZES_MB[name]}mb"
        if name not in [model["name"] for model in bench.ours.admin.get("models")["models"]]:
            bench.push(name)
        for other in bench.ours.admin.get("models")["models"]:
            bench.ours.admin.post(f"models/{other['name']}/evict")
        thin = memory_of(bench, lambda name=name: bench.thin(name), counts)
        # An idle sidecar gives back what its last runs left in the allocator.
        time.sleep(2)
        shared_bytes = pss_bytes([bench.ours.process.pid])
        table[size] = {"ours": {n: (pss + shared_bytes) / 1e6 for n, pss in thin.items()}}
        table[size]["functions_only"] = {n: pss / 1e6 for n, pss in thin.items()}
        for copies in comparators:
            needed = counts[-1] * (SIZES_MB[name] * 1e6 + 200e6)
            if copies == "private" and needed > 0.8 * available_bytes():
                report.lack(f"{counts[-1]} private copies need {needed / 1e9:.0f} GB", f"pss_saved_n{counts[-1]}_{size}")
                continue
            found = memory_of(bench, lambda name=name, copies=copies: bench.holding(name, copies), counts)
            table[size][copies] = {n: pss / 1e6 for n, pss in found.items()}
        for n in counts:
            for copies, figure in (
                ("private", "pss_saved"),
                ("mapped", "pss_saved_vs_mapped"),
                ("shared", "pss_saved_vs_shared"),
            ):
                if copies in table[size]:
                    report.figures[f"{figure}_n{n}_{size}"] = 1 - table[size]["ours"][n] / table[size][copies][n]
        if len(counts) > 1:
            few, many = counts[0], counts[-1]
            report.figures[f"pss_per_function_mb_{size}"] = (
                table[size]["functions_only"][many] - table[size]["functions_only"][few]
            ) / (many - few)
    report.raw.setdefault("pss_mb", {}).update(
        {size: {who: {str(n): v for n, v in row.items()} for who, row in rows.items()} for size, rows in table.items()}
    )
    per_function = [value for name, value in report.figures.items() if name.startswith("pss_per_function_mb_")]
    if per_function:
        report.figures["pss_per_function_mb"] = max(per_function)


def cold_start(bench: ThinBench, count: int) -> None:
    """Process start to the first right answer, while the sidecar holds the model, against A."""
    name = "resnet50" if any(m["name"] == "resnet50" for m in bench.ours.admin.get("models")["models"]) else "mobilenet"
    bench.ours.admin.post(f"models/{name}/load")
    times: dict[str, list[float]] = {"ours": [], "private": []}
    starters = {"ours": lambda: bench.thin(name), "private": lambda: bench.holding(name, "private")}
    bench.weights(name)
    for repetition in range(count + 1):
        for who, start in starters.items():
            started = time.perf_counter()
            process, url = start()
            bench.scores(url)
            if repetition:  # the first fills caches
                times[who].append(time.perf_counter() - started)
            bench.stop(process)
    summaries = {who: summary(samples) for who, samples in times.items()}
    bench.report.raw["cold_start_s"] = summaries | {"model": name}
    bench.report.figures["cold_start_s"] = summaries["ours"]["median"]
    bench.report.figures["cold_start_speedup"] = summaries["private"]["median"] / summaries["ours"]["median"]


def main() -> None:
    chosen = arguments(__doc__ or "")
    report = Report("thin", chosen.quick, chosen.device)
    with ThinBench(report, chosen.seed) as bench:
        added_latency(bench, 60 if chosen.quick else 2000)
        end_to_end(bench, 10 if chosen.quick else 300)
        if chosen.quick:
            memory(bench, ["mobilenet"], [1, 2], ["private"])
            report.lack(
                "left out of --quick",
                *("pss_saved_n5_103mb", "pss_saved_n20_103mb", "pss_saved_n20_553mb", "pss_saved_vs_shared_n5_103mb"),
            )
        else:
            memory(bench, ["mobilenet", "resnet50"], [1, 5, 10, 20], ["private", "mapped", "shared"])
            memory(bench, ["vgg16"], [1, 5, 10, 20], ["private", "shared"])
        cold_start(bench, 1 if chosen.quick else 7)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
