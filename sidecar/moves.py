"""Moves: which weights were brought in and which left, for whom and why; the latest, in a ring. Pure: no I/O, no torch.

For people who look on: what happens again within a second, weight by weight, is one move with more bytes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

# Why weights were brought in; why they leave is ``sidecar.residency.REASONS``.
FETCH: Final = "fetch"
_MOST: Final = 64
_SAME_S: Final = 1.0


@dataclass(slots=True)
class Move:
    """``id`` stays while it grows, ``number`` is that of its latest change. ``plans`` wanted the weights, or had them."""

    id: int
    number: int
    at_s: float
    reason: str
    plans: tuple[str, ...]
    weight_count: int
    size_bytes: int


class Moves:
    """The latest moves."""

    def __init__(self) -> None:
        self._moves: deque[Move] = deque(maxlen=_MOST)
        self.last = 0

    def note(self, reason: str, plans: Iterable[str], weight_count: int, size_bytes: int, now_s: float) -> None:
        """Note that weights of some plans moved."""
        self.last += 1
        found = tuple(sorted(plans))
        before = self._moves[-1] if self._moves else None
        if before is not None and (before.reason, before.plans) == (reason, found) and now_s - before.at_s < _SAME_S:
            before.number = self.last
            before.weight_count += weight_count
            before.size_bytes += size_bytes
            return
        self._moves.append(Move(self.last, self.last, now_s, reason, found, weight_count, size_bytes))

    def since(self, number: int) -> list[Move]:
        """Return the moves that came or grew after ``number``, oldest first."""
        return [move for move in self._moves if move.number > number]
