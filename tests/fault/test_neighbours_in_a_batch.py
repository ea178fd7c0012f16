"""Rows of the matrix and of the threat table: what one caller's numbers do to those they are computed beside."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trunkline.client import Model
from trunkline.errors import ValueOutOfBounds

from sidecar.bundle import write_bundle
from sidecar.export import convert
from tests.fault.matrix import Neighbour, Row, pool_at, settled
from tests.fault.test_indices import BAD, TABLE, Looked, right
from tests.nodes import until
from tests.sidecar_process import SidecarProcess

CALLS = 10_000
RAISES = 5000
INPUT_COUNT = 16


@pytest.fixture
def deploy(steady: SidecarProcess, tmp_path: Path) -> Iterator[Callable[[str, nn.Module, torch.Tensor], None]]:
    """Return what deploys a model, and says when it has been tried: it is then served in batches, if it can be."""
    names: list[str] = []

    def deployed(name: str, module: nn.Module, example: torch.Tensor) -> None:
        made = convert(module.eval(), (example,), name=name)
        write_bundle(tmp_path / name, made.bundle, made.blobs)
        names.append(name)
        steady.admin.push(tmp_path / name)
        steady.admin.post(f"models/{name}/load")
        until(lambda: bool(steady.admin.get(f"models/{name}")["tried"]))

    yield deployed
    for name in names:
        steady.admin.delete(f"models/{name}")


@pytest.mark.row("T13")
def test_numbers_that_are_none_stay_with_their_caller(
    row: Row, steady: SidecarProcess, deploy: Callable[[str, nn.Module, torch.Tensor], None]
) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8), nn.Softmax(-1))
    deploy("clean", module, torch.randn(2, 8))
    inputs = torch.randn(INPUT_COUNT, 1, 8)
    with torch.no_grad():
        alone = [module(each).numpy() for each in inputs]
    over = threading.Event()

    def contaminate(number: int) -> None:
        pool = pool_at(steady.socket)
        model, x = Model("clean", pool), np.full((1, 8), (np.nan, np.inf)[number], np.float32)
        while not over.is_set():
            model(x)
        pool.close()

    def ask(seed: int) -> tuple[int, int]:
        pool, wrong = pool_at(steady.socket), 0
        model, calls = Model("clean", pool), row.count(CALLS) // 2
        for number in range(calls):
            place = (number + seed) % INPUT_COUNT
            answer = model(inputs[place].numpy())
            wrong += not np.allclose(answer, alone[place], rtol=1e-5, atol=1e-6)
        pool.close()
        return calls, wrong

    with Neighbour(row, steady.socket), ThreadPoolExecutor(4) as threads:
        hostile = [threads.submit(contaminate, number) for number in range(2)]
        try:
            for each in [threads.submit(ask, seed) for seed in range(2)]:
                calls, wrong = each.result()
                row.attempts += calls
                row.answered += calls
                row.wrong += wrong
        finally:
            over.set()
        for each_hostile in hostile:
            each_hostile.result()
    settled(steady)


@pytest.mark.row("F23")
def test_a_model_that_raises_for_one_row_in_twenty_answers_the_others(
    row: Row, steady: SidecarProcess, deploy: Callable[[str, nn.Module, torch.Tensor], None]
) -> None:
    deploy("looked", Looked(), torch.zeros(2, 4, dtype=torch.int64))

    def ask(seed: int) -> tuple[int, int, int]:
        random, pool, raised, wrong = np.random.default_rng(seed), pool_at(steady.socket), 0, 0
        model, calls = Model("looked", pool), row.count(RAISES) // 4
        for number in range(calls):
            ids = random.integers(0, TABLE // 2, (1, 4))
            if number % 20 == seed:
                ids[0, number % 4] = BAD[number // 20 % len(BAD)]
                with pytest.raises(ValueOutOfBounds):
                    model(ids)
                raised += 1
            else:
                wrong += not np.array_equal(model(ids), right(ids))
        pool.close()
        return calls, raised, wrong

    with Neighbour(row, steady.socket), ThreadPoolExecutor(4) as threads:
        for each in [threads.submit(ask, seed) for seed in range(4)]:
            calls, raised, wrong = each.result()
            assert raised == calls // 20 + (calls % 20 > 3)
            row.attempts += calls
            row.answered += calls
            row.wrong += wrong
    settled(steady)
