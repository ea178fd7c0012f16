"""The product, broken on purpose: each function takes one wall down, and the row that guards it has to turn red.

`tests.fault.launching` applies one before a program begins, so the product has no switch for it. A mutant is a function here and
a line in ``test_mutants.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from typing import Any

import numpy as np
from trunkline import arena, connection, protocol
from trunkline.errors import ProtocolError

from sidecar import server, tenantsockets, wavefront
from sidecar.session import Session
from tests.fault import circumstances


def unsealed() -> None:
    """Arenas whose size anybody may change. For F9."""
    arena._seal = lambda fd, seals: None


def no_private_copy() -> None:
    """Inputs that are checked and computed where the function can write them. For F10."""

    class Shared(arena.ServerArena):
        def close(self) -> None:
            # The session's "copy" is a view of it.
            with contextlib.suppress(BufferError):
                super().close()

    welcome = Session._welcome

    def _welcome(self: Any, hello: protocol.Hello) -> None:
        welcome(self, hello)
        self._private = np.frombuffer(self._request.memory, np.uint8)

    server.ServerArena = Shared  # type: ignore[misc]
    Session._welcome = _welcome  # type: ignore[method-assign]


def keeps_what_has_ended() -> None:
    """Sessions of which nothing is freed. For F2."""
    Session.close = lambda self: None  # type: ignore[method-assign]


def takes_descriptors() -> None:
    """A sidecar that receives what descriptors clients send. For F1 and T4."""
    receive = socket.socket.recv

    def recv(self: socket.socket, size: int, flags: int = 0) -> bytes:
        if self.type != socket.SOCK_SEQPACKET:
            return receive(self, size, flags)
        return socket.recv_fds(self, size, 253, flags)[0]

    socket.socket.recv = recv  # type: ignore[method-assign,assignment]
    tenantsockets._SO_PASSRIGHTS = 9999  # type: ignore[misc]


def forgives_broken_frames() -> None:
    """Sessions that go on after a frame that nobody could read. For F1."""
    handle = server.Server._handle

    def _handle(self: Any, session: Session, frame: bytes) -> None:
        try:
            handle(self, session, frame)
        except ProtocolError as error:
            session.refuse(0, error)

    server.Server._handle = _handle  # type: ignore[method-assign]


def reserves_nothing() -> None:
    """Arenas whose memory is found when it is touched, which ends whoever touches it where there is none. For F15."""
    circumstances.memory_runs_out()

    class Lax:
        """What arenas know of the system; others reserve what they need."""

        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def posix_fallocate(self, fd: int, offset: int, size: int) -> None:
            os.ftruncate(fd, offset + size)

    arena.os = Lax()  # type: ignore[assignment]


def fails_whole_batches() -> None:
    """A batch that raises is not run row by row, but fails with all who are in it. For F23."""

    def fail(self: Any, group: Any) -> Any:
        self._groups.remove(group)
        return list(group.tickets())

    wavefront.Wavefront.fail = fail  # type: ignore[method-assign]


def answers_without_ids() -> None:
    """Answers of which one in ten does not say which request it is for. For F27."""
    encode = protocol.Coder.encode
    counted = itertools.count(1)

    def _encode(self: protocol.Coder, message: protocol.Message) -> bytes:
        is_without = isinstance(message, protocol.Result) and not next(counted) % 10
        return encode(self, message._replace(request_id=0) if is_without else message)

    protocol.Coder.encode = _encode  # type: ignore[method-assign]


def uses_what_went_unanswered() -> None:
    """A client that asks again where an answer is still to come, and takes whatever comes. For F27."""

    def _exchange(self: Any, message: protocol.Message, deadline: float) -> protocol.Message:
        self._channel.send(self._coder.encode(message), deadline)
        answer = self._coder.decode(self._channel.receive(deadline))
        if isinstance(answer, protocol.Fault):
            raise connection.from_wire(answer.code, answer.message, answer.details)
        return answer

    connection.Connection._exchange = _exchange  # type: ignore[method-assign]
