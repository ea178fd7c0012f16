"""What `benchmarks.tenancy` measures on: sidecars of different settings, the models they hold, and clients that never rest."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Bench, Sidecar
from benchmarks.models import encoder, resnet
from benchmarks.report import Report
from benchmarks.siblings import Family
from sidecar.tenants import qualified

MOST_CLIENTS = 16
_TOKENS = 32


@dataclass(frozen=True)
class Scale:
    """How much one run does. A client asks ``seconds`` long, ``rounds`` times, in turns with the other variants."""

    side: int
    width: int
    units: int
    encoder_width: int
    encoder_layers: int
    # Unrelated models of each architecture.
    models: int
    clients: tuple[int, ...]
    rounds: int
    seconds: float


QUICK = Scale(64, 16, 1, 128, 2, 1, (1, 4), 2, 0.2)
FULL = Scale(224, 64, 2, 384, 6, 2, (1, 2, 4, 8, 16), 4, 1.5)


class TenancyBench(Bench):
    """Unrelated convolutional networks and transformer encoders, as many of each, with inputs for every client."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)
        self.scale = QUICK if report.quick else FULL
        self.threads = os.cpu_count() or 1  # as many as a sidecar takes by default
        torch.set_num_threads(self.threads)
        image, words = torch.zeros(1, 3, self.scale.side, self.scale.side), torch.zeros(1, _TOKENS, dtype=torch.int64)
        self.families: dict[str, Family] = {}
        for number in range(self.scale.models):
            convolutional = resnet(self.scale.width, self.scale.units)
            self.families[f"conv{number}"] = Family(convolutional, image, seed + 1 + number)
            width, layers = self.scale.encoder_width, self.scale.encoder_layers
            transformer = encoder(width, width // 32, layers, _TOKENS)
            self.families[f"text{number}"] = Family(transformer, words, seed + 3 + number, {"x": (0, 8191)})
        self.inputs = {
            name: [self._input(family, number) for number in range(MOST_CLIENTS)] for name, family in self.families.items()
        }

    def start_sidecar(
        self, name: str = "ours", threads: int = 1, *, store: str | None = None, device: str = "", **environment: str
    ) -> Sidecar:
        """Start a sidecar; in a quick run one that packs no weights, since to try that out takes longer than all else."""
        if self.report.quick:
            environment = {"TRUNKLINE_PACKING": "off"} | environment
        return super().start_sidecar(name, threads, store=store, device=device, **environment)

    def _input(self, family: Family, number: int) -> np.ndarray:
        generator = np.random.default_rng(1000 * self.seed + number)
        shape = tuple(family.example.shape)
        if family.example.is_floating_point():
            return generator.standard_normal(shape, np.float32)
        return generator.integers(0, 8191, shape, np.int64, endpoint=True)

    def fill(self, *sidecars: Sidecar) -> None:
        """Have sidecars hold all the models, tried and in memory, and compare each one's first answer with torch's."""
        for sidecar in sidecars:
            self.until(partial(sidecar.admin.get, "status"))
        self.push(self.families, dict.fromkeys(sidecars, ""))
        for model, family in self.families.items():
            for sidecar in sidecars:
                _check(sidecar.model(model)(self.inputs[model][0]), family.base, self.inputs[model][0])

    def push(self, families: Mapping[str, Family], sidecars: Mapping[Sidecar, str]) -> None:
        """Have sidecars hold models, and wait until they are tried in the domain that is named beside each; "" for none."""
        for model, family in families.items():
            folder = self.folder / "bundle"
            family.write(folder, model, family.base)
            for sidecar in sidecars:
                sidecar.admin.push(folder)
            shutil.rmtree(folder)
        for model in families:
            for sidecar, domain in sidecars.items():
                self.until(partial(_is_tried, sidecar, qualified(model, domain)))

    def rates(self, variants: Mapping[str, Sequence[Callable[[], object]]]) -> dict[str, float]:
        """Return the answers per second of each variant, whose clients ask again and again. Variants take turns."""
        answered, elapsed = dict.fromkeys(variants, 0), dict.fromkeys(variants, 0.0)
        for number in range(self.scale.rounds + 1):
            for name, clients in variants.items():
                count, seconds = closed_loop(clients, self.scale.seconds)
                if number:  # the first round warms up
                    answered[name] += count
                    elapsed[name] += seconds
        return {name: answered[name] / elapsed[name] for name in variants}


def closed_loop(clients: Sequence[Callable[[], object]], seconds: float) -> tuple[int, float]:
    """Have each client ask again and again, in a thread of its own; return the answers, and the seconds to the last of them."""
    barrier = threading.Barrier(len(clients) + 1)

    def ask(client: Callable[[], object]) -> int:
        barrier.wait()
        count, ends_at = 0, time.perf_counter() + seconds
        while time.perf_counter() < ends_at:
            client()
            count += 1
        return count

    with ThreadPoolExecutor(len(clients)) as threads:
        asked = [threads.submit(ask, client) for client in clients]
        barrier.wait()
        started = time.perf_counter()
        count = sum(each.result() for each in asked)
        return count, time.perf_counter() - started


def _is_tried(sidecar: Sidecar, name: str) -> bool:
    return bool(sidecar.admin.get(f"models/{name}")["tried"])


def _check(found: object, model: nn.Module, array: np.ndarray) -> None:
    with torch.inference_mode():
        expected = model(torch.from_numpy(array)).numpy()
    np.testing.assert_allclose(np.asarray(found), expected, rtol=0, atol=2e-3 * float(np.abs(expected).max()))
