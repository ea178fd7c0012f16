"""Weights in the host tier and in block files: right answers whatever lies where, and nothing beyond the budget."""

from __future__ import annotations

import hashlib
import math
import os
import random
import threading
import zlib
from dataclasses import replace

import pytest
import torch
from trunkline import client, model, models
from trunkline.errors import DeviceFault, SidecarFault

from sidecar.blockfiles import BlockFiles, Entry
from sidecar.bundle import Bundle
from sidecar.devicememory import DeviceMemory
from sidecar.devices import open_device
from sidecar.disk import DIRECT, Calibration
from sidecar.errors import NoRoom
from sidecar.ir import Graph, Weight
from sidecar.memories import memory_of
from sidecar.memory import Wanted
from sidecar.mover import Mover, _Fetch
from sidecar.stages import Staged
from sidecar.tiermemory import TierMemory
from sidecar.trials import Trials, Verdict
from sidecar.verdicts import Verdicts
from tests.fakes import Running
from tests.forms import prefer
from tests.integration.test_sharing import ask, deploy
from tests.networks import Network, agrees, network
from tests.nodes import Node, check, moved, until_on_disk, weight_bytes
from tests.waiting import PATIENCE_S, until

KINDS = ("resnet", "mobilenet", "vit", "minilm", "mlp", "unet")


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_answers_from_the_store_from_block_files_and_from_what_was_kept(kind: str, node: Node) -> None:
    made = network(kind)
    with node.serve() as running:
        deploy(running, made)
        check(made, 0)
        until_on_disk(node, running, made.name)
        ask(running, "evict", name=made.name)
        assert ask(running, "memory")["resident_bytes"] == 0
        # Freed by the mover, a moment later.
        until(lambda: ask(running, "memory")["weight_bytes"] == 0)
        before = moved(running)
        check(made, 1)
        after = moved(running)
        assert after["store_bytes"] == before["store_bytes"]
        resident_bytes = ask(running, "memory")["resident_bytes"]
        assert 0 < after["block_file_bytes"] - before["block_file_bytes"] <= resident_bytes
        assert ask(running, "memory")["weight_bytes"] == resident_bytes
        client._pool.close()
    node.source.blobs.clear()
    with node.serve() as running:
        assert ask(running, "memory")["resident_bytes"] == resident_bytes
        check(made, 2)
        found = moved(running)
        assert found["store_bytes"] == found["block_file_bytes"] == 0
        assert 0 < found["kept_bytes"] <= resident_bytes


