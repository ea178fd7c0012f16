"""Block files: the bytes that were written or an error that names them, whatever the disk does."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import random
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trunkline.arena import page_aligned

from sidecar import blockfiles, disk
from sidecar.blockfiles import CHUNK_BYTES, BlockFiles, Entry
from sidecar.disk import BUFFERED, BUFFERED_STRICT, DIRECT, PAGE_BYTES, Source
from sidecar.errors import EntriesUnusable

FACTS = ("cpu", "torch 2")
# An empty one, less than a page, whole pages, one byte more, several pieces.
SIZES = (0, 1, PAGE_BYTES, PAGE_BYTES + 1, CHUNK_BYTES, 2 * CHUNK_BYTES + 5, 100)
SMALL = (100, PAGE_BYTES, PAGE_BYTES + 7)


def made(name: str, size_bytes: int) -> tuple[Entry, memoryview]:
    key = hashlib.sha256(name.encode()).hexdigest()
    return Entry(key, size_bytes, f"meta of {name}".encode()), memoryview(random.Random(name).randbytes(size_bytes))


def several(sizes: Sequence[int], prefix: str = "weight") -> list[tuple[Entry, memoryview]]:
    return [made(f"{prefix} {number}", size_bytes) for number, size_bytes in enumerate(sizes)]


def keys_of(entries: Sequence[tuple[Entry, memoryview]]) -> list[str]:
    return [entry.key for entry, _ in entries]


def places(entries: Sequence[tuple[Entry, memoryview]]) -> list[memoryview]:
    """Return a target per entry, on a page each, full of something else."""
    found = []
    for entry, _ in entries:
        whole_bytes = page_aligned(entry.size_bytes)
        target = memoryview(mmap.mmap(-1, whole_bytes))
        target[:] = b"\xa5" * whole_bytes
        found.append(target)
    return found


def assert_reads(files: BlockFiles, entries: Sequence[tuple[Entry, memoryview]]) -> None:
    targets = places(entries)
    files.read(keys_of(entries), targets)
    for (entry, content), target in zip(entries, targets, strict=True):
        assert files.find(entry.key) == entry
        assert target[: entry.size_bytes] == content
        assert not any(target[entry.size_bytes :])


def bad_keys(files: BlockFiles, entries: Sequence[tuple[Entry, memoryview]]) -> set[str]:
    """Read, and return the keys that were refused; all others must be right."""
    targets = places(entries)
    try:
        files.read(keys_of(entries), targets)
    except EntriesUnusable as error:
        for (entry, content), target in zip(entries, targets, strict=True):
            assert entry.key in error.keys or target[: entry.size_bytes] == content
        assert str(error.message).startswith(f"{len(error.keys)} of {len(entries)} weights")
        return set(error.keys)
    return set()


def on_disk(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def alter(path: Path, offset: int) -> None:
    """Flip one bit of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 4]))


