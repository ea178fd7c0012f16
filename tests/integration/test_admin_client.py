"""The command line's HTTP client against a server that answers what a test says: credentials, certificates, old sidecars."""

from __future__ import annotations

import gc
import json
import socket
import ssl
import threading
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from trunkline.errors import MalformedFrame, SidecarUnavailable, UnknownModel, VersionMismatch

from sidecar.admin_client import AdminClient
from sidecar.cli.main import main

CERTIFICATES = Path(__file__).parents[1] / "certificates"
CA_FILE = CERTIFICATES / "localhost.pem"


class Fake(HTTPServer):
    """Answers every request with ``status`` and ``body``; remembers the last one's route and headers."""

    def __init__(self, *, encrypted: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        if encrypted:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CA_FILE, CERTIFICATES / "localhost.key")
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.status = 200
        self.body: Any = {"engine": "info"}
        self.asked: list[tuple[str, str, Any]] = []
        self.authorization: list[str | None] = []
        self.url = f"{'https' if encrypted else 'http'}://127.0.0.1:{self.server_port}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self._thread.start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Be quiet about who does not trust the certificate."""

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Fake

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.command, self.path, json.loads(body) if body else None))
        self.server.authorization.append(self.headers["Authorization"])
        text = self.server.body if isinstance(self.server.body, str) else json.dumps(self.server.body)
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_PUT = do_DELETE = _answer

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.stop()


@pytest.fixture
def encrypted() -> Iterator[Fake]:
    made = Fake(encrypted=True)
    yield made
    made.stop()


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    path = tmp_path / "token"
    path.write_text("secret-token\n")
    return path


def run(fake: Fake, *words: str, **environment: str | None) -> Result:
    return CliRunner().invoke(main, ["--admin", fake.url, *words], env=environment)


def test_a_token_is_sent_where_one_is_named(fake: Fake, token_file: Path) -> None:
    assert run(fake, "log-level").exit_code == 0
    assert run(fake, "--token-file", str(token_file), "log-level").exit_code == 0
    assert run(fake, "log-level", TRUNKLINE_ADMIN_TOKEN_FILE=str(token_file)).exit_code == 0
    assert fake.authorization == [None, "Bearer secret-token", "Bearer secret-token"]


@pytest.mark.parametrize("content", [b"", b"two words", b"a\nb", "übel".encode(), b"a" * 2000])
def test_a_file_without_a_token_is_refused_and_not_shown(fake: Fake, token_file: Path, content: bytes) -> None:
    token_file.write_bytes(content)
    result = run(fake, "--token-file", str(token_file), "log-level")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: config_error: {token_file} holds no token")
    assert not content or content.decode() not in result.stderr
    assert fake.asked == []


