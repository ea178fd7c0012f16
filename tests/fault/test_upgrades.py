"""A sidecar takes the place of another, under load, and whichever of them is killed meanwhile: nothing accepted is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from trunkline import client
from trunkline.errors import TrunklineError
from trunkline.pool import Pool

from sidecar.rundirectory import RunDirectory
from sidecar.segment import SHARED_MEMORY, segment_name
from sidecar.tenants import hash_of
from tests.fault.matrix import EXPECTED, Neighbour, Row, descendants, pool_at, write_scaled
from tests.integration.test_admin_http import free_port
from tests.sidecar_process import Process, SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, until

# Starts of real sidecars, one after the other, on a machine that may have others at work.
pytestmark = pytest.mark.timeout(900)

UPGRADES = 20
KILLS = 3


@contextlib.contextmanager
def upgrading(box: SidecarProcess) -> Iterator[Process]:
    """Start a sidecar that takes over; in the end it is killed, unless it has become that of the box."""
    new = box.spawn("--take-over")
    try:
        yield new
    finally:
        if box.process is not new:
            new.kill()
            new.wait(PATIENCE_S)


def upgrade(box: SidecarProcess) -> None:
    """Have another sidecar take over, and wait until it is alone."""
    with upgrading(box) as new:
        finish(box, new)


def finish(box: SidecarProcess, new: Process) -> None:
    assert box.process.wait(PATIENCE_S) == 0
    box.process = new
    assert box.await_engine() in descendants(new.pid)
    await_owner(box)


def await_owner(box: SidecarProcess) -> None:
    """Wait until the one that has taken over knows that it is alone: until then, no other may."""
    run = RunDirectory(box.run_dir)
    until(lambda: not run.has_successor())


def inode(path: Path) -> int:
    return path.stat().st_ino if path.exists() else 0


def aside(box: SidecarProcess) -> Path:
    return box.socket.with_suffix(".next")


def answers(box: SidecarProcess, model: str) -> bool:
    pool = pool_at(box.socket)
    try:
        return client.Model(model, pool).call({"x": np.ones((1, 8), np.float32)}, deadline_s=PATIENCE_S).shape == (1, 8)
    finally:
        pool.close()


def segments(box: SidecarProcess) -> list[str]:
    """Return the names of the segments of the box's run directory."""
    return [path.name for path in SHARED_MEMORY.glob(f"{segment_name(box.run_dir.resolve())[1:]}*")]


@pytest.mark.row("F6")
def test_upgrades_under_load_lose_nothing(row: Row, mortal: SidecarProcess) -> None:
    before = segments(mortal)
    with Neighbour(row, mortal.socket, threads=4) as neighbour:
        for _ in range(row.count(UPGRADES)):
            row.attempts += 1
            upgrade(mortal)
            neighbour.await_answers()
    # One sidecar, one segment, by the name under which the next one finds it.
    assert segments(mortal) == before == [segment_name(mortal.run_dir.resolve())[1:]]
    assert not aside(mortal).exists()


@pytest.mark.row("F6")
def test_one_that_is_killed_while_it_gets_ready_is_not_noticed(row: Row, mortal: SidecarProcess) -> None:
    engine, before = mortal.await_engine(), inode(mortal.socket)
    with Neighbour(row, mortal.socket, threads=2) as neighbour:
        for number in range(row.count(KILLS)):
            row.attempts += 1
            aside(mortal).unlink(missing_ok=True)
            with upgrading(mortal) as new:
                # At the start, and when it listens aside already.
                until(lambda number=number: not number % 2 or aside(mortal).exists() or inode(mortal.socket) != before)  # type: ignore[misc]
                os.kill(new.pid, signal.SIGKILL)
            # It may have been quicker, and in place.
            neighbour.await_answers()
            if inode(mortal.socket) != before:
                break
    row.leaked["engines that died"] = int(inode(mortal.socket) == before and mortal.await_engine() != engine)


@pytest.mark.row("F6")
def test_one_that_is_killed_in_place_gives_the_place_back(row: Row, mortal: SidecarProcess) -> None:
    with Neighbour(row, mortal.socket, threads=2) as neighbour:
        for _ in range(row.count(1)):
            row.attempts += 1
            before = inode(mortal.socket)
            # It does not look before the other is dead.
            os.kill(mortal.process.pid, signal.SIGSTOP)
            with upgrading(mortal):
                until(lambda before=before: inode(mortal.socket) not in (0, before))  # type: ignore[misc]
            taken = inode(mortal.socket)
            os.kill(mortal.process.pid, signal.SIGCONT)
            until(lambda taken=taken: inode(mortal.socket) != taken)  # type: ignore[misc]
            neighbour.await_answers()
            assert mortal.await_engine() in descendants(mortal.process.pid)
    assert "nobody is about to take over; it listens there again" in mortal.log.read_text()


@pytest.mark.row("F6")
def test_whoever_runs_may_be_killed_while_another_takes_over(row: Row, mortal: SidecarProcess) -> None:
    with Neighbour(row, mortal.socket, threads=2) as neighbour:
        for number in range(row.count(KILLS)):
            row.attempts += 1
            before, old = inode(mortal.socket), mortal.process
            with upgrading(mortal) as new:
                # At the start, when the other listens aside, and when that is in place.
                reached = (lambda: True, aside(mortal).exists, lambda before=before: inode(mortal.socket) != before)[number % 3]  # type: ignore[misc]
                until(lambda reached=reached, before=before: reached() or inode(mortal.socket) != before)  # type: ignore[misc]
                os.kill(old.pid, signal.SIGKILL)
                old.wait(PATIENCE_S)
                until(lambda before=before: inode(mortal.socket) not in (0, before))  # type: ignore[misc]
                mortal.process = new
            neighbour.await_answers()
            until(lambda new=new: mortal.await_engine() in descendants(new.pid))  # type: ignore[misc]
            await_owner(mortal)


