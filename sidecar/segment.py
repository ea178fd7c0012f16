"""The segment: shared memory for weights that outlives the engine. The supervisor makes it and keeps its descriptor.

Every engine inherits the descriptor and maps it (``sidecar.hosttier``); the supervisor never does. The segment is a POSIX shared
memory object, named after the run directory, so that the next supervisor of a run directory finds what the last one left
when it was killed, and adopts it if owner, mode, layout and budget are right. A supervisor holds a lock on its segment, which its
children hold with it and which the kernel frees however they end: a segment that is locked is never adopted, replaced
or removed. One whose run directory is gone has nobody left to ask for it, and the next supervisor of the same user removes it.

Where ``/dev/shm`` is too small, as in many containers, the segment is a memfd. An engine's death does not harm it either; the
supervisor's ends it.

It begins with a page that says what it is; then comes the ledger, records of fixed size; then the bytes. It has addresses for
eight times the budget, but memory only where pages were reserved: fragmentation costs addresses, never memory. (With twice the
budget, one in a hundred requests for a random one of eleven models found no hole that was large enough.)
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import logging
import mmap
import os
import stat
import struct
import zlib
from pathlib import Path
from typing import Final

import posix_ipc
from trunkline.arena import sealable_memory

from sidecar.errors import NoRoom
from sidecar.libc import LIBC, failed

log = logging.getLogger("trunkline.segment")

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux keeps POSIX shared memory, not a place for temporary files
# Key, offset and size of an extent, checksum of the weight, number of the piece and of all pieces; last the seal, which makes the
# record valid (``sidecar.ledger``).
RECORD: Final = struct.Struct("<32sQQIHH4xI")
RECORD_LIMIT: Final = 65536
LEDGER_OFFSET: Final = mmap.PAGESIZE
# Header included: where the bytes begin.
LEDGER_END: Final = LEDGER_OFFSET + RECORD_LIMIT * RECORD.size

_MAGIC: Final = b"TRUNKSEG"
_VERSION: Final = 2
_LAYOUT: Final = zlib.crc32(f"{_VERSION} {RECORD.format} {RECORD_LIMIT} {mmap.PAGESIZE}".encode())
# Magic, layout, budget, length of the run directory's path, which follows.
_HEADER: Final = struct.Struct("<8sIQH")
_MODE: Final = 0o600
_ROUNDING_BYTES: Final = 64 << 20
_ADDRESSES: Final = 8
# What the name of a segment ends with whose sidecar takes over from another.
_NEXT: Final = "-next"
# FALLOC_FL_PUNCH_HOLE with FALLOC_FL_KEEP_SIZE, of linux/falloc.h.
_PUNCH_HOLE: Final = 0x3

LIBC.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Segment:
    """Shared memory with room for ``budget_bytes`` of weights. Used by the supervisor alone; engines get ``descriptor``."""

    def __init__(self, descriptor: int, name: str | None) -> None:
        self.descriptor = descriptor
        # None when the segment has none, and so cannot be adopted.
        self.name = name

    @classmethod
    def create_or_adopt(cls, run_dir: Path, budget_bytes: int, *, is_next: bool = False) -> Segment:
        """Return the segment of a run directory, whose lock the caller holds. Raises NoRoom when not even the ledger fits.

        One that ``is_next`` is of a sidecar that takes over, and so does not hold that lock yet: it lies beside the one of the
        sidecar that runs, until ``take_place`` is called.
        """
        run_dir = run_dir.resolve()
        name = segment_name(run_dir)
        if is_next:
            name += _NEXT
        else:
            _remove_unused(name + _NEXT)
        _remove_abandoned(name)
        header = _header(run_dir, budget_bytes)
        try:
            return cls(_adopted(name, header, budget_bytes) or _created(name, header, budget_bytes), name)
        except (NoRoom, posix_ipc.Error, OSError) as error:
            log.warning(
                "the segment %s is not to be had: %s. Weights are kept in memory without a name, which outlives an engine but "
                "not the supervisor",
                *(name, error),
            )
        descriptor = sealable_memory("trunkline-weights")
        try:
            _prepare(descriptor, header, budget_bytes)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(descriptor, None)

    def take_place(self) -> None:
        """Be found by the next supervisor from now on, in place of the segment of a sidecar that has ended."""
        if self.name is not None and self.name.endswith(_NEXT):
            name = self.name.removesuffix(_NEXT)
            # An operator may have removed it.
            with contextlib.suppress(FileNotFoundError):
                os.rename(SHARED_MEMORY / self.name[1:], SHARED_MEMORY / name[1:])
            self.name = name
            # Of devices that the other had, if it was killed.
            _remove_abandoned(name)

    def unlink(self) -> None:
        """Give the memory back to the system once the last process that maps it is gone. For a clean stop."""
        if self.name is not None:
            # An operator may have removed it already.
            with contextlib.suppress(posix_ipc.ExistentialError):
                posix_ipc.unlink_shared_memory(self.name)
            self.name = None

    def close(self) -> None:
        """Close the descriptor; twice is safe. What is there stays for whoever adopts the segment, unless it was unlinked."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def segment_name(run_dir: Path) -> str:
    """Return the name of a run directory's segment, for the current user."""
    return f"/{_prefix()}{hashlib.sha256(os.fsencode(run_dir)).hexdigest()[:32]}"


