"""A gateway for one machine: `/function/<name>` as OpenFaaS serves it, so that clients cannot tell the difference.

Like OpenFaaS's own, it sends bodies on in chunks, adds X-Call-Id where there is none, and answers 404 for a function it does
not know, 502 for one that does not answer, 503 for one that has not been ready yet. It is for trying things out, not for the
network: it listens on loopback.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final
from urllib.parse import quote

import requests
from flask import Flask, Response, jsonify, request
from gunicorn.app.base import BaseApplication

from sidecar.local.stack import READY_PATH

METHODS: Final = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
# Those that speak of one connection, not of the message (RFC 9110, section 7.6.1).
_HOP_BY_HOP: Final = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
# What a request loses besides: chunks replace the length, and this gateway has answered the expectation.
_ENDING_HERE: Final = {"content-length", "expect", "host"}
# Characters that may stand in a path as they are (RFC 3986, section 3.3).
_PATH_SAFE: Final = "/:@!$&'()*+,;=~"
_CHUNK_BYTES: Final = 64 * 1024
_TIMEOUT_S: Final = (2.0, 60.0)


def create_app(upstreams: Mapping[str, str]) -> Flask:
    """Return the gateway for functions at the given base URLs."""
    app = Flask(__name__, static_folder=None)
    # /function/classify and /function/classify/ are one function.
    app.url_map.strict_slashes = False
    app.url_map.merge_slashes = False
    session = requests.Session()
    session.trust_env = False
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=64)
    session.mount("http://", adapter)
    # Functions that have said that they are ready; a request brings out when one has gone.
    ready: set[str] = set()

    @app.get("/healthz")
    def healthz() -> str:
        return "OK"

    @app.get("/system/functions")
    def functions() -> Response:
        return jsonify([{"name": name, "replicas": 1, "availableReplicas": 1} for name in upstreams])

    @app.route("/function/<name>", defaults={"path": ""}, methods=METHODS)
    @app.route("/function/<name>/<path:path>", methods=METHODS)
    def invoke(name: str, path: str) -> Response:
        # faas-cli and clients may name the namespace: classify.openfaas-fn.
        name_alone = name.partition(".")[0]
        upstream = upstreams.get(name_alone)
        if upstream is None:
            return Response(f"error finding function {name}.openfaas-fn: not found\n", 404)
        started_ns = time.time_ns()
        call_id = request.headers.get("X-Call-Id") or secrets.token_hex(16)
        added = {"X-Call-Id": call_id, "X-Start-Time": str(started_ns)}
        headers = dict(_end_to_end(request.headers.items(), request.headers.get("Connection", ""), _ENDING_HERE))
        headers |= added | {"X-Forwarded-Host": request.host, "X-Forwarded-For": request.remote_addr or ""}
        try:
            if name_alone not in ready:
                probe = session.get(f"{upstream}{READY_PATH}", timeout=_TIMEOUT_S)
                if probe.status_code != 200:
                    return Response(probe.content, 503, {**added, "Retry-After": "1", "Content-Type": "application/json"})
                ready.add(name_alone)
            answer = session.request(
                request.method,
                f"{upstream}/{quote(path, safe=_PATH_SAFE)}",
                params=request.query_string,
                data=_chunks() if _has_body() else None,
                headers=headers,
                stream=True,
                timeout=_TIMEOUT_S,
                allow_redirects=False,
            )
        except requests.Timeout:
            return Response(f"function {name} did not answer in time\n", 504, added)
        except requests.RequestException:
            ready.discard(name_alone)
            return Response(f"function {name} cannot be reached\n", 502, added)
        # Raw: a body that the function compressed stays as it is, and a header that comes twice stays twice.
        passed = _end_to_end(answer.raw.headers.items(), answer.headers.get("Connection", ""), {key.lower() for key in added})
        body = answer.raw.stream(_CHUNK_BYTES, decode_content=False)
        return Response(body, answer.status_code, [*passed, *added.items()])

    return app


def _end_to_end(headers: Iterable[tuple[str, str]], connection: str, but: set[str]) -> list[tuple[str, str]]:
    """Return the headers that are passed on: not those of one connection, nor those it names, nor ``but``."""
    named = {name.strip().lower() for name in connection.split(",")}
    return [(key, value) for key, value in headers if key.lower() not in _HOP_BY_HOP | named | but]


def _has_body() -> bool:
    return bool(request.content_length) or "chunked" in request.headers.get("Transfer-Encoding", "")


def _chunks() -> Iterator[bytes]:
    while chunk := request.stream.read(_CHUNK_BYTES):
        yield chunk


class _Server(BaseApplication):  # type: ignore[misc]
    def load_config(self) -> None:
        self.cfg.set("bind", [os.environ["GATEWAY_BIND"]])
        self.cfg.set("worker_class", "gthread")
        self.cfg.set("threads", 16)
        self.cfg.set("keepalive", 75)
        self.cfg.set("timeout", 0)
        self.cfg.set("loglevel", "warning")
        if "control_socket_disable" in self.cfg.settings:
            self.cfg.set("control_socket_disable", True)

    def load(self) -> Any:
        return create_app(json.loads(os.environ["GATEWAY_UPSTREAMS"]))


if __name__ == "__main__":
    _Server().run()
