"""A minute of all sorts of calls: memory does not grow with their number, nor do descriptors, threads and segments."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from trunkline import client, errors
from trunkline.admin import AdminConnection

from tests.bundles import write_adding_bundle
from tests.fault.matrix import EXPECTED, Row, descendants, pool_at
from tests.sidecar_process import SidecarProcess
from tests.waiting import PATIENCE_S

# Of a push, as many as in half a minute on two quiet cores; in a night as many as in hours.
CALLS, PUSH_CALLS = 100_000, 40_000
CLIENTS = 4
# Of all calls: until then caches fill, and the allocator finds its size.
WARM = 1 / 3
SLOPE_LIMIT_BYTES = 1 << 20
PER_CALLS = 10_000
LATE_S = 600


def private_bytes(pid: int) -> int:
    """Return the memory of a process that is its own: without files and what it shares."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"process {pid} has no memory")


class Load:
    """Clients that ask all sorts of things, as fast as they can, and check every answer."""

    def __init__(self, row: Row, box: SidecarProcess) -> None:
        self._row, self._box = row, box
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        self.calls = 0
        self.failures: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(CLIENTS)]
        for thread in self.threads:
            thread.start()

    def _run(self, seed: int) -> None:
        try:
            self._ask(np.random.default_rng(seed))
        except BaseException as error:  # noqa: BLE001 - told by the test
            self.failures.append(error)

    def _ask(self, random: np.random.Generator) -> None:
        pool = pool_at(self._box.socket)
        operator = AdminConnection(str(self._box.socket), (self._box.run_dir / "admin.token").read_bytes())
        scaled, adder, unknown = (client.Model(name, pool) for name in ("scaled", "adder", "unknown"))
        while not self.stopping.is_set():
            wrong = 0
            for number in range(100):
                x = random.random((1 + number % 7, 8)).astype(np.float32)
                wrong += not np.array_equal(scaled(x), x * EXPECTED)
            wrong += not np.array_equal(adder(x), x + EXPECTED)
            with pytest.raises(errors.UnknownModel):
                unknown(x)
            with pytest.raises(errors.SignatureMismatch):
                scaled(x[:, :3])
            if random.random() < 0.2:
                # Not over HTTP, whose workers keep their sessions with the engine.
                operator.command("status")
                operator.close()
                pool.close()
            with self._lock:
                self.calls += 103
                self._row.attempts += 103
                self._row.answered += 101
                self._row.wrong += wrong
        pool.close()


@pytest.mark.row("F32")
@pytest.mark.timeout(LATE_S)
def test_memory_does_not_grow_with_calls(row: Row, steady: SidecarProcess, tmp_path: Path) -> None:
    processes = [steady.process.pid, *descendants(steady.process.pid)]
    wanted = row.count(CALLS, push=PUSH_CALLS)
    write_adding_bundle(tmp_path / "adder", "adder", EXPECTED.tolist())
    steady.admin.push(tmp_path / "adder")
    samples: list[tuple[int, int]] = []
    load = Load(row, steady)
    try:
        deadline = time.monotonic() + (LATE_S / 4 if row.size == "push" else LATE_S)
        while load.calls < wanted and time.monotonic() < deadline and not load.failures:
            load.stopping.wait(0.25)
            samples.append((load.calls, sum(map(private_bytes, processes))))
    finally:
        load.stopping.set()
        for thread in load.threads:
            thread.join(PATIENCE_S)
    assert load.failures == []
    warm = np.array([each for each in samples if each[0] >= WARM * load.calls], float)
    assert len(warm) > 10, "there is nothing to draw a line through"
    slope = np.polyfit(warm[:, 0], warm[:, 1], 1)[0] * PER_CALLS
    row.figures["bytes per 10,000 calls"] = round(slope)
    row.leaked["bytes per 10,000 calls beyond the limit"] = max(0, int(slope) - SLOPE_LIMIT_BYTES)
    steady.admin.delete("models/adder")
