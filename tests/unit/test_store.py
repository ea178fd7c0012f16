"""The store: whole or not at all, whatever fails, and never bytes that are not what their name says."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import ModelCorrupt, UnknownModel

from sidecar import store as store_module
from sidecar.bundle import Bundle, canonical_graph, manifest_bytes
from sidecar.errors import BlobCorrupt, BlobMissing, BundleError, StoreError, StoreFull
from sidecar.store import Store
from tests.bundles import adding_bundle

CONTENT = b"weights" * 479  # 3353 bytes: no round number
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "store")
    yield made
    made.close()


def put(store: Store, bundle: Bundle, blobs: dict[str, bytes]) -> Bundle:
    for digest, content in blobs.items():
        store.put_blob(digest, [content], len(content))
    return store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file() and path.name != "lock")


def test_a_blob_comes_back(store: Store) -> None:
    assert store.missing([DIGEST, DIGEST]) == [DIGEST]
    assert store.put_blob(DIGEST, [CONTENT[:1000], CONTENT[1000:]], len(CONTENT))
    assert store.missing([DIGEST]) == []
    target = bytearray(len(CONTENT))
    store.read_blob(DIGEST, memoryview(target))
    assert target == CONTENT


def test_a_blob_is_stored_once(store: Store) -> None:
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))

    def chunks() -> Iterator[bytes]:
        raise AssertionError("nothing should be read")
        yield b""

    assert not store.put_blob(DIGEST, chunks(), len(CONTENT))


@pytest.mark.parametrize(
    ("sent", "announced", "message"),
    [
        (CONTENT[:-1] + b"!", len(CONTENT), "altered on the way"),
        (CONTENT[:-1], len(CONTENT), "ended after 3352 of 3353"),
        (CONTENT + b"!", len(CONTENT), "longer than the 3353"),
        (CONTENT, 10, "longer than the 10"),
    ],
)
def test_bytes_that_are_not_the_blob_are_refused_and_forgotten(store: Store, sent: bytes, announced: int, message: str) -> None:
    with pytest.raises(BlobCorrupt, match=message):
        store.put_blob(DIGEST, [sent], announced)
    assert files(store) == []


@pytest.mark.parametrize("digest", ["", "..", "../../etc/passwd", DIGEST.upper(), DIGEST + "0", DIGEST[:-1] + "/"])
def test_only_digests_become_paths(store: Store, digest: str) -> None:
    with pytest.raises(BlobMissing):
        store.blob_path(digest)


@pytest.mark.parametrize("name", ["", "..", "a..b", "../x", "A", "-a", "a" * 129, "a/b", "a\n"])
def test_only_names_become_paths(store: Store, name: str) -> None:
    with pytest.raises(UnknownModel):
        store.model(name)


def test_a_missing_blob_says_so(store: Store) -> None:
    with pytest.raises(BlobMissing):
        store.read_blob(DIGEST, memoryview(bytearray(1)))
    with pytest.raises(BlobMissing):
        store.size(DIGEST)


def test_reading_checks_length_and_checksum(store: Store) -> None:
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))
    target = memoryview(bytearray(len(CONTENT)))
    with pytest.raises(BlobCorrupt, match="instead of 3352"):
        store.read_blob(DIGEST, target[:-1])
    with pytest.raises(BlobCorrupt, match="checksum"):
        store.read_blob(DIGEST, target, crc32=12345)


def test_a_file_that_ends_while_it_is_read_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))
    real = os.fstat

    class Longer:
        st_size = len(CONTENT) + 1

    monkeypatch.setattr(store_module.os, "fstat", lambda fd: Longer())
    with pytest.raises(BlobCorrupt, match="ended after 3353 of 3354"):
        store.read_blob(DIGEST, memoryview(bytearray(len(CONTENT) + 1)))
    monkeypatch.setattr(store_module.os, "fstat", real)


class NthFailure:
    """Lets the n-th call of any of several functions of ``os`` fail, once."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, code: int) -> None:
        self.left = number
        self.code = code
        self.failed = False
        for name in ("write", "fsync", "rename", "open"):
            monkeypatch.setattr(store_module.os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.failed = True
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **named)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_whatever_call_fails_nothing_is_half_done(tmp_path: Path, code: int) -> None:
    """SQLite's method: fail the first call, then the second, and so on, until nothing fails any more."""
    old, old_blobs = adding_bundle("m", [1.0, 2.0])
    new, new_blobs = adding_bundle("m", [3.0, 4.0, 5.0], version="2")
    for number in range(1, 100):
        store = Store(tmp_path / f"{number}")
        put(store, old, old_blobs)
        with pytest.MonkeyPatch.context() as monkeypatch:
            failure = NthFailure(monkeypatch, number, code)
            try:
                put(store, new, new_blobs)
            except StoreFull as error:
                assert code == errno.ENOSPC
                assert error.details["free_bytes"] != 0
            except StoreError as error:
                assert code == errno.EIO, error
        if not failure.failed:
            assert number > 10
            break
        assert not [name for name in files(store) if ".part-" in name]
        assert store.model("m").version in ("1", "2")
        assert not store.verify().corrupt
        put(store, new, new_blobs)
        assert store.model("m") == new
        store.close()
    else:
        pytest.fail("there is no end of calls")


