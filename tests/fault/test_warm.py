"""A real engine is killed: the next one has every weight that was in memory, and reads none of them again."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline import client
from trunkline.pool import Pool

from sidecar.segment import SHARED_MEMORY, segment_name
from tests.fault.matrix import until_tried, write_model
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import until

WIDTH = 512
# Of each model: between its two large weights it is narrow.
BLOCKS = 2


def made(folder: Path, name: str, seed: int) -> Path:
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU(), torch.nn.Linear(WIDTH, WIDTH)]
    return write_model(folder, name, torch.nn.Sequential(*layers), torch.ones(2, WIDTH))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("bundles"), "deep", 0)


def await_settled(sidecar: SidecarProcess, name: str, count: int) -> None:
    """Wait until a model has been tried and there are so many block files: before, an engine may read from the store again."""
    until_tried(sidecar, name)
    until(lambda: len(list((sidecar.store_dir / "blocks").glob("*.block"))) >= count)


@pytest.fixture
def sidecar(tmp_path: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarProcess]:
    with sidecar_process(tmp_path) as running:
        running.admin.push(bundle)
        await_settled(running, "deep", BLOCKS)
        monkeypatch.setenv("TRUNKLINE_SOCKET", str(running.socket))
        yield running


def answer(pool: Pool, name: str = "deep") -> np.ndarray:
    return client.Model(name, pool)(np.ones((1, WIDTH), np.float32))


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


def test_models_that_nobody_asks_for_at_first_find_their_weights_too(sidecar: SidecarProcess, tmp_path: Path) -> None:
    sidecar.admin.push(made(tmp_path, "other", 1))
    await_settled(sidecar, "other", 2 * BLOCKS)
    pool = Pool()
    expected = {name: answer(pool, name) for name in ("deep", "other")}
    before = sidecar.admin.get("memory")
    shutil.rmtree(sidecar.store_dir / "blobs")
    os.kill(int(sidecar.admin.get("status")["engine"]["pid"]), signal.SIGKILL)
    np.testing.assert_array_equal(answer(pool), expected["deep"])
    np.testing.assert_array_equal(answer(pool, "other"), expected["other"])
    after = sidecar.admin.get("memory")
    assert after["resident_bytes"] == after["weight_bytes"] == before["resident_bytes"]
    assert after["store_bytes"] == after["block_file_bytes"] == 0
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
