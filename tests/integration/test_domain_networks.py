"""Deduplication domains on a real device: networks that share in one, and take memory and time of their own in two."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trunkline import client
from trunkline.errors import UnknownModel

from sidecar.bundle import Bundle
from sidecar.devices import open_device
from sidecar.trials import Trials
from sidecar.verdicts import Verdicts
from tests.asking import called, called_at_once
from tests.fakes import FakeSource, Running
from tests.forms import prefer, run_apart
from tests.integration.test_domains import BOTH, change, names, quotas, serve
from tests.integration.test_sharing import ask, counted
from tests.networks import Network, agrees, network
from tests.nodes import Node, moved
from tests.waiting import until


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    yield
    client._pool.close()


def of(*networks: Network) -> FakeSource:
    source = FakeSource()
    for each in networks:
        each.put(source)
    return source


def real(folder: Path, source: FakeSource, **settings: Any) -> Any:
    verdicts = Verdicts(folder / "verdicts", "test")
    return serve(folder, source, device=open_device("cpu"), budget_bytes=1 << 26, verdicts=verdicts, **settings)


def settle(running: Running) -> None:
    """Wait until all that is deployed was tried, and load it."""
    deployed = names(running)
    until(lambda: all(ask(running, "model", name=name)["tried"] for name in deployed))
    for name in deployed:
        ask(running, "load", name=name)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", ["plain", "packed", "blocked"])
def test_siblings_share_a_trunk_in_one_domain_and_none_in_two(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is faster on this machine at this moment.
    prefer(monkeypatch, form)
    run_apart(monkeypatch)
    original = network("resnet")
    siblings = [original.tuned(f"sibling-{number}", number) for number in range(2)]
    inputs = original.inputs(1)
    with real(tmp_path, of(*siblings), stacking=False) as running:
        settle(running)
        shown = ask(running, "model", name="sibling-0@a")
        count = shown["stage_count"]
        assert bool(shown["packed_stage_count"]) is (form != "plain")
        assert shown["shared_with"] == ["sibling-1@a"]
        weights = {name: set(deployed.weights) for name, deployed in running.engine._catalog.deployed.items()}
        assert weights["sibling-0@a"] & weights["sibling-1@a"]
        assert not (weights["sibling-0@a"] | weights["sibling-1@a"]) & (weights["sibling-0@b"] | weights["sibling-1@b"])
        memory = ask(running, "memory")
        assert memory["weight_bytes"] == memory["resident_bytes"]
        for name in ("sibling-0@a", "sibling-1@a"):
            ask(running, "evict", name=name)
        assert ask(running, "memory")["resident_bytes"] * 2 == memory["resident_bytes"]
        ask(running, "load", name="sibling-0@a")
        ask(running, "load", name="sibling-1@a")
        programs = ask(running, "status")["sharing"]["programs"]
        for names_, wanted in (
            # In one domain, a trunk and two heads, for one input as for two.
            (("sibling-0@a", "sibling-1@a"), count + 1),
            # In two, nothing of the one is computed for the other, not even of the same model on the same input.
            (("sibling-0@a", "sibling-0@b"), 2 * count),
            (("sibling-0@a", "sibling-1@b"), 2 * count),
        ):
            for others in (inputs, original.inputs(1, 7)):
                with counted(running) as counts:
                    given = called_at_once(running, (names_[0], inputs), (names_[1], others))
                assert counts["stages"] == wanted
                assert (counts["stage_requests"] == counts["stages"]) is (wanted == 2 * count)
                for name, array, answered in zip(names_, (inputs, others), given, strict=True):
                    sibling = siblings[int(name.split("@")[0][-1])]
                    assert agrees(answered, sibling.eager(array), exact=False)
        assert ask(running, "status")["sharing"]["programs"] == programs
        # One program for each structure: two domains need no more than one.
        assert programs <= count


@pytest.mark.usefixtures("small_blocks")
def test_a_model_is_tried_once_for_all_domains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []
    real_try = Trials._try

    def trying(self: Trials, bundle: Bundle, *rest: Any) -> Any:
        tried.append(bundle.name)
        return real_try(self, bundle, *rest)

    monkeypatch.setattr(Trials, "_try", trying)
    made = network("mlp")
    with real(tmp_path, of(made)) as running:
        settle(running)
        change(running, quotas(a="*", b="*", c="*"))
        settle(running)
        inputs = made.inputs(1)
        for domain in "abc":
            assert agrees(called(running, f"{made.name}@{domain}", inputs), made.eager(inputs), exact=False)
            assert ask(running, "model", name=f"{made.name}@{domain}")["batched"]
        assert tried == [f"{made.name}@a"]


@pytest.mark.usefixtures("small_blocks")
def test_each_domain_finds_its_weights_again_after_a_restart(node: Node) -> None:
    made = network("resnet")
    inputs, domains = made.inputs(1), ("a", "b")
    made.put(node.source)

    def keys(running: Running) -> dict[str, set[str]]:
        return {name: set(deployed.weights) for name, deployed in running.engine._catalog.deployed.items()}

    def on_disk(running: Running) -> bool:
        files = running.engine._memory._files  # type: ignore[attr-defined]
        return all(files.find(key) for weights in keys(running).values() for key in weights)

    with node.serve(quotas=BOTH) as running:
        settle(running)
        until(lambda: on_disk(running))
        before = keys(running)
        resident_bytes = ask(running, "memory")["resident_bytes"]
        client._pool.close()
    node.source.blobs.clear()
    with node.serve(quotas=BOTH) as running:
        # With the first command, all that is awaited is deployed.
        ask(running, "models")
        assert keys(running) == before
        assert ask(running, "memory")["resident_bytes"] == resident_bytes
        for domain in domains:
            given = called(running, f"{made.name}@{domain}", inputs)
            assert agrees(given, made.eager(inputs), exact=False)
        found = moved(running)
        assert (found["store_bytes"], found["block_file_bytes"]) == (0, 0)
        assert found["kept_bytes"] > 0
        # Evicted in one, it comes back by what that one has, and the other's stays.
        ask(running, "evict", name=f"{made.name}@a")
        assert ask(running, "memory")["resident_bytes"] * 2 == resident_bytes
        assert agrees(called(running, f"{made.name}@a", inputs), made.eager(inputs), exact=False)
        assert moved(running)["store_bytes"] == 0
        client._pool.close()
    # A domain that is gone leaves nothing behind.
    with node.serve(quotas=quotas(b="*")) as running:
        ask(running, "models")
        assert keys(running) == {name: weights for name, weights in before.items() if name.endswith("@b")}
        assert ask(running, "memory")["resident_bytes"] * 2 == resident_bytes
        assert called(running, f"{made.name}@b", inputs)
        with pytest.raises(UnknownModel):
            called(running, f"{made.name}@a", inputs)
