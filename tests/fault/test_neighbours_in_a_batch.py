"""Rows of the matrix and of the threat table: what one caller's numbers do to those they are computed beside."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trunkline.client import Model

from tests.fault import attacks
from tests.fault.looked import Looked
from tests.fault.matrix import Neighbour, Row, deploy, held, left, pool_at, settled
from tests.sidecar_process import SidecarProcess, sidecar_process

CALLS = 10_000
RAISES = 5000
INPUT_COUNT = 16


@pytest.mark.row("T13")
def test_numbers_that_are_none_stay_with_their_caller(row: Row, steady: SidecarProcess, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), nn.GELU(), nn.Linear(64, 8), nn.Softmax(-1))
    deploy(steady, tmp_path, "clean", module, torch.randn(2, 8))
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
    steady.admin.delete("models/clean")


@pytest.mark.row("F23")
def test_a_model_that_raises_for_one_row_in_twenty_answers_the_others(row: Row, tmp_path: Path, scaled: Path) -> None:
    # Requests wait for each other: else few would be computed together.
    with sidecar_process(tmp_path, "--batch-window", "0.003") as box:
        box.admin.push(scaled)
        deploy(box, tmp_path, "looked", Looked(), torch.zeros(2, 4, dtype=torch.int64))
        settled(box)
        engine, before = box.await_engine(), held(box)
        attacks.raises(row, box, row.count(RAISES))
        row.leaked |= left(box, before)
        assert box.await_engine() == engine
