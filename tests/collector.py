"""A collector of OpenTelemetry spans over HTTP, as small as a test needs it."""

from __future__ import annotations

import contextlib
import gzip
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.waiting import until

KINDS = {1: "internal", 2: "server"}


class Got(NamedTuple):
    """A span as it arrived; ids in hexadecimal."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    attributes: dict[str, Any]
    is_error: bool
    service: str


class Collector:
    """``spans`` are all that arrived. ``answer`` gives the status of the next request; it may hold it up."""

    def __init__(self) -> None:
        self.spans: list[Got] = []
        self.request_count = 0
        self.answer: Callable[[], int] = lambda: 200
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                collector.request_count += 1
                status = collector.answer() if self.path == "/v1/traces" else 404
                if status == 200:
                    collector.spans += decoded(body)
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", "0")
                    self.end_headers()

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def traces(self) -> dict[str, list[Got]]:
        """Return the spans that arrived, by their trace."""
        found: dict[str, list[Got]] = {}
        for span in list(self.spans):
            found.setdefault(span.trace_id, []).append(span)
        return found

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds, of what arrived."""
        until(holds)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def decoded(body: bytes) -> list[Got]:
    """Return the spans of a request's body."""
    request = ExportTraceServiceRequest.FromString(body)
    found = []
    for resource in request.resource_spans:
        service = {each.key: each.value.string_value for each in resource.resource.attributes}["service.name"]
        for scope in resource.scope_spans:
            for span in scope.spans:
                attributes = {each.key: getattr(each.value, str(each.value.WhichOneof("value"))) for each in span.attributes}
                ids = span.trace_id.hex(), span.span_id.hex(), span.parent_span_id.hex()
                times = span.start_time_unix_nano, span.end_time_unix_nano
                found.append(Got(span.name, KINDS[span.kind], *ids, *times, attributes, span.status.code == 2, service))
    return found


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """Collect while the block runs."""
    with contextlib.closing(Collector()) as made:
        yield made
