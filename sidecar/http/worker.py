"""gunicorn's worker with threads, made not to wait without end for whoever does not go on with a request, or with its answer.

A thread that serves somebody serves nobody else meanwhile, and the main thread takes connections for all. So whoever sends no
byte, or takes none, for some seconds is let go; and after some more, whoever sends a header byte by byte. A body has as long as
its length takes at a low rate. And the settings that the servers with such workers have in common. Must not import torch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
import selectors
import socket
import ssl
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

from flask import Flask
from gunicorn.config import Config, make_settings
from gunicorn.glogging import Logger
from gunicorn.workers.gthread import ThreadWorker
from trunkline import logs

from sidecar.logs import RateLimit

# Whoever sends nothing for so long in the middle of a request, or takes nothing of its answer, is not waited for.
SILENCE_S: Final = 10
# How long a header may take.
_HEADER_S: Final = 20.0
# And a body: so long, and as long as it takes at so many bytes a second.
_BODY_S: Final = 60.0
_BODY_BYTES_PER_S: Final = 64 << 10
# What is announced as longer is refused.
_LONGEST_BYTES: Final = 1 << 50
# Of requests that cannot be read, so many are told a second, by each worker.
_TOLD_PER_S: Final = 5


class PlainLogger(Logger):  # type: ignore[misc]
    """Writes gunicorn's own lines as all others are written, with the call they belong to."""

    def setup(self, cfg: object) -> None:
        super().setup(cfg)
        logs.adopt(self.error_log)
        # It tells of each request that cannot be read, with a warning, or with the trace of what the connection came to, and
        # whoever reaches the port can send them without end.
        strangers = RateLimit(_TOLD_PER_S)

        def told(record: logging.LogRecord) -> bool:
            if record.exc_info and isinstance(error := record.exc_info[1], OSError):
                record.msg, record.exc_info = f"{record.msg} ({type(error).__name__})", None
            elif record.levelno != logging.WARNING:
                return True
            return strangers.filter(record)

        self.error_log.addFilter(told)


class ImpatientTLS(ssl.SSLSocket):
    """TLS that has a timeout of its own where none is set: after the kernel's, OpenSSL would be asked again, for ever."""

    def settimeout(self, value: float | None) -> None:
        super().settimeout(SILENCE_S if value is None else value)

    def setblocking(self, flag: bool) -> None:
        self.settimeout(None if flag else 0.0)


def impatient_tls(cfg: object, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
    """Return gunicorn's own context, whose sockets are not waited for without end: its setting ``ssl_context``."""
    context = default()
    context.sslsocket_class = ImpatientTLS
    return context


class ImpatientWorker(ThreadWorker):  # type: ignore[misc]
    """Gives a thread back from whoever does not go on, which gunicorn's own waits for without end.

    And leaves TLS to TCP: gunicorn has it on every listener or on none.
    """

    def init_process(self) -> None:
        self._plain = copy.copy(self.cfg)
        self._plain.settings = {**self.cfg.settings, **{key: make_settings()[key] for key in ("certfile", "keyfile")}}
        # Until when what is being read of a connection must have come.
        self._until_s: dict[Any, float] = {}
        super().init_process()

    # How long a header may take, TLS before it included, from when somebody has sent the first byte of it.
    header_s = _HEADER_S

    def enqueue_req(self, conn: Any) -> None:
        """Have a connection served. Runs in the main thread, when somebody has connected, and when there is something to read."""
        if not (conn.initialized or conn.data_ready):
            # Who has connected and says nothing has no thread; gunicorn would have one wait for some seconds.
            conn.sock.setblocking(False)
            conn.timeout = time.monotonic() + SILENCE_S
            self.pending_conns.append(conn)
            readable = functools.partial(self.on_pending_socket_readable, conn)
            self.poller.register(conn.sock, selectors.EVENT_READ, readable)
            return
        if conn.sock.family == socket.AF_UNIX:
            conn.cfg = self._plain
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            conn.sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", SILENCE_S, 0))
        super().enqueue_req(conn)

    def handle(self, conn: Any) -> Any:
        """Serve one request of a connection. Runs in a thread of the pool."""
        self._until_s[conn] = time.monotonic() + self.header_s
        try:
            kept = super().handle(conn)
        finally:
            self._until_s.pop(conn, None)
        if not kept:
            # Here, since it waits for the other end to close, too; the main thread would, and take no connections meanwhile.
            with contextlib.suppress(OSError):
                conn.close(graceful=True)
            conn.close = _is_closed
        return kept

    def handle_request(self, req: Any, conn: Any) -> Any:
        """Serve a request whose header has been read."""
        length = min(next((int(value) for key, value in req.headers if key == "CONTENT-LENGTH"), 0), _LONGEST_BYTES)
        if length:
            self._until_s[conn] = time.monotonic() + _BODY_S + length / _BODY_BYTES_PER_S
        else:
            self._until_s.pop(conn, None)
        return super().handle_request(req, conn)

    def murder_pending(self) -> None:
        """Let those go who have had their time; the main thread does so once a second."""
        super().murder_pending()
        now_s = time.monotonic()
        for conn, until_s in list(self._until_s.items()):
            if until_s < now_s:
                # What has been read and is being answered is not cut; past TLS, which would begin to speak in plain text.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(conn.sock, socket.SHUT_RD)

    def handle_exit(self, sig: int, frame: object) -> None:
        """End the streams of events, too, which would not end by themselves."""
        super().handle_exit(sig, frame)
        # It may be told to end before it has loaded the application.
        app = getattr(self, "wsgi", None)
        if isinstance(app, Flask) and (feed := app.extensions.get("feed")) is not None:
            feed.close()


def _is_closed(graceful: bool = False) -> None:
    """Stand in for the end of a connection that has come to it."""


def configure(cfg: Config, chosen: Mapping[str, Any]) -> None:
    """Have gunicorn serve with impatient workers, and with ``chosen`` besides, each setting by its name in gunicorn's manual.

    What this version of gunicorn does not know yet is left out.
    """
    common: dict[str, Any] = {
        "worker_class": ImpatientWorker,
        "logger_class": PlainLogger,
        "loglevel": "warning",
        "preload_app": True,
        "control_socket_disable": True,
        # Else a header (SCRIPT_NAME) may say which route is meant, past a proxy on this machine which lets but some paths by.
        "forwarded_allow_ips": "",
        "forwarder_headers": "",
        "secure_scheme_headers": {},
    }
    if os.access("/dev/shm", os.W_OK):  # noqa: S108 - gunicorn's heartbeat file, not ours
        common["worker_tmp_dir"] = "/dev/shm"  # noqa: S108
    for name, value in {**common, **chosen}.items():
        if name in cfg.settings:
            cfg.set(name, value)
