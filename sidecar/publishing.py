"""`trunkline model publish`: a bundle laid out for pulls, in a folder or wherever fsspec can write.

The layout is that of ``sidecar.origins``; any server of static files can serve it. Only what is not there is written, the
manifest last, so that whoever finds it finds all that it names. Runs in the publisher's environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem
from trunkline.errors import TrunklineError

from sidecar.bundle import MODEL_NAME, Bundle, blob_path, canonical_graph, manifest_bytes, read_bundle
from sidecar.disk import TEMPORARY
from sidecar.errors import BlobCorrupt, BundleError, StoreError
from sidecar.origins import blob_file, graph_file, manifest_file, signature_file
from sidecar.signers import sign
from sidecar.store import Store

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Published:
    """What a publication wrote, of what the bundle has. ``reference`` is NAME@sha256:DIGEST, to stand behind the origin."""

    reference: str
    sent_count: int
    blob_count: int
    sent_bytes: int
    blob_bytes: int


def publish(
    source: str,
    destination: str,
    *,
    store_dir: Path,
    sign_key: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Published:
    """Write a bundle folder, or a model of the store in ``store_dir``, below ``destination``; sign it where a key is given.

    ``progress`` is told the bytes done and to do. Raises BundleError, BlobCorrupt, UnknownModel, ModelCorrupt, ConfigError, and
    StoreError where the destination cannot be written.
    """
    bundle, path_of = _opened(source, store_dir)
    manifest = manifest_bytes(bundle)
    digest = hashlib.sha256(manifest).hexdigest()
    signature = None if sign_key is None else sign(manifest, sign_key)
    sizes = {weight.digest: weight.size_bytes for weight in bundle.graph.weights}
    try:
        target = _Target(destination)
        missing = [each for each in sizes if not target.has(blob_file(each), sizes[each])]
        total_bytes = sum(sizes[each] for each in missing)
        done_bytes = 0
        progress(0, total_bytes)
        for each in missing:

            def advance(count_bytes: int) -> None:
                nonlocal done_bytes
                done_bytes += count_bytes
                progress(done_bytes, total_bytes)

            target.copy(path_of(each), blob_file(each), each, advance)
        target.put(graph_file(bundle.graph_digest), canonical_graph(bundle.graph))
        if signature is not None:
            target.put(signature_file(digest), signature)
        target.put(manifest_file(digest), manifest)
    except TrunklineError:
        raise
    except Exception as error:
        # The libraries of object stores pass on errors of their own, of all sorts.
        number = error.errno if isinstance(error, OSError) else None
        reason = os.strerror(number) if number else f"{type(error).__name__} {error}"[:200].strip()
        raise StoreError(f"{destination} cannot be written to ({reason})") from error
    return Published(f"{bundle.name}@sha256:{digest}", len(missing), len(sizes), total_bytes, sum(sizes.values()))


def _opened(source: str, store_dir: Path) -> tuple[Bundle, Callable[[str], Path]]:
    """Return a bundle, and where the bytes of its weights lie."""
    folder = Path(source)
    if folder.is_dir():
        return read_bundle(folder), lambda digest: blob_path(folder, digest)
    if not MODEL_NAME.fullmatch(source):
        raise BundleError(f"{source[:80]!r} is neither a bundle's folder nor a model's name")
    if not (store_dir / "models").is_dir():
        raise StoreError(f"there is no folder {source!r}, nor a store in {store_dir}; name it with --store-dir")
    store = Store(store_dir, sweep=False)
    return store.model(source), store.blob_path


class _Target:
    """A folder or bucket that is written to. Of a file that was begun there is nothing, unless it was finished."""

    def __init__(self, url: str) -> None:
        self._system, self._root = fsspec.url_to_fs(url)

    def has(self, path: str, size_bytes: int) -> bool:
        try:
            return bool(self._system.info(self._path(path))["size"] == size_bytes)
        except FileNotFoundError:
            return False

    def put(self, path: str, content: bytes) -> None:
        """Write a small file, unless it is there with these bytes: a signature is replaced by another."""
        if self.has(path, len(content)) and self._system.cat_file(self._path(path)) == content:
            return
        with self._written(path) as file:
            file.write(content)

    def copy(self, source: Path, path: str, digest: str, advance: Callable[[int], None]) -> None:
        """Copy a blob, whose bytes must have its digest. Raises BlobCorrupt, OSError."""
        found = hashlib.sha256()
        with source.open("rb") as original, self._written(path) as file:
            while chunk := original.read(_CHUNK_BYTES):
                found.update(chunk)
                file.write(chunk)
                advance(len(chunk))
            if found.hexdigest() != digest:
                raise BlobCorrupt(f"the bytes of blob {digest[:12]} have digest {found.hexdigest()[:12]}; pack or push it again")

    def _path(self, path: str) -> str:
        return posixpath.join(self._root, path)

    @contextlib.contextmanager
    def _written(self, path: str) -> Iterator[Any]:
        """Yield a file to write to, which is there when the block ends well, and not otherwise."""
        whole = self._path(path)
        if not isinstance(self._system, LocalFileSystem):
            file = self._system.open(whole, "wb", autocommit=False)
            try:
                yield file
                file.close()
            except BaseException:
                file.discard()
                raise
            file.commit()
            return
        # Beside it, so that the rename is one step.
        temporary = Path(f"{whole}{TEMPORARY}{secrets.token_hex(8)}")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("xb") as file:
                yield file
            temporary.rename(whole)
        finally:
            temporary.unlink(missing_ok=True)