def test_a_real_full_disk(tmp_path: Path) -> None:
    """A tmpfs of 64 KiB, where this process may mount one; a limit on the size of files does the same elsewhere."""
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, check=False)
    big = os.urandom(200_000)
    digest = hashlib.sha256(big).hexdigest()
    try:
        store = Store(tmp_path / "store")
        if mounted.returncode:
            import resource

            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536, before[1]))
        try:
            with pytest.raises(StoreFull, match="200000 bytes could not be stored"):
                store.put_blob(digest, [big], len(big))
        finally:
            if mounted.returncode:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert files(store) == []
        store.put_blob(DIGEST, [CONTENT], len(CONTENT))
        assert store.has(DIGEST)
        store.close()
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_model_comes_back(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    assert store.models() == ["m"]
    assert store.model("m") == bundle
    store.remove_model("m")
    assert store.models() == []
    for absent in (store.model, store.remove_model):
        with pytest.raises(UnknownModel):
            absent("m")


def test_a_model_without_its_weights_is_refused(store: Store) -> None:
    bundle, _ = adding_bundle("m", [1.0])
    with pytest.raises(BlobMissing, match="1 of the 1 weights"):
        store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))


def test_a_weight_whose_blob_has_another_size_is_refused(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    (digest,) = blobs
    path = store.blob_path(digest)
    path.parent.mkdir()
    path.write_bytes(b"x")
    with pytest.raises(BundleError, match="takes 4 bytes, its blob has 1"):
        store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))


@pytest.mark.parametrize("damage", ["cut", "altered", "gone", "renamed", "unreadable"])
def test_a_damaged_model_is_named_and_the_others_stay(store: Store, damage: str) -> None:
    for name in ("good", "bad"):
        bundle, blobs = adding_bundle(name, [1.0, 2.0] if name == "bad" else [3.0])
        put(store, bundle, blobs)
    manifest = store.root / "models" / "bad.json"
    graph = store._path("graphs", store.model("bad").graph_digest)
    if damage == "cut":
        manifest.write_bytes(manifest.read_bytes()[:-20])
    elif damage == "altered":
        graph.write_bytes(graph.read_bytes().replace(b"aten.add", b"aten.sub"))
    elif damage == "gone":
        graph.unlink()
    elif damage == "renamed":
        manifest.write_bytes((store.root / "models" / "good.json").read_bytes())
    else:
        manifest.unlink()
        manifest.mkdir()
    assert store.models() == ["bad", "good"]
    with pytest.raises(ModelCorrupt):
        store.model("bad")
    assert store.model("good").name == "good"
    assert list(store.verify().broken) == ["bad"]
    with pytest.raises(StoreError, match="nothing was removed"):
        store.gc(grace_s=0)


def test_verify_finds_a_flipped_bit(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    (digest,) = blobs
    path = store.blob_path(digest)
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    report = store.verify()
    assert report.corrupt == [digest]
    assert "1 are altered" in report.broken["m"]


def test_collection_spares_what_is_used_and_what_is_young(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))
    assert store.gc() == (0, 0)
    assert store.gc(grace_s=0, dry_run=True) == (1, len(CONTENT))
    assert store.has(DIGEST)
    assert store.gc(grace_s=0) == (1, len(CONTENT))
    assert not store.has(DIGEST)
    assert store.model("m") == bundle
    store.remove_model("m")
    assert store.gc(grace_s=0)[0] == 2


def test_leftovers_are_swept_only_when_nobody_else_is_here(tmp_path: Path) -> None:
    first = Store(tmp_path)
    leftover = first.root / "blobs" / "ab" / f"{DIGEST}.part-1"
    leftover.parent.mkdir()
    leftover.write_bytes(b"half")
    second = Store(tmp_path)
    assert leftover.exists()
    first.close()
    second.close()
    Store(tmp_path).close()
    assert not leftover.exists()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot be opened"):
        Store(tmp_path / "file")


def test_a_reader_sees_one_version_whole(store: Store) -> None:
    versions = [adding_bundle("m", [float(number)] * (number + 1), version=str(number)) for number in range(2)]
    put(store, *versions[0])
    stopping = threading.Event()
    seen: set[str] = set()

    def read() -> None:
        while not stopping.is_set():
            bundle = store.model("m")
            assert len(bundle.graph.weights[0].shape) == 1
            assert bundle.graph.weights[0].shape[0] == int(bundle.version) + 1
            seen.add(bundle.version)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(60):
        put(store, *versions[number % 2])
    stopping.set()
    reader.join()
    assert seen <= {"0", "1"}
