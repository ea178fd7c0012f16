"""Bad models at the door while others serve: each is refused by name and place, and nobody who asks another one notices."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flask.testing
import numpy as np
import pytest
from trunkline import client, errors, model
from trunkline.admin import AdminConnection

from sidecar import merkle
from sidecar.bundle import Bundle, canonical_graph, manifest_bytes
from sidecar.devices import open_device
from sidecar.http.admin import create_app
from sidecar.store import Store
from tests.bundles import adding_bundle
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, running_server
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.usefixtures("nothing_leaks")

X = np.ones((1, 2), np.float32)


class Served(Running):
    """A server over a real store, with its admin endpoint."""

    http: flask.testing.FlaskClient
    control: AdminConnection

    def put(self, bundle: Bundle, blobs: dict[str, bytes], graph: dict[str, Any] | None = None) -> Any:
        """Push as the command line does: blobs, then the model, with ``graph`` instead of its own where one is given."""
        for digest, content in blobs.items():
            address = f"/admin/v1/blobs/{digest}"
            answer = self.http.put(address, data=content, content_type="application/octet-stream")
            if answer.status_code >= 300:
                return answer
        text = canonical_graph(bundle.graph) if graph is None else json.dumps(graph, sort_keys=True).encode()
        body = {"manifest": json.loads(manifest_bytes(bundle)), "graph": json.loads(text)}
        return self.http.put(f"/admin/v1/models/{bundle.name}", json=body)


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    store = Store(tmp_path / "store")
    with running_server(tmp_path, store, device=open_device("cpu")) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        running.__class__ = Served
        assert isinstance(running, Served)
        running.control = AdminConnection(running.path, ADMIN_TOKEN)
        running.http = create_app(running.control, store).test_client()
        assert running.put(*adding_bundle("good", [1.0, 2.0])).status_code == 201
        yield running
        running.control.close()
        client._pool.close()


class Bystander:
    """A client that asks the good model in a loop while the block runs, and is never told anything but the answer."""

    def __enter__(self) -> Bystander:
        self.count = 0
        self.problems: list[str] = []
        self._end = threading.Event()
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()
        assert self._begun.wait(PATIENCE_S)
        return self

    def _loop(self) -> None:
        good = model("good")
        while not self._end.is_set() and not self.problems:
            try:
                if not np.array_equal(np.asarray(good(X)), [[2.0, 3.0]]):
                    self.problems.append("a wrong answer")
            except Exception as error:  # noqa: BLE001 - told at the end
                self.problems.append(repr(error))
            self.count += 1
            self._begun.set()

    def __exit__(self, *_: object) -> None:
        before = self.count
        while self.count < before + 5 and not self.problems:
            self._end.wait(0.001)
        self._end.set()
        self._thread.join()
        assert not self.problems
        assert self.count >= 5


def operator_off_the_list(graph: dict[str, Any]) -> None:
    graph["nodes"][1]["op"] = "aten.rand.default"


def mutation(graph: dict[str, Any]) -> None:
    graph["nodes"][1]["op"] = "aten.add_.Tensor"


def cycle(graph: dict[str, Any]) -> None:
    graph["nodes"][0]["args"][0] = {"node": 1}


def self_reference(graph: dict[str, Any]) -> None:
    graph["nodes"][1]["args"][0] = {"node": 1}


def random_argument(graph: dict[str, Any]) -> None:
    graph["nodes"][1] = {
        "op": "aten.scaled_dot_product_attention.default",
        "args": [{"node": 0}, {"node": 0}, {"node": 0}, None, 0.5],
        "kwargs": {},
        "origin": "",
    }


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (operator_off_the_list, ["nodes[1]", "aten.rand.default"]),
        (mutation, ["nodes[1]", "aten.add_.Tensor"]),
        (cycle, ["nodes[0]", "aten.add.Tensor"]),
        (self_reference, ["nodes[1]", "aten.add.Tensor"]),
        (random_argument, ["node 1", "aten.scaled_dot_product_attention.default", "dropout_p"]),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_bad_graph_is_refused_with_operator_and_node_while_others_are_served(
    served: Served, damage: Callable[[dict[str, Any]], None], told: list[str]
) -> None:
    bundle, blobs = adding_bundle("bad", [5.0, 6.0])
    graph = json.loads(canonical_graph(bundle.graph))
    second = copy.deepcopy(graph["nodes"][0])
    second["args"][0] = {"node": 0}
    graph["nodes"].append(second)
    damage(graph)
    with Bystander():
        answer = served.put(bundle, blobs, graph)
        assert answer.status_code == 422, answer.json
        message = answer.json["error"]["message"]
        assert all(each in message for each in told), message
        with pytest.raises(errors.UnknownModel):
            model("bad")(X)
    # What was refused leaves nothing in the way of the right one.
    assert served.put(bundle, blobs).status_code == 201
    assert np.array_equal(np.asarray(model("bad")(X)), [[6.0, 7.0]])


def test_a_bad_graph_does_not_replace_the_version_that_serves(served: Served) -> None:
    bundle, blobs = adding_bundle("good", [5.0, 6.0], version="2")
    graph = json.loads(canonical_graph(bundle.graph))
    graph["nodes"][0]["op"] = "aten.add_.Tensor"
    with Bystander():
        assert served.put(bundle, blobs, graph).status_code == 422


def test_a_missing_and_a_wrong_blob_are_refused_while_others_are_served(served: Served) -> None:
    bundle, blobs = adding_bundle("bad", [5.0, 6.0])
    (digest,) = blobs
    with Bystander():
        missing = served.put(bundle, {})
        assert missing.json["error"]["code"] == "blob_missing"
        assert "1 of the 1 weights of bad" in missing.json["error"]["message"]
        wrong = served.put(bundle, {digest: b"\0" * 8})
        assert wrong.json["error"]["code"] == "blob_corrupt"
        with pytest.raises(errors.UnknownModel):
            model("bad")(X)


@pytest.mark.parametrize("how", ["altered", "gone"])
def test_a_weight_that_goes_bad_after_its_deploy_is_told_while_others_are_served(served: Served, how: str) -> None:
    bundle, blobs = adding_bundle("bad", [5.0, 6.0])
    (digest,) = blobs
    assert served.put(bundle, blobs).status_code == 201
    path = served.source.blob_path(digest)
    if how == "altered":
        path.write_bytes(b"\0" * 8)
    else:
        path.unlink()
    with Bystander():
        for _ in range(3):
            with pytest.raises(errors.ModelCorrupt, match=f"{digest[:12]} is damaged or missing.*push the model again"):
                model("bad")(X)
        assert served.put(bundle, blobs).status_code == 201
        assert np.array_equal(np.asarray(model("bad")(X)), [[6.0, 7.0]])


# --- collisions -------------------------------------------------------------------------------------------------------


def collide(monkeypatch: pytest.MonkeyPatch, one: Bundle, other: Bundle) -> None:
    """Have all that is made of the one model's weight get the ids of what is made of the other's."""
    own, its = (bytes.fromhex(each.graph.weights[0].digest) for each in (one, other))

    def sha256(content: bytes) -> Any:
        return hashlib.sha256(content.replace(own, its))

    monkeypatch.setattr(merkle, "hashlib", SimpleNamespace(sha256=sha256))


def test_a_model_whose_ids_collide_is_refused_and_everything_else_keeps_answering(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    (good, _), (bad, blobs) = adding_bundle("good", [1.0, 2.0]), adding_bundle("bad", [5.0, 6.0])
    collide(monkeypatch, bad, good)
    with Bystander():
        assert served.put(bad, blobs).status_code != 201
        with pytest.raises(errors.ModelCorrupt, match="bad is not told apart from what is deployed"):
            model("bad")(X)
        # Twice the same is twice refused, and another one is taken.
        assert served.put(bad, blobs).status_code != 201
        assert served.put(*adding_bundle("third", [7.0, 8.0])).status_code == 201
        assert np.array_equal(np.asarray(model("third")(X)), [[8.0, 9.0]])
    states = {entry["name"]: entry["state"] for entry in served.control.command("models")["models"]}
    assert states == {"good": "resident", "third": "resident", "bad": "corrupt"}
    # Without the one it collides with, it is a model like any other.
    assert served.http.delete("/admin/v1/models/good", json={}).status_code == 200
    assert served.put(bad, blobs).status_code == 201
    assert np.array_equal(np.asarray(model("bad")(X)), [[6.0, 7.0]])


def test_a_collision_in_the_store_does_not_keep_a_sidecar_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FakeSource()
    made = [adding_bundle(name, values) for name, values in (("a", [1.0, 2.0]), ("b", [5.0, 6.0]), ("c", [7.0, 8.0]))]
    for bundle, blobs in made:
        source.put(bundle, list(blobs.values()))
    collide(monkeypatch, made[1][0], made[0][0])
    with running_server(tmp_path, source, device=open_device("cpu")) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        assert np.array_equal(np.asarray(model("a")(X)), [[2.0, 3.0]])
        assert np.array_equal(np.asarray(model("c")(X)), [[8.0, 9.0]])
        with pytest.raises(errors.ModelCorrupt, match="not told apart"):
            model("b")(X)
        client._pool.close()
