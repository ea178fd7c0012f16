"""What the supervisor makes of an engine that died, or that is at something that does not end."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from trunkline.errors import Quarantined

from sidecar import deaths as module
from sidecar.deaths import Deaths
from sidecar.journal import Asked

SLOW, GOOD = Asked("bad", "slow", "call-7"), Asked("good", "model", "")
PID = 4711
# As os.wait has it.
CRASHED, KILLED, ENDED = int(signal.SIGSEGV), int(signal.SIGKILL), 1 << 8


@pytest.fixture
def deaths() -> Iterator[Deaths]:
    made = Deaths(2, 2.0)
    yield made
    made.close()


def look(deaths: Deaths, now: float, seconds: float) -> list[float]:
    """Look at an engine as often as it is due; return when it was said that it has to be killed."""
    found, until_s = [], now + seconds
    while now < until_s:
        now += deaths.due_s(now)
        if deaths.watch(PID, now):
            found.append(now)
    return found


def test_an_engine_that_is_at_one_stage_for_too_long_is_to_be_killed_once(
    deaths: Deaths, caplog: pytest.LogCaptureFixture
) -> None:
    deaths.engine_starts(10.0)
    deaths.page(0).begin(10.0, 0.003, [SLOW, GOOD])
    assert look(deaths, 10.0, 60.0) == [13.0]
    assert deaths.facts() == {"watchdog_kills": 1, "quarantines": 0}
    (line,) = caplog.messages
    assert "engine 4711 is killed: it has been at one stage, for 2 requests, for 3.0 s; 2.0 s are allowed" in line
    assert "0.003000 s that were expected" in line
    assert "--watchdog" in line


def test_of_a_stage_that_nobody_has_measured_more_is_awaited(deaths: Deaths, caplog: pytest.LogCaptureFixture) -> None:
    deaths.engine_starts(10.0)
    deaths.page(0).begin(10.0, 0.0, [SLOW])
    assert look(deaths, 10.0, 60.0) == [31.0]
    assert "nobody has measured" in caplog.text


def test_with_no_watchdog_nobody_looks() -> None:
    deaths = Deaths(1, 0.0)
    deaths.engine_starts(10.0)
    deaths.page(0).begin(10.0, 0.001, [SLOW])
    assert deaths.due_s(1e6) == math.inf
    assert not deaths.watch(PID, 1e6)
    deaths.close()


def test_only_what_did_not_end_is_suspect(deaths: Deaths) -> None:
    deaths.engine_starts(10.0)
    deaths.page(0).begin(10.0, 0.003, [SLOW])
    other = deaths.page(1)
    assert not deaths.watch(PID, 11.0)
    assert not deaths.watch(PID, 12.0)
    other.begin(12.5, 0.003, [GOOD])
    assert deaths.watch(PID, 13.0)
    deaths.engine_died(PID, CRASHED, 13.1)
    suspects = deaths.suspects(lambda: 14.0)
    assert suspects.has("bad", "slow")
    assert not suspects.has("good", "model")


def test_a_run_that_ended_before_the_engine_was_killed_for_it_is_none_of_its_causes(deaths: Deaths) -> None:
    deaths.engine_starts(10.0)
    page = deaths.page(0)
    place = page.begin(10.0, 0.003, [SLOW])
    assert look(deaths, 10.0, 3.0) == [13.0]
    page.end(place)
    page.begin(13.05, 0.003, [GOOD])
    deaths.engine_died(PID, CRASHED, 13.1)
    suspects = deaths.suspects(lambda: 14.0)
    assert not suspects.has("bad", "slow")
    assert suspects.has("good", "model")


def test_the_log_tells_what_an_engine_has_died_of_and_the_next_one_refuses_it(
    deaths: Deaths, caplog: pytest.LogCaptureFixture
) -> None:
    for now in (10.0, 20.0):
        deaths.engine_starts(now)
        deaths.page(1).begin(now, 0.003, [SLOW])
        deaths.engine_died(PID, CRASHED, now)
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "computed slow for bad (call call-7); the next such request is run alone" in caplog.messages[0]
    assert "refused for 1 s" in caplog.messages[1]
    assert deaths.facts() == {"watchdog_kills": 0, "quarantines": 1}
    deaths.engine_starts(30.0)
    with pytest.raises(Quarantined):
        deaths.suspects(lambda: 30.5).check("bad", "slow")
    # The next one has a journal of its own.
    assert look(deaths, 30.0, 60.0) == []


def refused_after_two(deaths: Deaths, status: int) -> bool:
    """Have two engines end like that with the same request; say whether it is refused then."""
    for now in (10.0, 20.0):
        deaths.engine_starts(now)
        deaths.page(0).begin(now, 0.003, [SLOW])
        deaths.engine_died(PID, status, now)
    deaths.engine_starts(30.0)
    try:
        deaths.suspects(lambda: 30.5).check("bad", "slow")
    except Quarantined:
        return True
    return False


@pytest.mark.parametrize("status", [CRASHED, ENDED, int(signal.SIGABRT), int(signal.SIGBUS) | 128], ids=str)
def test_an_engine_that_fails_by_itself_is_certain_evidence(deaths: Deaths, status: int) -> None:
    assert refused_after_two(deaths, status)


def test_one_that_somebody_may_have_killed_is_not(deaths: Deaths) -> None:
    assert not refused_after_two(deaths, KILLED)


def test_one_that_the_kernel_killed_for_want_of_memory_is(
    deaths: Deaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(range(100))

    class Counting:
        def read_text(self) -> str:
            return f"nr_free_pages 7\noom_kill {next(told)}\n"

    monkeypatch.setattr(module, "_STATISTICS", Counting())
    assert refused_after_two(deaths, KILLED)
    monkeypatch.setattr(module, "_STATISTICS", tmp_path / "none")
    assert module._killed_for_memory() == 0


def test_this_machine_says_how_many_it_has_killed_for_want_of_memory() -> None:
    assert "\noom_kill " in Path("/proc/vmstat").read_text()
    assert module._killed_for_memory() >= 0


def test_one_that_the_watchdog_killed_is(deaths: Deaths) -> None:
    for now in (10.0, 20.0):
        deaths.engine_starts(now)
        deaths.page(0).begin(now, 0.003, [SLOW])
        assert look(deaths, now, 5.0)
        deaths.engine_died(PID, KILLED, now + 5.0)
    deaths.engine_starts(30.0)
    with pytest.raises(Quarantined):
        deaths.suspects(lambda: 30.5).check("bad", "slow")


def test_what_an_engine_has_cleared_is_no_suspect_of_the_next(deaths: Deaths) -> None:
    deaths.engine_starts(10.0)
    deaths.page(0).begin(10.0, 0.003, [GOOD])
    assert deaths.engine_died(PID, CRASHED, 11.0)
    deaths.suspects(lambda: 12.0).clear("good", "model")
    assert not deaths.engine_died(PID, CRASHED, 13.0), "it was at nothing"
    assert not deaths.suspects(lambda: 14.0)
