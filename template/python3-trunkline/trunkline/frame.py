"""What is around a handler: HTTP in, HTTP out, errors in their shape, logs. The same for OpenFaaS and for Knative; needs Flask.

``create_app`` makes the WSGI application; who serves it, and how it is stopped, is another's matter (``index.py`` of the
template, ``function/func.py`` of the one for Knative).
"""

from __future__ import annotations

import logging
import math
import os
import secrets
from collections.abc import Callable
from typing import Any

import flask
import numpy as np
from flask.json.provider import DefaultJSONProvider
from werkzeug.exceptions import HTTPException

import trunkline
from trunkline import context
from trunkline.errors import BodyTooLarge, InvalidInput, TrunklineError
from trunkline.logs import JsonFormatter

log = logging.getLogger("function")

METHODS = ["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"]
READY_PATH = "/_/trunkline/ready"
DEFAULT_MAX_BODY_BYTES = 16 * 1024 * 1024
_CHUNK_BYTES = 1024 * 1024
_DRAIN_FACTOR = 4
# Those below announce that an answer follows.
_LEAST_STATUS, _LARGEST_STATUS = 200, 599


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


def max_body_bytes() -> int:
    """Return how long a body may be, which the environment's ``max_body_bytes`` says."""
    return int(os.environ.get("max_body_bytes", DEFAULT_MAX_BODY_BYTES))


def create_app(handle: Callable[[Event, Context], Any], broken: tuple[type[Exception], ...] = (OSError,)) -> flask.Flask:
    """Return the WSGI application that serves ``handle``. ``broken`` is what its server raises where a body breaks off."""
    app = Frame(__name__, static_folder=None)
    limit_bytes = max_body_bytes()

    @app.before_request
    def take_call_id() -> None:
        call_id = flask.request.headers.get("X-Call-Id", "")[:128] or secrets.token_hex(16)
        flask.g.call_id = call_id
        context.call_id.set(call_id)
        context.traceparent.set(flask.request.headers.get("Traceparent", ""))

    @app.after_request
    def return_call_id(response: flask.Response) -> flask.Response:
        response.headers.setdefault("X-Call-Id", flask.g.get("call_id", ""))
        # What this thread logs of the next request before that has an id, such as that it cannot be read, is not of this one.
        response.call_on_close(lambda: context.call_id.set(""))
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
        response = _response_of(handle(Event(_read_body(limit_bytes, broken)), Context()))
        if not _LEAST_STATUS <= response.status_code <= _LARGEST_STATUS:
            # Servers have no way to send it, or whoever asks would wait for the answer proper.
            raise ValueError(f"the handler's status is {response.status!r}; it must be of {_LEAST_STATUS} to {_LARGEST_STATUS}")
        return response

    return app


def _read_body(limit_bytes: int, broken: tuple[type[Exception], ...]) -> bytes:
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
    except broken as error:
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
