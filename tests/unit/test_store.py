"""The store: whole or not at all, whatever fails, and never bytes that are not what their name says."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import ModelCorrupt, UnknownModel

from sidecar import store as store_module
from sidecar.bundle import Bundle, Weight, canonical_graph, graph_digest, manifest_bytes
from sidecar.disk import TEMPORARY
from sidecar.errors import BlobCorrupt, BlobMissing, BundleError, StoreError, StoreFull
from sidecar.releases import Release
from sidecar.store import Report, Store
from tests.bundles import adding_bundle

CONTENT = b"weights" * 479  # 3353 bytes: no round number
DIGEST = hashlib.sha256(CONTENT).hexdigest()
CRASHED = 77


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def put(store: Store, bundle: Bundle, blobs: dict[str, bytes]) -> Bundle:
    for digest, content in blobs.items():
        store.put_blob(digest, [content], len(content))
    return store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))


def files(store: Store) -> list[str]:
    return sorted(path.name for path in store.root.rglob("*") if path.is_file() and path.name != "lock")


def files_of(store: Store, kind: str) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (store.root / kind).rglob("*") if path.is_file()}


def age(path: Path) -> None:
    """Make a file two hours old."""
    then = path.stat().st_mtime - 7200
    os.utime(path, (then, then))


def alter(path: Path) -> None:
    """Flip one bit of a file."""
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


def lock_is_free(store: Store, how: int) -> bool:
    with (store.root / "lock").open("rb") as file:
        try:
            fcntl.flock(file, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


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
@pytest.mark.row("T11")
def test_bytes_that_are_not_the_blob_are_refused_and_forgotten(store: Store, sent: bytes, announced: int, message: str) -> None:
    with pytest.raises(BlobCorrupt, match=message):
        store.put_blob(DIGEST, [sent], announced)
    assert files(store) == []


@pytest.mark.parametrize("digest", ["", "..", "../../etc/passwd", DIGEST.upper(), DIGEST + "0", DIGEST[:-1] + "/"])
@pytest.mark.row("T10")
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
    """Lets the n-th call of any of several functions of ``os`` fail, once. Without a ``code`` the process ends there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, code: int | None) -> None:
        self.left = number
        self.code = code
        self.failed = False
        for name in ("write", "fsync", "rename", "open"):
            monkeypatch.setattr(store_module.os, name, self._wrap(getattr(os, name)))

    def _wrap(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if self.code is None:
                    os._exit(CRASHED)
                self.failed = True
                raise OSError(self.code, os.strerror(self.code))
            return real(*arguments, **named)

        return call


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.row("F16")
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
    else:
        pytest.fail("there is no end of calls")


def in_a_child(work: Callable[[], None]) -> int:
    """Run ``work`` in a process of its own; return its exit code."""
    pid = os.fork()
    if not pid:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_wherever_a_writer_dies_the_store_is_whole(tmp_path: Path) -> None:
    """As above, but the writer is gone at once, with no clean-up; another process has the store open all the time."""
    old, old_blobs = adding_bundle("m", [1.0, 2.0])
    new, new_blobs = adding_bundle("m", [3.0, 4.0, 5.0], version="2")
    for number in range(1, 100):
        store = Store(tmp_path / f"{number}")
        put(store, old, old_blobs)

        def crash(store: Store = store, number: int = number) -> None:
            with pytest.MonkeyPatch.context() as monkeypatch:
                NthFailure(monkeypatch, number, None)
                put(store, new, new_blobs)

        outcome = in_a_child(crash)
        assert outcome in (0, CRASHED)
        reopened = Store(store.root)
        assert not [name for name in files(store) if ".part-" in name]
        assert reopened.model("m").version in ("1", "2")
        assert reopened.verify() == Report(len(files_of(store, "blobs")), sum(files_of(store, "blobs").values()))
        put(reopened, new, new_blobs)
        assert store.model("m") == new
        if not outcome:
            assert number > 10
            break
    else:
        pytest.fail("there is no end of calls")


@pytest.mark.row("F20")
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
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))
    bundle, _ = adding_bundle("m", [1.0])
    graph = replace(bundle.graph, weights=(Weight(DIGEST, "uint8", (4,), 4, 0),))
    wrong = replace(bundle, graph=graph, graph_digest=graph_digest(graph))
    with pytest.raises(BundleError, match="takes 4 bytes, its blob has 3353"):
        store.put_model(manifest_bytes(wrong), canonical_graph(graph))
    assert store.has(DIGEST)


