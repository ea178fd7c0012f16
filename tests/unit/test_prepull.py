"""Models that are pulled ahead: what a list may say, what is tried when, and what another process goes on with."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import SidecarUnavailable

from sidecar.bundle import canonical_graph, manifest_bytes
from sidecar.disk import opened
from sidecar.errors import ConfigError, OriginFailed, StoreFull
from sidecar.origins import Policy, Reference, parse_origin, parse_reference
from sidecar.prepull import Prepull, is_stored, read_list, told_of
from sidecar.pulling import Pulled
from sidecar.store import Store
from tests.origin_server import chained_bundle
from tests.waiting import PATIENCE_S

ORIGIN = "https://models.example/b"
POLICY = Policy(origins=(parse_origin(ORIGIN),))
A, B, C = (f"{ORIGIN}/{name}@sha256:{digit * 64}" for name, digit in (("a", "1"), ("b", "2"), ("c", "3")))
# The same model, another digest.
NEWER = f"{ORIGIN}/a@sha256:{'4' * 64}"


class Node:
    """A node with a clock of its own. ``failures`` are raised first, by what is tried: `pull` or `tell` and the model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.now_s = 1000.0
        self.store: dict[str, str] = {}
        self.done: list[str] = []
        self.failures: dict[str, list[Exception]] = {}
        self.prepull = self.started()

    def started(self) -> Prepull:
        return Prepull(
            self.folder / "models",
            self.folder / "state.json",
            POLICY,
            stored=lambda reference: self.store.get(reference.name) == str(reference),
            pull=self._pull,
            tell=lambda name: self._do(f"tell {name}"),
            clock=lambda: self.now_s,
            chance=lambda: 1.0,
        )

    def _do(self, what: str) -> None:
        if self.failures.get(what):
            raise self.failures[what].pop(0)
        self.done.append(what)

    def _pull(self, reference: Reference) -> Pulled:
        self._do(f"pull {reference.name}")
        self.store[reference.name] = str(reference)
        return Pulled(reference.name, "1", reference.digest, None, 2, 3, 70, 100)

    def list(self, *references: str) -> None:
        (self.folder / "models").write_text("# what every node has\n\n" + "".join(f"  {each}\n" for each in references))

    def after(self, seconds: float) -> tuple[list[str], float]:
        """Let time pass and look; return what was done since, and when to look again."""
        self.now_s += seconds
        count = len(self.done)
        pause_s = self.prepull.step()
        return self.done[count:], pause_s

    def told(self) -> Any:
        return told_of(self.folder / "state.json")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_what_is_listed_comes_once(node: Node) -> None:
    node.list(A, B)
    assert node.after(0) == (["pull a", "tell a", "pull b", "tell b"], 5.0)
    assert node.told() == {"models": {"present": 2, "waiting": 0, "failed": 0}, "fetched_bytes": 140}
    assert node.after(1000) == ([], 5.0)
    # The next process of the endpoint goes on with what is known, and asks no origin and no engine.
    node.prepull = node.started()
    assert node.after(0) == ([], 5.0)


def test_what_is_there_is_not_pulled_and_the_engine_is_told(node: Node) -> None:
    node.store["a"] = A
    node.list(A)
    assert node.after(0) == (["tell a"], 5.0)


def test_an_engine_that_was_not_told_is_told_by_the_next_process(node: Node) -> None:
    node.failures["tell a"] = [SidecarUnavailable("starting")]
    node.list(A)
    assert node.after(0)[0] == ["pull a"]
    assert node.told()["models"]["failed"] == 1
    node.prepull = node.started()
    assert node.after(0)[0] == ["tell a"]


