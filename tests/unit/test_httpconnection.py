"""The sidecar's HTTP port as a function asks it: whatever answers there, the call ends in time and in a typed error."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from trunkline import errors, oip
from trunkline.errors import ConnectionLost, DeadlineExceeded, MalformedFrame, ProtocolError, SidecarUnavailable, TrunklineError
from trunkline.httpconnection import HttpConnection
from trunkline.protocol import Placement
from trunkline.signature import Signature

from tests.over_http import answer, odd_server
from tests.waiting import PATIENCE_S, soon

pytestmark = pytest.mark.usefixtures("nothing_leaks")

GREETING = answer(json.dumps({"name": "trunkline", "extensions": [oip.EXTENSION]}).encode())
INPUTS = (Placement("x", "float32", (2,), 0),)
Y = {"name": "y", "datatype": "FP32", "shape": [2], "parameters": {"binary_data_size": 8}}


def inferred(outputs: object, raw: bytes = b"\0" * 8, length: object = None, **headers: object) -> bytes:
    header = json.dumps({"outputs": outputs}).encode()
    return answer(header + raw, Inference_Header_Content_Length=len(header) if length is None else length, **headers)


def asked(*answers: bytes | Callable[[socket.socket], None], deadline: float | None = None) -> Any:
    """Return what an inference gives that is answered so, after a greeting like a sidecar's."""
    with odd_server([GREETING, *answers]) as (url, _), contextlib.closing(HttpConnection(url, deadline=soon())) as connection:
        return connection.infer("m", INPUTS, soon() if deadline is None else deadline)


def greeted(*answers: bytes | Callable[[socket.socket], None]) -> None:
    with odd_server(answers) as (url, _):
        HttpConnection(url, deadline=soon()).close()


def test_a_good_answer_is_read() -> None:
    found = asked(inferred([Y], np.array([1.5, -2], np.float32).tobytes()))
    assert [(name, array.tolist()) for name, array in found] == [("y", [1.5, -2])]
    assert not found[0][1].flags.writeable


@pytest.mark.parametrize("length", ["", "x", "-1", "0", "99999999", "1" * 20])
def test_a_wrong_length_of_the_json_is_refused(length: str) -> None:
    with pytest.raises(MalformedFrame):
        asked(inferred([Y], length=length))


@pytest.mark.parametrize(
    "outputs",
    [
        None,
        {},
        [1],
        ["y"],
        [[]],
        [{}],
        [Y] * 17,
        [Y | {"datatype": "BF16"}],
        [Y | {"datatype": ["FP32"]}],
        [Y | {"name": 7}],
        [Y | {"shape": [2.0]}],
        [Y | {"shape": [-1]}],
        [Y | {"shape": "2"}],
        [Y | {"shape": [1] * 9}],
        [Y | {"shape": [3]}],
        [Y | {"shape": [2**40, 2**40]}],
        [Y | {"parameters": {}}],
        [Y | {"parameters": {"binary_data_size": True}}],
        [Y | {"parameters": {"binary_data_size": 7}}],
        [Y | {"data": [1, 2], "parameters": None}],
        [],
        [Y, Y],
    ],
)
def test_outputs_that_are_none_are_refused(outputs: object) -> None:
    with pytest.raises(MalformedFrame):
        asked(inferred(outputs))


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b"\xff", b"[" * 50_000, b"1" * 5000])
def test_json_that_is_none_is_refused(body: bytes) -> None:
    with pytest.raises(MalformedFrame):
        asked(answer(body + b" ", Inference_Header_Content_Length=len(body) + 1))
    with pytest.raises(MalformedFrame):
        greeted(answer(body))
    with (
        odd_server([GREETING, answer(body)]) as (url, _),
        contextlib.closing(HttpConnection(url, deadline=soon())) as connection,
        pytest.raises(MalformedFrame),
    ):
        connection.describe("m", soon())


@pytest.mark.parametrize(
    "metadata", [{}, {"parameters": None}, {"parameters": {oip.SIGNATURE: {}}}, {"parameters": {oip.SIGNATURE: "["}}]
)
def test_metadata_without_a_signature_are_refused(metadata: dict[str, object]) -> None:
    with pytest.raises(MalformedFrame):
        Signature.from_plain(oip.signature_of(metadata))


def test_pages_and_redirects_are_no_sidecar() -> None:
    page = answer(b"<html><h1>It works</h1></html>", Content_Type="text/html")
    for odd in (page, answer(b"", "301 Moved", Location="http://127.0.0.1:1/"), answer(b"<html>", "404 Not Found")):
        with pytest.raises(ProtocolError):
            greeted(odd)
        with pytest.raises(ProtocolError):
            asked(odd)
    with pytest.raises(errors.VersionMismatch, match="correct TRUNKLINE_URL"):
        greeted(answer(b'{"name": "triton", "extensions": ["binary_tensor_data"]}'))


