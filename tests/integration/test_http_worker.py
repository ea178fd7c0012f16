"""Workers of the admin endpoint, and those who do not go on: real sockets, as strangers have them. Nobody else waits for them."""

from __future__ import annotations

import array
import contextlib
import fcntl
import http.client
import json
import socket
import ssl
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from sidecar.admintokens import NEW_FILE, OPERATE, with_token
from sidecar.http.server import _THREADS
from tests.integration.test_admin_http import HttpServer
from tests.integration.test_tokens import certificate as certificate

# More than there are threads, so that one that is not given back is missed.
MANY = _THREADS + 4
ASK = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n"
# What is waited for is a fraction of it.
LONG_S = 45.0
# The system keeps some more of what nobody takes.
FULL_BYTES = 100_000
HASTY = "import sidecar.http.worker as worker; worker.SILENCE_S, worker.ImpatientWorker.header_s, worker._BODY_S = 1, 2.0, 2.0;"


@pytest.fixture
def server(folder: Path) -> Iterator[HttpServer]:
    running = HttpServer(folder, before=HASTY, admin_workers=1)
    yield running
    running.stop()


@pytest.fixture
def secure(folder: Path, certificate: tuple[Path, Path]) -> Iterator[HttpServer]:
    """An endpoint with TLS, and a token."""
    tokens = folder / "tokens.toml"
    tokens.write_text(with_token(NEW_FILE, "", "bob", OPERATE, "changes"))
    running = HttpServer(
        folder,
        before=HASTY,
        admin_workers=1,
        admin_tokens=tokens,
        admin_tls_certificate=certificate[0],
        admin_tls_key=certificate[1],
    )
    yield running
    running.stop()


def connected(server: HttpServer, stack: contextlib.ExitStack) -> socket.socket:
    address = "127.0.0.1", int(server.url.rpartition(":")[2])
    return stack.enter_context(socket.create_connection(address, LONG_S))


def unread_bytes(taker: socket.socket) -> int:
    """Return how many bytes have come that were not taken, at most as many as make it full."""
    found = array.array("i", [0])
    fcntl.ioctl(taker, termios.FIONREAD, found)
    return min(found[0], FULL_BYTES)


def is_served(server: HttpServer) -> bool:
    return requests.get(f"{server.url}/healthz", timeout=LONG_S).ok


def test_those_who_keep_an_ended_connection_open_hold_up_nobody(server: HttpServer) -> None:
    with contextlib.ExitStack() as stack:
        kept = [connected(server, stack) for _ in range(MANY)]
        for each in kept:
            each.sendall(ASK + b"Connection: close\r\n\r\n")
        # The server ends each, and waits two seconds for its other end.
        assert is_served(server)
        for each in kept:
            assert each.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_those_who_connect_and_say_nothing_have_no_thread(folder: Path) -> None:
    patient = HttpServer(folder, before="import sidecar.http.worker as worker; worker.SILENCE_S = 600;", admin_workers=1)
    try:
        with contextlib.ExitStack() as stack:
            # So many that a few seconds of a thread for each would take longer than anybody here waits.
            silent = [connected(patient, stack) for _ in range(12 * _THREADS)]
            assert is_served(patient)
            # They may speak yet.
            silent[0].sendall(ASK + b"Connection: close\r\n\r\n")
            assert silent[0].recv(4096).startswith(b"HTTP/1.1 200 ")
    finally:
        patient.stop()


def test_those_who_say_nothing_for_long_are_let_go(server: HttpServer) -> None:
    with contextlib.ExitStack() as stack:
        for each in [connected(server, stack) for _ in range(3)]:
            assert each.recv(1) == b""


def test_a_header_that_comes_byte_by_byte_holds_no_thread(server: HttpServer) -> None:
    stop = threading.Event()
    with contextlib.ExitStack() as stack:
        kept = [connected(server, stack) for _ in range(MANY)]

        def drip() -> None:
            while not stop.wait(0.2):
                for each in kept:
                    with contextlib.suppress(OSError):
                        each.send(b"X")

        for each in kept:
            each.sendall(ASK + b"X-Long: ")
        dripping = threading.Thread(target=drip)
        dripping.start()
        try:
            assert is_served(server)
        finally:
            stop.set()
            dripping.join()


def test_those_who_never_take_their_answers_hold_no_thread(server: HttpServer) -> None:
    with contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(MANY)]
        for each in greedy:
            each.connect(str(server.socket))
            each.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 40)
        # Until each thread has had to do with one that has as much before it as the system keeps.
        while sum(map(unread_bytes, greedy)) < _THREADS * FULL_BYTES:
            time.sleep(0.05)
        assert is_served(server)


def test_silence_within_tls_holds_no_thread(secure: HttpServer, certificate: tuple[Path, Path]) -> None:
    trusted = ssl.create_default_context(cafile=str(certificate[0]))
    url = secure.url.replace("http:", "https:")
    with contextlib.ExitStack() as stack:
        for _ in range(MANY):
            # The beginning of a greeting, and not the rest of it.
            connected(secure, stack).sendall(b"\x16\x03\x01\x02\x00\x01")
        assert requests.get(f"{url}/healthz", verify=str(certificate[0]), timeout=LONG_S).ok
        greeted = stack.enter_context(trusted.wrap_socket(connected(secure, stack), server_hostname="localhost"))
        greeted.sendall(b"PUT /admin/v1/blobs/" + b"0" * 64 + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        greeted.sendall(b"Authorization: Bearer changes\r\nContent-Type: application/octet-stream\r\n\r\nhalf")
        assert greeted.recv(4096).startswith(b"HTTP/1.1 400 ")


def test_a_body_that_comes_byte_by_byte_is_not_waited_for_without_end(server: HttpServer) -> None:
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=LONG_S)
    connection.putrequest("PUT", f"/admin/v1/blobs/{'0' * 64}")
    connection.putheader("Content-Type", "application/octet-stream")
    connection.putheader("Content-Length", "1000")
    connection.endheaders()
    stop = threading.Event()

    def drip() -> None:
        while not stop.wait(0.2):
            with contextlib.suppress(OSError):
                connection.send(b"x")

    dripping = threading.Thread(target=drip)
    dripping.start()
    try:
        answer = connection.getresponse()
        assert (answer.status, json.loads(answer.read())["error"]["code"]) == (422, "blob_corrupt")
    finally:
        stop.set()
        dripping.join()
        connection.close()


def test_what_takes_longer_than_its_body_may_is_answered(server: HttpServer) -> None:
    """Time is up for reading alone."""
    answer = requests.post(f"{server.url}/v2/models/m/infer", data=b"{}", timeout=LONG_S)
    assert (answer.status_code, answer.json()["code"]) == (503, "sidecar_unavailable")


def test_nobody_can_fill_the_log_with_silence(server: HttpServer) -> None:
    with contextlib.ExitStack() as stack:
        for each in [connected(server, stack) for _ in range(MANY)]:
            each.sendall(b"GET /healthz HT")
        assert is_served(server)
    server.stop()
    told = server.log.read_text()
    assert "Traceback" not in told
    assert 1 <= told.count("Socket error processing request") <= MANY / 2
