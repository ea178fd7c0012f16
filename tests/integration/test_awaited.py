"""After a crash: models are there for all who ask, and deployed one by one as they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline.errors import DeviceOutOfMemory, ModelCorrupt, SidecarFault, UnknownModel
from trunkline.protocol import JOINT

from sidecar.catalog import Catalog
from sidecar.devicememory import DeviceMemory
from sidecar.ir import Weight
from sidecar.merkle import in_domain
from sidecar.pins import Pins
from sidecar.residency import Residency
from sidecar.tenants import OPEN, Quotas, Tenant
from tests.asking import called, submitted
from tests.fakes import FakeDevice, FakeSource, Running, running_server, weight_of
from tests.integration.conftest import TRUNK
from tests.integration.test_sharing import ask
from tests.waiting import until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

X = {"x": np.ones((1, 3), np.float32)}
SUM = {name: sum(TRUNK) + sum(name.encode()) for name in ("age", "gender")}
ALL = {"age", "gender", "pair", "text"}
STALE = "0" * 64
BOTH = Quotas({f"of-{each}": Tenant(name=f"of-{each}", domain=each, models=("*",)) for each in "ab"})


class LeftMemory(DeviceMemory):
    """As an engine that was killed leaves it, by its own account: with these weights, and one that no model has."""

    def __init__(self, device: Any, source: FakeSource, weights: Iterable[Weight]) -> None:
        super().__init__(device, source)
        self.left = {weight.digest for weight in weights} | {STALE}
        self.freed: list[str] = []

    def kept(self) -> Iterable[str]:
        return self.left

    def free(self, digests: Iterable[str]) -> None:
        self.freed += digests


@pytest.fixture(autouse=True)
def nobody_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have nothing deployed but what is asked for."""
    monkeypatch.setattr("sidecar.engine._QUIET_S", 3600.0)


def weights_of(source: FakeSource, *names: str, domain: str = "") -> list[Weight]:
    graphs = [in_domain(source.bundles[name].graph, domain) for name in names or source.bundles]
    return [weight for graph in graphs for weight in graph.weights]


def restarted(folder: Path, source: FakeSource, weights: Iterable[Weight] | None = None, **settings: Any) -> Any:
    device = FakeDevice()
    left = LeftMemory(device, source, weights_of(source) if weights is None else weights)
    return running_server(folder, source, device=device, memory=left, **settings)


def awaited(running: Running) -> set[str]:
    return set(running.engine._catalog.awaited)


def deployed(running: Running) -> set[str]:
    return set(running.engine._catalog.deployed)


def freed(running: Running) -> list[str]:
    left = running.engine._memory
    assert isinstance(left, LeftMemory)
    return left.freed


def answer(running: Running, name: str) -> float:
    return float(called(running, name, X)["y"][0, 0] - 1)


