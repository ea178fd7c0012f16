"""Rows of the matrix: more clients than there should be."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from trunkline.client import Model
from trunkline.errors import QueueFull

from sidecar.machine import raise_descriptor_limit
from tests.fault.matrix import DESCRIPTORS_EACH, EXPECTED, Neighbour, Row, held_by, pool_at
from tests.sidecar_process import SidecarProcess

CLIENTS = 1000
# The default.
LIMIT = 1024
X = np.ones((1, 8), np.float32)


@pytest.mark.row("F13", "T21")
def test_a_thousand_clients_have_their_answers_and_no_more_are_let_in(row: Row, steady: SidecarProcess) -> None:
    raise_descriptor_limit()
    engine = steady.await_engine()
    before, _ = held_by(engine)
    with contextlib.ExitStack() as opened, Neighbour(row, steady.socket) as neighbour:

        def another() -> Model:
            opened.callback((pool := pool_at(steady.socket)).close)
            row.attempts += 1
            return Model("scaled", pool)

        for _ in range(CLIENTS):
            row.answered += 1
            row.wrong += not np.array_equal(another()(X), X * EXPECTED)
        assert held_by(engine)[0] - before <= DESCRIPTORS_EACH * (CLIENTS + 1) + 32
        with pytest.raises(QueueFull) as full:
            for _ in range(LIMIT):
                another()(X)
        assert full.value.details["limit_count"] == LIMIT
        # Whoever was let in before is served on.
        neighbour.await_answers()
