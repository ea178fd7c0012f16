"""Log lines that strangers cannot forge or flood: what a function sends appears in them. Those of a request have its call id."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable

from trunkline import context
from trunkline.logs import JsonFormatter

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class OneLineFormatter(logging.Formatter):
    """Writes every message on one line, control characters spelt out; only traces of exceptions have lines of their own.

    The call that is being served over HTTP stands at the end of its lines; messages about the engine's have it.
    """

    def formatMessage(self, record: logging.LogRecord) -> str:
        if not hasattr(record, "call_id") and (call_id := context.call_id.get()):
            record.message += f" call={call_id}"
        record.message = _CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", record.message)
        return super().formatMessage(record)


class RateLimit(logging.Filter):
    """Lets so many records a second through, and has the next one say how many were left out."""

    def __init__(self, per_second: int, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._per_second = per_second
        self._clock = clock
        self._second = -1
        self._count = 0
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        second = int(self._clock())
        if second != self._second:
            self._second, self._count = second, 0
        self._count += 1
        if self._count > self._per_second:
            self._left_out += 1
            return False
        if self._left_out:
            record.msg = f"{record.msg} (and {self._left_out} lines like this one left out)"
            self._left_out = 0
        return True


def log_to_stderr(level: str, form: str = "human") -> None:
    """Send the log of this process, and of those it forks, to standard error; ``form`` is ``human`` or ``json``."""
    handler = logging.StreamHandler(sys.stderr)
    human = OneLineFormatter("%(asctime)s %(name)s %(levelname)s %(message)s")
    handler.setFormatter(JsonFormatter() if form == "json" else human)
    logging.basicConfig(level=level.upper(), handlers=[handler])
