"""A real sidecar with two devices: its engine is killed, and its devices change from start to start."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline import client
from trunkline.errors import TrunklineError
from trunkline.pool import Pool

from sidecar.bundle import write_bundle
from sidecar.export import convert
from sidecar.segment import SHARED_MEMORY, segment_name
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, until

WIDTH = 512
NAMES = ("one", "other")
DEVICES = [f"cpu:{core}" for core in sorted(os.sched_getaffinity(0))[:2]]
X = np.ones((1, WIDTH), np.float32)

needs_two_cores = pytest.mark.skipif(len(DEVICES) < 2, reason="needs two cores")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folders = []
    for seed, name in enumerate(NAMES):
        torch.manual_seed(seed)
        folder = tmp_path_factory.mktemp("bundles") / name
        packed = convert(torch.nn.Sequential(torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()), (torch.ones(2, WIDTH),), name=name)
        write_bundle(folder, packed.bundle, packed.blobs)
        folders.append(folder)
    return folders


@pytest.fixture
def sidecar(tmp_path: Path, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarProcess]:
    # Without it a model has one form on all devices, which may find another one best otherwise.
    flags = ("--device", ",".join(DEVICES), "--memory-budget", "64MB", "--packing", "off")
    with sidecar_process(tmp_path, *flags) as running:
        for bundle in bundles:
            running.admin.push(bundle)
        monkeypatch.setenv("TRUNKLINE_SOCKET", str(running.socket))
        yield running
    second = running.run_dir.resolve() / "device-1"
    (SHARED_MEMORY / segment_name(second)[1:]).unlink(missing_ok=True)


def answer(name: str, pool: Pool) -> np.ndarray:
    return client.Model(name, pool)(X)


def _device(sidecar: SidecarProcess) -> str:
    try:
        return str(sidecar.admin.get("status")["engine"]["device"])
    except TrunklineError:
        return ""


def until_tried(sidecar: SidecarProcess) -> None:
    """Wait until models are tried on all devices and kept in block files, without which weights in memory may be made anew."""
    until(lambda: all(sidecar.admin.get(f"models/{name}")["tried"] for name in NAMES))
    until(lambda: len(list((sidecar.store_dir / "blocks").glob("*.block"))) == len(NAMES))


@needs_two_cores
def test_engines_that_are_killed_under_load_lose_nothing_and_are_back_where_they_were(sidecar: SidecarProcess) -> None:
    until_tried(sidecar)
    pool = Pool()
    for name, device in zip(NAMES, DEVICES, strict=True):
        assert sidecar.admin.post(f"models/{name}/place", {"allow": [device]})["devices"] == [device]
    expected = {name: answer(name, pool) for name in NAMES}
    stop = threading.Event()

    def keep_asking(name: str) -> int:
        count = 0
        while not stop.is_set():
            np.testing.assert_allclose(answer(name, pool), expected[name], rtol=1e-4, atol=1e-5)
            count += 1
        return count

    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(keep_asking, name) for name in NAMES]
        try:
            for _ in range(3):
                before = int(sidecar.admin.get("status")["engine"]["pid"])
                os.kill(before, signal.SIGKILL)
                assert sidecar.await_engine() != before
        finally:
            stop.set()
        assert all(each.result(PATIENCE_S) for each in asked)
    # Perhaps the last engine has not been asked yet.
    for name in NAMES:
        np.testing.assert_allclose(answer(name, pool), expected[name], rtol=1e-4, atol=1e-5)
    placed = lambda: [each["devices"] for each in sidecar.admin.get("placement")["models"]]  # noqa: E731
    # One that another engine was asked for meanwhile may still be on its way to this one's devices.
    until(lambda: placed() == [[device] for device in DEVICES])
    # Nothing was read again: on each device, its model was still there.
    for device in sidecar.admin.get("memory")["devices"].values():
        assert device["kept_bytes"] > 0
        assert device["store_bytes"] == 0
        assert device["block_file_bytes"] == 0


@needs_two_cores
def test_what_there_is_for_a_device_goes_with_it(sidecar: SidecarProcess) -> None:
    second = sidecar.run_dir.resolve() / "device-1"
    segment = SHARED_MEMORY / segment_name(second)[1:]
    assert segment.exists()
    # Killed, the supervisor leaves all there is.
    sidecar.process.kill()
    sidecar.process.wait(PATIENCE_S)
    assert segment.exists()
    notes = second.parent / "device-notes"
    notes.mkdir()
    (notes / "notes.txt").write_text("somebody else's")
    (second / "pins.json").write_text('["one"]')
    sidecar._flags = ("--device", DEVICES[0], "--memory-budget", "64MB")
    sidecar.start()
    # Until the new one takes over, what the killed one has left may answer.
    until(lambda: _device(sidecar) == DEVICES[0])
    assert not second.exists()
    assert not segment.exists()
    assert (notes / "notes.txt").exists()
    assert "what was pinned there is forgotten" in sidecar.log.read_text()
    pool = Pool()
    assert answer("one", pool).shape == (1, WIDTH)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_and_a_cpu_answer_alike(tmp_path: Path, bundles: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with sidecar_process(tmp_path, "--device", "cuda:0,cpu", "--memory-budget", "64MB") as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", str(running.socket))
        running.admin.push(bundles[0])
        pool, found = Pool(), []
        for device in ("cuda:0", "cpu"):
            assert running.admin.post("models/one/place", {"allow": [device]})["devices"] == [device]
            found.append(answer("one", pool))
        np.testing.assert_allclose(*found, rtol=1e-4, atol=1e-5)
    (SHARED_MEMORY / segment_name(running.run_dir.resolve() / "device-1")[1:]).unlink(missing_ok=True)
