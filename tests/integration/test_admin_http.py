"""The admin endpoint as gunicorn serves it, without an engine: what only a real server and real sockets show."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import requests
import requests_unixsocket
from trunkline.errors import SidecarUnavailable, TrunklineError

from sidecar.admin_client import AdminClient
from sidecar.config import load_settings
from sidecar.errors import BundleError, ConfigError, StoreFull
from sidecar.http.server import AdminServer, EnginePool, listen_tcp, listen_unix
from tests.bundles import write_adding_bundle
from tests.waiting import PATIENCE_S, soon

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


SERVE = """
import os
from sidecar.config import load_settings
from sidecar.http.server import AdminServer, check_settings, listen_tcp, listen_unix
settings = load_settings({}, os.environ)
check_settings(settings)
AdminServer(settings, [listen_unix(settings.run_dir / "admin.sock"), listen_tcp(settings)]).run()
"""


class HttpServer:
    """The admin endpoint alone, without a supervisor. Files beyond ``file_limit_bytes`` are refused by the system.

    ``before`` is Python that its process begins with; ``settings`` are its settings, as the environment has them.
    """

    def __init__(self, folder: Path, file_limit_bytes: int = 0, before: str = "", **settings: object) -> None:
        port = free_port()
        self.run_dir = folder / "run"
        (self.run_dir / "public").mkdir(parents=True)
        (self.run_dir / "admin.token").write_text("0" * 64)
        self.store_dir = folder / "store"
        self.socket = self.run_dir / "admin.sock"
        self.url = f"http://127.0.0.1:{port}"
        self.log = folder / "log"
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline",
            "TRUNKLINE_RUN_DIR": str(self.run_dir),
            "TRUNKLINE_STORE_DIR": str(self.store_dir),
            "TRUNKLINE_ADMIN_PORT": str(port),
            **{f"TRUNKLINE_{key.upper()}": str(value) for key, value in settings.items()},
        }
        limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit_bytes}, {file_limit_bytes}));"
        code = (limited if file_limit_bytes else "") + before + SERVE
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=log, stderr=log)
        deadline = soon()
        while not self._answers():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def _answers(self) -> bool:
        try:
            return (
                requests_unixsocket.get(f"http+unix://{quote(str(self.socket), safe='')}/healthz", timeout=PATIENCE_S).status_code
                == 200
            )
        except requests.RequestException:
            return False

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_S)


@pytest.fixture
def server(folder: Path) -> Iterator[HttpServer]:
    running = HttpServer(folder)
    yield running
    running.stop()


def test_both_addresses_answer_and_only_loopback_names_are_taken(server: HttpServer) -> None:
    assert server.socket.stat().st_mode & 0o777 == 0o660
    assert (server.store_dir / "blobs").stat().st_mode & 0o777 == 0o700
    for address in (f"unix:{server.socket}", server.url):
        with AdminClient(address) as client, pytest.raises(SidecarUnavailable, match="the engine does not answer"):
            client.get("status")
    ready = requests.get(f"{server.url}/readyz", timeout=PATIENCE_S)
    assert ready.status_code == 503
    assert ready.headers["Retry-After"] == "1"
    assert str(server.run_dir) not in ready.text
    assert requests.get(f"{server.url}/healthz", headers={"Host": "localhost:1"}, timeout=PATIENCE_S).ok
    rebound = requests.get(f"{server.url}/healthz", headers={"Host": "evil.example"}, timeout=PATIENCE_S)
    assert rebound.status_code == 400
    assert rebound.json()["error"]["code"] == "invalid_input"


def test_no_header_says_which_route_or_scheme_is_meant(server: HttpServer) -> None:
    over_socket = f"http+unix://{quote(str(server.socket), safe='')}"
    for get, base in ((requests_unixsocket.get, over_socket), (requests.get, server.url)):
        assert get(f"{base}/v2/healthz", headers={"SCRIPT_NAME": "/v2"}, timeout=PATIENCE_S).status_code == 404
        assert get(f"{base}/healthz", headers={"SCRIPT_NAME": "/v2"}, timeout=PATIENCE_S).status_code == 200
    origin = {"Origin": server.url.replace("http", "https", 1), "Content-Type": "application/json"}
    answer = requests.post(f"{server.url}/admin/v1/resume", headers=origin | {"X-Forwarded-Proto": "https"}, timeout=PATIENCE_S)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_input")


def test_nobody_can_fill_the_log_with_what_is_no_request(folder: Path) -> None:
    running = HttpServer(folder, admin_workers=1)
    began_s = time.monotonic()
    for _ in range(100):
        with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), 5) as stranger:
            stranger.sendall(b"no request\r\n\r\n")
            assert stranger.recv(4096).startswith(b"HTTP/1.1 400")
    seconds = int(time.monotonic() - began_s) + 2
    running.stop()
    assert 1 <= running.log.read_text().count("Invalid request from") <= min(5 * seconds, 90)


def test_a_model_is_stored_although_the_engine_is_away(server: HttpServer, folder: Path) -> None:
    write_adding_bundle(folder / "adder", "adder", [1.0] * 1000)
    for address in (f"unix:{server.socket}", server.url):
        client = AdminClient(address)
        with pytest.raises(SidecarUnavailable):
            client.push(folder / "adder")
        assert client.post("store/verify")["broken"] == {}
        client.close()
        assert (server.store_dir / "models" / "adder.json").exists()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_every_loopback_host_is_bound_as_it_must_be_written(host: str, folder: Path) -> None:
    settings = load_settings({"admin_host": host, "admin_port": free_port(), "run_dir": folder}, {})
    with listen_tcp(settings) as made:
        assert made.getsockname()[:2] == ("127.0.0.1" if host == "localhost" else host, settings.admin_port)
        assert AdminServer(settings, [made]).cfg.address == [made.fileno()]
        with pytest.raises(ConfigError, match=rf"{settings.admin_port} .*in use.*choose another --admin-port"):
            listen_tcp(settings)


def test_port_zero_leaves_the_unix_socket_alone(folder: Path) -> None:
    settings = load_settings({"admin_port": 0, "run_dir": folder}, {})
    assert listen_tcp(settings) is None


def test_the_unix_socket_replaces_what_an_earlier_life_left(folder: Path) -> None:
    for _ in range(2):
        with listen_unix(folder / "admin.sock") as made:
            assert (folder / "admin.sock").stat().st_mode & 0o777 == 0o660
            assert made.getsockname() == str(folder / "admin.sock")


def test_bodies_in_chunks_are_refused_whole(server: HttpServer) -> None:
    answer = requests.post(
        f"{server.url}/admin/v1/store/gc",
        data=iter([b'{"dry_run": true}']),
        headers={"Content-Type": "application/json"},
        timeout=PATIENCE_S,
    )
    assert answer.status_code == 400
    assert "Content-Length" in answer.json()["error"]["message"]


def test_those_who_fall_silent_in_the_middle_do_not_hold_the_endpoint(server: HttpServer) -> None:
    silent = [socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) for _ in range(8)]
    for each in silent:
        each.sendall(b"GET /healthz HT")
    try:
        assert requests.get(f"{server.url}/healthz", timeout=PATIENCE_S).ok
    finally:
        for each in silent:
            each.close()


@pytest.mark.parametrize("over", ["socket", "tcp"])
def test_a_full_disk_in_the_middle_of_a_push_is_told_as_such(folder: Path, over: str) -> None:
    running = HttpServer(folder, file_limit_bytes=1 << 20)
    try:
        write_adding_bundle(folder / "large", "large", [1.5] * 2_000_000)
        client = AdminClient(running.url if over == "tcp" else f"unix:{running.socket}")
        with pytest.raises(StoreFull, match="8000000 bytes could not be stored"):
            client.push(folder / "large")
        assert not [path for path in (running.store_dir / "blobs").rglob("*") if path.is_file()]
        for _ in range(10):
            with pytest.raises(StoreFull):
                client.push(folder / "large")
            assert client.post("blobs/missing", {"digests": []}) == {"missing": []}
        write_adding_bundle(folder / "small", "small", [1.5])
        with pytest.raises(SidecarUnavailable):
            client.push(folder / "small")
        assert (running.store_dir / "models" / "small.json").exists()
        client.close()
    finally:
        running.stop()


class Recorder:
    """A client whose requests go nowhere."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, client: AdminClient) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        monkeypatch.setattr(client, "_ask", self.ask)

    def ask(self, method: str, path: str, **arguments: Any) -> Any:
        self.asked.append((method, path, arguments))
        if path == "blobs/missing":
            return {"missing": arguments["json"]["digests"]}
        if "data" in arguments:
            assert sum(len(chunk) for chunk in arguments["data"]) == len(arguments["data"])
        return {}


