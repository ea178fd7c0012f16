"""Serves one handler over HTTP: the frame around ``function/handler.py``, for OpenFaaS and for Knative.

``python index.py`` starts gunicorn, behind OpenFaaS's of-watchdog or by itself. What a request needs is imported before the
workers are forked, so that they share its memory; connections to the sidecar are made after the fork, by each worker.
"""

from __future__ import annotations

import gc
import importlib
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before the large imports: they make hardly any garbage, and looking for it would take a tenth of the start. gunicorn.conf.py
# turns the collector on again.
gc.disable()
# A pool of BLAS threads in each function would cost memory for nothing; numpy reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import flask
import numpy as np
import trunkline
from flask.json.provider import DefaultJSONProvider
from gunicorn.app.base import Application
from gunicorn.arbiter import Arbiter
from gunicorn.http.errors import ParseException
from trunkline import context
from trunkline.errors import BodyTooLarge, InvalidInput, TrunklineError
from trunkline.logs import JsonFormatter
from werkzeug.exceptions import HTTPException

log = logging.getLogger("function")

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
READY_PATH = "/_/trunkline/ready"
DEFAULT_MAX_BODY_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_DRAIN_FACTOR = 4
# A request that the watchdog let in at the very end of its window needs a moment to arrive here.
_WINDOW_MARGIN_S = 0.5
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class Event:
    """The HTTP request: ``body`` (bytes, as sent), ``headers``, ``method``, ``query``, ``path``."""

    def __init__(self, body: bytes) -> None:
        self.body = body
        self.headers = flask.request.headers
        self.method = flask.request.method
        self.query = flask.request.args
        self.path = flask.request.path


class Context:
    """Where the function runs: ``hostname``."""

    def __init__(self) -> None:
        self.hostname = os.environ.get("HOSTNAME", "localhost")


class ArrayProvider(DefaultJSONProvider):
    """JSON as Flask writes it, with numpy's arrays and numbers as lists and numbers, and keys in the handler's order."""

    sort_keys = False

    @staticmethod
    def default(value: Any) -> Any:
        return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else DefaultJSONProvider.default(value)


class Frame(flask.Flask):
    json_provider_class = ArrayProvider