def test_without_weights_in_memory_everything_is_deployed_before_anybody_is_served(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as running:
        assert deployed(running) == ALL
        assert not awaited(running)


def test_only_what_is_asked_for_is_deployed(tmp_path: Path, source: FakeSource) -> None:
    with restarted(tmp_path, source) as running:
        assert awaited(running) == ALL
        assert answer(running, "age") == SUM["age"]
        assert deployed(running) == {"age"}
        assert awaited(running) == ALL - {"age"}
        # What the others are to find is still there.
        assert not freed(running)
        assert answer(running, "gender") == SUM["gender"]
        assert awaited(running) == {"pair", "text"}


def test_operators_see_all_models_and_what_none_of_them_needs_is_freed(tmp_path: Path, source: FakeSource) -> None:
    with restarted(tmp_path, source) as running:
        assert {each["name"] for each in ask(running, "models")["models"]} == ALL
        assert deployed(running) == ALL
        until(lambda: freed(running) == [STALE])
        assert ask(running, "memory")["resident_bytes"] == sum({w.digest: w.size_bytes for w in weights_of(source)}.values())


def test_the_others_are_deployed_while_nobody_waits(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine._QUIET_S", 0.0)
    with restarted(tmp_path, source) as running:
        until(lambda: not awaited(running))
        assert deployed(running) == ALL
        until(lambda: freed(running) == [STALE])


def test_what_is_not_deployed_yet_is_known_to_all_who_ask(tmp_path: Path, source: FakeSource) -> None:
    source.broken["torn"] = ModelCorrupt("torn cannot be read")
    with restarted(tmp_path, source) as running:
        engine = running.engine
        assert engine.signature("text").version == source.bundles["text"].version
        with pytest.raises(ModelCorrupt, match="torn cannot be served: torn cannot be read"):
            engine.signature("torn")
        with pytest.raises(UnknownModel, match=r"no model 'nobody'; it holds age, gender, pair, text"):
            engine.signature("nobody")
        assert not deployed(running)
        before = engine.signature("age")
        assert answer(running, "age") == SUM["age"]
        # What was checked against the one holds for the other.
        assert engine.signature("age") == before
        assert {each["name"] for each in ask(running, "models")["models"]} == ALL | {"torn"}
        with pytest.raises(ModelCorrupt, match="torn cannot be served"):
            engine.signature("torn")


def test_several_models_are_asked_together_before_either_is_deployed(tmp_path: Path, source: FakeSource) -> None:
    with restarted(tmp_path, source) as running:
        together = JOINT.join(("age", "gender"))
        assert [spec.name for spec in running.engine.signature(together).inputs] == ["x"]
        found = called(running, together, X)
        assert [float(each[0, 0] - 1) for each in found.values()] == [SUM["age"], SUM["gender"]]
        assert deployed(running) == {"age", "gender"}


def test_one_that_cannot_be_read_is_no_part_of_a_call(tmp_path: Path, source: FakeSource) -> None:
    source.broken["torn"] = ModelCorrupt("torn cannot be read")
    with restarted(tmp_path, source) as running, pytest.raises(ModelCorrupt, match="torn cannot be served"):
        running.engine.signature(JOINT.join(("age", "torn")))


def test_what_was_removed_from_the_store_meanwhile_is_unknown(tmp_path: Path, source: FakeSource) -> None:
    with restarted(tmp_path, source) as running:
        del source.bundles["age"]
        with pytest.raises(UnknownModel, match="no model age"):
            running.engine.signature("age")
        assert {each["name"] for each in ask(running, "models")["models"]} == ALL - {"age"}
        assert not awaited(running)


def test_it_is_asked_for_once_and_removed_before_its_turn(tmp_path: Path, source: FakeSource) -> None:
    with restarted(tmp_path, source) as running:
        assert running.engine.signature("age")
        del source.bundles["age"]
        # As one that was removed just after it was deployed.
        assert answer(running, "age") == SUM["age"]
        ask(running, "model_removed", name="age")
        with pytest.raises(UnknownModel):
            submitted(running, "age", X)


def test_before_something_is_loaded_all_are_deployed(tmp_path: Path, source: FakeSource) -> None:
    """What has to leave is chosen among all that is in memory, which nobody knows before."""
    with restarted(tmp_path, source, weights_of(source, "age")) as running:
        assert answer(running, "age") == SUM["age"]
        assert awaited(running) == ALL - {"age"}
        assert answer(running, "gender") == SUM["gender"]
        assert not awaited(running)


def test_kept_weights_of_models_that_are_not_deployed_count_in_the_budget(tmp_path: Path, source: FakeSource) -> None:
    left = weights_of(source, "age")
    budget_bytes = sum(weight.size_bytes for weight in left)
    with restarted(tmp_path, source, left, budget_bytes=budget_bytes) as running:
        # One byte that is not there, and no room beside what nobody has asked for yet.
        assert float(called(running, "pair", X)["y"][0, 0] - 1) == ord("p")
        assert ask(running, "memory")["resident_bytes"] <= budget_bytes
        # After what nobody needs: freed by the mover, in this order, before anything else is brought in.
        assert freed(running) == [STALE, weight_of(b"age").digest]


def test_a_request_whose_model_cannot_be_deployed_is_told_so(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with restarted(tmp_path, source) as running:
        asked = []
        for problem, told in (
            (DeviceOutOfMemory("no room to find that out"), DeviceOutOfMemory),
            (ValueError("a bug"), SidecarFault),
        ):
            name = ("age", "gender")[len(asked)]
            monkeypatch.setattr(running.engine._deployments, "_begin", failing(problem))
            asked.append(submitted(running, name, X))
            with pytest.raises(told):
                asked[-1].result()
        with pytest.raises(SidecarFault):
            ask(running, "models")
        monkeypatch.undo()
        # Others are served, and these, too: there is only less known of them.
        assert awaited(running) == {"text"}
        assert answer(running, "age") == SUM["age"]
    assert "a bug" in caplog.text


def failing(problem: Exception) -> Callable[[object], None]:
    def begin(deployed: object) -> None:
        raise problem

    return begin


def test_pinned_models_are_deployed_at_once(tmp_path: Path, source: FakeSource) -> None:
    Pins(tmp_path / "pins.json").add("gender")
    with restarted(tmp_path, source) as running:
        assert deployed(running) == {"gender"}
        assert awaited(running) == ALL - {"gender"}
        assert ask(running, "model", name="gender")["pinned"]


def test_what_functions_have_named_is_loaded_ahead(tmp_path: Path, source: FakeSource) -> None:
    with restarted(tmp_path, source) as running:
        running.engine.session_opened(["gender", "nobody"])
        until(lambda: "gender" in deployed(running) and running.engine._catalog.deployed["gender"].loaded)
        assert awaited(running) == ALL - {"gender"}
        assert answer(running, "gender") == SUM["gender"]


def test_what_is_named_and_not_in_memory_is_loaded_after_all_are_deployed(tmp_path: Path, source: FakeSource) -> None:
    with restarted(tmp_path, source, []) as running:
        running.engine.session_opened(["gender"])
        until(lambda: "gender" in deployed(running) and running.engine._catalog.deployed["gender"].loaded)
        assert not awaited(running)


def test_a_model_is_read_from_the_store_once_for_all_domains(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    whole = source.model
    monkeypatch.setattr(source, "model", lambda name: read.append(name) or whole(name))  # type: ignore[func-returns-value]
    left = [*weights_of(source, domain="a"), *weights_of(source, domain="b")]
    with restarted(tmp_path, source, left, quotas=BOTH) as running:
        assert answer(running, "age@a") == SUM["age"]
        assert deployed(running) == {"age@a"}
        with pytest.raises(UnknownModel, match="it holds age, gender, pair, text;"):
            running.engine.signature("nobody@b")
        assert answer(running, "age@b") == SUM["age"]
        assert deployed(running) == {"age@a", "age@b"}
        assert read == ["age"]
        # What there is besides is known before what may be used changes.
        running.engine.use_quotas(OPEN)
        until(lambda: deployed(running) == ALL)
        assert not awaited(running)


def test_what_awaited_models_have_is_not_forgotten(tmp_path: Path, source: FakeSource) -> None:
    forgotten: set[str] = set()
    device = FakeDevice()
    memory, pins = DeviceMemory(device, source), Pins(tmp_path / "pins.json")
    catalog = Catalog(source, device, memory, Residency(1 << 20), pins, forgotten.update)
    catalog.await_stored()
    catalog.complete("age")
    catalog.withdraw("age")
    catalog.publish()
    assert not forgotten
    for name in list(catalog.awaited):
        catalog.complete(name)
    # The trunk is the sibling's, too.
    assert forgotten == {weight_of(b"age").digest}
