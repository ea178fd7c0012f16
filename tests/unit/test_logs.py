"""The log: one line a message, for people or for programs, with the call it belongs to, and not too many of them."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from trunkline import context
from trunkline.logs import JsonFormatter, adopt

from sidecar.logs import OneLineFormatter, RateLimit
from tests.waiting import PATIENCE_S

PARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


def record(message: str, **extra: str) -> logging.LogRecord:
    made = logging.LogRecord("trunkline", logging.INFO, "", 0, "%s", (message,), None)
    vars(made).update(extra)
    return made


@pytest.fixture
def serving() -> Iterator[None]:
    """While a request over HTTP is served."""
    tokens = context.call_id.set("call-8"), context.traceparent.set(PARENT)
    yield
    context.call_id.reset(tokens[0])
    context.traceparent.reset(tokens[1])


def written(made: logging.LogRecord) -> dict[str, Any]:
    line = JsonFormatter().format(made)
    assert line.isascii()
    assert line.isprintable(), line
    found: dict[str, Any] = json.loads(line)
    return found


def test_a_call_id_cannot_forge_a_line() -> None:
    written = OneLineFormatter("%(levelname)s %(message)s").format(record("x\nERROR forged \x1b[2J\u2028 \u00e9"))
    assert written == "INFO x\\x0aERROR forged \\x1b[2J\\x2028 \u00e9"


def test_traces_keep_their_lines() -> None:
    try:
        raise ValueError("inside")
    except ValueError as error:
        traced = logging.LogRecord("t", logging.ERROR, "", 0, "outside", (), (ValueError, error, error.__traceback__))
    assert OneLineFormatter("%(message)s").format(traced).splitlines()[-1] == "ValueError: inside"


def test_a_flood_is_cut_and_counted() -> None:
    now = 0.0
    limit = RateLimit(2, clock=lambda: now)
    assert [limit.filter(record("x")) for _ in range(5)] == [True, True, False, False, False]
    now = 1.5
    first, second = record("x"), record("y")
    assert limit.filter(first)
    assert limit.filter(second)
    assert first.getMessage() == "x (and 3 lines like this one left out)"
    assert second.getMessage() == "y"


def test_a_line_for_programs_has_what_is_known_and_nothing_else() -> None:
    made = record("x")
    found = written(made)
    assert list(found) == ["time", "level", "logger", "message"]
    assert (found["level"], found["logger"], found["message"]) == ("info", "trunkline", "x")
    assert found["time"].endswith("Z")
    assert datetime.fromisoformat(found["time"]).timestamp() == pytest.approx(made.created, abs=0.002)
    told = {"call_id": "c", "model": "m", "tenant": "t", "trace_id": "5"}
    assert {key: written(record("x", **told))[key] for key in told} == told
    assert written(record(""))["message"] == ""


def test_what_strangers_put_into_a_line_for_programs_stays_in_it() -> None:
    forged = "x\n{}\x1b[2J\x7f\x85\u2028\ud800 \u00e9"
    assert written(record(forged, call_id=forged, model=forged))["message"] == forged


def test_a_trace_in_a_line_for_programs_is_text() -> None:
    try:
        raise ValueError("inside\nout")
    except ValueError as error:
        made = logging.LogRecord("t", logging.ERROR, "", 0, "outside", (), (ValueError, error, error.__traceback__))
    found = written(made)
    assert found["exception"].startswith("Traceback")
    assert found["exception"].endswith("ValueError: inside\nout")


@pytest.mark.usefixtures("serving")
def test_a_line_has_the_call_that_is_being_served() -> None:
    human = OneLineFormatter("%(message)s")
    assert human.format(record("x")) == "x call=call-8"
    assert (written(record("x"))["call_id"], written(record("x"))["trace_id"]) == ("call-8", PARENT[3:35])
    # But the engine's lines are of calls of their own.
    assert human.format(record("y (call call-9)", call_id="call-9")) == "y (call call-9)"
    assert written(record("y", call_id="call-9"))["call_id"] == "call-9"
    context.traceparent.set("nonsense")
    assert "trace_id" not in written(record("x"))


def test_a_call_that_is_being_served_cannot_forge_a_line_either() -> None:
    token = context.call_id.set("x\nERROR forged")
    assert OneLineFormatter("%(message)s").format(record("y")) == "y call=x\\x0aERROR forged"
    context.call_id.reset(token)


def test_a_logger_that_writes_by_itself_is_made_to_write_as_others_do() -> None:
    own = logging.getLogger("tests.adopted")
    stream = io.StringIO()
    own.addHandler(logging.StreamHandler(stream))
    own.propagate = False
    adopt(own)
    own.warning("once")
    assert stream.getvalue() == ""
    assert own.propagate


@pytest.mark.parametrize(("form", "start"), [("human", "20"), ("json", '{"time"')])
def test_the_form_is_chosen_once_for_the_process(form: str, start: str) -> None:
    code = f"from sidecar.logs import log_to_stderr; log_to_stderr('info', {form!r}); import logging; logging.info('told')"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=PATIENCE_S).stderr
    assert lines.startswith(start)
    assert "told" in lines
