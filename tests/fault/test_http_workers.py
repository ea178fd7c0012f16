"""Workers of the admin endpoint are killed in the middle of traffic: functions do not notice, callers lose a request at most."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import requests
from trunkline.client import Model
from trunkline.endpoint import Endpoint
from trunkline.pool import Pool

from tests.bundles import write_adding_bundle
from tests.integration.test_admin_http import free_port
from tests.sidecar_process import SidecarProcess, sidecar_process

VALUES = [1.0, 2.0, 3.0]


@pytest.fixture
def sidecar(tmp_path: Path) -> Iterator[tuple[SidecarProcess, str]]:
    port = free_port()
    # The later flag counts.
    with sidecar_process(tmp_path, "--admin-port", str(port)) as running:
        write_adding_bundle(tmp_path / "adder", "adder", VALUES)
        running.admin.push(tmp_path / "adder")
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


def test_a_worker_that_is_killed_costs_its_requests_alone(sidecar: tuple[SidecarProcess, str]) -> None:
    running, url = sidecar
    stop = threading.Event()
    failures: list[BaseException] = []
    counts = {"functions": 0, "answers": 0, "lost": 0}
    body = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 1, 1]}]}
    expected = [value + 1 for value in VALUES]

    def function() -> None:
        model = Model("adder", Pool(endpoint=Endpoint(str(running.socket)), credential=lambda: b""))
        try:
            while not stop.is_set():
                assert model(np.ones((1, 3), np.float32)).tolist() == [expected]
                counts["functions"] += 1
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    def caller() -> None:
        session = requests.Session()
        try:
            while not stop.is_set():
                try:
                    answer = session.post(f"{url}/v2/models/adder/infer", json=body, timeout=60)
                except requests.ConnectionError:
                    counts["lost"] += 1
                    continue
                assert answer.status_code == 200, answer.text
                assert answer.json()["outputs"][0]["data"] == expected
                counts["answers"] += 1
        except BaseException as error:  # noqa: BLE001 - told below
            failures.append(error)

    threads = [threading.Thread(target=function), *(threading.Thread(target=caller) for _ in range(3))]
    for thread in threads:
        thread.start()

    def until_more(key: str, count: int) -> None:
        reached = counts[key] + count
        while counts[key] < reached and not failures:
            stop.wait(0.005)

    engine_pid = running.await_engine()
    until_more("answers", 20)
    assert len(workers_of(running)) == 2
    kill_count = 4
    for _ in range(kill_count):
        before = workers_of(running)
        os.kill(victim := min(before), signal.SIGKILL)
        until_more("functions", 20)
        # Another takes its place, and is asked.
        while len(workers_of(running) - {victim}) < 2 and not failures:
            stop.wait(0.005)
        until_more("answers", 20)
    stop.set()
    for thread in threads:
        thread.join(60)
    assert failures == []
    # Each had one request under way at most, and each of those one connection.
    assert counts["lost"] <= kill_count * 3
    assert running.await_engine() == engine_pid
    assert running.process.poll() is None