def test_a_redirect_is_not_followed() -> None:
    with odd_server([GREETING]) as (elsewhere, visits):
        with pytest.raises(ProtocolError, match="status 307"):
            greeted(answer(b"", "307 Temporary Redirect", Location=f"{elsewhere}/v2"))
        assert not visits
        HttpConnection(elsewhere, deadline=soon()).close()


def test_no_more_is_read_of_an_answer_than_it_may_have() -> None:
    with pytest.raises(errors.ArenaFull) as caught:
        asked(inferred([Y], Content_Length=10**15))
    # The client asks again with room for so much, and is refused before anything is sent.
    assert caught.value.details["needed_reply_bytes"] == 10**15
    with pytest.raises(errors.ArenaFull, match="over HTTP"):
        HttpConnection("http://127.0.0.1:1", reply_bytes=10**15, deadline=soon())
    with pytest.raises(errors.ArenaFull):
        greeted(answer(b"", Content_Length=10**15))
    with pytest.raises(errors.ArenaFull):
        asked(answer(b"", "500 Internal Server Error", Content_Length=10**15))

    def endless(peer: socket.socket) -> None:
        peer.sendall(b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 10\r\n\r\n")
        while True:
            peer.sendall(b" " * 65536)

    with pytest.raises(errors.ArenaFull) as caught:
        asked(endless)
    assert "needed_reply_bytes" not in caught.value.details


def test_an_answer_that_is_compressed_is_refused() -> None:
    with pytest.raises(ProtocolError, match="compresses"):
        asked(inferred([Y], Content_Encoding="gzip"))


@pytest.mark.parametrize("piece", [b"", b"HTTP/1.1 200 OK\r\n", inferred([Y])[:-3], inferred([Y], Content_Length="9" * 5000)])
def test_an_answer_that_breaks_off_is_a_lost_connection(piece: bytes) -> None:
    with pytest.raises(ConnectionLost):
        asked(lambda peer: peer.sendall(piece))
    with pytest.raises(ConnectionLost):
        greeted(lambda peer: peer.sendall(piece))


@pytest.mark.parametrize(
    "odd", [b"SSH-2.0-OpenSSH\r\n\r\n", b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000, b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 200]
)
def test_what_does_not_speak_http_is_told_so(odd: bytes) -> None:
    with pytest.raises(ProtocolError, match="does not speak HTTP"):
        greeted(lambda peer: peer.sendall(odd))


def test_nobody_there_is_told_with_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SidecarUnavailable, match=f"127.0.0.1:{port} .Connection refused.") as caught:
        HttpConnection(f"http://127.0.0.1:{port}", deadline=soon())
    assert caught.value.details == {"url": f"http://127.0.0.1:{port}"}
    with pytest.raises(SidecarUnavailable, match="no such host"):
        HttpConnection("http://nobody.invalid", deadline=soon())


@pytest.mark.parametrize("host", [".a", "a:99999", "a..b"])
def test_an_address_that_is_none_is_told(host: str) -> None:
    with pytest.raises(errors.InvalidInput, match="which is no address"):
        HttpConnection(f"http://{host}", deadline=soon())


def test_a_port_that_closes_between_two_requests_is_a_lost_connection() -> None:
    with odd_server([GREETING]) as (url, _):
        connection = HttpConnection(url, deadline=soon())
    with pytest.raises(ConnectionLost):
        connection.infer("m", INPUTS, soon())
    # Whoever has lost one closes it.
    assert connection.closed
    with pytest.raises(ConnectionLost, match="is closed"):
        connection.describe("m", soon())


def test_deadlines_hold_however_slowly_the_answer_comes() -> None:
    def drip(what: bytes) -> Callable[[socket.socket], None]:
        def answer_slowly(peer: socket.socket) -> None:
            for byte in what:
                peer.sendall(bytes([byte]))
                time.sleep(0.02)

        return answer_slowly

    began_s = time.monotonic()
    for slow in (drip(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 90), drip(answer(b" " * 500))):
        with pytest.raises(DeadlineExceeded, match="allow more with deadline_s"):
            asked(slow, deadline=time.monotonic() + 0.3)
    assert time.monotonic() < began_s + 8, "a whole answer takes ten seconds"
    with pytest.raises(DeadlineExceeded):
        asked(deadline=time.monotonic() - 1)


