"""Blobs that have come in part: what was received of one before its origin broke off, so that the rest alone is asked for.

One file a blob, named by its digest, which its writer has locked. They are few, and none is old: what nobody writes to leaves
when it has not been written to for an hour, or when there are more recent ones. Must not import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sidecar.disk import opened, remove_unless_locked

GRACE_S: Final = 3600.0
_MOST: Final = 8
_CHUNK_BYTES: Final = 1 << 20


class Partial:
    """A blob that is being received. ``size_bytes`` of it are there."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.size_bytes = 0
        self._found = hashlib.sha256()
        while chunk := os.read(descriptor, _CHUNK_BYTES):
            self._count(chunk)

    def append(self, chunk: bytes) -> None:
        """Add bytes. Raises OSError."""
        view = memoryview(chunk)
        while view:
            view = view[os.write(self.descriptor, view) :]
        self._count(chunk)

    def digest(self) -> str:
        """Return the sha256 of what is there."""
        return self._found.hexdigest()

    def _count(self, chunk: bytes) -> None:
        self._found.update(chunk)
        self.size_bytes += len(chunk)


@contextlib.contextmanager
def partial(folder: Path, digest: str, limit_bytes: int) -> Iterator[Partial | None]:
    """Yield what there is of a blob, to be gone on with; None while somebody else does. Raises OSError.

    More than ``limit_bytes`` cannot be of this blob, and is forgotten.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    with _locked(folder / digest) as descriptor:
        if descriptor is None:
            yield None
            return
        if os.fstat(descriptor).st_size > limit_bytes:
            os.ftruncate(descriptor, 0)
        # From here on it is the most recent one.
        os.utime(descriptor)
        sweep(folder)
        yield Partial(folder / digest, descriptor)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int | None]:
    while True:
        with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield None
                return
            # Else it was swept in the moment between its making and its lock.
            if os.fstat(descriptor).st_nlink:
                yield descriptor
                return


def sweep(folder: Path, grace_s: float = GRACE_S) -> None:
    """Remove what nobody writes to and was not written to for ``grace_s``, or is not among the most recent. Raises OSError."""
    written: list[tuple[float, Path]] = []
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):
            written.append((path.stat().st_mtime, path))
    if not written:
        return
    written.sort(reverse=True)
    newest_s = time.time() - grace_s
    for number, (written_s, path) in enumerate(written):
        if number >= _MOST or written_s < newest_s:
            remove_unless_locked(path)
