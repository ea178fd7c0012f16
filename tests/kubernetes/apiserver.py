"""An API server, as far as labels of nodes go: server-side apply, tokens, and answers that went wrong."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.kubernetes.authority import issue
from tests.waiting import PATIENCE_S


class ApiServer:
    """Has nodes with labels, of which it knows who has set them. Serves TLS by a certificate of its own.

    ``account`` is the folder of a service account: its token counts. ``answers`` are given first, one to a request, as (status,
    headers); what they are given to is not done.
    """

    def __init__(self, folder: Path) -> None:
        self.account = folder / "account"
        self.account.mkdir()
        self.token = ""
        self.nodes: dict[str, dict[str, str]] = {"node-1": {"kubernetes.io/os": "linux"}}
        self.owned: dict[str, set[str]] = {}
        self.answers: list[tuple[int, dict[str, str]]] = []
        self.asked: list[dict[str, str]] = []
        self.version = 0
        self._changed = threading.Condition()
        self._key = folder / "api.key"
        self.rotate()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.socket = self._context().wrap_socket(self._server.socket, server_side=True)
        self.url = f"https://127.0.0.1:{self._server.server_port}"
        self._serving = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._serving.start()

    def rotate(self) -> None:
        """Have another token; the one before does not count any more."""
        self.token = f"token-{len(self.asked)}-{id(object())}"
        (self.account / "token").write_text(self.token + "\n")
        if not self._key.exists():
            issue(self.account / "ca.crt", self._key)

    def _context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.account / "ca.crt", self._key)
        return context

    def apply(self, node: str, manager: str, labels: dict[str, str]) -> None:
        """Have the labels of one manager be these; a change is a new version of the node."""
        before = dict(self.nodes[node])
        for key in self.owned.get(manager, set()) - labels.keys():
            self.nodes[node].pop(key, None)
        self.nodes[node] |= labels
        self.owned[manager] = set(labels)
        self.version += before != self.nodes[node]

    def until(self, holds: Any) -> None:
        with self._changed:
            assert self._changed.wait_for(holds, PATIENCE_S)

    def close(self) -> None:
        self._server.shutdown()
        self._serving.join()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                url = urlsplit(self.path)
                with api._changed:
                    status, headers, told = api._answer(url.path, parse_qs(url.query), dict(self.headers), body)
                    api._changed.notify_all()
                text = json.dumps(told).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *ignored: object) -> None:
                pass

        return Handler

    def _answer(
        self, path: str, query: dict[str, list[str]], headers: dict[str, str], body: dict[str, Any]
    ) -> tuple[int, dict[str, str], object]:
        node = path.removeprefix("/api/v1/nodes/")
        self.asked.append(body["metadata"]["labels"])
        if headers["Authorization"] != f"Bearer {self.token}":
            return 401, {}, {"kind": "Status", "message": "Unauthorized"}
        if self.answers:
            status, sent = self.answers.pop(0)
            return status, sent, {"kind": "Status", "message": f"answered with {status}"}
        if node not in self.nodes:
            return 404, {}, {"kind": "Status", "message": f'nodes "{node}" not found'}
        assert headers["Content-Type"] == "application/apply-patch+yaml"
        assert query == {"fieldManager": ["trunkline"], "force": ["true"]}
        assert (body["apiVersion"], body["kind"], body["metadata"]["name"]) == ("v1", "Node", node)
        assert set(body) == {"apiVersion", "kind", "metadata"}
        assert set(body["metadata"]) == {"name", "labels"}
        self.apply(node, query["fieldManager"][0], body["metadata"]["labels"])
        return 200, {}, {"kind": "Node"}


@contextlib.contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    running = ApiServer(folder)
    try:
        yield running
    finally:
        running.close()
