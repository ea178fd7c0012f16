"""The device tier: which weight lies where in the one piece of memory that a device that copies has for them, its *span*.

The span is allocated once and is as large as the budget; here is decided what goes where in it, without asking the device for
memory ever again. A weight takes a range of whole ALIGN_BYTES, which is what counts against the budget. One that was let go of
can be had back as long as nothing was written over it. Where enough is free but no hole is large enough, weights are moved
together (``sidecar.compaction``): their bytes lie elsewhere then, and handles from before are of no use. Owned by the mover's
thread; ``compact`` is for whoever uses the handles, while that waits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Protocol

from trunkline.errors import TrunklineError

from sidecar.compaction import plan
from sidecar.errors import NoRoom, anew
from sidecar.extents import Extent, Extents, Remains
from sidecar.ir import Weight

# What CUDA's own allocations begin on, and wide loads need at most.
ALIGN_BYTES: Final = 256


class Span(Protocol):
    """Memory of a device in one piece; ``sidecar.span.Span`` is one. Offsets and sizes in bytes."""

    @property
    def size_bytes(self) -> int: ...
    def write(self, offset: int, content: memoryview) -> None: ...
    def mark(self) -> Any: ...
    def handle(self, offset: int, weight: Weight, mark: Any) -> object: ...
    def let_go(self) -> None: ...
    def move(self, source: int, target: int, size_bytes: int) -> None: ...


def aligned(size_bytes: int) -> int:
    """Return the bytes that a weight of ``size_bytes`` takes of a span."""
    return max(1, -(-size_bytes // ALIGN_BYTES)) * ALIGN_BYTES


@dataclass(slots=True)
class _Held:
    """A weight and its range. It has a handle once all of its bytes are there, or on their way."""

    weight: Weight
    extent: Extent
    handle: object | None = None


class DeviceTier:
    """The weights in a span, by digest."""

    def __init__(self, span: Span) -> None:
        self._span = span
        # Less than a whole ALIGN_BYTES at its end is of no use.
        self.budget_bytes = span.size_bytes // ALIGN_BYTES * ALIGN_BYTES
        self.allocated_bytes = 0
        # Times that weights were moved together, and bytes that were moved.
        self.compactions = 0
        self.compacted_bytes = 0
        self._extents = Extents(self.budget_bytes)
        self._held: dict[str, _Held] = {}
        # What was let go of and lies there as it was.
        self._remains: Remains[_Held] = Remains()

    def holds(self, key: str) -> bool:
        """Say whether a weight has a range, be its bytes there or not."""
        return key in self._held

    def take_back(self, key: str) -> bool:
        """Have a weight again that was let go of, if nothing was written over it yet; return whether that is so."""
        left = self._remains.take(key)
        if left is None:
            return False
        assert self._extents.claim(left.extent), "what is left lies in ranges of others"
        self._held[key] = left
        self.allocated_bytes += left.extent.size_bytes
        return True

    def allocate(self, weight: Weight) -> bool:
        """Take a range for a weight that has none; False when enough is free, but in pieces.

        Raises NoRoom when not enough is free: nobody has let go of what this one was to replace.
        """
        assert weight.digest not in self._held, "a weight has one range"
        needed_bytes = aligned(weight.size_bytes)
        if self.allocated_bytes + needed_bytes > self.budget_bytes:
            raise NoRoom(
                f"a weight takes {needed_bytes} bytes of the device: {self.allocated_bytes} of the budget of {self.budget_bytes} "
                "bytes are taken; let go of others first, or raise the memory budget",
                needed_bytes=needed_bytes,
                allocated_bytes=self.allocated_bytes,
                budget_bytes=self.budget_bytes,
            )
        self._remains.take(weight.digest)
        extent = self._extents.take(needed_bytes)
        if extent is None:
            return False
        self._remains.overwrite(extent)
        self._held[weight.digest] = _Held(weight, extent)
        self.allocated_bytes += extent.size_bytes
        return True

    def handle(self, key: str) -> object | None:
        """Return the handle of a weight whose bytes are there, None where they are not. Another one when it was moved."""
        held = self._held.get(key)
        return None if held is None else held.handle

    def offset(self, key: str) -> int:
        """Return where the range of a weight begins. It moves."""
        return self._held[key].extent.offset

    def seal(self, key: str, mark: Any) -> None:
        """Give a weight its handle: its bytes are there when the device has come to ``mark``."""
        held = self._held[key]
        held.handle = self._span.handle(held.extent.offset, held.weight, mark)

    def free(self, key: str) -> None:
        """Let go of a weight, of which nobody uses a handle any more."""
        held = self._held.pop(key)
        self._extents.give(held.extent)
        self.allocated_bytes -= held.extent.size_bytes
        if held.handle is not None:
            self._remains.add(key, held.extent, held)

    def compact(self, needed_bytes: int) -> Mapping[str, object]:
        """Move weights until one hole has so many bytes, which are free; return new handles of those that were moved.

        What was let go of cannot be had back after that. A weight whose bytes could not be moved is let go of; an error stands
        for its handle.
        """
        self._remains = Remains()
        keys = {held.extent: key for key, held in self._held.items()}
        moves = plan(sorted(keys, key=lambda extent: extent.offset), self.budget_bytes, needed_bytes)
        assert moves is not None, f"{needed_bytes} bytes are not free"
        self.compactions += 1
        moved: dict[str, object] = {}
        for move in moves:
            key = keys[move.source]
            held = self._held[key]
            self._extents.give(held.extent)
            assert self._extents.claim(move.target), "a weight moves to where others are"
            held.extent = move.target
            if held.handle is None:
                # Nothing is there yet.
                continue
            try:
                self._span.move(move.source.offset, move.offset, move.source.size_bytes)
            except TrunklineError as error:
                moved[key] = anew(error)
                held.handle = None
                self.free(key)
                continue
            self.compacted_bytes += move.source.size_bytes
            moved[key] = held.handle = self._span.handle(move.offset, held.weight, None)
        return moved

    def check_invariants(self) -> None:
        """Raise AssertionError when the books do not balance."""
        self._extents.check_invariants()
        extents = sorted((held.extent for held in self._held.values()), key=lambda extent: extent.offset)
        assert self.allocated_bytes == sum(extent.size_bytes for extent in extents), "allocated_bytes disagrees with the ranges"
        assert self.allocated_bytes <= self.budget_bytes, (
            f"{self.allocated_bytes} bytes are taken, the budget is {self.budget_bytes}"
        )
        places = sorted([*extents, *self._extents.holes], key=lambda extent: extent.offset)
        end = 0
        for extent in places:
            assert extent.offset == end, "ranges and holes do not fill the span"
            end = extent.end
        assert end == self.budget_bytes, "ranges and holes do not fill the span"
        for key, held in self._held.items():
            assert held.extent.size_bytes == aligned(held.weight.size_bytes), f"{key[:12]} has a range of another size"
        for extent, key, _ in self._remains:
            assert any(hole.offset <= extent.offset and extent.end <= hole.end for hole in self._extents.holes), (
                f"freed {key[:12]} lies in ranges of others"
            )
