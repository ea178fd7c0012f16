"""The mover: brings weights into memory and lets them go, in the order it was told, in threads of its own that own no state.

One thread makes room for batches and makes use of what was read; *readers* read, one batch each, so that the disk need not wait
for that. What is freed before something is fetched is gone when room is made for that: so bytes in memory stay within what the
engine has counted. Where there is room, but in pieces, the engine's thread makes one of them, between two stages, while this one
waits: nobody else knows which handles are used.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from trunkline.errors import SidecarFault

from sidecar.bundle import Weight
from sidecar.memory import Batch, Memory, Scattered, Wanted

log = logging.getLogger("trunkline.engine")

# One is read while checksums of another are compared; the third is ready when the disk is.
_READERS: Final = 2
_MOST_BEGUN: Final = 3
_FIRST_PACE: Final = 500e6
# From how many bytes on a measurement says something, and how many of the latest count fully.
_ENOUGH_BYTES: Final = 1 << 20
_LATEST_BYTES: Final = 64 << 20

# Run in the engine thread, with each weight and its handle, or a TrunklineError; with when that was begun, and when what had to
# be read was in host memory (0: nothing had to be).
_Arrived = Callable[[Sequence[tuple[Weight, object]], float, float], None]
_Job = Callable[[], object]


@dataclass(slots=True, eq=False)
class _Fetch:
    """One batch on its way; it has none before it is begun, nor when it failed."""

    wanted: Sequence[Wanted]
    arrived: _Arrived
    # Linux gives ``time.perf_counter`` and ``time.monotonic`` by one clock.
    begun_s: float = 0.0
    batch: Batch | None = None


class Mover:
    """Moves weights, what is asked first first. ``run`` is its thread's body; all else may be called anywhere."""

    def __init__(
        self,
        memory: Memory,
        post: Callable[[Callable[[], None]], None],
        moved: Callable[[Mapping[str, object]], None] = lambda handles: None,
    ) -> None:
        """``moved`` is told, in the engine's thread, of handles that replace those from before, and of errors in their place."""
        self._memory = memory
        self._post = post
        self._moved = moved
        # Says that weights were moved together, or that nobody will do that any more.
        self._compacted: queue.SimpleQueue[bool] = queue.SimpleQueue()
        # Bytes that are brought in per second, as measured; before that, what this disk can do, or most can.
        self.pace = _FIRST_PACE
        self._inbox: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._to_read: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # What it was told, as long as enough has been begun.
        self._told: deque[_Job] = deque()
        self._begun_count = 0
        # What was brought in lately, and how long it took.
        self._moved_bytes = 0.0
        self._moved_s = 0.0
        self._ended_s = 0.0

    def fetch(self, wanted: Sequence[Wanted], arrived: _Arrived) -> None:
        """Bring the weights of a step in; ``arrived`` is told of all of them at once."""
        self._tell(functools.partial(self._begin, _Fetch(wanted, arrived)))

    def free(self, digests: Iterable[str]) -> None:
        """Let go of weights. No handle of them may be left."""
        self._tell(lambda: self._memory.free(digests))

    def then(self, done: Callable[[], None]) -> None:
        """Have ``done`` run in the engine thread, when all that was to be let go of before is gone."""
        self._tell(lambda: self._post(done))

    def trim(self) -> None:
        """Give back what is kept for what comes next."""
        self._tell(self._memory.trim)

    def audit(self) -> None:
        """Have the books of memory compared with what is there; what does not fit is logged."""
        self._tell(self._memory.audit)

    def compare(self, limit_bytes: int, altered: Callable[[Sequence[str]], None]) -> None:
        """Have some of the weights in memory compared with their checksums; ``altered`` is told there if any differ."""

        def look() -> None:
            if found := self._memory.compare(limit_bytes):
                altered(found)

        self._tell(look)

    def _tell(self, job: _Job) -> None:
        self._inbox.put(functools.partial(self._told.append, job))

    def expect(self, pace: float | None) -> None:
        """Take what the disk was found to do, if it was, for the pace until something is brought in."""
        # Should it meet a measurement, either may be lost, and the next one makes up for it.
        if pace is not None and self._moved_bytes < _ENOUGH_BYTES:
            self.pace = pace

    def stop(self) -> None:
        """End ``run``, after what it was told. Nothing that was posted is run from here on."""
        self._inbox.put(None)
        self._compacted.put(False)

    def run(self) -> None:
        for _ in range(_READERS):
            threading.Thread(target=_work, args=(self._to_read,), name="reader", daemon=True).start()
        _work(self._inbox, self._go_on)
        for _ in range(_READERS):
            self._to_read.put(None)

    def _go_on(self) -> None:
        while self._told and self._begun_count < _MOST_BEGUN:
            _do(self._told.popleft())

    def _begin(self, fetch: _Fetch) -> None:
        self._begun_count += 1
        fetch.begun_s = time.perf_counter()
        with _guarded(fetch):
            fetch.batch = self._begun(fetch.wanted)
        self._to_read.put(functools.partial(self._read, fetch))

    def _begun(self, wanted: Sequence[Wanted]) -> Batch | None:
        """Return the batch, None where there is no engine any more to make one piece of the room for it."""
        try:
            return self._memory.begin(wanted)
        except Scattered as scattered:
            needed_bytes = scattered.needed_bytes
        self._post(lambda: self._compact(needed_bytes))
        return self._memory.begin(wanted) if self._compacted.get() else None

    def _compact(self, needed_bytes: int) -> None:
        """Move weights together. In the engine's thread."""
        try:
            self._moved(self._memory.compact(needed_bytes))
        finally:
            self._compacted.put(True)

    def _read(self, fetch: _Fetch) -> None:
        with _guarded(fetch):
            if fetch.batch is not None:
                self._memory.read(fetch.batch)
        self._inbox.put(functools.partial(self._end, fetch))

    def _end(self, fetch: _Fetch) -> None:
        self._begun_count -= 1
        outcomes: Sequence[object] = ()
        in_host_s = 0.0
        with _guarded(fetch):
            if fetch.batch is not None:
                outcomes = self._memory.end(fetch.batch)
                in_host_s = fetch.batch.in_host_s
                self._measure(fetch, fetch.batch)
        if fetch.batch is None:
            # What was made room for is given back: whoever wants it next makes room anew.
            with _guarded(fetch):
                self._memory.free([each.weight.digest for each in fetch.wanted])
            outcomes = [SidecarFault("a weight could not be brought into memory; the sidecar's log says why")] * len(fetch.wanted)
        pairs = [(each.weight, outcome) for each, outcome in zip(fetch.wanted, outcomes, strict=True)]
        # The reader may not have let go of it yet.
        fetch.batch = None
        arrived, begun_s = fetch.arrived, fetch.begun_s
        self._post(lambda: arrived(pairs, begun_s, in_host_s))

    def _measure(self, fetch: _Fetch, batch: Batch) -> None:
        size_bytes = sum(each.weight.size_bytes for each in fetch.wanted) - batch.kept_bytes
        if not size_bytes:
            # Nothing was brought in: it was there.
            return
        # Of one that was begun before the last was ended, what it takes beyond that.
        since_s, self._ended_s = max(fetch.begun_s, self._ended_s), time.perf_counter()
        # Bytes and seconds apart: a batch that ends right after another takes next to no time beyond that.
        self._moved_bytes += size_bytes
        self._moved_s += self._ended_s - since_s
        if self._moved_bytes >= _ENOUGH_BYTES:
            self.pace = self._moved_bytes / self._moved_s
        if self._moved_bytes >= 2 * _LATEST_BYTES:
            self._moved_bytes /= 2
            self._moved_s /= 2


@contextlib.contextmanager
def _guarded(fetch: _Fetch) -> Iterator[None]:
    try:
        yield
    except Exception:
        log.exception("%d weights could not be brought in", len(fetch.wanted))
        fetch.batch = None


def _work(jobs: queue.SimpleQueue[_Job | None], then: _Job = lambda: None) -> None:
    while _take(jobs):
        then()


def _take(jobs: queue.SimpleQueue[_Job | None]) -> bool:
    # A frame of its own: a local of the loop would keep the last weights in memory after their eviction.
    job = jobs.get()
    if job is not None:
        _do(job)
    return job is not None


def _do(job: _Job) -> None:
    try:
        job()
    except Exception:
        # A bug; what it was about is lost, but not the thread.
        log.exception("the mover failed at a job")
