"""Compaction: which ranges of a span must move so that what is free between them becomes one hole. Pure: knows only numbers.

Ranges slide down, in the order of their addresses, over the holes before them. Of all neighbouring holes that have enough bytes
together those are joined that have the fewest bytes of others between them. As long as as many bytes are free as are needed,
there is an answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sidecar.extents import Extent


class Move(NamedTuple):
    """One range, and where it is to begin. They may overlap; what is written to is either its own or was free before."""

    source: Extent
    offset: int

    @property
    def target(self) -> Extent:
        return Extent(self.offset, self.source.size_bytes)


def plan(taken: Sequence[Extent], size_bytes: int, needed_bytes: int) -> list[Move] | None:
    """Return the moves, in the order in which they must be made, after which one hole has ``needed_bytes``.

    ``taken`` are the ranges of a span of ``size_bytes``, in the order of their addresses. None when too little is free.
    """
    holes = _holes(taken, size_bytes)
    best: tuple[int, int, int] | None = None
    first, free_bytes, moved_bytes = 0, 0, 0
    for last, hole_bytes in enumerate(holes):
        free_bytes += hole_bytes
        moved_bytes += taken[last - 1].size_bytes if last > first else 0
        while first < last and free_bytes - holes[first] >= needed_bytes:
            free_bytes -= holes[first]
            moved_bytes -= taken[first].size_bytes
            first += 1
        if free_bytes >= needed_bytes and (best is None or moved_bytes < best[0]):
            best = (moved_bytes, first, last)
    if best is None:
        return None
    _, first, last = best
    offset = taken[first - 1].end if first else 0
    moves = []
    for extent in taken[first:last]:
        # The first of the holes is one: else they would do without it.
        moves.append(Move(extent, offset))
        offset += extent.size_bytes
    return moves


def _holes(taken: Sequence[Extent], size_bytes: int) -> list[int]:
    """Return the bytes that are free before each range, and after the last."""
    starts = [0, *(extent.end for extent in taken)]
    ends = [*(extent.offset for extent in taken), size_bytes]
    return [end - start for start, end in zip(starts, ends, strict=True)]
