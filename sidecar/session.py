"""A session: one connection, from its hello to its end, and the way of its requests into the engine.

The server's thread hands it what its client sends: it copies and checks inputs, and passes requests on. The engine's thread
writes outputs into its reply arena and sends the answer itself, so that an answer costs no further change of threads.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from trunkline import protocol
from trunkline.arena import ServerArena, page_aligned
from trunkline.errors import (
    ArenaFull,
    ConnectionLost,
    Detail,
    FrameTooLarge,
    MalformedFrame,
    TrunklineError,
    Unauthorized,
    UnknownModel,
    ValueOutOfBounds,
    VersionMismatch,
)
from trunkline.protocol import (
    HTTP,
    JOINT,
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
from trunkline.signature import Signature

from sidecar.naming import Naming
from sidecar.peers import Peer, peer_of
from sidecar.ports import OutputSpecs, Serving, Work
from sidecar.routing import Route, Routing
from sidecar.tenants import ANYONE, Quotas, Tenant, as_known_to, hash_of
from sidecar.tracing import ANSWERED, RequestNotes, Tracer

log = logging.getLogger("trunkline.server")

_SMALLEST_ARENA_BYTES: Final = 64 * 1024
# Names of models whose right a session remembers.
_MOST_NAMES: Final = 64


class Host(Protocol):
    """What a session has of the server: what is the same for all sessions, and what they count against."""

    engine: Serving
    routing: Routing
    naming: Naming
    transport: str
    generation: int
    tracer: Tracer | None
    arena_limit_bytes: int

    def identify(self, token_hash: str, through: str = "", peer: Peer | None = None) -> tuple[Tenant, bool]: ...
    def check_connection_limit(self, tenant: Tenant) -> None: ...
    def open_arenas(self, request_bytes: int, reply_bytes: int, tenant: Tenant) -> tuple[ServerArena, ServerArena]: ...
    def arenas_closed(self, size_bytes: int) -> None: ...
    def welcomed(self, session: Session, models: Sequence[str]) -> None: ...
    def release(self, session: Session) -> None: ...
    def asked(self, transport: str, models: str) -> None: ...
    def refused(self, error: TrunklineError) -> None: ...
    def command(self, session: Session, request_id: int, name: str, arguments: dict[str, Any]) -> None: ...


class Listener(NamedTuple):
    """A socket that is listened at: of one tenant, of the sidecar's HTTP server, which asks for others, or else for all."""

    socket: socket.socket
    tenant: str = ""
    is_relay: bool = False


