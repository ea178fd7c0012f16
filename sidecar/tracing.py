"""Tracing: what became of a request, and when, as spans that a thread of its own hands to whoever exports them.

Whoever serves a request only notes times, and only where the request is sampled: its notes are made spans when it is over, in the
exporting thread. What waits for that is bounded; what finds no room, or cannot be exported, is dropped and counted. No request
waits for a collector, or fails for one. Knows nothing of OpenTelemetry's packages (``sidecar.otel`` does). Times are those of
``time.monotonic``, in seconds.
"""

from __future__ import annotations

import logging
import queue
import secrets
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple, Protocol

log = logging.getLogger("trunkline.traces")

SERVER, INTERNAL = "server", "internal"
# What became of a request that was answered; of others it is the code of their error.
ANSWERED: Final = "answered"

Attribute = str | int
# Says whether a trace is to be recorded: by its id, the id of the span that a request comes from (0: none), and whether that is.
Samples = Callable[[int, int, bool], bool]


class Place(NamedTuple):
    """Where a span belongs: its trace, and in it the span that it is a part of (0: none)."""

    trace_id: int
    parent_id: int


class Span(NamedTuple):
    """One span, over. ``error`` is the code of what went wrong, if anything did."""

    name: str
    kind: str
    place: Place
    span_id: int
    start_s: float
    end_s: float
    attributes: Mapping[str, Attribute]
    error: str = ""


class Notes(Protocol):
    """What was noted of something that is over; made spans later, in another thread."""

    @property
    def span_count(self) -> int: ...
    def spans(self) -> list[Span]: ...


def new_id() -> int:
    """Return an id for a span."""
    return secrets.randbits(64) or 1


@dataclass(slots=True)
class _Stretch:
    """From the first of several times to the last."""

    start_s: float = 0.0
    end_s: float = 0.0

    def covers(self, start_s: float, end_s: float) -> None:
        self.start_s = min(self.start_s, start_s) if self.end_s else start_s
        self.end_s = max(self.end_s, end_s)


@dataclass(slots=True, eq=False)
class RequestNotes:
    """One inference in the engine's process. The server's thread begins it, the engine's goes on; who answers ends it.

    The parts of a call whose models are asked one after the other have these in common.
    """

    place: Place
    started_s: float
    model: str
    tenant: str
    call_id: str
    generation: int
    device: str = ""
    # Of the batch axis.
    rows: int = 0
    taken_s: float = 0.0
    # Disk to host, and host to device.
    fetched: _Stretch = field(default_factory=_Stretch)
    swapped: _Stretch = field(default_factory=_Stretch)
    run: _Stretch = field(default_factory=_Stretch)
    stages: int = 0
    batch_rows: int = 0
    shared_with: int = 0
    reply_s: float = 0.0
    ended_s: float = 0.0
    outcome: str = ""

    def taken(self, now: float, device: str) -> None:
        """Note that it has left the queue, and where it is computed. The first time counts."""
        if not self.taken_s:
            self.taken_s, self.device = now, device

    def moved(self, begun_s: float, in_host_s: float, now: float) -> None:
        """Note that weights it needs are there ``now``. They were begun to be brought in, and in host memory if they had to be
        read, at these times; what was before the request is not its own.
        """
        if in_host_s > self.started_s:
            self.fetched.covers(max(begun_s, self.started_s), in_host_s)
        self.swapped.covers(max(in_host_s or begun_s, self.started_s), now)

    def ran(self, started_s: float, ended_s: float, rows: int, request_count: int) -> None:
        """Note that one of its stages was run, on so many rows, for so many requests."""
        self.run.covers(started_s, ended_s)
        self.stages += 1
        self.batch_rows = max(self.batch_rows, rows)
        self.shared_with = max(self.shared_with, request_count - 1)

    def end(self, now: float, outcome: str) -> None:
        """Note what became of it."""
        self.ended_s, self.outcome = now, outcome

    @property
    def span_count(self) -> int:
        return 2 + sum(1 for each in (self.fetched.end_s, self.swapped.end_s, self.run.end_s, self.reply_s) if each)

    def spans(self) -> list[Span]:
        """Return the request as a span and its parts as spans in it: those that there were."""
        span_id = new_id()
        error = "" if self.outcome == ANSWERED else self.outcome
        whole: dict[str, Attribute] = {
            "trunkline.model": self.model,
            "trunkline.tenant": self.tenant,
            "trunkline.outcome": self.outcome,
            "trunkline.generation": self.generation,
        }
        known: dict[str, Attribute] = {
            "trunkline.device": self.device,
            "trunkline.rows": self.rows,
            "trunkline.call_id": self.call_id,
        }
        whole |= {key: value for key, value in known.items() if value}
        found = [Span("infer", SERVER, self.place, span_id, self.started_s, self.ended_s, whole, error)]

        def part(name: str, start_s: float, end_s: float, attributes: Mapping[str, Attribute] | None = None) -> None:
            place = Place(self.place.trace_id, span_id)
            # A run that nobody waits for any more may end after the request.
            until_s = min(end_s, self.ended_s)
            found.append(Span(name, INTERNAL, place, new_id(), min(start_s, until_s), until_s, attributes or {}))

        part("queue", self.started_s, self.taken_s or self.ended_s)
        if self.fetched.end_s:
            part("fetch", self.fetched.start_s, self.fetched.end_s)
        if self.swapped.end_s:
            part("swap in", self.swapped.start_s, self.swapped.end_s)
        if self.run.end_s:
            counts = {
                "trunkline.stages": self.stages,
                "trunkline.batch_rows": self.batch_rows,
                "trunkline.shared_with": self.shared_with,
            }
            part("run", self.run.start_s, self.run.end_s, counts)
        if self.reply_s:
            part("reply", self.reply_s, self.ended_s)
        return found


