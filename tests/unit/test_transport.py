"""The client's socket: what arrives wrong is closed and told, descriptors included."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from trunkline import protocol, transport
from trunkline.connection import Connection
from trunkline.errors import (
    ConnectionLost,
    DeadlineExceeded,
    FdMissing,
    FrameTooLarge,
    MalformedFrame,
    ProtocolError,
    SidecarUnavailable,
    TrunklineError,
    VersionMismatch,
)
from trunkline.protocol import Document, Fault, Result, Welcome
from trunkline.transport import Channel

from tests.waiting import PATIENCE_S, soon

pytestmark = pytest.mark.usefixtures("nothing_leaks")


@pytest.fixture
def pair() -> Iterator[tuple[Channel, socket.socket]]:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(near)
    yield channel, far
    channel.close()
    far.close()


def test_messages_keep_their_boundaries(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    channel.send(b"one", soon())
    channel.send(b"two", soon())
    assert (far.recv(100), far.recv(100)) == (b"one", b"two")
    far.send(b"three")
    assert channel.receive(soon()) == b"three"


def test_the_end_is_an_error(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    far.close()
    with pytest.raises(ConnectionLost):
        channel.receive(soon())
    with pytest.raises(ConnectionLost):
        channel.send(b"x", soon())


def test_deadlines_hold_in_every_direction(pair: tuple[Channel, socket.socket]) -> None:
    channel, _ = pair
    for wait in (channel.receive, lambda deadline: channel.receive_with_fds(2, deadline)):
        with pytest.raises(DeadlineExceeded):
            wait(time.monotonic() + 0.02)
        with pytest.raises(DeadlineExceeded):
            wait(time.monotonic() - 1)
    with pytest.raises(DeadlineExceeded):
        while True:
            channel.send(b"x" * 4096, time.monotonic() + 0.05)


def test_a_full_socket_is_waited_for(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    with contextlib.suppress(DeadlineExceeded):
        while True:
            channel.send(b"x" * 4096, time.monotonic() + 0.05)

    def read() -> None:
        time.sleep(0.05)
        while far.recv(4096) != b"three":
            pass

    thread = threading.Thread(target=read)
    thread.start()
    channel.send(b"three", soon())
    thread.join()


@pytest.fixture
def alarm() -> Iterator[Callable[..., None]]:
    """Have a signal handler run every 50 ms; it raises what it is given."""

    def start(error: Exception | None = None) -> None:
        def ring(number: int, frame: object) -> None:
            if error is not None:
                raise error

        signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)

    before = signal.getsignal(signal.SIGALRM)
    yield start
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_signals_do_not_prolong_a_deadline(pair: tuple[Channel, socket.socket], alarm: Callable[..., None]) -> None:
    alarm()
    rung = time.monotonic()
    with pytest.raises(DeadlineExceeded) as caught:
        pair[0].receive(time.monotonic() + 0.3)
    assert caught.value.details["waited_s"] == pytest.approx(0.3, abs=0.01)
    assert time.monotonic() < rung + 4


@pytest.mark.parametrize("error", [TimeoutError("the caller's own"), RuntimeError("the caller's own")])
def test_what_a_signal_handler_raises_is_passed_on(
    pair: tuple[Channel, socket.socket], alarm: Callable[..., None], error: Exception
) -> None:
    alarm(error)
    with pytest.raises(type(error), match="the caller's own"):
        pair[0].receive(soon())


def test_a_full_backlog_is_waited_for(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(0)
    with listener, contextlib.closing(transport.connect(path, soon())):
        with pytest.raises(DeadlineExceeded):
            transport.connect(path, time.monotonic() + 0.05)
        thread = threading.Thread(target=lambda: (time.sleep(0.05), listener.accept()[0].close()))
        thread.start()
        transport.connect(path, soon()).close()
        thread.join()
        listener.accept()[0].close()


def test_an_endless_deadline_is_one() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with contextlib.closing(Channel(near)) as channel, far:
        channel.send(b"one", math.inf)
        far.send(b"two")
        assert channel.receive(math.inf) == b"two"


def test_long_messages_are_refused(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    far.send(b"x" * (protocol.MAX_FRAME_BYTES + 1))
    with pytest.raises(FrameTooLarge):
        channel.receive(soon())


@pytest.mark.parametrize("count", [1, 3, 20])
def test_a_wrong_number_of_descriptors_is_refused_and_none_stays_open(pair: tuple[Channel, socket.socket], count: int) -> None:
    channel, far = pair
    socket.send_fds(far, [b"x"], [0] * count)
    with pytest.raises(FdMissing):
        channel.receive_with_fds(2, soon())


def test_descriptors_of_a_broken_message_do_not_stay_open(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    socket.send_fds(far, [b"x" * (protocol.MAX_FRAME_BYTES + 1)], [0, 0])
    with pytest.raises(FrameTooLarge):
        channel.receive_with_fds(2, soon())


def test_received_descriptors_do_not_pass_to_children(pair: tuple[Channel, socket.socket]) -> None:
    channel, far = pair
    socket.send_fds(far, [b"x"], [0, 0])
    _, fds = channel.receive_with_fds(2, soon())
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in fds:
        os.close(fd)


def test_a_broken_socket_is_a_lost_connection() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel = Channel(near)
    channel.close()
    far.close()
    assert channel.closed
    with pytest.raises(ConnectionLost):
        channel.receive(soon())
    with pytest.raises(ConnectionLost):
        channel.receive_with_fds(2, soon())


def test_connecting_to_nobody_is_told(tmp_path: Path) -> None:
    with pytest.raises(SidecarUnavailable, match="trunkline serve"):
        transport.connect(str(tmp_path / "none"), soon())
    with pytest.raises(DeadlineExceeded):
        transport.connect(str(tmp_path / "none"), time.monotonic() - 1)
    with pytest.raises(SidecarUnavailable):
        transport.connect("x" * 200, soon())


def test_a_full_backlog_is_a_deadline(tmp_path: Path) -> None:
    path = str(tmp_path / "full.sock")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(0)
    waiting = [transport.connect(path, soon())]
    with pytest.raises((DeadlineExceeded, SidecarUnavailable)):
        while True:
            waiting.append(transport.connect(path, time.monotonic() + 0.1))
    for channel in waiting:
        channel.close()
    listener.close()


# --- a sidecar that misbehaves ----------------------------------------------------------------------------------------


def arena(size_bytes: int = 4096) -> int:
    fd = os.memfd_create("test")
    os.ftruncate(fd, size_bytes)
    return fd


def against(tmp_path: Path, answer: Callable[[socket.socket], None], use: Callable[[Connection], object]) -> None:
    """Connect to a peer that runs ``answer`` on its side of the connection."""
    path = str(tmp_path / "peer.sock")
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(path)
    listener.listen(1)

    def serve() -> None:
        peer, _ = listener.accept()
        peer.settimeout(PATIENCE_S)
        peer.recv(5000)
        answer(peer)
        peer.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        connection = Connection(path, deadline=soon())
        try:
            use(connection)
        finally:
            connection.close()
    finally:
        thread.join(PATIENCE_S)
        listener.close()


def welcome(peer: socket.socket, fds: int = 2, **changed: object) -> None:
    frame = protocol.encode(Welcome(1, 1, 4096, 4096, "sealed", 0)._replace(**changed))
    made = [arena() for _ in range(fds)]
    if made:
        socket.send_fds(peer, [frame], made)
    else:
        peer.send(frame)
    for fd in made:
        os.close(fd)


def reply(peer: socket.socket, make: Callable[[int], protocol.Message]) -> None:
    welcome(peer)
    asked = protocol.decode(peer.recv(5000))
    peer.send(protocol.encode(make(getattr(asked, "request_id"))))  # noqa: B009 - any of several messages


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (lambda peer: None, ConnectionLost),
        (lambda peer: peer.send(b"?"), MalformedFrame),
        (lambda peer: peer.send(protocol.encode(Document(1, 1))), MalformedFrame),
        (lambda peer: peer.send(protocol.encode(Fault(0, "queue_full", "full", True, {}))), TrunklineError),
        (lambda peer: welcome(peer, fds=0), FdMissing),
        (lambda peer: welcome(peer, version=9), VersionMismatch),
        (lambda peer: welcome(peer, request_bytes=8192), MalformedFrame),
        (lambda peer: welcome(peer, reply_bytes=8192), MalformedFrame),
    ],
)
def test_a_bad_welcome_is_refused(tmp_path: Path, answer: Callable[[socket.socket], None], error: type[TrunklineError]) -> None:
    with pytest.raises(error):
        against(tmp_path, answer, lambda connection: None)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda asked: Result(asked + 1, ()), ProtocolError),
        (lambda asked: Fault(asked + 1, "queue_full", "", True, {}), ProtocolError),
        (lambda asked: Document(asked, 5), MalformedFrame),
        (lambda asked: Result(asked, (protocol.Placement("y", "float32", (2000,), 0),)), MalformedFrame),
        (lambda asked: protocol.Describe(asked, "m"), MalformedFrame),
    ],
)
def test_a_bad_answer_to_a_call_is_refused(
    tmp_path: Path, make: Callable[[int], protocol.Message], error: type[TrunklineError]
) -> None:
    with pytest.raises(error):
        against(tmp_path, lambda peer: reply(peer, make), lambda connection: connection.infer("m", (), soon()))


@pytest.mark.parametrize(("version", "fields"), [(1, 7), (2, 8)])
def test_a_sidecar_that_speaks_version_1_is_sent_no_traceparent(tmp_path: Path, version: int, fields: int) -> None:
    frames = []

    def answer(peer: socket.socket) -> None:
        welcome(peer, version=version)
        frames.append(peer.recv(5000))
        asked = protocol.decode(frames[0])
        assert isinstance(asked, protocol.Infer)
        peer.send(protocol.encode(Result(asked.request_id, ())))

    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    against(tmp_path, answer, lambda connection: connection.infer("m", (), soon(), traceparent=parent))
    assert frames[0][0] == 0x90 | fields
    assert (parent.encode() in frames[0]) == (version == 2)


@pytest.mark.parametrize(
    "make", [lambda asked: Result(asked, ()), lambda asked: Document(asked, 9999), lambda asked: Document(asked, 3)]
)
def test_a_bad_document_is_refused(tmp_path: Path, make: Callable[[int], protocol.Message]) -> None:
    with pytest.raises(MalformedFrame):
        against(tmp_path, lambda peer: reply(peer, make), lambda connection: connection.describe("m", soon()))


def test_arguments_longer_than_the_arena_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="the arena has 4096"):
        against(tmp_path, welcome, lambda connection: connection.command("x", {"a": "b" * 5000}, soon()))