class CallIdFilter(logging.Filter):
    """Gives each log line the ``call_id`` of the request it belongs to."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.call_id = context.call_id.get() or "-"
        return True


def create_app(handle: Callable[[Event, Context], Any]) -> flask.Flask:
    """Return the WSGI application that serves ``handle``."""
    app = Frame(__name__, static_folder=None)
    max_body_bytes = int(os.environ.get("max_body_bytes", DEFAULT_MAX_BODY_BYTES))

    @app.before_request
    def take_call_id() -> None:
        call_id = flask.request.headers.get("X-Call-Id", "")[:128] or secrets.token_hex(16)
        flask.g.call_id = call_id
        context.call_id.set(call_id)
        context.traceparent.set(flask.request.headers.get("Traceparent", ""))

    @app.after_request
    def return_call_id(response: flask.Response) -> flask.Response:
        response.headers.setdefault("X-Call-Id", flask.g.get("call_id", ""))
        return response

    @app.errorhandler(TrunklineError)
    def refuse(error: TrunklineError) -> flask.Response:
        log.warning("%s: %s", error.code, error.message)
        return _error_response(error.to_dict(), error.http_status)

    @app.errorhandler(Exception)
    def fail(error: Exception) -> flask.Response | HTTPException:
        if isinstance(error, HTTPException):
            return error
        incident = secrets.token_hex(4)
        log.exception("incident %s", incident)
        plain = {
            "code": "handler_failed",
            "message": f"the handler raised; the function's log has incident {incident}",
            "retryable": False,
            "details": {"incident": incident},
        }
        return _error_response(plain, 500)

    @app.get(READY_PATH)
    def ready() -> flask.Response:
        """Answer 200 only when the sidecar is there and holds every model the handler has named."""
        try:
            trunkline.ready()
        except TrunklineError as error:
            # Always 503: what is missing is never the fault of whoever asks, and may be there the next time.
            log.debug("not ready: %s", error.message)
            return _error_response(error.to_dict(), 503)
        return flask.Response("ready\n", mimetype="text/plain")

    @app.route("/", defaults={"path": ""}, methods=METHODS)
    @app.route("/<path:path>", methods=METHODS)
    def call(path: str) -> flask.Response:
        return _response_of(handle(Event(_read_body(max_body_bytes)), Context()))

    return app


def _read_body(limit_bytes: int) -> bytes:
    """Return the body; it usually comes in chunks of unknown total length, so it is counted while it is read."""
    stream = flask.request.stream
    chunks, left_bytes = [], limit_bytes
    try:
        while left_bytes >= 0 and (chunk := stream.read(min(_CHUNK_BYTES, left_bytes + 1))):
            chunks.append(chunk)
            left_bytes -= len(chunk)
        if left_bytes >= 0:
            # One chunk alone is returned as it is, without a copy.
            return b"".join(chunks)
        chunks.clear()
        # Whoever is still sending would take an answer for a broken connection, so some more is read and forgotten.
        drain_bytes = _DRAIN_FACTOR * limit_bytes
        while drain_bytes > 0 and (chunk := stream.read(_CHUNK_BYTES)):
            drain_bytes -= len(chunk)
    except (OSError, ParseException) as error:
        raise InvalidInput("the body broke off, or its chunks are not what HTTP calls chunks") from error
    raise BodyTooLarge(
        f"the body is longer than the {limit_bytes} bytes this function takes; set max_body_bytes to change that",
        limit_bytes=limit_bytes,
    )


def _response_of(answer: Any) -> flask.Response:
    """Return what a handler gave as a response: ``{"statusCode", "body", "headers"}``, or anything Flask takes."""
    if not isinstance(answer, dict) or not answer.keys() & {"statusCode", "body"}:
        return flask.make_response("" if answer is None else answer)
    body = answer.get("body", b"")
    is_plain = isinstance(body, (bytes, bytearray, str))
    if body is None:
        body, is_plain = b"", True
    response = flask.Response(
        bytes(body) if isinstance(body, bytearray) else body if is_plain else flask.json.dumps(body),
        status=answer.get("statusCode", 200),
        mimetype="text/plain" if isinstance(body, str) else None if is_plain else "application/json",
    )
    for name, value in dict(answer.get("headers") or {}).items():
        response.headers[name] = str(value)
    return response


def _error_response(plain: dict[str, Any], status: int) -> flask.Response:
    response = flask.jsonify(error=plain)
    response.status_code = status
    if status in (429, 503):
        # Whole seconds, which is all that the header knows.
        response.headers["Retry-After"] = str(math.ceil(plain["details"].get("retry_after_s", 1)))
    return response


def duration_s(text: str) -> float:
    """Return the seconds of a Go duration such as ``1m30s`` or ``500ms``; a bare number is seconds."""
    if text.replace(".", "", 1).isdigit():
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration such as 10s or 1m30s")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


class LingeringArbiter(Arbiter):
    """Goes on serving for a while after SIGTERM.

    of-watchdog passes SIGTERM on at once but admits requests for another ``healthcheck_interval``, until the gateway
    has noticed. A server that stopped at the signal would lose those.
    """

    def __init__(self, app: Any) -> None:
        self._window_s = duration_s(os.environ.get("healthcheck_interval", os.environ.get("write_timeout", "30s")))
        self._stop_at_s: float | None = None
        super().__init__(app)

    def handle_term(self) -> None:
        # The signal may come twice, from the watchdog and to the whole container; SIGINT and SIGQUIT stop at once.
        if self._stop_at_s is None:
            margin_s = _WINDOW_MARGIN_S if self._window_s else 0.0
            self._stop_at_s = time.monotonic() + self._window_s + margin_s

    def wait_for_signals(self, timeout: float = 1.0) -> Any:
        if self._stop_at_s is None:
            return super().wait_for_signals(timeout)
        left_s = self._stop_at_s - time.monotonic()
        if left_s <= 0:
            raise StopIteration
        return super().wait_for_signals(min(timeout, left_s))


class FunctionServer(Application):
    """gunicorn with ``gunicorn.conf.py`` and the handler of this folder."""

    def init(self, parser: Any, options: Any, arguments: Any) -> None:
        """Take no command line."""

    def load_config(self) -> None:
        self.load_config_from_file(str(Path(__file__).with_name("gunicorn.conf.py")))

    def load(self) -> flask.Flask:
        handler = importlib.import_module("function.handler")
        return create_app(handler.handle)

    def run(self) -> None:
        LingeringArbiter(self).run()


def log_to_stderr() -> None:
    """Write log lines, the handler's own included, with the id of the call they belong to."""
    handler = logging.StreamHandler()
    if log_format() == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.addFilter(CallIdFilter())
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s %(message)s call=%(call_id)s"))
    logging.basicConfig(level=os.environ.get("log_level", "info").upper(), handlers=[handler])


def log_format() -> str:
    """Return ``human`` or ``json``, which the environment's ``log_format`` says. Raises ValueError."""
    found = os.environ.get("log_format") or "human"
    if found not in ("human", "json"):
        raise ValueError(f"log_format is {found[:40]!r}; it must be human or json")
    return found


if __name__ == "__main__":
    log_to_stderr()
    FunctionServer().run()
