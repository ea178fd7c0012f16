"""The store: bundles on disk, weights by the digest of their bytes, each once. Safe for several processes at a time.

Layout below ``root``: ``blobs/ab/abcd…`` (one weight each), ``graphs/ab/abcd…`` (one ``graph.json`` each, by its digest),
``models/<name>.json`` (one ``manifest.json`` each). A model is published by the rename of its manifest, which names its graph by
digest: a reader sees the old model or the new one, whole. Everything is written to a temporary file in the same folder,
synced, and renamed, so a crash at any line leaves leftovers but never half a file under a final name. Leftovers are
swept when a store is opened that nobody else has open.

Stateless but for the lock, so any thread may call anything. Must not import torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from trunkline.errors import ModelCorrupt, UnknownModel

from sidecar.bundle import (
    MODEL_NAME,
    Bundle,
    canonical_graph,
    manifest_bytes,
    parse_bundle,
    parse_manifest,
)
from sidecar.errors import BlobCorrupt, BlobMissing, BundleError, StoreError, StoreFull

DIGEST: Final = re.compile(r"[0-9a-f]{64}")
# A blob that was pushed ahead of its model must outlast the push.
GC_GRACE_S: Final = 3600.0
_CHUNK_BYTES: Final = 1 << 20
_TEMPORARY: Final = ".part-"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Report:
    """What ``verify`` found. ``broken`` maps each affected model to what is wrong with it."""

    blob_count: int = 0
    size_bytes: int = 0
    corrupt: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


class Store:
    """Bundles below one folder. Every name and digest is checked before a path is made of it."""

    def __init__(self, root: Path) -> None:
        """Open the store, making it when it is not there. Raises StoreError when the folder cannot be used."""
        self.root = root
        try:
            for folder in (root, root / "blobs", root / "graphs", root / "models"):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise StoreError(f"the store {root} cannot be opened ({os.strerror(error.errno or 0)})") from error
        # Whoever gets the lock exclusively is alone, so temporary files are nobody's work in progress.
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._sweep()
        fcntl.flock(self._lock, fcntl.LOCK_SH)

    def close(self) -> None:
        """Give up the lock. The store must not be used afterwards."""
        os.close(self._lock)

    def _sweep(self) -> None:
        for path in self.root.rglob(f"*{_TEMPORARY}*"):
            path.unlink(missing_ok=True)

    # --- blobs -------------------------------------------------------------------------------------------------------

    def blob_path(self, digest: str) -> Path:
        """Return where a blob lies. Raises BlobMissing when ``digest`` is none."""
        return self._path("blobs", digest)

    def _path(self, kind: str, digest: str) -> Path:
        if not DIGEST.fullmatch(digest):
            raise BlobMissing("a digest is 64 lower-case hexadecimal digits")
        return self.root / kind / digest[:2] / digest

    def has(self, digest: str) -> bool:
        return self.blob_path(digest).is_file()

    def size(self, digest: str) -> int:
        """Return the bytes of a blob. Raises BlobMissing."""
        try:
            return self.blob_path(digest).stat().st_size
        except FileNotFoundError as error:
            raise BlobMissing(f"the store has no blob {digest[:12]}", digest=digest) from error

    def missing(self, digests: Iterable[str]) -> list[str]:
        """Return those of ``digests`` that the store lacks, each once, in order."""
        return [digest for digest in dict.fromkeys(digests) if not self.has(digest)]

    def put_blob(self, digest: str, chunks: Iterable[bytes], size_bytes: int) -> bool:
        """Store ``size_bytes`` bytes under their digest; False when they were there already and nothing was read.

        Raises BlobCorrupt when bytes, size and digest do not agree, StoreFull when the disk is full; either way nothing is
        left behind.
        """
        path = self.blob_path(digest)
        if path.is_file():
            # A fresh time keeps it from a collection that runs before its model arrives.
            os.utime(path)
            return False
        found = hashlib.sha256()
        with self._written(path, size_bytes) as descriptor:
            received_bytes = 0
            for chunk in chunks:
                received_bytes += len(chunk)
                if received_bytes > size_bytes:
                    raise BlobCorrupt(f"blob {digest[:12]} is longer than the {size_bytes} bytes announced", digest=digest)
                found.update(chunk)
                _write(descriptor, chunk)
            if received_bytes != size_bytes:
                raise BlobCorrupt(
                    f"blob {digest[:12]} ended after {received_bytes} of {size_bytes} bytes; send it again",
                    digest=digest,
                )
            if found.hexdigest() != digest:
                raise BlobCorrupt(
                    f"the bytes sent as blob {digest[:12]} have digest {found.hexdigest()[:12]}; they were altered on the way",
                    digest=digest,
                )
        return True

    def read_blob(self, digest: str, target: memoryview, crc32: int | None = None) -> None:
        """Read a blob into ``target``, which has exactly its size. Raises BlobMissing, BlobCorrupt, OSError.

        ``crc32`` is compared when given: it runs at memory speed, which sha256 does not.
        """
        path = self.blob_path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise BlobMissing(f"the store has no blob {digest[:12]}", digest=digest) from error
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            stored_bytes = os.fstat(descriptor).st_size
            if stored_bytes != len(target):
                raise BlobCorrupt(f"blob {digest[:12]} has {stored_bytes} bytes instead of {len(target)}", digest=digest)
            done = 0
            checksum = 0
            while done < len(target):
                # In pieces, so that the checksum finds the bytes still in the processor's cache.
                count = file.readinto(target[done : done + _CHUNK_BYTES])
                if not count:
                    raise BlobCorrupt(f"blob {digest[:12]} ended after {done} of {len(target)} bytes", digest=digest)
                if crc32 is not None:
                    checksum = zlib.crc32(target[done : done + count], checksum)
                done += count
        if crc32 is not None and checksum != crc32:
            raise BlobCorrupt(
                f"blob {digest[:12]} has checksum {checksum:08x} instead of {crc32:08x}; the disk has altered it",
                digest=digest,
            )

    # --- models ------------------------------------------------------------------------------------------------------

    def put_model(self, manifest_data: bytes, graph_data: bytes) -> Bundle:
        """Publish a model whose blobs were put before, replacing the one of its name. Raises BundleError, BlobMissing."""
        bundle = parse_bundle(manifest_data, graph_data)
        absent = self.missing(weight.digest for weight in bundle.graph.weights)
        if absent:
            count = len({weight.digest for weight in bundle.graph.weights})
            raise BlobMissing(
                f"{len(absent)} of the {count} weights of {bundle.name} are not in the store; push them first",
                missing_count=len(absent),
            )
        for weight in bundle.graph.weights:
            stored_bytes = self.size(weight.digest)
            if stored_bytes != weight.size_bytes:
                raise BundleError(
                    f"weight {weight.digest[:12]} of {bundle.name} takes {weight.size_bytes} bytes, its blob has {stored_bytes}",
                    digest=weight.digest,
                )
        self._replace(self._path("graphs", bundle.graph_digest), canonical_graph(bundle.graph))
        self._replace(self._manifest(bundle.name), manifest_bytes(bundle))
        return bundle

    def _manifest(self, name: str) -> Path:
        if not MODEL_NAME.fullmatch(name):
            raise UnknownModel(f"{name[:64]!r} is no name of a model")
        return self.root / "models" / f"{name}.json"

    def model(self, name: str) -> Bundle:
        """Return a stored model. Raises UnknownModel, and ModelCorrupt when what is stored cannot be read."""
        path = self._manifest(name)
        try:
            manifest_data = path.read_bytes()
        except FileNotFoundError as error:
            raise UnknownModel(f"the store holds no model {name!r}", model=name) from error
        except OSError as error:
            raise ModelCorrupt(f"the manifest of {name} cannot be read ({os.strerror(error.errno or 0)})", model=name) from error
        try:
            digest = parse_manifest(manifest_data).graph_digest
            bundle = parse_bundle(manifest_data, self._path("graphs", digest).read_bytes())
        except (BundleError, BlobMissing) as error:
            raise ModelCorrupt(f"{name} is damaged: {error.message}; push it again", model=name) from error
        except OSError as error:
            raise ModelCorrupt(f"the graph of {name} cannot be read; push it again", model=name) from error
        if bundle.name != name:
            raise ModelCorrupt(f"the manifest of {name} names {bundle.name}; push it again", model=name)
        return bundle

    def models(self) -> list[str]:
        """Return the names of the stored models, readable or not."""
        stems = (path.stem for path in (self.root / "models").glob("*.json"))
        return sorted(stem for stem in stems if MODEL_NAME.fullmatch(stem))

    def remove_model(self, name: str) -> None:
        """Forget a model; its blobs stay until ``gc``. Raises UnknownModel."""
        path = self._manifest(name)
        try:
            path.unlink()
        except FileNotFoundError as error:
            raise UnknownModel(f"the store holds no model {name!r}", model=name) from error
        _sync_folder(path.parent)

    # --- upkeep ------------------------------------------------------------------------------------------------------

    def verify(self) -> Report:
        """Read every blob against its digest and every model against its blobs. Slow: sha256 of everything."""
        report = Report()
        present: dict[str, int] = {}
        for path in self._stored("blobs"):
            found = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK_BYTES):
                    found.update(chunk)
                    report.size_bytes += len(chunk)
            report.blob_count += 1
            present[path.name] = path.stat().st_size
            if found.hexdigest() != path.name:
                report.corrupt.append(path.name)
        for name in self.models():
            try:
                weights = self.model(name).graph.weights
            except ModelCorrupt as error:
                report.broken[name] = error.message
                continue
            missing = {weight.digest for weight in weights} - present.keys()
            altered = {weight.digest for weight in weights} & set(report.corrupt)
            if missing or altered:
                report.broken[name] = f"{len(missing)} weights are missing, {len(altered)} are altered; push it again"
        report.corrupt.sort()
        return report

    def gc(self, *, dry_run: bool = False, grace_s: float = GC_GRACE_S) -> tuple[int, int]:
        """Remove blobs and graphs that no model uses and that are older than ``grace_s``; return count and bytes.

        While a model cannot be read, nothing is removed: its blobs cannot be told from garbage.
        """
        used: set[str] = set()
        for name in self.models():
            try:
                bundle = self.model(name)
            except ModelCorrupt as error:
                raise StoreError(f"nothing was removed: {error.message}, or remove it", model=name) from error
            used.add(bundle.graph_digest)
            used.update(weight.digest for weight in bundle.graph.weights)
        count = size_bytes = 0
        newest_s = time.time() - grace_s
        for path in (*self._stored("blobs"), *self._stored("graphs")):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                if path.name not in used and state.st_mtime <= newest_s:
                    count += 1
                    size_bytes += state.st_size
                    if not dry_run:
                        path.unlink()
        return count, size_bytes

    def _stored(self, kind: str) -> Iterator[Path]:
        for path in sorted((self.root / kind).glob("*/*")):
            if DIGEST.fullmatch(path.name):
                yield path

    # --- writing -----------------------------------------------------------------------------------------------------

    def _replace(self, path: Path, content: bytes) -> None:
        with self._written(path, len(content)) as descriptor:
            _write(descriptor, content)

    @contextlib.contextmanager
    def _written(self, path: Path, size_bytes: int) -> Iterator[int]:
        """Yield a descriptor of a temporary file that becomes ``path`` when the block ends well, and vanishes otherwise."""
        temporary = path.with_name(f"{path.name}{_TEMPORARY}{secrets.token_hex(8)}")
        descriptor = -1
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            yield descriptor
            os.fsync(descriptor)
            os.rename(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            if error.errno not in _FULL:
                raise StoreError(f"the store cannot be written ({os.strerror(error.errno or 0)})") from error
            free_bytes = _free_bytes(self.root)
            raise StoreFull(
                f"{size_bytes} bytes could not be stored ({os.strerror(error.errno or 0)}): {free_bytes} bytes are free; "
                "remove models and run `trunkline store gc`, or use a larger disk",
                needed_bytes=size_bytes,
                free_bytes=free_bytes,
            ) from error
        finally:
            if descriptor >= 0:
                os.close(descriptor)
            temporary.unlink(missing_ok=True)


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_bytes(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize
