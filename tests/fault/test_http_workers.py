"""Workers of the admin endpoint are killed in the middle of traffic: functions do not notice, callers lose a request at most."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.bundles import write_adding_bundle
from tests.fault.matrix import Neighbour, Row
from tests.integration.test_admin_http import free_port
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S

VALUES = [1.0, 2.0, 3.0]
CALLERS, KILLS = 3, 20


@pytest.fixture
def sidecar(tmp_path: Path, scaled: Path) -> Iterator[tuple[SidecarProcess, str]]:
    port = free_port()
    # The later flag counts.
    with sidecar_process(tmp_path, "--admin-port", str(port)) as running:
        write_adding_bundle(tmp_path / "adder", "adder", VALUES)
        running.admin.push(tmp_path / "adder")
        running.admin.push(scaled)
        yield running, f"http://127.0.0.1:{port}"


def children(pid: int) -> set[int]:
    """Return the pids of a process's children; none of one that is gone."""
    try:
        return {int(each) for task in Path(f"/proc/{pid}/task").iterdir() for each in (task / "children").read_text().split()}
    except OSError:
        return set()


def workers_of(running: SidecarProcess) -> set[int]:
    """Return the pids of the endpoint's workers: of what the supervisor has started, the engine has no children."""
    return {worker for child in children(running.process.pid) for worker in children(child)}


@pytest.mark.row("F8")
def test_a_worker_that_is_killed_costs_its_requests_alone(row: Row, sidecar: tuple[SidecarProcess, str]) -> None:
    running, url = sidecar
    stop = threading.Event()
    failures: list[BaseException] = []
    counts = {"answers": 0, "lost": 0}
    body = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 1, 1]}]}
    expected = [value + 1 for value in VALUES]

    def caller() -> None:
        session = requests.Session()
        try:
            while not stop.is_set():
                try:
                    answer = session.post(f"{url}/v2/models/adder/infer", json=body, timeout=PATIENCE_S)
                except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                    # Killed before its answer, or between the header and the body of it.
                    counts["lost"] += 1
                    continue
                assert answer.status_code == 200, answer.text
                assert answer.json()["outputs"][0]["data"] == expected
                counts["answers"] += 1
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in threads:
        thread.start()

    def until_more(key: str, count: int) -> None:
        reached = counts[key] + count
        while counts[key] < reached and not failures:
            stop.wait(0.005)

    engine_pid = running.await_engine()
    with Neighbour(row, running.socket) as neighbour:
        until_more("answers", 20)
        assert len(workers_of(running)) == 2
        for _ in range(row.count(KILLS)):
            row.attempts += 1
            before = workers_of(running)
            os.kill(victim := min(before), signal.SIGKILL)
            neighbour.await_answers(20)
            # Another takes its place, and is asked.
            while len(workers_of(running) - {victim}) < 2 and not failures:
                stop.wait(0.005)
            until_more("answers", 20)
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
    assert failures == []
    # Each had one request under way at most, and each of those one connection.
    assert counts["lost"] <= row.attempts * CALLERS
    assert running.await_engine() == engine_pid
    assert running.process.poll() is None
