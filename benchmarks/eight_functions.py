"""End to end: eight functions with heads of their own on one trunk, eight clients, over HTTP.

Comparators: A, eight functions with private models, with torch's default threads and with one each; and one process that
holds all eight models.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import nn

from benchmarks.report import summary
from benchmarks.siblings import Family
from benchmarks.variants import VariantBench


def _load(urls: Sequence[str], bodies: Sequence[bytes], count: int) -> tuple[float, list[float]]:
    """Have a client for each URL send its body ``count`` times; return seconds in all and milliseconds of each request."""
    barrier = threading.Barrier(len(urls) + 1)

    def client(url: str, body: bytes) -> list[float]:
        parts = urlsplit(url)
        connection = http.client.HTTPConnection(parts.netloc, timeout=120)
        connection.connect()
        barrier.wait()
        found = []
        for _ in range(count):
            started = time.perf_counter()
            connection.request("POST", parts.path, body)
            answer = connection.getresponse()
            answer.read()
            found.append((time.perf_counter() - started) * 1000)
            if answer.status != 200:
                raise RuntimeError(f"{url} answered {answer.status}")
        connection.close()
        return found

    with ThreadPoolExecutor(len(urls)) as threads:
        futures = [threads.submit(client, *pair) for pair in zip(urls, bodies, strict=True)]
        barrier.wait()
        started = time.perf_counter()
        found = [each for future in futures for each in future.result()]
        return time.perf_counter() - started, found


def eight_functions(
    bench: VariantBench, family: Family, architecture: str, named: dict[str, nn.Module], rounds: int, count: int
) -> None:
    """Requests per second and latencies, in short blocks that take turns."""
    weights = []
    for name, model in named.items():
        weights.append(bench.folder / f"{name}.pt")
        torch.save({key: tensor.cpu() for key, tensor in model.state_dict().items()}, weights[-1])
    device = {"DEVICE": bench.report.device}
    single = {"OMP_NUM_THREADS": "1", "THREADS": "1"}
    started = {
        "ours": [bench.thin_function(name, bench.on, INPUT="x") for name in named],
        "default_threads": [bench.torch_function(architecture, [path], **device) for path in weights],
        "one_thread": [bench.torch_function(architecture, [path], **device, **single) for path in weights],
        "one_process": [bench.torch_function(architecture, weights, **device)],
    }
    urls = {variant: [url for _, url in functions] for variant, functions in started.items()}
    urls["one_process"] = [f"{urls['one_process'][0]}{number or ''}" for number in range(len(named))]
    arrays = [bench.random(family, number) for number in range(len(named))]
    bodies = [array.tobytes() for array in arrays]
    expected = bench.eager(list(named.values()), arrays)
    for functions in urls.values():
        for url, body, scores in zip(functions, bodies, expected, strict=True):
            found = np.frombuffer(bench.answers(url, body), np.float32)
            np.testing.assert_allclose(found, scores[0], rtol=0, atol=2e-3 * float(np.abs(scores).max()))
    sent = dict.fromkeys(urls, bodies)
    urls["ours_same_input"], sent["ours_same_input"] = urls["ours"], bodies[:1] * len(bodies)
    elapsed_s = dict.fromkeys(urls, 0.0)
    latencies: dict[str, list[float]] = {variant: [] for variant in urls}
    for number in range(rounds + 1):
        for variant, functions in urls.items():
            seconds, found_ms = _load(functions, sent[variant], count)
            if number:  # the first round warms up
                elapsed_s[variant] += seconds
                latencies[variant] += found_ms
    for functions in started.values():
        for process, _ in functions:
            bench.stop(process)
    rates = {variant: len(latencies[variant]) / elapsed_s[variant] for variant in urls}
    best = max(("default_threads", "one_thread", "one_process"), key=rates.__getitem__)
    latency_ms = {variant: summary(found) for variant, found in latencies.items()}
    bench.report.raw["eight_functions"] = {"requests_per_s": rates, "best_comparator": best, "latency_ms": latency_ms}
    figures = bench.report.figures
    figures["eight_functions_speedup"] = rates["ours"] / rates[best]
    figures["eight_functions_same_input_speedup"] = rates["ours_same_input"] / rates[best]
    figures["eight_functions_p99_ratio"] = latency_ms["ours"]["p99"] / latency_ms[best]["p99"]
