"""Weights in memory, by key, in a segment that outlives the process: an engine that was killed is back with all of them.

Bytes are written in place and then *sealed*: a record in the segment's ledger says where they lie, and becomes valid by one last
store of a word. A process may be killed between any two instructions: a key is there whole, or it is not there, and what belongs
to no valid record returns to the system when the next engine attaches. That costs no look at the bytes; ``check`` compares them
with their checksum, to be called before their first use.

Pages are reserved before anything is written. Those that are let go of are kept for what comes next, within the budget: to
clear and map new ones takes as long as reading them from a fast disk. Until then a key that was freed can be had back as it
was. ``trim`` punches them out of the segment, and so does whatever needs pages elsewhere. Extents take whole pages, and that
is what counts against the budget. Owned by one thread; others may fill and read the views it gives out.
"""

from __future__ import annotations

import itertools
import logging
import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from isal import isal_zlib
from trunkline.arena import page_aligned

from sidecar.errors import NoRoom
from sidecar.extents import Extent, Extents, Remains
from sidecar.segment import LEDGER_END, LEDGER_OFFSET, RECORD, RECORD_LIMIT, read_budget, reserve

log = logging.getLogger("trunkline.hosttier")

_WORD_BYTES: Final = 4
_KEY_BYTES: Final = 32
_RECORD_WORDS: Final = RECORD.size // _WORD_BYTES
# The seal is the last word of a record.
_FIRST_SEAL: Final = LEDGER_OFFSET // _WORD_BYTES + _RECORD_WORDS - 1


@dataclass(slots=True)
class _Held:
    """One key: its place in the ledger, its pages, how many bytes of them are its own; their checksum once they are sealed."""

    slot: int
    extent: Extent
    size_bytes: int
    crc32: int | None = None