class Session:
    """One connection and all it owns: socket, arenas, the private copy of its inputs, at most one request.

    ``handle`` runs in the server's thread; ``answer``, ``document``, ``fail`` and ``released`` in the engine's.
    """

    def __init__(self, host: Host, sock: socket.socket, number: int, listener: Listener) -> None:
        self.sock = sock
        self.number = number
        self.welcomed = False
        self.current_id = 0
        # Whose it is, once it is welcomed.
        self.tenant = ANYONE
        self._host = host
        self._is_admin = False
        self._token_hash = ""
        self._listener = listener
        # How it brings tensors. Arenas of the HTTP server's sessions are shared with that, not with whoever asks it.
        self._transport = HTTP if listener.is_relay else host.transport
        self._peer = peer_of(sock)
        # What this session has asked for, and may use, by the table of releases that holds below.
        self._names: dict[str, _Named] = {}
        self._table = host.routing.table
        # What the outputs of the request under way are called; None where the engine calls them the same.
        self._output_names: tuple[str, ...] | None = None
        # Whether somebody else has its request, and will tell it the answer.
        self.busy = False
        self._opened_s = time.monotonic()
        # Inferences that were passed to the engine.
        self._request_count = 0
        # What is noted of the request under way, where it is traced.
        self._notes: RequestNotes | None = None
        self._request: ServerArena | None = None
        self._reply: ServerArena | None = None
        self._private = np.empty(0, np.uint8)
        # How the latest request and the latest reply lay in the arenas: a function's next ones mostly do the same.
        self._layout: _Layout | None = None
        self._reply_layout: _ReplyLayout | None = None
        self.coder = protocol.Coder()

    # --- the server's thread -----------------------------------------------------------------------------------------

    def handle(self, message: Message) -> None:
        """Act on one message. Raises TrunklineError, to be sent to the client."""
        if not self.welcomed:
            if not isinstance(message, Hello):
                raise MalformedFrame("the first message must be hello")
            self._welcome(message)
            return
        if self.busy:
            raise MalformedFrame("a connection carries one request at a time")
        match message:
            case Infer():
                self.current_id = message.request_id
                if self._host.tracer is not None:
                    self._notes = self._begun(message, self._host.tracer)
                try:
                    self._infer(message)
                except TrunklineError as error:
                    self._host.refused(error)
                    raise
            case Describe():
                self.current_id = message.request_id
                plain = self._signature(message.model).to_plain()
                self.document(message.request_id, plain | {"model": message.model})
            case Command():
                self.current_id = message.request_id
                self._command(message)
            case _:
                raise MalformedFrame("this message is the sidecar's to send")

    def _welcome(self, hello: Hello) -> None:
        host = self._host
        version = min(hello.newest, protocol.VERSION)
        if version < max(hello.oldest, protocol.OLDEST_VERSION):
            raise VersionMismatch(
                f"the function speaks versions {hello.oldest} to {hello.newest}, this sidecar "
                f"{protocol.OLDEST_VERSION} to {protocol.VERSION}; rebuild the function or upgrade the sidecar",
                oldest=protocol.OLDEST_VERSION,
                newest=protocol.VERSION,
            )
        self._token_hash = hash_of(hello.token) if hello.token else ""
        self.tenant, self._is_admin = host.identify(self._token_hash, self._listener.tenant, self._asker)
        if not self._is_admin:
            host.check_connection_limit(self.tenant)
        request_bytes, reply_bytes = hello.request_bytes, hello.reply_bytes
        for name in hello.models:
            needed_request, needed_reply = self._needs(name)
            request_bytes, reply_bytes = max(request_bytes, needed_request), max(reply_bytes, needed_reply)
        self._request, self._reply = host.open_arenas(
            page_aligned(max(request_bytes, _SMALLEST_ARENA_BYTES)),
            page_aligned(max(reply_bytes, _SMALLEST_ARENA_BYTES)),
            self.tenant,
        )
        # Written, not just reserved: the pages are there before the first request.
        self._private = np.full(self._request.size_bytes, 0, np.uint8)
        welcome = Welcome(
            version,
            self.number,
            self._request.size_bytes,
            self._reply.size_bytes,
            host.transport,
            host.generation,
        )
        try:
            socket.send_fds(self.sock, [protocol.encode(welcome)], [self._request.fd, self._reply.fd])
        except OSError as error:
            raise ConnectionLost(f"the client left during the handshake ({os.strerror(error.errno or 0)})") from error
        self._request.passed()
        self._reply.passed()
        self.welcomed = True
        host.welcomed(self, self._expected(hello.models))

    @property
    def _asker(self) -> Peer | None:
        """Who asks; None where that cannot be seen, because the process at the other end asks for others."""
        return None if self._listener.is_relay else self._peer

    def belongs_to(self, tenant: Tenant) -> bool:
        """Say whether this is a function's session, and of this tenant."""
        return self.welcomed and not self._is_admin and self.tenant.name == tenant.name

    def adopt(self, quotas: Quotas) -> bool:
        """Go by other quotas; return False when this session would not be let in any more."""
        tenant = quotas.holder(self._token_hash, self._listener.tenant)
        if self._is_admin or tenant is None or tenant.is_bound_to_others(self._asker):
            return self._is_admin
        self.tenant = tenant
        self._names.clear()
        return True

    def _expected(self, models: Sequence[str]) -> list[str]:
        """Return the engine's names of what may answer for those models that this session may use; for others nothing is done."""
        found: list[str] = []
        for model in models:
            try:
                named = self._named(model)
                found += [named.known_as] if named.route is None else named.route.names
            except TrunklineError:
                continue
        return found

    def _named(self, model: str) -> _Named:
        """Return what is meant by the name of a model, or of several asked together.

        Raises UnknownModel when one is not allowed, InvalidInput, and ModelCorrupt where a release cannot be read.
        """
        table = self._host.routing.table
        if table is not self._table:
            self._names.clear()
            self._table = table
        found = self._names.get(model)
        if found is None:
            known_as = self._host.naming.known_as(model, self.tenant, self._is_admin)
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            found = self._names[model] = _Named(known_as, self._host.routing.route(known_as))
        return found

    def _signature(self, model: str) -> Signature:
        """Return the signature of a model. Raises UnknownModel, alike for one that is not there and one that is not allowed."""
        named = self._named(model)
        try:
            return self._host.engine.signature(named.known_as) if named.route is None else named.route.signature
        except UnknownModel:
            if self.tenant is ANYONE:
                raise
            raise self._host.naming.unknown(model, self.tenant) from None

    def _needs(self, name: str) -> tuple[int, int]:
        """Return the arena bytes that the smallest call of a model needs; nothing for a model that is not there yet."""
        try:
            signature = self._signature(name)
        except TrunklineError:
            return 0, 0
        inputs = [(spec.name, spec.dtype, signature.resolve(spec, {})) for spec in signature.inputs]
        needed = protocol.place(inputs)[1], signature.reply_bytes({}, protocol.ALIGNMENT)
        # A hint, not a demand: a model too large for any arena is refused when it is called, and alone.
        return needed if max(needed) <= self._host.arena_limit_bytes else (0, 0)

    def _begun(self, message: Infer, tracer: Tracer) -> RequestNotes | None:
        """Return what is to be noted of a request, None where it is not traced."""
        place = tracer.begin(message.traceparent)
        if place is None:
            return None
        asked = message.model, self.tenant.name, message.call_id
        return RequestNotes(place, time.monotonic(), *asked, self._host.generation)

    def _infer(self, message: Infer) -> None:
        engine = self._host.engine
        engine.check_room(self.tenant)
        signature = self._signature(message.model)
        layout = self._layout
        # What was checked of a layout once holds again; the coder gives equal placements as one object.
        if layout is None or layout.placements is not message.inputs or layout.signature is not signature:
            signature.check_current(message.signature, message.model)
            layout = self._layout = self._check_layout(signature, message.inputs)
        self._copy_inputs(layout)
        name, route = self._named(message.model)
        self._output_names = None
        if route is not None:
            if JOINT in name:
                self._output_names = tuple(spec.name for spec in signature.outputs)
            # Last of all: what is refused takes nobody's turn.
            name, signature = route.draw(message.call_id)
        self.busy = True
        self._request_count += 1
        self._host.asked(self._transport, name)
        deadline = time.monotonic() + message.deadline_us / 1_000_000
        engine.submit(
            Work(
                self,
                message.request_id,
                name,
                deadline,
                message.call_id,
                layout.inputs,
                signature,
                self.tenant,
                layout.input_bytes,
                notes=self._notes,
            )
        )

    def _check_layout(self, signature: Signature, placements: tuple[Placement, ...]) -> _Layout:
        assert self._request is not None
        signature.bind([(tensor.name, tensor.dtype, tensor.shape) for tensor in placements])
        copies = []
        by_name = {}
        for tensor in placements:
            end = tensor.offset + tensor.size_bytes
            if end > self._request.size_bytes or tensor.offset % protocol.ALIGNMENT:
                raise MalformedFrame(
                    f"input {tensor.name} lies at {tensor.offset} to {end}, the arena has {self._request.size_bytes} bytes "
                    f"and tensors start at multiples of {protocol.ALIGNMENT}"
                )
            copy = self._private.data[tensor.offset : end]
            copies.append((tensor.offset, copy))
            by_name[tensor.name] = (copy, self._host.engine.view(copy, tensor.dtype, tensor.shape))
        return _Layout(
            placements,
            signature,
            tuple(copies),
            tuple(by_name[spec.name][1] for spec in signature.inputs),
            tuple(
                (spec, by_name[spec.name][0]) for spec in signature.inputs if spec.minimum is not None or spec.maximum is not None
            ),
            sum(copy.nbytes for _, copy in copies),
        )

    def _copy_inputs(self, layout: _Layout) -> None:
        """Copy the inputs out of the function's reach and check the values of the copies.

        This is the only place that reads the tensors of a request arena, and it reads every byte once: what was checked
        is what is computed, whatever the function writes meanwhile.
        """
        assert self._request is not None
        for offset, copy in layout.copies:
            self._request.read(offset, copy)
        for spec, copy in layout.bounded:
            _check_bounds(layout.signature.model, spec, copy)

    def _command(self, message: Command) -> None:
        if not self._is_admin:
            raise Unauthorized("commands need the administrator's token")
        assert self._request is not None
        if message.length > self._request.size_bytes:
            raise MalformedFrame("the command's arguments are longer than the arena")
        body = bytearray(message.length)
        self._request.read(0, memoryview(body))
        try:
            arguments = json.loads(body)
        except ValueError as error:
            raise MalformedFrame("the command's arguments are not JSON") from error
        if not isinstance(arguments, dict):
            raise MalformedFrame("the command's arguments are not an object")
        self._host.command(self, message.request_id, message.name, arguments)

    def describe(self) -> dict[str, object]:
        """Return what an operator wants to know of a session: who it is, what it has and what it does."""
        return {
            "session": self.number,
            "tenant": None if self._is_admin else self.tenant.name,
            "administrator": self._is_admin,
            # 0 for a process that cannot be seen from here.
            "pid": self._peer.pid,
            "uid": self._peer.uid,
            "transport": self._transport,
            "arena_bytes": self.arena_bytes,
            "requests": self._request_count,
            "in_flight": int(self.busy),
            "age_s": round(time.monotonic() - self._opened_s, 3),
        }

    @property
    def arena_bytes(self) -> int:
        """Memory of both arenas, and of the private copy of the first."""
        return 0 if self._request is None or self._reply is None else 2 * self._request.size_bytes + self._reply.size_bytes

    def close(self) -> None:
        """Free everything. Called when the engine holds nothing of this session any more; twice is safe."""
        if self._notes is not None and self._host.tracer is not None:
            # Nobody was told anything.
            self._notes.end(time.monotonic(), ConnectionLost.code)
            self._host.tracer.finish(self._notes)
            self._notes = None
        self.sock.close()
        # Views of the arenas; they go first.
        self._layout = self._reply_layout = None
        if self._request is not None and self._reply is not None:
            self._host.arenas_closed(self.arena_bytes)
            self._request.close()
            self._reply.close()
            self._request = self._reply = None
        self._private = np.empty(0, np.uint8)

    # --- the engine's thread -----------------------------------------------------------------------------------------

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        """Write ``outputs`` into the reply arena with ``read`` and send the result. Raises ArenaFull."""
        if self._notes is not None:
            self._notes.reply_s = time.monotonic()
        if self._output_names is not None:
            specs = tuple((name, *spec[1:]) for name, spec in zip(self._output_names, specs, strict=True))
        layout = self._reply_layout
        if layout is None or layout.specs != specs:
            layout = self._reply_layout = self._place_reply(specs)
        for output, target in zip(outputs, layout.targets, strict=True):
            read(output, target)
        if layout.staged is not None:
            assert self._reply is not None
            self._reply.write(0, layout.staged)
        self._send(Result(request_id, layout.placements))

    def _place_reply(self, specs: OutputSpecs) -> _ReplyLayout:
        assert self._reply is not None
        placements, size_bytes = protocol.place(list(specs))
        if size_bytes > self._reply.size_bytes:
            raise ArenaFull(
                f"the outputs take {size_bytes} bytes, the reply arena has {self._reply.size_bytes}",
                needed_reply_bytes=size_bytes,
            )
        memory = self._reply.memory
        staged = memoryview(bytearray(size_bytes)) if memory is None else None
        memory = staged if memory is None else memory
        assert memory is not None
        view = self._host.engine.view
        targets = tuple(view(memory[p.offset : p.offset + p.size_bytes], p.dtype, p.shape) for p in placements)
        return _ReplyLayout(specs, placements, targets, staged)

    def document(self, request_id: int, plain: object) -> None:
        """Send ``plain`` as JSON in the reply arena. Raises ArenaFull."""
        assert self._reply is not None
        body = json.dumps(plain).encode()
        if len(body) > self._reply.size_bytes:
            raise ArenaFull(
                f"the answer takes {len(body)} bytes, the reply arena has {self._reply.size_bytes}; ask for less at a time",
                needed_reply_bytes=len(body),
            )
        self._reply.write(0, body)
        self._send(Document(request_id, len(body)))

    def fail(self, request_id: int, error: TrunklineError) -> None:
        """Send an error of the engine's; models are called in it as the function calls them."""
        domain = self.tenant.domain
        details: dict[str, Detail] = {
            key: as_known_to(domain, value) if isinstance(value, str) else value for key, value in error.details.items()
        }
        self._send(Fault(request_id, error.code, as_known_to(domain, error.message), error.retryable, details))

    def refuse(self, request_id: int, error: TrunklineError) -> None:
        """Send an error of the server's: what models are called in it is what the function called them."""
        self._send(Fault(request_id, error.code, error.message, error.retryable, error.details))

    def released(self) -> None:
        """The engine holds nothing of this session any more."""
        self._host.release(self)

    def _send(self, message: Message) -> None:
        # Before the send: the client may write its next request the moment it has this answer.
        notes, self._notes = self._notes, None
        self.busy = False
        try:
            frame = self.coder.encode(message)
        except FrameTooLarge as error:
            message = Fault(self.current_id, error.code, error.message, error.retryable, error.details)
            frame = protocol.encode(message)
        if notes is not None:
            # Whoever gets the answer sees it end before.
            notes.end(time.monotonic(), message.code if isinstance(message, Fault) else ANSWERED)
        try:
            self.sock.send(frame)
        except OSError as error:
            # The client is gone, or has so many answers unread that the kernel takes no more: nobody waits for it, and it
            # could not tell which one it misses. The poll loop finds the end of the connection.
            log.debug("session %d took no answer (%s)", self.number, os.strerror(error.errno or 0))
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)
        if notes is not None and self._host.tracer is not None:
            self._host.tracer.finish(notes)


