"""Versions in the store: whoever is killed, or fails, leaves what was before or what is after; damage is told, and healed."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from trunkline.errors import InvalidInput, ModelCorrupt, UnknownModel

from sidecar.bundle import canonical_graph, manifest_bytes
from sidecar.errors import StoreError
from sidecar.releases import Release
from sidecar.store import Store
from sidecar.versions import Versions
from tests.bundles import adding_bundle
from tests.unit.test_store import CRASHED, NthFailure, alter, in_a_child

DEFAULTS = [{"default": "1"}, {"default": "2"}]


def put(store: Store, values: list[float], label: str | None = None, said: str = "1") -> None:
    bundle, blobs = adding_bundle("m", values, said)
    for digest, content in blobs.items():
        store.put_blob(digest, [content], len(content))
    Versions(store).put(manifest_bytes(bundle), canonical_graph(bundle.graph), label)


def two_versions(folder: Path) -> tuple[Store, Versions]:
    store = Store(folder)
    versions = Versions(store)
    put(store, [1.0, 2.0], "1")
    put(store, [3.0, 4.0], "2")
    versions.put_release("m", {"default": "1"})
    return store, versions


# What is done, and between which releases and stored models what is there may be afterwards.
CHANGES: dict[str, Callable[[Store, Versions], object]] = {
    "release": lambda store, versions: versions.put_release("m", {"default": "2"}),
    "split": lambda store, versions: versions.put_release("m", {"split": {"1": 1, "2": 1}}),
    "push": lambda store, versions: put(store, [5.0, 6.0], "3"),
    "remove": lambda store, versions: versions.remove_version("m", "2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_wherever_a_change_dies_there_is_what_was_or_what_is(tmp_path: Path, change: str) -> None:
    plain, after = two_versions(tmp_path / "whole")
    before = plain.release("m"), plain.models()
    CHANGES[change](plain, after)
    expected = plain.release("m"), plain.models()
    assert before != expected
    for number in range(1, 100):
        store, versions = two_versions(tmp_path / f"{number}")

        def crash(store: Store = store, versions: Versions = versions, number: int = number) -> None:
            with pytest.MonkeyPatch.context() as monkeypatch:
                NthFailure(monkeypatch, number, None)
                CHANGES[change](store, versions)

        outcome = in_a_child(crash)
        assert outcome in (0, CRASHED)
        reopened = Store(store.root)
        assert (reopened.release("m"), reopened.models()) in (before, expected)
        assert not list(store.root.rglob("*.part-*"))
        if not outcome:
            assert number > 2
            break
        if (reopened.release("m"), reopened.models()) == before:
            CHANGES[change](reopened, Versions(reopened))
        assert (reopened.release("m"), reopened.models()) == expected
    else:
        pytest.fail("there is no end of calls")


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_call_fails_nothing_is_half_done(tmp_path: Path, change: str) -> None:
    for number in range(1, 100):
        store, versions = two_versions(tmp_path / f"{number}")
        before = store.release("m"), store.models()
        with pytest.MonkeyPatch.context() as monkeypatch:
            failure = NthFailure(monkeypatch, number, errno.EIO)
            try:
                CHANGES[change](store, versions)
            except (StoreError, ModelCorrupt) as error:
                # Of what is compared, too, something may be unreadable just now.
                assert failure.failed, error
        if not failure.failed:
            break
        CHANGES[change](store, versions) if (store.release("m"), store.models()) == before else None
        assert (store.release("m"), store.models()) != before
    else:
        pytest.fail("there is no end of calls")


def test_a_model_that_is_removed_answers_less_and_less(tmp_path: Path) -> None:
    for number in range(1, 100):
        store, versions = two_versions(tmp_path / f"{number}")
        # As a bundle that was there before there were versions.
        plain, blobs = adding_bundle("m", [7.0, 8.0], "0")
        for digest, content in blobs.items():
            store.put_blob(digest, [content], len(content))
        store.put_model(manifest_bytes(plain), canonical_graph(plain.graph))

        def crash(versions: Versions = versions, number: int = number) -> None:
            with pytest.MonkeyPatch.context() as monkeypatch:
                NthFailure(monkeypatch, number, None)
                versions.remove("m")

        outcome = in_a_child(crash)
        release = store.release("m")
        # Either version 1 answers still, or nothing does: never what answered nobody before.
        assert release == Release({"1": 1}) or (release is None and "m" not in store.models())
        if release is not None:
            assert "m:1" in store.models()
        if not outcome:
            assert store.models() == []
            break
        if store.models() or store.releases():
            versions.remove("m")
        assert (store.models(), store.releases()) == ([], [])
    else:
        pytest.fail("there is no end of calls")
    with pytest.raises(UnknownModel):
        versions.remove("m")


def test_damage_is_told_and_healed(tmp_path: Path) -> None:
    store, versions = two_versions(tmp_path / "store")
    path = store.root / "models" / "m:2.json"
    alter(path)
    with pytest.raises(ModelCorrupt, match="m:2 is damaged"):
        versions.put_release("m", {"default": "2"})
    assert store.release("m") == Release({"1": 1})
    assert "m:2" in store.verify().broken
    put(store, [3.0, 4.0], "2")
    versions.put_release("m", {"default": "2"})
    release = store.root / "releases" / "m.json"
    for damage in (b"", b"{}", b'{"name":"m","weights":{"2":1}', b"\xff" * 20_000):
        release.write_bytes(damage)
        with pytest.raises(ModelCorrupt, match="trunkline model release m VERSION"):
            versions.release("m")
        with pytest.raises(ModelCorrupt):
            versions.remove_version("m", "1")
    versions.put_release("m", {"default": "2"})
    versions.remove_version("m", "1")
    assert store.models() == ["m:2"]
    release.unlink()
    release.mkdir()
    with pytest.raises(ModelCorrupt, match="cannot be read"):
        store.release("m")


def test_a_manifest_under_the_name_of_another_version_is_damaged(tmp_path: Path) -> None:
    store, _ = two_versions(tmp_path / "store")
    models = store.root / "models"
    (models / "m:3.json").write_bytes((models / "m:2.json").read_bytes())
    with pytest.raises(ModelCorrupt, match="the manifest of m:3 names m 2"):
        store.model("m:3")
    assert store.model("m:2").name == "m:2"
    assert store.model("m:2") == replace(store.model("m:2"), version="2")


def test_what_only_versions_use_is_not_collected(tmp_path: Path) -> None:
    store, versions = two_versions(tmp_path / "store")
    assert store.gc(grace_s=-1) == (0, 0)
    versions.put_release("m", {"default": "2"})
    versions.remove_version("m", "1")
    count, _ = store.gc(grace_s=-1)
    assert count == 2
    assert store.verify().broken == {}


def test_one_that_cannot_be_read_has_no_label(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    versions = Versions(store)
    put(store, [1.0, 2.0])
    alter(store.root / "models" / "m.json")
    assert versions.labels("m") == {"": "m"}
    assert versions.release("m") == Release({"": 1})
    # A push heals it, as ever.
    put(store, [1.0, 2.0], said="4")
    assert versions.labels("m") == {"4": "m"}
    with pytest.raises(InvalidInput, match="answers for it"):
        versions.remove_version("m", "4")
