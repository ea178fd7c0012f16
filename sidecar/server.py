"""Sessions: the socket every function connects to, its arenas, and the way of a request into the engine.

One thread, ``Server.run``, accepts connections, decodes headers, and copies and checks inputs. It decides nothing about
models or memory: it hands requests to the engine, whose thread writes the outputs and sends the answer itself, so that an
answer costs no further change of threads.

A session that ends is taken out of the poll at once, but its socket and arenas live on until the engine has said that it
holds nothing of it any more: memory is never unmapped under a writer, and the number of a closed descriptor is
never written to.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import math
import os
import secrets
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import numpy as np
from trunkline import protocol
from trunkline.arena import ServerArena, choose_transport, page_aligned
from trunkline.errors import (
    ArenaFull,
    ConnectionLost,
    Detail,
    FrameTooLarge,
    InvalidInput,
    MalformedFrame,
    QueueFull,
    QuotaExceeded,
    SidecarFault,
    TrunklineError,
    Unauthorized,
    UnknownModel,
    ValueOutOfBounds,
    VersionMismatch,
)
from trunkline.protocol import (
    COPY,
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

from sidecar import loglevels
from sidecar.logs import RateLimit
from sidecar.peers import Peer, peer_of
from sidecar.ports import OutputSpecs, Serving, Work
from sidecar.quarantine import Suspects, nobody
from sidecar.releases import Release
from sidecar.routing import ReleaseFiles, Route, Routing
from sidecar.tenants import ANYONE, OPEN, Quotas, Tenant, as_asked, as_known_to, hash_of, qualified, unqualified
from sidecar.tracing import ANSWERED, RequestNotes, Tracer

log = logging.getLogger("trunkline.server")
# One line a function that is not let in, as long as there are not too many of them.
refusals = logging.getLogger("trunkline.server.refusals")
refusals.addFilter(RateLimit(20))

HANDSHAKE_S: Final = 1.0
_COMMAND_DEADLINE_S: Final = 600.0
_SMALLEST_ARENA_BYTES: Final = 64 * 1024
_ACCEPT_SLICE: Final = 64
# Connections of whom nobody knows yet whose they are. Beyond that the oldest is closed: who means it says hello at once.
MOST_GREETING: Final = 4 * _ACCEPT_SLICE
# To make arenas takes time, in which nobody else is answered: after so much of it those who are asking have their turn.
_GREETING_S: Final = 0.005
# How soon a function is told to try again that has as many connections as its tenant may have.
_CONNECTION_RETRY_S: Final = 1.0
# Names of models whose right a session remembers.
_MOST_NAMES: Final = 64
# The one answer to whoever has no token that counts: it says nothing about whose tokens there are.
_UNAUTHORIZED: Final = (
    "this sidecar knows no such token, or asks for one and got none; mount the token of your tenant as the secret "
    "trunkline-token, or name its file in TRUNKLINE_TOKEN_FILE (an operator makes one with `trunkline tenant add` or `rotate`); "
    "a tenant with a socket or a uid of its own must come through the one, from the other"
)

# Has the quota file read, and then calls what it is given, in any thread, with the quotas now in force, or with what is wrong.
Reload = Callable[[Callable[[Quotas | TrunklineError], None]], None]


class Server:
    """The poll loop over the listening socket and every session. ``run`` is its thread; ``stop`` may be called anywhere."""

    def __init__(
        self,
        listener: socket.socket,
        engine: Serving,
        *,
        admin_token: bytes,
        arena_limit_bytes: int,
        arena_total_bytes: int,
        connection_limit: int,
        quotas: Quotas = OPEN,
        tenant_sockets: Mapping[str, socket.socket] = MappingProxyType({}),
        relay: socket.socket | None = None,
        reload: Reload | None = None,
        releases: ReleaseFiles | None = None,
        generation: int = 0,
        transport: str | None = None,
        tracer: Tracer | None = None,
        suspects: Suspects | None = None,
    ) -> None:
        """``arena_limit_bytes`` bounds one arena, ``arena_total_bytes`` all arenas together, of all tenants.

        ``listener`` is for all but those who have one in ``tenant_sockets``, ``relay`` for who asks for others. ``reload`` is
        None where there is no quota file, ``releases`` where no name has versions, ``tracer`` where nothing is traced.
        ``suspects`` are those that the engine goes by.
        """
        self.engine = engine
        self.routing = Routing(engine.signature, {} if releases is None else releases.table())
        self._releases = releases
        self.transport = transport or choose_transport()
        if self.transport == COPY:
            log.warning("this kernel does not seal shared memory: arenas are copied instead of mapped, which takes longer")
        self.generation = generation
        self.tracer = tracer
        self.suspects = nobody() if suspects is None else suspects
        self.arena_limit_bytes = arena_limit_bytes
        self._admin_hash = hash_of(admin_token)
        self._quotas = quotas
        self._reload = reload
        self._arena_total_bytes = arena_total_bytes
        self._arena_bytes = 0
        self._connection_limit = connection_limit
        self._poll = select.epoll()
        # By descriptor.
        self._listeners: dict[int, _Listener] = {}
        self._listening = True
        self._listen_at(_Listener(listener))
        if relay is not None:
            self._listen_at(_Listener(relay, is_relay=True))
        for name, each in tenant_sockets.items():
            self._listen_at(_Listener(each, name))
        # Other threads wake the loop through this descriptor.
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._wake_lock = threading.Lock()
        self._poll.register(self._wake, select.EPOLLIN)
        # What other threads want done in this one.
        self._posted: deque[Callable[[], None]] = deque()
        self._sessions: dict[int, Session] = {}
        self._greeting: dict[int, float] = {}
        # Sessions that are over but for what the engine still holds of them.
        self._ending: set[Session] = set()
        # By the codes of their errors: requests that never came to the engine, and connections.
        self._refused: Counter[str] = Counter()
        self._turned_away: Counter[str] = Counter()
        # By how they came, and by model: requests that came to the engine. One about several models counts for each.
        self._asked: dict[str, Counter[str]] = {self.transport: Counter(), HTTP: Counter()}
        self._last_session = 0
        self._draining = False
        self._stopping = False

    def run(self) -> None:
        """Serve until ``stop``."""
        while not self._stopping:
            self._turn(HANDSHAKE_S if self._greeting or not self._listening else -1)
        self._shut_down()

    def _turn(self, patience_s: float) -> None:
        """Do what there is to do, after waiting for it for so long at most; -1: for ever."""
        events = self._poll.poll(patience_s)
        if not (events or self._listening or self._draining):
            # Quiet for a while: perhaps there are descriptors again.
            self._listen(True)
        newcomers = []
        for fd, _ in events:
            if fd in self._greeting:
                newcomers.append(fd)
            elif fd in self._listeners:
                self._accept(self._listeners[fd])
            elif fd == self._wake:
                os.eventfd_read(fd)
                while self._posted:
                    self._posted.popleft()()
                if self._draining:
                    self._listen(False)
            else:
                self._receive(fd)
        self._greet(newcomers)
        if self._greeting:
            self._close_the_silent()

    def _greet(self, newcomers: Sequence[int]) -> None:
        """Answer who has said hello, one at least; the poll tells of the others again, after those who ask for something."""
        until_s = time.monotonic() + _GREETING_S
        for number, fd in enumerate(newcomers):
            if (now := time.monotonic()) < until_s or not number:
                self._receive(fd)
            elif fd in self._greeting:
                # It is not silent, it waits for its turn.
                self._await_hello(fd, now)

    def drain(self) -> None:
        """Accept no further connections; those that exist are told Draining by the engine. Any thread."""
        self._draining = True
        self._wake_up()

    def stop(self) -> None:
        """End ``run``. Any thread."""
        self._stopping = True
        self._wake_up()

    def use_quotas(
        self,
        quotas: Quotas,
        done: Callable[[], None] = lambda: None,
        tenant_sockets: Mapping[str, socket.socket] = MappingProxyType({}),
    ) -> None:
        """Go by other quotas from now on, for sessions that are open, too. Any thread.

        A session whose tenant is gone, or whose token does not count any more, is closed; it may come back with another. ``done``
        is called, in the engine's thread, when all is deployed that tenants may use besides. ``tenant_sockets`` are those there
        are now; others are closed.
        """
        self._post(lambda: self._adopt(quotas, done, tenant_sockets))

    def _shut_down(self) -> None:
        # The engine has ended, so it holds nothing of anybody.
        for session in (*self._sessions.values(), *self._ending):
            session.close()
        self._poll.close()
        with self._wake_lock:
            os.close(self._wake)
            self._wake = -1

    def _post(self, wanted: Callable[[], None]) -> None:
        self._posted.append(wanted)
        self._wake_up()

    def _wake_up(self) -> None:
        # The lock keeps a number from being written to that was closed, and is somebody else's, since.
        with self._wake_lock:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)

    # --- connections -------------------------------------------------------------------------------------------------

    def _accept(self, listener: _Listener) -> None:
        for _ in range(_ACCEPT_SLICE):
            if len(self._greeting) >= min(MOST_GREETING, self._connection_limit):
                # The one that has been silent for longest leaves, if another is there to come.
                silent = next((fd for fd in self._greeting if not _is_readable(fd)), None)
                if silent is None or not _is_readable(listener.socket.fileno()):
                    return
                self._end(self._sessions[silent])
            try:
                sock, _ = listener.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                # Out of descriptors: those who wait stay in the backlog until a session closes.
                log.error(
                    "a connection could not be accepted (%s); %d sessions are open, each takes 3 descriptors: raise the limit "
                    "on open files, or lower --connection-limit",
                    os.strerror(error.errno or 0),
                    len(self._sessions),
                )
                self._listen(False)
                return
            sock.setblocking(False)
            self._last_session += 1
            session = Session(self, sock, self._last_session, listener)
            self._sessions[sock.fileno()] = session
            self._await_hello(sock.fileno(), time.monotonic())
            self._poll.register(sock, select.EPOLLIN)

    def _await_hello(self, fd: int, now: float) -> None:
        self._greeting.pop(fd, None)
        self._greeting[fd] = now + HANDSHAKE_S

    def _listen(self, wanted: bool) -> None:
        """Take all listeners into the poll, or out of it: one that nobody accepts from would wake it for ever."""
        for fd in self._listeners:
            if wanted and not self._listening:
                self._poll.register(fd, select.EPOLLIN)
            elif self._listening and not wanted:
                self._poll.unregister(fd)
        self._listening = wanted

    def _listen_at(self, listener: _Listener) -> None:
        listener.socket.setblocking(False)
        self._listeners[listener.socket.fileno()] = listener
        if self._listening:
            self._poll.register(listener.socket, select.EPOLLIN)

    def _use_sockets(self, wanted: Mapping[str, socket.socket]) -> None:
        """Listen at these sockets of tenants, and close those that are not among them."""
        for fd, listener in list(self._listeners.items()):
            if listener.tenant and wanted.get(listener.tenant) is not listener.socket:
                if self._listening:
                    self._poll.unregister(fd)
                del self._listeners[fd]
                listener.socket.close()
        for tenant, sock in wanted.items():
            if sock.fileno() not in self._listeners:
                self._listen_at(_Listener(sock, tenant))

    def _close_the_silent(self) -> None:
        now = time.monotonic()
        # The oldest stands first.
        for fd in [fd for fd, until_s in self._greeting.items() if until_s <= now]:
            if _is_readable(fd):
                # It has spoken, while this thread was busy, and has its turn next.
                self._await_hello(fd, now)
            else:
                self._end(self._sessions[fd])

    def _receive(self, fd: int) -> None:
        session = self._sessions.get(fd)
        if session is None:
            return
        try:
            # No buffer for ancillary data: descriptors a client may send are discarded by the kernel.
            frame = session.sock.recv(protocol.MAX_FRAME_BYTES + 1)
        except BlockingIOError:
            return
        except OSError:
            frame = b""
        if not frame:
            self._end(session)
            return
        try:
            self._handle(session, frame)
        except (FrameTooLarge, MalformedFrame, SidecarFault) as error:
            # Whoever breaks the protocol once cannot be understood any further.
            session.refuse(0, error)
            self._turn_away(session, error)
            self._end(session)
        except TrunklineError as error:
            session.refuse(session.current_id, error)
            self._turn_away(session, error)
            if not session.welcomed:
                refusals.info("session %d was refused: %s: %s", session.number, error.code, error.message)
                self._end(session)

    def _turn_away(self, session: Session, error: TrunklineError) -> None:
        if not session.welcomed:
            self._turned_away[error.code] += 1

    def _handle(self, session: Session, frame: bytes) -> None:
        message = None
        try:
            message = session.coder.decode(frame)
            session.handle(message)
        except TrunklineError:
            raise
        except Exception as error:
            # A bug that one session's frame has found must not end the service of all.
            incident = secrets.token_hex(4)
            call_id, model = (message.call_id, message.model) if isinstance(message, Infer) else ("", "")
            told = {"call_id": call_id, "model": model, "tenant": session.tenant.name}
            log.exception("incident %s: session %d ends (call %s)", incident, session.number, call_id or "-", extra=told)
            raise SidecarFault(f"the sidecar failed; its log has incident {incident}", incident=incident) from error

    def _end(self, session: Session) -> None:
        fd = session.sock.fileno()
        self._poll.unregister(fd)
        self._greeting.pop(fd, None)
        # The descriptor stays open until the engine lets go, so its number cannot be taken by another session.
        del self._sessions[fd]
        if session.welcomed:
            self._ending.add(session)
            self.engine.session_closed(session)
        else:
            session.close()
            self._listen(not self._draining)

    def welcomed(self, session: Session, models: Sequence[str]) -> None:
        """Note that a session has shaken hands, and named the models it is going to ask about."""
        self._greeting.pop(session.sock.fileno(), None)
        self.engine.session_opened(models, session.tenant)

    def release(self, session: Session) -> None:
        """Free what is left of an ended session. Any thread: it is done in the server's."""
        self._post(lambda: self._finish(session))

    def _finish(self, session: Session) -> None:
        self._ending.discard(session)
        session.close()
        self._listen(not self._draining)

    def _adopt(self, quotas: Quotas, done: Callable[[], None], tenant_sockets: Mapping[str, socket.socket]) -> None:
        self._quotas = quotas
        self._use_sockets(tenant_sockets)
        self.engine.use_quotas(quotas, done)
        for session in list(self._sessions.values()):
            if session.welcomed and not session.adopt(quotas):
                log.info("session %d of %s ends: it would not be let in any more", session.number, session.tenant.name)
                self._end(session)

    # --- what sessions ask of the server -----------------------------------------------------------------------------

    def identify(self, token_hash: str, through: str = "", peer: Peer | None = None) -> tuple[Tenant, bool]:
        """Return whose token it is that has this hash, the empty text for none, and whether it is the administrator's.

        It came ``through`` the socket of a tenant, or the one for all, and from ``peer``, where that can be seen. Raises
        Unauthorized. However wrong a token is, finding out takes the same time.
        """
        is_admin = hmac.compare_digest(token_hash, self._admin_hash)
        tenant = self._quotas.holder(token_hash, through)
        if is_admin and not through:
            return ANYONE, True
        if tenant is not None and tenant.is_bound_to_others(peer):
            refusals.info("%s is bound to uid %s and gid %s, its token came from %s", tenant.name, tenant.uid, tenant.gid, peer)
            tenant = None
        if tenant is None:
            raise Unauthorized(_UNAUTHORIZED)
        return tenant, False

    def check_connection_limit(self, tenant: Tenant) -> None:
        """Raise QueueFull or QuotaExceeded when as many connections are open as allowed, to all or to a tenant, without this one.

        Those that have not said hello do not count: anybody could keep all others out with them.
        It is asked during the handshake: closing at once, with the hello unread, would lose the reason on its way.
        """
        if len(self._sessions) - len(self._greeting) >= self._connection_limit:
            limit = self._connection_limit
            raise QueueFull(f"{limit} connections are open, which is the limit", limit_count=limit)
        if tenant.connection_limit == math.inf:
            return
        count = sum(1 for session in self._sessions.values() if session.belongs_to(tenant))
        if count >= tenant.connection_limit:
            raise QuotaExceeded(
                f"{tenant.name} has {count} connections open, its quota is {tenant.connection_limit}; try again shortly",
                open_count=count,
                limit_count=int(tenant.connection_limit),
                retry_after_s=_CONNECTION_RETRY_S,
            )

    def refused(self, error: TrunklineError) -> None:
        """Note that a session has refused a request."""
        self._refused[error.code] += 1

    def asked(self, transport: str, models: str) -> None:
        """Note that a session has passed a request to the engine."""
        self._asked[transport].update(models.split(JOINT))

    def _held(self) -> tuple[Counter[str], Counter[str]]:
        """Return how many connections, and bytes of arenas, tenants have."""
        connections = Counter(session.tenant.name for session in self._sessions.values() if session.belongs_to(session.tenant))
        arena_bytes: Counter[str] = Counter()
        for session in (*self._sessions.values(), *self._ending):
            if session.belongs_to(session.tenant):
                arena_bytes[session.tenant.name] += session.arena_bytes
        return connections, arena_bytes

    def connections(self) -> dict[str, object]:
        """Return what there is of connections and arenas, and what was refused before it came to the engine."""
        connections, arena_bytes = self._held()
        return {
            "connections": len(self._sessions),
            "connection_limit": self._connection_limit,
            "arena_bytes": self._arena_bytes,
            "arena_limit_bytes": self._arena_total_bytes,
            "transport": self.transport,
            "tenants": {
                name: {"connections": connections[name], "arena_bytes": arena_bytes[name]} for name in self._quotas.tenants
            },
            "refused": self._refused,
            "turned_away": self._turned_away,
            "asked": self._asked,
            "spans": None if self.tracer is None else self.tracer.counts(),
        }

    def sessions(self, offset: int, limit: int) -> dict[str, object]:
        """Return who is connected: ``limit`` sessions from ``offset`` on, the oldest first."""
        found = [session for session in self._sessions.values() if session.welcomed]
        found.sort(key=lambda session: session.number)
        return {"total": len(found), "sessions": [session.describe() for session in found[offset : offset + limit]]}

    def tenants(self) -> dict[str, object]:
        """Return the tenants in force, their limits, and what they have of connections and arenas."""
        connections, arena_bytes = self._held()
        return {
            "tenants": [
                {**tenant.to_plain(), "connections": connections[name], "arena_bytes": arena_bytes[name]}
                for name, tenant in self._quotas.tenants.items()
            ]
        }

    def reload(self, session: Session, request_id: int) -> None:
        """Have the quota file read; the session is told what is wrong, or when its quotas are in force and all is deployed.

        Raises InvalidInput.
        """
        if self._reload is None:
            raise InvalidInput("this sidecar has no quota file; start it with --quotas FILE")

        def tell(outcome: Quotas | TrunklineError) -> None:
            # Whoever asked may have left, and its arenas with it.
            if self._sessions.get(session.sock.fileno()) is not session:
                return
            if isinstance(outcome, TrunklineError):
                session.fail(request_id, outcome)
            else:
                session.document(request_id, {"tenant_count": len(outcome.tenants)})

        self._reload(lambda outcome: self._post(lambda: tell(outcome)))

    def reread_release(self, session: Session, request_id: int, name: str) -> None:
        """Have the release of a model read again; the session is told what is wrong, or when requests go by it.

        One that cannot be read changes nothing. Raises InvalidInput.
        """
        if self._releases is None:
            raise InvalidInput("this sidecar keeps no versions")

        def adopt(found: Release | TrunklineError | None) -> None:
            if not isinstance(found, TrunklineError):
                self.routing.use(name, found)
            # Whoever asked may have left, and its arenas with it.
            if self._sessions.get(session.sock.fileno()) is not session:
                return
            if isinstance(found, TrunklineError):
                session.refuse(request_id, found)
            else:
                session.document(request_id, {"name": name})

        self._releases.reread(name, lambda found: self._post(lambda: adopt(found)))

    def open_arenas(self, request_bytes: int, reply_bytes: int, tenant: Tenant) -> tuple[ServerArena, ServerArena]:
        """Create both arenas of a session. Raises ArenaFull, with what was asked and what is allowed."""
        for name, size_bytes in (("request", request_bytes), ("reply", reply_bytes)):
            if size_bytes > self.arena_limit_bytes:
                raise ArenaFull(
                    f"the {name} tensors take {size_bytes} bytes, one arena may have {self.arena_limit_bytes}; send a "
                    "smaller batch, or start the sidecar with a larger arena limit",
                    asked_bytes=size_bytes,
                    limit_bytes=self.arena_limit_bytes,
                )
        # The request counts twice: the sidecar's private copy of the inputs is as large.
        taken_bytes = 2 * request_bytes + reply_bytes
        total_bytes = self._arena_bytes + taken_bytes
        if total_bytes > self._arena_total_bytes:
            raise ArenaFull(
                f"the arenas of all connections would take {total_bytes} bytes, the limit is {self._arena_total_bytes}; "
                "close connections or start the sidecar with a larger total",
                asked_bytes=taken_bytes,
                limit_bytes=self._arena_total_bytes,
            )
        if tenant.arena_limit_bytes != math.inf:
            self._check_arenas(tenant, taken_bytes)
        request = ServerArena(request_bytes, self.transport, reply=False)
        try:
            reply = ServerArena(reply_bytes, self.transport, reply=True)
        except TrunklineError:
            request.close()
            raise
        self._arena_bytes = total_bytes
        return request, reply

    def _check_arenas(self, tenant: Tenant, taken_bytes: int) -> None:
        # Of sessions that end, too: their memory is still there.
        sessions = (*self._sessions.values(), *self._ending)
        held_bytes = sum(session.arena_bytes for session in sessions if session.belongs_to(tenant))
        if held_bytes + taken_bytes > tenant.arena_limit_bytes:
            raise ArenaFull(
                f"the arenas of {tenant.name} take {held_bytes} bytes, this connection would add {taken_bytes}, its quota is "
                f"{tenant.arena_limit_bytes}; close connections, or send smaller batches",
                held_bytes=held_bytes,
                asked_bytes=taken_bytes,
                limit_bytes=int(tenant.arena_limit_bytes),
            )

    def arenas_closed(self, size_bytes: int) -> None:
        """Give back the bytes of a session's arenas."""
        self._arena_bytes -= size_bytes


