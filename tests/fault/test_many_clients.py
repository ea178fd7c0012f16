"""Rows of the matrix: more clients than there should be."""

from __future__ import annotations

import contextlib
import select
import threading
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from trunkline.client import Model
from trunkline.errors import QueueFull

from sidecar.machine import raise_descriptor_limit
from tests.fault.matrix import DESCRIPTORS_EACH, EXPECTED, Neighbour, Row, held_by, pool_at
from tests.fault.wire import connected
from tests.sidecar_process import SidecarProcess
from tests.waiting import PATIENCE_S, until

CLIENTS = 1000
# The default.
LIMIT = 1024
# Connections on which nothing is said: more than may be open.
SILENT = 1200
GOOD = 100
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


@contextlib.contextmanager
def silent(path: Path, count: int) -> Iterator[None]:
    """Have so many connections open on which nothing is said, and open another for each that the sidecar closes."""
    poll, held, over = select.poll(), {}, threading.Event()
    opened: deque[int] = deque()

    def go_on() -> None:
        while not over.is_set():
            while len(held) < count and not over.is_set():
                sock = connected(str(path))
                held[sock.fileno()] = sock
                opened.append(sock.fileno())
                poll.register(sock, select.POLLIN)
            for fd, _ in poll.poll(20):
                poll.unregister(fd)
                held.pop(fd).close()

    thread = threading.Thread(target=go_on, daemon=True)
    thread.start()
    try:
        until(lambda: len(opened) >= count)
        yield
    finally:
        over.set()
        thread.join(PATIENCE_S)
        for sock in held.values():
            sock.close()


@pytest.mark.row("T21")
def test_connections_on_which_nothing_is_said_keep_nobody_out(row: Row, steady: SidecarProcess) -> None:
    raise_descriptor_limit()
    with Neighbour(row, steady.socket) as neighbour, silent(steady.socket, SILENT):
        for _ in range(row.count(GOOD)):
            row.attempts += 1
            with contextlib.closing(pool_at(steady.socket)) as pool:
                answer = Model("scaled", pool)(X)
            row.answered += 1
            row.wrong += not np.array_equal(answer, X * EXPECTED)
        neighbour.await_answers()