def segment_bytes(budget_bytes: int) -> int:
    """Return how large a segment for ``budget_bytes`` is: addresses, not memory."""
    return LEDGER_END + -(-_ADDRESSES * budget_bytes // _ROUNDING_BYTES) * _ROUNDING_BYTES


def read_budget(descriptor: int) -> int:
    """Return the budget that a segment was made for."""
    magic, layout, budget_bytes, _ = _HEADER.unpack(os.pread(descriptor, _HEADER.size, 0))
    assert (magic, layout) == (_MAGIC, _LAYOUT), "the descriptor is no segment of this version"
    return int(budget_bytes)


def _prefix() -> str:
    return f"trunkline-{os.geteuid()}-"


def _header(run_dir: Path, budget_bytes: int) -> bytes:
    path = os.fsencode(run_dir)
    return _HEADER.pack(_MAGIC, _LAYOUT, budget_bytes, len(path)) + path


def _adopted(name: str, header: bytes, budget_bytes: int) -> int | None:
    """Return the descriptor of the segment that is there already; None when there is none, or it was removed as unfit."""
    with contextlib.ExitStack() as stack:
        try:
            descriptor = _open(name, stack)
        except posix_ipc.ExistentialError:
            return None
        _lock(descriptor)
        flaw = _flaw(descriptor, header, budget_bytes)
        if flaw is None:
            held_bytes = os.fstat(descriptor).st_blocks * 512 - LEDGER_END
            log.info("adopted the segment %s with %d bytes of weights", name, held_bytes)
            stack.pop_all()
            return descriptor
        log.warning("the segment %s is made anew: %s", name, flaw)
        posix_ipc.unlink_shared_memory(name)
    return None


def _open(name: str, stack: contextlib.ExitStack) -> int:
    """Open a segment, to be closed by ``stack``. Raises posix_ipc.Error."""
    descriptor = int(posix_ipc.SharedMemory(name).fd)
    stack.callback(os.close, descriptor)
    return descriptor


def _lock(descriptor: int) -> None:
    """Lock a segment until every process that has it from this one is gone. Raises BlockingIOError when it is in use."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(error.errno, "another sidecar is using it") from error


def _flaw(descriptor: int, header: bytes, budget_bytes: int) -> str | None:
    """Say why a segment cannot be adopted; None when it can."""
    found = os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, not to {os.geteuid()}"
    if (mode := stat.S_IMODE(found.st_mode)) != _MODE:
        return f"its mode is {mode:04o} instead of {_MODE:04o}"
    if found.st_size != segment_bytes(budget_bytes):
        return f"it has {found.st_size} bytes instead of the {segment_bytes(budget_bytes)} that the memory budget asks for"
    if os.pread(descriptor, len(header), 0) != header:
        return "it was made by another version, for another memory budget, or not to its end"
    return None


def _created(name: str, header: bytes, budget_bytes: int) -> int:
    """Make the segment of a name that nobody has. Raises NoRoom when the budget does not fit."""
    state = os.statvfs(SHARED_MEMORY)
    free_bytes, needed_bytes = state.f_bavail * state.f_frsize, budget_bytes + LEDGER_END
    if free_bytes < needed_bytes:
        raise NoRoom(
            f"{SHARED_MEMORY} has {free_bytes} bytes free, the memory budget and its ledger take {needed_bytes}; enlarge "
            f"{SHARED_MEMORY} or lower the memory budget",
            needed_bytes=needed_bytes,
            free_bytes=free_bytes,
        )
    with contextlib.ExitStack() as stack:
        descriptor = int(posix_ipc.SharedMemory(name, posix_ipc.O_CREX, mode=_MODE).fd)
        stack.callback(os.close, descriptor)
        stack.callback(posix_ipc.unlink_shared_memory, name)
        _lock(descriptor)
        _prepare(descriptor, header, budget_bytes)
        stack.pop_all()
    return descriptor


def _prepare(descriptor: int, header: bytes, budget_bytes: int) -> None:
    """Give a segment its size, its ledger, and last its header. Raises NoRoom."""
    os.ftruncate(descriptor, segment_bytes(budget_bytes))
    reserve(descriptor, 0, LEDGER_END, "the ledger")
    os.pwrite(descriptor, header, 0)


def reserve(descriptor: int, offset: int, size_bytes: int, what: str) -> None:
    """Have the system set pages aside for a range. Raises NoRoom: to write where there is no page left would be a signal."""
    try:
        os.posix_fallocate(descriptor, offset, size_bytes)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
            raise
        raise NoRoom(
            f"the system has no {size_bytes} bytes of shared memory left for {what} ({os.strerror(error.errno)}); enlarge "
            f"{SHARED_MEMORY} or the container's memory limit, or lower the memory budget",
            needed_bytes=size_bytes,
        ) from error


def punch(descriptor: int, offset: int, size_bytes: int) -> None:
    """Give the pages of a range back to the system. Raises OSError.

    Not by way of Python's madvise, which keeps all other threads from running meanwhile, 0.3 ms for a MiB.
    """
    if LIBC.fallocate(descriptor, _PUNCH_HOLE, offset, size_bytes):
        raise failed()


def _remove_unused(name: str) -> None:
    """Remove the segment of a sidecar that was to take over, and was killed before it did."""
    # There is none, or what it has left still ends: then the next start removes it.
    with contextlib.suppress(posix_ipc.Error, OSError), contextlib.ExitStack() as stack:
        _lock(_open(name, stack))
        posix_ipc.unlink_shared_memory(name)


def _remove_abandoned(own: str) -> None:
    """Remove this user's segments that nobody uses and whose run directory is no more."""
    for path in SHARED_MEMORY.glob(f"{_prefix()}*"):
        name = f"/{path.name}"
        # In use, or removed meanwhile by somebody else.
        with contextlib.suppress(posix_ipc.Error, OSError), contextlib.ExitStack() as stack:
            descriptor = _open(name, stack)
            start = os.pread(descriptor, mmap.PAGESIZE, 0).ljust(_HEADER.size, b"\0")
            magic, _, _, length = _HEADER.unpack_from(start)
            run_dir = Path(os.fsdecode(start[_HEADER.size : _HEADER.size + length]))
            if name != own and magic == _MAGIC and not run_dir.exists():
                _lock(descriptor)
                log.warning("removing the segment %s: its run directory %s is gone", name, run_dir)
                posix_ipc.unlink_shared_memory(name)
