"""A gateway for one machine: `/function/<name>` as OpenFaaS serves it, so that clients cannot tell the difference.

Like OpenFaaS's own, it sends bodies on in chunks, adds X-Call-Id where there is none, and answers 404 for a function it does
not know and 502 for one that does not answer. It is for trying things out, not for the network: it listens on loopback.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import requests
from flask import Flask, Response, jsonify, request
from gunicorn.app.base import BaseApplication

METHODS: Final = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
# Those that speak of one connection, not of the message (RFC 9110, section 7.6.1), and the length, which chunks replace.
_HOP_BY_HOP: Final = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
}
_CHUNK_BYTES: Final = 64 * 1024
_TIMEOUT_S: Final = (2.0, 60.0)


def create_app(upstreams: Mapping[str, str]) -> Flask:
    """Return the gateway for functions at the given base URLs."""
    app = Flask(__name__, static_folder=None)
    # /function/classify and /function/classify/ are one function.
    app.url_map.strict_slashes = False
    session = requests.Session()
    session.trust_env = False
    adapter = requests.adapters.HTTPAdapter(pool_maxsize=64)
    session.mount("http://", adapter)

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
        upstream = upstreams.get(name.partition(".")[0])
        if upstream is None:
            return Response(f"error finding function {name}.openfaas-fn: not found\n", 404)
        started_ns = time.time_ns()
        call_id = request.headers.get("X-Call-Id") or secrets.token_hex(16)
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP}
        headers |= {"X-Call-Id": call_id, "X-Start-Time": str(started_ns), "X-Forwarded-Host": request.host}
        try:
            answer = session.request(
                request.method,
                f"{upstream}/{path}",
                params=request.query_string,
                data=_chunks() if _has_body() else None,
                headers=headers,
                stream=True,
                timeout=_TIMEOUT_S,
                allow_redirects=False,
            )
        except requests.Timeout:
            return Response(f"function {name} did not answer in time\n", 504, {"X-Call-Id": call_id})
        except requests.RequestException:
            return Response(f"function {name} cannot be reached\n", 502, {"X-Call-Id": call_id})
        passed = {key: value for key, value in answer.headers.items() if key.lower() not in _HOP_BY_HOP}
        passed |= {"X-Call-Id": call_id, "X-Start-Time": str(started_ns)}
        # Raw: a body that the function compressed stays as it is.
        return Response(answer.raw.stream(_CHUNK_BYTES, decode_content=False), answer.status_code, passed)

    return app


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
