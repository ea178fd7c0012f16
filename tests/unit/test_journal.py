"""What an engine was at, as whoever outlives it reads it."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Iterator

import pytest

from sidecar import journal
from sidecar.journal import Asked, Journal

ONE, OTHER = Asked("vision", "embed@vision", "call-1"), Asked("text", "generate", "")


@pytest.fixture
def made() -> Iterator[Journal]:
    found = Journal(2)
    yield found
    found.close()


def test_what_has_begun_is_there_until_it_ends(made: Journal) -> None:
    page = made.page(1)
    assert made.entries() == []
    assert not made.was_used()
    place = page.begin(12.5, 0.25, [ONE, OTHER])
    (entry,) = made.entries()
    assert entry.calls == (ONE, OTHER)
    assert (entry.running.began_s, entry.running.expected_s, entry.running.call_count) == (12.5, 0.25, 2)
    assert made.running() == [entry.running]
    page.end(place)
    assert made.entries() == []
    assert made.was_used()


def test_runs_side_by_side_have_places_of_their_own(made: Journal) -> None:
    first, second = made.page(0), made.page(1)
    places = [first.begin(1.0, 0.0, [ONE]), first.begin(2.0, 0.0, [OTHER]), second.begin(3.0, 0.0, [ONE])]
    assert len(set(places)) == 3
    assert sorted(each.began_s for each in made.running()) == [1.0, 2.0, 3.0]
    first.end(places[0])
    assert sorted(each.began_s for each in made.running()) == [2.0, 3.0]


def test_the_next_run_at_a_place_is_another(made: Journal) -> None:
    page = made.page(0)
    page.end(page.begin(1.0, 0.0, [ONE]))
    before = page.begin(1.0, 0.0, [ONE])
    (one,) = made.running()
    page.end(before)
    assert page.begin(1.0, 0.0, [ONE]) == before
    (other,) = made.running()
    assert one != other


def test_an_entry_that_was_never_finished_does_not_count(made: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    class Dies:
        """Stands for the last thing that is written."""

        size = journal._HEAD.size
        unpack_from = journal._HEAD.unpack_from

        def pack_into(self, *values: object) -> None:
            raise KeyboardInterrupt

    page = made.page(0)
    page.end(page.begin(1.0, 0.0, [ONE]))
    with monkeypatch.context() as patched:
        patched.setattr(journal, "_HEAD", Dies())
        with pytest.raises(KeyboardInterrupt):
            page.begin(2.0, 0.0, [OTHER])
    assert made.entries() == []


def test_names_for_which_there_is_no_room_are_left_out_and_counted(made: Journal) -> None:
    many = [Asked("tenant", "m" * 200, str(number)) for number in range(500)]
    made.page(0).begin(1.0, 0.0, many)
    (entry,) = made.entries()
    assert entry.running.call_count == 500
    assert 10 < len(entry.calls) < 500
    assert list(entry.calls) == many[: len(entry.calls)]


@pytest.mark.parametrize("garbage", [b"\xff", b"\x93\x01", b"\x01", b"\x91\x92\xa1a", b"\x91\x93\xa1a\xa1b\x07", b"\x91\xc0"])
def test_whatever_was_written_over_names_can_be_read(made: Journal, garbage: bytes) -> None:
    """What kills an engine may have written anywhere before."""
    made.page(0).begin(1.0, 0.0, [ONE])
    start = made._names_offset
    made._memory[start : start + 100] = garbage.ljust(100, b"\xff")
    (entry,) = made.entries()
    assert entry.calls == ()
    assert entry.running.call_count == 1


def test_marks_are_told(made: Journal) -> None:
    for number in (0, 7, journal.MOST_MARKS - 1):
        made.mark(number)
    made.page(0).begin(1.0, 0.0, [ONE])
    assert made.marked() == [0, 7, journal.MOST_MARKS - 1]
    made.mark_lifted(3)
    assert made.lifted() == [3]
    assert made.marked() == [0, 7, journal.MOST_MARKS - 1]


def test_whoever_is_killed_at_any_line_leaves_what_can_be_read() -> None:
    """What stands there belongs together, or does not count; and the marks are those of the last moment."""
    seeds = random.Random(7)
    found = 0
    for _ in range(40):
        made = Journal()
        pid = os.fork()
        if not pid:
            page = made.page(0)
            for number in itertools.count(1):
                calls = [Asked(str(number), "m" * (number % 50), str(number))] * (number % 4 + 1)
                place = page.begin(float(number), float(number), calls)
                page.end(page.begin(float(number), float(number), calls))
                page.end(place)
        while not made.running():
            time.sleep(0)
        time.sleep(seeds.uniform(0, 0.002))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        for running, calls in made.entries():
            number = int(running.began_s)
            assert (running.expected_s, running.call_count) == (number, number % 4 + 1)
            assert calls == (Asked(str(number), "m" * (number % 50), str(number)),) * running.call_count
            found += 1
        made.close()
    assert found, "it was never killed while something was noted"


def test_only_what_is_written_takes_memory() -> None:
    """All places of eight devices are addresses; a run takes some pages, however often there is one."""

    def held_bytes() -> int:
        with open("/proc/self/smaps_rollup") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("Pss_Shmem"))

    before = held_bytes()
    made = Journal(8)
    page = made.page(3)
    for _ in range(1000):
        page.end(page.begin(1.0, 0.0, [ONE]))
    made.running()
    assert held_bytes() - before < 128 * 1024
    made.close()
