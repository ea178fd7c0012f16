"""One framed socket: whole messages in, whole messages out, with deadlines and passed descriptors.

The socket is a Unix socket of type SOCK_SEQPACKET: the kernel keeps message boundaries, so there is no length prefix
to lie about and no partial frame to wait for. This is the only module of the client that touches a socket. A channel
belongs to one thread at a time.
"""

from __future__ import annotations

import array
import math
import os
import select
import socket
import struct
import time

from trunkline.errors import ConnectionLost, DeadlineExceeded, FdMissing, FrameTooLarge, SidecarUnavailable
from trunkline.protocol import MAX_FRAME_BYTES

_SLICE_S = 1.0
# The same as the kernel's `struct timeval`.
_SLICE = struct.pack("@ll", int(_SLICE_S), 0)


def connect(path: str, deadline: float) -> Channel:
    """Connect to the sidecar's socket at ``path``; ``deadline`` is a time of ``time.monotonic``.

    Raises SidecarUnavailable when nobody listens there, DeadlineExceeded when the backlog stays full too long.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(_remaining(deadline))
        sock.connect(path)
    except TimeoutError as error:
        sock.close()
        raise DeadlineExceeded(f"no answer from {path} before the deadline") from error
    except OSError as error:
        sock.close()
        raise SidecarUnavailable(
            f"no sidecar listens at {path} ({os.strerror(error.errno or 0)}); start one with `trunkline serve`, "
            "or mount the directory of its socket into this function",
            path=path,
        ) from error
    except DeadlineExceeded:
        sock.close()
        raise
    return Channel(sock)


def _remaining(deadline: float) -> float:
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise DeadlineExceeded("the deadline passed before the sidecar answered")
    return remaining


class Channel:
    """A connected SOCK_SEQPACKET socket. After any error the channel must be closed, never used again.

    The kernel bounds every wait to a slice of time that is set once: setting each call's deadline on the socket would
    cost a system call more. What is left of a deadline that ends within a slice is waited for with ``poll``.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            sock.setsockopt(socket.SOL_SOCKET, option, _SLICE)
        self._socket = sock

    def _wait_if_short(self, event: int, deadline: float) -> None:
        remaining = _remaining(deadline)
        if remaining < _SLICE_S and not self.closed:
            poll = select.poll()
            poll.register(self._socket, event)
            # Rounded up, so that a wait is never cut to nothing.
            if not poll.poll(math.ceil(remaining * 1000)):
                raise DeadlineExceeded("the sidecar did not take the request, or not answer it, before the deadline")

    def send(self, frame: bytes, deadline: float) -> None:
        """Send one message. Raises ConnectionLost, DeadlineExceeded."""
        while True:
            try:
                self._wait_if_short(select.POLLOUT, deadline)
                self._socket.send(frame)
                return
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(f"the sidecar closed the connection ({os.strerror(error.errno or 0)})") from error

    def receive(self, deadline: float) -> bytes:
        """Return the next message. Raises ConnectionLost at its end, DeadlineExceeded, FrameTooLarge."""
        while True:
            try:
                self._wait_if_short(select.POLLIN, deadline)
                # One byte more than allowed, so that an over-long message shows.
                return _whole(self._socket.recv(MAX_FRAME_BYTES + 1))
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(f"the connection to the sidecar broke ({os.strerror(error.errno or 0)})") from error

    def receive_with_fds(self, count: int, deadline: float) -> tuple[bytes, list[int]]:
        """Return the next message and the descriptors that came with it, close-on-exec set.

        Either exactly ``count`` descriptors come, or none (a refusal carries none). Anything else raises
        FdMissing, with every descriptor that did arrive closed. ``socket.recv_fds`` is not used because it drops
        its flags argument, and with it MSG_CMSG_CLOEXEC.
        """
        fds = array.array("i")
        while True:
            try:
                self._wait_if_short(select.POLLIN, deadline)
                frame, ancillary, flags, _ = self._socket.recvmsg(
                    MAX_FRAME_BYTES + 1, socket.CMSG_SPACE(count * fds.itemsize), socket.MSG_CMSG_CLOEXEC
                )
                break
            except BlockingIOError:
                continue
            except OSError as error:
                raise ConnectionLost(f"the connection to the sidecar broke ({os.strerror(error.errno or 0)})") from error
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


def _whole(frame: bytes) -> bytes:
    if not frame:
        raise ConnectionLost("the sidecar ended the connection")
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameTooLarge(f"the sidecar sent a message longer than {MAX_FRAME_BYTES} bytes")
    return frame
