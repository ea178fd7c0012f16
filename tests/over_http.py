"""A sidecar's HTTP routes, or an odd server in their place, on a port of this process."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from trunkline.admin import AdminConnection
from werkzeug.serving import WSGIRequestHandler, make_server

from sidecar.http.admin import create_app
from sidecar.http.callers import Callers, Room
from sidecar.http.oip import add_open_inference
from sidecar.openinference import MAX_JSON_BYTES
from sidecar.store import Store
from tests.fakes import ADMIN_TOKEN, Running
from tests.waiting import PATIENCE_S


class _Handler(WSGIRequestHandler):
    # With which connections are kept.
    protocol_version = "HTTP/1.1"

    def log(self, *arguments: Any) -> None:
        pass


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve a WSGI application while the block runs; give its URL."""
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=_Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextlib.contextmanager
def routes_of(running: Running, folder: Path, callers: Any = None) -> Iterator[str]:
    """Serve the Open Inference Protocol before a server of this process."""
    made = callers or Callers(running.relay)
    admin = AdminConnection(running.path, ADMIN_TOKEN)
    app = create_app(admin, Store(folder / "store"))
    limit_bytes = running.server.arena_limit_bytes + MAX_JSON_BYTES
    add_open_inference(app, admin, made, Room(32, 1 << 30), body_limit_bytes=limit_bytes)
    with served(app) as url:
        yield url
    made.close()
    admin.close()


def answer(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    """Return an HTTP answer; underscores in names of headers are hyphens. Its Content-Length is the body's unless given."""
    lines = {"Content-Length": len(body)} | {name.replace("_", "-"): value for name, value in headers.items()}
    return b"\r\n".join([f"HTTP/1.1 {status}".encode(), *(f"{k}: {v}".encode() for k, v in lines.items()), b"", body])


@contextlib.contextmanager
def odd_server(answers: Sequence[bytes | Callable[[socket.socket], None]]) -> Iterator[tuple[str, list[bytes]]]:
    """Answer one request after another with these bytes, and leave after the last; give the URL, and the heads of requests."""
    listener = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []

    def serve() -> None:
        left = list(answers)
        while left:
            try:
                peer, _ = listener.accept()
            except OSError:
                return
            with peer, contextlib.suppress(OSError):
                peer.settimeout(PATIENCE_S)
                while left:
                    asked.append(_head(peer))
                    if not asked[-1]:
                        asked.pop()
                        break
                    each = left.pop(0)
                    if callable(each):
                        each(peer)
                        break
                    peer.sendall(each)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


def _head(peer: socket.socket) -> bytes:
    """Read one request; return what stands before its body, nothing at the end of the connection."""
    found = b""
    while b"\r\n\r\n" not in found:
        piece = peer.recv(65536)
        if not piece:
            return b""
        found += piece
    head, _, body = found.partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    while length and len(body) < int(length[1]):
        body += peer.recv(65536)
    return head
