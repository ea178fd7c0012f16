"""The disk: reading files past the page cache or through it, in whole pages, and which of the two is faster here.

Reading past the page cache (*direct*) leaves out a copy, and memory that no budget counts; some file systems refuse it, and on
some disks reading ahead through the cache is faster. Targets begin on a page of memory and hold whole pages. Pure functions,
callable from any thread. Must not import torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import mmap
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

log = logging.getLogger("trunkline.blockfiles")

PAGE_BYTES: Final = mmap.PAGESIZE
# As many targets as one call may fill.
MOST_TARGETS: Final = os.sysconf("SC_IOV_MAX")
# What the names of temporary files have in them.
TEMPORARY: Final = ".part-"
_CALIBRATION_BYTES: Final = 32 * 1024 * 1024
_CALIBRATION_READ_BYTES: Final = 8 * 1024 * 1024
_CALIBRATION_ROUNDS: Final = 3
# Of what is free, for a moment: whoever stores something meanwhile must not find the disk full.
_CALIBRATION_SHARE: Final = 4
# Through the page cache everything is copied once more: three times the processor time, which computing has a better use for.
# Measured while nobody computes that way is up to twice as fast, and then slower when it matters (docs/decisions.md).
_DIRECT_WORTH: Final = 2.5


@dataclass(frozen=True)
class Source:
    """A way to read files. ``drops`` says that what was read is taken out of the page cache, which is memory, too."""

    name: str
    flags: int
    drops: bool


DIRECT: Final = Source("direct", os.O_DIRECT, drops=False)
BUFFERED: Final = Source("buffered", 0, drops=False)
# For a strict memory budget.
BUFFERED_STRICT: Final = Source("buffered", 0, drops=True)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Yield a descriptor of a file; one that is made is for this user alone. Raises OSError."""
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def remove_unless_locked(path: Path) -> None:
    """Remove the temporary file of a writer that is no more: whoever still writes to one has it locked. Raises OSError."""
    with contextlib.suppress(FileNotFoundError, BlockingIOError), opened(path, os.O_RDONLY) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)


def is_refusal(error: OSError, source: Source) -> bool:
    """Return whether ``error`` says that this file system, or this part of it, cannot be read by way of ``source``."""
    return source is DIRECT and error.errno == errno.EINVAL


def fill(descriptor: int, source: Source, offset: int, targets: Sequence[memoryview]) -> int:
    """Read from ``offset`` on until all targets are full or the file ends; return the number of bytes. Raises OSError.

    One call of the kernel, unless it stops halfway. What was read of a file that ends within a page is not counted when reading
    directly.
    """
    done, left = 0, [target for target in targets if target.nbytes]
    while left:
        count = os.preadv(descriptor, left[:MOST_TARGETS], offset + done)
        if source is DIRECT:
            # Direct reading goes on at a page only: what came of a broken one is read again.
            count -= count % PAGE_BYTES
        if not count:
            break
        done += count
        while left and count >= left[0].nbytes:
            count -= left.pop(0).nbytes
        if count:
            left[0] = left[0][count:]
    if source.drops:
        drop(descriptor, offset, done)
    return done


def drop(descriptor: int, offset: int = 0, size_bytes: int = 0) -> None:
    """Take a part of a file, from ``offset`` to its end when no size is given, out of the page cache."""
    os.posix_fadvise(descriptor, offset, size_bytes, os.POSIX_FADV_DONTNEED)


def write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """Write all of ``content``, which has single bytes. Raises OSError."""
    while content:
        count = os.pwrite(descriptor, content, offset)
        content, offset = content[count:], offset + count


def free_bytes_of(folder: Path) -> int:
    """Return the bytes that whoever is not root may still write where a folder is. Raises OSError."""
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


# --- calibration --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found: the better source, and bytes per second by the names of those that are not refused."""

    source: Source
    bytes_per_s: dict[str, float]


def calibrate(folder: Path, *, is_strict: bool = False, size_bytes: int = _CALIBRATION_BYTES) -> Calibration:
    """Read a file in ``folder`` either way, from the disk each time; return the better source, and how fast they were at best.

    ``is_strict`` asks for a source that leaves nothing in the page cache. Takes as long as the disk needs to write
    ``size_bytes``, whole pages, and read them six times. There are no figures of a folder that cannot be used, or on a
    disk that is nearly full.
    """
    buffered = BUFFERED_STRICT if is_strict else BUFFERED
    found: dict[str, float] = {}
    path = folder / f"calibration{TEMPORARY}{secrets.token_hex(8)}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if free_bytes_of(folder) < _CALIBRATION_SHARE * size_bytes:
            raise OSError(errno.ENOSPC, "")
        try:
            _write_calibration(path, size_bytes)
            for source in (buffered, DIRECT) * _CALIBRATION_ROUNDS:
                bytes_per_s = _measured_bytes_per_s(path, source, size_bytes)
                if bytes_per_s is not None:
                    found[source.name] = max(bytes_per_s, found.get(source.name, 0.0))
        finally:
            path.unlink(missing_ok=True)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        log.warning("the disk of %s cannot be measured (%s); its files are read through the page cache", folder, reason)
        return Calibration(buffered, {})
    is_direct = _DIRECT_WORTH * found.get(DIRECT.name, 0.0) >= found[buffered.name]
    return Calibration(DIRECT if is_direct else buffered, found)


def _write_calibration(path: Path, size_bytes: int) -> None:
    # Not zeros, and no two pages alike: some disks do not keep those.
    with path.open("xb", buffering=0) as file:
        # Whoever tidies up leaves it alone, as every temporary file that is locked.
        fcntl.flock(file, fcntl.LOCK_EX)
        for start in range(0, size_bytes, _CALIBRATION_READ_BYTES):
            write_at(file.fileno(), memoryview(os.urandom(min(_CALIBRATION_READ_BYTES, size_bytes - start))), start)
        os.fsync(file.fileno())


def _measured_bytes_per_s(path: Path, source: Source, size_bytes: int) -> float | None:
    """Return the speed of one pass over a file that no page of memory holds, None where the source is refused."""
    scratch = memoryview(mmap.mmap(-1, _CALIBRATION_READ_BYTES))
    # Memory is made when it is first written to: not a part of what is measured.
    scratch[:] = bytes(_CALIBRATION_READ_BYTES)
    try:
        with opened(path, os.O_RDONLY | source.flags) as descriptor:
            drop(descriptor)
            started_s = time.perf_counter()
            for start in range(0, size_bytes, _CALIBRATION_READ_BYTES):
                fill(descriptor, source, start, [scratch[: size_bytes - start]])
            return size_bytes / (time.perf_counter() - started_s)
    except OSError as error:
        if is_refusal(error, source):
            return None
        raise
