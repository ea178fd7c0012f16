"""The log: one line a message, and not too many of them."""

from __future__ import annotations

import logging

from sidecar.logs import OneLineFormatter, RateLimit


def record(message: str) -> logging.LogRecord:
    return logging.LogRecord("trunkline", logging.INFO, "", 0, "%s", (message,), None)


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
