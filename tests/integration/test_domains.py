"""Deduplication domains: within one, everything is shared; between two, nothing is, and neither can tell what the other has."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline.errors import InvalidInput, ModelCorrupt, UnknownModel

from sidecar.bundle import Bundle
from sidecar.catalog import Catalog
from sidecar.errors import BundleError
from sidecar.graph import FusedGraph
from sidecar.pins import Pins
from sidecar.tenants import OPEN, Quotas, Tenant, qualified
from tests.asking import called, called_at_once, submitted
from tests.fakes import FakeSource, Running, bundle_of, running_server, weight_of
from tests.integration.conftest import TRUNK
from tests.integration.test_sharing import ask, counted
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

X = {"x": np.ones((1, 3), np.float32)}
SUM = {name: sum(TRUNK) + sum(name.encode()) for name in ("age", "gender")}


def quotas(public: tuple[str, ...] = (), **domains: str) -> Quotas:
    """Return quotas with a tenant in each domain, and the patterns of the models it may use."""
    tenants = [Tenant(name=f"of-{each}", domain=each, models=tuple(patterns.split())) for each, patterns in domains.items()]
    return Quotas({tenant.name: tenant for tenant in tenants}, public)


BOTH = quotas(a="*", b="*")


def serve(folder: Path, source: FakeSource, asked: Quotas = BOTH, **settings: Any) -> Any:
    return running_server(folder, source, quotas=asked, **settings)


def answer(running: Running, name: str) -> float:
    return float(called(running, name, X)["y"][0, 0] - 1)


def names(running: Running) -> list[str]:
    return [each["name"] for each in ask(running, "models")["models"]]


def change(running: Running, asked: Quotas) -> None:
    """Have other quotas used, and wait until all is deployed that they ask for."""
    done = threading.Event()
    running.engine.use_quotas(asked, done.set)
    assert done.wait(PATIENCE_S)


def memory(running: Running) -> tuple[int, int]:
    """Return the bytes that weights have in memory, by the engine's books and by the device's."""
    return ask(running, "memory")["resident_bytes"], running.device.allocated_bytes


# --- what is shared ---------------------------------------------------------------------------------------------------


@pytest.mark.row("T17")
@pytest.mark.parametrize(
    ("one", "other", "resident_bytes", "shared_stages"),
    [
        ("age@a", "age-too@a", 103, 1),
        ("age@a", "gender@a", 109, 0),
        ("age@a", "age@b", 206, 0),
        ("age@a", "age-too@b", 206, 0),
        ("age@a", "gender@b", 209, 0),
    ],
)
def test_models_share_within_a_domain_and_nothing_beyond(
    one: str, other: str, resident_bytes: int, shared_stages: int, tmp_path: Path, source: FakeSource
) -> None:
    """The paired test: what proves that domains share nothing must not prove it of those who are to share."""
    contents = [TRUNK, b"age"]
    source.put(bundle_of("age-too", contents), contents)
    with serve(tmp_path, source) as running:
        assert answer(running, one) == SUM["age"]
        assert memory(running) == (103, 103)
        before = ask(running, "model", name=other)
        assert answer(running, other) == (SUM["gender"] if "gender" in other else SUM["age"])
        assert memory(running) == (resident_bytes, resident_bytes)
        assert (one in before["shared_with"]) is (one.split("@")[1] == other.split("@")[1])
        with counted(running) as counts:
            called_at_once(running, (one, X), (other, X))
        assert counts["stages"] == 2 - shared_stages
        assert counts["stage_requests"] == 2
        # Programs hold no weights.
        assert running.device.prepare_count == (2 if "gender" in other else 1)


@pytest.mark.parametrize(
    ("public", "one", "other", "resident_bytes", "shared_stages"),
    [
        # Bytes in memory once, and each domain's stages its own.
        (("age",), "age@a", "age@b", 103, 0),
        (("ag?",), "age@a", "age@a", 103, 1),
        # What is tuned from a public model has its trunk in common with all, and its head with nobody.
        (("age",), "age@a", "gender@b", 109, 0),
        (("age",), "gender@a", "gender@b", 112, 0),
        (("age",), "age@a", "gender@a", 109, 0),
        (("gender",), "age@a", "age@b", 106, 0),
        # Without that nothing.
        (("other",), "age@a", "age@b", 206, 0),
        ((), "gender@a", "gender@b", 212, 0),
    ],
)
def test_weights_of_public_models_are_in_memory_once_and_nothing_is_computed_for_two_domains(
    public: tuple[str, ...], one: str, other: str, resident_bytes: int, shared_stages: int, tmp_path: Path, source: FakeSource
) -> None:
    with serve(tmp_path, source, quotas(public, a="*", b="*")) as running:
        for name in (one, other):
            assert answer(running, name) == SUM[name.split("@")[0]]
        assert memory(running) == (resident_bytes, resident_bytes)
        with counted(running) as counts:
            called_at_once(running, (one, X), (other, X))
        assert counts["stages"] == 2 - shared_stages


def test_what_is_public_follows_the_quotas(tmp_path: Path, source: FakeSource) -> None:
    open_to_all = quotas(("age",), a="*", b="*")
    with serve(tmp_path, source) as running:

        def resident_bytes() -> int:
            for name in ("age@a", "age@b", "gender@a", "gender@b"):
                assert answer(running, name) == SUM[name.split("@")[0]]
            return memory(running)[0]

        assert resident_bytes() == 2 * 109
        ask(running, "pin", name="age@a")
        for asked, expected in ((open_to_all, 103 + 2 * 6), (BOTH, 2 * 109), (open_to_all, 103 + 2 * 6)):
            change(running, asked)
            assert resident_bytes() == expected
            assert ask(running, "model", name="age@a")["pinned"]
            running.engine._catalog.check_invariants()


def test_nobody_is_refused_while_weights_become_public(tmp_path: Path, source: FakeSource) -> None:
    running_it, leave = threading.Event(), threading.Event()
    with serve(tmp_path, source) as running:
        running.device.on_run = lambda: (running_it.set(), leave.wait(PATIENCE_S))
        under_way = submitted(running, "age@b", X)
        assert running_it.wait(PATIENCE_S)
        done = threading.Event()
        running.engine.use_quotas(quotas(("age",), a="*", b="*"), done.set)
        waiting = submitted(running, "age@b", X)
        leave.set()
        for each in (under_way, waiting):
            assert float(each.result()["y"][0, 0] - 1) == SUM["age"]
        assert done.wait(PATIENCE_S)
        assert answer(running, "age@a") == SUM["age"]
        assert memory(running) == (103, 103)


def test_a_public_model_that_is_pushed_shares_its_weights_with_what_is_deployed_after_it(
    tmp_path: Path, source: FakeSource
) -> None:
    gone = source.bundles.pop("age")
    with serve(tmp_path, source, quotas(("age",), a="*", b="*")) as running:
        assert answer(running, "gender@a") == SUM["gender"]
        source.bundles["age"] = gone
        ask(running, "model_changed", name="age")
        for name in ("age@a", "age@b"):
            assert answer(running, name) == SUM["age"]
        # What was deployed before has names of its own for its weights, until the quotas are read again.
        assert memory(running) == (106 + 103, 106 + 103)
        change(running, quotas(("age",), a="*", b="*"))
        for name in ("age@a", "age@b", "gender@a", "gender@b"):
            assert answer(running, name) == SUM[name.split("@")[0]]
        assert memory(running) == (103 + 2 * 6, 103 + 2 * 6)


def test_a_public_model_that_is_damaged_keeps_nothing_from_being_served(tmp_path: Path, source: FakeSource) -> None:
    source.broken["age"] = BundleError("damaged")
    with serve(tmp_path, source, quotas(("age",), a="*", b="*")) as running:
        assert answer(running, "gender@a") == SUM["gender"]


def test_without_quotas_there_is_one_domain_and_names_are_plain(tmp_path: Path, source: FakeSource) -> None:
    with serve(tmp_path, source, OPEN) as running:
        assert names(running) == ["age", "gender", "pair", "text"]
        assert {each["domain"] for each in ask(running, "models")["models"]} == {""}
        for name, deployed in running.engine._catalog.deployed.items():
            stored = source.bundles[name]
            assert deployed.plan == f"{name}@{stored.graph_digest}"
            assert deployed.bundle.graph == stored.graph
            assert list(deployed.weights) == [weight.digest for weight in stored.graph.weights]
        assert answer(running, "age") == SUM["age"]


def test_a_model_is_evicted_loaded_pinned_and_kept_in_each_domain_by_itself(tmp_path: Path, source: FakeSource) -> None:
    with serve(tmp_path, source) as running:
        for name in ("age@a", "age@b"):
            assert ask(running, "load", name=name)["state"] == "resident"
        read_count = running.source.read_count
        assert ask(running, "evict", name="age@a")["freed_bytes"] == 103
        shown = {each["name"]: (each["state"], each["domain"]) for each in ask(running, "models")["models"]}
        assert (shown["age@a"], shown["age@b"]) == (("stored", "a"), ("resident", "b"))
        assert answer(running, "age@b") == SUM["age"]
        assert running.source.read_count == read_count
        # What the other has in memory is of no use to it.
        assert answer(running, "age@a") == SUM["age"]
        assert running.source.read_count == read_count + 2
        ask(running, "pin", name="age@a")
        ask(running, "keep", name="age@b", priority=9)
        found = {name: ask(running, "model", name=name) for name in ("age@a", "age@b")}
        assert [(each["pinned"], each["priority"], each["requests"]) for each in found.values()] == [(True, 5, 1), (False, 9, 1)]
        assert all(each["signature"]["model"] == "age" for each in found.values())
        assert ask(running, "evict", name="age@b")["state"] == "stored"
        with pytest.raises(InvalidInput, match="age@a is pinned"):
            ask(running, "evict", name="age@a")
    assert Pins(tmp_path / "pins.json").names() == ["age@a"]


def test_a_damaged_weight_is_named_as_the_store_names_it(tmp_path: Path, source: FakeSource) -> None:
    digest = weight_of(b"age").digest
    del source.blobs[digest]
    with serve(tmp_path, source) as running, pytest.raises(ModelCorrupt, match=digest[:12]) as told:
        answer(running, "age@a")
    assert told.value.details["digest"] == digest


# --- who may use what -------------------------------------------------------------------------------------------------


def test_a_model_of_another_domain_is_as_unknown_as_none(tmp_path: Path, source: FakeSource) -> None:
    with serve(tmp_path, source, quotas(a="age text", b="*")) as running:
        assert names(running) == ["age@a", "age@b", "gender@b", "pair@b", "text@a", "text@b"]
        ask(running, "load", name="gender@b")
        told = []
        # As the server asks for what a function of the domain "a" names.
        for asked in ("gender", "nobody", "gender@b", "age@b", "age+gender", "age+nobody"):
            with pytest.raises(UnknownModel) as error:
                running.engine.signature(qualified(asked, "a"))
            wanted = asked.split("+")[-1]
            assert error.value.details == {"model": wanted}
            told.append(error.value.message.replace(repr(wanted), "it"))
        assert set(told) == {"the sidecar holds no model it; it holds age, text; `trunkline push` adds one"}
        # Where a domain has nothing, nothing is told.
        with pytest.raises(UnknownModel, match="it holds none"):
            running.engine.signature("age@c")
        # Operators are told of all.
        with pytest.raises(UnknownModel, match="'gender@a'; it holds age@a, age@b, gender@b"):
            ask(running, "load", name="gender@a")
        with pytest.raises(UnknownModel, match="'age'; it holds age@a"):
            ask(running, "model", name="age")


def test_what_is_pushed_is_deployed_wherever_it_may_be_used(tmp_path: Path, source: FakeSource) -> None:
    with serve(tmp_path, source, quotas(a="new-*", b="*", c="age")) as running:
        contents = [TRUNK, b"new"]
        source.put(bundle_of("new-1", contents), contents)
        made = ask(running, "model_changed", name="new-1")
        assert (made["name"], [each["name"] for each in made["deployed"]]) == ("new-1", ["new-1@a", "new-1@b"])
        assert answer(running, "new-1@a") == answer(running, "new-1@b") == sum(TRUNK) + sum(b"new")
        ask(running, "pin", name="new-1@a")
        ask(running, "keep", name="new-1@b", priority=7)
        second = [TRUNK, b"newer"]
        source.put(bundle_of("new-1", second, version="2"), second)
        ask(running, "model_changed", name="new-1")
        assert [ask(running, "model", name=f"new-1@{each}")["version"] for each in "ab"] == ["2", "2"]
        assert ask(running, "model", name="new-1@a")["pinned"]
        assert answer(running, "new-1@b") == sum(TRUNK) + sum(b"newer")
        del source.bundles["new-1"]
        assert ask(running, "model_removed", name="new-1") == {"name": "new-1"}
        assert not any(name.startswith("new") for name in names(running))
        assert memory(running) == (0, 0)
        # One that nobody may use is stored, and that is all.
        with_nobody = [b"alone"]
        change(running, quotas(c="age"))
        source.put(bundle_of("new-2", with_nobody), with_nobody)
        assert ask(running, "model_changed", name="new-2") == {"name": "new-2", "deployed": []}
        assert names(running) == ["age@c"]
    assert json.loads((tmp_path / "pins.json").read_text()) == {"pinned": [], "kept": {}}


def test_a_damaged_model_is_told_in_each_domain_that_may_use_it(tmp_path: Path, source: FakeSource) -> None:
    source.broken["bad"] = ModelCorrupt("bad is damaged: its manifest; push it again")
    with serve(tmp_path, source, quotas(a="*", b="age", c="bad")) as running:
        listed = {each["name"]: (each["domain"], each["state"]) for each in ask(running, "models")["models"]}
        assert (listed["bad@a"], listed["bad@c"]) == (("a", "corrupt"), ("c", "corrupt"))
        assert "bad@b" not in listed
        with pytest.raises(ModelCorrupt, match="^bad cannot be served: bad is damaged"):
            running.engine.signature("bad@a")
        with pytest.raises(ModelCorrupt, match="bad is damaged"):
            ask(running, "load", name="bad@a")
        change(running, quotas(a="*", b="age bad"))
        assert "bad@c" not in names(running)
        with pytest.raises(ModelCorrupt, match="bad is damaged"):
            ask(running, "load", name="bad@b")
        del source.broken["bad"]
        source.put(bundle_of("bad", [b"good"]), [b"good"])
        ask(running, "model_changed", name="bad")
        assert answer(running, "bad@a") == answer(running, "bad@b") == sum(b"good")


def test_what_is_wrong_with_a_model_is_told_by_the_name_it_was_asked_by(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(graph: FusedGraph, bundle: Bundle, looked: object = None) -> None:
        raise BundleError(f"{bundle.name} is not told apart from what is deployed")

    monkeypatch.setattr(FusedGraph, "add", refuse)
    with serve(tmp_path, source) as running, pytest.raises(ModelCorrupt, match="^age cannot be served: age is not told apart"):
        running.engine.signature("age@a")


def test_models_of_one_domain_are_asked_together(tmp_path: Path, source: FakeSource) -> None:
    # As text, "age@a" comes after "age-2@a"; as names of models, before.
    contents = [TRUNK, b"second"]
    source.put(bundle_of("age-2", contents), contents)
    with serve(tmp_path, source) as running:
        name = qualified("age+age-2+gender", "a")
        signature = running.engine.signature(name)
        assert signature.model == "age+age-2+gender"
        assert [spec.name for spec in signature.outputs] == ["age/y", "age-2/y", "gender/y"]
        given = called(running, name, X)
        assert {output: float(array[0, 0] - 1) for output, array in given.items()} == {
            "age/y": SUM["age"],
            "age-2/y": sum(TRUNK) + sum(b"second"),
            "gender/y": SUM["gender"],
        }
        resident_bytes = len(TRUNK) + 3 + 6 + 6
        assert memory(running) == (resident_bytes, resident_bytes)
        assert running.engine.signature(qualified("age+age-2+gender", "b")).id == signature.id
        with pytest.raises(InvalidInput, match="several domains"):
            running.engine.signature("age@a+gender@b")
        with pytest.raises(InvalidInput, match="'gender\\+age' does not name"):
            running.engine.signature(qualified("gender+age", "a"))


# --- quotas that change -----------------------------------------------------------------------------------------------


def test_what_a_domain_may_use_follows_the_quotas(tmp_path: Path, source: FakeSource) -> None:
    with serve(tmp_path, source, OPEN) as running:
        assert answer(running, "age") == SUM["age"]
        change(running, quotas(a="*", b="age"))
        assert names(running) == ["age@a", "age@b", "gender@a", "pair@a", "text@a"]
        # Not even one domain that was alone shares with those that come after it.
        assert memory(running) == (0, 0)
        assert answer(running, "age@a") == answer(running, "age@b") == SUM["age"]
        ask(running, "pin", name="age@b")
        change(running, quotas(a="age"))
        assert names(running) == ["age@a"]
        assert memory(running) == (103, 103)
        with pytest.raises(UnknownModel):
            running.engine.signature("age@b")
        # Its pin was the operator's word, and holds when it is back.
        change(running, quotas(a="age", b="age gender"))
        assert names(running) == ["age@a", "age@b", "gender@b"]
        until(lambda: ask(running, "model", name="age@b")["state"] == "resident")
        assert ask(running, "model", name="age@b")["pinned"]
        assert memory(running) == (206, 206)
        change(running, OPEN)
        assert names(running) == ["age", "gender", "pair", "text"]
        assert memory(running) == (0, 0)
        assert answer(running, "age") == SUM["age"]


def test_a_model_is_read_from_the_store_once_for_all_its_domains(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []

    def model(name: str) -> Bundle:
        read.append(name)
        return FakeSource.model(source, name)

    monkeypatch.setattr(source, "model", model)
    with serve(tmp_path, source, quotas(a="*", b="*", c="age")) as running:
        assert sorted(read) == source.models()
        # Nor is it read again for one more.
        change(running, quotas(a="*", b="*", c="*", d="*"))
        assert sorted(read) == source.models()
        assert answer(running, "gender@d") == SUM["gender"]


def test_a_request_under_way_is_answered_though_its_domain_goes(tmp_path: Path, source: FakeSource) -> None:
    running_it, leave = threading.Event(), threading.Event()
    with serve(tmp_path, source) as running:
        running.device.on_run = lambda: (running_it.set(), leave.wait(PATIENCE_S))
        under_way = submitted(running, "age@b", X)
        assert running_it.wait(PATIENCE_S)
        running.engine.use_quotas(quotas(a="*"))
        waiting = submitted(running, "gender@b", X)
        of_another = submitted(running, "age@a", X)
        leave.set()
        assert float(under_way.result()["y"][0, 0] - 1) == SUM["age"]
        assert float(of_another.result()["y"][0, 0] - 1) == SUM["age"]
        with pytest.raises(UnknownModel, match="'gender'"):
            waiting.result()
        assert not any(name.endswith("@b") for name in names(running))
        assert memory(running) == (103, 103)


def test_a_request_that_waits_for_its_weights_is_answered_though_its_domain_goes(tmp_path: Path, source: FakeSource) -> None:
    reading, leave = threading.Event(), threading.Event()
    with serve(tmp_path, source) as running:
        source.before_read = lambda digest: (reading.set(), leave.wait(PATIENCE_S))
        waiting = submitted(running, "age@b", X)
        assert reading.wait(PATIENCE_S)
        change(running, quotas(a="*"))
        leave.set()
        assert float(waiting.result()["y"][0, 0] - 1) == SUM["age"]
        ask(running, "status")
        assert memory(running) == (0, 0)


def test_nothing_is_lost_while_quotas_change(tmp_path: Path, source: FakeSource) -> None:
    """One domain stays and never sees a thing; those that come and go answer rightly or say that there is no such model."""
    ended = threading.Event()

    def steadily() -> int:
        count = 0
        while not ended.is_set() or not count:
            assert answer(running, "age@a") == SUM["age"]
            count += 1
        return count

    def now_and_then() -> tuple[int, int]:
        answered = refused = 0
        while not ended.is_set():
            try:
                assert answer(running, "gender@b") == SUM["gender"]
                answered += 1
            except UnknownModel:
                refused += 1
        return answered, refused

    with serve(tmp_path, source) as running, ThreadPoolExecutor(3) as threads:
        steady = [threads.submit(steadily) for _ in range(2)]
        other = threads.submit(now_and_then)
        try:
            for turn in range(20):
                change(running, BOTH if turn % 2 else quotas(a="*", c="text"))
        finally:
            ended.set()
        counts = [each.result(PATIENCE_S) for each in steady]
        answered, refused = other.result(PATIENCE_S)
        assert min(counts) > 0
        status = ask(running, "status")["requests"]
        assert status["answered"] == sum(counts) + answered
        assert status["failed"] <= refused
        assert names(running) == sorted(f"{name}@{domain}" for name in source.models() for domain in "ab")
        change(running, quotas(c="text"))
        assert memory(running) == (0, 0)


def test_who_changes_quotas_is_told_when_all_is_deployed(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    ended = threading.Event()
    with serve(tmp_path, source, quotas(a="age")) as running:
        complete = running.engine._catalog.complete

        def noted(catalog: Catalog, name: str) -> object:
            happened.append(name)
            return complete(name)

        monkeypatch.setattr(Catalog, "complete", noted)
        running.engine.use_quotas(quotas(a="age gender text"), lambda: happened.append("first"))
        # This one is told as well, though others come into force before all of its models are there.
        running.engine.use_quotas(quotas(a="age text", b="age"), lambda: (happened.append("second"), ended.set()))
        assert ended.wait(PATIENCE_S)
        assert names(running) == ["age@a", "age@b", "text@a"]
        assert happened[-2:] == ["first", "second"]
        ended.clear()
        # With nothing to deploy at once.
        running.engine.use_quotas(quotas(a="age text", b="age"), ended.set)
        assert ended.wait(PATIENCE_S)


def test_quotas_that_follow_each_other_quickly_end_as_the_last(tmp_path: Path, source: FakeSource) -> None:
    with serve(tmp_path, source) as running:
        hold = threading.Event()
        running.engine._post(lambda: hold.wait(PATIENCE_S))
        for each in (quotas(b="*"), quotas(c="*"), quotas(a="age", c="*"), quotas(b="*", c="text")):
            running.engine.use_quotas(each)
        hold.set()
        change(running, quotas(b="age text", c="text"))
        assert names(running) == ["age@b", "text@b", "text@c"]


def test_a_model_that_was_pushed_before_its_turn_came_is_deployed_once(tmp_path: Path, source: FakeSource) -> None:
    with serve(tmp_path, source, quotas(a="age")) as running:
        catalog, hold = running.engine._catalog, threading.Event()
        running.engine._post(lambda: hold.wait(PATIENCE_S))
        running.engine.use_quotas(quotas(a="*"))
        running.engine._post(lambda: (catalog.deploy("text"), catalog.publish()))
        hold.set()
        change(running, quotas(a="*"))
        assert names(running) == [f"{name}@a" for name in source.models()]


def test_a_model_that_is_removed_before_it_is_deployed_keeps_no_other_from_being(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, source, quotas(a="text")) as running:
        # Its name is still listed when the first is deployed.
        listed = source.models()
        del source.bundles["age"]
        monkeypatch.setattr(source, "models", lambda: listed)
        change(running, quotas(a="*"))
        assert names(running) == ["gender@a", "pair@a", "text@a"]