class Calls:
    """Counts the calls of a function of ``os``, and may do something in its stead."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, instead: Callable[..., Any] | None = None) -> None:
        self.count = 0
        self.real = getattr(os, name)
        self._instead = instead
        monkeypatch.setattr(os, name, self)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        return (self._instead or self.real)(*arguments, **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "blocks"


@pytest.fixture
def files(folder: Path) -> BlockFiles:
    return BlockFiles(folder, *FACTS)


# --- what is written comes back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [BUFFERED, BUFFERED_STRICT, DIRECT], ids=["buffered", "strict", "direct"])
def test_entries_come_back(folder: Path, source: Source) -> None:
    entries = several(SIZES)
    files = BlockFiles(folder, *FACTS, source=source)
    files.write(entries)
    assert_reads(files, entries)
    reopened = BlockFiles(folder, *FACTS, source=source)
    assert_reads(reopened, entries)
    random.Random(1).shuffle(entries)
    assert_reads(reopened, entries)
    assert_reads(reopened, [entries[0], entries[0]])


def test_a_file_is_whole_pages_and_its_entries_lie_together(files: BlockFiles, folder: Path) -> None:
    entries = several(SMALL)
    files.write(entries)
    (path,) = on_disk(folder)
    content = path.read_bytes()
    assert len(content) == PAGE_BYTES * (1 + 1 + 1 + 2)
    assert path.stat().st_mode & 0o777 == 0o600
    at = PAGE_BYTES
    for entry, data in entries:
        assert content[at : at + entry.size_bytes] == data
        at += page_aligned(entry.size_bytes)


def test_a_header_may_take_pages(files: BlockFiles, folder: Path) -> None:
    entries = several([10] * 200)
    files.write(entries)
    assert_reads(BlockFiles(folder, *FACTS), entries)


def test_neighbours_are_read_by_one_call(files: BlockFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = several([*SMALL, *SMALL])
    files.write(entries)
    calls = Calls(monkeypatch, "preadv")
    assert_reads(files, entries[::-1])
    assert calls.count == 1
    assert_reads(files, [*entries[:2], *entries[4:]])
    assert calls.count == 3
    monkeypatch.setattr(blockfiles, "MOST_TARGETS", 4)
    assert_reads(files, entries)
    assert calls.count == 5
    files.read([], [])
    empty = several([0, 0], "empty")
    files.write(empty)
    assert_reads(files, empty)
    assert calls.count == 6


def test_entries_of_several_files(files: BlockFiles, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    first, second = several(SMALL, "first"), several(SMALL, "second")
    files.write(first)
    files.write([*second, first[0]])
    assert len(on_disk(folder)) == 2
    calls = Calls(monkeypatch, "preadv")
    assert_reads(files, [*second, *first])
    assert calls.count == 2


def test_what_is_there_is_not_written_again(files: BlockFiles, folder: Path) -> None:
    entries = several(SMALL)
    files.write([*entries, entries[0]])
    sizes = [path.stat().st_size for path in on_disk(folder)]
    assert sizes == [PAGE_BYTES * 5]
    files.write(entries)
    files.write([])
    assert [path.stat().st_size for path in on_disk(folder)] == sizes


def test_a_file_is_synced_once(files: BlockFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, "fsync")
    files.write(several(SIZES))
    assert calls.count == 1


def test_another_that_wrote_the_same_first_wins(files: BlockFiles, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = several(SMALL)

    def sync(descriptor: int) -> None:
        monkeypatch.undo()
        files.write(entries)

    monkeypatch.setattr(os, "fsync", sync)
    files.write(entries)
    assert len(on_disk(folder)) == 1
    assert_reads(files, entries)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_entries_read_in_any_order_give_the_same_bytes(data: st.DataObject) -> None:
    sizes = st.lists(st.integers(0, 3 * PAGE_BYTES) | st.sampled_from([CHUNK_BYTES - 1, CHUNK_BYTES + 1]), max_size=8)
    source = data.draw(st.sampled_from([BUFFERED, BUFFERED_STRICT, DIRECT]))
    with tempfile.TemporaryDirectory() as name:
        files = BlockFiles(Path(name), *FACTS, source=source)
        there: list[tuple[Entry, memoryview]] = []
        for number in range(data.draw(st.integers(1, 3))):
            entries = several(data.draw(sizes), f"block {number}")
            files.write([*entries, *data.draw(st.permutations(there))[:2]])
            there += entries
        if data.draw(st.booleans()):
            files = BlockFiles(Path(name), *FACTS, source=source)
        gone = data.draw(st.sets(st.sampled_from(keys_of(there)))) if there else set()
        files.discard(gone)
        wanted = data.draw(st.permutations([each for each in there if each[0].key not in gone]))
        assert_reads(files, wanted[: data.draw(st.integers(0, len(wanted)))])


# --- what leaves --------------------------------------------------------------------------------------------------------


def test_a_file_goes_with_its_last_entry(files: BlockFiles, folder: Path) -> None:
    entries, others = several(SMALL), several(SMALL, "other")
    files.write(entries)
    files.write(others)
    files.discard([*keys_of(entries[:2]), "no such key"])
    assert len(on_disk(folder)) == 2
    assert files.find(entries[0][0].key) is None
    assert bad_keys(files, entries) == set(keys_of(entries[:2]))
    files.keep(keys_of(others[:1]))
    assert len(on_disk(folder)) == 1
    assert_reads(files, others[:1])
    files.keep([])
    assert on_disk(folder) == []


def test_what_was_discarded_may_be_written_again(files: BlockFiles, folder: Path) -> None:
    entries = several(SMALL)
    files.write(entries)
    files.discard(keys_of(entries[:1]))
    files.write(entries)
    assert_reads(files, entries)
    assert_reads(BlockFiles(folder, *FACTS), entries)


def test_a_reader_keeps_what_it_has_opened(files: BlockFiles, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = several(SIZES)
    files.write(entries)
    targets = places(entries)

    def read(*arguments: Any) -> int:
        monkeypatch.undo()
        files.keep([])
        assert on_disk(folder) == []
        return os.preadv(*arguments)

    monkeypatch.setattr(os, "preadv", read)
    files.read(keys_of(entries), targets)
    assert all(target[: len(content)] == content for (_, content), target in zip(entries, targets, strict=True))


@pytest.mark.parametrize("by", ["read", "scrub"])
def test_a_reader_that_comes_too_late_is_told(files: BlockFiles, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    entries, others = several(SMALL), several(SMALL, "other")
    files.write(entries)

    def open_late(*arguments: Any) -> int:
        monkeypatch.undo()
        files.keep([])
        files.write(others)
        return os.open(*arguments)

    monkeypatch.setattr(os, "open", open_late)
    if by == "read":
        assert bad_keys(files, entries) == set(keys_of(entries))
    else:
        assert files.scrub(lambda: None) == []
    assert_reads(files, others)


def test_a_file_that_vanished_is_forgotten(files: BlockFiles, folder: Path) -> None:
    entries = several(SMALL)
    files.write(entries)
    on_disk(folder)[0].unlink()
    assert bad_keys(files, entries[:2]) == set(keys_of(entries[:2]))
    assert files.scrub(lambda: None) == keys_of(entries[2:])
    assert [files.find(key) for key in keys_of(entries)] == [None] * len(entries)
    files.write(entries)
    assert_reads(files, entries)


def test_a_file_that_cannot_be_removed_is_reported(
    files: BlockFiles, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files.write(several(SMALL))

    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(Path, "unlink", refuse)
    files.keep([])
    assert "cannot be removed (Operation not permitted)" in caplog.text


# --- damage -------------------------------------------------------------------------------------------------------------


def boundaries(entries: Sequence[tuple[Entry, memoryview]]) -> list[int]:
    """Return where a file of these entries, with one page of header, changes from one thing to the next."""
    found = [0, 8, 40, 60, 104]
    at = PAGE_BYTES
    for entry, _ in entries:
        found += [at, at + entry.size_bytes]
        at += page_aligned(entry.size_bytes)
    return sorted({cut for each in found for cut in (each - 1, each, each + 1) if 0 <= cut < at})


CUTS = boundaries(several(SMALL))


@pytest.mark.parametrize("source", [BUFFERED, DIRECT], ids=["buffered", "direct"])
def test_a_file_cut_short_is_noticed_wherever_it_is_cut(folder: Path, source: Source) -> None:
    entries = several(SMALL)
    for cut in CUTS:
        files = BlockFiles(folder, *FACTS, source=source)
        files.write(entries)
        (path,) = on_disk(folder)
        os.truncate(path, cut)
        at, beyond = PAGE_BYTES, set()
        for entry, _ in entries:
            at += page_aligned(entry.size_bytes)
            if cut < at:
                beyond.add(entry.key)
        assert bad_keys(files, entries) == beyond, cut
        assert all((files.find(key) is None) == (key in beyond) for key in keys_of(entries))
        assert path.exists() == (len(beyond) < len(entries))
        files.keep([])
        assert on_disk(folder) == []


def test_a_file_cut_short_is_removed_when_it_is_opened(folder: Path) -> None:
    entries = several(SMALL)
    BlockFiles(folder, *FACTS).write(entries)
    (path,) = on_disk(folder)
    content = path.read_bytes()
    for cut in CUTS:
        path.write_bytes(content[:cut])
        assert BlockFiles(folder, *FACTS).find(entries[0][0].key) is None, cut
        assert on_disk(folder) == []


def test_a_bit_in_a_header_is_noticed_when_the_file_is_opened(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = several(SMALL)
    BlockFiles(folder, *FACTS).write(entries)
    (path,) = on_disk(folder)
    content = path.read_bytes()
    for offset in [*range(330), *range(330, PAGE_BYTES, 97), PAGE_BYTES - 1]:
        path.write_bytes(content)
        alter(path, offset)
        caplog.clear()
        assert BlockFiles(folder, *FACTS).find(entries[0][0].key) is None, offset
        assert on_disk(folder) == [], offset
        assert f"block file {path.name} is removed: " in caplog.text


@pytest.mark.parametrize("source", [BUFFERED, DIRECT], ids=["buffered", "direct"])
def test_a_bit_in_an_entry_or_its_padding_is_noticed_and_only_that_entry_is_lost(folder: Path, source: Source) -> None:
    entries = several(SMALL)
    at = PAGE_BYTES
    for entry, _ in entries:
        end = at + page_aligned(entry.size_bytes)
        for offset in [*range(at, end, 411), at + entry.size_bytes - 1, end - 1]:
            files = BlockFiles(folder, *FACTS, source=source)
            files.write(entries)
            (path,) = on_disk(folder)
            alter(path, offset)
            assert bad_keys(files, entries) == {entry.key}, offset
            assert files.find(entry.key) is None
            files.write(entries)
            assert_reads(files, entries)
            # The entry written anew is found from now on, though the old one is in its file still.
            older, newer = sorted(on_disk(folder), key=lambda each: each == path, reverse=True)
            os.utime(older, ns=(0, newer.stat().st_mtime_ns - 1))
            files = BlockFiles(folder, *FACTS, source=source)
            assert_reads(files, entries)
            files.keep([])
        at = end


def test_a_bit_in_any_piece_of_a_large_entry_is_noticed(folder: Path) -> None:
    entries = several([3 * CHUNK_BYTES + 10])
    for offset in range(PAGE_BYTES + 100, PAGE_BYTES + 3 * CHUNK_BYTES + 100, CHUNK_BYTES):
        files = BlockFiles(folder, *FACTS)
        files.write(entries)
        alter(on_disk(folder)[0], offset)
        assert bad_keys(files, entries) == set(keys_of(entries))
        assert on_disk(folder) == []


def test_a_file_with_the_right_name_and_other_facts_is_removed(files: BlockFiles, folder: Path) -> None:
    files.write(several(SMALL))
    BlockFiles(folder / "other", "cuda:0").write(several(SMALL))
    (mine,) = folder.glob("*.block")
    (path,) = on_disk(folder / "other")
    path.rename(mine)
    assert BlockFiles(folder, *FACTS).find(several(SMALL)[0][0].key) is None
    assert not mine.exists()


def test_files_of_other_facts_are_removed(files: BlockFiles, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = several(SMALL)
    files.write(entries)
    other = BlockFiles(folder, "cpu", "torch 3")
    assert other.find(entries[0][0].key) is None
    assert on_disk(folder) == []
    assert "of another device or another torch" in caplog.text
    other.write(entries)
    assert_reads(other, entries)


def test_of_two_files_with_the_same_the_newer_is_kept(folder: Path) -> None:
    entries = several(SMALL)
    one, other = BlockFiles(folder, *FACTS), BlockFiles(folder, *FACTS)
    one.write(entries)
    (older,) = on_disk(folder)
    other.write(entries)
    os.utime(older, ns=(0, 0))
    assert_reads(BlockFiles(folder, *FACTS), entries)
    assert older not in on_disk(folder)
    assert len(on_disk(folder)) == 1


# --- a disk that fails ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [BUFFERED, DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize("most", [PAGE_BYTES, PAGE_BYTES + 100, 3 * PAGE_BYTES - 1, CHUNK_BYTES])
def test_short_reads_are_gone_on_with(folder: Path, monkeypatch: pytest.MonkeyPatch, source: Source, most: int) -> None:
    entries = several(SIZES if most == CHUNK_BYTES else [*SMALL, 9 * PAGE_BYTES])
    files = BlockFiles(folder, *FACTS, source=source)
    files.write(entries)
    real = os.preadv

    def read(descriptor: int, targets: Sequence[memoryview], offset: int) -> int:
        assert source is not DIRECT or offset % PAGE_BYTES == 0
        first = next(target for target in targets if target.nbytes)
        whole: list[memoryview] = []
        for target in targets if most % PAGE_BYTES == 0 else [first]:
            room = most - sum(each.nbytes for each in whole)
            whole.append(target[:room])
        return int(min(real(descriptor, list(targets), offset), sum(each.nbytes for each in whole)))

    calls = Calls(monkeypatch, "preadv", read)
    assert_reads(files, entries)
    assert calls.count > 1


def test_a_read_that_gives_nothing_is_a_file_too_short(files: BlockFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = several(SMALL)
    files.write(entries)
    monkeypatch.setattr(os, "preadv", lambda *arguments: 0)
    assert bad_keys(files, entries) == set(keys_of(entries))


@pytest.mark.parametrize("by", ["read", "scrub"])
def test_a_read_error_costs_the_entry_it_is_in(files: BlockFiles, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    entries = several([PAGE_BYTES] * 4)
    files.write(entries)
    real = os.preadv

    def read(descriptor: int, targets: Sequence[memoryview], offset: int) -> int:
        if offset <= 3 * PAGE_BYTES < offset + sum(map(len, targets)):
            raise OSError(errno.EIO, "broken")
        return real(descriptor, targets, offset)

    monkeypatch.setattr(os, "preadv", read)
    bad = entries[2][0].key
    if by == "read":
        with pytest.raises(EntriesUnusable, match=f"1 of 4 weights .* {bad[:12]} because Input/output error; make them anew"):
            files.read(keys_of(entries), places(entries))
    else:
        assert files.scrub(lambda: None) == [bad]
    assert [files.find(key) is None for key in keys_of(entries)] == [False, False, True, False]


@pytest.mark.parametrize("by", ["read", "scrub"])
@pytest.mark.parametrize("name", ["open", "preadv"])
def test_an_error_that_says_nothing_of_the_disk_costs_no_entry(
    files: BlockFiles, monkeypatch: pytest.MonkeyPatch, name: str, by: str
) -> None:
    entries = several(SMALL)
    files.write(entries)

    def refuse(*arguments: Any) -> int:
        raise OSError(errno.EMFILE, "too many")

    monkeypatch.setattr(os, name, refuse)
    if by == "read":
        assert bad_keys(files, entries) == set(keys_of(entries))
    else:
        assert files.scrub(lambda: None) == keys_of(entries)
    monkeypatch.undo()
    assert_reads(files, entries)


def failing(real: Callable[..., Any], after: int, number: int) -> Callable[..., Any]:
    """Return a function that does as ``real`` for ``after`` calls, and then fails."""
    left = [after]

    def call(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(number, os.strerror(number))
        return real(*arguments)

    return call


@pytest.mark.parametrize(
    ("name", "after"),
    [("open", 0), ("posix_fallocate", 0), ("fsync", 0), ("rename", 0), *(("pwrite", after) for after in range(9))],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_what_cannot_be_written_leaves_nothing_behind(
    files: BlockFiles,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    after: int,
    number: int,
) -> None:
    there, entries = several(SMALL, "there"), several([100, PAGE_BYTES, CHUNK_BYTES + 3, 10])
    files.write(there)
    before = on_disk(folder)
    monkeypatch.setattr(os, name, failing(getattr(os, name), after, number))
    files.write(entries)
    monkeypatch.undo()
    assert on_disk(folder) == before
    size_bytes = sum(entry.size_bytes for entry, _ in entries)
    assert f"4 weights of {size_bytes} bytes cannot be kept in {folder} ({os.strerror(number)})" in caplog.text
    assert files.find(entries[0][0].key) is None
    files.write(entries)
    assert_reads(files, [*there, *entries])


def test_short_writes_are_gone_on_with(files: BlockFiles, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda descriptor, content, offset: real(descriptor, content[:1000], offset))
    entries = several(SMALL)
    files.write(entries)
    monkeypatch.undo()
    assert_reads(BlockFiles(folder, *FACTS), entries)


def test_a_folder_that_cannot_be_used_holds_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_bytes(b"")
    files = BlockFiles(tmp_path / "file", *FACTS)
    assert "block files cannot be kept" in caplog.text
    entries = several(SMALL)
    files.write(entries)
    assert len(caplog.records) == 1
    assert bad_keys(files, entries) == set(keys_of(entries))


def test_nobody_else_may_write_into_the_folder(folder: Path) -> None:
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    BlockFiles(folder, *FACTS)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_folder_of_another_user_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = several(SMALL)
    BlockFiles(folder, *FACTS).write(entries)

    def refuse(path: Path, mode: int) -> None:
        raise PermissionError(errno.EPERM, "not yours")

    monkeypatch.setattr(Path, "chmod", refuse)
    files = BlockFiles(folder, *FACTS)
    assert files.find(entries[0][0].key) is None
    files.write(several(SMALL, "other"))
    assert len(on_disk(folder)) == 1


def test_a_file_of_another_user_is_removed(
    files: BlockFiles, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = several(SMALL)
    files.write(entries)
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert BlockFiles(folder, *FACTS).find(entries[0][0].key) is None
    assert on_disk(folder) == []
    assert f"it was written by user {user}" in caplog.text


def test_a_key_has_64_digits(files: BlockFiles) -> None:
    with pytest.raises(AssertionError, match="is no key"):
        files.write([(Entry("AB" * 32, 1), memoryview(b"x"))])


def test_a_file_that_cannot_be_read_now_stays(
    files: BlockFiles, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entries = several(SMALL)
    files.write(entries)
    monkeypatch.setattr(os, "pread", failing(os.pread, 0, errno.EMFILE))
    assert BlockFiles(folder, *FACTS).find(entries[0][0].key) is None
    assert "cannot be read (Too many open files)" in caplog.text
    monkeypatch.undo()
    assert_reads(BlockFiles(folder, *FACTS), entries)


def test_leftovers_are_swept_and_what_is_being_written_is_not(files: BlockFiles, folder: Path) -> None:
    left, locked = folder / "x.block.part-1", folder / "x.block.part-2"
    left.write_bytes(b"left")
    with locked.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        BlockFiles(folder, *FACTS)
        assert on_disk(folder) == [locked]
    BlockFiles(folder, *FACTS)
    assert on_disk(folder) == []


# --- scrubbing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", [BUFFERED, DIRECT], ids=["buffered", "direct"])
@pytest.mark.row("F19")
def test_scrubbing_finds_what_is_altered(folder: Path, source: Source) -> None:
    entries, others = several([100, 2 * CHUNK_BYTES + 5, 0, PAGE_BYTES]), several([10], "other")
    files = BlockFiles(folder, *FACTS, source=source)
    files.write(entries)
    (path,) = on_disk(folder)
    files.write(others)
    pauses: list[None] = []
    assert files.scrub(lambda: pauses.append(None)) == []
    assert len(pauses) == 1 + 3 + 1 + 1 + 1
    alter(path, 2 * PAGE_BYTES + CHUNK_BYTES + 77)
    assert files.scrub(lambda: None) == [entries[1][0].key]
    assert files.scrub(lambda: None) == []
    os.truncate(path, 2 * PAGE_BYTES)
    assert set(files.scrub(lambda: None)) == {entries[2][0].key, entries[3][0].key}
    assert_reads(files, [entries[0], *others])


def test_what_is_discarded_meanwhile_does_not_stop_scrubbing(files: BlockFiles) -> None:
    entries = several(SMALL)
    files.write(entries)

    class Racing(dict[Any, Any]):
        """Where another thread discards a key as soon as somebody has seen that it is there."""

        def __contains__(self, key: object) -> bool:
            return self.pop(key, None) is not None

    files._index = Racing(files._index)
    assert files.scrub(lambda: None) == []


# --- the disk -------------------------------------------------------------------------------------------------------------


def refusing(monkeypatch: pytest.MonkeyPatch, when: str) -> list[int]:
    """Refuse direct reading, when a file is opened or when it is read; return a list that gets the flags of each opening."""
    real_open, real_read = os.open, os.preadv
    flags: list[int] = []

    def open_file(path: Path, how: int, *mode: int) -> int:
        flags.append(how)
        if how & os.O_DIRECT and when == "open":
            raise OSError(errno.EINVAL, "not here")
        return real_open(path, how, *mode)

    def read(descriptor: int, targets: Sequence[memoryview], offset: int) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "not so")
        return real_read(descriptor, targets, offset)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read)
    return flags


@pytest.mark.parametrize("by", ["read", "scrub"])
@pytest.mark.parametrize("when", ["open", "read"])
def test_where_direct_reading_is_refused_it_is_buffered(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, when: str, by: str
) -> None:
    entries = several(SMALL)
    files = BlockFiles(folder, *FACTS, source=DIRECT)
    files.write(entries)
    flags = refusing(monkeypatch, when)
    if by == "scrub":
        assert files.scrub(lambda: None) == []
    assert_reads(files, entries)
    assert_reads(files, entries)
    assert [bool(how & os.O_DIRECT) for how in flags] == [True, False, *([False] * (len(flags) - 2))]
    assert caplog.text.count("cannot be read past the page cache") == 1


@pytest.mark.parametrize(("faster", "slower"), [("direct", "buffered"), ("buffered", "direct")])
@pytest.mark.parametrize("is_strict", [True, False])
def test_the_faster_source_is_chosen_and_the_direct_one_unless_it_is_far_slower(
    folder: Path, monkeypatch: pytest.MonkeyPatch, faster: str, slower: str, is_strict: bool
) -> None:
    speeds = {faster: iter([5.0, 9.0, 4.0]), slower: iter([3.5, 3.0, 2.5])}
    monkeypatch.setattr(disk, "_measured_bytes_per_s", lambda path, source, size_bytes: next(speeds[source.name]))
    found = disk.calibrate(folder, is_strict=is_strict, size_bytes=PAGE_BYTES)
    assert found.bytes_per_s == {faster: 9.0, slower: 3.5}
    assert found.source is (DIRECT if faster == "direct" else BUFFERED_STRICT if is_strict else BUFFERED)
    near = {"direct": iter([3.5, 4.0, 3.0]), "buffered": iter([9.0, 8.0, 8.0])}
    monkeypatch.setattr(disk, "_measured_bytes_per_s", lambda path, source, size_bytes: next(near[source.name]))
    assert disk.calibrate(folder, is_strict=is_strict, size_bytes=PAGE_BYTES).source is DIRECT
    assert on_disk(folder) == []


def test_calibration_reads_the_whole_file_each_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Calls(monkeypatch, "preadv")
    found = disk.calibrate(folder, size_bytes=9 * 1024 * 1024)
    assert set(found.bytes_per_s) <= {"direct", "buffered"}
    assert calls.count >= 2 * 3
    assert all(speed > 0 for speed in found.bytes_per_s.values())
    assert on_disk(folder) == []


@pytest.mark.parametrize("when", ["open", "read"])
def test_calibration_where_direct_reading_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    refusing(monkeypatch, when)
    found = disk.calibrate(folder, is_strict=True, size_bytes=PAGE_BYTES)
    assert found.source is BUFFERED_STRICT
    assert list(found.bytes_per_s) == ["buffered"]
    assert on_disk(folder) == []


@pytest.mark.parametrize("name", ["pwrite", "preadv"])
def test_a_disk_that_cannot_be_measured_has_no_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    monkeypatch.setattr(os, name, failing(getattr(os, name), 0, errno.ENOSPC))
    assert disk.calibrate(folder, size_bytes=PAGE_BYTES) == disk.Calibration(BUFFERED, {})
    assert "cannot be measured (No space left on device)" in caplog.text
    assert on_disk(folder) == []


def test_a_disk_that_is_nearly_full_is_not_measured(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Calls(monkeypatch, "pwrite")
    monkeypatch.setattr(disk, "free_bytes_of", lambda folder: 4 * PAGE_BYTES - 1)
    assert disk.calibrate(folder, size_bytes=PAGE_BYTES) == disk.Calibration(BUFFERED, {})
    assert writes.count == 0
    monkeypatch.setattr(disk, "free_bytes_of", lambda folder: 4 * PAGE_BYTES)
    assert disk.calibrate(folder, size_bytes=PAGE_BYTES).bytes_per_s
    assert writes.count == 1


def test_more_targets_than_one_call_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = random.Random(5).randbytes(7 * PAGE_BYTES)
    folder.mkdir()
    (folder / "x").write_bytes(content)
    monkeypatch.setattr(disk, "MOST_TARGETS", 3)
    targets = [memoryview(bytearray(PAGE_BYTES)) for _ in range(7)]
    with disk.opened(folder / "x", os.O_RDONLY) as descriptor:
        assert disk.fill(descriptor, BUFFERED, 0, targets) == len(content)
    assert b"".join(targets) == content


def test_strict_reading_leaves_nothing_in_the_page_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = several(SIZES)
    files = BlockFiles(folder, *FACTS, source=BUFFERED_STRICT)
    files.write(entries)
    asked: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda descriptor, *arguments: asked.append(arguments))
    assert_reads(files, entries)
    payload_bytes = sum(page_aligned(size_bytes) for size_bytes in SIZES)
    assert asked == [(PAGE_BYTES, payload_bytes, os.POSIX_FADV_DONTNEED)]


def test_checksums_are_those_of_zlib(files: BlockFiles, folder: Path) -> None:
    """A faster crc32 of the same polynomial may take its place without changing a file."""
    entries = several([CHUNK_BYTES + 1])
    files.write(entries)
    content = on_disk(folder)[0].read_bytes()
    first = zlib.crc32(entries[0][1][:CHUNK_BYTES]).to_bytes(4, "little")
    second = zlib.crc32(bytes(entries[0][1][CHUNK_BYTES:]).ljust(PAGE_BYTES, b"\0")).to_bytes(4, "little")
    assert first + second in content[:PAGE_BYTES]


# --- the limit ------------------------------------------------------------------------------------------------------------


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in on_disk(folder))


def there(files: BlockFiles, entries: Sequence[tuple[Entry, memoryview]]) -> bool:
    """Say whether all of these are found, or none."""
    found = {files.find(key) is not None for key in keys_of(entries)}
    assert len(found) == 1
    return found.pop()


# Of a file with one entry of a page: a header, and the entry.
FILE_BYTES = 2 * PAGE_BYTES


def test_what_was_not_read_for_longest_leaves_for_what_is_new(folder: Path) -> None:
    files = BlockFiles(folder, *FACTS, limit_bytes=3 * FILE_BYTES)
    first, second, third, fourth, fifth = ([made(name, PAGE_BYTES)] for name in ("1", "2", "3", "4", "5"))
    for entries in (first, second, third):
        files.write(entries)
    assert_reads(files, first)
    files.write(fourth)
    assert [there(files, each) for each in (first, second, third, fourth)] == [True, False, True, True]
    files.write(fifth)
    assert [there(files, each) for each in (first, third, fourth, fifth)] == [True, False, True, True]
    assert disk_bytes(folder) == files.taken_bytes == 3 * FILE_BYTES
    assert_reads(files, [*first, *fourth, *fifth])
    assert bad_keys(files, second) == set(keys_of(second))


def test_what_is_larger_than_the_limit_is_left_out_and_told_once_with_numbers(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = BlockFiles(folder, *FACTS, limit_bytes=2 * FILE_BYTES)
    small, large = [made("small", 10)], [made("large", 4 * PAGE_BYTES)]
    files.write(small)
    files.write(large)
    assert not files.has_room([4 * PAGE_BYTES])
    # Nothing had to leave for what has no room anyway.
    assert there(files, small)
    assert not there(files, large)
    said = [record.message for record in caplog.records if "left out" in record.message]
    assert said == [
        f"weights that take {5 * PAGE_BYTES} bytes are left out of the block files in {folder}, which take {FILE_BYTES} bytes of "
        f"{2 * FILE_BYTES}; they are made anew from the store each time, which takes longer. Free some of the disk, or raise "
        "--block-files-limit"
    ]
    assert files.facts() == {
        "block_files_taken_bytes": FILE_BYTES,
        "block_files_limit_bytes": 2 * FILE_BYTES,
        "block_files_left_out_bytes": 2 * 5 * PAGE_BYTES,
    }


def test_what_may_not_take_the_place_of_others_is_left_out(folder: Path) -> None:
    files = BlockFiles(folder, *FACTS, limit_bytes=FILE_BYTES)
    first, second = [made("1", PAGE_BYTES)], [made("2", PAGE_BYTES)]
    assert files.has_room([PAGE_BYTES], evicts=False)
    files.write(first, evicts=False)
    assert not files.has_room([PAGE_BYTES], evicts=False)
    files.write(second, evicts=False)
    assert there(files, first)
    assert not there(files, second)
    assert files.has_room([PAGE_BYTES])


def test_a_file_that_is_being_read_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = BlockFiles(folder, *FACTS, limit_bytes=2 * FILE_BYTES)
    read, other, new, newer = ([made(name, PAGE_BYTES)] for name in ("read", "other", "new", "newer"))
    files.write(read)
    files.write(other)
    real = disk.fill
    seen: list[bool] = []

    def fill(*arguments: Any) -> int:
        # As another thread would, in the middle of it.
        monkeypatch.setattr(blockfiles, "fill", real)
        files.write(new)
        files.write(newer)
        files.write([made("too large", 2 * PAGE_BYTES)])
        seen.extend(there(files, each) for each in (read, other, new, newer))
        return real(*arguments)

    monkeypatch.setattr(blockfiles, "fill", fill)
    assert_reads(files, read)
    assert seen == [True, False, False, True]
    files.write(other)
    files.write(new)
    assert not there(files, read)


def test_without_a_limit_files_may_take_half_of_what_could_be_theirs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BlockFiles(folder, *FACTS).write([made("there", PAGE_BYTES)])
    state = list(os.statvfs(folder))
    # So many bytes are free, in blocks of a page.
    state[1] = PAGE_BYTES
    state[4] = 10
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(state))
    assert BlockFiles(folder, *FACTS).limit_bytes == (10 * PAGE_BYTES + FILE_BYTES) // 2


@pytest.mark.parametrize("limit_bytes", [0, 2 * FILE_BYTES])
def test_what_is_beyond_a_lower_limit_leaves_when_the_folder_is_opened(
    folder: Path, limit_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    files = BlockFiles(folder, *FACTS)
    groups = [[made(str(number), PAGE_BYTES)] for number in range(3)]
    for number, entries in enumerate(groups):
        before = set(on_disk(folder))
        files.write(entries)
        (path,) = set(on_disk(folder)) - before
        # Written the longest ago, the last.
        os.utime(path, (0, 1000 - number))
    reopened = BlockFiles(folder, *FACTS, limit_bytes=limit_bytes)
    assert [there(reopened, entries) for entries in groups] == ([False] * 3 if not limit_bytes else [True, True, False])
    assert disk_bytes(folder) == limit_bytes
    if not limit_bytes:
        # Switched off, of which nobody needs to be told.
        reopened.write(groups[0])
        assert not there(reopened, groups[0])
        assert "left out" not in caplog.text


def test_room_that_was_not_used_is_room_for_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = BlockFiles(folder, *FACTS, limit_bytes=FILE_BYTES)
    entries = [made("1", PAGE_BYTES)]
    monkeypatch.setattr(os, "fsync", failing(os.fsync, 0, errno.ENOSPC))
    files.write(entries)
    assert not there(files, entries)
    monkeypatch.undo()
    files.write(entries)
    assert there(files, entries)


def test_files_leave_while_they_are_scrubbed(folder: Path) -> None:
    files = BlockFiles(folder, *FACTS, limit_bytes=2 * FILE_BYTES + 2 * CHUNK_BYTES)
    groups = [[made(str(number), CHUNK_BYTES)] for number in range(2)]
    for entries in groups:
        files.write(entries)
    new = [made("new", 2 * CHUNK_BYTES)]
    # Whichever of them is looked at first: both leave meanwhile, and neither is bad.
    assert files.scrub(lambda: files.write(new)) == []
    assert [there(files, each) for each in (*groups, new)] == [False, False, True]
    assert files.scrub(lambda: None) == []
    assert_reads(files, new)


class ModelFiles:
    """What files there ought to be: sets of keys with the bytes of the file, the one not read for longest first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.files: list[tuple[set[str], int]] = []

    def has(self, key: str) -> bool:
        return any(key in keys for keys, _ in self.files)

    def write(self, sizes: dict[str, int], evicts: bool) -> None:
        fresh = {key: size for key, size in sizes.items() if not self.has(key)}
        size_bytes = PAGE_BYTES + sum(map(page_aligned, fresh.values()))
        room = [self.limit_bytes - sum(size for _, size in self.files[gone:]) for gone in range(len(self.files) + 1)]
        gone = next((gone for gone, free in enumerate(room) if free >= size_bytes), None)
        if fresh and gone is not None and (evicts or not gone):
            self.files = [*self.files[gone:], (set(fresh), size_bytes)]

    def read(self, keys: Sequence[str]) -> None:
        used: list[tuple[set[str], int]] = []
        for key in keys:
            used += [file for file in self.files if key in file[0] and file not in used]
        self.files = [file for file in self.files if file not in used] + used

    def discard(self, keys: Sequence[str]) -> None:
        self.files = [(left, size) for had, size in self.files if (left := had - set(keys))]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_whatever_is_asked_files_stay_within_the_limit_and_the_oldest_leave(data: st.DataObject) -> None:
    pool = several((100, PAGE_BYTES, PAGE_BYTES + 7, 3 * PAGE_BYTES, 5, 2 * PAGE_BYTES, 50, 60))
    some = st.lists(st.sampled_from(pool), min_size=1, max_size=4, unique_by=lambda each: each[0].key)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        limit_bytes = data.draw(st.integers(1, 16)) * PAGE_BYTES
        files, expected = BlockFiles(folder, *FACTS, limit_bytes=limit_bytes), ModelFiles(limit_bytes)
        for _ in range(data.draw(st.integers(1, 20))):
            entries, action = data.draw(some), data.draw(st.sampled_from(["write", "write", "fill", "read", "discard"]))
            if action == "read":
                wanted = [each for each in entries if files.find(each[0].key)]
                assert_reads(files, wanted)
                expected.read(keys_of(wanted))
            elif action == "discard":
                files.discard(keys_of(entries))
                expected.discard(keys_of(entries))
            else:
                files.write(entries, evicts=action == "write")
                expected.write({entry.key: entry.size_bytes for entry, _ in entries}, action == "write")
            assert {key for key in keys_of(pool) if files.find(key)} == {key for key in keys_of(pool) if expected.has(key)}
            assert disk_bytes(folder) == files.taken_bytes == sum(size for _, size in expected.files) <= limit_bytes


def test_a_folder_that_cannot_be_used_has_room_for_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    files = BlockFiles(tmp_path / "file" / "blocks", *FACTS, limit_bytes=2 * FILE_BYTES)
    assert not files.has_room([PAGE_BYTES])
    # That it is of no use was said, and why.
    assert [record.message for record in caplog.records if "left out" in record.message] == []
    assert files.taken_bytes == 0
