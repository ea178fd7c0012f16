"""Block files: weights on disk as they are needed in memory, those of a block one after the other, to be read at one stroke.

They are copies: everything in them can be made again from the store. So what cannot be written is left out, what turns out
damaged is forgotten, and the caller makes it anew. A file holds those weights of a block that were in no other file when it was
written, each an *entry* under a key of the caller's, 64 hexadecimal digits, with a few bytes of *meta* that say how to use it.

A file is a header and its entries, each of whole pages, at least one, without gaps. Both are padded with zeros, and all of it
is under checksums: one of the header, one of each piece of 1 MiB of an entry, compared at every read. A file is written under
a temporary name, synced once and renamed. Readers may read what is being discarded: they see it whole, or learn that it is
gone.

What entries depend on beside their key, the *facts* (the device, the version of torch), is part of each file's name and
header. Files of other facts are removed: a folder belongs to one device. What files take in all has a limit: those that were not
read for longest leave first, and what would not fit even then is left out. Checksums tell accidents, not intent, and what a meta
says may be believed without a check: so nobody else may write into the folder, and files of other users are removed, too.

Callable from any thread: a lock is held while the index changes, not while anything is read or written. Must not import torch.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import mmap
import os
import re
import secrets
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from isal import isal_zlib
from trunkline.arena import page_aligned

from sidecar.disk import (
    BUFFERED_STRICT,
    MOST_TARGETS,
    PAGE_BYTES,
    TEMPORARY,
    Calibration,
    Source,
    calibrate,
    drop,
    fill,
    free_bytes_of,
    is_refusal,
    opened,
    remove_unless_locked,
    write_at,
)
from sidecar.errors import EntriesUnusable

log = logging.getLogger("trunkline.blockfiles")

CHUNK_BYTES: Final = 1 << 20
_MAGIC: Final = b"TLBLOCK\x02"
# Magic, facts, bytes of the file, number of entries, bytes of the header with its padding, and the checksum of all else in it.
_PREFIX: Final = struct.Struct("<8s32sQIII")
# Key, bytes, bytes of meta; then the meta, and a checksum per piece.
_ENTRY: Final = struct.Struct("<32sQI")
_CHECKSUM: Final = struct.Struct("<I")
_SUFFIX: Final = ".block"
_KEY: Final = re.compile(r"[0-9a-f]{64}")

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Entry:
    """One weight in the form it is needed. ``key`` has 64 hexadecimal digits; ``meta`` is for whoever uses the weight."""

    key: str
    size_bytes: int
    meta: bytes = b""


@dataclass(frozen=True, eq=False, slots=True)
class _Place:
    entry: Entry
    offset: int
    checksums: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.offset + page_aligned(self.entry.size_bytes)


@dataclass(frozen=True, eq=False)
class _File:
    """A file and what its header says. Entries that were discarded or found damaged are in it still, and not in the index."""

    path: Path
    places: Mapping[str, _Place]

    @property
    def size_bytes(self) -> int:
        """Return what it takes on disk, which ends with its last entry. There is no file without."""
        return max(place.end for place in self.places.values())


class _Fault(NamedTuple):
    """Why an entry was not read. One that ``lasts`` is no use reading again."""

    reason: str
    lasts: bool = True


_Part = tuple[_Place, memoryview]


class _Damaged(Exception):
    """A file is none that this module wrote for these facts; the message tells why."""


class BlockFiles:
    """Entries in files below one folder, read by way of ``source``."""

    def __init__(self, folder: Path, *facts: str, source: Source = BUFFERED_STRICT, limit_bytes: int | None = None) -> None:
        """Open the folder, making it when it is not there, and read the headers. A folder that cannot be used holds nothing.

        Files may take ``limit_bytes``; what they take beyond that is removed. Without it, they may take half of what is free
        on the disk and of what they take already, as it is now.
        """
        self._folder = folder
        self._facts = hashlib.sha256("\n".join(facts).encode()).digest()
        self.source = source
        self._lock = threading.Lock()
        # Whose turn it is to have the disk read.
        self._turn = threading.Lock()
        self._index: dict[str, tuple[_File, _Place]] = {}
        # All files, the one that was not read for longest first; those being read, how often; bytes of those being written.
        self._uses: dict[_File, None] = {}
        self._reading: Counter[_File] = Counter()
        self._reserved_bytes = 0
        self.limit_bytes = limit_bytes or 0
        self._left_out_bytes = 0
        self._is_usable = True
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            # Refused unless the folder is this user's.
            folder.chmod(0o700)
            self._sweep()
            self._open()
            if limit_bytes is None:
                self.limit_bytes = (free_bytes_of(folder) + self.taken_bytes) // 2
            self._make_room(0)
        except OSError as error:
            self._is_usable = False
            log.warning("block files cannot be kept in %s (%s); weights are made anew each time", folder, _reason(error))

    def _sweep(self) -> None:
        """Remove the temporary files of writers that are no more: nobody has them locked."""
        for path in self._folder.glob(f"*{TEMPORARY}*"):
            remove_unless_locked(path)

    def _open(self) -> None:
        found: list[tuple[int, _File]] = []
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            try:
                if not path.name.startswith(self._prefix):
                    raise _Damaged("it is of another device or another torch")
                with opened(path, os.O_RDONLY) as descriptor:
                    found.append((os.fstat(descriptor).st_mtime_ns, _File(path, self._read_header(descriptor))))
            except _Damaged as damage:
                log.warning("block file %s is removed: %s", path.name, damage)
                _remove(path)
            except OSError as error:
                log.warning("block file %s cannot be read (%s); its weights are made anew", path.name, _reason(error))
        # What is in several files was damaged in the older ones.
        for _, file in sorted(found, key=lambda each: each[0]):
            self._index.update({key: (file, place) for key, place in file.places.items()})
            self._uses[file] = None
        for file in self._uses.keys() - self._live_files():
            self._remove(file)

    @property
    def _prefix(self) -> str:
        return f"{self._facts.hex()[:16]}-"

    def _read_header(self, descriptor: int) -> dict[str, _Place]:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid():
            raise _Damaged(f"it was written by user {state.st_uid}")
        file_bytes = state.st_size
        prefix = os.pread(descriptor, _PREFIX.size, 0)
        if len(prefix) < _PREFIX.size:
            raise _Damaged(f"{file_bytes} bytes are too few for a header")
        magic, facts, stated_bytes, count, header_bytes, checksum = _PREFIX.unpack(prefix)
        if magic != _MAGIC or facts != self._facts:
            raise _Damaged("it begins like none of this device and this torch")
        if stated_bytes != file_bytes or not _PREFIX.size <= header_bytes <= file_bytes:
            raise _Damaged(f"it has {file_bytes} bytes instead of {stated_bytes}")
        rest = os.pread(descriptor, header_bytes - _PREFIX.size, _PREFIX.size)
        if isal_zlib.crc32(rest, isal_zlib.crc32(prefix[: -_CHECKSUM.size])) != checksum:
            raise _Damaged("its header was altered")
        return _parse_index(rest, count, header_bytes)

    def _live_files(self) -> set[_File]:
        return {file for file, _ in self._index.values()}

    def calibrate(self) -> Calibration:
        """Measure how files in the folder are read, neither way leaving anything in the page cache."""
        return calibrate(self._folder, is_strict=True)

    # --- what there is ----------------------------------------------------------------------------------------------

    def find(self, key: str) -> Entry | None:
        """Return an entry, None when there is none."""
        found = self._index.get(key)
        return None if found is None else found[1].entry

    def discard(self, keys: Iterable[str]) -> None:
        """Forget entries, and remove the files of which no entry is left."""
        with self._lock:
            self._forget(set(keys) & self._index.keys())

    def keep(self, keys: Iterable[str]) -> None:
        """Forget all entries but these, and remove the files of which no entry is left."""
        with self._lock:
            self._forget(self._index.keys() - set(keys))

    def _forget(self, keys: Iterable[str]) -> None:
        touched = {self._index.pop(key)[0] for key in keys}
        for file in touched - self._live_files() if touched else ():
            self._remove(file)

    def _remove(self, file: _File) -> None:
        del self._uses[file]
        _remove(file.path)

    # --- room -------------------------------------------------------------------------------------------------------

    @property
    def taken_bytes(self) -> int:
        """What files take on disk."""
        return sum(file.size_bytes for file in list(self._uses))

    def facts(self) -> dict[str, int]:
        """Return what an operator wants to know, in bytes: what files take and may take, and what was left out."""
        return {
            "block_files_taken_bytes": self.taken_bytes,
            "block_files_limit_bytes": self.limit_bytes,
            "block_files_left_out_bytes": self._left_out_bytes,
        }

    def has_room(self, sizes: Sequence[int], *, evicts: bool = True) -> bool:
        """Say whether entries of these sizes could be written now; if not, they count as left out."""
        needed_bytes = PAGE_BYTES + sum(map(page_aligned, sizes))
        with self._lock:
            leaving = self._leaving(needed_bytes) if self._is_usable else None
            has_room = leaving is not None and (evicts or not leaving)
        if not has_room:
            self._leave_out(needed_bytes)
        return has_room

    def _leaving(self, needed_bytes: int) -> list[_File] | None:
        """Return the files that have to go so that there is room for so much more; None when that is not enough."""
        over_bytes = self.taken_bytes + self._reserved_bytes + needed_bytes - self.limit_bytes
        leaving = []
        for file in self._uses:
            if over_bytes <= 0:
                break
            if not self._reading[file]:
                leaving.append(file)
                over_bytes -= file.size_bytes
        return leaving if over_bytes <= 0 else None

    def _make_room(self, needed_bytes: int, *, evicts: bool = True) -> bool:
        """Have so many bytes reserved, and remove files for that; return whether there is room."""
        with self._lock:
            leaving = self._leaving(needed_bytes)
            if leaving is None or (leaving and not evicts):
                return False
            self._reserved_bytes += needed_bytes
            for file in leaving:
                self._forget(self._live(file))
        if leaving:
            log.info("%d block files were removed, so that all take %d bytes at most", len(leaving), self.limit_bytes)
        return True

    def _leave_out(self, needed_bytes: int) -> None:
        if not self._left_out_bytes and self.limit_bytes and self._is_usable:
            log.warning(
                "weights that take %d bytes are left out of the block files in %s, which take %d bytes of %d; they are made anew "
                "from the store each time, which takes longer. Free some of the disk, or raise --block-files-limit",
                *(needed_bytes, self._folder, self.taken_bytes, self.limit_bytes),
            )
        self._left_out_bytes += needed_bytes

    # --- writing ----------------------------------------------------------------------------------------------------

    def write(self, entries: Sequence[tuple[Entry, memoryview]], *, evicts: bool = True) -> None:
        """Write the entries that are in no file yet into one new file; each comes with its bytes, ``size_bytes`` single ones.

        Where there is no room for it files leave, if it ``evicts``. When entries cannot be written, or not within the limit,
        nothing is left behind, a warning is logged, and ``find`` does not find them.
        """
        fresh: dict[str, tuple[Entry, memoryview]] = {}
        for entry, content in entries if self._is_usable else ():
            assert _KEY.fullmatch(entry.key), f"{entry.key[:80]!r} is no key of 64 hexadecimal digits"
            assert len(content) == entry.size_bytes, f"{entry.key[:12]} has {entry.size_bytes} bytes, not {len(content)}"
            if entry.key not in self._index:
                fresh.setdefault(entry.key, (entry, content))
        if not fresh:
            return
        file_bytes = _file_bytes([entry for entry, _ in fresh.values()])
        if not self._make_room(file_bytes, evicts=evicts):
            self._leave_out(file_bytes)
            return
        try:
            self._write_anew(list(fresh.values()))
        finally:
            with self._lock:
                self._reserved_bytes -= file_bytes

    def _write_anew(self, fresh: Sequence[tuple[Entry, memoryview]]) -> None:
        path = self._folder / f"{self._prefix}{secrets.token_hex(8)}{_SUFFIX}"
        try:
            file = _File(path, self._write(path, fresh))
        except OSError as error:
            log.warning(
                "%d weights of %d bytes cannot be kept in %s (%s); they are made anew each time. Free some of its disk",
                len(fresh),
                sum(entry.size_bytes for entry, _ in fresh),
                self._folder,
                _reason(error),
            )
            return
        with self._lock:
            added = {key: (file, place) for key, place in file.places.items() if key not in self._index}
            self._index.update(added)
            self._uses[file] = None
            if not added:
                # Another thread wrote the same meanwhile.
                self._remove(file)

    def _write(self, path: Path, entries: Sequence[tuple[Entry, memoryview]]) -> dict[str, _Place]:
        header_bytes = _header_bytes([entry for entry, _ in entries])
        file_bytes = _file_bytes([entry for entry, _ in entries])
        temporary = path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(4)}")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # A full disk says so before anything is written; and what is asked for at once lies together.
            os.posix_fallocate(descriptor, 0, file_bytes)
            places: dict[str, _Place] = {}
            offset = header_bytes
            for entry, content in entries:
                places[entry.key] = place = _Place(entry, offset, _write_entry(descriptor, content, offset))
                offset = place.end
            write_at(descriptor, memoryview(self._header(list(places.values()), header_bytes, file_bytes)), 0)
            # The folder is not synced: a file that is lost with its name is made anew.
            os.fsync(descriptor)
            drop(descriptor)
            os.rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
        return places

    def _header(self, places: Sequence[_Place], header_bytes: int, file_bytes: int) -> bytes:
        index = bytearray()
        for place in places:
            entry = place.entry
            index += _ENTRY.pack(bytes.fromhex(entry.key), entry.size_bytes, len(entry.meta)) + entry.meta
            index += struct.pack(f"<{len(place.checksums)}I", *place.checksums)
        rest = index.ljust(header_bytes - _PREFIX.size, b"\0")
        begin = _PREFIX.pack(_MAGIC, self._facts, file_bytes, len(places), header_bytes, 0)[: -_CHECKSUM.size]
        return begin + _CHECKSUM.pack(isal_zlib.crc32(rest, isal_zlib.crc32(begin))) + rest

    # --- reading ----------------------------------------------------------------------------------------------------

    def read(self, keys: Sequence[str], targets: Sequence[memoryview]) -> None:
        """Read entries into ``targets``; what lies together in a file is read by one call.

        A target begins on a page and has ``page_aligned`` of the entry's size: the padding is read and checked, too. Raises
        EntriesUnusable, whose ``keys`` are those that are gone, altered or cannot be read. All others were read.
        """
        faults: dict[str, _Fault] = {}
        wanted: dict[_File, list[_Part]] = {}
        with self._lock:
            for key, target in zip(keys, targets, strict=True):
                if key not in self._index:
                    faults[key] = _Fault("it is in no file")
                    continue
                file, place = self._index[key]
                size_bytes = place.end - place.offset
                assert len(target) == size_bytes, f"{key[:12]} takes {size_bytes} bytes of pages, not {len(target)}"
                wanted.setdefault(file, []).append((place, target))
            for file in wanted:
                # The latest last.
                del self._uses[file]
                self._uses[file] = None
                self._reading[file] += 1
        try:
            for file, parts in wanted.items():
                faults |= self._read_parts(file, sorted(parts, key=lambda part: part[0].offset))
        finally:
            with self._lock:
                self._reading -= Counter(wanted.keys())
        if faults:
            key, fault = next(iter(faults.items()))
            raise EntriesUnusable(
                f"{len(faults)} of {len(keys)} weights cannot be read from block files, {key[:12]} because {fault.reason}; "
                "make them anew from the store",
                keys=faults,
            )

    def _read_parts(self, file: _File, parts: Sequence[_Part]) -> dict[str, _Fault]:
        """Read entries of a file, in the order of their places; return what is wrong with which, and forget those."""

        def read(descriptor: int, source: Source) -> dict[str, _Fault]:
            faults: dict[str, _Fault] = {}
            for run in _runs(parts):
                faults |= self._read_run(descriptor, source, run)
            return faults

        try:
            faults = self._by_source(file, read)
        except OSError as error:
            fault = _Fault(_reason(error), lasts=isinstance(error, FileNotFoundError))
            faults = {place.entry.key: fault for place, _ in parts}
        self._note(file, faults)
        return faults

    def _note(self, file: _File, faults: Mapping[str, _Fault]) -> None:
        for key, fault in faults.items():
            log.error("weight %s in block file %s cannot be used: %s", key[:12], file.path.name, fault.reason)
        with self._lock:
            # What was written anew meanwhile stays.
            self._forget([key for key in self._live(file) if key in faults and faults[key].lasts])

    def _live(self, file: _File) -> list[str]:
        # At one stroke each, because not all who ask have the lock.
        return [key for key in file.places if (found := self._index.get(key)) is not None and found[0] is file]

    def _by_source(self, file: _File, work: Callable[[int, Source], _Result]) -> _Result:
        """Open a file and have ``work`` read it; where direct reading is refused, buffered from then on. Raises OSError."""
        source = self.source
        try:
            with opened(file.path, os.O_RDONLY | source.flags) as descriptor:
                return work(descriptor, source)
        except OSError as error:
            if not is_refusal(error, source):
                raise
            log.warning("files in %s cannot be read past the page cache; they are read through it", self._folder)
        self.source = BUFFERED_STRICT
        with opened(file.path, os.O_RDONLY) as descriptor:
            return work(descriptor, BUFFERED_STRICT)

    def _read_run(self, descriptor: int, source: Source, run: Sequence[_Part]) -> dict[str, _Fault]:
        """Read parts that lie without a gap; return what is wrong with which. Raises OSError when the source is refused."""
        begin = run[0][0].offset
        try:
            # One after the other: two at once would only make the first one later.
            with self._turn:
                reached = begin + fill(descriptor, source, begin, [target for _, target in run])
        except OSError as error:
            if is_refusal(error, source):
                raise
            if len(run) > 1:
                # Which of them it is, is learned one by one.
                return {key: fault for part in run for key, fault in self._read_run(descriptor, source, [part]).items()}
            return {run[0][0].entry.key: _Fault(_reason(error), lasts=error.errno == errno.EIO)}
        faults = {}
        for place, target in run:
            if place.end > reached:
                faults[place.entry.key] = _Fault("the file ends before it")
            elif any(
                isal_zlib.crc32(target[start:end]) != checksum
                for (start, end), checksum in zip(_pieces(place.entry.size_bytes), place.checksums, strict=True)
            ):
                faults[place.entry.key] = _Fault("its bytes were altered")
        return faults

    def scrub(self, pause: Callable[[], object]) -> list[str]:
        """Read everything there is, a piece at a time with ``pause`` after each; forget what is bad, and return its keys."""
        with self._lock:
            files = sorted(self._live_files(), key=lambda file: file.path)
        scratch = memoryview(mmap.mmap(-1, CHUNK_BYTES))
        bad: list[str] = []
        for file in files:

            def check(descriptor: int, source: Source, file: _File = file) -> dict[str, _Fault]:
                # What the page cache holds says nothing about the disk.
                drop(descriptor)
                faults = {key: self._checked(descriptor, source, file.places[key], scratch, pause) for key in self._live(file)}
                drop(descriptor)
                return {key: fault for key, fault in faults.items() if fault is not None}

            try:
                faults = self._by_source(file, check)
            except OSError as error:
                fault = _Fault(_reason(error), lasts=isinstance(error, FileNotFoundError))
                # None, when the file was discarded meanwhile.
                faults = dict.fromkeys(self._live(file), fault)
            self._note(file, faults)
            bad += faults
        return bad

    def _checked(
        self, descriptor: int, source: Source, place: _Place, scratch: memoryview, pause: Callable[[], object]
    ) -> _Fault | None:
        """Read an entry piece by piece into ``scratch``; return what is wrong. Raises OSError when the source is refused."""
        for (start, end), checksum in zip(_pieces(place.entry.size_bytes), place.checksums, strict=True):
            piece = _Place(Entry(place.entry.key, end - start), place.offset + start, (checksum,))
            faults = self._read_run(descriptor, source, [(piece, scratch[: end - start])])
            if faults:
                return faults[place.entry.key]
            pause()
        return None


# --- parts --------------------------------------------------------------------------------------------------------------


def _pieces(size_bytes: int) -> list[tuple[int, int]]:
    """Return where each piece of an entry that has a checksum of its own begins and ends."""
    whole_bytes = page_aligned(size_bytes)
    return [(start, min(start + CHUNK_BYTES, whole_bytes)) for start in range(0, whole_bytes, CHUNK_BYTES)]


def _header_bytes(entries: Sequence[Entry]) -> int:
    return page_aligned(_PREFIX.size + sum(map(_index_bytes, entries)))


def _file_bytes(entries: Sequence[Entry]) -> int:
    return _header_bytes(entries) + sum(page_aligned(entry.size_bytes) for entry in entries)


def _index_bytes(entry: Entry) -> int:
    return _ENTRY.size + len(entry.meta) + len(_pieces(entry.size_bytes)) * _CHECKSUM.size


def _parse_index(data: bytes, count: int, header_bytes: int) -> dict[str, _Place]:
    """Return what a header says whose checksum is right."""
    places: dict[str, _Place] = {}
    at, offset = 0, header_bytes
    for _ in range(count):
        key, size_bytes, meta_bytes = _ENTRY.unpack_from(data, at)
        at += _ENTRY.size
        entry = Entry(key.hex(), size_bytes, data[at : at + meta_bytes])
        at += meta_bytes
        checksums = struct.unpack_from(f"<{len(_pieces(size_bytes))}I", data, at)
        at += len(checksums) * _CHECKSUM.size
        places[entry.key] = place = _Place(entry, offset, checksums)
        offset = place.end
    return places


def _write_entry(descriptor: int, content: memoryview, offset: int) -> tuple[int, ...]:
    """Write an entry and its padding; return its checksums."""
    checksums = []
    for start, end in _pieces(len(content)):
        piece = content[start:end]
        padding = bytes(end - start - len(piece))
        checksums.append(isal_zlib.crc32(padding, isal_zlib.crc32(piece)))
        write_at(descriptor, piece, offset + start)
        write_at(descriptor, memoryview(padding), offset + start + len(piece))
    return tuple(checksums)


def _runs(parts: Sequence[_Part]) -> Iterator[list[_Part]]:
    """Yield parts of a file that lie there without a gap, as many as one call reads."""
    run: list[_Part] = []
    for part in parts:
        if run and (part[0].offset != run[-1][0].end or len(run) == MOST_TARGETS):
            yield run
            run = []
        run.append(part)
    yield run


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.warning("block file %s cannot be removed (%s)", path.name, _reason(error))


def _reason(error: OSError) -> str:
    return os.strerror(error.errno or 0)
