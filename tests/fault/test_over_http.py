"""Functions that ask over HTTP while what they ask dies: nothing accepted is lost, and the socket is used once it is there."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from trunkline import client
from trunkline.pool import Pool

from tests.fault.test_processes import Load, check_restarts, eventually, gone
from tests.integration.test_admin_http import free_port
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S


@pytest.fixture
def sidecar(tmp_path: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarProcess]:
    """A sidecar whose URL is known, and its socket is not."""
    port = free_port()
    monkeypatch.setenv("TRUNKLINE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "mounted.sock"))
    with sidecar_process(tmp_path, "--admin-port", str(port)) as running:
        running.admin.push(scaled)
        yield running


def http_servers(sidecar: SidecarProcess, engine: int) -> list[int]:
    """Return the processes that serve HTTP: gunicorn's, and its workers."""
    found, left = [], [sidecar.process.pid]
    while left:
        pid = left.pop()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        left += [int(child) for child in children if int(child) != engine]
        found += [int(child) for child in children if int(child) != engine]
    return found


def test_killed_engines_and_http_servers_lose_no_request(sidecar: SidecarProcess) -> None:
    load = Load()
    eventually(lambda: load.answered > 20, "no answers")
    for _ in range(5):
        before = load.answered
        engine = sidecar.await_engine()
        os.kill(engine, signal.SIGKILL)
        eventually(lambda engine=engine: sidecar.await_engine() != engine, "no new engine")
        eventually(lambda before=before: load.answered > before + 4, "no answers after the engine was killed")
        before = load.answered
        killed = http_servers(sidecar, sidecar.await_engine())
        assert killed
        for pid in killed:
            # Workers whose master is killed may be gone already.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        eventually(lambda killed=killed: all(gone(pid) for pid in killed), "it lives on")
        eventually(lambda before=before: load.answered > before + 4, "no answers after the HTTP server was killed")
    load.stop()
    assert not load.wrong
    assert not load.lost


def test_a_restarted_sidecar_loses_no_request(sidecar: SidecarProcess) -> None:
    check_restarts(sidecar)


def test_a_socket_that_comes_and_goes_under_load(sidecar: SidecarProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trunkline.endpoint._LOOK_S", 0.01)
    load = Load(2)
    pool = load._pool
    mounted = Path(os.environ["TRUNKLINE_SOCKET"])
    for _ in range(3):
        eventually(lambda: (pool.address or "").startswith("http:"), "not over HTTP")
        mounted.symlink_to(sidecar.socket)
        eventually(lambda: pool.address == f"unix:{mounted}", "not over the socket")
        mounted.unlink()
    load.stop()
    assert load.answered
    assert not load.wrong
    assert not load.lost


def test_a_restart_is_the_socket_s_end_and_its_beginning(sidecar: SidecarProcess) -> None:
    """The function has both. While the sidecar is away it asks nobody, and then whichever is there."""
    Path(os.environ["TRUNKLINE_SOCKET"]).symlink_to(sidecar.socket)
    load = Load(2)
    eventually(lambda: load.answered > 5, "no answers")
    for kill in (signal.SIGKILL, signal.SIGTERM):
        sidecar.process.send_signal(kill)
        sidecar.process.wait(PATIENCE_S)
        sidecar.start()
        eventually(lambda: (load._pool.address or "").startswith("unix:"), "not over the socket")
    load.stop()
    assert not load.wrong
    assert not load.lost


def test_a_call_waits_for_the_sidecar_once_it_has_been_reached(sidecar: SidecarProcess) -> None:
    model = client.Model("scaled", pool := Pool())
    model(np.ones((1, 8), np.float32))
    sidecar.stop()
    with pytest.raises(client.TrunklineError):
        model.call({"x": np.ones((1, 8), np.float32)}, deadline_s=0.3)
    sidecar.start()
    assert model(np.ones((1, 8), np.float32)).shape == (1, 8)
    pool.close()
