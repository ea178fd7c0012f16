"""One framed socket: whole messages in, whole messages out, with deadlines and passed descriptors.

The socket is a Unix socket of type SOCK_SEQPACKET: the kernel keeps message boundaries, so there is no length prefix
to lie about and no partial frame to wait for. A channel belongs to one thread at a time.
"""

from __future__ import annotations

import array
import math
import os
import select
import socket
import time

from trunkline.errors import ConnectionLost, DeadlineExceeded, FdMissing, FrameTooLarge, SidecarUnavailable
from trunkline.protocol import MAX_DEADLINE_US, MAX_FRAME_BYTES

# The longest deadline a message can carry.
LONGEST_WAIT_S = MAX_DEADLINE_US / 1_000_000
_BACKLOG_PAUSE_S = 0.005


def connect(path: str, deadline: float) -> Channel:
    """Connect to the sidecar's socket at ``path``; ``deadline`` is a time of ``time.monotonic``.

    Raises SidecarUnavailable when nobody listens there, DeadlineExceeded when the backlog stays full too long.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        while True:
            remaining_s(deadline)
            try:
                sock.connect(path)
                return Channel(sock)
            except BlockingIOError:
                # A full backlog is told at once, and not when it has room again.
                time.sleep(_BACKLOG_PAUSE_S)
    except DeadlineExceeded:
        sock.close()
        raise
    except OSError as error:
        sock.close()
        raise SidecarUnavailable(
            f"no sidecar listens at {path} ({os.strerror(error.errno or 0)}); start one with `trunkline serve`, "
            "or mount the directory of its socket into this function",
            path=path,
        ) from error


def remaining_s(deadline: float) -> float:
    """Return the seconds until ``deadline``, of ``time.monotonic``. Raises DeadlineExceeded when it has passed."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise DeadlineExceeded(
            f"the deadline passed {-remaining:.3f} s ago, before the sidecar was asked; allow more with deadline_s",
            late_s=round(-remaining, 3),
        )
    return remaining


class Channel:
    """A connected SOCK_SEQPACKET socket. After any error the channel must be closed, never used again.

    The socket never blocks; ``poll`` waits. A timeout on the socket would cost a system call each time it is set, and
    would start anew after each signal.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._writable = select.poll()
        self._writable.register(sock, select.POLLOUT)

    def send(self, frame: bytes, deadline: float) -> None:
        """Send one message. Raises ConnectionLost, DeadlineExceeded."""
        remaining_s(deadline)
        try:
            try:
                self._socket.send(frame)
            except BlockingIOError:
                _wait(self._writable, deadline, "take the request")
                self._socket.send(frame)
        except OSError as error:
            raise _lost(error, "the sidecar closed the connection") from error

    def receive(self, deadline: float) -> bytes:
        """Return the next message. Raises ConnectionLost at its end, DeadlineExceeded, FrameTooLarge."""
        try:
            _wait(self._readable, deadline, "answer")
            # One byte more than allowed, so that an over-long message shows.
            frame = self._socket.recv(MAX_FRAME_BYTES + 1)
        except OSError as error:
            raise _lost(error, "the connection to the sidecar broke") from error
        return _whole(frame)

    def receive_with_fds(self, count: int, deadline: float) -> tuple[bytes, list[int]]:
        """Return the next message and the descriptors that came with it, close-on-exec set.

        Either exactly ``count`` descriptors come, or none (a refusal carries none). Anything else raises
        FdMissing, with every descriptor that did arrive closed. ``socket.recv_fds`` is not used because it drops
        its flags argument, and with it MSG_CMSG_CLOEXEC.
        """
        fds = array.array("i")
        try:
            _wait(self._readable, deadline, "answer")
            frame, ancillary, flags, _ = self._socket.recvmsg(
                MAX_FRAME_BYTES + 1, socket.CMSG_SPACE(count * fds.itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except OSError as error:
            raise _lost(error, "the connection to the sidecar broke") from error
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        if flags & socket.MSG_CTRUNC or len(fds) not in (0, count):
            for fd in fds:
                os.close(fd)
            raise FdMissing(
                f"the sidecar should have passed {count} descriptors, {len(fds)} arrived; is this container's limit on "
                "open files reached?",
                expected_count=count,
                received_count=len(fds),
            )
        try:
            return _whole(frame), list(fds)
        except (ConnectionLost, FrameTooLarge):
            for fd in fds:
                os.close(fd)
            raise

    @property
    def closed(self) -> bool:
        return self._socket.fileno() < 0

    def close(self) -> None:
        """Close the socket; closing twice is safe."""
        self._socket.close()


def _wait(poll: select.poll, deadline: float, verb: str) -> None:
    remaining = remaining_s(deadline)
    # Rounded up, so that a wait is never cut to nothing. After a signal Python waits for what is left.
    if not poll.poll(math.ceil(min(remaining, LONGEST_WAIT_S) * 1000)):
        raise late(verb, remaining)


def late(verb: str, waited_s: float) -> DeadlineExceeded:
    """Return what is told when the sidecar did not ``verb`` in the time that there was."""
    return DeadlineExceeded(
        f"the sidecar did not {verb} within the {waited_s:.3f} s that were left; allow more with deadline_s",
        waited_s=round(waited_s, 3),
    )


def _lost(error: OSError, what: str) -> OSError | ConnectionLost:
    """Return what the kernel's ``error`` means here; one without a number is not the kernel's, but a signal handler's."""
    return error if error.errno is None else ConnectionLost(f"{what} ({os.strerror(error.errno)})")


def _whole(frame: bytes) -> bytes:
    if not frame:
        raise ConnectionLost("the sidecar ended the connection")
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"the sidecar sent a message longer than {MAX_FRAME_BYTES} bytes")
    return frame
