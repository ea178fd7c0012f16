"""The connections of one process: found once, shared by its threads, remade after a fork or a restart of the sidecar."""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from trunkline.connection import Connection
from trunkline.endpoint import Endpoint, connect
from trunkline.errors import ConnectionLost, Draining, SidecarUnavailable

if TYPE_CHECKING:
    from trunkline.httpconnection import HttpConnection

log = logging.getLogger("trunkline")

AnyConnection: TypeAlias = "Connection | HttpConnection"

# Where OpenFaaS mounts the secret of this name.
DEFAULT_CREDENTIAL = "/var/openfaas/secrets/trunkline-token"
_MAX_IDLE = 16
_FIRST_BACKOFF_S = 0.005
_LONGEST_BACKOFF_S = 0.25


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

    Where a TRUNKLINE_URL says that there is a choice, a call takes a connection to where calls should go now (``Endpoint``);
    those to other places are closed once one has been made to there.

    A gunicorn worker is forked from a process that may have imported the handler already. Connections must not be
    shared across that fork, so the pool notices by the process id that it has been copied, and starts afresh.
    """

    def __init__(
        self,
        connector: Callable[..., AnyConnection] = connect,
        *,
        endpoint: Endpoint | None = None,
        credential: Callable[[], bytes] = read_token,
        idle_limit: int = _MAX_IDLE,
    ) -> None:
        """``endpoint`` and ``credential`` say where the sidecar is and who asks, for each new connection."""
        # What opens a connection; the fake sidecar of trunkline.testing stands in here.
        self.connector = connector
        self._endpoint = endpoint or Endpoint()
        self._credential = credential
        self._idle_limit = idle_limit
        self._lock = threading.Lock()
        self._idle: list[AnyConnection] = []
        self._pid = os.getpid()
        self._was_connected = False
        self._reached = ""
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
        """Where the sidecar was last reached, e.g. ``unix:/run/trunkline/trunkline.sock``; None before, and once it is lost."""
        with self._lock:
            self._notice_fork()
            return self._idle[-1].address if self._idle else None

    def take(self, request_bytes: int, reply_bytes: int, deadline: float) -> AnyConnection:
        """Return a connection whose arenas hold at least so many bytes.

        A process that has never reached a sidecar fails at once; one that has waits for it to come back until
        ``deadline``. Raises TransportError, ProtocolError, CapacityError, Unauthorized, InvalidInput.
        """
        backoff_s = _FIRST_BACKOFF_S
        while True:
            wanted = self._endpoint.wanted()
            with self._lock:
                self._notice_fork()
                found = self._idle_one(wanted, request_bytes, reply_bytes)
                patient = self._was_connected
            if found is not None:
                return found
            where = ""
            try:
                where = self._endpoint.find()
                return self.connect(where, self._models, request_bytes, reply_bytes, deadline)
            except (ConnectionLost, SidecarUnavailable, Draining) as error:
                if isinstance(error, SidecarUnavailable) and self._endpoint.refused(where):
                    continue
                # An engine that dies during the handshake is replaced within moments, so that is always worth another try.
                if not patient and not isinstance(error, ConnectionLost):
                    raise
                # Full jitter: functions that lost the same sidecar should not all come back in the same instant.
                pause_s = random.uniform(0, backoff_s)  # noqa: S311 - spreading load, not a secret
                if time.monotonic() + pause_s >= deadline:
                    raise
                time.sleep(pause_s)
                backoff_s = min(2 * backoff_s, _LONGEST_BACKOFF_S)

    def connect(
        self, where: str, models: tuple[str, ...], request_bytes: int, reply_bytes: int, deadline: float
    ) -> AnyConnection:
        """Open a connection to ``where`` for a function that stands for ``models``. Raises as ``take`` does."""
        connection = self.connector(
            where,
            token=self._credential(),
            models=models,
            request_bytes=request_bytes,
            reply_bytes=reply_bytes,
            deadline=deadline,
        )
        with self._lock:
            if connection.address != self._reached:
                log.info("sidecar reached at %s (transport %s)", connection.address, connection.transport)
                self._reached = connection.address
            self._was_connected = True
            self.connect_count += 1
            # They lead where no call should go any more.
            left = [each for each in self._idle if each.endpoint != connection.endpoint]
            self._idle = [each for each in self._idle if each.endpoint == connection.endpoint]
        for each in left:
            each.close()
        return connection

    def _idle_one(self, wanted: str | None, request_bytes: int, reply_bytes: int) -> AnyConnection | None:
        """Take the latest connection that leads where it should; those that are too small are closed."""
        for connection in self._idle[::-1]:
            if wanted is not None and connection.endpoint != wanted:
                continue
            self._idle.remove(connection)
            if connection.request_bytes >= request_bytes and connection.reply_bytes >= reply_bytes:
                return connection
            connection.close()
        return None

    def give(self, connection: AnyConnection) -> None:
        """Put a healthy connection back for the next call."""
        with self._lock:
            self._notice_fork()
            if not connection.closed and not connection.is_foreign and len(self._idle) < self._idle_limit:
                self._idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        """Close every idle connection: after one was lost, since the others were most likely lost with it."""
        self._endpoint.forget()
        with self._lock:
            idle, self._idle = self._idle, []
        for connection in idle:
            connection.close()

    def _notice_fork(self) -> None:
        if self._pid == os.getpid():
            return
        self._pid = os.getpid()
        self._was_connected = False
        self._reached = ""
        # Closes this process's copies only: the parent's connections stay open.
        for connection in self._idle:
            connection.close()
        self._idle = []
