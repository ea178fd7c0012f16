"""Real processes that die while versions are released: what was answered holds, and every answer is one version's."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from trunkline import client, model
from trunkline.endpoint import Endpoint
from trunkline.errors import TrunklineError
from trunkline.pool import Pool

from sidecar.releases import Release
from sidecar.store import Store
from tests.bundles import write_adding_bundle
from tests.fault.test_processes import eventually, gone
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S

X = np.zeros((1, 2), np.float32)
KILLS = 4


@pytest.fixture
def sidecar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarProcess]:
    """With versions 1 to 3 of a model, which answer with their number."""
    with sidecar_process(tmp_path) as running:
        for number in (1, 2, 3):
            write_adding_bundle(tmp_path / str(number), "m", [number, number])
            running.admin.push(tmp_path / str(number), version=str(number))
        monkeypatch.setenv("TRUNKLINE_SOCKET", str(running.socket))
        yield running
        client._pool.close()


def asked(name: str = "m", pool: Pool | None = None) -> str:
    own = model(name) if pool is None else client.Model(name, pool)
    (answer,) = own.call({"x": X}, deadline_s=60)
    assert answer[0] == answer[1]
    return f"{answer[0]:g}"


def release(sidecar: SidecarProcess, asked_for: dict[str, object]) -> None:
    """Release, again and again while somebody is away."""

    def is_done() -> bool:
        try:
            sidecar.admin.put("models/m/release", asked_for)
        except TrunklineError as error:
            assert error.code in ("sidecar_unavailable", "connection_lost", "malformed_frame"), error
            return False
        return True

    eventually(is_done, "nothing was released")


def test_a_release_outlives_engine_and_supervisor(sidecar: SidecarProcess) -> None:
    release(sidecar, {"split": {"1": 1, "3": 1}})
    assert Counter(asked() for _ in range(10)) == {"1": 5, "3": 5}
    engine = sidecar.await_engine()
    os.kill(engine, signal.SIGKILL)
    eventually(lambda: gone(engine), "the engine lives on")
    # The next one begins its turns anew.
    assert Counter(asked() for _ in range(10)) == {"1": 5, "3": 5}
    assert asked("m:2") == "2"
    release(sidecar, {"default": "2"})
    sidecar.process.kill()
    sidecar.process.wait(PATIENCE_S)
    sidecar.start()
    assert [asked(), asked("m:1"), asked("m:3")] == ["2", "1", "3"]


@pytest.mark.parametrize("who", ["engine", "endpoint"])
def test_whoever_is_killed_while_versions_are_released(sidecar: SidecarProcess, who: str) -> None:
    stop, counts = threading.Event(), [0] * 4

    def ask(number: int) -> None:
        pool = Pool(endpoint=Endpoint(str(sidecar.socket)), credential=lambda: b"")
        with contextlib.closing(pool):
            while not stop.is_set():
                assert asked("m", pool) in ("1", "2", "3")
                counts[number] += 1

    def living() -> list[int]:
        engine = sidecar.await_engine()
        if who == "engine":
            return [engine]
        children = Path(f"/proc/{sidecar.process.pid}/task/{sidecar.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if int(pid) != engine and not gone(int(pid))]

    def victim() -> int:
        # What an endpoint that was killed has left may answer for a moment, before there is another.
        eventually(lambda: bool(living()), f"there is no {who}")
        return living()[0]

    turns = 0
    with ThreadPoolExecutor(5) as threads:
        asking = [threads.submit(ask, number) for number in range(4)]
        try:
            for _ in range(KILLS):
                pid = victim()
                killing = threads.submit(os.kill, pid, signal.SIGKILL)
                while not gone(pid) or not killing.done():
                    turns += 1
                    release(sidecar, {"default": str(turns % 3 + 1)})
                # What was answered holds, for whoever comes then.
                assert asked() == str(turns % 3 + 1)
                before = list(counts)
                eventually(
                    lambda before=before: all(now > count for now, count in zip(counts, before, strict=True)),  # type: ignore[misc]
                    "somebody is not answered",
                )
        finally:
            stop.set()
        for each in asking:
            each.result(PATIENCE_S)
    assert Store(sidecar.store_dir, sweep=False).release("m") == Release({str(turns % 3 + 1): 1})
