"""Where in a span of memory there is room: extents that are taken and given back. Pure: knows no bytes, only numbers.

Best fit, the lowest address among equals, out of a list of holes in the order of their addresses. Neighbouring holes are
always one, so a request fails only when no hole is large enough for it.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Generic, TypeVar

_OFFSET = attrgetter("offset")
_SIZE = attrgetter("size_bytes")
_Left = TypeVar("_Left")


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of bytes, at least one."""

    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        return self.offset + self.size_bytes


class Extents:
    """The holes of a span of ``size_bytes`` bytes, which is all hole at first."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._holes = [Extent(0, size_bytes)]

    @property
    def holes(self) -> tuple[Extent, ...]:
        """What is free, in the order of its addresses."""
        return tuple(self._holes)

    @property
    def largest_hole_bytes(self) -> int:
        return max(map(_SIZE, self._holes), default=0)

    def take(self, size_bytes: int) -> Extent | None:
        """Return room for ``size_bytes`` bytes, or None when no hole is that large."""
        assert size_bytes > 0
        hole = min((hole for hole in self._holes if hole.size_bytes >= size_bytes), key=_SIZE, default=None)
        if hole is None:
            return None
        taken = Extent(hole.offset, size_bytes)
        self.claim(taken)
        return taken

    def gather(self, size_bytes: int, most: int) -> tuple[Extent, ...] | None:
        """Return room for ``size_bytes`` bytes in at most ``most`` extents, as few as possible; None when that is not enough."""
        largest = sorted(self._holes, key=_SIZE, reverse=True)[:most]
        if sum(map(_SIZE, largest)) < size_bytes:
            return None
        taken = []
        for hole in largest:
            if size_bytes:
                taken.append(Extent(hole.offset, min(hole.size_bytes, size_bytes)))
                size_bytes -= taken[-1].size_bytes
                self.claim(taken[-1])
        return tuple(taken)

    def claim(self, extent: Extent) -> bool:
        """Take one extent; False, and nothing has changed, when part of it is taken already or outside the span."""
        assert extent.size_bytes > 0
        at = bisect.bisect_right(self._holes, extent.offset, key=_OFFSET) - 1
        if at < 0 or self._holes[at].end < extent.end:
            return False
        hole = self._holes[at]
        before = Extent(hole.offset, extent.offset - hole.offset)
        after = Extent(extent.end, hole.end - extent.end)
        self._holes[at : at + 1] = [rest for rest in (before, after) if rest.size_bytes]
        return True

    def give(self, extent: Extent) -> None:
        """Give back what was taken."""
        at = bisect.bisect_right(self._holes, extent.offset, key=_OFFSET)
        before = self._holes[at - 1] if at else None
        after = self._holes[at] if at < len(self._holes) else None
        assert extent.offset >= (before.end if before else 0), "an extent was given back twice"
        assert extent.end <= (after.offset if after else self.size_bytes), "an extent was given back twice"
        start, end = extent.offset, extent.end
        first, last = at, at
        if before and before.end == start:
            start, first = before.offset, at - 1
        if after and after.offset == end:
            end, last = after.end, at + 1
        self._holes[first:last] = [Extent(start, end - start)]

    def check_invariants(self) -> None:
        """Raise AssertionError when the holes are not what they should be."""
        end = -1
        for hole in self._holes:
            assert hole.size_bytes > 0, "a hole has no bytes"
            assert hole.offset > end, "two holes touch, overlap or are out of order"
            end = hole.end
        assert end <= self.size_bytes, "a hole lies outside the span"


class Remains(Generic[_Left]):
    """What is left in extents that were given back, none of which overlap, until something else is written there."""

    def __init__(self) -> None:
        self._offsets: list[int] = []
        self._at: dict[int, tuple[Extent, str, _Left]] = {}
        self._offset_of: dict[str, int] = {}

    def add(self, name: str, extent: Extent, left: _Left) -> None:
        """Note what is in an extent."""
        bisect.insort(self._offsets, extent.offset)
        self._at[extent.offset] = (extent, name, left)
        self._offset_of[name] = extent.offset

    def take(self, name: str) -> _Left | None:
        """Return what is left under a name, which is gone from here then; None when there is nothing."""
        offset = self._offset_of.pop(name, None)
        if offset is None:
            return None
        self._offsets.remove(offset)
        return self._at.pop(offset)[2]

    def overwrite(self, extent: Extent) -> None:
        """Forget all of which a part is in an extent."""
        for offset in list(self._touched(extent)):
            self._offsets.remove(offset)
            del self._offset_of[self._at.pop(offset)[1]]

    def _touched(self, extent: Extent) -> Iterator[int]:
        at = bisect.bisect_right(self._offsets, extent.offset)
        if at and self._at[self._offsets[at - 1]][0].end > extent.offset:
            yield self._offsets[at - 1]
        while at < len(self._offsets) and self._offsets[at] < extent.end:
            yield self._offsets[at]
            at += 1

    def __iter__(self) -> Iterator[tuple[Extent, str, _Left]]:
        return iter(self._at.values())