def test_a_file_that_cannot_be_read_is_told(fake: Fake, token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = run(fake, "--token-file", str(token_file.parent / "none"), "log-level")
    assert (missing.exit_code, "none cannot be read (No such file or directory)" in missing.stderr) == (1, True)

    def refused(path: Path, *arguments: object) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_text", refused)
    result = run(fake, "--token-file", str(token_file), "log-level")
    assert result.exit_code == 1
    assert f"the token in {token_file} cannot be read (Permission denied); see --token-file" in result.stderr
    assert fake.asked == []


def test_an_authority_that_is_not_there_is_told(encrypted: Fake, fake: Fake, tmp_path: Path) -> None:
    refused = run(encrypted, "--ca-file", str(tmp_path / "none"), "log-level")
    assert refused.exit_code == 1
    assert f"the certificate in {tmp_path}/none cannot be read (no such file); see --ca-file" in refused.stderr
    assert encrypted.asked == []
    # Where nothing is trusted by it, it is not missed.
    assert run(fake, "--ca-file", str(tmp_path / "none"), "log-level").exit_code == 0


def test_the_socket_needs_no_token(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("no token")
    words = ["--admin", f"unix:{tmp_path}/none.sock", "--token-file", str(tmp_path / "token"), "log-level"]
    assert CliRunner().invoke(main, words).exit_code == 3


def test_who_has_no_token_is_told_where_to_name_one(fake: Fake) -> None:
    fake.status = 401
    fake.body = {"error": {"code": "unauthorized", "message": "a token is needed", "retryable": False, "details": {}}}
    result = run(fake, "status")
    assert result.exit_code == 1
    first, second = result.stderr.splitlines()
    assert first == "error: unauthorized: a token is needed"
    assert "--token-file" in second


def test_a_certificate_is_checked(encrypted: Fake) -> None:
    refused = run(encrypted, "log-level")
    assert refused.exit_code == 3
    assert "has no certificate that is trusted here" in refused.stderr
    assert encrypted.asked == []
    assert run(encrypted, "--ca-file", str(CA_FILE), "log-level").stdout == "engine: info\n"
    assert run(encrypted, "log-level", TRUNKLINE_ADMIN_CA=str(CA_FILE)).exit_code == 0


def test_a_file_without_certificates_is_told(encrypted: Fake, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    refused = run(encrypted, "--ca-file", str(tmp_path / "empty"), "log-level")
    assert refused.exit_code == 3
    assert "--ca-file" in refused.stderr


@pytest.mark.parametrize(("status", "code"), [(404, "not_found"), (405, "method_not_allowed")])
@pytest.mark.parametrize("words", [["drain"], ["evict", "--bytes", "1GB"], ["log-level", "debug"], ["sessions"], ["residency"]])
def test_a_sidecar_that_is_older_is_told_to_be(fake: Fake, status: int, code: str, words: list[str]) -> None:
    fake.status = status
    fake.body = {"error": {"code": code, "message": "Not Found", "retryable": False, "details": {"status": status}}}
    result = run(fake, *words)
    assert result.exit_code == 1
    assert route_of(result.stderr) == words[0]
    assert "it is older than this command; upgrade it" in result.stderr
    assert result.stdout == ""


def route_of(told: str) -> str:
    return told.partition("does not know ")[2].split()[1].rstrip(":").partition("?")[0]


def test_a_model_that_is_not_there_is_no_old_sidecar(fake: Fake) -> None:
    fake.status = 404
    fake.body = {"error": {"code": "unknown_model", "message": "no m", "retryable": False, "details": {}}}
    with AdminClient(fake.url) as client, pytest.raises(UnknownModel):
        client.get("models/m")


def test_what_answers_and_is_no_sidecar_is_told(fake: Fake) -> None:
    fake.body = "<html>"
    with AdminClient(fake.url) as client:
        with pytest.raises(MalformedFrame, match="200 without JSON"):
            client.get("status")
        assert client.metrics() == "<html>"
        fake.status = 404
        with pytest.raises(MalformedFrame, match="404 without JSON"):
            client.metrics()
        fake.body = {"error": {"code": "not_found", "message": "", "details": {}}}
        with pytest.raises(VersionMismatch, match="GET /metrics"):
            client.metrics()


def test_a_socket_that_is_not_ours_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(self: Any, *arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("sidecar.unixhttp._Connection.connect", refused)
    with (
        AdminClient(f"unix:{tmp_path}/admin.sock") as client,
        pytest.raises(SidecarUnavailable, match="may not be used by this user"),
    ):
        client.get("status")


def test_a_socket_that_nobody_answers_at_is_closed(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        with AdminClient(f"unix:{tmp_path}/none.sock") as client, pytest.raises(SidecarUnavailable, match="no sidecar answers"):
            client.get("status")
        gc.collect()


def test_one_socket_serves_for_all_that_is_asked(tmp_path: Path) -> None:
    made: list[str] = []

    class Listening(ThreadingHTTPServer):
        address_family = socket.AF_UNIX

        def get_request(self) -> Any:
            made.append("connection")
            connection, _ = super().get_request()
            return connection, ("unix", 0)

        def server_bind(self) -> None:
            self.socket.bind(self.server_address)

    class Keeping(_Handler):
        protocol_version = "HTTP/1.1"

    listening: Any = Listening(f"{tmp_path}/admin.sock", Keeping)  # type: ignore[arg-type]
    listening.body, listening.status, listening.asked, listening.authorization = {}, 200, [], []
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    with AdminClient(f"unix:{tmp_path}/admin.sock") as client:
        for path in ("status", "models", "memory"):
            assert client.get(path) == {}
    listening.shutdown()
    thread.join()
    listening.server_close()
    assert made == ["connection"]
    assert [path for _, path, _ in listening.asked] == ["/admin/v1/status", "/admin/v1/models", "/admin/v1/memory"]


def test_nothing_is_left_open_by_a_command(nothing_leaks: None) -> None:
    fake = Fake()
    try:
        for _ in range(3):
            assert run(fake, "log-level").exit_code == 0
        fake.status = 400
        assert run(fake, "log-level").exit_code == 1
    finally:
        fake.stop()
