"""The ledger: records in shared memory of where weights lie, each of them there whole or not there at all.

A record is written without its last word, the *seal*, a checksum of all before it; then that is stored, by one instruction,
which happens or does not. Zero stands for none. A weight that lies in several pieces has a record for each, with its number and
how many there are: it is whole when all of them are. Owned by one thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple

from isal import isal_zlib

from sidecar.segment import LEDGER_END, LEDGER_OFFSET, RECORD, RECORD_LIMIT

_WORD_BYTES: Final = 4
_RECORD_WORDS: Final = RECORD.size // _WORD_BYTES
_FIRST_SEAL: Final = LEDGER_OFFSET // _WORD_BYTES + _RECORD_WORDS - 1


class Record(NamedTuple):
    """One piece: ``size_bytes`` of a weight, from ``offset`` on. ``crc32`` is that of the whole weight."""

    key: str
    offset: int
    size_bytes: int
    crc32: int
    piece: int = 0
    piece_count: int = 1


class Ledger:
    """Records by *slot*, a number below RECORD_LIMIT. Slots are taken before they are written."""

    def __init__(self, view: memoryview) -> None:
        """Map the ledger of a segment, to be taken over; ``view`` begins where the segment does."""
        self._view = view[:LEDGER_END]
        # Native words: storing one is one instruction.
        self._words = self._view.cast("I")
        # Slots below the first that was never used; then come the others.
        self._next = 0
        self._free: list[int] = []

    def take_over(self) -> list[tuple[int, Record | None]]:
        """Return what is written, as ``records`` yields it; its slots are taken. Called once, before all else."""
        found = list(self.records())
        used = {slot for slot, _ in found}
        self._next = max(used, default=-1) + 1
        self._free = [slot for slot in range(self._next) if slot not in used]
        return found

    @property
    def used_count(self) -> int:
        return self._next - len(self._free)

    def take(self) -> int:
        """Return a slot that nobody has. The caller sees to it that there is one."""
        if self._free:
            return self._free.pop()
        self._next += 1
        return self._next - 1

    def write(self, slot: int, record: Record) -> None:
        """Write a record into a slot that was taken, and seal it."""
        start = LEDGER_OFFSET + slot * RECORD.size
        RECORD.pack_into(self._view, start, bytes.fromhex(record.key), *record[1:], 0)
        self._words[_FIRST_SEAL + slot * _RECORD_WORDS] = _seal_of(self._body(slot))

    def clear(self, slot: int) -> None:
        """Give a slot back; what is written there is not there any more."""
        self._words[_FIRST_SEAL + slot * _RECORD_WORDS] = 0
        self._free.append(slot)

    def records(self) -> Iterator[tuple[int, Record | None]]:
        """Yield the slots that have something written, with the record, or None where the seal is not its own."""
        for slot, seal in self._seals():
            body = self._body(slot)
            raw, *numbers, _ = RECORD.unpack(body + bytes(_WORD_BYTES))
            yield slot, Record(raw.hex(), *numbers) if seal == _seal_of(body) else None

    def _seals(self) -> list[tuple[int, int]]:
        seals = self._words[_FIRST_SEAL::_RECORD_WORDS].tolist()
        # Most are zero; what skips them is not Python.
        return list(itertools.compress(enumerate(seals), seals))

    def _body(self, slot: int) -> bytes:
        """Return a record without its seal."""
        start = LEDGER_OFFSET + slot * RECORD.size
        return bytes(self._view[start : start + RECORD.size - _WORD_BYTES])

    def check_invariants(self, held: Iterable[int]) -> None:
        """Raise AssertionError unless the slots that were taken are those that are held."""
        assert sorted((*held, *self._free)) == list(range(self._next)), "a slot is lost, or has two owners"
        assert self.used_count <= RECORD_LIMIT

    def close(self) -> None:
        self._words.release()
        self._view.release()


def _seal_of(body: bytes) -> int:
    """Return the word that makes a record valid: a checksum of it, never zero."""
    return isal_zlib.crc32(body) or 1
