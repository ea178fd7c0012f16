"""What belongs to the HTTP request being served, so that handlers need not pass it along."""

from __future__ import annotations

from contextvars import ContextVar

# The X-Call-Id of the request; it is put into the sidecar's log beside the call.
call_id: ContextVar[str] = ContextVar("call_id", default="")

# Its W3C traceparent, as it came: spans of the sidecar belong to that trace. What is none is not sent.
traceparent: ContextVar[str] = ContextVar("traceparent", default="")
