"""What a request over HTTP belongs to: the call of its X-Call-Id, and the trace of its traceparent.

Every request passes here first, so that each line that is logged while it is served has its call, and what it asks of the engine
is a part of its trace. An inference is a span of its own where it is traced; what it asks of the engine is within that.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from typing import Any, Final, NamedTuple

from trunkline import context
from trunkline.arguments import sendable, traced

from sidecar.failures import OPEN_INFERENCE
from sidecar.tracing import SERVER, Attribute, Place, Span, Tracer, new_id, traceparent_of

_INFERENCE: Final = re.compile(rf"{re.escape(OPEN_INFERENCE)}/models/[^/]+(/versions/[^/]+)?/infer")

_StartResponse = Callable[..., Any]
_App = Callable[[dict[str, Any], _StartResponse], Iterable[bytes]]


class _Served(NamedTuple):
    """An inference that was answered, with this status."""

    place: Place
    span_id: int
    started_s: float
    ended_s: float
    route: str
    call_id: str
    status: int

    @property
    def span_count(self) -> int:
        return 1

    def spans(self) -> list[Span]:
        attributes: dict[str, Attribute] = {
            "http.request.method": "POST",
            "http.route": self.route,
            "http.response.status_code": self.status,
        }
        if self.call_id:
            attributes["trunkline.call_id"] = self.call_id
        # Only what is the server's fault is an error of its span, say OpenTelemetry's conventions.
        error = str(self.status) if self.status >= 500 else ""
        name = f"POST {self.route}"
        return [Span(name, SERVER, self.place, self.span_id, self.started_s, self.ended_s, attributes, error)]


class Correlation:
    """WSGI middleware. Without a tracer nothing is a span."""

    def __init__(self, app: _App, tracer: Tracer | None = None) -> None:
        self._app = app
        self._tracer = tracer

    def __call__(self, environ: dict[str, Any], start_response: _StartResponse) -> Iterable[bytes]:
        call_id, parent = sendable(environ.get("HTTP_X_CALL_ID", "")), traced(environ.get("HTTP_TRACEPARENT", ""))
        # A thread serves one request after the other: what the last one left is replaced.
        context.call_id.set(call_id)
        context.traceparent.set(parent)
        found = _INFERENCE.fullmatch(environ.get("PATH_INFO", ""))
        if self._tracer is None or found is None or environ.get("REQUEST_METHOD") != "POST":
            return self._app(environ, start_response)
        place = self._tracer.begin(parent)
        if place is None:
            return self._app(environ, start_response)
        route = f"{OPEN_INFERENCE}/models/{{name}}{'/versions/{version}' if found[1] else ''}/infer"
        return self._served(environ, start_response, self._tracer, place, route, call_id)

    def _served(
        self,
        environ: dict[str, Any],
        start_response: _StartResponse,
        tracer: Tracer,
        place: Place,
        route: str,
        call_id: str,
    ) -> Iterable[bytes]:
        started_s, span_id, status = time.monotonic(), new_id(), 500
        context.traceparent.set(traceparent_of(place.trace_id, span_id))

        def starts(line: str, *rest: Any) -> Any:
            nonlocal status
            status = int(line[:3])
            return start_response(line, *rest)

        try:
            return self._app(environ, starts)
        finally:
            tracer.finish(_Served(place, span_id, started_s, time.monotonic(), route, call_id, status))
