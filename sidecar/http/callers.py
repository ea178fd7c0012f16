"""Sessions with the engine for whoever asks over HTTP: opened with the caller's own token, as its function would open them.

So the engine alone decides who may do what, and what a caller has open counts as its tenant's. A few sessions are kept for
each token that was let in, for its next request.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Final

from trunkline.errors import QueueFull, Unauthorized
from trunkline.pool import Pool

# Tokens whose sessions are kept, and how many are kept of each while nobody asks: they hold memory that is its tenant's.
_MOST_TOKENS: Final = 32
_IDLE_SESSIONS: Final = 4


class Callers:
    """Pools of sessions by token. Any thread. Opens nothing before it is asked, so it may be made before a fork."""

    def __init__(self, socket_path: str) -> None:
        self._path = socket_path
        self._lock = threading.Lock()
        # The one used last stands last.
        self._pools: dict[bytes, Pool] = {}

    @contextlib.contextmanager
    def pool(self, token: bytes) -> Iterator[Pool]:
        """Give the sessions of a caller while the block runs. A token that is refused is forgotten, and pushes out no other."""
        with self._lock:
            pool = self._pools.get(token)
        if pool is None:
            pool = Pool(address=lambda: self._path, credential=lambda: token, idle_limit=_IDLE_SESSIONS)
        is_refused = False
        try:
            yield pool
        except Unauthorized:
            is_refused = True
            raise
        finally:
            self._settle(token, pool, is_kept=pool.connect_count > 0 and not is_refused)

    def close(self) -> None:
        """End all sessions that nobody uses at the moment."""
        with self._lock:
            pools, self._pools = self._pools, {}
        for pool in pools.values():
            pool.close()

    def _settle(self, token: bytes, pool: Pool, is_kept: bool) -> None:
        with self._lock:
            # Another thread may have brought one for this token meanwhile.
            known = self._pools.pop(token, pool)
            leaving = {known, pool}
            if is_kept:
                self._pools[token] = known
                leaving.remove(known)
            if len(self._pools) > _MOST_TOKENS:
                leaving.add(self._pools.pop(next(iter(self._pools))))
        for each in leaving:
            each.close()


class Room:
    """What requests may hold of this process at a time: so many of them, and so many bytes; one token half of it. Any thread.

    They hold threads as well, so this bounds those that wait for the engine, and leaves the others to whoever asks for less.
    """

    def __init__(self, limit_count: int, limit_bytes: int) -> None:
        self._limit_count = limit_count
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._taken: list[tuple[bytes, int]] = []

    @contextlib.contextmanager
    def taken(self, token: bytes, size_bytes: int) -> Iterator[None]:
        """Hold room while the block runs. Raises QueueFull. One that is alone is let in however large it is."""
        entry = (token, size_bytes)
        with self._lock:
            own = [held for whose, held in self._taken if whose == token]
            self._check(len(own), sum(own), size_bytes, 2)
            self._check(len(self._taken), sum(held for _, held in self._taken), size_bytes, 1)
            self._taken.append(entry)
        try:
            yield
        finally:
            with self._lock:
                self._taken.remove(entry)

    def _check(self, count: int, held_bytes: int, size_bytes: int, part: int) -> None:
        limit_count, limit_bytes = self._limit_count // part, self._limit_bytes // part
        if count >= limit_count or (count and held_bytes + size_bytes > limit_bytes):
            # How much of it others have is not said.
            raise QueueFull(
                f"too many requests are under way over HTTP: {limit_count} may be, and {limit_bytes} bytes; try again shortly",
                limit_count=limit_count,
                limit_bytes=limit_bytes,
            )
