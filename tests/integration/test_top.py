"""`trunkline top`: what it prints and draws, and that it outlives the engine. A sidecar is a table of answers here."""

from __future__ import annotations

import json
import os
import pty
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import Result
from rich.console import Console
from trunkline.errors import MalformedFrame, SidecarUnavailable, Unauthorized

from sidecar.cli import top
from sidecar.cli.measures import Scrape, frame
from tests.integration.test_cli import Answers, run
from tests.unit.test_measures import told

AWAY = "trunkline_up 0\n"
NOBODY = SidecarUnavailable("no sidecar answers at x")


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Take no time between two looks; return how long was to be waited."""
    found: list[float] = []
    monkeypatch.setattr("sidecar.cli.top.time.sleep", found.append)
    return found


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> Answers:
    return Answers(monkeypatch)


def looks(answers: Answers, *found: Any, words: tuple[str, ...] = ()) -> Result:
    answers.table["/metrics"] = list(found)
    return run("top", *words)


def test_one_look_is_printed_where_nobody_watches(answers: Answers, slept: list[float]) -> None:
    result = looks(answers, told(10, answered=100, slow=20, failed=5))
    assert result.exit_code == 0
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert lines[0] == "serving on cpu, engine 1 up 10 s; rates and times since then"
    assert lines[1] == "12.0 requests/s, 0.5 failed/s, 3 waiting, 0 running, 3 connections, 400 B saved by sharing"
    assert lines[2] == f"device [{'#' * 8}{'.' * 22}] 1.0 kB of 4.0 kB"
    assert "m resident 12.0 6.0 ms 946.0 ms 0.5 3 6 % 1.0 kB 400 B" in lines
    assert (slept, answers.closed) == ([], 1)


def test_json_is_one_object_per_look(answers: Answers, slept: list[float]) -> None:
    words = ("--json", "--count", "2", "--interval", "0.5")
    result = looks(answers, told(10, answered=100), told(12, answered=104), words=words)
    first, second = map(json.loads, result.stdout.splitlines())
    assert first == frame(Scrape(told(10, answered=100)))
    assert (second["interval_s"], second["rate"]) == (2.0, 2.0)
    assert (result.stderr, slept) == ("", [0.5])


def test_rates_are_those_of_the_last_ten_seconds(answers: Answers) -> None:
    found = [told(10 + 4 * step, answered=100 * step) for step in range(6)]
    result = looks(answers, *found, words=("--json", "--count", "6"))
    assert [json.loads(line)["interval_s"] for line in result.stdout.splitlines()] == [10.0, 4.0, 8.0, 8.0, 8.0, 8.0]


def test_a_longer_interval_is_the_window(answers: Answers) -> None:
    found = [told(10 + 60 * step) for step in range(3)]
    result = looks(answers, *found, words=("--json", "--count", "3"))
    assert [json.loads(line)["interval_s"] for line in result.stdout.splitlines()] == [10.0, 60.0, 60.0]


def test_an_engine_that_goes_and_comes_back_is_followed(answers: Answers) -> None:
    found = [told(100, answered=900), AWAY, NOBODY, told(1, generation=2, answered=5), told(3, generation=2, answered=9)]
    result = looks(answers, *found, words=("--json", "--count", "5"))
    states = [json.loads(line) for line in result.stdout.splitlines()]
    assert [each["state"] for each in states] == ["serving", "away", "away", "serving", "serving"]
    assert states[1]["message"].startswith("the engine does not answer")
    assert states[2]["message"] == "no sidecar answers at x"
    assert (states[3]["rate"], states[4]["rate"]) == (5.0, 2.0)
    assert result.exit_code == 0


def test_who_is_away_at_the_end_is_not_reached(answers: Answers) -> None:
    result = looks(answers, NOBODY, AWAY, words=("--count", "2"))
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr.splitlines() == [
        "away: no sidecar answers at x; trying again",
        "error: sidecar_unavailable: the engine does not answer; it may be starting, and its log tells when it cannot",
    ]


@pytest.mark.parametrize(("error", "code"), [(Unauthorized("a token is needed"), 1), (MalformedFrame("strange"), 1)])
def test_what_will_not_pass_ends_it(answers: Answers, error: Exception, code: int) -> None:
    result = looks(answers, error, words=("--count", "0"))
    assert (result.exit_code, result.stdout) == (code, "")


def test_interrupted_it_has_done_what_it_should(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sidecar.cli.top.time.sleep", interrupted)
    result = looks(answers, told(10), words=("--count", "0", "--json"))
    assert (result.exit_code, len(result.stdout.splitlines())) == (0, 1)


def several() -> dict[str, Any]:
    """Return a look at two models, each first in an order of its own, and two tenants."""
    found = frame(Scrape(told(10, answered=100)))
    (model,) = found["models"]
    found["models"] = [
        model | {"name": "quick", "rate": 9.0, "p99_s": None, "device_share": 0.1, "bytes": 1},
        model | {"name": "large", "rate": 1.0, "p99_s": 2.0, "device_share": 0.5, "bytes": 9, "pinned": True},
    ]
    tenant = {"waiting": 1, "running": 0}
    found["tenants"] = [tenant | {"name": name, "device_share": share} for name, share in (("a", 0.1), ("b", 0.6))]
    return found


@pytest.mark.parametrize(
    ("order", "first"), [("rate", "quick"), ("p99", "large"), ("share", "large"), ("bytes", "large"), ("name", "large")]
)
def test_models_come_in_the_order_that_is_asked_for(order: str, first: str) -> None:
    assert min(several()["models"], key=top._ORDERS[order])["name"] == first


def shown(found: dict[str, Any], last: dict[str, Any] | None = None, width: int = 120, height: int = 40) -> list[str]:
    screen = Console(width=width, height=height)
    with screen.capture() as captured:
        screen.print(top.drawn(found, last, screen))
    return [" ".join(line.split()) for line in captured.get().splitlines()]


def test_several_tenants_are_told_the_busiest_first() -> None:
    lines = shown(several())
    assert lines[4] == "tenant b: 60 % of the device, 1 waiting, 0 running"
    assert lines[5].startswith("tenant a: 10 %")
    assert "large resident, pinned 1.0 5.0 ms 2000.0 ms 0.0 3 50 % 9 B 400 B" in lines


def test_what_was_there_stays_while_nobody_answers() -> None:
    away = {"state": "away", "message": "no sidecar answers at x"}
    lines = shown(away, several())
    assert lines[0] == "away: no sidecar answers at x; trying again"
    assert any(line.startswith("large ") for line in lines)
    assert shown(away) == ["away: no sidecar answers at x; trying again"]


@pytest.mark.parametrize(("width", "headings"), [(120, 10), (80, 7), (60, 5), (40, 3), (10, 3)])
def test_a_narrow_terminal_has_fewer_columns(width: int, headings: int) -> None:
    found = several()
    screen = Console(width=width)
    table = top._models(found["models"], screen)
    assert len(table.columns) == headings
    assert all(len(line) <= width for line in shown(found, width=width))


def test_a_low_terminal_has_fewer_models() -> None:
    found = several()
    found["models"] = [found["models"][0] | {"name": f"m{number}"} for number in range(50)]
    lines = shown(found, height=20)
    assert len(lines) <= 20
    assert lines[-1] == f"and {50 - sum(line.startswith('m') and line != 'model' for line in lines) + 1} more models"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Make standard input a terminal; return the descriptor of who types."""
    typing, typed = pty.openpty()
    with os.fdopen(typed, "r") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield typing
    os.close(typing)


@pytest.mark.parametrize(("keys", "is_over"), [(b"q", True), (b"xQ", True), (b"x", False)])
def test_q_ends_it_at_once(terminal: int, keys: bytes, is_over: bool) -> None:
    with top._quitting() as pressed:
        assert pressed(0.0) is False
        os.write(terminal, keys)
        assert pressed(60.0) is is_over


def test_a_terminal_that_is_gone_ends_it(monkeypatch: pytest.MonkeyPatch, terminal: int) -> None:
    monkeypatch.setattr("sidecar.cli.top.os.read", lambda descriptor, size: b"")
    with top._quitting() as pressed:
        os.write(terminal, b"x")
        assert pressed(60.0) is True
