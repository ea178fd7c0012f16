"""The wire as somebody writes it who keeps to none of its rules: a bare session, and what can be tried on its memory.

It imports the wire and nothing else of the project, so that hostile processes begin and fork at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
from collections.abc import Callable
from typing import Final

from trunkline import protocol
from trunkline.protocol import Fault, Hello, Infer, Message, Placement, Welcome

from tests.waiting import PATIENCE_S

# linux/falloc.h, linux/mman.h, linux/fcntl.h.
_KEEP_SIZE_AND_PUNCH_HOLE: Final = 0x01 | 0x02
_MADV_REMOVE: Final = 9
_F_SEAL_FUTURE_WRITE: Final = 0x0010
_LIBC: Final = ctypes.CDLL(None, use_errno=True)
_LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Refused(Exception):
    """The sidecar did not let a client in; ``fault`` says why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.code, fault.message)
        self.fault = fault


def connected(path: str) -> socket.socket:
    """Return a socket on which nothing was said yet."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        # With a limit in time, a full backlog would be told at once; so connect waits for room in it.
        sock.connect(path)
        sock.settimeout(PATIENCE_S)
    except BaseException:
        sock.close()
        raise
    return sock


def hello(*models: str, token: bytes = b"") -> bytes:
    """Return the first frame of a well-behaved client."""
    return protocol.encode(Hello(1, protocol.VERSION, token, "test", 0, 0, models))


def infer(model: str, dtype: str, shape: tuple[int, ...], *, request_id: int = 1, deadline_us: int = 30_000_000) -> bytes:
    """Return the frame that asks a model of one input, x, which lies at the start of the arena."""
    return protocol.encode(Infer(request_id, deadline_us, "", model, "", (Placement("x", dtype, shape, 0),)))


class Wire:
    """A session with its descriptors and both arenas, and no rules."""

    def __init__(self, path: str, *models: str, token: bytes = b"") -> None:
        """Raises Refused, and OSError where the sidecar went away."""
        self.sock = connected(path)
        try:
            self.sock.send(hello(*models, token=token))
            frame, fds, _, _ = socket.recv_fds(self.sock, protocol.MAX_FRAME_BYTES, 2)
            if not frame:
                raise ConnectionResetError("the sidecar ended the connection")
            answer = protocol.decode(frame)
            if isinstance(answer, Fault):
                raise Refused(answer)
        except BaseException:
            self.sock.close()
            raise
        assert isinstance(answer, Welcome)
        self.welcome = answer
        self.fds = fds
        self.request = mmap.mmap(fds[0], answer.request_bytes)
        self.reply = mmap.mmap(fds[1], answer.reply_bytes, mmap.MAP_SHARED, mmap.PROT_READ)

    def ask(self, frame: bytes) -> Message:
        """Send a frame and return the answer to it. Raises OSError where the sidecar went away."""
        self.sock.send(frame)
        return self.answer()

    def answer(self) -> Message:
        """Return the next answer."""
        frame = self.sock.recv(protocol.MAX_FRAME_BYTES + 1)
        if not frame:
            raise ConnectionResetError("the sidecar ended the connection")
        return protocol.decode(frame)

    def close(self) -> None:
        """End the session, and let go of its memory."""
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.request.close()
        self.reply.close()


def changes_of_arenas(wire: Wire) -> dict[str, Callable[[], None]]:
    """Return all that can be tried on the memory of a session, by what it is, so that whoever reads it falls."""
    changes: dict[str, Callable[[], None]] = {}
    for name, fd, size, memory in (
        ("request", wire.fds[0], wire.welcome.request_bytes, wire.request),
        ("reply", wire.fds[1], wire.welcome.reply_bytes, wire.reply),
    ):
        changes |= {
            f"{name}: shrink": lambda fd=fd: os.ftruncate(fd, 0),
            f"{name}: shrink to a page": lambda fd=fd: os.ftruncate(fd, mmap.PAGESIZE),
            f"{name}: grow": lambda fd=fd, size=size: os.ftruncate(fd, 2 * size),
            f"{name}: allocate beyond the end": lambda fd=fd, size=size: os.posix_fallocate(fd, 0, 2 * size),
            f"{name}: write beyond the end": lambda fd=fd, size=size: _written(os.pwrite(fd, b"x", size)),
            f"{name}: open again and shrink": lambda fd=fd: _opened_again(fd, lambda again: os.ftruncate(again, 0)),
            f"{name}: open again and cut": lambda fd=fd: os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_TRUNC)),
            f"{name}: seal its writes": lambda fd=fd: _sealed(fd, fcntl.F_SEAL_WRITE),
            f"{name}: seal its future writes": lambda fd=fd: _sealed(fd, _F_SEAL_FUTURE_WRITE),
            f"{name}: punch a hole": lambda fd=fd, size=size: _punch(fd, size),
            f"{name}: remove its pages": lambda memory=memory: memory.madvise(_MADV_REMOVE),
            f"{name}: take its permissions": lambda fd=fd: os.fchmod(fd, 0),
        }
    reply = wire.fds[1]
    changes["reply: write"] = lambda: _written(os.pwrite(reply, b"x", 0))
    changes["reply: map writable"] = lambda: mmap.mmap(reply, mmap.PAGESIZE).close()
    changes["reply: open again and map writable"] = lambda: _opened_again(
        reply, lambda again: mmap.mmap(again, mmap.PAGESIZE).close()
    )
    return changes


# What a function may do to its own memory: bytes, not sizes. Holes read as zeros.
HARMLESS: Final = {
    "request: punch a hole",
    "request: remove its pages",
    "request: take its permissions",
    "reply: take its permissions",
}


def _written(count: int) -> None:
    assert count == 1


def _sealed(fd: int, seal: int) -> None:
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seal)


def _punch(fd: int, size: int) -> None:
    if _LIBC.fallocate(fd, _KEEP_SIZE_AND_PUNCH_HOLE, 0, size):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _opened_again(fd: int, then: Callable[[int], None]) -> None:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, again)
        then(again)
