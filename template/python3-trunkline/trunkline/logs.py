"""Log lines for programs: one JSON object each, of functions and of the sidecar alike."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from trunkline import context, protocol


class JsonFormatter(logging.Formatter):
    """Writes a record as one line of ASCII: ``time`` (RFC 3339), ``level``, ``logger``, ``message``, and what is known besides.

    That is ``call_id``, ``trace_id``, ``model``, ``tenant`` and ``exception`` (its trace, as text). They come with the record
    (``extra``); call and trace otherwise with the HTTP request being served.
    """

    def format(self, record: logging.LogRecord) -> str:
        plain = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "call_id": getattr(record, "call_id", "") or context.call_id.get(),
            "trace_id": getattr(record, "trace_id", "") or _trace_id(context.traceparent.get()),
            "model": getattr(record, "model", ""),
            "tenant": getattr(record, "tenant", ""),
            "exception": self._exception(record),
        }
        known = {key: value for key, value in plain.items() if value or key == "message"}
        # What a stranger put into a text stays inside its line: all that is not printable ASCII is escaped.
        return json.dumps(known, default=str).replace("\x7f", "\\u007f")

    def _exception(self, record: logging.LogRecord) -> str:
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        return record.exc_text or ""


def _trace_id(traceparent: str) -> str:
    return traceparent[3:35] if protocol.TRACEPARENT.fullmatch(traceparent) else ""


def adopt(logger: logging.Logger) -> None:
    """Have the lines of a logger that writes by itself, as gunicorn's does, go the way of all others."""
    logger.handlers.clear()
    logger.propagate = True
