"""What `benchmarks.swap` measures on: the tasks in one store, sidecars with several budgets on it, and the comparators."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from benchmarks.comparators.swappers import store
from benchmarks.harness import Bench, Sidecar
from benchmarks.report import Report
from benchmarks.siblings import Family
from benchmarks.swap_tasks import FULL, QUICK, SIBLING, Task
from sidecar.admin_client import AdminClient
from sidecar.disk import calibrate
from sidecar.segment import LEDGER_END, SHARED_MEMORY, segment_name

STORE = "swap"
# Room for everything, and for what else is measured.
_ENOUGH_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Scale:
    """How much one run does."""

    divisors: tuple[float, ...]
    batches: tuple[int, ...]
    rounds: int
    zipf_requests: int
    restarts: int
    # The task that is run in ever larger batches, and asked first after a restart.
    batched: str


QUICK_SCALE = Scale(divisors=(2.32,), batches=(1, 4), rounds=3, zipf_requests=24, restarts=1, batched="encoder")
FULL_SCALE = Scale(
    divisors=(1.5, 2.32, 4, 5.81), batches=(1, 2, 4, 8, 16), rounds=6, zipf_requests=66, restarts=3, batched="resnet50"
)


class Swap(Bench):
    """``resident`` has memory for everything, and everything in it. ``resident_bytes`` is what that takes."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)
        self.scale = QUICK_SCALE if report.quick else FULL_SCALE
        self.tasks: dict[str, Task] = QUICK if report.quick else FULL
        self.threads = os.cpu_count() or 1  # as many as a sidecar takes by default
        torch.set_num_threads(self.threads)
        self.inputs = {name: self._random(task) for name, task in self.tasks.items()}
        self.expected: dict[str, np.ndarray] = {}
        self.resident = self.open("resident", _ENOUGH_BYTES)
        self.weights = self.folder / "weights"
        self.resident_bytes = 0
        self.source = ""
        self.bytes_per_s = 0.0

    def prepare(self) -> None:
        """Convert, push and try all tasks; to be called before all else."""
        self.weights.mkdir()
        for number, (name, task) in enumerate(self.tasks.items()):
            # Seeds of their own: else all that begin with a convolution of one size would begin with the same weights.
            self._prepare(name, task, self.seed + 100 * number)
        self._put_on_disk()
        self.resident_bytes = self.resident.admin.get("memory")["resident_bytes"]
        self.measure_disk()
        self._comparators = self._start_comparators()

    def _random(self, task: Task) -> np.ndarray:
        if task.tokens:
            return np.random.default_rng(self.seed).integers(0, task.words, (1, task.tokens), np.int64)
        return np.random.default_rng(self.seed).standard_normal(tuple(task.example.shape), np.float32)

    def _prepare(self, name: str, task: Task, seed: int) -> None:
        """Convert a task and push it; keep its weights for the comparators."""
        max_batch = max(self.scale.batches) if name == self.scale.batched else 2
        family = Family(task.build(), task.example, seed, task.bounds, max_batch)
        named = {name: family.base}
        if name == SIBLING:
            named["sibling"] = family.with_head(seed + 1)
        for each, model in named.items():
            folder = self.folder / "bundle"
            family.write(folder, each, model)
            self.resident.admin.push(folder)
            shutil.rmtree(folder)
            with torch.inference_mode():
                self.expected[each] = model(torch.from_numpy(self.inputs[name])).numpy()
        self.inputs.setdefault("sibling", self.inputs[SIBLING])
        store(family.base, self.weights / name)
        if name == self.scale.batched:
            torch.save(family.base.state_dict(), self.weights / f"{name}.pt")
        np.save(self.weights / f"{name}.npy", self.inputs[name])

    def _put_on_disk(self) -> None:
        """Wait until all was tried, and is read from block files alone; all but the sibling stays in memory."""
        for name in self.expected:
            self.until(partial(self._is_on_disk, name), 600)
            self.check(name, self.resident.model(name)(self.inputs[name]))
        self.resident.admin.post("models/sibling/evict")

    def _is_on_disk(self, name: str) -> bool:
        admin = self.resident.admin
        if not admin.get(f"models/{name}")["tried"]:
            time.sleep(0.1)
            return False
        admin.post(f"models/{name}/evict")
        before = admin.get("memory")["store_bytes"]
        admin.post(f"models/{name}/load")
        return bool(admin.get("memory")["store_bytes"] == before)

    def check(self, name: str, found: np.ndarray) -> None:
        """Compare an answer, or its first values, with torch's."""
        expected = self.expected[name].reshape(-1)
        tolerance = 2e-3 * float(np.abs(expected).max())
        flat = np.asarray(found).reshape(-1)
        np.testing.assert_allclose(flat, expected[: len(flat)], rtol=0, atol=tolerance, err_msg=name)

    def measure_disk(self) -> None:
        """Measure how fast the disk is now. The fastest that was seen counts: the floor is nobody's excuse."""
        found = calibrate(self.folder / "disk", is_strict=True)
        self.source = self.source or found.source.name
        self.bytes_per_s = max(self.bytes_per_s, *found.bytes_per_s.values())
        self.report.raw.setdefault("disk_bytes_per_s", []).append(found.bytes_per_s)

    def open(self, name: str, budget_bytes: int) -> Sidecar:
        """Start a sidecar with a budget on the common store."""
        return self.sidecar(name, self.threads, store=STORE, TRUNKLINE_MEMORY_BUDGET_BYTES=str(budget_bytes))

    @property
    def scale_name(self) -> str:
        return "quick" if self.report.quick else "full"

    # --- asking ------------------------------------------------------------------------------------------------------

    def timed(self, sidecar: Sidecar, name: str, batch: int = 1) -> tuple[float, int]:
        """Ask a model; return seconds, and the bytes that were read for it."""
        array = np.repeat(self.inputs[name], batch, axis=0)
        model = sidecar.model(name)
        # A function asks for it once, not with every request.
        _ = model.signature
        before = read_bytes(sidecar)
        started_s = time.perf_counter()
        answer = model(array)
        seconds = time.perf_counter() - started_s
        self.check(name, np.asarray(answer)[:1])
        return seconds, read_bytes(sidecar) - before

    def zipf(self, count: int) -> list[str]:
        """Return tasks as they are asked when few are asked often: which, the seed says."""
        generator = random.Random(self.seed)
        names = list(self.tasks)
        generator.shuffle(names)
        return generator.choices(names, [1 / rank for rank in range(1, len(names) + 1)], k=count)

    def peak_bytes(self, sidecar: Sidecar, label: str) -> dict[str, int]:
        """Ask every task in turn while somebody looks at the memory; return the most that each of three books showed."""
        most = {"resident_bytes": 0, "weight_bytes": 0, "segment_bytes": 0, "samples": 0}
        segment = SHARED_MEMORY / segment_name((self.folder / label / "run").resolve()).removeprefix("/")
        ended = threading.Event()

        def look() -> None:
            with AdminClient(sidecar.admin.address) as admin:
                look_with(admin)

        def look_with(admin: AdminClient) -> None:
            while not ended.is_set():
                seen = {}
                # The engine answers between two stages; the system at any time.
                if most["samples"] % 16 == 0:
                    memory = admin.get("memory")
                    seen = {key: memory[key] for key in ("resident_bytes", "weight_bytes")}
                if segment.exists():
                    seen["segment_bytes"] = segment.stat().st_blocks * 512 - LEDGER_END
                for key, value in seen.items():
                    most[key] = max(most[key], value)
                most["samples"] += 1
                ended.wait(0.001)
            admin.close()

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            for name in self.tasks:
                self.timed(sidecar, name)
        finally:
            ended.set()
            watcher.join()
        return most

    # --- comparators -------------------------------------------------------------------------------------------------

    def _start_comparators(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "benchmarks.comparators.swappers", str(self.weights), self.scale_name]
        # As the sidecar sets it for itself: threads that spin would keep the reader off its core.
        return self.start([*command, str(self.threads), self.source], talks=True, OMP_WAIT_POLICY="PASSIVE")

    def _tell(self, line: str) -> dict[str, Any] | None:
        pipe = self._comparators
        assert pipe.stdin is not None
        assert pipe.stdout is not None
        pipe.stdin.write(line.encode() + b"\n")
        pipe.stdin.flush()
        reply = pipe.stdout.readline()
        if not reply:
            raise RuntimeError((self.folder / "stderr.log").read_text()[-2000:])
        found: dict[str, Any] | None = json.loads(reply)
        return found

    def resize_comparators(self, budget_bytes: int) -> None:
        self._tell(f"budget {budget_bytes}")

    def timed_comparator(self, kind: str, name: str) -> tuple[float, int] | None:
        """As ``timed``; None when the comparator cannot serve the model in its budget."""
        started_s = time.perf_counter()
        found = self._tell(f"{kind} {name}")
        seconds = time.perf_counter() - started_s
        if found is None:
            return None
        self.check(name, np.array(found["answer"]))
        return seconds, int(found["bytes"])


def read_bytes(sidecar: Sidecar) -> int:
    """Return the bytes of weights that a sidecar's engine has read from the disk since it started."""
    memory = sidecar.admin.get("memory")
    return int(memory["block_file_bytes"] + memory["store_bytes"])