def test_an_origin_that_is_away_is_asked_later_each_time_and_the_others_come(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    node.failures["pull a"] = [OriginFailed("no answer")] * 12
    node.list(A, B)
    assert node.after(0) == (["pull b", "tell b"], 1.0)
    assert f"{A} is not here yet: origin_failed: no answer" in caplog.text
    assert node.told() == {"models": {"present": 1, "waiting": 0, "failed": 1}, "fetched_bytes": 70}
    left = []
    for pause_s in (1, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300):
        assert node.after(pause_s / 2) == ([], min(5.0, pause_s / 2))
        left.append(len(node.failures["pull a"]))
        node.after(pause_s / 2)
    assert left == list(range(11, 0, -1))
    assert node.after(300) == (["pull a", "tell a"], 5.0)


def test_what_nobody_foresaw_keeps_nothing_away(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.failures["pull a"] = [ZeroDivisionError("path /secret")]
    node.list(A, B)
    assert node.after(0)[0] == ["pull b", "tell b"]
    assert json.loads((node.folder / "state.json").read_text())["models"][A] == {"state": "failed", "error": "sidecar_fault"}
    assert "incident" in caplog.text


def test_a_list_that_changes_is_followed(node: Node) -> None:
    node.failures["pull b"] = [OriginFailed("no answer")] * 3
    node.list(A, B)
    node.after(0)
    node.list(A, C)
    assert node.after(0)[0] == ["pull c", "tell c"]
    assert node.told()["models"] == {"present": 2, "waiting": 0, "failed": 0}
    node.list(NEWER, C)
    assert node.after(0)[0] == ["pull a", "tell a"]
    node.list()
    assert node.after(0) == ([], 5.0)
    assert node.told()["models"] == {"present": 0, "waiting": 0, "failed": 0}


def test_what_was_removed_by_hand_comes_back_at_the_next_start(node: Node) -> None:
    node.list(A)
    node.after(0)
    del node.store["a"]
    assert node.after(60)[0] == []
    node.prepull = node.started()
    assert node.after(0)[0] == ["pull a", "tell a"]


def test_a_list_with_a_mistake_leaves_the_one_before_in_force(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    node.failures["pull a"] = [OriginFailed("no answer")]
    node.list(A)
    node.after(0)
    node.list(A, "nonsense")
    assert node.after(1)[0] == ["pull a", "tell a"]
    node.after(10)
    assert caplog.text.count("line 4: a model to pull is named") == 1
    (node.folder / "models").unlink()
    assert node.after(10) == ([], 5.0)
    assert "cannot be read" in caplog.text
    node.list(A, B)
    assert node.after(10)[0] == ["pull b", "tell b"]


@pytest.mark.parametrize(
    "found", ["no JSON", "[]", '{"models": 7}', '{"models": {"x": 7}, "fetched_bytes": 0}', f'{{"models": {{"{A}": 7}}}}']
)
def test_a_state_that_cannot_be_read_is_none(node: Node, found: str) -> None:
    (node.folder / "state.json").write_text(found)
    assert node.told() == {}
    node.list(A)
    assert node.after(0)[0] == ["pull a", "tell a"]


def test_a_state_that_cannot_be_written_stops_nothing(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    (node.folder / "state.tmp").mkdir()
    node.list(A)
    assert node.after(0)[0] == ["pull a", "tell a"]
    assert "cannot be written down" in caplog.text
    assert node.told()["models"] == {"present": 0, "waiting": 0, "failed": 0}


def test_a_store_that_cannot_be_asked_is_asked_again(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.list(A)
    node.after(0)
    node.prepull = node.started()

    def refuses(reference: Reference) -> bool:
        raise StoreFull("no room")

    monkeypatch.setattr(node.prepull, "_stored", refuses)
    assert node.after(0) == ([], 1.0)
    assert node.told()["models"]["failed"] == 1


def test_one_process_at_a_time_and_the_next_goes_on(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.list(A)
    lock, stopped, looked = node.folder / "lock", threading.Event(), threading.Event()
    step = node.prepull.step

    def seen() -> float:
        pause_s = step()
        looked.set()
        return pause_s

    monkeypatch.setattr(node.prepull, "step", seen)
    with opened(lock, os.O_RDWR | os.O_CREAT) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        thread = threading.Thread(target=node.prepull.run, args=(lock, stopped))
        thread.start()
        assert not node.done
    assert looked.wait(PATIENCE_S)
    stopped.set()
    thread.join(PATIENCE_S)
    assert node.done == ["pull a", "tell a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{A}\nfile:///etc/x", "line 2: a model to pull is named"),
        (f"https://elsewhere.example/a@sha256:{'1' * 64}", "line 1: .* is none of the 1 origins"),
        (f"{A}\n\n{NEWER}", "line 3: a is listed before, as something else"),
        ("#" * (1 << 20) + "\n", "more than the 1048576 bytes"),
        ("\xff\xfe", "line 1: a model to pull is named"),
    ],
)
def test_a_wrong_list_is_refused_by_its_line(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "models").write_text(text, "latin-1")
    with pytest.raises(ConfigError, match=said):
        read_list(tmp_path / "models", POLICY)


def test_what_is_listed_twice_is_one_model(tmp_path: Path) -> None:
    (tmp_path / "models").write_text(f"{A}\n{A}\n")
    assert read_list(tmp_path / "models", POLICY) == (parse_reference(A),)


def test_what_is_stored_is_known_by_its_digest_and_its_weights(tmp_path: Path) -> None:
    store = Store(tmp_path)
    bundle, blobs = chained_bundle("m", [1.0, 2.0])
    own = hashlib.sha256(manifest_bytes(bundle)).hexdigest()
    reference = parse_reference(f"{ORIGIN}/m@sha256:{own}")
    assert not is_stored(reference, store)
    for digest, content in blobs.items():
        store.put_blob(digest, [content], len(content))
    store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))
    assert is_stored(reference, store)
    assert not is_stored(parse_reference(f"{ORIGIN}/m@sha256:{'0' * 64}"), store)
    store.blob_path(next(iter(blobs))).unlink()
    assert not is_stored(reference, store)
    (tmp_path / "models" / "m.json").write_text("{")
    assert not is_stored(reference, store)
