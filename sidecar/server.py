"""The server: the sockets that functions and operators connect to, whose they are, and how much of anything they may have.

One thread, ``Server.run``, accepts connections and hands what they send to their sessions (``sidecar.session``). It decides
nothing about models or memory: that is the engine's. What operators ask that no engine is needed for is answered here.

A session that ends is taken out of the poll at once, but its socket and arenas live on until the engine has said that it
holds nothing of it any more: memory is never unmapped under a writer, and the number of a closed descriptor is
never written to.
"""

from __future__ import annotations

import hmac
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
from typing import Any, Final

from trunkline import protocol
from trunkline.arena import ServerArena, choose_transport
from trunkline.errors import (
    ArenaFull,
    FrameTooLarge,
    InvalidInput,
    MalformedFrame,
    QueueFull,
    QuotaExceeded,
    SidecarFault,
    TrunklineError,
    Unauthorized,
)
from trunkline.protocol import (
    COPY,
    HTTP,
    JOINT,
    Infer,
)

from sidecar import loglevels
from sidecar.logs import RateLimit
from sidecar.naming import Naming
from sidecar.peers import Peer
from sidecar.ports import Serving
from sidecar.quarantine import Suspects, nobody
from sidecar.releases import Release
from sidecar.routing import ReleaseFiles, Routing
from sidecar.session import Listener, Session
from sidecar.tenants import ANYONE, OPEN, Quotas, Tenant, as_asked, hash_of
from sidecar.tracing import Tracer

log = logging.getLogger("trunkline.server")
# One line a function that is not let in, as long as there are not too many of them.
refusals = logging.getLogger("trunkline.server.refusals")
refusals.addFilter(RateLimit(20))

HANDSHAKE_S: Final = 1.0
_COMMAND_DEADLINE_S: Final = 600.0
_ACCEPT_SLICE: Final = 64
# Connections of whom nobody knows yet whose they are. Beyond that the oldest is closed: who means it says hello at once.
MOST_GREETING: Final = 4 * _ACCEPT_SLICE
# To make arenas takes time, in which nobody else is answered: after so much of it those who are asking have their turn.
_GREETING_S: Final = 0.005
# How soon a function is told to try again that has as many connections as its tenant may have.
_CONNECTION_RETRY_S: Final = 1.0
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
        self.naming = Naming(self.routing, engine.signature)
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
        self._listeners: dict[int, Listener] = {}
        self._listening = True
        self._listen_at(Listener(listener))
        if relay is not None:
            self._listen_at(Listener(relay, is_relay=True))
        for name, each in tenant_sockets.items():
            self._listen_at(Listener(each, name))
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

    def _accept(self, listener: Listener) -> None:
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

    def _listen_at(self, listener: Listener) -> None:
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
                self._listen_at(Listener(sock, tenant))

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

    # --- what operators ask for --------------------------------------------------------------------------------------

    def command(self, session: Session, request_id: int, name: str, arguments: dict[str, Any]) -> None:
        """Run an administrator's command; its session is told the answer, now or later. Raises TrunklineError."""
        if (own := self._OWN.get(name)) is not None:
            session.document(request_id, own(self, arguments))
            return
        session.busy = True
        if name == "quotas_reload":
            self._reread_quotas(session, request_id)
        elif name == "release":
            self._reread_release(session, request_id, str(arguments.get("name", "")))
        else:
            self.engine.command(session, request_id, name, arguments, time.monotonic() + _COMMAND_DEADLINE_S)

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

    def _reread_quotas(self, session: Session, request_id: int) -> None:
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

    def _reread_release(self, session: Session, request_id: int, name: str) -> None:
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
        return self.identify(token_hash if isinstance(token_hash, str) and token_hash.isascii() else "-")

    def _routed(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Return what answers the next request of a tenant for a model, and all that may, as it would call them.

        Raises Unauthorized, UnknownModel, InvalidInput, ModelCorrupt.
        """
        tenant, is_admin = self._identified(arguments)
        known_as = self.naming.known_as(str(arguments.get("model", "")), tenant, is_admin)
        route = self.routing.route(known_as)
        names = [known_as] if route is None else route.names
        if route is not None and "call_id" in arguments:
            known_as, _ = route.draw(str(arguments["call_id"]))
        versions = self.engine.versions(known_as)
        called = (lambda name: name) if is_admin else as_asked
        return {"model": called(known_as), "models": list(map(called, names)), "versions": versions}

    def _quarantine(self, arguments: dict[str, Any]) -> dict[str, object]:
        return {"quarantine": self.suspects.listed()}

    def _lift(self, arguments: dict[str, Any]) -> dict[str, object]:
        """Return what was held against requests and is not any more: of one ``id``, or all. Raises NotQuarantined."""
        lifted = self.suspects.lift(str(arguments.get("id", "")))
        for each in lifted:
            log.warning("an operator has lifted the quarantine of %s for %s", each["model"], each["tenant"])
        return {"lifted": lifted}

    # Those that no engine is needed for.
    _OWN: Final[Mapping[str, Callable[[Server, dict[str, Any]], object]]] = {
        "connections": lambda self, arguments: self.connections(),
        "tenants": lambda self, arguments: self.tenants(),
        "sessions": lambda self, arguments: self.sessions(int(arguments.get("offset", 0)), int(arguments.get("limit", 100))),
        "identify": _identify,
        "route": _routed,
        "log_level": _log_level,
        "quarantine": _quarantine,
        "quarantine_lift": _lift,
    }


def _is_readable(fd: int) -> bool:
    """Say whether there is something to read or to accept, or the other side has gone."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))