@pytest.mark.row("F6")
def test_what_operators_do_meanwhile_is_known_afterwards(row: Row, mortal: SidecarProcess, tmp_path: Path) -> None:
    with Neighbour(row, mortal.socket):
        row.attempts += 1
        before = inode(mortal.socket)
        with upgrading(mortal) as new:
            until(aside(mortal).exists)
            # From here on it is not told of anything, and cannot be in place before what follows is done.
            os.kill(new.pid, signal.SIGSTOP)
            if inode(mortal.socket) == before:
                mortal.admin.push(write_scaled(tmp_path, "later"))
                mortal.admin.post("models/later/pin")
            os.kill(new.pid, signal.SIGCONT)
            finish(mortal, new)
        assert answers(mortal, "later")
        until(lambda: bool(mortal.admin.get("models/later")["pinned"]))


@pytest.mark.row("F6")
def test_what_an_older_version_removes_at_its_end_is_made_again(row: Row, mortal: SidecarProcess) -> None:
    with Neighbour(row, mortal.socket, threads=2) as neighbour:
        row.attempts += 1
        before, old = inode(mortal.socket), mortal.process
        os.kill(old.pid, signal.SIGSTOP)
        with upgrading(mortal) as new:
            until(lambda: inode(mortal.socket) != before)
            for path in (mortal.socket, mortal.run_dir / "relay.sock", mortal.run_dir / "admin.token"):
                path.unlink()
            mortal.process = new
            os.kill(old.pid, signal.SIGKILL)
            old.wait(PATIENCE_S)
            until(mortal.socket.exists)
        assert answers(mortal, "scaled")
        neighbour.await_answers()
        assert mortal.await_engine() in descendants(new.pid)


def test_one_that_cannot_serve_takes_nothing_over(mortal_box: SidecarProcess) -> None:
    engine = mortal_box.await_engine()
    refused = mortal_box.spawn("--take-over", "--device", "cuda:63", "--memory-budget", "1GB")
    assert refused.wait(PATIENCE_S) == 1
    told = mortal_box.log.read_text()
    assert "the engine that was to take over in" in told
    assert mortal_box.await_engine() == engine
    assert mortal_box.process.poll() is None
    assert not aside(mortal_box).exists()


def test_two_cannot_take_over_at_a_time(mortal_box: SidecarProcess) -> None:
    with upgrading(mortal_box) as new:
        until((mortal_box.run_dir / "successor.lock").exists)
        os.kill(new.pid, signal.SIGSTOP)
        second = mortal_box.spawn("--take-over")
        assert second.wait(PATIENCE_S) == 1
        assert "another sidecar is about to take over in" in mortal_box.log.read_text()
        os.kill(new.pid, signal.SIGCONT)
        finish(mortal_box, new)


def test_where_none_runs_it_starts_as_any(mortal_box: SidecarProcess) -> None:
    assert mortal_box.stop() == 0
    mortal_box.process = mortal_box.spawn("--take-over")
    assert mortal_box.await_engine()
    assert answers(mortal_box, "scaled")
    upgrade(mortal_box)
    assert mortal_box.stop() == 0
    assert not list(mortal_box.run_dir.rglob("*.sock"))


TOKEN = b"vision's token"
TENANTS = """
[tenants.vision]
models = ["scaled"]
tokens = ["sha256:{digest}"]
socket = true
"""


def test_sockets_of_tenants_are_taken_over_too(tmp_path: Path, scaled: Path) -> None:
    (tmp_path / "quotas.toml").write_text(TENANTS.format(digest=hash_of(TOKEN)))
    with sidecar_process(tmp_path, "--quotas", str(tmp_path / "quotas.toml")) as box:
        box.admin.push(scaled)
        path = box.run_dir / "tenants" / "vision" / "trunkline.sock"
        before, pool = inode(path), pool_at(path, TOKEN)
        model = client.Model("scaled", pool)
        for _ in range(2):
            upgrade(box)
            assert inode(path) not in (0, before)
            assert model.call({"x": np.ones((1, 8), np.float32)}, deadline_s=PATIENCE_S).shape == (1, 8)
            before = inode(path)
        pool.close()
        assert not path.with_suffix(".next").exists()


@pytest.mark.row("F6")
def test_functions_without_a_socket_go_on_over_http(
    row: Row, tmp_path: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, port = threading.Event(), free_port()
    monkeypatch.setenv("TRUNKLINE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.delenv("TRUNKLINE_SOCKET", raising=False)

    def ask() -> None:
        pool = Pool()
        model = client.Model("scaled", pool)
        while not stop.is_set():
            x = np.full((2, 8), row.answered % 100, np.float32)
            try:
                row.wrong += not np.array_equal(model.call({"x": x}, deadline_s=PATIENCE_S), x * EXPECTED)
                row.answered += 1
            except TrunklineError as error:
                row.lose(error)
        pool.close()

    with sidecar_process(tmp_path, "--admin-port", str(port)) as box, ThreadPoolExecutor(1) as threads:
        box.admin.push(scaled)
        asking = threads.submit(ask)
        try:
            row.attempts += 1
            upgrade(box)
            reached = row.answered + 20
            until(lambda: row.answered > reached or row.lost > 0)
        finally:
            stop.set()
        asking.result(2 * PATIENCE_S)


@pytest.fixture
def mortal_box(tmp_path: Path, scaled: Path) -> Iterator[SidecarProcess]:
    with sidecar_process(tmp_path) as box:
        box.admin.push(scaled)
        yield box