class Session:
    """One connection and all it owns: socket, arenas, the private copy of its inputs, at most one request.

    ``handle`` runs in the server's thread; ``answer``, ``document``, ``fail`` and ``released`` in the engine's.
    """

    def __init__(self, server: Server, sock: socket.socket, number: int, listener: _Listener) -> None:
        self.sock = sock
        self.number = number
        self.welcomed = False
        self.current_id = 0
        # Whose it is, once it is welcomed.
        self.tenant = ANYONE
        self._server = server
        self._is_admin = False
        self._token_hash = ""
        self._listener = listener
        # How it brings tensors. Arenas of the HTTP server's sessions are shared with that, not with whoever asks it.
        self._transport = HTTP if listener.is_relay else server.transport
        self._peer = peer_of(sock)
        # What this session has asked for, and may use, by the table of releases that holds below.
        self._names: dict[str, _Named] = {}
        self._table = server.routing.table
        # What the outputs of the request under way are called; None where the engine calls them the same.
        self._output_names: tuple[str, ...] | None = None
        self._busy = False
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
        if self._busy:
            raise MalformedFrame("a connection carries one request at a time")
        match message:
            case Infer():
                self.current_id = message.request_id
                if self._server.tracer is not None:
                    self._notes = self._begun(message, self._server.tracer)
                try:
                    self._infer(message)
                except TrunklineError as error:
                    self._server.refused(error)
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
        server = self._server
        version = min(hello.newest, protocol.VERSION)
        if version < max(hello.oldest, protocol.OLDEST_VERSION):
            raise VersionMismatch(
                f"the function speaks versions {hello.oldest} to {hello.newest}, this sidecar "
                f"{protocol.OLDEST_VERSION} to {protocol.VERSION}; rebuild the function or upgrade the sidecar",
                oldest=protocol.OLDEST_VERSION,
                newest=protocol.VERSION,
            )
        self._token_hash = hash_of(hello.token) if hello.token else ""
        self.tenant, self._is_admin = server.identify(self._token_hash, self._listener.tenant, self._asker)
        if not self._is_admin:
            server.check_connection_limit(self.tenant)
        request_bytes, reply_bytes = hello.request_bytes, hello.reply_bytes
        for name in hello.models:
            needed_request, needed_reply = self._needs(name)
            request_bytes, reply_bytes = max(request_bytes, needed_request), max(reply_bytes, needed_reply)
        self._request, self._reply = server.open_arenas(
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
            server.transport,
            server.generation,
        )
        try:
            socket.send_fds(self.sock, [protocol.encode(welcome)], [self._request.fd, self._reply.fd])
        except OSError as error:
            raise ConnectionLost(f"the client left during the handshake ({os.strerror(error.errno or 0)})") from error
        self._request.passed()
        self._reply.passed()
        self.welcomed = True
        server.welcomed(self, self._expected(hello.models))

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
        table = self._server.routing.table
        if table is not self._table:
            self._names.clear()
            self._table = table
        found = self._names.get(model)
        if found is None:
            known_as = self.known_as(model, self.tenant, self._is_admin)
            if len(self._names) >= _MOST_NAMES:
                self._names.clear()
            found = self._names[model] = _Named(known_as, self._server.routing.route(known_as))
        return found

    def known_as(self, model: str, tenant: Tenant, is_admin: bool) -> str:
        """Return the engine's name of what a tenant, or the administrator, asks for. Raises UnknownModel where it may not."""
        if not all(tenant.allows(each) for each in model.split(JOINT)):
            raise self._unknown(model, tenant)
        # An administrator may ask for a model of any domain, by its full name.
        return model if is_admin and unqualified(model)[1] else qualified(model, tenant.domain)

    def _signature(self, model: str) -> Signature:
        """Return the signature of a model. Raises UnknownModel, alike for one that is not there and one that is not allowed."""
        named = self._named(model)
        try:
            return self._server.engine.signature(named.known_as) if named.route is None else named.route.signature
        except UnknownModel:
            if self.tenant is ANYONE:
                raise
            raise self._unknown(model, self.tenant) from None

    def _unknown(self, models: str, tenant: Tenant) -> UnknownModel:
        """Return what is told of the first model that is not there, or not allowed: which of the two is not said."""
        model = next((each for each in models.split(JOINT) if not self._has(each, tenant)), models)[:64]
        allowed = ", ".join(tenant.models[:8]) or "none"
        return UnknownModel(
            f"there is no model {model!r} that {tenant.name} may use; the operator allows it {allowed}; "
            "`trunkline push` adds a model",
            model=model,
        )

    def _has(self, model: str, tenant: Tenant) -> bool:
        if not tenant.allows(model):
            return False
        known_as = qualified(model, tenant.domain)
        try:
            route = self._server.routing.route(known_as)
            _ = self._server.engine.signature(known_as) if route is None else route.signature
        except UnknownModel:
            return False
        return True

    def _needs(self, name: str) -> tuple[int, int]:
        """Return the arena bytes that the smallest call of a model needs; nothing for a model that is not there yet."""
        try:
            signature = self._signature(name)
        except TrunklineError:
            return 0, 0
        inputs = [(spec.name, spec.dtype, signature.resolve(spec, {})) for spec in signature.inputs]
        needed = protocol.place(inputs)[1], signature.reply_bytes({}, protocol.ALIGNMENT)
        # A hint, not a demand: a model too large for any arena is refused when it is called, and alone.
        return needed if max(needed) <= self._server.arena_limit_bytes else (0, 0)

    def _begun(self, message: Infer, tracer: Tracer) -> RequestNotes | None:
        """Return what is to be noted of a request, None where it is not traced."""
        place = tracer.begin(message.traceparent)
        if place is None:
            return None
        asked = message.model, self.tenant.name, message.call_id
        return RequestNotes(place, time.monotonic(), *asked, self._server.generation)

    def _infer(self, message: Infer) -> None:
        engine = self._server.engine
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
        self._busy = True
        self._request_count += 1
        self._server.asked(self._transport, name)
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
            by_name[tensor.name] = (copy, self._server.engine.view(copy, tensor.dtype, tensor.shape))
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
        if message.name == "tenants":
            self.document(message.request_id, self._server.tenants())
            return
        if message.name == "connections":
            self.document(message.request_id, self._server.connections())
            return
        if message.name == "quotas_reload":
            self._busy = True
            self._server.reload(self, message.request_id)
            return
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
        own = self._OF_THE_SERVER.get(message.name)
        if own is not None:
            self.document(message.request_id, own(self, arguments))
            return
        self._busy = True
        if message.name == "release":
            self._server.reread_release(self, message.request_id, str(arguments.get("name", "")))
            return
        deadline = time.monotonic() + _COMMAND_DEADLINE_S
        self._server.engine.command(self, message.request_id, message.name, arguments, deadline)

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
            "in_flight": int(self._busy),
            "age_s": round(time.monotonic() - self._opened_s, 3),
        }

    def _listed(self, arguments: dict[str, Any]) -> dict[str, object]:
        return self._server.sessions(int(arguments.get("offset", 0)), int(arguments.get("limit", 100)))

    def _log_level(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Return the level of this process's log, after it was set to ``level`` if that is given. Raises InvalidInput."""
        if "level" in arguments:
            loglevels.use(str(arguments["level"]))
            log.info("the log's level is %s now", arguments["level"])
        return {"level": loglevels.current()}

    def _identify(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Return whose token has a hash. Raises Unauthorized."""
        tenant, is_admin = self._identified(arguments)
        return {"name": tenant.name, "domain": tenant.domain, "models": list(tenant.models), "administrator": is_admin}

    def _identified(self, arguments: dict[str, Any]) -> tuple[Tenant, bool]:
        # For those who answer tenants in this sidecar's stead.
        token_hash = arguments.get("token_hash")
        return self._server.identify(token_hash if isinstance(token_hash, str) and token_hash.isascii() else "-")

    def _routed(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Return what answers the next request of a tenant for a model, and all that may, as it would call them.

        Raises Unauthorized, UnknownModel, InvalidInput, ModelCorrupt.
        """
        tenant, is_admin = self._identified(arguments)
        known_as = self.known_as(str(arguments.get("model", "")), tenant, is_admin)
        route = self._server.routing.route(known_as)
        names = [known_as] if route is None else route.names
        if route is not None and "call_id" in arguments:
            known_as, _ = route.draw(str(arguments["call_id"]))
        versions = self._server.engine.versions(known_as)
        called = (lambda name: name) if is_admin else as_asked
        return {"model": called(known_as), "models": list(map(called, names)), "versions": versions}

    def _quarantine(self, arguments: dict[str, Any]) -> dict[str, object]:
        return {"quarantine": self._server.suspects.listed()}

    def _lift(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Return what was held against requests and is not any more: of one ``id``, or all. Raises NotQuarantined."""
        lifted = self._server.suspects.lift(str(arguments.get("id", "")))
        for each in lifted:
            log.warning("an operator has lifted the quarantine of %s for %s", each["model"], each["tenant"])
        return {"lifted": lifted}

    # Commands with arguments that no engine is needed for.
    _OF_THE_SERVER: Final = {
        "identify": _identify,
        "route": _routed,
        "sessions": _listed,
        "log_level": _log_level,
        "quarantine": _quarantine,
        "quarantine_lift": _lift,
    }

    @property
    def arena_bytes(self) -> int:
        """Memory of both arenas, and of the private copy of the first."""
        return 0 if self._request is None or self._reply is None else 2 * self._request.size_bytes + self._reply.size_bytes

    def close(self) -> None:
        """Free everything. Called when the engine holds nothing of this session any more; twice is safe."""
        if self._notes is not None and self._server.tracer is not None:
            # Nobody was told anything.
            self._notes.end(time.monotonic(), ConnectionLost.code)
            self._server.tracer.finish(self._notes)
            self._notes = None
        self.sock.close()
        # Views of the arenas; they go first.
        self._layout = self._reply_layout = None
        if self._request is not None and self._reply is not None:
            self._server.arenas_closed(self.arena_bytes)
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
        view = self._server.engine.view
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
        self._server.release(self)

    def _send(self, message: Message) -> None:
        # Before the send: the client may write its next request the moment it has this answer.
        notes, self._notes = self._notes, None
        self._busy = False
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
        if notes is not None and self._server.tracer is not None:
            self._server.tracer.finish(notes)


class _Listener(NamedTuple):
    """A socket that is listened at: of one tenant, of the sidecar's HTTP server, which asks for others, or else for all."""

    socket: socket.socket
    tenant: str = ""
    is_relay: bool = False


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


def _is_readable(fd: int) -> bool:
    """Say whether there is something to read or to accept, or the other side has gone."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


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