def test_a_truncated_blob_is_asked_for_again(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0, 2.0])
    (digest,) = blobs
    put(store, bundle, blobs)
    store.blob_path(digest).write_bytes(b"x")
    with pytest.raises(BlobMissing, match="1 of the 1 weights"):
        store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))
    assert store.missing([digest]) == [digest]
    put(store, bundle, blobs)
    assert store.verify().broken == {}


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


def test_verify_finds_releases_that_cannot_be_read_or_name_what_is_not_there(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph), "2")
    store.put_release("m", Release({"": 1, "2": 1}))
    assert store.verify().broken == {}
    store.put_release("m", Release({"2": 1, "3": 1}))
    assert list(store.verify().broken) == ["m"]
    assert "its release names 3, which is not there" in store.verify().broken["m"]
    store.put_release("other", Release({"": 1}))
    assert "names what was pushed without a version" in store.verify().broken["other"]
    store.remove_release("other")
    file = store.root / "releases" / "m.json"
    file.write_bytes(file.read_bytes()[:-3])
    assert "the release of m is damaged" in store.verify().broken["m"]
    # One that is damaged besides is told both.
    (store.root / "models" / "m.json").write_bytes(b"{")
    assert re.search("m is damaged.*; the release of m is damaged", store.verify().broken["m"])


def test_a_manifest_that_cannot_be_removed_is_told(store: Store) -> None:
    (store.root / "models" / "m.json").mkdir()
    with pytest.raises(StoreError):
        store.remove_model("m")


def test_verify_finds_a_flipped_bit_and_a_push_heals_it(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    (digest,) = blobs
    alter(store.blob_path(digest))
    report = store.verify()
    assert report.corrupt == [digest]
    assert "0 weights are missing, 1 are altered" in report.broken["m"]
    assert "1 weights are missing, 0 are altered" in store.verify().broken["m"]
    assert store.missing([digest]) == [digest]
    put(store, bundle, blobs)
    assert store.verify().broken == {}


@pytest.mark.row("F19")
def test_scrubbing_sets_aside_what_the_disk_has_altered(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, values in (("m", [1.0]), ("n", [2.0])):
        put(store, *adding_bundle(name, values))
    pauses: list[None] = []
    assert store.scrub(lambda: pauses.append(None)) == []
    assert len(pauses) == 2
    (bad, *others) = files_of(store, "blobs")
    alter(store.blob_path(bad))
    assert store.scrub(lambda: None) == [bad]
    assert list(files_of(store, "quarantine")) == [bad]
    assert list(files_of(store, "blobs")) == others
    # One that is collected meanwhile is no other's fault, one that the disk does not give is set aside.
    monkeypatch.setattr(store, "_stored", lambda kind: [store.blob_path("0" * 64), store.blob_path(others[0])])
    assert store.scrub(lambda: None) == []

    def refuse(path: Path, *rest: object) -> tuple[str, int]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(store_module, "_digest_of", refuse)
    assert store.scrub(lambda: None) == others


def test_a_read_that_finds_an_altered_blob_sets_it_aside(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    (weight,) = bundle.graph.weights
    alter(store.blob_path(weight.digest))
    target = memoryview(bytearray(weight.size_bytes))
    with pytest.raises(BlobCorrupt, match="the disk has altered it"):
        store.read_blob(weight.digest, target, weight.crc32)
    with pytest.raises(BlobMissing):
        store.read_blob(weight.digest, target, weight.crc32)
    put(store, bundle, blobs)
    store.read_blob(weight.digest, target, weight.crc32)
    assert bytes(target) == blobs[weight.digest]


def test_a_model_that_is_wrong_about_a_blob_cannot_have_it_set_aside(store: Store) -> None:
    """Otherwise one bad bundle could take the weights of others away."""
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))
    with pytest.raises(BlobCorrupt, match="its bytes are right"):
        store.read_blob(DIGEST, memoryview(bytearray(len(CONTENT))), crc32=12345)
    with pytest.raises(BlobCorrupt, match="instead of 7"):
        store.read_blob(DIGEST, memoryview(bytearray(7)))
    assert store.has(DIGEST)


@pytest.mark.parametrize(("code", "stays"), [(errno.EIO, False), (errno.EMFILE, True)])
def test_only_a_failing_disk_sets_a_blob_aside(store: Store, monkeypatch: pytest.MonkeyPatch, code: int, stays: bool) -> None:
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))

    def fail(path: Path) -> tuple[str, int]:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(store_module, "_digest_of", fail)
    assert store.verify().corrupt == [DIGEST]
    assert store.has(DIGEST) is stays


