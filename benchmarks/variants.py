"""Sidecars side by side that differ in which forms of sharing are on, and the same models in torch, eager, beside them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.harness import Bench, Sidecar
from benchmarks.memory import pss_bytes
from benchmarks.report import Report
from benchmarks.siblings import Family

# What switches each form of sharing off; all are on by default.
SWITCHES = {
    "batching": {"TRUNKLINE_BATCH_LIMIT": "1"},
    "compute_once": {"TRUNKLINE_COMPUTE_ONCE": "off"},
    "packing": {"TRUNKLINE_PACKING": "off"},
    "stacking": {"TRUNKLINE_STACKING": "off"},
}
# `plain` keeps the packed form, which has nothing to do with sharing.
PLAIN = ("batching", "compute_once", "stacking")
QUICK_VARIANTS = ("on", "plain", "no_packing", "no_stacking")
AT_ONCE = 8  # models that one call may name
Call = Callable[[], object]


def asking(model: Callable[[np.ndarray], object], array: np.ndarray) -> Call:
    """Return one call of a model, or of several as one."""
    return lambda: model(array)


def _is_tried(sidecar: Sidecar, name: str) -> bool:
    """Say whether a sidecar has seen how a model is served best; until then it serves it as it is."""
    return bool(sidecar.admin.get(f"models/{name}")["tried"])


class VariantBench(Bench):
    """``sidecars`` by variant: ``on``, ``plain`` (nothing is shared but bytes), and one with each switch off."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)
        self.threads = os.cpu_count() or 1  # as many as a sidecar takes by default
        torch.set_num_threads(self.threads)
        self.device = torch.device(report.device)
        off: dict[str, tuple[str, ...]] = {"on": (), "plain": PLAIN, **{f"no_{switch}": (switch,) for switch in SWITCHES}}
        chosen = QUICK_VARIANTS if report.quick else tuple(off)
        self.sidecars: dict[str, Sidecar] = {}
        for variant in chosen:
            settings = {key: value for switch in off[variant] for key, value in SWITCHES[switch].items()}
            self.sidecars[variant] = self.start_sidecar(variant, self.threads, **settings)
        self._threads = ThreadPoolExecutor(64)
        self.idle_pss_bytes = 0

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        super().close()

    @property
    def on(self) -> Sidecar:
        return self.sidecars["on"]

    @property
    def forms(self) -> dict[str, Sidecar]:
        """The sidecar with all forms of sharing, and those with one form off."""
        return {variant: sidecar for variant, sidecar in self.sidecars.items() if variant != "plain"}

    def wait(self) -> None:
        """Wait until all sidecars answer."""
        for sidecar in self.sidecars.values():
            self.until(partial(sidecar.admin.get, "status"))
        self.idle_pss_bytes = pss_bytes([self.on.process.pid])

    def random(self, family: Family, number: int = 0) -> np.ndarray:
        """Return an input for a family's models; each ``number`` has another one."""
        generator = np.random.default_rng(1000 * self.seed + number)
        shape = tuple(family.example.shape)
        if family.example.is_floating_point():
            return generator.standard_normal(shape, np.float32)
        low, high = family.graph.inputs[0].minimum, family.graph.inputs[0].maximum
        return generator.integers(low, high, shape, np.int64, endpoint=True)

    def push(self, family: Family, named: dict[str, nn.Module], sidecars: Iterable[Sidecar] | None = None) -> None:
        """Push models to sidecars (None: to all), and compare each one's first answer with torch's."""
        sidecars = list(self.sidecars.values() if sidecars is None else sidecars)
        array = self.random(family)
        for name, model in named.items():
            folder = self.folder / "bundle"
            family.write(folder, name, model)
            expected = self.eager([model.to(self.device)], [array])[0]
            for sidecar in sidecars:
                sidecar.admin.push(folder)
                self.until(partial(_is_tried, sidecar, name))
                found = sidecar.model(name)(array)
                np.testing.assert_allclose(found, expected, rtol=0, atol=2e-3 * float(np.abs(expected).max()))
            shutil.rmtree(folder)

    def eager(self, models: Sequence[nn.Module], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return what models give, one after another, each with an input of its own."""
        with torch.inference_mode():
            return [
                model(torch.from_numpy(array).to(self.device)).cpu().numpy() for model, array in zip(models, arrays, strict=True)
            ]

    def one_by_one(self, models: Sequence[nn.Module], arrays: Sequence[np.ndarray]) -> Call:
        """Return the requests of ``eager`` as one call, the models on the device."""
        held = [model.to(self.device) for model in models]
        return lambda: self.eager(held, arrays)

    def together(self, calls: Sequence[Call]) -> Call:
        """Return several calls, made at the same time by a thread each, as one that ends with the last of them."""

        def call() -> None:
            for future in [self._threads.submit(each) for each in calls]:
                future.result()

        return call

    def in_calls(self, sidecar: Sidecar, names: Sequence[str], array: np.ndarray) -> Call:
        """Return models asked about one input in calls of up to eight, all calls in flight at once."""
        groups = [sidecar.models(*names[at : at + AT_ONCE]) for at in range(0, len(names), AT_ONCE)]
        return self.together([asking(group, array) for group in groups])

    def by_clients(self, sidecar: Sidecar, names: Sequence[str], arrays: Sequence[np.ndarray]) -> Call:
        """Return models asked at the same time by a client each."""
        return self.together([asking(sidecar.model(name), array) for name, array in zip(names, arrays, strict=True)])

    def counts(self, sidecar: Sidecar) -> dict[str, Any]:
        """Return a sidecar's counters: what stays the same however fast the machine is."""
        status: dict[str, Any] = sidecar.admin.get("status")
        return {key: value for key, value in status.items() if key != "models"}
