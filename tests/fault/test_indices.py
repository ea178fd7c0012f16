"""Row of the threat table: indices out of range, some refused at the door, some computed by the model."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline.client import Model
from trunkline.errors import ValueOutOfBounds

from tests.fault.looked import BAD, TABLE, Looked, right
from tests.fault.matrix import Neighbour, Row, pool_at, settled, write_model
from tests.sidecar_process import SidecarProcess

REQUESTS = 1000


@pytest.fixture
def looked(steady: SidecarProcess, tmp_path: Path) -> Iterator[None]:
    """Deploy the model as it is, and with bounds that the sidecar checks before anything is computed."""
    for name, bounds in (("looked", None), ("bounded", {"ids": (0, TABLE // 2 - 1)})):
        steady.admin.push(write_model(tmp_path, name, Looked(), torch.zeros(2, 4, dtype=torch.int64), input_bounds=bounds))
    yield
    for name in ("looked", "bounded"):
        steady.admin.delete(f"models/{name}")


@pytest.mark.row("T12")
@pytest.mark.usefixtures("looked")
def test_a_bad_index_costs_its_caller_that_request(row: Row, steady: SidecarProcess) -> None:
    over = threading.Event()

    def honest(seed: int) -> tuple[int, int]:
        """Ask the very models that the hostile function asks; return how many answers there were, and how many wrong ones."""
        random, pool, answered, wrong = np.random.default_rng(seed), pool_at(steady.socket), 0, 0
        asked = [Model(name, pool) for name in ("looked", "bounded")]
        while not over.is_set():
            ids = random.integers(0, TABLE // 2, (1, 4))
            answered += 1
            wrong += not np.array_equal(asked[answered % 2](ids), right(ids))
        pool.close()
        return answered, wrong

    def hostile(seed: int) -> None:
        random, pool = np.random.default_rng(seed), pool_at(steady.socket)
        asked = [Model(name, pool) for name in ("looked", "bounded")]
        for number in range(row.count(REQUESTS) // 2):
            ids = random.integers(0, TABLE // 2, (1 + number % 3, 4))
            ids[number % len(ids), number % 4] = BAD[number % len(BAD)]
            with pytest.raises(ValueOutOfBounds):
                asked[number % 2](ids)
        pool.close()

    with Neighbour(row, steady.socket) as neighbour, ThreadPoolExecutor(4) as threads:
        others = [threads.submit(honest, seed) for seed in range(2)]
        try:
            for each in [threads.submit(hostile, seed) for seed in range(2)]:
                each.result()
        finally:
            over.set()
        row.attempts += 2 * (row.count(REQUESTS) // 2)
        for each in others:
            answered, wrong = each.result()
            assert answered
            row.answered += answered
            row.wrong += wrong
        neighbour.await_answers()
    settled(steady)
