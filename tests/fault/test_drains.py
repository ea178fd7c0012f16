"""A sidecar is told to end while requests are under way: what it has accepted is answered, what comes later is to be repeated."""

from __future__ import annotations

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from trunkline.connection import Connection
from trunkline.errors import Draining, TrunklineError
from trunkline.protocol import Placement

from tests.fakes import FakeSource, bundle_of, running_server
from tests.fault.matrix import Neighbour, Row
from tests.sidecar_process import SidecarProcess
from tests.waiting import PATIENCE_S, soon, until

IN_FLIGHT = 64
# Most of them in this process, where it can be seen what was accepted before the drain began.
DRAINS, REAL_DRAINS = 47, 3
WEIGHT = bytes([3, 4])
EXIT_S = 10.0


def asked(connection: Connection, value: float) -> float | TrunklineError:
    np.frombuffer(connection.request, np.float32, 3)[...] = value
    try:
        (_, answer), *_ = connection.infer("m", (Placement("x", "float32", (1, 3), 0),), soon())
    except TrunklineError as error:
        return error
    return float(answer[0, 0])


def drained(row: Row, folder: Path) -> None:
    """Drain one server with requests under way, and ask once more meanwhile."""
    source, leave = FakeSource(), threading.Event()
    source.put(bundle_of("m", [WEIGHT]), [WEIGHT])
    with (
        running_server(folder, source, connection_limit=2 * IN_FLIGHT) as running,
        ThreadPoolExecutor(IN_FLIGHT + 1) as threads,
    ):
        running.device.on_run = lambda: leave.wait(PATIENCE_S)  # type: ignore[func-returns-value]
        connections = [Connection(running.path, deadline=soon()) for _ in range(IN_FLIGHT + 1)]

        def under_way() -> int:
            return sum(session.busy for session in list(running.server._sessions.values()))

        answers = [threads.submit(asked, each, number) for number, each in enumerate(connections[:-1])]
        until(lambda: under_way() == IN_FLIGHT)
        running.server.drain()
        running.engine.drain(running.server.stop)
        late = threads.submit(asked, connections[-1], 0.0)
        # It may be answered before anybody sees that it was asked.
        until(lambda: late.done() or under_way() == IN_FLIGHT + 1)
        leave.set()
        for number, each in enumerate(answers):
            answer = each.result(PATIENCE_S)
            if isinstance(answer, TrunklineError):
                row.lose(answer)
            else:
                row.answered += 1
                row.wrong += answer != number + sum(WEIGHT)
        told = late.result(PATIENCE_S)
        assert isinstance(told, Draining), told
        assert told.retryable
        for connection in connections:
            connection.close()


@pytest.mark.row("F7")
def test_what_was_accepted_is_answered(row: Row, tmp_path: Path) -> None:
    for _ in range(row.count(DRAINS)):
        row.attempts += 1
        drained(row, tmp_path)


@pytest.mark.row("F7")
def test_a_sidecar_that_is_told_to_end_ends_and_its_functions_go_on_with_the_next(row: Row, mortal: SidecarProcess) -> None:
    with Neighbour(row, mortal.socket, threads=IN_FLIGHT) as neighbour:
        for _ in range(row.count(REAL_DRAINS)):
            row.attempts += 1
            mortal.process.send_signal(signal.SIGTERM)
            assert mortal.process.wait(EXIT_S + 10) == 0
            assert not mortal.socket.exists()
            mortal.start()
            neighbour.await_answers(IN_FLIGHT)