class HostTier:
    """The weights of one segment. One at a time may exist per segment, in all processes together."""

    def __init__(self, descriptor: int) -> None:
        """Map the segment, take over what is whole, and give the rest back to the system. The descriptor stays the caller's."""
        self.budget_bytes = read_budget(descriptor)
        self.allocated_bytes = 0
        self._descriptor = descriptor
        self._mapping = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        self._view = memoryview(self._mapping)
        # Native words: storing one is one instruction, which happens or does not.
        self._words = self._view[:LEDGER_END].cast("I")
        self._extents = Extents(len(self._view))
        self._extents.claim(Extent(0, LEDGER_END))
        # Pages that were let go of; to ``_extents`` they are taken.
        self._spare = Extents(len(self._view))
        self._spare.claim(Extent(0, len(self._view)))
        self.spare_bytes = 0
        # Keys that were freed and lie in spare pages as they were.
        self._remains: Remains[_Held] = Remains()
        self._held: dict[str, _Held] = {}
        self._take_over()
        # Slots below the first that was never used; then come the others.
        used = {held.slot for held in self._held.values()}
        self._next_slot = max(used, default=-1) + 1
        self._free_slots = [slot for slot in range(self._next_slot) if slot not in used]
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
        for slot, seal in self._seals():
            if not self._is_taken_over(slot, seal):
                self._words[_FIRST_SEAL + slot * _RECORD_WORDS] = 0
                dropped_count += 1
        if dropped_count:
            log.error(
                "%d records of the weights kept in memory make no sense and are dropped; they are loaded again", dropped_count
            )

    def _is_taken_over(self, slot: int, seal: int) -> bool:
        body = self._body(slot)
        raw, offset, size_bytes, crc32, _ = RECORD.unpack(body + bytes(_WORD_BYTES))
        key, extent = raw.hex(), Extent(offset, page_aligned(size_bytes))
        if (
            seal != _seal_of(body)
            or offset % mmap.PAGESIZE
            or key in self._held
            or self.allocated_bytes + extent.size_bytes > self.budget_bytes
            # Last, because it takes the extent: false when it overlaps another or leaves the segment.
            or not self._extents.claim(extent)
        ):
            return False
        self._held[key] = _Held(slot, extent, size_bytes, crc32)
        self.allocated_bytes += extent.size_bytes
        return True

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
        if len(self._held) == RECORD_LIMIT:
            raise self._refusal(f"{RECORD_LIMIT} weights are held, which is the most; let go of others first", needed_bytes)
        extent = self._spare.take(needed_bytes)
        if extent is None:
            extent = self._new_pages(key, needed_bytes)
        else:
            self.spare_bytes -= needed_bytes
            self._remains.overwrite(extent)
        self._hold(key, extent, size_bytes)
        return self.view(key)

    def _hold(self, key: str, extent: Extent, size_bytes: int) -> None:
        self._held[key] = _Held(self._free_slot(), extent, size_bytes)
        self.allocated_bytes += extent.size_bytes

    def take_back(self, key: str) -> bool:
        """Have a freed key again, sealed, if nothing was written over it yet; return whether that is so."""
        left = self._remains.take(key)
        if left is None or left.crc32 is None:
            return False
        self._spare.claim(left.extent)
        self.spare_bytes -= left.extent.size_bytes
        self._hold(key, left.extent, left.size_bytes)
        self.seal(key, left.crc32)
        return True

    def _new_pages(self, key: str, needed_bytes: int) -> Extent:
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
            reserve(self._descriptor, extent.offset, extent.size_bytes, f"weight {key[:12]}")
        except BaseException:
            # Some of its pages may be there.
            self._punch(extent)
            self._extents.give(extent)
            raise
        return extent

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

    def _free_slot(self) -> int:
        if self._free_slots:
            return self._free_slots.pop()
        self._next_slot += 1
        return self._next_slot - 1

    def seal(self, key: str, crc32: int) -> None:
        """State that the bytes of an allocated key are whole: from here on they survive this process."""
        held = self._held[key]
        assert held.crc32 is None, "a key can be sealed once"
        start = LEDGER_OFFSET + held.slot * RECORD.size
        RECORD.pack_into(self._view, start, bytes.fromhex(key), held.extent.offset, held.size_bytes, crc32, 0)
        self._words[_FIRST_SEAL + held.slot * _RECORD_WORDS] = _seal_of(self._body(held.slot))
        held.crc32 = crc32

    def view(self, key: str) -> memoryview:
        """Return the bytes of a key, sealed or not, writable. They must not be touched after it was freed."""
        held = self._held[key]
        return self._view[held.extent.offset : held.extent.offset + held.size_bytes]

    def pages(self, key: str) -> memoryview:
        """Return the whole pages of a key, of which its bytes are the first."""
        held = self._held[key]
        return self._view[held.extent.offset : held.extent.end]

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
        held = self._held[key]
        assert held.crc32 is not None, "only sealed bytes have a checksum"
        found = isal_zlib.crc32(self.view(key))
        if found == held.crc32:
            return True
        log.error("weight %s was altered in memory: checksum %08x instead of %08x; it is dropped", key, found, held.crc32)
        self.free(key)
        self._remains.take(key)
        return False

    def free(self, key: str) -> None:
        """Let go of a key; its pages are kept for others, until ``trim``."""
        held = self._held[key]
        self._words[_FIRST_SEAL + held.slot * _RECORD_WORDS] = 0
        del self._held[key]
        self._spare.give(held.extent)
        self.spare_bytes += held.extent.size_bytes
        self._free_slots.append(held.slot)
        self.allocated_bytes -= held.extent.size_bytes
        if held.crc32 is not None:
            self._remains.add(key, held.extent, held)

    def keys(self) -> dict[str, int]:
        """Return the sealed keys and their bytes, those of earlier engines included."""
        return {key: held.size_bytes for key, held in self._held.items() if held.crc32 is not None}

    @property
    def resident_bytes(self) -> int:
        """Memory the segment takes beside its ledger, as the system counts it: ``allocated_bytes`` and ``spare_bytes``."""
        return os.fstat(self._descriptor).st_blocks * 512 - LEDGER_END

    # --- the segment -------------------------------------------------------------------------------------------------

    def _seals(self) -> Iterator[tuple[int, int]]:
        """Yield the slots in use and their seals."""
        seals = self._words[_FIRST_SEAL::_RECORD_WORDS].tolist()
        # Most are zero; what skips them is not Python.
        return itertools.compress(enumerate(seals), seals)

    def _body(self, slot: int) -> bytes:
        """Return a record without its seal."""
        start = LEDGER_OFFSET + slot * RECORD.size
        return bytes(self._view[start : start + RECORD.size - _WORD_BYTES])

    def _punch(self, extent: Extent) -> None:
        self._mapping.madvise(mmap.MADV_REMOVE, extent.offset, extent.size_bytes)

    def check_invariants(self) -> None:
        """Raise AssertionError when books, ledger and system disagree."""
        self._extents.check_invariants()
        allocated_bytes = sum(held.extent.size_bytes for held in self._held.values())
        free_bytes = sum(hole.size_bytes for hole in self._extents.holes)
        self._spare.check_invariants()
        assert self.spare_bytes == sum(hole.size_bytes for hole in self._spare.holes), "spare_bytes disagrees with the pages"
        for extent, key, _ in self._remains:
            assert any(hole.offset <= extent.offset and extent.end <= hole.end for hole in self._spare.holes), (
                f"freed {key[:12]} lies in pages of others"
            )
        assert self.allocated_bytes == allocated_bytes, "allocated_bytes disagrees with the extents"
        kept_bytes = allocated_bytes + self.spare_bytes
        assert kept_bytes <= self.budget_bytes, f"{kept_bytes} bytes are held, the budget is {self.budget_bytes}"
        assert LEDGER_END + kept_bytes + free_bytes == len(self._view), "extents and holes do not fill the segment"
        assert self.resident_bytes == kept_bytes, f"{self.resident_bytes} bytes are in memory, not {kept_bytes}"
        slots = [held.slot for held in self._held.values()]
        assert sorted((*slots, *self._free_slots)) == list(range(self._next_slot)), "a slot is lost, or has two owners"
        written = {slot: self._body(slot) for slot, _ in self._seals()}
        expected = {
            held.slot: RECORD.pack(bytes.fromhex(key), held.extent.offset, held.size_bytes, held.crc32, 0)[:-_WORD_BYTES]
            for key, held in self._held.items()
            if held.crc32 is not None
        }
        assert written == expected, "the ledger disagrees with the books"

    def close(self) -> None:
        """Unmap the segment, which stays as it is. Raises BufferError while a view of it is in use.

        An engine that ends need not call it: the kernel unmaps what a process leaves.
        """
        self._words.release()
        self._view.release()
        self._mapping.close()


def _seal_of(body: bytes) -> int:
    """Return the word that makes a record valid: a checksum of it, never zero, which stands for none."""
    return isal_zlib.crc32(body) or 1
