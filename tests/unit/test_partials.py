"""Blobs that came in part: found again, few, none of them old, and never two writers of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar import partials
from sidecar.disk import opened
from sidecar.errors import BlobCorrupt
from sidecar.partials import partial, sweep
from sidecar.store import Store

CONTENT = b"weights" * 479
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class BrokeOff(Exception):
    pass


def breaking_off(content: bytes) -> Iterator[bytes]:
    yield content
    raise BrokeOff


def begun(store: Store, digest: str, content: bytes) -> Path:
    with pytest.raises(BrokeOff):
        store.resume_blob(digest, lambda start: breaking_off(content), len(CONTENT))
    return store.root / "partial" / digest


def aged(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_the_rest_alone_is_asked_for(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begun(store, DIGEST, CONTENT[:1000])
    asked: list[int] = []

    def rest(start: int) -> list[bytes]:
        asked.append(start)
        return [CONTENT[start:2000], CONTENT[2000:]]

    assert store.resume_blob(DIGEST, rest, len(CONTENT)) == len(CONTENT) - 1000
    assert asked == [1000]
    assert store.blob_path(DIGEST).read_bytes() == CONTENT
    # As one that was pushed: nobody else reads it.
    assert store.blob_path(DIGEST).stat().st_mode & 0o777 == 0o600
    # It is there now.
    assert store.resume_blob(DIGEST, rest, len(CONTENT)) == 0
    assert asked == [1000]


@pytest.mark.parametrize("wrong", [CONTENT[:-1] + b"!", CONTENT[:-1], CONTENT + b"!", b""])
def test_what_is_not_the_blob_in_the_end_is_forgotten(tmp_path: Path, wrong: bytes) -> None:
    store = Store(tmp_path)
    path = begun(store, DIGEST, CONTENT[:1000])
    with pytest.raises(BlobCorrupt, match="has 3353 bytes"):
        store.resume_blob(DIGEST, lambda start: [wrong[start:]], len(CONTENT))
    assert not path.exists()
    assert not store.has(DIGEST)


def test_more_than_a_blob_has_is_begun_anew(tmp_path: Path) -> None:
    store = Store(tmp_path)
    begun(store, DIGEST, CONTENT).write_bytes(CONTENT * 2)
    assert store.resume_blob(DIGEST, lambda start: [CONTENT[start:]], len(CONTENT)) == len(CONTENT)


def test_there_are_few_and_none_is_old(tmp_path: Path) -> None:
    store = Store(tmp_path)
    digests = [hashlib.sha256(bytes([number])).hexdigest() for number in range(partials._MOST + 3)]
    for age, digest in reversed(list(enumerate(digests))):
        aged(begun(store, digest, b"some"), 60 * age)
    sweep(tmp_path / "partial")
    assert {path.name for path in (tmp_path / "partial").iterdir()} == set(digests[: partials._MOST])
    aged(tmp_path / "partial" / digests[0], partials.GRACE_S + 1)
    store.gc()
    assert {path.name for path in (tmp_path / "partial").iterdir()} == set(digests[1 : partials._MOST])


def test_what_somebody_writes_to_stays_and_is_nobody_elses(tmp_path: Path) -> None:
    with partial(tmp_path / "partial", DIGEST, 10) as first:
        assert first is not None
        first.append(b"abc")
        aged(first.path, partials.GRACE_S + 1)
        sweep(tmp_path / "partial")
        with partial(tmp_path / "partial", DIGEST, 10) as second:
            assert second is None
    with partial(tmp_path / "partial", DIGEST, 10) as again:
        assert again is not None
        assert (again.size_bytes, again.digest()) == (3, hashlib.sha256(b"abc").hexdigest())


def test_one_that_is_swept_between_its_making_and_its_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = [True]

    @contextlib.contextmanager
    def sweeping(path: Path, flags: int) -> Iterator[int]:
        with opened(path, flags) as descriptor:
            if swept:
                swept.pop()
                path.unlink()
            yield descriptor

    monkeypatch.setattr(partials, "opened", sweeping)
    with partial(tmp_path, DIGEST, 10) as found:
        assert found is not None
        found.append(b"abc")
    assert swept == []
    assert (tmp_path / DIGEST).read_bytes() == b"abc"
