"""The store: bundles on disk, weights by the digest of their bytes, each once. Safe for several processes at a time.

Layout below ``root``: ``blobs/ab/abcd…`` (one weight each), ``graphs/ab/abcd…`` (one ``graph.json`` each, by its digest),
``models/<name>.json`` (one ``manifest.json`` each), of a version ``models/<name>:<label>.json``, and ``releases/<name>.json``
(which versions answer for a name: ``sidecar.versions``). A model is published by the rename of its manifest, which names its
graph by digest: a reader sees the old model or the new one, whole. Everything is written to a temporary file in the same folder,
synced, and renamed, so a crash at any line leaves leftovers but never half a file under a final name. A writer holds a lock
on its temporary file, which the kernel frees however the writer ends: a leftover is a temporary file that nobody has locked.

A blob whose bytes turn out not to be its digest's moves to ``quarantine/ab/abcd…``: it is never served again, and as the store
then lacks it, pushing the model again heals the store. What came of a blob that was pulled, before its origin broke off, waits
in ``partial`` for the rest.

A push counts on blobs it was told it need not send, and a collection removes blobs that no model uses: the first holds the
file ``lock`` shared, the second alone. Who changes versions and releases holds ``releases/lock`` alone. Readers hold nothing. The
object has no state, so any thread may call anything, and it may be opened before a fork. Must not import torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from isal import isal_zlib
from trunkline.errors import ModelCorrupt, UnknownModel

from sidecar import partials
from sidecar.bundle import (
    Bundle,
    canonical_graph,
    manifest_bytes,
    parse_bundle,
    parse_manifest,
)
from sidecar.disk import TEMPORARY, drop, free_bytes_of, opened, remove_unless_locked
from sidecar.errors import BlobCorrupt, BlobMissing, BundleError, StoreError, StoreFull
from sidecar.labels import LONGEST_NAME, STORED_NAME, labelled, parted
from sidecar.partials import Partial
from sidecar.releases import Release, parse_release, release_bytes

log = logging.getLogger("trunkline.store")

DIGEST: Final = re.compile(r"[0-9a-f]{64}")
# A blob that was pushed ahead of its model must outlast the push.
GC_GRACE_S: Final = 3600.0
_CHUNK_BYTES: Final = 1 << 20
_KINDS: Final = ("blobs", "graphs", "models", "releases", "quarantine")
_PARTIAL: Final = "partial"
_LOCK, _VERSIONS_LOCK = "lock", "releases/lock"
_FULL: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class Report:
    """What ``verify`` found: blobs that are altered or unreadable, and each affected model with what is wrong with it."""

    blob_count: int = 0
    size_bytes: int = 0
    corrupt: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)


class Store:
    """Bundles below one folder. Every name and digest is checked before a path is made of it."""

    def __init__(self, root: Path, *, sweep: bool = True) -> None:
        """Open the store, making it when it is not there. Raises StoreError when the folder cannot be used.

        Without ``sweep``, what writers left that are no more stays until the next who opens it, or collects.
        """
        self.root = root
        try:
            for folder in (root, *(root / kind for kind in _KINDS)):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for lock in (_LOCK, _VERSIONS_LOCK):
                os.close(os.open(root / lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            _sync_folder(root)
            if sweep:
                self._sweep()
        except OSError as error:
            raise StoreError(f"the store {root} cannot be opened ({os.strerror(error.errno or 0)})") from error

    def _sweep(self) -> None:
        """Remove the temporary files of writers that are no more."""
        for kind in _KINDS:
            for path in (self.root / kind).rglob(f"*{TEMPORARY}*"):
                remove_unless_locked(path)
        partials.sweep(self.root / _PARTIAL)

    @contextlib.contextmanager
    def _locked(self, how: int, file: str = _LOCK) -> Iterator[None]:
        # Opened anew each time: threads that shared one description would share its lock, too.
        try:
            descriptor = os.open(self.root / file, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise self._refusal(error, 0) from error
        try:
            fcntl.flock(descriptor, how)
            yield
        finally:
            os.close(descriptor)

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
        """Return those of ``digests`` that the store lacks, each once, in order. The others are safe from ``gc`` for a while."""
        with self._locked(fcntl.LOCK_SH):
            return [digest for digest in dict.fromkeys(digests) if not self._renewed(digest)]

    def _renewed(self, digest: str) -> bool:
        """Return whether a blob is there, made young again so that it outlasts the push that counts on it."""
        path = self.blob_path(digest)
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._refusal(error, 0) from error
        return True

    def put_blob(self, digest: str, chunks: Iterable[bytes], size_bytes: int) -> bool:
        """Store ``size_bytes`` bytes under their digest; False when they were there already and nothing was read.

        Raises BlobCorrupt when bytes, size and digest do not agree, StoreFull when the disk is full; either way nothing is
        left behind.
        """
        path = self.blob_path(digest)
        with self._locked(fcntl.LOCK_SH):
            if self._renewed(digest):
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

    def check_room(self, size_bytes: int) -> None:
        """Raise StoreFull where the disk has no room for so many bytes, before any of them comes."""
        if size_bytes > free_bytes_of(self.root):
            raise self._refusal(OSError(errno.ENOSPC, ""), size_bytes)

    def resume_blob(self, digest: str, fetch: Callable[[int], Iterable[bytes]], size_bytes: int) -> int:
        """Store a blob as ``put_blob`` does, going on where an attempt before has ended; return how many bytes were fetched.

        ``fetch(start)`` gives the bytes from ``start`` on. When it raises, what came until then is kept for the next attempt.
        Raises what it raises, BlobCorrupt and StoreFull, after which nothing is left.
        """
        path = self.blob_path(digest)
        with self._locked(fcntl.LOCK_SH):
            if self._renewed(digest):
                return 0
        try:
            with partials.partial(self.root / _PARTIAL, digest, size_bytes) as partial:
                if partial is None:
                    # Somebody else receives it at this moment, perhaps for a model that nobody will need.
                    return size_bytes if self.put_blob(digest, fetch(0), size_bytes) else 0
                return self._resumed(partial, path, fetch, size_bytes)
        except OSError as error:
            raise self._refusal(error, size_bytes) from error

    def _resumed(self, partial: Partial, path: Path, fetch: Callable[[int], Iterable[bytes]], size_bytes: int) -> int:
        start = partial.size_bytes
        try:
            if start < size_bytes:
                for chunk in fetch(start):
                    partial.append(chunk)
                    if partial.size_bytes > size_bytes:
                        break
            if partial.size_bytes != size_bytes or partial.digest() != path.name:
                raise BlobCorrupt(
                    f"blob {path.name[:12]} has {size_bytes} bytes; {partial.size_bytes} came, of digest {partial.digest()[:12]}",
                    digest=path.name,
                )
            os.fsync(partial.descriptor)
            path.parent.mkdir(mode=0o700, exist_ok=True)
            os.rename(partial.path, path)
        except (BlobCorrupt, OSError):
            partial.path.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
        _sync_folder(path.parent.parent)
        return size_bytes - start

    def read_blob(self, digest: str, target: memoryview, crc32: int | None = None) -> None:
        """Read a blob into ``target``, which has exactly its size. Raises BlobMissing, BlobCorrupt, OSError.

        ``crc32`` is compared when given: it runs at memory speed, which sha256 does not. A blob that disagrees is read once more
        against its digest, which tells whether the blob is altered, and set aside, or the caller mistaken.
        """
        path = self.blob_path(digest)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise BlobMissing(f"the store has no blob {digest[:12]}", digest=digest) from error
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            stored_bytes = os.fstat(descriptor).st_size
            if stored_bytes != len(target):
                self._set_aside_if_altered(digest)
                raise BlobCorrupt(f"blob {digest[:12]} has {stored_bytes} bytes instead of {len(target)}", digest=digest)
            done = 0
            checksum = 0
            while done < len(target):
                # In pieces, so that the checksum finds the bytes still in the processor's cache.
                count = file.readinto(target[done : done + _CHUNK_BYTES])
                if not count:
                    raise BlobCorrupt(f"blob {digest[:12]} ended after {done} of {len(target)} bytes", digest=digest)
                if crc32 is not None:
                    checksum = isal_zlib.crc32(target[done : done + count], checksum)
                done += count
        if crc32 is not None and checksum != crc32:
            is_altered = self._set_aside_if_altered(digest)
            raise BlobCorrupt(
                f"blob {digest[:12]} has checksum {checksum:08x} instead of {crc32:08x}; "
                + ("the disk has altered it" if is_altered else "its bytes are right, the model that says so is not"),
                digest=digest,
            )

    def _set_aside_if_altered(self, digest: str) -> bool:
        """Move a blob out of the way if its bytes are not its digest's; return whether they were not, or cannot be read."""
        path = self.blob_path(digest)
        try:
            if _digest_of(path)[0] == digest:
                return False
        except FileNotFoundError:
            return True
        except OSError as error:
            log.error("blob %s cannot be read: %s", digest, error)
            # Anything else, such as too many open files, says nothing about the blob.
            if error.errno != errno.EIO:
                return True
        aside = self._path("quarantine", digest)
        try:
            aside.parent.mkdir(mode=0o700, exist_ok=True)
            path.rename(aside)
            # Counted from now, so that a collection leaves it to be looked at for a while.
            os.utime(aside)
        except OSError as error:
            log.error("the altered blob %s cannot be set aside: %s", digest, error)
        else:
            log.error("blob %s was altered on the disk and is set aside", digest)
        return True

    # --- models ------------------------------------------------------------------------------------------------------

    def put_model(self, manifest_data: bytes, graph_data: bytes, label: str = "") -> Bundle:
        """Publish a model whose blobs were put before, replacing the one of its name. Raises BundleError, BlobMissing.

        With a ``label`` it is a version beside others, and called so.
        """
        bundle = parse_bundle(manifest_data, graph_data)
        name = bundle.name
        if label:
            bundle = replace(bundle, name=labelled(name, label), version=label)
            if len(bundle.name) > LONGEST_NAME:
                raise BundleError(
                    f"{bundle.name[:64]}… has {len(bundle.name)} characters, with its version at most {LONGEST_NAME}"
                )
        digests = {weight.digest for weight in bundle.graph.weights}
        with self._locked(fcntl.LOCK_SH):
            absent = {digest for digest in digests if not self._renewed(digest)}
            for weight in bundle.graph.weights:
                if weight.digest in absent or (stored_bytes := self.size(weight.digest)) == weight.size_bytes:
                    continue
                if self._set_aside_if_altered(weight.digest):
                    absent.add(weight.digest)
                    continue
                raise BundleError(
                    f"weight {weight.digest[:12]} of {bundle.name} takes {weight.size_bytes} bytes, its blob has {stored_bytes}",
                    digest=weight.digest,
                )
            if absent:
                raise BlobMissing(
                    f"{len(absent)} of the {len(digests)} weights of {bundle.name} are not in the store; push them first",
                    missing_count=len(absent),
                )
            self._replace(self._path("graphs", bundle.graph_digest), canonical_graph(bundle.graph))
            self._replace(self._manifest(bundle.name), manifest_bytes(replace(bundle, name=name)))
        return bundle

    def _manifest(self, name: str) -> Path:
        return self._named("models", name)

    def _named(self, kind: str, name: str) -> Path:
        if not STORED_NAME.fullmatch(name):
            raise UnknownModel(f"{name[:64]!r} is no name of a model")
        return self.root / kind / f"{name}.json"

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
        model, label = parted(name)
        if bundle.name != model or label not in ("", bundle.version):
            raise ModelCorrupt(f"the manifest of {name} names {bundle.name} {bundle.version}; push it again", model=name)
        return replace(bundle, name=name)

    def models(self) -> list[str]:
        """Return the names of the stored models and versions, readable or not."""
        return self._names("models")

    def _names(self, kind: str) -> list[str]:
        stems = (path.stem for path in (self.root / kind).glob("*.json"))
        return sorted(stem for stem in stems if STORED_NAME.fullmatch(stem))

    def remove_model(self, name: str) -> None:
        """Forget a model, or a version; its blobs stay until ``gc``. Raises UnknownModel, StoreError."""
        if not self._removed(self._manifest(name)):
            raise UnknownModel(f"the store holds no model {name!r}", model=name)

    def _removed(self, path: Path) -> bool:
        try:
            path.unlink()
            _sync_folder(path.parent)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._refusal(error, 0) from error
        return True

    # --- releases ----------------------------------------------------------------------------------------------------

    def published(self) -> list[Path]:
        """Return the files that say which models there are, and which versions answer; each is replaced when that changes."""
        return [path for kind in ("models", "releases") for path in (self.root / kind).glob("*.json")]

    def releases(self) -> list[str]:
        """Return the names that have a release, readable or not."""
        return self._names("releases")

    def release(self, name: str) -> Release | None:
        """Return which versions answer for a name; None where nobody has said so. Raises ModelCorrupt."""
        remedy = f"say with `trunkline model release {name} VERSION` which version answers"
        try:
            return parse_release(self._named("releases", name).read_bytes(), name)
        except FileNotFoundError:
            return None
        except BundleError as error:
            raise ModelCorrupt(f"the release of {name} is damaged: {error.message}; {remedy}", model=name) from error
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            raise ModelCorrupt(f"the release of {name} cannot be read ({reason}); {remedy}", model=name) from error

    def put_release(self, name: str, release: Release) -> None:
        """Say which versions answer for a name, in place of what was said before. Raises StoreError, StoreFull."""
        self._replace(self._named("releases", name), release_bytes(name, release))

    def remove_release(self, name: str) -> None:
        """Forget what was said of a name, if anything was. Raises StoreError."""
        self._removed(self._named("releases", name))

    @contextlib.contextmanager
    def versions_locked(self) -> Iterator[None]:
        """Be the only one who changes versions and releases while the block runs; blobs and models may be put in it."""
        with self._locked(fcntl.LOCK_EX, _VERSIONS_LOCK):
            yield

    # --- upkeep ------------------------------------------------------------------------------------------------------

    def verify(self, advance: Callable[[int, int], None] = lambda done, total: None) -> Report:
        """Read every blob against its digest, every model against its blobs, every release against the models. Slow: sha256 of
        everything.

        ``advance`` is told how many blobs were read, and how many there are; what it raises ends the work.

        Blobs that are altered or cannot be read are set aside. Safe while models are pushed, removed and collected.
        """
        report = Report()
        paths = list(self._stored("blobs"))
        for number, path in enumerate(paths):
            advance(number, len(paths))
            try:
                digest, size_bytes = _digest_of(path)
            except FileNotFoundError:
                continue
            except OSError:
                digest, size_bytes = "", 0
            report.blob_count += 1
            report.size_bytes += size_bytes
            if digest != path.name and self._set_aside_if_altered(path.name):
                report.corrupt.append(path.name)
        corrupt = set(report.corrupt)
        for name in self.models():
            try:
                digests = {weight.digest for weight in self.model(name).graph.weights}
            except UnknownModel:
                continue
            except ModelCorrupt as error:
                report.broken[name] = error.message
                continue
            altered = digests & corrupt
            missing = {digest for digest in digests - corrupt if not self.has(digest)}
            if missing or altered:
                report.broken[name] = f"{len(missing)} weights are missing, {len(altered)} are altered; push it again"
        for name in self.releases():
            if flaw := self._flaw_of_release(name):
                report.broken[name] = f"{report.broken[name]}; {flaw}" if name in report.broken else flaw
        return report

    def _flaw_of_release(self, name: str) -> str:
        """Say what is wrong with a release: it cannot be read, or names versions that are not there. Empty: nothing."""
        with self.versions_locked():
            try:
                found = self.release(name)
            except ModelCorrupt as error:
                return error.message
            stored = self.models()
        weights = {} if found is None else found.weights
        absent = [label or "what was pushed without a version" for label in weights if labelled(name, label) not in stored]
        return f"its release names {', '.join(absent)}, which is not there; push it again, or release another" if absent else ""

    def scrub(self, pause: Callable[[], object]) -> list[str]:
        """Read every blob against its digest, as the disk has it, with ``pause`` after each piece; set aside what is altered.

        Return its digests.
        """
        altered = []
        for path in self._stored("blobs"):
            try:
                with opened(path, os.O_RDONLY) as descriptor:
                    # What the page cache holds says nothing about the disk.
                    drop(descriptor)
                digest, _ = _digest_of(path, pause)
                with opened(path, os.O_RDONLY) as descriptor:
                    drop(descriptor)
            except FileNotFoundError:
                continue
            except OSError:
                digest = ""
            if digest != path.name and self._set_aside_if_altered(path.name):
                altered.append(path.name)
        return altered

    def gc(
        self,
        *,
        dry_run: bool = False,
        grace_s: float = GC_GRACE_S,
        advance: Callable[[int, int], None] = lambda done, total: None,
    ) -> tuple[int, int]:
        """Remove blobs and graphs that no model uses and that are older than ``grace_s``; return count and bytes.

        ``advance`` is told how many of those that no model uses were looked at, of how many; what it raises ends the work.

        What was set aside that long ago goes, too. While a model cannot be read, nothing is removed: its blobs cannot be told
        from garbage. Raises StoreError.
        """
        with self._locked(fcntl.LOCK_EX):
            used: set[str] = set()
            for name in self.models():
                try:
                    bundle = self.model(name)
                except UnknownModel:
                    continue
                except ModelCorrupt as error:
                    raise StoreError(f"nothing was removed: {error.message}, or remove it", model=name) from error
                used.add(bundle.graph_digest)
                used.update(weight.digest for weight in bundle.graph.weights)
            count = size_bytes = 0
            newest_s = time.time() - grace_s
            try:
                unused = [path for kind in ("blobs", "graphs") for path in self._stored(kind) if path.name not in used]
                unused += self._stored("quarantine")
                for number, path in enumerate(unused):
                    advance(number, len(unused))
                    with contextlib.suppress(FileNotFoundError):
                        state = path.stat()
                        if state.st_mtime <= newest_s:
                            if not dry_run:
                                path.unlink()
                            count += 1
                            size_bytes += state.st_size
                if not dry_run:
                    self._sweep()
            except OSError as error:
                raise self._refusal(error, 0) from error
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
        temporary, descriptor = path, -1
        try:
            temporary, descriptor = _temporary_beside(path)
            yield descriptor
            os.fsync(descriptor)
            os.rename(temporary, path)
            _sync_folder(path.parent)
        except OSError as error:
            raise self._refusal(error, size_bytes) from error
        finally:
            if descriptor >= 0:
                temporary.unlink(missing_ok=True)
                os.close(descriptor)

    def _refusal(self, error: OSError, size_bytes: int) -> StoreError:
        reason = os.strerror(error.errno or 0)
        if error.errno not in _FULL:
            return StoreError(f"the store cannot be written ({reason})")
        free_bytes = free_bytes_of(self.root)
        return StoreFull(
            f"{size_bytes} bytes could not be stored ({reason}): {free_bytes} bytes are free; "
            "remove models and run `trunkline store gc`, or use a larger disk",
            needed_bytes=size_bytes,
            free_bytes=free_bytes,
        )


def _temporary_beside(path: Path) -> tuple[Path, int]:
    """Make a temporary file in the folder of ``path``, locked by this writer; return it and its descriptor."""
    while True:
        temporary = path.with_name(f"{path.name}{TEMPORARY}{secrets.token_hex(8)}")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            # Once per folder, so the way that goes well does not ask first. The name of the folder must last like its files'.
            path.parent.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(path.parent.parent)
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return temporary, descriptor
        except BaseException:
            temporary.unlink(missing_ok=True)
            os.close(descriptor)
            raise
        # Swept in the moment between its making and its lock.
        os.close(descriptor)


def _digest_of(path: Path, pause: Callable[[], object] = lambda: None) -> tuple[str, int]:
    """Return the sha256 of a file's bytes, and their number; ``pause`` after each piece."""
    found, size_bytes = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            found.update(chunk)
            size_bytes += len(chunk)
            pause()
    return found.hexdigest(), size_bytes


def _write(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


def _sync_folder(folder: Path) -> None:
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        os.fsync(descriptor)
