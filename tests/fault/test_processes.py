"""Real processes that die: the engine, the supervisor, the HTTP server, a client. Nothing accepted is lost."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from trunkline import client, errors
from trunkline.pool import Pool

from sidecar.segment import SHARED_MEMORY, segment_name
from tests.fault.matrix import Neighbour, Row, held
from tests.segments import PAGE
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, soon

# A start of everything takes some four seconds, most of which torch's import.
ENGINE_KILLS, SIDECAR_KILLS, PUSH_SIDECAR_KILLS = 100, 25, 18
SEED = 4
# For that many restarts, on a machine that may have others at work.
LATE_S = 900


@pytest.fixture
def sidecar(tmp_path: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarProcess]:
    with sidecar_process(tmp_path) as running:
        running.admin.push(scaled)
        monkeypatch.setenv("TRUNKLINE_SOCKET", str(running.socket))
        yield running


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def eventually(holds: Callable[[], bool], what: str) -> None:
    deadline = soon()
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


class Load:
    """Clients that call all the time and check every answer."""

    def __init__(self, count: int = 4) -> None:
        self.stopping = threading.Event()
        self.answered = 0
        self.wrong: list[object] = []
        self.lost: list[BaseException] = []
        self._pool = Pool()
        self._threads = [threading.Thread(target=self._call, args=(seed,)) for seed in range(count)]
        for thread in self._threads:
            thread.start()

    def _call(self, seed: int) -> None:
        model = client.Model("scaled", self._pool)
        random = np.random.default_rng(seed)
        expected = np.arange(8, dtype=np.float32)
        while not self.stopping.is_set():
            x = random.random((1 + seed, 8)).astype(np.float32)
            try:
                answer = model.call({"x": x}, deadline_s=PATIENCE_S)
            except errors.TrunklineError as error:
                self.lost.append(error)
                continue
            if not np.array_equal(answer, x * expected):
                self.wrong.append(answer)
            self.answered += 1

    def stop(self) -> None:
        self.stopping.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
        self._pool.close()


@pytest.mark.row("F4")
@pytest.mark.timeout(LATE_S)
def test_a_killed_engine_loses_no_request(row: Row, mortal: SidecarProcess) -> None:
    chosen = random.Random(SEED)
    with Neighbour(row, mortal.socket, threads=4) as neighbour:
        for _ in range(row.count(ENGINE_KILLS)):
            row.attempts += 1
            pid = mortal.await_engine()
            # At any moment; most engines live for long enough to be taken for healthy, so that the next one is started at once.
            time.sleep(chosen.uniform(0, 1))
            os.kill(pid, signal.SIGKILL)
            eventually(lambda pid=pid: mortal.await_engine() != pid, "no new engine")
            neighbour.await_answers()
    assert mortal.admin.get("status")["engine"]["generation"] == row.attempts + 1
    assert mortal.stop() == 0


# Whoever answered last may have been what a sidecar before has left, so that the one that was killed has made nothing yet.


def left_socket_of_another_kind(box: SidecarProcess) -> None:
    box.socket.unlink(missing_ok=True)
    box.socket.write_text("no socket")


def left_sockets_aside(box: SidecarProcess) -> None:
    for suffix in (".new", ".next"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stale:
            stale.bind(str(box.socket.with_suffix(suffix)))


def left_admin_socket_of_another_kind(box: SidecarProcess) -> None:
    (box.run_dir / "admin.sock").unlink(missing_ok=True)
    (box.run_dir / "admin.sock").write_text("no socket")


def left_settings_that_make_no_sense(box: SidecarProcess) -> None:
    for name in ("pins.json", "constraints.json", "places.json", "quotas.toml", "admin-tokens.toml", "admin.token"):
        (box.run_dir / name).write_bytes(b"\xff{")


def left_job(box: SidecarProcess) -> None:
    folder = box.run_dir / "jobs"
    folder.mkdir(exist_ok=True)
    (folder / "0123456789abcdef.json").write_text("{")
    (folder / "0123456789abcdef.lock").write_text("")


def left_segment(box: SidecarProcess) -> Path:
    return SHARED_MEMORY / segment_name(box.run_dir.resolve())[1:]


def left_segment_with_damage(box: SidecarProcess) -> None:
    if left_segment(box).exists():
        with left_segment(box).open("r+b") as file:
            file.seek(PAGE)
            file.write(os.urandom(PAGE))


def left_segment_of_another_layout(box: SidecarProcess) -> None:
    left_segment(box).write_bytes(b"TRUNKSEG, but of no version there is")


def left_segment_of_another_mode(box: SidecarProcess) -> None:
    if left_segment(box).exists():
        left_segment(box).chmod(0o666)


def left_segment_of_another_owner(box: SidecarProcess) -> None:
    # Only root can make it so; for others it is as left.
    if left_segment(box).exists() and not os.geteuid():
        os.chown(left_segment(box), 65534, 65534)


def left_segment_of_a_successor(box: SidecarProcess) -> None:
    path = left_segment(box)
    if path.exists():
        path.rename(path.with_name(path.name + "-next"))


LEFT: tuple[Callable[[SidecarProcess], None], ...] = (
    lambda box: None,
    left_socket_of_another_kind,
    left_sockets_aside,
    left_admin_socket_of_another_kind,
    left_settings_that_make_no_sense,
    left_job,
    left_segment_with_damage,
    left_segment_of_another_layout,
    left_segment_of_another_mode,
    left_segment_of_another_owner,
    left_segment_of_a_successor,
)


@pytest.mark.row("F5", "F30")
@pytest.mark.timeout(LATE_S)
def test_a_sidecar_that_is_killed_and_started_again_loses_no_request_whatever_it_finds(row: Row, mortal: SidecarProcess) -> None:
    with Neighbour(row, mortal.socket, threads=4) as neighbour:
        for number in range(row.count(SIDECAR_KILLS, push=PUSH_SIDECAR_KILLS)):
            row.attempts += 1
            mortal.process.kill()
            mortal.process.wait()
            LEFT[number % len(LEFT)](mortal)
            mortal.start()
            neighbour.await_answers()
    assert mortal.stop() == 0
    row.leaked["segments"] = len(list(SHARED_MEMORY.glob(f"{left_segment(mortal).name}*")))
    row.leaked["sockets aside"] = len(list(mortal.run_dir.rglob("*.next")))


def check_restarts(sidecar: SidecarProcess) -> None:
    """Restart a sidecar again and again, killed or told to end, while it is asked; nothing may be lost."""
    load = Load(2)
    eventually(lambda: load.answered > 5, "no answers")
    for kill in (signal.SIGTERM, signal.SIGKILL, signal.SIGTERM):
        before = load.answered
        sidecar.process.send_signal(kill)
        sidecar.process.wait(PATIENCE_S)
        sidecar.start()
        eventually(lambda before=before: load.answered > before + 4, "no answers after the restart")
    load.stop()
    assert not load.wrong
    assert not load.lost


def test_a_restarted_sidecar_loses_no_request(sidecar: SidecarProcess) -> None:
    check_restarts(sidecar)


def test_sigterm_answers_what_was_accepted_and_leaves_nothing(sidecar: SidecarProcess) -> None:
    model = client.Model("scaled", pool := Pool())
    model(np.ones((1, 8), np.float32))
    engine = sidecar.await_engine()
    assert sidecar.stop() == 0
    assert gone(engine)
    assert not sidecar.socket.exists()
    assert not (sidecar.run_dir / "admin.token").exists()
    pool.close()


def test_children_do_not_outlive_the_supervisor(sidecar: SidecarProcess) -> None:
    engine = sidecar.await_engine()
    children = [int(pid) for pid in Path(f"/proc/{sidecar.process.pid}/task/{sidecar.process.pid}/children").read_text().split()]
    assert engine in children
    assert len(children) == 2
    sidecar.process.kill()
    sidecar.process.wait()
    eventually(lambda: all(gone(pid) for pid in children), "children live on")


def test_a_killed_http_server_is_replaced_and_functions_do_not_notice(sidecar: SidecarProcess) -> None:
    load = Load(1)
    engine = sidecar.await_engine()
    children = Path(f"/proc/{sidecar.process.pid}/task/{sidecar.process.pid}/children")
    for _ in range(3):
        http = [int(pid) for pid in children.read_text().split() if int(pid) != engine]
        for pid in http:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda http=http: all(gone(pid) for pid in http), "it lives on")
        assert sidecar.await_engine() == engine
    load.stop()
    assert load.answered
    assert not load.lost


def test_the_probe_follows_the_engine(sidecar: SidecarProcess) -> None:
    def probe(*flags: str) -> int:
        environment = child_environment() | {"TRUNKLINE_RUN_DIR": str(sidecar.run_dir)}
        return subprocess.run(
            [sys.executable, "-m", "sidecar.probe", *flags], env=environment, timeout=PATIENCE_S, check=False
        ).returncode

    assert (probe(), probe("--live")) == (0, 0)
    # One that an operator drains is not ready, and not to be killed for it.
    drain = [sys.executable, "-m", "sidecar", "--admin", f"unix:{sidecar.run_dir / 'admin.sock'}", "drain"]
    subprocess.run(drain, env=child_environment(), timeout=PATIENCE_S, check=True)
    assert (probe(), probe("--live")) == (1, 0)
    sidecar.stop()
    assert (probe(), probe("--live")) == (1, 1)


def test_a_store_that_cannot_be_made_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    flags = ["--run-dir", str(tmp_path / "run"), "--store-dir", str(tmp_path / "file" / "store"), "--admin-port", "0"]
    refused = subprocess.run(
        [sys.executable, "-m", "sidecar", "serve", *flags],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env=child_environment(),
    )
    assert refused.returncode == 1
    assert str(tmp_path / "file") in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.row("F30")
def test_a_second_sidecar_in_one_place_is_refused(row: Row, sidecar: SidecarProcess) -> None:
    row.attempts += 1
    second = subprocess.run(
        sidecar.command(), capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=child_environment()
    )
    assert second.returncode == 1
    assert "a sidecar is running in" in second.stderr
    assert sidecar.await_engine()


def child_environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_killed_client_leaves_nothing_in_the_sidecar(sidecar: SidecarProcess) -> None:
    engine = sidecar.await_engine()
    before = held(sidecar)["engine descriptors"]
    code = (
        "import numpy as np\nfrom trunkline import model\nm = model('scaled')\n"
        "print('up', flush=True)\nwhile True: m(np.ones((1, 8), np.float32))"
    )
    for _ in range(5):
        victim = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=child_environment())
        assert victim.stdout is not None
        victim.stdout.readline()
        victim.kill()
        victim.wait()
        victim.stdout.close()
    eventually(lambda: held(sidecar)["engine descriptors"] <= before, "descriptors leaked")
    assert sidecar.await_engine() == engine


def test_admin_socket_and_token_are_not_for_everybody(sidecar: SidecarProcess) -> None:
    assert sidecar.socket.stat().st_mode & 0o777 == 0o666
    assert (sidecar.run_dir / "public").stat().st_mode & 0o777 == 0o755
    assert (sidecar.run_dir / "admin.token").stat().st_mode & 0o777 == 0o600
    assert (sidecar.run_dir / "admin.sock").stat().st_mode & 0o777 == 0o660
