"""Versions of a model, from push to removal: the admin routes, a real store, a real socket; the device is a fake."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import flask.testing
import numpy as np
import pytest
from trunkline import client, model, models
from trunkline.admin import AdminConnection
from trunkline.endpoint import Endpoint
from trunkline.errors import InvalidInput, ModelCorrupt, TrunklineError, UnknownModel
from trunkline.pool import Pool
from trunkline.signature import Signature

from sidecar import openinference
from sidecar.bundle import Bundle, canonical_graph, manifest_bytes
from sidecar.http.admin import create_app
from sidecar.http.callers import Callers, Room
from sidecar.http.oip import add_open_inference
from sidecar.releases import Release
from sidecar.store import Store
from sidecar.tenants import Quotas, Tenant, hash_of
from sidecar.versions import Versions
from tests.bundles import adding_bundle
from tests.fakes import ADMIN_TOKEN, FakeDevice, Running, running_server
from tests.waiting import PATIENCE_S, soon, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

X = np.ones((1, 2), np.float32)
# Of each bundle that is pushed here: what its fake adds to an input.
WEIGHTS = {"1": [1.0, 2.0], "2": [3.0, 4.0], "3": [5.0, 6.0], "wide": [1.0, 2.0, 3.0]}


def added(kind: str) -> float:
    return float(np.frombuffer(np.asarray(WEIGHTS[kind], np.float32).tobytes(), np.uint8).sum())


KIND_OF = {added(kind): kind for kind in WEIGHTS}


class Node:
    """A sidecar in this process with its admin endpoint; ``tell`` asks that, and raises what it is refused with."""

    def __init__(self, running: Running, store: Store) -> None:
        self.running = running
        self.store = store
        self.callers = Callers(running.relay)
        self.admin = AdminConnection(running.path, ADMIN_TOKEN)
        app = create_app(self.admin, store)
        add_open_inference(app, self.admin, self.callers, Room(16, 1 << 30), body_limit_bytes=1 << 20)
        self._app = app

    @property
    def http(self) -> flask.testing.FlaskClient:
        return self._app.test_client()

    def put(self, kind: str, name: str = "m", version: str | None = None, said: str = "1", **query: str) -> Any:
        """Push a bundle that says it is version ``said``."""
        bundle, blobs = adding_bundle(name, WEIGHTS[kind], said)
        return self.put_bundle(bundle, blobs, version, **query)

    def put_bundle(self, bundle: Bundle, blobs: dict[str, bytes], version: str | None = None, **query: str) -> Any:
        for digest, content in blobs.items():
            self.store.put_blob(digest, [content], len(content))
        body = {"manifest": json.loads(manifest_bytes(bundle)), "graph": json.loads(canonical_graph(bundle.graph))}
        asked = query if version is None else {"version": version, **query}
        return self.http.put(f"/admin/v1/models/{bundle.name}", json=body, query_string=asked)

    def release(self, asked: dict[str, Any], name: str = "m") -> Any:
        return self.http.put(f"/admin/v1/models/{name}/release", json=asked)

    def versions(self, name: str = "m") -> Any:
        return self.http.get(f"/admin/v1/models/{name}/versions")

    def remove(self, version: str, name: str = "m") -> Any:
        return self.http.delete(f"/admin/v1/models/{name}/versions/{version}", json={})

    def infer(self, path: str, token: str = "", **body: Any) -> Any:
        data = {"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 1]}]} | body
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        return self.http.post(f"/v2/models/{path}/infer", json=data, headers=headers, buffered=True)

    def close(self) -> None:
        self.callers.close()
        self.admin.close()


def done(answer: Any) -> Any:
    assert answer.status_code in (200, 201), answer.text
    return answer.json


def refused(answer: Any, code: str, text: str) -> None:
    assert answer.status_code >= 400, answer.text
    error = answer.json["error"] if isinstance(answer.json["error"], dict) else answer.json
    assert error["code"] == code, answer.text
    assert text in answer.text, answer.text


def kind_of(answer: Any) -> str:
    return KIND_OF[float(answer[0, 0]) - 1]


def asked(name: str = "m") -> str:
    """Return which bundle answers a function that asks for a model."""
    return kind_of(model(name)(X))


@contextlib.contextmanager
def serving(folder: Path, **settings: Any) -> Iterator[Node]:
    store = Store(folder / "store")
    with running_server(folder, store, **settings) as running, contextlib.closing(Node(running, store)) as node:
        yield node
        client._pool.close()


@pytest.fixture(params=["one device", "two devices"])
def node(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    beside = [FakeDevice("other")] if request.param == "two devices" else []
    with serving(tmp_path, beside=beside) as made:
        yield made


@pytest.fixture
def split(node: Node) -> Node:
    """Of 100 calls 90 are of version 1, 10 of version 2."""
    done(node.put("1", version="1"))
    done(node.put("2", version="2"))
    done(node.release({"split": {"1": 90, "2": 10}}))
    return node


# --- pushed beside each other -----------------------------------------------------------------------------------------


def test_the_first_version_answers_and_further_ones_when_they_are_released(node: Node) -> None:
    assert done(node.put("1", version="1"))["release"] == {"default": "1"}
    assert asked() == "1"
    assert done(node.put("2", version="2"))["release"] == {"default": "1"}
    assert [asked(), asked("m:1"), asked("m:2")] == ["1", "1", "2"]
    assert done(node.put("3", version="3", default="true"))["release"] == {"default": "3"}
    assert [asked(), asked("m:1"), asked("m:2")] == ["3", "1", "2"]
    assert done(node.release({"default": "2"})) == {"name": "m", "release": {"default": "2"}}
    assert asked() == "2"
    told = done(node.versions())
    assert told["release"] == {"default": "2"}
    assert [(each["version"], each["name"], each["weight"]) for each in told["versions"]] == [
        ("1", "m:1", 0),
        ("2", "m:2", 1),
        ("3", "m:3", 0),
    ]
    assert [each["deployed"][0]["version"] for each in told["versions"]] == ["1", "2", "3"]


def test_a_label_is_what_the_manifest_says_unless_it_is_told(node: Node) -> None:
    assert done(node.put("1", version="", said="2026.01"))["name"] == "m:2026.01"
    assert done(node.put("2", version="v2", said="2026.01"))["version"] == "v2"
    assert asked("m:2026.01") == "1"
    assert model("m:v2").signature.version == "v2"
    refused(node.put("3", version="", said="1.0+cu12"), "invalid_input", "no label")


def test_a_name_without_versions_is_what_it_was(node: Node) -> None:
    assert "release" not in done(node.put("1"))
    assert done(node.versions()) | {"versions": None} == {"name": "m", "release": {"default": "1"}, "versions": None}
    assert asked() == "1"
    done(node.put("2", said="2"))
    assert asked() == "2"
    assert not node.running.server.routing.table
    assert not node.store.releases()
    refused(node.remove("2"), "invalid_input", "answers for it")
    done(node.http.delete("/admin/v1/models/m", json={}))
    with pytest.raises(UnknownModel):
        asked()


def test_a_version_does_not_change(node: Node) -> None:
    done(node.put("1", version="1"))
    refused(node.put("2", version="1"), "invalid_input", "versions do not change")
    done(node.put("1", version="1", said="whatever"))
    assert asked("m:1") == "1"


def test_what_was_pushed_without_a_version_is_one_of_them(node: Node) -> None:
    done(node.put("1"))
    assert done(node.put("2", version="2"))["release"] == {"default": "1"}
    assert [asked(), asked("m:1"), asked("m:2")] == ["1", "1", "2"]
    assert done(node.release({"split": {"1": 1, "2": 1}}))["release"] == {"split": {"1": 1, "2": 1}, "sticky": False}
    assert Counter(asked() for _ in range(10)) == {"1": 5, "2": 5}
    assert [(each["version"], each["name"]) for each in done(node.versions())["versions"]] == [("1", "m"), ("2", "m:2")]
    # It may be replaced, by what callers cannot tell from it.
    refused(node.put("wide"), "signature_mismatch", "one takes x float32 [batch, 3], the other x float32 [batch, 2]")
    done(node.put("3", said="1.1"))
    assert Counter(asked() for _ in range(10)) == {"3": 5, "2": 5}
    assert done(node.versions())["release"]["split"] == {"1.1": 1, "2": 1}
    refused(node.put("3", said="2"), "invalid_input", "has a version 2 already")
    refused(node.put("3", version="1.1"), "invalid_input", "give this one another")
    done(node.release({"default": "2"}))
    done(node.put("wide", said="9"))
    assert asked() == "2"
    done(node.release({"default": "9"}))
    assert model("m").signature.version == "9"
    assert not node.running.server.routing.table
    done(node.release({"default": "2"}))
    done(node.remove("9"))
    assert [each["version"] for each in done(node.versions())["versions"]] == ["2"]
    refused(node.put("1"), "invalid_input", "push this one as a version, too")


def test_versions_share_weights_by_content(node: Node) -> None:
    done(node.put("1", version="1"))
    done(node.put("1", version="again"))
    assert [asked("m:1"), asked("m:again")] == ["1", "1"]
    (again,) = (each for each in node.admin.command("models")["models"] if each["name"] == "m:again")
    assert (again["unique_bytes"], again["shared_with"]) == (0, ["m:1"])


# --- splits -----------------------------------------------------------------------------------------------------------


def test_a_split_is_exact(split: Node) -> None:
    assert Counter(asked() for _ in range(100)) == {"1": 90, "2": 10}
    assert model("m").signature.version == "1,2"
    # Who names a version takes nobody's turn, nor does what is refused.
    for _ in range(3):
        asked("m:2")
        with pytest.raises(TrunklineError):
            model("m")(np.ones((1, 5), np.float32))
    assert Counter(asked() for _ in range(100)) == {"1": 90, "2": 10}
    counts = split.admin.command("metrics")["devices"]
    answered: Counter[str] = Counter()
    for device in counts.values():
        for name, each in device["outcomes"]["models"].items():
            answered[name] += sum(each["counts"])
    assert answered == {"m:1": 180, "m:2": 23}


def test_a_split_is_exact_over_many_clients(split: Node) -> None:
    def client_of(number: int) -> Counter[str]:
        pool = Pool(endpoint=Endpoint(split.running.path), credential=lambda: b"")
        with contextlib.closing(pool):
            own = client.Model("m", pool)
            return Counter(kind_of(own(X)) for _ in range(25))

    with ThreadPoolExecutor(8) as threads:
        counts = sum(threads.map(client_of, range(8)), Counter[str]())
    assert counts == {"1": 180, "2": 20}


def test_calls_of_one_id_stay_with_one_version(split: Node) -> None:
    done(split.release({"split": {"1": 1, "2": 1}, "sticky": True}))
    # An id that no UTF-8 can say, and one that is cut on its way, are ids as well.
    assert done(split.infer("m", id="\ud800"))["id"] == "\ud800"
    assert len({done(split.infer("m", id="x" * 200))["model_version"] for _ in range(4)}) == 1
    own = model("m")
    of = {call_id: kind_of(own.call({"x": X}, call_id=call_id)) for call_id in map(str, range(40))}
    assert set(of.values()) == {"1", "2"}
    for call_id, kind in of.items():
        assert kind_of(own.call({"x": X}, call_id=call_id)) == kind
        told = done(split.infer("m", id=call_id))
        assert told["model_version"] == kind
        assert KIND_OF[told["outputs"][0]["data"][0] - 1] == kind


def test_models_asked_together_are_drawn_each(split: Node) -> None:
    done(split.put("3", "a"))
    done(split.put("1", "m-other", version="7"))
    pair = models("m", "m-other")
    assert [spec.name for spec in pair.signature.outputs] == ["m/y", "m-other/y"]
    answers = [pair(X) for _ in range(100)]
    assert Counter((kind_of(each["m"]), kind_of(each["m-other"])) for each in answers) == {("1", "1"): 90, ("2", "1"): 10}
    answers = [models("a", "m:2", "m:1")(X) for _ in range(3)]
    assert [{name: kind_of(each) for name, each in answer.items()} for answer in answers] == [
        {"a": "3", "m:1": "1", "m:2": "2"}
    ] * 3
    with pytest.raises(InvalidInput, match="name the versions of both"):
        models("m", "m:2")(X)


@pytest.mark.parametrize(
    ("body", "code", "text"),
    [
        ({"default": "9"}, "unknown_model", "m has no version 9; it has 1, 2"),
        ({"split": {"1": 1, "9": 1}}, "unknown_model", "m has no version 9"),
        ({"split": {"1": 0, "2": 0}}, "invalid_input", "outside 1..10000"),
        ({"split": {"1": -1, "2": 1}}, "invalid_input", "outside 1..10000"),
        ({"split": {"1": 1.5, "2": 1}}, "invalid_input", "must be an integer"),
        ({"split": {"1": 10**30, "2": 1}}, "invalid_input", "outside 1..10000"),
        ({"split": {}}, "invalid_input", "1 to 8 versions"),
        ({"default": "1", "load": "no"}, "invalid_input", "load must be"),
        ({"default": "1", "more": 1}, "invalid_input", "unknown field"),
        ({}, "invalid_input", "a release is"),
    ],
)
def test_what_makes_no_release_is_refused_and_changes_nothing(split: Node, body: dict[str, Any], code: str, text: str) -> None:
    before = split.running.server.routing.table
    refused(split.release(body), code, text)
    assert split.running.server.routing.table is before
    assert split.store.release("m") == Release({"1": 90, "2": 10})


def test_versions_that_callers_can_tell_apart_are_not_split(node: Node) -> None:
    done(node.put("1", version="1"))
    done(node.put("wide", version="2"))
    refused(
        node.release({"split": {"1": 1, "2": 1}}),
        "signature_mismatch",
        "m:1 and m:2 cannot answer for one name by turns, since callers could tell: one takes x float32 [batch, 2], the other x "
        "float32 [batch, 3]",
    )
    own = model("m")
    assert kind_of(own(X)) == "1"
    # As a default it may follow; functions find out what it takes.
    done(node.release({"default": "2"}))
    assert own(np.ones((1, 3), np.float32)).shape == (1, 3)
    assert own.signature.version == "2"


@pytest.mark.parametrize("name", ["UP", "a:b:c", "m@x", "m:1", ".."])
def test_what_is_no_name_has_no_versions(node: Node, name: str) -> None:
    for answer in (node.versions(name), node.release({"default": "1"}, name), node.remove("1", name)):
        assert answer.status_code == 404, answer.text


def test_queries_that_mean_nothing_are_refused(node: Node) -> None:
    refused(node.put("1", name="stats"), "invalid_input", "stats cannot be the name of a model")
    refused(node.put("1", default="true"), "invalid_input", "for what is pushed as a version")
    refused(node.put("1", version="1", defualt="true"), "invalid_input", "'defualt' says nothing of a model")
    refused(node.put("1", version="1", default="yes"), "invalid_input", "true or false")
    for label in ("a b", "../1", "a+b", "a@b", "-", "1" * 33):
        refused(node.put("1", version=label), "invalid_input", "no label")
    long_name = "m" * 120
    refused(node.put("1", long_name, version="12345678"), "bundle_error", "129 characters")
    done(node.put("1", long_name, version="1234567"))
    assert asked(f"{long_name}:1234567") == "1"
    assert not node.store.releases() or node.store.releases() == [long_name]
    refused(node.versions("none"), "unknown_model", "no model")


# --- a change under load ----------------------------------------------------------------------------------------------


def test_a_switch_under_load_is_one_stroke(split: Node) -> None:
    """Every answer is of one version, none fails, and what is asked after the switch was answered is of the new one."""
    done(split.put("3", version="3"))
    stop = threading.Event()
    # When each call began and which version answered it, by the clock of the switches below.
    seen: list[list[tuple[float, str]]] = [[] for _ in range(8)]
    began = threading.Barrier(9)

    def ask(number: int) -> None:
        pool = Pool(endpoint=Endpoint(split.running.path), credential=lambda: b"")
        with contextlib.closing(pool):
            own = client.Model("m", pool)
            own(X)
            began.wait(PATIENCE_S)
            while not stop.is_set():
                begun_s = time.monotonic()
                seen[number].append((begun_s, kind_of(own(np.ones((1, 2), np.float32)))))

    switched: list[tuple[float, set[str]]] = []
    with ThreadPoolExecutor(8) as threads:
        asking = [threads.submit(ask, number) for number in range(8)]
        began.wait(PATIENCE_S)
        try:
            for asked_for in ("2", "3", "1", "2", {"2": 1, "3": 1}, "3", "1") * 2:
                body = {"default": asked_for} if isinstance(asked_for, str) else {"split": asked_for}
                done(split.release(body))
                switched.append((time.monotonic(), set(asked_for)))
                # Each of them is asked for a while.
                counts = [len(each) for each in seen]
                deadline = soon()
                while any(len(each) < count + 3 for each, count in zip(seen, counts, strict=True)):
                    assert time.monotonic() < deadline
                    time.sleep(0.005)
        finally:
            stop.set()
        for each in asking:
            each.result(PATIENCE_S)
    for (at_s, labels), (next_s, next_labels) in zip(switched, [*switched[1:], (time.monotonic(), set())], strict=True):
        during = {kind for each in seen for begun_s, kind in each if at_s < begun_s < next_s}
        # Until the next switch is answered its versions may answer already.
        assert during <= labels | next_labels
        assert during & labels
    last_s, labels = switched[-1]
    assert {kind for each in seen for begun_s, kind in each if begun_s > last_s} == labels


def test_what_came_before_a_switch_keeps_its_version(split: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    done(split.release({"default": "1"}))
    done(split.http.post("/admin/v1/models/m:1/evict", json={}))
    real, entered, release = split.store.read_blob, threading.Event(), threading.Event()

    def hold(digest: str, target: memoryview, crc32: int | None = None) -> None:
        entered.set()
        assert release.wait(PATIENCE_S)
        real(digest, target, crc32)

    monkeypatch.setattr(split.store, "read_blob", hold)
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(asked)
        try:
            assert entered.wait(PATIENCE_S)
            # Others read it, too: a model that is tried out, for one.
            until(lambda: any(each["in_flight"] and each["tenant"] for each in split.admin.command("sessions")["sessions"]))
            done(split.release({"default": "2", "load": False}))
            refused(split.remove("1"), "invalid_input", "m:1 is in use by")
        finally:
            release.set()
        assert first.result(PATIENCE_S) == "1"
    done(split.remove("1"))
    assert asked() == "2"


def test_what_is_to_answer_is_loaded_first(node: Node) -> None:
    done(node.put("1", version="1"))
    done(node.put("2", version="2"))
    done(node.put("3", version="3"))

    def state(name: str) -> str:
        return next(str(each["state"]) for each in node.admin.command("models")["models"] if each["name"] == name)

    done(node.release({"default": "2"}))
    assert state("m:2") == "resident"
    done(node.release({"default": "3", "load": False}))
    assert state("m:3") == "stored"
    assert asked() == "3"


def test_a_version_that_cannot_be_loaded_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    with serving(tmp_path, budget_bytes=8) as node:
        done(node.put("1", version="1"))
        done(node.put("wide", version="2"))
        refused(node.release({"default": "2"}), "budget_exceeded", "take 12 bytes, the memory budget is 8")
        assert node.store.release("m") == Release({"1": 1})
        assert asked() == "1"


# --- removal ----------------------------------------------------------------------------------------------------------


def test_what_answers_is_not_removed(split: Node) -> None:
    for version in ("1", "2"):
        refused(split.remove(version), "invalid_input", f"version {version} of m answers for it; release others first")
    refused(split.remove("9"), "unknown_model", "m has no version 9; it has 1, 2")
    done(split.release({"default": "2"}))
    assert done(split.remove("1")) == {"name": "m", "version": "1"}
    with pytest.raises(UnknownModel):
        asked("m:1")
    assert asked() == "2"
    assert split.store.models() == ["m:2"]
    # Its label may stand for something else then.
    done(split.put("3", version="1"))
    assert asked("m:1") == "3"


def test_what_is_pushed_while_a_model_is_being_removed_is_deployed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    done(node.put("1"))
    remove = Versions.remove

    def removed_and_pushed(self: Versions, name: str) -> list[str]:
        """Remove a model from the store, and have another push it before the engine is told."""
        stored = remove(self, name)
        done(node.put("2"))
        return stored

    monkeypatch.setattr(Versions, "remove", removed_and_pushed)
    done(node.http.delete("/admin/v1/models/m", json={}))
    assert kind_of(np.array([done(node.infer("m"))["outputs"][0]["data"]])) == "2"


def test_a_model_is_removed_with_all_its_versions(split: Node) -> None:
    done(split.put("3", "m-other"))
    done(split.http.delete("/admin/v1/models/m", json={}))
    assert split.store.models() == ["m-other"]
    assert split.store.releases() == []
    assert not split.running.server.routing.table
    for name in ("m", "m:1", "m:2"):
        with pytest.raises(UnknownModel):
            asked(name)
    refused(split.http.delete("/admin/v1/models/m", json={}), "unknown_model", "no model")
    assert done(split.put("2", version="5"))["release"] == {"default": "5"}


# --- who may ----------------------------------------------------------------------------------------------------------


def two_domains() -> Quotas:
    vision = Tenant(name="vision", domain="vision", token_hashes=(hash_of(b"v"),), models=("m",))
    search = Tenant(name="search", domain="search", token_hashes=(hash_of(b"s"),), models=("m*",))
    nobody = Tenant(name="nobody", domain="vision", token_hashes=(hash_of(b"n"),), models=("n", "m-*"))
    return Quotas({tenant.name: tenant for tenant in (vision, search, nobody)})


def test_who_may_use_a_name_may_use_its_versions(tmp_path: Path) -> None:
    with serving(tmp_path, quotas=two_domains()) as node:
        done(node.put("1", version="1"))
        done(node.put("2", version="2"))
        done(node.release({"split": {"1": 1, "2": 1}}))
        listed = done(node.versions())["versions"]
        assert [each["name"] for each in listed[0]["deployed"]] == ["m:1@search", "m:1@vision"]

        def ask(token: str, name: str) -> str:
            pool = Pool(endpoint=Endpoint(node.running.path), credential=token.encode)
            with contextlib.closing(pool):
                return kind_of(client.Model(name, pool)(X))

        # In each domain by itself: what others ask shows nowhere.
        assert [ask("v", "m"), ask("s", "m"), ask("s", "m"), ask("v", "m"), ask("s", "m")] == ["1", "1", "2", "2", "1"]
        assert [ask("v", "m:2"), ask("s", "m:1")] == ["2", "1"]
        for name in ("m", "m:1", "m:1@search", "m@search"):
            with pytest.raises(UnknownModel, match="that nobody may use; the operator allows it n, m-"):
                ask("n", name)
        with pytest.raises(UnknownModel, match="no model 'm:9' that vision may use"):
            ask("v", "m:9")
        told = done(node.infer("m", token="v"))
        assert told["model_name"] == "m"
        assert told["model_version"] == KIND_OF[told["outputs"][0]["data"][0] - 1]
        refused(node.infer("m", token="n"), "unknown_model", "nobody may use")
        refused(node.infer("m/versions/1", token="n"), "unknown_model", "nobody may use")
        administrator = ADMIN_TOKEN.decode()
        assert done(node.infer("m@vision/versions/2", token=administrator))["model_version"] == "2"
        assert {done(node.infer("m@vision", token=administrator))["model_version"] for _ in range(2)} == {"1", "2"}
        done(node.release({"default": "2"}))
        done(node.remove("1"))
        assert [ask("v", "m"), ask("s", "m")] == ["2", "2"]


# --- restarts ---------------------------------------------------------------------------------------------------------


def test_a_release_outlives_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    with serving(tmp_path) as node:
        done(node.put("1", version="1"))
        done(node.put("2", version="2"))
        done(node.put("3", "other"))
        done(node.release({"split": {"1": 1, "2": 3}}))
    with serving(tmp_path) as node:
        assert Counter(asked() for _ in range(8)) == {"1": 2, "2": 6}
        assert asked("m:1") == "1"
        assert done(node.versions())["release"]["split"] == {"1": 1, "2": 3}
        path = tmp_path / "store" / "releases" / "m.json"
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        # What runs stays with what it had, whoever tells it to look again.
        with pytest.raises(ModelCorrupt, match="the release of m is damaged"):
            node.admin.command("release", {"name": "m"})
        assert Counter(asked() for _ in range(8)) == {"1": 2, "2": 6}
        refused(node.versions(), "model_corrupt", "trunkline model release m VERSION")
    with serving(tmp_path) as node:
        # What starts with it guesses nothing.
        with pytest.raises(ModelCorrupt, match="trunkline model release m VERSION"):
            asked()
        with pytest.raises(ModelCorrupt):
            models("m", "other")(X)
        assert [asked("m:1"), asked("m:2"), asked("other")] == ["1", "2", "3"]
        assert done(node.infer("m/versions/2"))["model_version"] == "2"
        assert done(node.http.get("/v2/models/m/versions/2"))["versions"] == ["1", "2"]
        refused(node.infer("m"), "model_corrupt", "")
        done(node.release({"default": "2"}))
        assert asked() == "2"


def test_what_is_told_of_no_name_changes_nothing(split: Node) -> None:
    before = split.running.server.routing.table
    for name in ("", "../m", "UP"):
        with pytest.raises(UnknownModel, match="no name of a model"):
            split.admin.command("release", {"name": name})
    assert split.running.server.routing.table is before
    assert Counter(asked() for _ in range(10)) == {"1": 9, "2": 1}


def test_a_release_that_the_engine_was_not_told_of_is_that_of_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    with serving(tmp_path) as node:
        done(node.put("1", version="1"))
        bundle, blobs = adding_bundle("m", WEIGHTS["2"])
        for digest, content in blobs.items():
            node.store.put_blob(digest, [content], len(content))
        # As an endpoint leaves it that is killed before it tells the engine.
        node.store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph), "2")
        assert asked() == "1"
        # The same again takes effect at once, of a version that the engine was not told of either.
        done(node.release({"default": "2"}))
        assert asked() == "2"
        node.store.put_release("m", Release({"1": 1}))
        assert asked() == "2"
    with serving(tmp_path):
        assert asked() == "1"


# --- the Open Inference Protocol --------------------------------------------------------------------------------------


def test_open_inference_tells_versions_apart(split: Node) -> None:
    http = split.http
    for path in ("/v2/models/m", "/v2/models/m/versions/2"):
        assert done(http.get(path))["versions"] == ["1", "2"]
        assert done(http.get(path))["name"] == "m"
        assert done(http.get(f"{path}/ready")) == {"name": "m", "ready": True}
        assert done(http.get(f"{path}/config"))["input"][0]["name"] == "x"
    for rest in ("", "/ready", "/config", "/stats"):
        refused(http.get(f"/v2/models/m/versions/9{rest}"), "unknown_model", "version")
    refused(split.infer("m/versions/9"), "unknown_model", "there is no version 9 of m here")
    told = [done(split.infer("m")) for _ in range(20)]
    assert Counter(each["model_version"] for each in told) == {"1": 18, "2": 2}
    for each in (*told, done(split.infer("m/versions/1")), done(split.infer("m/versions/2"))):
        assert each["model_name"] == "m"
        assert KIND_OF[each["outputs"][0]["data"][0] - 1] == each["model_version"]
    index = done(http.post("/v2/repository/index"))
    assert [(each["name"], each["version"], each["state"]) for each in index] == [("m", "1", "READY"), ("m", "2", "READY")]
    stats = done(http.get("/v2/models/m/stats"))["model_stats"]
    assert [(each["name"], each["version"], each["inference_count"]) for each in stats] == [("m", "1", 19), ("m", "2", 3)]
    stats = done(http.get("/v2/models/m/versions/2/stats"))["model_stats"]
    assert [(each["version"], each["inference_count"]) for each in stats] == [("2", 3)]
    administrator = {"Authorization": f"Bearer {ADMIN_TOKEN.decode()}"}
    done(http.post("/v2/repository/models/m/unload", headers=administrator))
    assert {each["state"] for each in split.admin.command("models")["models"]} == {"stored"}
    done(http.post("/v2/repository/models/m/load", headers=administrator))
    assert {each["state"] for each in split.admin.command("models")["models"]} == {"resident"}


def test_open_inference_with_a_version_that_has_no_label(node: Node) -> None:
    done(node.put("1", said="1.0+cu12"))
    assert done(node.http.get("/v2/models/m"))["versions"] == ["1.0+cu12"]
    assert done(node.infer("m/versions/1.0+cu12"))["model_version"] == "1.0+cu12"
    refused(node.infer("m/versions/2.0+cu12"), "unknown_model", "there is no version")
    done(node.put("2", version="2"))
    assert done(node.http.get("/v2/models/m"))["versions"] == ["1.0+cu12", "2"]
    assert done(node.infer("m/versions/2"))["model_version"] == "2"


def test_open_inference_under_switches_tells_who_computed(split: Node) -> None:
    """What is told of an answer is who computed it, and none fails, while versions are released and removed."""
    stop, counts = threading.Event(), [0] * 4

    def ask(number: int) -> None:
        while not stop.is_set():
            told = done(split.infer("m"))
            assert KIND_OF[told["outputs"][0]["data"][0] - 1] == told["model_version"]
            counts[number] += 1

    with ThreadPoolExecutor(4) as threads:
        asking = [threads.submit(ask, number) for number in range(4)]
        try:
            for turn in range(12):
                one, other = ("1", "2") if turn % 2 else ("2", "1")
                done(split.release({"default": one}))
                deadline = soon()
                while (answer := split.remove(other)).status_code != 200:
                    refused(answer, "invalid_input", "in use")
                    assert time.monotonic() < deadline
                before = list(counts)
                done(split.put(other, version=other))
                done(split.release({"split": {"1": 1, "2": 1}}))
                while any(count == now for count, now in zip(before, counts, strict=True)):
                    assert time.monotonic() < deadline
                    assert not any(each.done() for each in asking)
                    time.sleep(0.005)
        finally:
            stop.set()
        for each in asking:
            each.result(PATIENCE_S)


def test_a_call_meant_for_a_version_that_is_gone_goes_to_another(split: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    real: Callable[..., Any] = split.admin.command
    turns = iter(["m:1", "m:none", "m:2"])

    def command(name: str, arguments: dict[str, object] | None = None) -> Any:
        if name == "route":
            return {"model": next(turns)}
        return real(name, arguments)

    monkeypatch.setattr(split.admin, "command", command)
    assert [done(split.infer("m"))["model_version"] for _ in range(2)] == ["1", "2"]
    turns = iter(["m:none"] * 10)
    refused(split.infer("m"), "unknown_model", "released and removed again and again")


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Have something done once, after a model was described to an inference and before it is called."""
    real, acts = openinference.decode, [act]

    def decode(body: bytes, json_bytes: int, signature: Signature) -> openinference.Inference:
        if acts:
            acts.pop()()
        return real(body, json_bytes, signature)

    monkeypatch.setattr(openinference, "decode", decode)