def test_a_model_that_is_removed_during_its_trial_leaves_nothing_on_disk(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made, other = network("mlp"), network("resnet")
    is_trying, may_end = threading.Event(), threading.Event()
    verdict_of = Trials._verdict

    def slow(self: Trials, bundle: Bundle, staged: Staged) -> Verdict:
        is_trying.set()
        assert may_end.wait(PATIENCE_S)
        return verdict_of(self, bundle, staged)

    monkeypatch.setattr(Trials, "_verdict", slow)
    with node.serve() as running:
        made.put(running.source)
        ask(running, "model_changed", name=made.name)
        assert is_trying.wait(PATIENCE_S)
        del running.source.bundles[made.name]
        ask(running, "model_removed", name=made.name)
        may_end.set()
        # Tried after it, as all are in turn.
        deploy(running, other)
        until_on_disk(node, running, other.name)
        running.engine._memory._files.discard(running.engine._catalog.deployed[other.name].weights)  # type: ignore[attr-defined]
        assert ask(running, "memory")["block_files_taken_bytes"] == 0
        client._pool.close()


def test_an_eviction_is_taken_back_while_nothing_was_written_over_it(node: Node) -> None:
    made = network("resnet")
    with node.serve() as running:
        deploy(running, made)
        until_on_disk(node, running, made.name)
        check(made, 0)
        before, engine = moved(running), running.engine
        resident_bytes = ask(running, "memory")["resident_bytes"]
        engine._post(lambda: engine._drop(engine._residency.evict(engine._catalog.deployed[made.name].plan, "ttl")))
        check(made, 1)
        after = moved(running)
        assert after["block_file_bytes"] == before["block_file_bytes"]
        assert after["store_bytes"] == before["store_bytes"]
        assert resident_bytes >= after["kept_bytes"] - before["kept_bytes"] > 0
        assert ask(running, "memory")["residency"]["evictions"]["ttl"] > 0


def test_what_was_altered_in_memory_is_read_again(node: Node) -> None:
    made = network("resnet")
    with node.serve() as running:
        deploy(running, made)
        check(made, 0)
        until_on_disk(node, running, made.name)
        client._pool.close()
    memory = node.memory()
    key = max(memory._tier.keys(), key=memory._tier.keys().__getitem__)
    memory._tier.view(key)[0] ^= 1
    with node.serve(memory) as running:
        check(made, 1)
        assert moved(running)["block_file_bytes"] == memory._tier.keys()[key]
        assert moved(running)["store_bytes"] == 0


def test_what_was_altered_on_disk_is_made_anew_from_the_store(node: Node) -> None:
    made = network("resnet")
    with node.serve() as running:
        deploy(running, made)
        until_on_disk(node, running, made.name)
        ask(running, "evict", name=made.name)
        for path in (node.folder / "blocks").glob("*.block"):
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                # The padding counts, too.
                file.write(b"\xff")
        before = moved(running)
        check(made, 1)
        assert moved(running)["store_bytes"] > before["store_bytes"]


def test_a_kept_packed_weight_without_its_block_file_is_made_anew(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    with node.serve() as running:
        deploy(running, made)
        check(made, 0)
        until_on_disk(node, running, made.name)
        is_packed = ask(running, "model", name=made.name)["packed_stage_count"]
        client._pool.close()
    for path in (node.folder / "blocks").glob("*.block"):
        path.unlink()
    # Nor is it written anew before it is asked for.
    monkeypatch.setattr(TierMemory, "keep", lambda *arguments: None)
    with node.serve() as running:
        check(made, 1)
        assert (moved(running)["store_bytes"] > 0) == bool(is_packed)


def kept_packed(node: Node, monkeypatch: pytest.MonkeyPatch) -> Network:
    """Leave a model with packed weights in memory and in block files, and no engine; return it."""
    made = network("resnet")
    prefer(monkeypatch, "packed")
    with node.serve() as running:
        deploy(running, made)
        until_on_disk(node, running, made.name)
        check(made, 0)
        client._pool.close()
    return made


def test_layouts_of_another_torch_are_not_believed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kept_packed(node, monkeypatch)
    # The file is believed to be this torch's; what it says is not.
    monkeypatch.setattr("sidecar.flat._fingerprint", lambda: b"another.")
    with node.serve() as running:
        check(made, 1)
        assert moved(running)["store_bytes"] > 0
        assert moved(running)["kept_bytes"] < ask(running, "memory")["resident_bytes"]


@pytest.mark.parametrize("source", ["buffered", "direct"])
def test_weights_are_expected_as_fast_as_the_disk_was_found_to_be(source: str, node: Node) -> None:
    figures = {"buffered": 2e9, "direct": 3e9}
    Verdicts(node.folder / "verdicts", "test").end("disk", "reading.2", {"source": source, "bytes_per_s": figures})
    memory = node.memory()
    with node.serve(memory) as running:
        until(lambda: running.engine._mover.pace == figures[source])
    assert memory._files.source.name == source


def test_a_choice_by_an_earlier_rule_is_made_anew(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = Verdicts(node.folder / "verdicts", "test")
    verdicts.end("disk", "reading", {"source": "buffered", "bytes_per_s": {"buffered": 2e9, "direct": 1e9}})
    monkeypatch.setattr("sidecar.blockfiles.calibrate", lambda folder, is_strict: Calibration(DIRECT, {"direct": 1e9}))
    memory = node.memory()
    assert memory.calibrate(verdicts) == 1e9
    assert memory._files.source is DIRECT
    # It is remembered.
    monkeypatch.undo()
    assert node.memory().calibrate(verdicts) == 1e9


@pytest.mark.parametrize("figures", [None, 3e9, {}, {"buffered": 3e9}, {"direct": "3e9"}, {"direct": 0.0}, {"direct": math.inf}])
def test_a_disk_without_figures_is_not_told_to_be_of_any_speed(figures: object, node: Node) -> None:
    verdicts = Verdicts(node.folder / "verdicts", "test")
    verdicts.end("disk", "reading.2", {"source": "direct", "bytes_per_s": figures})
    assert node.memory().calibrate(verdicts) is None


def test_a_weight_without_bytes_is_brought_in_from_either_place(node: Node) -> None:
    empty = Weight(hashlib.sha256(b"").hexdigest(), "float32", (0, 3), 0, zlib.crc32(b""))
    node.source.blobs[empty.digest] = b""
    memory = node.memory()
    for _ in ("store", "block file"):
        batch = memory.begin([Wanted(empty, None)])
        memory.read(batch)
        (handle,) = memory.end(batch)
        assert isinstance(handle, torch.Tensor)
        assert handle.shape == (0, 3)
        memory.free([empty.digest])
        memory.keep(Graph((), (), (), (empty,), (), ()), {})
    assert node.source.read_count == 2


def a_weight(node: Node) -> list[Wanted]:
    content = random.Random(0).randbytes(5000)
    weight = Weight(hashlib.sha256(content).hexdigest(), "uint8", (5000,), 5000, zlib.crc32(content))
    node.source.blobs[weight.digest] = content
    return [Wanted(weight, None)]


def test_a_batch_that_broke_does_not_keep_its_weights_from_being_brought_in(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, wanted, arrived = node.memory(), a_weight(node), list[object]()
    mover = Mover(memory, lambda command: command())
    for broken in (True, False):
        with monkeypatch.context() as patched:
            if broken:
                # Of arguments that are none.
                patched.setattr(memory._files, "read", None)
            fetch = _Fetch(wanted, lambda pairs, *when: arrived.extend(outcome for _, outcome in pairs))
            mover._begin(fetch)
            mover._read(fetch)
            mover._end(fetch)
    assert isinstance(arrived[0], SidecarFault)
    assert isinstance(arrived[1], torch.Tensor)
    memory._tier.check_invariants()


def test_a_batch_knows_what_was_there_already(node: Node) -> None:
    memory, wanted = node.memory(), a_weight(node)
    for kept_bytes in (0, 5000):
        batch = memory.begin(wanted)
        memory.read(batch)
        memory.end(batch)
        assert batch.kept_bytes == memory.facts()["kept_bytes"] == kept_bytes
        del batch
        memory.free([wanted[0].weight.digest])


def test_what_no_model_needs_any_more_goes_from_memory_and_disk(node: Node) -> None:
    made, other = network("mlp"), network("vit")
    with node.serve() as running:
        deploy(running, made, other)
        for each in (made, other):
            check(each, 0)
            until_on_disk(node, running, each.name)
        client._pool.close()
    del node.source.bundles[other.name]
    memory = node.memory()
    with node.serve(memory) as running:
        resident_bytes = ask(running, "memory")["resident_bytes"]
        until(lambda: ask(running, "memory")["weight_bytes"] == resident_bytes)
        check(made, 1)
        del node.source.bundles[made.name]
        ask(running, "model_removed", name=made.name)
        until(lambda: not memory._tier.keys())
        files: BlockFiles = memory._files
        until(lambda: not any(files.find(weight.digest) for weight in made.bundle.graph.weights))


def test_six_models_in_room_for_two(node: Node) -> None:
    networks = [network(kind) for kind in KINDS]
    sizes = []
    with node.serve() as running:
        for each in networks:
            deploy(running, each)
            until_on_disk(node, running, each.name)
            sizes.append(sum(weight_bytes(running, each.name)))
        client._pool.close()
    node.resize(max(max(sizes), sum(sizes) // 3))
    memory = node.memory()
    chosen = random.Random(0)
    with node.serve(memory) as running:
        for number in range(120):
            check(chosen.choice(networks), number % 3)
            assert memory._tier.resident_bytes <= node.budget_bytes
        assert ask(running, "memory")["residency"]["evictions"]["room"] > 0
        assert moved(running)["store_bytes"] == 0
    memory._tier.check_invariants()


def test_memory_that_is_refused_fails_one_request_and_not_the_next(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("mlp")
    with node.serve() as running:
        deploy(running, made)
        ask(running, "evict", name=made.name)
        with monkeypatch.context() as patched:

            def refuse(*arguments: object) -> None:
                raise NoRoom("4096 bytes are missing", needed_bytes=4096)

            patched.setattr("sidecar.hosttier.HostTier.allocate", refuse)
            with pytest.raises(DeviceFault, match="bytes"):
                model(made.name).call(made.inputs(1, 0))
        check(made, 1)


def test_what_has_no_room_in_block_files_is_read_from_the_store(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    made = network("resnet")
    device = open_device("cpu")
    limited = memory_of(device, node.source, node.segment.descriptor, node.folder / "blocks", block_files_limit_bytes=8192)
    assert isinstance(limited, TierMemory)
    with node.serve(limited) as running:
        deploy(running, made)
        check(made, 0)
        until(lambda: ask(running, "memory")["block_files_left_out_bytes"] > 0)
        found = ask(running, "memory")
        assert found["block_files_taken_bytes"] <= found["block_files_limit_bytes"] == 8192
        ask(running, "evict", name=made.name)
        before = moved(running)
        check(made, 1)
        assert moved(running)["store_bytes"] > before["store_bytes"]
    assert sum("left out of the block files" in record.message for record in caplog.records) == 1


def test_a_device_that_does_not_work_in_place_has_memory_of_its_own(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.flat.can_flatten", lambda: False)
    made = memory_of(open_device("cpu"), node.source, node.segment.descriptor, node.folder / "blocks")
    assert isinstance(made, DeviceMemory)


def test_kept_bytes_of_another_layout_are_not_believed(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = kept_packed(node, monkeypatch)
    memory = node.memory()
    find = memory._files.find
    packed = next(key for key in memory._tier.keys() if len(find(key).meta) > 4)  # type: ignore[union-attr]  # noqa: SIM118

    def written_since(key: str) -> Entry | None:
        # As when the processor has changed: the block file is new, what is in memory is not.
        entry = find(key)
        return replace(entry, meta=b"new!" + entry.meta[4:]) if entry is not None and key == packed else entry

    monkeypatch.setattr(memory._files, "find", written_since)
    whole = sum(memory._tier.keys().values())
    with node.serve(memory) as running:
        check(made, 1)
        assert moved(running)["kept_bytes"] <= whole - memory._tier.keys()[packed]
        assert moved(running)["block_file_bytes"] == memory._tier.keys()[packed]


def test_a_head_that_is_still_read_is_not_stacked_with_one_that_is_there(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    one = network("resnet")
    two = one.tuned("twin", 5)
    with node.serve() as running:
        deploy(running, one, two)
        for each in (one, two):
            until_on_disk(node, running, each.name)
        before = ask(running, "status")["sharing"]["stacked"]
        for seed in range(4):
            models(one.name, two.name).call(one.inputs(1, seed))
        assert ask(running, "status")["sharing"]["stacked"] > before
        ask(running, "evict", name=two.name)
        inputs = one.inputs(1, 9)
        found = models(one.name, two.name).call(inputs)
        for each in (one, two):
            assert agrees(found[each.name], each.eager(inputs), exact=False)


def test_packed_weights_of_another_size_than_was_noted_are_refused_with_both(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    prefer(monkeypatch, "packed")
    packed_bytes = open_device("cpu").packed_bytes
    monkeypatch.setattr("sidecar.devices.TorchDevice.packed_bytes", lambda self, recipe: packed_bytes(recipe) + 64)
    with node.serve() as running:
        deploy_unloaded(running, made)
        with pytest.raises(DeviceFault, match=r"takes \d+ bytes instead of \d+"):
            model(made.name).call(made.inputs(1, 0))


def deploy_unloaded(running: Running, made: Network) -> None:
    made.put(running.source)
    ask(running, "model_changed", name=made.name)
    until(lambda: bool(ask(running, "model", name=made.name)["tried"]))


def test_block_files_are_read_through_by_and_by(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("mlp")
    monkeypatch.setattr("sidecar.upkeep._SCRUB_EVERY_S", 0.01)
    with node.serve() as running:
        deploy(running, made)
        until_on_disk(node, running, made.name)
        ask(running, "evict", name=made.name)
        monkeypatch.setattr(TierMemory, "keep", lambda *arguments: None)
        for path in (node.folder / "blocks").glob("*.block"):
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\xff")
        files: BlockFiles = running.engine._memory._files  # type: ignore[attr-defined]
        wanted = running.engine._catalog.deployed[made.name].weights
        # Found without anybody asking for it.
        until(lambda: not all(files.find(digest) for digest in wanted))
        check(made, 0)


def test_an_idle_engine_looks_through_its_books(
    node: Node, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("sidecar.engine._IDLE_S", 0.01)
    monkeypatch.setattr("sidecar.engine._AUDIT_EVERY_S", 0.0)
    made, memory, audits = network("mlp"), node.memory(), []
    monkeypatch.setattr(memory, "audit", lambda: (TierMemory.audit(memory), audits.append(None)))
    with node.serve(memory) as running:
        deploy(running, made)
        check(made, 0)
        engine = running.engine

        def spoil(by: int) -> None:
            def spoil_engine() -> None:
                engine._residency.committed_bytes += by

            def spoil_tier() -> None:
                memory._tier.allocated_bytes += by

            engine._post(spoil_engine)
            engine._mover._tell(spoil_tier)

        until(lambda: len(audits) > 0)
        assert "do not" not in caplog.text
        spoil(1)
        until(lambda: "the books of what is in memory do not balance: committed_bytes disagrees" in caplog.text)
        until(lambda: "and their ledger do not agree: allocated_bytes disagrees" in caplog.text)
        spoil(-1)
        # It goes on, as well as it can.
        check(made, 1)


def test_the_books_are_looked_through_once_in_a_while_at_most(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine._IDLE_S", 0.0)
    made, audits, trims = network("mlp"), [], []
    memory = node.memory()
    monkeypatch.setattr(memory, "audit", lambda: audits.append(None))
    monkeypatch.setattr(memory, "trim", lambda: trims.append(None))
    with node.serve(memory) as running:
        deploy(running, made)
        for number in range(3):
            count = len(trims)
            check(made, number)
            until(lambda count=count: len(trims) > count)  # type: ignore[misc]
    assert len(trims) >= 3
    assert len(audits) == 1
