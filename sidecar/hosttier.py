"""Weights in memory, by key, in a segment that outlives the process: an engine that was killed is back with all of them.

Bytes are written in place and then *sealed*: a record in the segment's ledger says where they lie (``sidecar.ledger``). A process
may be killed between any two instructions: a key is there whole, or it is not there, and what belongs to no valid record returns
to the system when the next engine attaches. That costs no look at the bytes; ``check`` compares them with their checksum, to be
called before their first use.

Pages are reserved before anything is written. Those that are let go of are kept for what comes next, within the budget: to clear
and map new ones takes as long as reading them from a fast disk. Until then a key that was freed can be had back as it was, if it
lies in one hole. Where none is large enough, a weight lies in several, mapped side by side (``sidecar.glued``). The more often
that is done the smaller they get: so there is a limit to it, beyond which new pages are taken. ``trim`` punches free pages
out of the segment, and so does whatever needs pages elsewhere. Extents take whole pages, and that is what counts against the
budget. Owned by one thread; others may fill and read the views it gives out.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from isal import isal_zlib
from trunkline.arena import page_aligned

from sidecar.errors import NoRoom
from sidecar.extents import Extent, Extents, Remains
from sidecar.glued import glue, most_mappings
from sidecar.ledger import Ledger, Record
from sidecar.segment import LEDGER_END, RECORD_LIMIT, punch, read_budget, reserve

log = logging.getLogger("trunkline.hosttier")

_KEY_BYTES: Final = 32
# In so many pieces a weight may lie. Each is a record in the ledger, and an entry in the kernel's list of mappings.
_MOST_PIECES: Final = 64


@dataclass(slots=True)
class _Held:
    """One key: its extents, with a slot in the ledger each; its pages as they are mapped; how many of their bytes are its own.

    ``crc32`` is that of its bytes once they are sealed.
    """

    extents: tuple[Extent, ...]
    slots: tuple[int, ...]
    pages: memoryview
    size_bytes: int
    crc32: int | None = None


class HostTier:
    """The weights of one segment. One at a time may exist per segment, in all processes together."""

    def __init__(self, descriptor: int, budget_bytes: int | None = None) -> None:
        """Map the segment, take over what is whole, and give the rest back to the system. The descriptor stays the caller's.

        ``budget_bytes`` may be less than the segment was made for.
        """
        made_for_bytes = read_budget(descriptor)
        self.budget_bytes = made_for_bytes if budget_bytes is None else min(budget_bytes, made_for_bytes)
        self.allocated_bytes = 0
        self._descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._view = memoryview(self._mapping)
        self._ledger = Ledger(self._view)
        self._extents = Extents(len(self._view))
        self._extents.claim(Extent(0, LEDGER_END))
        # Pages that were let go of; to ``_extents`` they are taken.
        self._spare = Extents(len(self._view))
        self._spare.claim(Extent(0, len(self._view)))
        self.spare_bytes = 0
        # Pieces of the weights that lie in several, and how many there may be.
        self._glued_count = 0
        self._most_glued = min(most_mappings(), RECORD_LIMIT) // 4
        # Keys that were freed and lie in spare pages as they were.
        self._remains: Remains[_Held] = Remains()
        self._held: dict[str, _Held] = {}
        self._take_over()
        for hole in self._extents.holes:
            self._punch(hole)
        if self.resident_bytes < self.allocated_bytes:
            # Somebody else took them. To touch a page that is missing may be a signal, when there is no other to be had.
            log.error(
                "of %d bytes of weights kept in memory %d are missing; all are loaded again",
                *(self.allocated_bytes, self.allocated_bytes - self.resident_bytes),
            )
            for key in list(self._held):
                self.free(key)
            # Nor are their pages good for others.
            self.trim()
        log.info("%d weights, %d bytes, were still in memory", len(self._held), self.allocated_bytes)

    def _take_over(self) -> None:
        dropped_count = 0
        found: dict[str, dict[int, tuple[int, Record]]] = {}
        for slot, record in self._ledger.take_over():
            if record is None or not self._is_taken_over(record, found.get(record.key, {})):
                self._ledger.clear(slot)
                dropped_count += 1
                continue
            found.setdefault(record.key, {})[record.piece] = (slot, record)
            self.allocated_bytes += page_aligned(record.size_bytes)
        for key, pieces in found.items():
            slots, records = zip(*(pieces[number] for number in sorted(pieces)), strict=True)
            extents = tuple(_extent_of(record) for record in records)
            # Else, whoever was about to seal it, or to let go of it, was killed.
            if len(records) == records[0].piece_count:
                with contextlib.suppress(OSError):
                    size_bytes = sum(record.size_bytes for record in records)
                    self._held[key] = _Held(extents, slots, self._mapped(extents), size_bytes, records[0].crc32)
                    self._glued_count += _glued_count(extents)
                    continue
            for slot, extent in zip(slots, extents, strict=True):
                self._ledger.clear(slot)
                self._extents.give(extent)
                self.allocated_bytes -= extent.size_bytes
        if dropped_count:
            log.error(
                "%d records of the weights kept in memory make no sense and are dropped; they are loaded again", dropped_count
            )

    def _is_taken_over(self, record: Record, pieces: dict[int, tuple[int, Record]]) -> bool:
        """Take the extent of a record that makes sense beside those of its key; ``pieces`` are those found so far."""
        _, first = next(iter(pieces.values()), (0, record))
        is_last, extent = record.piece == record.piece_count - 1, _extent_of(record)
        return (
            record.piece not in pieces
            and record.piece < record.piece_count
            and (record.piece_count, record.crc32) == (first.piece_count, first.crc32)
            and not record.offset % mmap.PAGESIZE
            and (is_last or not record.size_bytes % mmap.PAGESIZE)
            and self.allocated_bytes + extent.size_bytes <= self.budget_bytes
            # Last, because it takes the extent: false when it overlaps another or leaves the segment.
            and self._extents.claim(extent)
        )

    # --- keys --------------------------------------------------------------------------------------------------------

    def allocate(self, key: str, size_bytes: int) -> memoryview:
        """Return room for the bytes of ``key``, 64 hexadecimal digits, which is not there yet. Raises NoRoom.

        What is in it is of no meaning, and lost with this process until it is sealed.
        """
        assert bytes.fromhex(key).hex() == key, "a key is lower-case hexadecimal"
        assert len(key) == 2 * _KEY_BYTES, "a key has 64 digits"
        assert key not in self._held, "a key can be allocated once"
        self._remains.take(key)
        needed_bytes = page_aligned(size_bytes)
        if self.allocated_bytes + needed_bytes > self.budget_bytes:
            raise self._refusal(
                f"{self.allocated_bytes} of the budget of {self.budget_bytes} bytes are taken; let go of others first, or raise "
                "the memory budget",
                needed_bytes,
            )
        if self._ledger.used_count + _MOST_PIECES > RECORD_LIMIT:
            raise self._refusal(
                f"{self._ledger.used_count} of {RECORD_LIMIT} records are taken, and it may need {_MOST_PIECES}; let go of "
                "others first",
                needed_bytes,
            )
        extents, pages = self._spare_pages(needed_bytes) or self._new_pages(key, needed_bytes)
        self._hold(key, extents, pages, size_bytes)
        return self.view(key)

    def _hold(self, key: str, extents: tuple[Extent, ...], pages: memoryview, size_bytes: int) -> None:
        slots = tuple(self._ledger.take() for _ in extents)
        self._held[key] = _Held(extents, slots, pages, size_bytes)
        self._glued_count += _glued_count(extents)
        self.allocated_bytes += len(pages)

    def _spare_pages(self, needed_bytes: int) -> tuple[tuple[Extent, ...], memoryview] | None:
        """Return pages that were let go of, as few pieces as possible and how they are mapped; None when there are too few."""
        # Mappings and records are for others, too: without one neither torch nor a thread gets memory, nor a weight a place.
        most = max(0, min(_MOST_PIECES, self._most_glued - self._glued_count))
        hole = self._spare.take(needed_bytes)
        extents = self._spare.gather(needed_bytes, most) if hole is None else (hole,)
        if extents is None:
            return None
        try:
            pages = self._mapped(extents)
        except OSError as error:
            log.warning("%d pieces of memory cannot be used as one (%s); new pages are", len(extents), error.strerror)
            for extent in extents:
                self._spare.give(extent)
            return None
        self.spare_bytes -= needed_bytes
        for extent in extents:
            self._remains.overwrite(extent)
        return extents, pages

    def _mapped(self, extents: tuple[Extent, ...]) -> memoryview:
        """Return the pages of extents, one after the other. Raises OSError when the system will not map several as one."""
        if len(extents) > 1:
            return memoryview(glue(self._descriptor, extents))
        return self._view[extents[0].offset : extents[0].end]

    def take_back(self, key: str) -> bool:
        """Have a freed key again, sealed, if nothing was written over it yet; return whether that is so."""
        left = self._remains.take(key)
        if left is None or left.crc32 is None or self._ledger.used_count >= RECORD_LIMIT:
            return False
        for extent in left.extents:
            self._spare.claim(extent)
        self.spare_bytes -= len(left.pages)
        self._hold(key, left.extents, left.pages, left.size_bytes)
        self.seal(key, left.crc32)
        return True

    def _new_pages(self, key: str, needed_bytes: int) -> tuple[tuple[Extent, ...], memoryview]:
        self._punch_spares(self.allocated_bytes + self.spare_bytes + needed_bytes - self.budget_bytes)
        extent = self._extents.take(needed_bytes)
        if extent is None:
            self.trim()
            extent = self._extents.take(needed_bytes)
        if extent is None:
            raise self._refusal(
                f"the largest hole between others has {self._extents.largest_hole_bytes}; let go of others first", needed_bytes
            )
        try:
            self._reserve(extent, f"weight {key[:12]}")
        except BaseException:
            # Some of its pages may be there.
            self._punch(extent)
            self._extents.give(extent)
            raise
        return (extent,), self._mapped((extent,))

    def _reserve(self, extent: Extent, what: str) -> None:
        """Have pages set aside for an extent. Raises NoRoom when there are none, not even with the spare ones given back."""
        try:
            reserve(self._descriptor, extent.offset, extent.size_bytes, what)
        except NoRoom:
            if not self.spare_bytes:
                raise
            # Others have taken of the system's memory what the budget still allows.
            self.trim()
            reserve(self._descriptor, extent.offset, extent.size_bytes, what)

    def trim(self) -> None:
        """Give the pages that were let go of back to the system."""
        self._punch_spares(self.spare_bytes)

    def _punch_spares(self, size_bytes: int) -> None:
        # The smallest first: they are the least use.
        for hole in sorted(self._spare.holes, key=lambda hole: hole.size_bytes):
            if size_bytes <= 0:
                break
            self._punch(hole)
            self._remains.overwrite(hole)
            self._spare.claim(hole)
            self._extents.give(hole)
            self.spare_bytes -= hole.size_bytes
            size_bytes -= hole.size_bytes

    def _refusal(self, reason: str, needed_bytes: int) -> NoRoom:
        return NoRoom(
            f"a weight takes {needed_bytes} bytes of whole pages: {reason}",
            needed_bytes=needed_bytes,
            allocated_bytes=self.allocated_bytes,
            budget_bytes=self.budget_bytes,
        )

    def seal(self, key: str, crc32: int) -> None:
        """State that the bytes of an allocated key are whole: from here on they survive this process."""
        held = self._held[key]
        assert held.crc32 is None, "a key can be sealed once"
        for slot, record in zip(held.slots, _records(key, held, crc32), strict=True):
            self._ledger.write(slot, record)
        held.crc32 = crc32

    def view(self, key: str) -> memoryview:
        """Return the bytes of a key, sealed or not, writable. They must not be touched after it was freed."""
        held = self._held[key]
        return held.pages[: held.size_bytes]

    def pages(self, key: str) -> memoryview:
        """Return the whole pages of a key, of which its bytes are the first."""
        return self._held[key].pages[:]

    def holds(self, key: str) -> bool:
        """Say whether a key was allocated, sealed or not."""
        return key in self._held

    def __contains__(self, key: str) -> bool:
        held = self._held.get(key)
        return held is not None and held.crc32 is not None

    def checksum(self, key: str) -> int | None:
        """Return the checksum a key was sealed with, None before that."""
        return self._held[key].crc32

    def check(self, key: str) -> bool:
        """Return whether the bytes of a sealed key are those that were sealed; if not, the key is freed. Reads them all."""
        if self.is_whole(key):
            return True
        self.free(key)
        self._remains.take(key)
        return False

    def is_whole(self, key: str) -> bool:
        """Return whether the bytes of a sealed key are those that were sealed. Reads them all."""
        held = self._held[key]
        assert held.crc32 is not None, "only sealed bytes have a checksum"
        found = isal_zlib.crc32(self.view(key))
        if found != held.crc32:
            log.error("weight %s was altered in memory: checksum %08x instead of %08x", key, found, held.crc32)
        return found == held.crc32

    def free(self, key: str) -> None:
        """Let go of a key; its pages are kept for others, until ``trim``."""
        held = self._held[key]
        for slot in held.slots:
            self._ledger.clear(slot)
        del self._held[key]
        for extent in held.extents:
            self._spare.give(extent)
        self.spare_bytes += len(held.pages)
        self.allocated_bytes -= len(held.pages)
        self._glued_count -= _glued_count(held.extents)
        # One in pieces would have to be watched piece by piece.
        if held.crc32 is not None and len(held.extents) == 1:
            self._remains.add(key, held.extents[0], held)

    def keys(self) -> dict[str, int]:
        """Return the sealed keys and their bytes, those of earlier engines included."""
        return {key: held.size_bytes for key, held in self._held.items() if held.crc32 is not None}

    @property
    def resident_bytes(self) -> int:
        """Memory the segment takes beside its ledger, as the system counts it: ``allocated_bytes`` and ``spare_bytes``."""
        return os.fstat(self._descriptor).st_blocks * 512 - LEDGER_END

    # --- the segment -------------------------------------------------------------------------------------------------

    def _punch(self, extent: Extent) -> None:
        punch(self._descriptor, extent.offset, extent.size_bytes)

    def check_invariants(self) -> None:
        """Raise AssertionError when books, ledger and system disagree."""
        self._extents.check_invariants()
        allocated_bytes = sum(extent.size_bytes for held in self._held.values() for extent in held.extents)
        free_bytes = sum(hole.size_bytes for hole in self._extents.holes)
        self._spare.check_invariants()
        assert self.spare_bytes == sum(hole.size_bytes for hole in self._spare.holes), "spare_bytes disagrees with the pages"
        for extent, key, _ in self._remains:
            assert any(hole.offset <= extent.offset and extent.end <= hole.end for hole in self._spare.holes), (
                f"freed {key[:12]} lies in pages of others"
            )
        assert self.allocated_bytes == allocated_bytes, "allocated_bytes disagrees with the extents"
        glued_count = sum(_glued_count(held.extents) for held in self._held.values())
        assert self._glued_count == glued_count, "pieces are miscounted"
        kept_bytes = allocated_bytes + self.spare_bytes
        assert kept_bytes <= self.budget_bytes, f"{kept_bytes} bytes are held, the budget is {self.budget_bytes}"
        assert LEDGER_END + kept_bytes + free_bytes == len(self._view), "extents and holes do not fill the segment"
        assert self.resident_bytes == kept_bytes, f"{self.resident_bytes} bytes are in memory, not {kept_bytes}"
        self._ledger.check_invariants(slot for held in self._held.values() for slot in held.slots)
        expected = {
            slot: record
            for key, held in self._held.items()
            if held.crc32 is not None
            for slot, record in zip(held.slots, _records(key, held, held.crc32), strict=True)
        }
        assert dict(self._ledger.records()) == expected, "the ledger disagrees with the books"

    def close(self) -> None:
        """Unmap the segment, which stays as it is. Raises BufferError while a view of it is in use.

        An engine that ends need not call it: the kernel unmaps what a process leaves.
        """
        for held in self._held.values():
            held.pages.release()
        for _, _, left in self._remains:
            left.pages.release()
        self._ledger.close()
        self._view.release()
        self._mapping.close()


def _glued_count(extents: tuple[Extent, ...]) -> int:
    return len(extents) if len(extents) > 1 else 0


def _extent_of(record: Record) -> Extent:
    return Extent(record.offset, page_aligned(record.size_bytes))


def _records(key: str, held: _Held, crc32: int) -> Iterable[Record]:
    """Yield the records of a key, a piece each."""
    left_bytes = held.size_bytes
    for number, extent in enumerate(held.extents):
        yield Record(key, extent.offset, min(left_bytes, extent.size_bytes), crc32, number, len(held.extents))
        left_bytes -= extent.size_bytes