class Tracer:
    """Chooses what is traced, and exports it. ``begin`` and ``finish`` may be called by any thread, and never wait.

    ``export`` sends spans, in a thread of this one's, and says whether they arrived; ``stop`` has it give up what it is at.
    """

    def __init__(
        self,
        samples: Samples,
        export: Callable[[Sequence[Span]], bool],
        stop: Callable[[], None] = lambda: None,
        *,
        limit: int = 2048,
        batch: int = 512,
        delay_s: float = 5.0,
    ) -> None:
        """At most ``limit`` requests wait to be exported; ``batch`` are at a time, and fewer after ``delay_s``."""
        self._samples = samples
        self._export = export
        self._stop = stop
        self._limit = limit
        self._batch = min(batch, limit)
        self._delay_s = delay_s
        # None: that is all.
        self._waiting: queue.SimpleQueue[Notes | None] = queue.SimpleQueue()
        self._due = threading.Event()
        # For the counts alone, which nobody holds for longer than an addition.
        self._lock = threading.Lock()
        self._dropped: Counter[str] = Counter()
        self._exported = 0
        self._thread: threading.Thread | None = None

    def begin(self, traceparent: str) -> Place | None:
        """Return where the span of a request belongs that came with this W3C header, or with none; None: it is not traced."""
        if traceparent:
            place = Place(int(traceparent[3:35], 16), int(traceparent[36:52], 16))
            is_sampled = bool(int(traceparent[53:], 16) & 1)
        else:
            place, is_sampled = Place(secrets.randbits(128) or 1, 0), False
        return place if self._samples(place.trace_id, place.parent_id, is_sampled) else None

    def finish(self, notes: Notes) -> None:
        """Have something exported that is over."""
        waiting = self._waiting.qsize()
        if waiting >= self._limit:
            self._drop("queue_full", notes.span_count)
            return
        self._waiting.put(notes)
        if waiting + 1 >= self._batch:
            self._due.set()

    def start(self) -> None:
        """Begin to export, in this process: no thread survives a fork."""
        self._thread = threading.Thread(target=self._run, name="traces", daemon=True)
        self._thread.start()

    def close(self, patience_s: float) -> None:
        """Export what is left, if that takes no longer than this, and end."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._waiting.put(None)
        self._due.set()
        thread.join(patience_s)
        self._stop()

    def counts(self) -> dict[str, object]:
        """Return how many spans were exported, and by why how many were dropped."""
        with self._lock:
            return {"exported": self._exported, "dropped": {"queue_full": 0, "export_failed": 0} | self._dropped}

    def _drop(self, reason: str, count: int) -> None:
        with self._lock:
            self._dropped[reason] += count

    def _run(self) -> None:
        is_last = False
        while not is_last:
            first = self._waiting.get()
            # Others come with it; each batch is one more request to the collector.
            self._due.wait(self._delay_s)
            self._due.clear()
            is_last = self._send(first)

    def _send(self, first: Notes | None) -> bool:
        """Export what waits, batch by batch; return whether that was all."""
        notes = first
        while True:
            batch: list[Notes] = []
            while notes is not None and len(batch) < self._batch:
                batch.append(notes)
                try:
                    notes = self._waiting.get_nowait()
                except queue.Empty:
                    self._send_batch(batch)
                    return False
            self._send_batch(batch)
            if notes is None:
                return True

    def _send_batch(self, batch: Sequence[Notes]) -> None:
        spans = [span for notes in batch for span in notes.spans()]
        if not spans:
            return
        try:
            arrived = self._export(spans)
        except Exception:
            log.exception("%d spans could not be exported", len(spans))
            arrived = False
        if arrived:
            with self._lock:
                self._exported += len(spans)
        else:
            self._drop("export_failed", len(spans))


def traceparent_of(trace_id: int, span_id: int) -> str:
    """Return the W3C header that makes what comes with it a part of a sampled span."""
    return f"00-{trace_id:032x}-{span_id:016x}-01"
