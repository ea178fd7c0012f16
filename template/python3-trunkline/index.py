"""Serves one handler over HTTP with gunicorn: ``function/handler.py`` in the frame of ``trunkline.frame``.

``python index.py`` starts gunicorn, behind OpenFaaS's of-watchdog or by itself. What a request needs is imported before the
workers are forked, so that they share its memory; connections to the sidecar are made after the fork, by each worker.
"""

from __future__ import annotations

import gc
import importlib
import math
import os
import re
import time
from pathlib import Path
from typing import Any

# Before the large imports: they make hardly any garbage, and looking for it would take a tenth of the start. gunicorn.conf.py
# turns the collector on again.
gc.disable()
# A pool of BLAS threads in each function would cost memory for nothing; numpy reads this when it is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import flask
from gunicorn.app.base import Application
from gunicorn.arbiter import Arbiter
from gunicorn.http.errors import ParseException
from trunkline import frame

# A request that the watchdog let in at the very end of its window needs a moment to arrive here.
_WINDOW_MARGIN_S = 0.5
# What the watchdog takes for a duration that it is not given, or cannot read.
_WATCHDOG_S = 30.0
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration_s(text: str) -> float:
    """Return the seconds of a Go duration such as ``1m30s`` or ``500ms``; a bare number is seconds."""
    if text.replace(".", "", 1).isdigit():
        return float(text)
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text!r} is no duration such as 10s or 1m30s")
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


def _watchdog_s(name: str) -> float:
    """Return how long the watchdog waits by one of its variables, and 30 s at least."""
    try:
        return max(_WATCHDOG_S, duration_s(os.environ.get(name, "")))
    except ValueError:
        return _WATCHDOG_S


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
        # After the window the watchdog waits for what is under way, and what it waits for must not be ended here.
        self.cfg.set("graceful_timeout", math.ceil(max(_watchdog_s("exec_timeout"), _watchdog_s("write_timeout"))))

    def load(self) -> flask.Flask:
        handler = importlib.import_module("function.handler")
        return frame.create_app(handler.handle, (OSError, ParseException))

    def run(self) -> None:
        LingeringArbiter(self).run()


if __name__ == "__main__":
    frame.log_to_stderr()
    FunctionServer().run()
