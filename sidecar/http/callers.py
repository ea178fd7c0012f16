"""Sessions with the engine for whoever asks over HTTP: opened with the caller's own token, as its function would open them.

So the engine alone decides who may do what, and what a caller has open counts as its tenant's. They go through a socket of
their own, by which the engine knows that whose process it is cannot be seen. A few sessions are kept for
each token that was let in, for its next request; not for long, since another worker may be asked that, and must not find
that its tenant has as many connections as it may.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from trunkline.client import Model
from trunkline.endpoint import Endpoint
from trunkline.errors import QueueFull, Unauthorized
from trunkline.pool import Pool

# Models of which it is known what they take, for each token.
_MOST_MODELS: Final = 256
# Tokens whose sessions are kept.
_MOST_TOKENS: Final = 32
# For so long; whoever is refused a connection is told to try again in as many.
_KEPT_S: Final = 1.0


class CallerPool(Pool):
    """A caller's sessions, and models that were asked for in them: what one takes need not be asked for with each call."""

    def __init__(self, socket_path: str, token: bytes, idle_limit: int) -> None:
        super().__init__(endpoint=Endpoint(socket_path), credential=lambda: token, idle_limit=idle_limit)
        self._found: dict[str, Model] = {}

    def model(self, name: str) -> Model:
        """Return a model whose signature may be that of an older version, until it is called."""
        return self._found.get(name) or self.fresh(name)

    def fresh(self, name: str) -> Model:
        """Return a model whose signature is asked for when it is needed."""
        if len(self._found) >= _MOST_MODELS:
            self._found.clear()
        found = self._found[name] = Model(name, self)
        return found


class Callers:
    """Pools of sessions by token. Any thread. Opens nothing before it is asked, so it may be made before a fork."""

    def __init__(self, socket_path: str, *, idle_limit: int = 4, kept_s: float = _KEPT_S) -> None:
        """``idle_limit`` sessions are kept of each token while nobody asks: they hold memory that is its tenant's."""
        self._path = socket_path
        self._idle_limit = idle_limit
        self._kept_s = kept_s
        # Notified when there are no pools any more.
        self._changed = threading.Condition()
        # With when they were used last; the latest stands last.
        self._pools: dict[bytes, tuple[CallerPool, float]] = {}
        self._is_tidied = False

    @contextlib.contextmanager
    def pool(self, token: bytes) -> Iterator[CallerPool]:
        """Give the sessions of a caller while the block runs. A token that is refused is forgotten, and pushes out no other."""
        with self._changed:
            pool, _ = self._pools.get(token, (None, 0.0))
        if pool is None:
            pool = CallerPool(self._path, token, self._idle_limit)
        is_refused = False
        try:
            yield pool
        except Unauthorized:
            is_refused = True
            raise
        finally:
            self._settle(token, pool, is_kept=pool.connect_count > 0 and not is_refused)

    def greet(self, token: bytes, models: tuple[str, ...], request_bytes: int, reply_bytes: int, deadline: float) -> None:
        """Open a session as a function does that stands for ``models``, and keep it for the caller's next requests.

        Raises what the engine refuses it with.
        """
        with self.pool(token) as pool:
            pool.give(pool.connect(self._path, models, request_bytes, reply_bytes, deadline))

    def close(self) -> None:
        """End all sessions that nobody uses at the moment."""
        with self._changed:
            pools, self._pools = self._pools, {}
            self._changed.notify_all()
        for pool, _ in pools.values():
            pool.close()

    def _settle(self, token: bytes, pool: CallerPool, is_kept: bool) -> None:
        with self._changed:
            # Another thread may have brought one for this token meanwhile.
            known, _ = self._pools.pop(token, (pool, 0.0))
            leaving = {known, pool}
            if is_kept:
                self._pools[token] = known, time.monotonic()
                leaving.remove(known)
                if not self._is_tidied:
                    self._is_tidied = True
                    threading.Thread(target=self._tidy, name="idle sessions", daemon=True).start()
            if len(self._pools) > _MOST_TOKENS:
                leaving.add(self._pools.pop(next(iter(self._pools)))[0])
        for each in leaving:
            each.close()

    def _tidy(self) -> None:
        """End sessions that nobody has used for a while, until there are none."""
        while (pool := self._next_idle()) is not None:
            pool.close()

    def _next_idle(self) -> CallerPool | None:
        """Wait for a pool that nobody has used for a while, and forget it; None when there are none left."""
        with self._changed:
            while self._pools:
                oldest, (pool, used_s) = next(iter(self._pools.items()))
                left_s = used_s + self._kept_s - time.monotonic()
                if left_s <= 0:
                    del self._pools[oldest]
                    return pool
                self._changed.wait(left_s)
            self._is_tidied = False
            return None


@dataclass(eq=False)
class Part:
    """What one request has of the room."""

    token: bytes
    size_bytes: int

    def take_more(self, size_bytes: int) -> None:
        """Have more than was asked for, which is known only now: an answer is there, and who comes next finds less room."""
        self.size_bytes += size_bytes


class Room:
    """What requests may hold of this process at a time: so many of them, and so many bytes; one token half of it. Any thread.

    They hold threads as well, so this bounds those that wait for the engine, and leaves the others to whoever asks for less.
    """

    def __init__(self, limit_count: int, limit_bytes: int) -> None:
        self._limit_count = limit_count
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._taken: list[Part] = []

    @contextlib.contextmanager
    def taken(self, token: bytes, size_bytes: int) -> Iterator[Part]:
        """Hold room while the block runs. Raises QueueFull. One that is alone is let in however large it is."""
        part = Part(token, size_bytes)
        with self._lock:
            own = [held.size_bytes for held in self._taken if held.token == token]
            self._check(len(own), sum(own), size_bytes, 2)
            self._check(len(self._taken), sum(held.size_bytes for held in self._taken), size_bytes, 1)
            self._taken.append(part)
        try:
            yield part
        finally:
            with self._lock:
                self._taken.remove(part)

    def _check(self, count: int, held_bytes: int, size_bytes: int, part: int) -> None:
        limit_count, limit_bytes = self._limit_count // part, self._limit_bytes // part
        if count >= limit_count or (count and held_bytes + size_bytes > limit_bytes):
            # How much of it others have is not said.
            raise QueueFull(
                f"too many requests are under way over HTTP: {limit_count} may be, and {limit_bytes} bytes; try again shortly",
                limit_count=limit_count,
                limit_bytes=limit_bytes,
            )
