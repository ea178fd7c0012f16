"""One session with the sidecar: a channel, two arenas, at most one request under way.

A connection belongs to one thread at a time. A connection whose request went unanswered is closed and never used
again, so that a late reply cannot be taken for the answer to a later request.
"""

from __future__ import annotations

import json
import mmap
import os
import secrets
import sys
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline import protocol, transport
from trunkline.arena import ClientArena
from trunkline.errors import (
    ArenaFull,
    ConnectionLost,
    FdMissing,
    MalformedFrame,
    ProtocolError,
    TrunklineError,
    VersionMismatch,
    from_wire,
)
from trunkline.protocol import (
    Command,
    Describe,
    Document,
    Fault,
    Hello,
    Infer,
    Message,
    Placement,
    Result,
    Welcome,
)


class Connection:
    """A handshaken connection. ``request`` is writable memory, ``reply`` read-only, both as long as announced."""

    def __init__(
        self,
        path: str,
        *,
        token: bytes = b"",
        models: tuple[str, ...] = (),
        request_bytes: int = 0,
        reply_bytes: int = 0,
        deadline: float,
    ) -> None:
        """Connect to the socket at ``path`` and shake hands before ``deadline`` (of ``time.monotonic``).

        Arena sizes of 0 let the sidecar choose what one row through ``models`` needs. Raises TransportError,
        ProtocolError, Unauthorized, CapacityError.
        """
        self.endpoint = path
        self.address = f"unix:{path}"
        self._channel = transport.connect(path, deadline)
        self._coder = protocol.Coder()
        self._pid = os.getpid()
        # Where the latest outputs lay and the arrays over them, which the next outputs mostly share.
        self._placed: tuple[Placement, ...] = ()
        self._outputs: tuple[tuple[str, NDArray[Any]], ...] = ()
        # Starting anywhere makes an id from another connection, or another life of this one, stand out.
        self._last_id = secrets.randbits(62)
        try:
            welcome = self._shake_hands(token, models, request_bytes, reply_bytes, deadline)
        except TrunklineError:
            self._channel.close()
            raise
        self.request_bytes = welcome.request_bytes
        self.reply_bytes = welcome.reply_bytes
        self.transport = welcome.transport
        self.generation = welcome.generation
        self.version = welcome.version

    def _shake_hands(
        self, token: bytes, models: tuple[str, ...], request_bytes: int, reply_bytes: int, deadline: float
    ) -> Welcome:
        name = f"{os.path.basename(sys.argv[0] or 'python')[:64]}/{os.getpid()}"
        hello = Hello(
            protocol.OLDEST_VERSION,
            protocol.VERSION,
            token,
            name,
            request_bytes,
            reply_bytes,
            models[: protocol.MAX_MODELS],
        )
        self._channel.send(protocol.encode(hello), deadline)
        frame, fds = self._channel.receive_with_fds(2, deadline)
        try:
            welcome = protocol.decode(frame)
            if isinstance(welcome, Fault):
                raise from_wire(welcome.code, welcome.message, welcome.details)
            if not isinstance(welcome, Welcome):
                raise MalformedFrame("the sidecar did not answer hello with welcome")
            if not protocol.OLDEST_VERSION <= welcome.version <= protocol.VERSION:
                raise VersionMismatch(
                    f"the sidecar speaks version {welcome.version}, this function {protocol.OLDEST_VERSION} to "
                    f"{protocol.VERSION}",
                    version=welcome.version,
                )
            if len(fds) != 2:
                raise FdMissing("the sidecar welcomed without passing shared memory", expected_count=2, received_count=0)
            self._request = ClientArena(fds.pop(0), welcome.request_bytes, writable=True)
            self._reply = ClientArena(fds.pop(0), welcome.reply_bytes, writable=False)
        except OSError as error:
            raise ArenaFull(f"this container cannot map the shared memory ({os.strerror(error.errno or 0)})") from error
        finally:
            for fd in fds:
                os.close(fd)
        return welcome

    @property
    def request(self) -> mmap.mmap:
        """The request arena: whoever holds this connection writes its inputs here."""
        return self._request.memory

    @property
    def reply(self) -> mmap.mmap:
        """The reply arena; its contents are valid until the next exchange."""
        return self._reply.memory

    def infer(
        self,
        model: str,
        inputs: tuple[Placement, ...],
        deadline: float,
        call_id: str = "",
        signature: str = "",
        traceparent: str = "",
    ) -> tuple[tuple[str, NDArray[Any]], ...]:
        """Run ``model`` on tensors already in the request arena. ``signature`` is the id of the one they were made for,
        ``traceparent`` the W3C header of the trace that the call belongs to.

        Returns name and array of each output: read-only views of the reply arena, valid until the next exchange.
        """
        self._last_id = (self._last_id + 1) & protocol.MAX_ID
        remaining_us = (deadline - time.monotonic()) * 1_000_000
        # A deadline that has passed is found by send; the message just needs a valid number.
        deadline_us = int(min(max(remaining_us, 1), protocol.MAX_DEADLINE_US))
        # An older sidecar would not understand it.
        parent = traceparent if self.version >= protocol.TRACING_VERSION else ""
        answer = self._exchange(Infer(self._last_id, deadline_us, call_id, model, signature, inputs, parent), deadline)
        if not isinstance(answer, Result):
            raise MalformedFrame("the sidecar did not answer an inference with a result")
        if answer.outputs is not self._placed:
            for output in answer.outputs:
                if output.offset + output.size_bytes > self.reply_bytes:
                    raise MalformedFrame("an output lies outside the reply arena")
            self._outputs = tuple((output.name, view(self.reply, output)) for output in answer.outputs)
            self._placed = answer.outputs
        return self._outputs

    def describe(self, model: str, deadline: float) -> Any:
        """Return the plain form of the signature of ``model``."""
        self._last_id = (self._last_id + 1) & protocol.MAX_ID
        return self._document(Describe(self._last_id, model), deadline)

    def command(self, name: str, arguments: dict[str, object], deadline: float) -> Any:
        """Run an administrator's command and return its answer. Raises ArenaFull when the arguments are too long."""
        self._last_id = (self._last_id + 1) & protocol.MAX_ID
        body = json.dumps(arguments).encode()
        if len(body) > self.request_bytes:
            raise ArenaFull(f"the arguments take {len(body)} bytes, the arena has {self.request_bytes}", needed_bytes=len(body))
        self.request[: len(body)] = body
        return self._document(Command(self._last_id, name, len(body)), deadline)

    def _document(self, message: Message, deadline: float) -> Any:
        answer = self._exchange(message, deadline)
        if not isinstance(answer, Document) or answer.length > self.reply_bytes:
            raise MalformedFrame("the sidecar did not answer with a document")
        try:
            return json.loads(self.reply[: answer.length])
        except ValueError as error:
            raise MalformedFrame("the sidecar's document is not JSON") from error

    def _exchange(self, message: Message, deadline: float) -> Message:
        if self.is_foreign:
            raise ConnectionLost("the connection belongs to the process that this one was forked from")
        try:
            self._channel.send(self._coder.encode(message), deadline)
            answer = self._coder.decode(self._channel.receive(deadline))
        except BaseException:
            # Whatever it was, a signal handler's exception included: an answer may still come, and nobody would expect it.
            self.close()
            raise
        if isinstance(answer, Fault):
            if answer.request_id not in (0, self._last_id):
                self.close()
                raise ProtocolError("the sidecar answered another request")
            raise from_wire(answer.code, answer.message, answer.details)
        if getattr(answer, "request_id", None) != self._last_id:
            self.close()
            raise ProtocolError("the sidecar answered another request")
        return answer

    @property
    def is_foreign(self) -> bool:
        """Whether another process opened this connection, and this one was forked from it."""
        return self._pid != os.getpid()

    @property
    def closed(self) -> bool:
        return self._channel.closed

    def close(self) -> None:
        """End the session; closing twice is safe. The arenas live on while views of them do."""
        self._channel.close()


def view(memory: Any, placement: Placement) -> NDArray[Any]:
    """Return the tensor at ``placement`` as an array that shares the bytes of ``memory``."""
    count = placement.size_bytes // protocol.ITEM_BYTES[placement.dtype]
    flat = np.frombuffer(memory, dtype=placement.dtype, count=count, offset=placement.offset)
    return flat.reshape(placement.shape)