class _Named(NamedTuple):
    """What a session means by a name: the engine's name, and what answers for it where a release or a label says so."""

    known_as: str
    route: Route | None


class _Layout(NamedTuple):
    """Where a request's inputs lie, checked against the signature.

    ``copies`` are (offset in the arena, private bytes), ``inputs`` the device's views of the private bytes in the
    graph's order, ``bounded`` the inputs whose values have bounds.
    """

    placements: tuple[Placement, ...]
    signature: Signature
    copies: tuple[tuple[int, memoryview], ...]
    inputs: tuple[object, ...]
    bounded: tuple[tuple[protocol.TensorSpec, memoryview], ...]
    input_bytes: int


class _ReplyLayout(NamedTuple):
    """Where a reply's outputs lie: ``targets`` are the device's views of the arena, or of ``staged`` where it isn't mapped."""

    specs: OutputSpecs
    placements: tuple[Placement, ...]
    targets: tuple[object, ...]
    staged: memoryview | None


def _check_bounds(model: str, spec: protocol.TensorSpec, values: memoryview) -> None:
    array = np.frombuffer(values, spec.dtype)
    if not array.size:
        return
    low, high = int(array.min()), int(array.max())
    minimum = -math.inf if spec.minimum is None else spec.minimum
    maximum = math.inf if spec.maximum is None else spec.maximum
    if low < minimum or high > maximum:
        raise ValueOutOfBounds(
            f"{model} takes {spec.name} from {minimum} to {maximum}, its values reach from {low} to {high}",
            minimum=low,
            maximum=high,
        )
