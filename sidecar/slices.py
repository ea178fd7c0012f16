"""Slices: long work in a thread that others wait for, done a little at a time, so that they have their turn in between.

What grows with the size of a graph is gone through ``paced``. Called as usual that does nothing. In work that ``Slices`` does,
in a coroutine of its own (a greenlet: such work is written as any other), and there only within ``stopping``, it stops after
every few items, and whoever has the thread goes on with something else. So nothing changes under the hands of such work but where
it says so, and nobody sees it half done elsewhere. A second thread would do worse: the engine's kernels give the interpreter's
lock away, and would wait for it each time. Owned by one thread. Pure.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Final, TypeVar

from greenlet import getcurrent, greenlet

T = TypeVar("T")

# Of a slice. To read, name, cut or prepare a node takes 10 to 60 us.
ITEMS: Final = 16


class _Sliced(greenlet):
    """Work that stops after so many items. It gives no arguments and takes none."""

    left = ITEMS
    may_stop = False

    def take_one(self) -> None:
        self.left -= 1
        if not self.left:
            self.left = ITEMS
            assert self.parent is not None
            self.parent.switch()


def paced(items: Iterable[T]) -> Iterable[T]:
    """Return the items; in work that is done in slices, where it may stop, with others' turns between them."""
    current = getcurrent()
    return _with_stops(items, current) if isinstance(current, _Sliced) and current.may_stop else items


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """Let others have their turn while the block runs, in work that is done in slices."""
    current = getcurrent()
    if not isinstance(current, _Sliced):
        yield
        return
    current.may_stop = True
    try:
        yield
    finally:
        current.may_stop = False


def _with_stops(items: Iterable[T], work: _Sliced) -> Iterator[T]:
    for item in items:
        work.take_one()
        yield item


class Slices:
    """Work to be done in slices, each begun when the one before it has ended."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], None]] = deque()
        self._current: _Sliced | None = None

    def __bool__(self) -> bool:
        """Say whether there is something to do."""
        return bool(self._waiting)

    def add(self, work: Callable[[], None]) -> None:
        """Have something done after all that was added before."""
        self._waiting.append(work)

    def go_on(self) -> None:
        """Do a slice of what is first. Raises what it raises, which ends it."""
        if self._current is None:
            self._current = _Sliced(self._waiting[0])
        try:
            self._current.switch()
        finally:
            if self._current.dead:
                self._current = None
                self._waiting.popleft()
