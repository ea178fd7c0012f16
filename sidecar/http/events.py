"""Server-sent events: what the page shows, to all who have it open.

While somebody looks, one thread in this process asks the engine, at most once a second for all of them together; what it saw last
is encoded once, and each viewer is sent it when it differs from what that viewer has. A viewer that is slow misses what was
between. Each holds a thread of the server, so there are not many.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from trunkline.errors import QueueFull, TrunklineError

from sidecar.http.watch import Look

log = logging.getLogger("trunkline.admin")

MOST_VIEWERS: Final = 8
_PERIOD_S: Final = 1.0
# A viewer that hears nothing for three of these takes the sidecar to be away.
_BEAT_S: Final = 5.0
_AWAY: Final = "The engine does not answer. It may be starting; this page goes on when it does."


@dataclass(frozen=True, slots=True)
class Shown:
    """What there is to show, as it came: ``look`` is None while the engine is away. ``drawn`` is the number of its drawing."""

    number: int = 0
    drawn: int = 0
    look: Look | None = None
    drawing: bytes = b""
    state: bytes = b""


class Feed:
    """What viewers are sent. Starts no thread before there is one, so it may be made before a fork. Any thread."""

    def __init__(
        self,
        look: Callable[[], Look],
        *,
        period_s: float = _PERIOD_S,
        beat_s: float = _BEAT_S,
        most_viewers: int = MOST_VIEWERS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._look = look
        self._period_s = period_s
        self._beat_s = beat_s
        self._most_viewers = most_viewers
        self._clock = clock
        self._asking = threading.Lock()
        self._looked_s: float | None = None
        self._changed = threading.Condition()
        self._shown = Shown()
        self._life = secrets.token_hex(4)
        self._viewers = 0
        self._thread: threading.Thread | None = None
        self._closed = False

    def latest(self) -> Shown:
        """Return what there is to show, not older than a second."""
        with self._asking:
            now_s = self._clock()
            if self._looked_s is None or now_s - self._looked_s >= self._period_s:
                self._show(self._seen())
                # When it was asked, so that one that takes its time is not asked more often.
                self._looked_s = now_s
        return self._shown

    def _seen(self) -> Look | None:
        try:
            return self._look()
        except TrunklineError as error:
            # Whatever the reason, whoever looks is told that it is away; the log has the rest, once.
            if self._shown.look is not None or not self._shown.number:
                log.warning("the page has nothing to show: %s: %s", error.code, error.message)
        except Exception:
            # A mistake of ours must not end what all viewers wait for; it is logged with its trace.
            log.exception("what the engine tells cannot be shown")
        return None

    def _show(self, look: Look | None) -> None:
        shown = self._shown
        drawing, drawn = shown.drawing, shown.drawn
        if look is None:
            state = _data("away", {"message": _AWAY})
        else:
            if shown.look is None or look.drawing is not shown.look.drawing:
                drawing = _data("drawing", look.drawing)
            state = _data("state", look.state)
        if state == shown.state and drawing == shown.drawing:
            return
        with self._changed:
            number = shown.number + 1
            self._shown = Shown(number, number if drawing != shown.drawing else drawn, look, drawing, state)
            self._changed.notify_all()

    def open(self, last_id: str = "") -> Stream:
        """Return the events of one more viewer, who has seen ``last_id``; to be closed. Raises QueueFull."""
        with self._changed:
            if self._viewers >= self._most_viewers:
                raise QueueFull(
                    f"{self._viewers} pages are open here, the limit is {self._most_viewers}; close one, or try again later",
                    limit_count=self._most_viewers,
                    retry_after_s=10,
                )
            self._viewers += 1
            if self._thread is None:
                self._thread = threading.Thread(target=self._follow, name="page", daemon=True)
                self._thread.start()
        shown = self.latest()
        return Stream(self, shown.number if last_id == self._id(shown) else 0)

    def close(self) -> None:
        """End all streams, soon."""
        self._closed = True
        with self._changed:
            self._changed.notify_all()

    @property
    def viewer_count(self) -> int:
        return self._viewers

    def _follow(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._is_over, self._period_s)
                if self._is_over():
                    self._thread = None
                    return
            self.latest()

    def _is_over(self) -> bool:
        return self._closed or not self._viewers

    def _left(self) -> None:
        with self._changed:
            self._viewers -= 1
            self._changed.notify_all()

    def _id(self, shown: Shown) -> str:
        return f"{self._life}-{shown.number}"

    def _next(self, seen: int) -> tuple[int, bytes] | None:
        """Return what comes after the number a viewer has seen, or after a while a comment; None when all is over."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._shown.number != seen, self._beat_s)
            shown = self._shown
        if self._closed:
            return None
        if shown.number == seen:
            return seen, b": still here\n\n"
        drawing = shown.drawing if shown.look is not None and shown.drawn > seen else b""
        return shown.number, b"".join((drawing, b"id: ", self._id(shown).encode(), b"\n", shown.state))


class Stream(Iterator[bytes]):
    """The events of one viewer, as bytes."""

    def __init__(self, feed: Feed, seen: int) -> None:
        self._feed = feed
        self._seen = seen
        self._is_open = True

    def __next__(self) -> bytes:
        found = self._feed._next(self._seen)
        if found is None:
            raise StopIteration
        self._seen, content = found
        return content

    def close(self) -> None:
        """Say that the viewer has left; once is enough."""
        if self._is_open:
            self._is_open = False
            self._feed._left()


def _data(event: str, content: dict[str, Any]) -> bytes:
    # In JSON a line has no end.
    return f"event: {event}\ndata: {json.dumps(content, separators=(',', ':'), ensure_ascii=True)}\n\n".encode()
