"""A stand-in for of-watchdog 0.11, run as ``python -m tests.openfaas.watchdog`` with its environment variables.

It does what a function can tell: it is named fwatchdog, starts ``fprocess`` (split at single spaces), says that it is healthy
while its lock file is there, which it writes at once, whatever the function does, unless told to ``suppress_lock``; sends bodies
on in chunks; ends what takes longer than ``exec_timeout`` with 504; refuses what is beyond ``max_inflight`` with 429; asks
``ready_path``. On SIGTERM it passes that on at once, is healthy no more, admits requests for another ``healthcheck_interval``,
and waits for the last for ``write_timeout``.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_PR_SET_NAME = 15
UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0}
LOCK = Path(os.environ.get("TMPDIR", "/tmp"), ".lock")
_FRAMING = ("content-length", "transfer-encoding")


def seconds(name: str, default: str) -> float:
    text = os.environ.get(name, default)
    unit = next(unit for unit in UNITS_S if text.endswith(unit))
    return float(text.removesuffix(unit)) * UNITS_S[unit]


class Watchdog(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        self.child = subprocess.Popen(os.environ["fprocess"].split(" "))
        self.upstream = urlsplit(os.environ["upstream_url"]).netloc
        self.exec_timeout_s = seconds("exec_timeout", "30s")
        self.max_inflight = int(os.environ.get("max_inflight", "0"))
        self.inflight = 0
        self.lock = threading.Lock()
        super().__init__((os.environ.get("bind_address", "0.0.0.0"), int(os.environ.get("port", "8080"))), Handler)
        if os.environ.get("suppress_lock") not in ("true", "1"):
            LOCK.touch()
        self.accepting = True

    def stop(self) -> None:
        """Do what it does on SIGTERM; return when nothing is under way."""
        self.child.send_signal(signal.SIGTERM)
        self.accepting = False
        LOCK.unlink(missing_ok=True)
        time.sleep(seconds("healthcheck_interval", os.environ.get("write_timeout", "30s")))
        self.shutdown()
        deadline = time.monotonic() + seconds("write_timeout", "30s")
        while self.inflight and time.monotonic() < deadline:
            time.sleep(0.01)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Watchdog

    def _any(self) -> None:
        if self.path == "/_/health":
            self._told(200 if self.server.accepting and LOCK.exists() else 503)
        elif self.path == "/_/ready" and "ready_path" in os.environ:
            self._pass_on("GET", os.environ["ready_path"], None, unreachable=503)
        else:
            with self.server.lock:
                admitted = not self.server.max_inflight or self.server.inflight < self.server.max_inflight
                self.server.inflight += admitted
            if not admitted:
                self._told(429)
                return
            try:
                self._pass_on(self.command, self.path, self._body())
            finally:
                with self.server.lock:
                    self.server.inflight -= 1

    do_GET = do_POST = do_PUT = do_DELETE = _any

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _pass_on(self, method: str, path: str, body: bytes | None, unreachable: int = 500) -> None:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=self.server.exec_timeout_s)
        headers = {
            key: value for key, value in self.headers.items() if key.lower() not in ("content-length", "transfer-encoding")
        }
        try:
            connection.request(method, path, _pieces(body) if body else None, headers, encode_chunked=bool(body))
            answer = connection.getresponse()
            self._told(answer.status, answer.read(), dict(answer.getheaders()))
        except TimeoutError:
            self._told(504)
        except OSError:
            self._told(unreachable)
        finally:
            connection.close()

    def _told(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {"X-OpenFaaS-Internal": "of-watchdog"}).items():
            if key.lower() not in (*_FRAMING, "connection", "date", "server"):
                self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


def _pieces(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 1000):
        yield body[start : start + 1000]


def main() -> int:
    ctypes.CDLL(None).prctl(_PR_SET_NAME, b"fwatchdog", 0, 0, 0)
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda number, frame: told.set())
    watchdog = Watchdog()
    # What serves is a thread: the signal is the main one's, and it must not wait for itself.
    threading.Thread(target=watchdog.serve_forever, daemon=True).start()
    while not told.wait(0.1):
        if watchdog.child.poll() is not None:
            return 1
    watchdog.stop()
    return watchdog.child.wait()


if __name__ == "__main__":
    sys.exit(main())
