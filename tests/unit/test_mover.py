"""The mover: in order, while the disk is at work, and whatever goes wrong is told to those it concerns."""

from __future__ import annotations

import gc
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from trunkline.errors import SidecarFault

from sidecar.bundle import Weight
from sidecar.memory import Batch, Scattered, Wanted
from sidecar.mover import _FIRST_PACE, _LATEST_BYTES, Mover, _Fetch

TIMEOUT_S = 60
MB = 1 << 20


class Handle:
    pass


class FakeMemory:
    """Notes what it is told; a batch is read when it is let through, and fails where it should."""

    def __init__(self) -> None:
        self.told: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.gates: dict[str, threading.Event] = {}
        self.fails: set[str] = set()
        # Batches for which there is room, but in pieces, until it was made one.
        self.scattered: set[str] = set()

    def note(self, what: str, name: str) -> None:
        self.told.put(f"{what} {name}")
        if f"{what} {name}" in self.fails:
            raise RuntimeError("as it was told")

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        self.note("begin", _name(wanted))
        if _name(wanted) in self.scattered:
            raise Scattered(len(wanted))
        return Batch(wanted)

    def compact(self, needed_bytes: int) -> dict[str, object]:
        self.note("compact", str(needed_bytes))
        self.scattered.clear()
        return {"other": "elsewhere"}

    def read(self, batch: Batch) -> None:
        name = _name(batch.wanted)
        assert self.gates.setdefault(name, threading.Event()).wait(TIMEOUT_S)
        self.note("read", name)

    def end(self, batch: Batch) -> list[object]:
        self.note("end", _name(batch.wanted))
        return [Handle() for _ in batch.wanted]

    def free(self, digests: Iterable[str]) -> None:
        self.note("free", "".join(digests))

    def trim(self) -> None:
        self.note("trim", "all")

    def let_through(self, *names: str) -> None:
        for name in names:
            self.gates.setdefault(name, threading.Event()).set()

    def saw(self, count: int) -> list[str]:
        return [self.told.get(timeout=TIMEOUT_S) for _ in range(count)]


def _name(wanted: Sequence[Wanted]) -> str:
    return wanted[0].weight.digest


def batch(name: str, size_bytes: int = 1) -> list[Wanted]:
    return [Wanted(Weight(name, "uint8", (size_bytes,), size_bytes, 0), None)]


class Bench:
    def __init__(self) -> None:
        self.memory: Any = FakeMemory()
        self.posted: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.replaced: dict[str, object] = {}
        self.mover = Mover(self.memory, self.posted.put, self.replaced.update)
        self.arrived: list[tuple[str, object]] = []
        self.thread = threading.Thread(target=self.mover.run)

    def fetch(self, *names: str) -> None:
        for name in names:
            self.mover.fetch(batch(name), self.note)

    def note(self, pairs: Sequence[tuple[Weight, object]], begun_s: float, in_host_s: float) -> None:
        self.arrived += [(weight.digest, outcome) for weight, outcome in pairs]

    def take(self, count: int) -> list[tuple[str, object]]:
        """Return what arrived, when that many batches have."""
        for _ in range(count):
            self.posted.get(timeout=TIMEOUT_S)()
        arrived, self.arrived = self.arrived, []
        return arrived


@pytest.fixture
def bench(nothing_leaks: None) -> Iterator[Bench]:
    made = Bench()
    made.thread.start()
    yield made
    made.mover.stop()
    made.thread.join(TIMEOUT_S)
    assert not made.thread.is_alive()


def test_the_next_are_begun_while_the_first_is_read(bench: Bench) -> None:
    bench.fetch("a", "b", "c", "d", "e")
    assert bench.memory.saw(3) == ["begin a", "begin b", "begin c"]
    # Not the fourth, before one of them has ended.
    assert bench.memory.told.empty()
    bench.memory.let_through("a")
    assert bench.memory.saw(3) == ["read a", "end a", "begin d"]
    ((name, handle),) = bench.take(1)
    assert name == "a"
    assert isinstance(handle, Handle)
    bench.memory.let_through("b", "c", "d", "e")
    assert [name for name, _ in sorted(bench.take(4), key=lambda pair: pair[0])] == ["b", "c", "d", "e"]


