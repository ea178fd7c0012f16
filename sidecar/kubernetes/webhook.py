"""The mutating webhook: AdmissionReviews over HTTPS, answered by gunicorn in processes of their own.

It knows nothing of any sidecar and keeps nothing, so any number of replicas may run. While it is away pods are made as they
are (``failurePolicy: Ignore``), and would lack the socket for their whole life: so it goes on for some seconds after SIGTERM,
until the API server asks elsewhere. Must not import torch.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from flask import Flask, Response, jsonify, request
from gunicorn.app.base import BaseApplication
from werkzeug.exceptions import BadRequest, RequestEntityTooLarge, UnsupportedMediaType

from sidecar import failures
from sidecar.errors import ConfigError
from sidecar.http.worker import ImpatientTLS, ImpatientWorker, configure
from sidecar.kubernetes.certificates import Certificate
from sidecar.kubernetes.injection import Injection
from sidecar.kubernetes.review import LIMIT_BYTES, BadReview, answer

log = logging.getLogger("trunkline.kubernetes")

_WORKERS: Final = 2
_THREADS: Final = 32
_BACKLOG: Final = 128
# A review takes about a millisecond; those that have been read are answered.
_GRACEFUL_S: Final = 5


def create_app(injection: Injection) -> Flask:
    """Return the webhook's WSGI application."""
    app = Flask("trunkline-webhook", static_folder=None)
    # Of a body that comes in chunks no more is read, and nothing is said of the rest.
    app.config["MAX_CONTENT_LENGTH"] = LIMIT_BYTES + 1
    app.register_error_handler(Exception, failures.answered)

    @app.get("/healthz")
    def healthz() -> Response:
        """Say that reviews are answered."""
        return jsonify(status="ok")

    @app.post("/mutate")
    def mutate() -> Response:
        """Answer an AdmissionReview."""
        if request.mimetype != "application/json":
            raise UnsupportedMediaType
        if len(body := request.get_data(cache=False)) > LIMIT_BYTES:
            raise RequestEntityTooLarge
        try:
            return jsonify(answer(body, injection))
        except BadReview as error:
            log.warning("a review cannot be answered: %s", error)
            raise BadRequest from error

    return app


def listen(host: str, port: int) -> socket.socket:
    """Return a TCP socket; an empty ``host`` is every address there is. Raises ConfigError."""
    dual = not host and socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual or ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
    except OSError as error:
        raise ConfigError(
            f"the webhook cannot listen on {host or 'any address'} port {port} ({os.strerror(error.errno or 0)}); choose another "
            "--host or --port",
            port=port,
        ) from error


class _Worker(ImpatientWorker):
    """Waits less for a header: anybody in the cluster can connect, and the API server waits for a review for seconds only."""

    header_s = 2.0


class WebhookServer(BaseApplication):  # type: ignore[misc]
    """gunicorn with the settings given here instead of a command line. ``run`` serves until SIGTERM, and exits."""

    def __init__(
        self,
        injection: Injection,
        listener: socket.socket,
        certificate: Path,
        key: Path,
        *,
        linger_s: float,
    ) -> None:
        """Serve on ``listener``, which it takes over, for ``linger_s`` seconds more after SIGTERM.

        Raises ConfigError for a certificate or key that cannot be used.
        """
        # Made before workers are forked: one that cannot be used is told to whoever starts the webhook.
        self._certificate = Certificate(certificate, key, ImpatientTLS)
        self._injection = injection
        # gunicorn takes the descriptor over.
        self._port = listener.getsockname()[1]
        self._descriptor = listener.detach()
        self._files = (certificate, key)
        self._linger_s = linger_s
        super().__init__()

    def load_config(self) -> None:
        chosen: dict[str, Any] = {
            "bind": [f"fd://{self._descriptor}"],
            "worker_class": _Worker,
            "workers": _WORKERS,
            "threads": _THREADS,
            "graceful_timeout": _GRACEFUL_S,
            # A connection that is closed while the API server sends the next review over it would cost that review.
            "keepalive": 0,
            "proc_name": "trunkline-webhook",
            "certfile": str(self._files[0]),
            "keyfile": str(self._files[1]),
            "ssl_context": self._context,
            "when_ready": self._linger,
        }
        configure(self.cfg, chosen)

    def _context(self, cfg: object, default: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        return self._certificate.context()

    def _linger(self, arbiter: Any) -> None:
        """Have the first SIGTERM take effect after a while; further ones change nothing. Called when it listens."""
        log.info("pods are reviewed at port %d", self._port)
        if not self._linger_s:
            return

        def later(number: int, frame: object) -> None:
            if not signal.getitimer(signal.ITIMER_REAL)[0]:
                signal.setitimer(signal.ITIMER_REAL, self._linger_s)

        signal.signal(signal.SIGTERM, later)
        signal.signal(signal.SIGALRM, lambda number, frame: arbiter.signal(signal.SIGTERM, frame))

    def load(self) -> Flask:
        return create_app(self._injection)
