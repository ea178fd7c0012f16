"""The order in which requests run: first come, first served, bounded, deadlines kept. Pure: the clock is passed in.

Owned by the engine thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from trunkline.errors import QueueFull


class Scheduled(Protocol):
    """What the queue needs to know of a request; ``deadline`` is a time of the engine's clock, in seconds."""

    @property
    def deadline(self) -> float: ...


R = TypeVar("R", bound=Scheduled)


class Queue(Generic[R]):
    """Waiting requests. At most ``limit`` of them; a full queue refuses instead of growing."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: deque[R] = deque()

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, request: R) -> None:
        """Append a request. Raises QueueFull, which the caller may retry."""
        self.check_room()
        self._waiting.append(request)

    def check_room(self) -> None:
        """Raise QueueFull when no request would be taken. Any thread: it reads one number."""
        if len(self._waiting) >= self._limit:
            raise QueueFull(
                f"{len(self._waiting)} requests are waiting, the limit is {self._limit}; try again shortly",
                waiting_count=len(self._waiting),
                limit_count=self._limit,
            )

    def put_back(self, request: R) -> None:
        """Return a request that could not start to the head of the queue."""
        self._waiting.appendleft(request)

    def take(self, now: float) -> tuple[list[R], R | None]:
        """Return the requests whose deadline has passed, never to run, and the next one to run, if any."""
        expired: list[R] = []
        while self._waiting:
            request = self._waiting.popleft()
            if request.deadline > now:
                return expired, request
            expired.append(request)
        return expired, None

    def drop(self, belongs: Callable[[R], bool]) -> int:
        """Forget the requests of which ``belongs`` says so; return how many."""
        before = len(self._waiting)
        self._waiting = deque(request for request in self._waiting if not belongs(request))
        return before - len(self._waiting)