def test_who_waits_for_something_to_be_gone_is_told_even_if_it_failed(bench: Bench) -> None:
    bench.memory.fails.add("free x")
    bench.mover.free(["x"])
    bench.mover.trim()
    bench.mover.then(lambda: bench.arrived.append(("gone", bench.memory.saw(2))))
    assert bench.take(1) == [("gone", ["free x", "trim all"])]


def test_what_is_let_go_of_first_is_gone_before_room_is_made(bench: Bench) -> None:
    bench.memory.let_through(*"abcd")
    bench.fetch("a")
    bench.mover.free(["x"])
    bench.fetch("b", "c", "d")
    bench.mover.free(["y"])
    bench.mover.trim()
    bench.take(4)
    told = [each for each in bench.memory.saw(15) if not each.startswith(("read", "end"))]
    assert told == ["begin a", "free x", "begin b", "begin c", "begin d", "free y", "trim all"]


@pytest.mark.parametrize("step", ["begin", "read", "end"])
def test_what_goes_wrong_with_one_batch_is_told_and_harms_no_other(
    step: str, bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.memory.fails.add(f"{step} a")
    bench.memory.let_through("a", "b")
    bench.fetch("a", "b")
    found = dict(bench.take(2))
    assert isinstance(found["a"], SidecarFault)
    assert isinstance(found["b"], Handle)
    assert "1 weights could not be brought in" in caplog.text
    # Its room is given back before anybody is told.
    told = bench.memory.saw(5 + ["begin", "read", "end"].index(step))
    assert "free a" in told
    # It counts no more as begun: three more are.
    bench.fetch("c", "d", "e")
    bench.memory.let_through("c", "d", "e")
    assert len(bench.take(3)) == 3


def test_room_in_pieces_is_made_one_by_the_engine_while_nothing_else_is_done(bench: Bench) -> None:
    bench.memory.scattered.add("b")
    bench.memory.let_through("a", "b", "c")
    bench.fetch("a", "b", "c")
    bench.mover.free(["x"])
    # What has arrived was told before: the engine knows of it when it looks for handles to replace.
    told = bench.memory.saw(2)
    assert told == ["begin a", "begin b"]
    # Meanwhile a is read, and not ended.
    assert bench.memory.saw(1) == ["read a"]
    assert bench.memory.told.empty()
    assert bench.take(1) == []
    assert bench.replaced == {"other": "elsewhere"}
    told = bench.memory.saw(9)
    assert told[:2] == ["compact 1", "begin b"]
    assert {"end a", "begin c", "read b", "end b", "free x"} <= {*told}
    assert sorted(name for name, _ in bench.take(3)) == ["a", "b", "c"]


def test_an_engine_that_cannot_make_one_piece_is_told_to_the_batch_alone(bench: Bench) -> None:
    bench.memory.scattered.add("a")
    bench.memory.fails.add("compact 1")
    bench.memory.let_through("a", "b")
    bench.fetch("a", "b")
    with pytest.raises(RuntimeError, match="as it was told"):
        bench.take(1)
    found = dict(bench.take(2))
    assert isinstance(found["a"], SidecarFault)
    assert isinstance(found["b"], Handle)


def test_a_mover_that_waits_for_the_engine_ends_with_it(bench: Bench) -> None:
    bench.memory.scattered.add("a")
    bench.fetch("a")
    assert bench.memory.saw(1) == ["begin a"]
    # The fixture sees to it that its thread ends, though nobody runs what it posts.


def test_what_goes_wrong_is_told_even_if_its_room_cannot_be_given_back(bench: Bench) -> None:
    bench.memory.fails |= {"begin a", "free a"}
    bench.fetch("a")
    ((_, outcome),) = bench.take(1)
    assert isinstance(outcome, SidecarFault)


def test_another_job_that_fails_does_not_end_the_thread(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.memory.fails.add("free x")
    bench.memory.let_through("a")
    bench.mover.free(["x"])
    bench.fetch("a")
    assert len(bench.take(1)) == 1
    assert "the mover failed at a job" in caplog.text


def test_nobody_holds_on_to_what_has_arrived(bench: Bench) -> None:
    bench.memory.let_through("a")
    bench.fetch("a")
    ((_, handle),) = bench.take(1)
    # Of what it was told next it has no notion of the last.
    bench.mover.trim()
    while bench.memory.told.get(timeout=TIMEOUT_S) != "trim all":
        pass
    seen = weakref.ref(handle)
    del handle
    gc.collect()
    assert seen() is None


def test_a_reader_that_is_late_holds_on_to_no_handle() -> None:
    mover = without_threads()
    fetch = _Fetch(batch("a"), lambda pairs, *when: None)
    mover._begin(fetch)
    assert fetch.batch is not None
    mover._end(fetch)
    assert fetch.batch is None


def moved(mover: Mover, now: list[float], *batches: tuple[int, float]) -> None:
    """Bring in batches, all begun at once, of so many bytes, which end at these times."""
    fetches = [_Fetch(batch("a", size_bytes), lambda pairs, *when: None) for size_bytes, _ in batches]
    for fetch in fetches:
        mover._begin(fetch)
    for fetch, (_, ended_s) in zip(fetches, batches, strict=True):
        now[0] = ended_s
        mover._end(fetch)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr("sidecar.mover.time.perf_counter", lambda: now[0])
    return now


def without_threads() -> Mover:
    memory: Any = FakeMemory()
    return Mover(memory, lambda command: command())


def test_the_pace_is_that_of_batches_in_a_row(now: list[float]) -> None:
    mover = without_threads()
    moved(mover, now, (8 * MB, 2.0), (1 * MB, 3.0), (2 * MB, 3.1), (1, 3.2))
    assert mover.pace == pytest.approx((11 * MB + 1) / 3.2)
    # The time in which nothing is brought in does not count.
    now[0] = 100.0
    moved(mover, now, (5 * MB, 101.0))
    assert mover.pace == pytest.approx((16 * MB + 1) / 4.2)


def test_a_disk_that_became_faster_is_seen_to_be(now: list[float]) -> None:
    mover = without_threads()
    moved(mover, now, (_LATEST_BYTES, 100.0))
    for _ in range(20):
        moved(mover, now, (_LATEST_BYTES, now[0] + 1.0))
    assert mover.pace == pytest.approx(_LATEST_BYTES, rel=1e-3)


def test_the_first_pace_is_that_of_the_disk(now: list[float]) -> None:
    mover = without_threads()
    mover.expect(None)
    assert mover.pace == _FIRST_PACE
    mover.expect(3e9)
    assert mover.pace == 3e9
    # Too little to say anything.
    moved(mover, now, (1, 1.0))
    assert mover.pace == 3e9
    moved(mover, now, (MB, 2.0))
    mover.expect(3e9)
    assert mover.pace == pytest.approx((MB + 1) / 2)


def test_what_was_in_memory_already_says_nothing_of_the_pace(now: list[float]) -> None:
    mover = without_threads()
    for kept_bytes, ended_s in ((8 * MB, 0.001), (6 * MB, 2.0)):
        fetch = _Fetch(batch("a", 8 * MB), lambda pairs, *when: None)
        mover._begin(fetch)
        assert fetch.batch is not None
        fetch.batch.kept_bytes = kept_bytes
        now[0] = ended_s
        mover._end(fetch)
    assert mover.pace == pytest.approx(2 * MB / 1.999)