def test_what_was_set_aside_is_collected_when_it_is_old(store: Store) -> None:
    store.put_blob(DIGEST, [CONTENT], len(CONTENT))
    alter(store.blob_path(DIGEST))
    age(store.blob_path(DIGEST))
    store.verify()
    assert store.gc() == (0, 0)
    age(store.root / "quarantine" / DIGEST[:2] / DIGEST)
    assert store.gc() == (1, len(CONTENT))
    assert files(store) == []


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


def test_collection_spares_what_a_push_was_told_not_to_send(store: Store) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    (digest,) = blobs
    store.remove_model("m")
    for renew in (lambda: store.missing([digest]), lambda: store.put_blob(digest, [], 4)):
        age(store.blob_path(digest))
        renew()
        assert store.gc()[0] == 0
        assert store.has(digest)
    age(store.blob_path(digest))
    assert store.gc() == (1, 4)


def test_publishing_and_collecting_exclude_each_other(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, blobs = adding_bundle("m", [1.0])
    put(store, bundle, blobs)
    free: list[bool] = []
    rename, clock = os.rename, store_module.time.time

    def renaming(source: Path, target: Path) -> None:
        free.append(lock_is_free(store, fcntl.LOCK_EX))
        rename(source, target)

    def asking() -> float:
        free.append(lock_is_free(store, fcntl.LOCK_SH))
        return clock()

    with monkeypatch.context() as patch:
        patch.setattr(store_module.os, "rename", renaming)
        store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))
    with monkeypatch.context() as patch:
        patch.setattr(store_module.time, "time", asking)
        store.gc()
    assert free == [False, False, False]
    assert lock_is_free(store, fcntl.LOCK_EX)


def test_whoever_opens_the_store_again_may_leave_that_to_others(store: Store) -> None:
    left = store.root / "models" / f"one.json{TEMPORARY}0"
    left.touch()
    Store(store.root, sweep=False)
    assert left.exists()
    Store(store.root)
    assert not left.exists()


def test_leftovers_of_the_dead_are_swept_and_files_of_the_living_stay(store: Store) -> None:
    def die() -> None:
        def chunks() -> Iterator[bytes]:
            yield CONTENT[:1000]
            os._exit(CRASHED)

        store.put_blob(DIGEST, chunks(), len(CONTENT))

    def chunks() -> Iterator[bytes]:
        yield CONTENT[:1000]
        (own,) = files(store)
        for sweep in (lambda: Store(store.root), store.gc):
            assert in_a_child(die) == CRASHED
            assert len(files(store)) == 2
            sweep()
            assert files(store) == [own]
        yield CONTENT[1000:]

    assert store.put_blob(DIGEST, chunks(), len(CONTENT))
    assert files(store) == [DIGEST]


def test_a_file_swept_before_its_writer_has_locked_it_is_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if how == fcntl.LOCK_EX and not swept:
            swept.extend((store.root / "blobs").rglob("*.part-*"))
            swept[0].unlink()
        real(descriptor, how)

    monkeypatch.setattr(store_module.fcntl, "flock", flock)
    assert store.put_blob(DIGEST, [CONTENT], len(CONTENT))
    assert len(swept) == 1
    assert files(store) == [DIGEST]


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