def test_questions_about_blobs_fit_into_the_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A model may have a hundred thousand weights; one question about all of them would be refused."""
    from sidecar import admin_client
    from sidecar.http.access import MAX_BODY_BYTES

    digests = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(admin_client._DIGESTS_AT_ONCE)]
    assert len(str({"digests": digests})) < MAX_BODY_BYTES
    monkeypatch.setattr(admin_client, "_DIGESTS_AT_ONCE", 1)
    bundle = write_adding_bundle(tmp_path, "m", [1.0])
    client = AdminClient("http://127.0.0.1:1")
    recorder = Recorder(monkeypatch, client)
    done: list[tuple[int, int]] = []
    pushed = client.push(tmp_path, lambda *both: done.append(both))
    assert [path for _, path, _ in recorder.asked] == ["blobs/missing", f"blobs/{bundle.graph.weights[0].digest}", "models/m"]
    assert done == [(0, 4), (4, 4)]
    assert (pushed.sent_count, pushed.sent_bytes) == (1, 4)


def test_a_blob_that_cannot_be_opened_is_the_bundles_fault(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bundle = write_adding_bundle(tmp_path, "m", [1.0])
    client = AdminClient("http://127.0.0.1:1")
    Recorder(monkeypatch, client)
    monkeypatch.setattr("sidecar.admin_client.read_bundle", lambda directory: bundle)
    (tmp_path / "blobs" / bundle.graph.weights[0].digest).unlink()
    with pytest.raises(BundleError, match="cannot be read: No such file"):
        client.push(tmp_path)


@pytest.mark.parametrize("address", ["", "unix:", "nonsense", "ftp://x", "/run/admin.sock", "http://127.0.0.1:1/path"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="it must be unix:PATH"):
        AdminClient(address)


def test_a_command_that_takes_long_holds_up_no_other() -> None:
    """The first command waits for the second, which so must have a session of its own; afterwards sessions are reused."""
    made: list[object] = []
    second_ran = threading.Event()

    class Session:
        def __init__(self) -> None:
            made.append(self)

        def command(self, name: str, arguments: dict[str, object] | None = None) -> object:
            if name == "load":
                assert second_ran.wait(PATIENCE_S)
            elif name == "status":
                second_ran.set()
            elif name == "unknown":
                raise TrunklineError("no")
            return self

    pool = EnginePool(Session)
    loading = threading.Thread(target=pool.command, args=("load",))
    loading.start()
    while len(made) < 1:
        time.sleep(0.001)
    pool.command("status")
    loading.join(PATIENCE_S)
    assert len(made) == 2
    with pytest.raises(TrunklineError):
        pool.command("unknown")
    assert pool.command("memory") in made
    assert len(made) == 2


def test_inferences_that_wait_leave_threads_to_others(folder: Path) -> None:
    server = HttpServer(folder, admin_workers=1)
    path = server.run_dir / "relay.sock"
    engine = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    engine.bind(str(path))
    # Connects, and never says welcome.
    engine.listen(64)
    answers: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        answers.put(requests.post(f"{server.url}/v2/models/m/infer", data=b"{}", timeout=PATIENCE_S))

    threads = [threading.Thread(target=ask) for _ in range(20)]
    for thread in threads:
        thread.start()
    # One caller may have 16 under way.
    refused = [answers.get(timeout=PATIENCE_S) for _ in range(4)]
    assert {answer.status_code for answer in refused} == {503}
    assert {answer.json()["code"] for answer in refused} == {"queue_full"}
    assert {answer.headers["Retry-After"] for answer in refused} == {"1"}
    assert requests.get(f"{server.url}/v2/health/live", timeout=PATIENCE_S).json() == {"live": True}
    assert requests.get(f"{server.url}/healthz", timeout=PATIENCE_S).ok
    assert answers.empty()
    path.unlink()
    engine.close()
    for thread in threads:
        thread.join(PATIENCE_S)
    ended = [answers.get_nowait() for _ in range(16)]
    assert {answer.json()["code"] for answer in ended} == {"sidecar_unavailable"}
    assert {answer.status_code for answer in ended} == {503}
    server.stop()


def test_an_inference_that_is_too_long_is_refused_before_it_is_read(server: HttpServer) -> None:
    for size, told in ((1 << 40, "1099511627776 bytes, at most 83886080"), (20 << 20, "20971520 bytes, at most 16777216")):
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=PATIENCE_S)
        connection.putrequest("POST", "/v2/models/m/infer")
        connection.putheader("Content-Length", str(size))
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status == 413
        assert told in json.loads(answer.read())["error"]
        connection.close()
