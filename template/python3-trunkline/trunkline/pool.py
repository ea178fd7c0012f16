"""The connections of one process: found once, shared by its threads, remade after a fork or a restart of the sidecar."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trunkline.connection import Connection
from trunkline.errors import ConnectionLost, Draining, SidecarUnavailable, TrunklineError

log = logging.getLogger("trunkline")

DEFAULT_SOCKETS = (
    "/run/trunkline/trunkline.sock",
    # Stock faasd and `faas-cli local-run` mount a "secret" that is a directory here.
    "/var/openfaas/secrets/trunkline/trunkline.sock",
)
# Where OpenFaaS mounts the secret of this name.
DEFAULT_CREDENTIAL = "/var/openfaas/secrets/trunkline-token"
_MAX_IDLE = 16
_FIRST_BACKOFF_S = 0.005
_LONGEST_BACKOFF_S = 0.25


def socket_path() -> str:
    """Return the path of the sidecar's socket: TRUNKLINE_SOCKET, else the first well-known place that exists.

    Raises SidecarUnavailable, naming the places looked at.
    """
    explicit = os.environ.get("TRUNKLINE_SOCKET")
    if explicit:
        return explicit
    for path in DEFAULT_SOCKETS:
        if os.path.exists(path):
            return path
    raise SidecarUnavailable(
        f"no sidecar: TRUNKLINE_SOCKET is not set and neither {' nor '.join(DEFAULT_SOCKETS)} exists; start "
        "`trunkline serve` on this node and mount the directory of its socket into the function"
    )


def read_token() -> bytes:
    """Return this function's credential: from the file that TRUNKLINE_TOKEN_FILE names, else OpenFaaS's secret, else nothing.

    Read for each new connection, so that it can be changed under a function that runs. Raises SidecarUnavailable.
    """
    explicit = os.environ.get("TRUNKLINE_TOKEN_FILE")
    path = explicit or DEFAULT_CREDENTIAL
    try:
        return Path(path).read_bytes().strip()[:64]
    except OSError as error:
        if not explicit and isinstance(error, (FileNotFoundError, NotADirectoryError)):
            return b""
        reason = os.strerror(error.errno or 0)
        raise SidecarUnavailable(f"the token in {path} cannot be read ({reason}); see TRUNKLINE_TOKEN_FILE", path=path) from error


class Pool:
    """Idle connections of this process. Any thread may take one; a taken one is that thread's alone.

    A gunicorn worker is forked from a process that may have imported the handler already. Connections must not be
    shared across that fork, so the pool notices by the process id that it has been copied, and starts afresh.
    """

    def __init__(
        self,
        connector: Callable[..., Connection] = Connection,
        *,
        address: Callable[[], str] = socket_path,
        credential: Callable[[], bytes] = read_token,
        idle_limit: int = _MAX_IDLE,
    ) -> None:
        """``address`` and ``credential`` say where the sidecar is and who asks, for each new connection."""
        # What opens a connection; the fake sidecar of trunkline.testing stands in here.
        self.connector = connector
        self._address = address
        self._credential = credential
        self._idle_limit = idle_limit
        self._lock = threading.Lock()
        self._idle: list[Connection] = []
        self._pid = os.getpid()
        self._was_connected = False
        self._models: tuple[str, ...] = ()
        self.connect_count = 0

    def expect(self, model: str) -> None:
        """Remember that this process uses ``model``, so that arenas are sized for it at once."""
        with self._lock:
            if model not in self._models:
                self._models = (*self._models, model)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models this process has asked for."""
        return self._models

    @property
    def address(self) -> str | None:
        """Where the sidecar was last reached, e.g. ``unix:/run/trunkline/trunkline.sock``; None before that."""
        with self._lock:
            self._notice_fork()
            return self._idle[-1].address if self._idle else None

    def take(self, request_bytes: int, reply_bytes: int, deadline: float) -> Connection:
        """Return a connection whose arenas hold at least so many bytes.

        A process that has never reached a sidecar fails at once; one that has waits for it to come back until
        ``deadline``. Raises TransportError, ProtocolError, CapacityError, Unauthorized.
        """
        with self._lock:
            self._notice_fork()
            while self._idle:
                connection = self._idle.pop()
                if connection.request_bytes >= request_bytes and connection.reply_bytes >= reply_bytes:
                    return connection
                connection.close()
            patient = self._was_connected
        connection = self._connect(request_bytes, reply_bytes, deadline, patient)
        with self._lock:
            if not self._was_connected:
                log.info("sidecar reached at %s (transport %s)", connection.address, connection.transport)
            self._was_connected = True
            self.connect_count += 1
        return connection

    def _connect(self, request_bytes: int, reply_bytes: int, deadline: float, patient: bool) -> Connection:
        # An engine that dies during the handshake is replaced within moments, so that is always worth another try.
        passing: tuple[type[TrunklineError], ...] = (ConnectionLost,)
        if patient:
            passing = (ConnectionLost, SidecarUnavailable, Draining)
        backoff_s = _FIRST_BACKOFF_S
        while True:
            try:
                return self.connector(
                    self._address(),
                    token=self._credential(),
                    models=self._models,
                    request_bytes=request_bytes,
                    reply_bytes=reply_bytes,
                    deadline=deadline,
                )
            except passing:
                # Full jitter: functions that lost the same sidecar should not all come back in the same instant.
                pause_s = random.uniform(0, backoff_s)  # noqa: S311 - spreading load, not a secret
                if time.monotonic() + pause_s >= deadline:
                    raise
                time.sleep(pause_s)
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def give(self, connection: Connection) -> None:
        """Put a healthy connection back for the next call."""
        with self._lock:
            self._notice_fork()
            if not connection.closed and not connection.is_foreign and len(self._idle) < self._idle_limit:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close every idle connection: after one was lost, since the others were most likely lost with it."""
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _notice_fork(self) -> None:
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._was_connected = False
        # Closes this process's copies only: the parent's connections stay open.
        for connection in self._idle:
            connection.close()
        self._idle = []
