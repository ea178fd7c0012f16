"""The administrator's side of the wire: commands instead of tensors, used by the sidecar's HTTP workers."""

from __future__ import annotations

import threading
import time
from typing import Any

from trunkline.connection import Connection
from trunkline.errors import ArenaFull, ConnectionLost

# Room for the answer to most commands; longer listings come in pages.
_REPLY_BYTES = 1 << 20
_DEADLINE_S = 30.0


class AdminConnection:
    """Commands to the engine, as administrator. Threads may share one: commands run one after the other.

    The connection is made at the first command and remade after the engine was restarted.
    """

    def __init__(self, socket_path: str, token: bytes, deadline_s: float = _DEADLINE_S) -> None:
        self._path = socket_path
        self._token = token
        self._deadline_s = deadline_s
        self._lock = threading.Lock()
        self._connection: Connection | None = None

    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        """Run a command and return its answer as plain values. Raises TrunklineError.

        Commands are idempotent, so one whose connection broke is sent a second time.
        """
        deadline = time.monotonic() + self._deadline_s
        with self._lock:
            try:
                return self._send(name, arguments or {}, deadline)
            except ConnectionLost:
                self._connection = None
                return self._send(name, arguments or {}, deadline)

    def _send(self, name: str, arguments: dict[str, object], deadline: float) -> Any:
        if self._connection is None or self._connection.closed:
            self._connection = self._opened(_REPLY_BYTES, deadline)
        try:
            return self._connection.command(name, arguments, deadline)
        except ArenaFull as error:
            needed_bytes = error.details.get("needed_reply_bytes")
            if not isinstance(needed_bytes, int) or needed_bytes <= _REPLY_BYTES:
                raise
        # So long an answer, of a graph of ten thousand blocks for one, has a session of its own, whose memory is not kept.
        connection = self._opened(needed_bytes, deadline)
        try:
            return connection.command(name, arguments, deadline)
        finally:
            connection.close()

    def _opened(self, reply_bytes: int, deadline: float) -> Connection:
        return Connection(self._path, token=self._token, request_bytes=1 << 16, reply_bytes=reply_bytes, deadline=deadline)

    def close(self) -> None:
        """End the session; the next command opens another."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
