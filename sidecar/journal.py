"""The journal: for whom each device computes at this moment, in memory that outlives the engine.

An engine may die of what it computes, at any line and without a word. The supervisor makes a journal for each engine before it
forks it, and reads it when the engine is dead, or takes too long (``sidecar.watchdog``). Writing costs no system call: it is
memory that both have. It has no name, and ends with the last of the two.

A device has *slots*, one for each run that is under way on it. A slot's head is written with a sequence number first and the
same one last: an entry counts while both are equal and odd. Where they differ it is being written, or is over. Beside the slots
are *marks*, a byte each, by which an engine tells the supervisor which of its suspects are none, and of which an operator wants
nothing to be remembered (``sidecar.quarantine``).
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

import msgpack
from trunkline.arena import page_aligned

MOST_MARKS: Final = 1024
# One for each lane there can be, and one for the engine's own thread.
_SLOTS: Final = 65
# Native, so that a number is stored by one instruction.
_WORD: Final = struct.Struct("Q")
# Sequence number; when it began, and how long it is reckoned to take (0: nobody knows); how many calls, and the bytes that name
# them; sequence number.
_HEAD: Final = struct.Struct("QddQQQ")
# What does not fit is left out: of a batch for hundreds, some are known.
_NAMES_BYTES: Final = 16384
_CLEARED, _LIFTED = 1, 2


class Asked(NamedTuple):
    """A call: whose, for which model as the engine knows it, and the id that its function gave it."""

    tenant: str
    model: str
    call_id: str


class Running(NamedTuple):
    """A run: ``place`` and ``sequence`` tell it from all others of this engine. ``began_s`` is a time of the engine's clock.

    ``expected_s`` is what it was measured or reckoned to take, 0 where nobody knows.
    """

    place: int
    sequence: int
    began_s: float
    expected_s: float
    call_count: int


class Entry(NamedTuple):
    """A run and the calls it is for, all of them unless there was no room for their names."""

    running: Running
    calls: tuple[Asked, ...]


class Journal:
    """The journal of one engine, for so many devices. Made by the supervisor, which reads it; the engine writes ``page``s."""

    def __init__(self, device_count: int = 1) -> None:
        self._slot_count = device_count * _SLOTS
        self._names_offset = page_aligned(MOST_MARKS + self._slot_count * _HEAD.size)
        # Addresses; memory only where something is written.
        self._memory = mmap.mmap(-1, self._names_offset + self._slot_count * _NAMES_BYTES)

    def page(self, device: int) -> Page:
        """Return where the engine of one device writes."""
        places = range(device * _SLOTS, (device + 1) * _SLOTS)
        return Page(self._memory, {place: (self._head(place), self._names(place)) for place in places})

    def close(self) -> None:
        """Let go of the memory. What the other process has of it stays."""
        self._memory.close()

    def mark(self, number: int) -> None:
        """Set a mark below MOST_MARKS. For the engine, in any thread."""
        self._memory[number] = _CLEARED

    def mark_lifted(self, number: int) -> None:
        """Set a mark that says that nothing is to be remembered. For the engine, in any thread."""
        self._memory[number] = _LIFTED

    # --- the supervisor ----------------------------------------------------------------------------------------------

    def running(self) -> list[Running]:
        """Return what runs now. While the engine lives, what is told of a run that has just begun may be another's."""
        found = []
        for place in range(self._slot_count):
            sequence, began_s, expected_s, call_count, _, again = _HEAD.unpack_from(self._memory, self._head(place))
            if sequence == again and sequence % 2:
                found.append(Running(place, sequence, began_s, expected_s, call_count))
        return found

    def entries(self) -> list[Entry]:
        """Return what was under way when the engine died."""
        return [Entry(running, self._calls(running.place)) for running in self.running()]

    def was_used(self) -> bool:
        """Say whether the engine has computed anything for anybody."""
        return any(_WORD.unpack_from(self._memory, self._head(place))[0] for place in range(self._slot_count))

    def marked(self) -> list[int]:
        """Return the marks that were set by ``mark``."""
        return self._marks(_CLEARED)

    def lifted(self) -> list[int]:
        """Return those that were set by ``mark_lifted``."""
        return self._marks(_LIFTED)

    def _marks(self, wanted: int) -> list[int]:
        return [number for number, mark in enumerate(self._memory[:MOST_MARKS]) if mark == wanted]

    def _calls(self, place: int) -> tuple[Asked, ...]:
        *_, length, _ = _HEAD.unpack_from(self._memory, self._head(place))
        start = self._names(place)
        try:
            names = msgpack.unpackb(self._memory[start : start + min(length, _NAMES_BYTES)])
            return tuple(Asked(*map(_text, each)) for each in names)
        except (TypeError, ValueError):
            # What killed the engine may have written here before. The supervisor must not die of it, too.
            return ()

    def _head(self, place: int) -> int:
        return MOST_MARKS + place * _HEAD.size

    def _names(self, place: int) -> int:
        return self._names_offset + place * _NAMES_BYTES


class Page:
    """The part of a journal that is one device's. Belongs to its engine's thread."""

    def __init__(self, memory: mmap.mmap, places: Mapping[int, tuple[int, int]]) -> None:
        """``places`` have the offsets of a head and of what is named."""
        self._memory = memory
        self._places = places
        # What was used last is used again: no more memory is touched than runs are under way.
        self._free = list(places)[::-1]
        self._sequences = dict.fromkeys(places, 1)
        self._packer = msgpack.Packer()

    def begin(self, began_s: float, expected_s: float, calls: Sequence[tuple[str, str, str]]) -> int:
        """Note that a run begins for some calls, each as ``Asked`` has it; return its place, for ``end``."""
        names = self._packed(calls)
        place = self._free.pop()
        (head, start), sequence = self._places[place], self._sequences[place]
        _WORD.pack_into(self._memory, head, sequence)
        self._memory[start : start + len(names)] = names
        _HEAD.pack_into(self._memory, head, sequence, began_s, expected_s, len(calls), len(names), sequence)
        return place

    def end(self, place: int) -> None:
        """Note that the run at that place is over."""
        _WORD.pack_into(self._memory, self._places[place][0], self._sequences[place] + 1)
        self._sequences[place] += 2
        self._free.append(place)

    def _packed(self, calls: Sequence[tuple[str, str, str]]) -> bytes:
        """Return as many of the calls as there is room for, about."""
        names: bytes = self._packer.pack(calls)
        while len(names) > _NAMES_BYTES:
            calls = calls[: len(calls) // 2]
            names = self._packer.pack(calls)
        return names


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("a name is a text")
    return value
