"""A real engine is killed: the next one has every weight that was in memory, and reads none of them again."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline import client
from trunkline.pool import Pool

from sidecar.bundle import write_bundle
from sidecar.export import convert
from sidecar.segment import SHARED_MEMORY, segment_name
from tests.sidecar_process import SidecarProcess, sidecar_process

WIDTH = 512


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)]
    folder = tmp_path_factory.mktemp("bundles") / "deep"
    packed = convert(torch.nn.Sequential(*layers), (torch.ones(2, WIDTH),), name="deep")
    write_bundle(folder, packed.bundle, packed.blobs)
    return folder


@pytest.fixture
def sidecar(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarProcess]:
    with sidecar_process(tmp_path) as running:
        running.admin.push(bundle)
        deadline = time.monotonic() + 60
        while not running.admin.get("models/deep")["tried"] or not list((running.store_dir / "blocks").glob("*.block")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        monkeypatch.setenv("TRUNKLINE_SOCKET", str(running.socket))
        yield running


def answer(pool: Pool) -> np.ndarray:
    return client.Model("deep", pool)(np.ones((1, WIDTH), np.float32))


def test_a_killed_engine_is_back_with_its_weights(sidecar: SidecarProcess) -> None:
    pool = Pool()
    expected = answer(pool)
    before = sidecar.admin.get("memory")
    # The store has nothing to read them from any more.
    shutil.rmtree(sidecar.store_dir / "blobs")
    os.kill(int(sidecar.admin.get("status")["engine"]["pid"]), signal.SIGKILL)
    np.testing.assert_array_equal(answer(pool), expected)
    after = sidecar.admin.get("memory")
    assert after["resident_bytes"] == after["weight_bytes"] == before["resident_bytes"]
    assert after["store_bytes"] == after["block_file_bytes"] == 0
    assert 0 < after["kept_bytes"] <= after["resident_bytes"]
    pool.close()


def test_a_killed_supervisor_leaves_them_to_the_next(sidecar: SidecarProcess) -> None:
    pool = Pool()
    expected = answer(pool)
    sidecar.process.kill()
    sidecar.process.wait()
    shutil.rmtree(sidecar.store_dir / "blobs")
    sidecar.start()
    np.testing.assert_array_equal(answer(pool), expected)
    assert sidecar.admin.get("memory")["store_bytes"] == 0
    pool.close()


def test_a_clean_stop_leaves_nothing_in_memory(sidecar: SidecarProcess) -> None:
    pool = Pool()
    answer(pool)
    pool.close()
    name = segment_name(sidecar.run_dir.resolve())
    assert (SHARED_MEMORY / name[1:]).exists()
    assert sidecar.stop() == 0
    assert not (SHARED_MEMORY / name[1:]).exists()
