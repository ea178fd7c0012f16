"""Spans in OpenTelemetry's terms: what its environment variables ask for, done by its SDK and its OTLP exporter over HTTP.

Imported only where traces are asked for: the packages are the extra ``otel``. Endpoint, headers, timeout, compression and
certificates are the exporter's business (``OTEL_EXPORTER_OTLP_*``), the sampler (``OTEL_TRACES_SAMPLER``), service name and
attributes of the resource the SDK's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from sidecar.errors import ConfigError
from sidecar.tracing import SERVER, Samples, Span, Tracer

_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)
_NOT_SAMPLED: Final = TraceFlags(TraceFlags.DEFAULT)
_SCOPE: Final = InstrumentationScope("trunkline")
_KINDS: Final = {SERVER: SpanKind.SERVER}


def open_tracer() -> Tracer:
    """Return what traces by the environment of this process. It may be made before a fork. Raises ConfigError."""
    # The SDK's own way to the sampler of the environment.
    sampler = TracerProvider(shutdown_on_exit=False).sampler
    exporter = OTLPSpanExporter()
    resource = _resource()
    return Tracer(
        samples_of(sampler),
        lambda spans: exported(exporter, resource, spans),
        exporter.shutdown,
        limit=_number("OTEL_BSP_MAX_QUEUE_SIZE", 2048),
        batch=_number("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", 512),
        delay_s=_number("OTEL_BSP_SCHEDULE_DELAY", 5000) / 1000,
    )


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= 10_000_000):
        raise ConfigError(f"{name} is {text[:80]!r}; it must be an integer from 1 to 10000000", key=name)
    return int(text)


def _resource() -> Resource:
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "trunkline"}))
    return resource


def samples_of(sampler: Sampler) -> Samples:
    """Return what says by a sampler whether a trace is recorded."""
    follows = isinstance(sampler, ParentBased)

    def samples(trace_id: int, parent_id: int, is_sampled: bool) -> bool:
        if parent_id and follows:
            # The SDK would say the same, by way of a context.
            return is_sampled
        parent = None
        if parent_id:
            flags = _SAMPLED if is_sampled else _NOT_SAMPLED
            parent = set_span_in_context(NonRecordingSpan(SpanContext(trace_id, parent_id, True, flags)))
        return sampler.should_sample(parent, trace_id, "infer", SpanKind.SERVER).decision is Decision.RECORD_AND_SAMPLE

    return samples


def exported(exporter: SpanExporter, resource: Resource, spans: Sequence[Span]) -> bool:
    """Send spans; return whether they arrived."""
    # One offset for all: parts stay within what they are parts of, whatever is done to the clock meanwhile.
    offset_ns = time.time_ns() - time.monotonic_ns()
    return exporter.export([_readable(span, resource, offset_ns) for span in spans]) is SpanExportResult.SUCCESS


def _readable(span: Span, resource: Resource, offset_ns: int) -> ReadableSpan:
    trace_id, parent_id = span.place
    error = {"error.type": span.error} if span.error else {}
    return ReadableSpan(
        span.name,
        SpanContext(trace_id, span.span_id, False, _SAMPLED),
        # Whose process the parent is from, nobody asks; that it was sampled, is known.
        SpanContext(trace_id, parent_id, span.kind == SERVER, _SAMPLED) if parent_id else None,
        resource,
        {**span.attributes, **error},
        kind=_KINDS.get(span.kind, SpanKind.INTERNAL),
        status=Status(StatusCode.ERROR, span.error) if span.error else Status(),
        start_time=round(span.start_s * 1e9) + offset_ns,
        end_time=round(span.end_s * 1e9) + offset_ns,
        instrumentation_scope=_SCOPE,
    )