def test_a_peer_that_reads_nothing_is_given_up_at_the_deadline() -> None:
    stop = threading.Event()
    with odd_server([GREETING, lambda peer: stop.wait(PATIENCE_S)]) as (url, _):
        connection = HttpConnection(url, request_bytes=64 << 20, deadline=soon())
        big = (Placement("x", "uint8", (64 << 20,), 0),)
        # The first is received as a whole before it is left unanswered; nobody takes the second.
        for _ in range(2):
            with pytest.raises((DeadlineExceeded, ConnectionLost)):
                connection.infer("m", big, time.monotonic() + 1)
        stop.set()
        connection.close()


def test_an_endless_deadline_is_one() -> None:
    found = asked(inferred([Y]), deadline=math.inf)
    assert len(found) == 1


def test_what_a_signal_handler_raises_is_passed_on() -> None:
    def ring(number: int, frame: object) -> None:
        raise RuntimeError("the caller's own")

    before = signal.signal(signal.SIGALRM, ring)
    stop = threading.Event()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with odd_server([GREETING, lambda peer: stop.wait(PATIENCE_S)]) as (url, _):
            connection = HttpConnection(url, deadline=soon())
            with pytest.raises(RuntimeError, match="the caller's own"):
                connection.infer("m", INPUTS, soon())
            stop.set()
            connection.close()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def told(error: TrunklineError) -> bytes:
    plain = error.to_dict()
    return answer(json.dumps({"error": plain.pop("message"), **plain}).encode(), "400 Bad Request")


def test_a_refusal_without_reasons_is_told_by_its_status() -> None:
    for body in (b"", b"[]", b'{"error": 1}', b'{"error": "x", "code": "y", "retryable": 1, "details": {}}'):
        with pytest.raises(ProtocolError, match="status 500"):
            asked(answer(body, "500 Internal Server Error"))
    gateway = answer(b"<html>", "503 Service Unavailable", Retry_After="7")
    with pytest.raises(SidecarUnavailable, match="nobody answers behind") as caught:
        greeted(gateway)
    assert caught.value.details == {"status": 503, "retry_after_s": 7}
    with pytest.raises(ConnectionLost):
        asked(gateway)
    with pytest.raises(SidecarUnavailable) as caught:
        greeted(answer(b"<html>", "503 Service Unavailable", Retry_After="9" * 5000))
    assert caught.value.details == {"status": 503}


def test_an_engine_that_is_away_is_a_lost_connection() -> None:
    away = told(SidecarUnavailable("it may be starting", incident=1))
    for attempt in (lambda: asked(away), lambda: greeted(away)):
        with pytest.raises(ConnectionLost, match="may be starting") as caught:
            attempt()
        assert caught.value.details == {"incident": 1}


def test_a_token_that_counts_no_more_ends_a_connection_and_a_wrong_one_makes_none() -> None:
    refusal = told(errors.Unauthorized("no"))
    with pytest.raises(ConnectionLost):
        asked(refusal)
    with pytest.raises(errors.Unauthorized):
        greeted(refusal)
    with pytest.raises(errors.Unauthorized, match="cannot be sent over HTTP"):
        HttpConnection("http://127.0.0.1:1", token=b"a\nHost: x", deadline=soon())


def test_what_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with odd_server([GREETING, inferred([Y], Set_Cookie="a=b"), inferred([Y])]) as (url, heads):
        connection = HttpConnection(f"{url}/behind", token=b"t1", models=("a", "b"), request_bytes=5, deadline=soon())
        for _ in range(2):
            connection.infer("a+b", INPUTS, soon(), "\ud800 call\n", "id")
        connection.close()
    assert len(heads) == 3
    assert heads[0].startswith(b"GET /behind/v2?request_bytes=5&reply_bytes=0&timeout=")
    assert b"&model=a&model=b HTTP/1.1" in heads[0]
    assert heads[2].startswith(b"POST /behind/v2/models/a+b/infer HTTP/1.1")
    assert all(b"Authorization: Bearer t1" in head for head in heads)
    assert not any(b"Cookie" in head or b"gzip" in head for head in heads)


def test_names_that_a_path_does_not_keep_are_unknown() -> None:
    with odd_server([GREETING]) as (url, _), contextlib.closing(HttpConnection(url, deadline=soon())) as connection:
        for name in (".", ".."):
            with pytest.raises(errors.UnknownModel):
                connection.describe(name, soon())


def test_a_forked_process_asks_nothing_over_its_parent_s_connection() -> None:
    with odd_server([GREETING, inferred([Y])]) as (url, _):
        connection = HttpConnection(url, deadline=soon())
        connection.request[:4] = b"mine"
        pid = os.fork()
        if not pid:
            status = 1
            with contextlib.suppress(BaseException):
                connection.request[:4] = b"hers"
                try:
                    connection.infer("m", INPUTS, soon())
                except ConnectionLost:
                    status = 0
                connection.close()
            os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert connection.request[:4] == b"mine"
        assert connection.infer("m", INPUTS, soon())
        connection.close()
