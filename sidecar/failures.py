"""What a caller over HTTP is told of a failure: status, headers, and one JSON shape for each protocol. Nobody else says so.

The admin endpoint answers ``{"error": {code, message, retryable, details}}``. The Open Inference Protocol wants the message
alone under ``error``; the rest stands beside it. Neither has a path, an address or a trace.
"""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Mapping
from typing import Final, NamedTuple

from flask import Response, jsonify, request
from gunicorn.http.errors import ParseException
from trunkline.errors import ConnectionLost, InvalidInput, SidecarFault, SidecarUnavailable, TrunklineError
from werkzeug.exceptions import HTTPException, MethodNotAllowed

log = logging.getLogger("trunkline.admin")

# Where the Open Inference Protocol's routes begin.
OPEN_INFERENCE: Final = "/v2"
_CODES: Final = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


class Told(NamedTuple):
    """An answer that says what went wrong."""

    status: int
    headers: Mapping[str, str]
    body: Mapping[str, object]


def told(error: Exception, path: str) -> Told:
    """Return what is answered to a request for ``path`` that raised ``error``; what nobody foresaw is logged as an incident."""
    if isinstance(error, (SidecarUnavailable, ConnectionLost)):
        # The engine's client says where it looked, which is the log's business.
        log.warning("%s: %s", error.code, error.message)
        error = SidecarUnavailable("the engine does not answer; it may be starting, and its log tells when it cannot")
    if isinstance(error, HTTPException):
        status = error.code or 500
        plain: dict[str, object] = {
            "code": _CODES.get(status, "bad_request"),
            "message": error.name,
            "retryable": False,
            "details": {"status": status},
        }
        allowed = sorted(error.valid_methods or ()) if isinstance(error, MethodNotAllowed) else ()
        return Told(status, {"Allow": ", ".join(allowed)} if allowed else {}, _shaped(plain, path))
    if isinstance(error, ParseException):
        # A chunk of the body, say: gunicorn reads it when it is asked for.
        error = InvalidInput(f"the request's body cannot be read ({type(error).__name__}); send it with its length")
    if not isinstance(error, TrunklineError):
        incident = secrets.token_hex(4)
        log.error("incident %s", incident, exc_info=error)
        error = SidecarFault(f"the endpoint failed; its log has incident {incident}", incident=incident)
    headers = {}
    if error.http_status in (429, 503):
        headers["Retry-After"] = str(math.ceil(float(error.details.get("retry_after_s", 1))))
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Told(error.http_status, headers, _shaped(error.to_dict(), path))


def answered(error: Exception) -> Response:
    """Return ``told`` as Flask sends it: the handler of all errors of an application."""
    found = told(error, request.path)
    response = jsonify(found.body)
    response.headers.update(found.headers)
    response.status_code = found.status
    return response


def is_open_inference(path: str) -> bool:
    """Say whether a path is one of the Open Inference Protocol's."""
    return path == OPEN_INFERENCE or path.startswith(f"{OPEN_INFERENCE}/")


def _shaped(plain: dict[str, object], path: str) -> dict[str, object]:
    if is_open_inference(path):
        return {"error": plain.pop("message"), **plain}
    return {"error": plain}