def test_a_version_that_is_replaced_while_it_is_asked_is_not_taken_for_it(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    done(node.put("1"))
    meanwhile(monkeypatch, lambda: done(node.put("2", said="7")))
    refused(node.infer("m/versions/1"), "unknown_model", "there is no version 1 of m here")
    assert done(node.infer("m/versions/7"))["model_version"] == "7"


def test_a_name_that_is_released_while_it_is_asked_tells_who_computed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    done(node.put("1"))
    done(node.put("2", version="2"))
    meanwhile(monkeypatch, lambda: done(node.release({"split": {"1": 1, "2": 1}})))
    told = done(node.infer("m"))
    assert told["model_version"] == KIND_OF[told["outputs"][0]["data"][0] - 1]


def test_a_name_whose_release_ends_while_it_is_asked_tells_who_computed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    done(node.put("1"))
    done(node.put("2", version="2"))
    done(node.release({"default": "2"}))
    meanwhile(monkeypatch, lambda: done(node.release({"default": "1"})))
    told = done(node.infer("m"))
    assert (told["model_version"], KIND_OF[told["outputs"][0]["data"][0] - 1]) == ("1", "1")


def test_the_table_of_a_session_is_the_one_in_force(split: Node) -> None:
    """A session that has asked before a change goes by the change; and bundles in a split may be told of by their own names."""
    own = model("m")
    assert own.signature.version == "1,2"
    done(split.release({"default": "2"}))
    assert {kind_of(own(X)) for _ in range(5)} == {"2"}
    bundle, blobs = adding_bundle("m", WEIGHTS["3"], "3")
    done(split.put_bundle(replace(bundle, version="3"), blobs, "", default="true"))
    assert {kind_of(own(X)) for _ in range(5)} == {"3"}
