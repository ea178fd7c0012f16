"""Weights on a device that copies them, with the host tier below: right answers, two budgets, and the disk left alone."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from trunkline import client, model
from trunkline.arena import page_aligned
from trunkline.errors import DeviceFault, ModelCorrupt, SidecarFault

from sidecar.devices import open_device
from sidecar.devicetier import ALIGN_BYTES, DeviceTier, aligned
from sidecar.errors import ConfigError, NoRoom
from sidecar.hosttier import HostTier
from sidecar.ir import Graph, Weight
from sidecar.memories import budget_of, memory_of
from sidecar.memory import Scattered, Wanted
from sidecar.mover import Mover, _Fetch
from sidecar.residency import Residency
from sidecar.swapmemory import SwapMemory
from tests.copying import CopyingDevice, CopyingNode, until_on_disk
from tests.fakes import Running
from tests.integration.test_sharing import ask, deploy
from tests.networks import network
from tests.nodes import check
from tests.waiting import PATIENCE_S, until

KINDS = ("resnet", "mobilenet", "vit", "minilm", "mlp", "unet")
MB = 1 << 20


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CopyingNode]:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    made = CopyingNode(tmp_path, 8 * MB, 8 * MB)
    yield made
    client._pool.close()
    made.close()


def moved(running: Running) -> dict[str, int]:
    memory = ask(running, "memory")
    return {name: memory[name] for name in ("kept_bytes", "host_kept_bytes", "block_file_bytes", "store_bytes")}


def since(running: Running, before: dict[str, int]) -> dict[str, int]:
    return {name: size_bytes - before[name] for name, size_bytes in moved(running).items() if size_bytes != before[name]}


def device_bytes(running: Running, name: str) -> int:
    """Return what a model takes of the device."""
    return sum(aligned(weight.size_bytes) for weight in running.engine._catalog.deployed[name].weights.values())


def overwrite(running: Running) -> None:
    """Have nothing of what was let go of on the device be there any more."""
    engine, done = running.engine, threading.Event()

    def forget() -> None:
        tier: Any = engine._memory._tier  # type: ignore[attr-defined]
        for hole in tier._extents.holes:
            tier._remains.overwrite(hole)
        done.set()

    engine._mover._tell(forget)
    assert done.wait(PATIENCE_S)


# --- whole models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_answers_wherever_its_weights_are(kind: str, node: CopyingNode) -> None:
    made = network(kind)
    with node.serve() as running:
        deploy(running, made)
        check(made, 0)
        until(until_on_disk(running, made.name))
        resident_bytes = ask(running, "memory")["resident_bytes"]
        assert ask(running, "memory")["span_bytes"] == node.budget_bytes
        # Evicted, and asked for again before anything was written over it.
        before = moved(running)
        ask(running, "evict", name=made.name)
        until(lambda: ask(running, "memory")["weight_bytes"] == 0)
        check(made, 1)
        kept = since(running, before)
        assert kept.keys() == {"kept_bytes"}
        assert 0 < kept["kept_bytes"] <= resident_bytes == ask(running, "memory")["weight_bytes"]
        # From the host tier.
        before = moved(running)
        ask(running, "evict", name=made.name)
        overwrite(running)
        check(made, 2)
        assert since(running, before) == {"host_kept_bytes": kept["kept_bytes"]}
        client._pool.close()
    # The device is another's; the host tier outlives the engine. Neither store nor block files are touched.
    node.source.blobs.clear()
    for path in (node.folder / "blocks").glob("*.block"):
        path.unlink()
    with node.serve() as running:
        assert ask(running, "memory")["resident_bytes"] == 0
        check(made, 3)
        assert moved(running) == {
            "kept_bytes": 0,
            "host_kept_bytes": kept["kept_bytes"],
            "block_file_bytes": 0,
            "store_bytes": 0,
        }
        client._pool.close()


def test_what_is_on_disk_is_read_from_block_files_and_only_once(node: CopyingNode) -> None:
    made = network("resnet")
    with node.serve() as running:
        deploy(running, made)
        until(until_on_disk(running, made.name))
        client._pool.close()
    node.resize(8 * MB, 8 * MB)
    with node.serve() as running:
        check(made, 0)
        found = moved(running)
        assert found["block_file_bytes"] > 0
        assert found["store_bytes"] == found["host_kept_bytes"] == 0


def test_six_models_with_room_for_two_on_the_device_and_three_below(node: CopyingNode, monkeypatch: pytest.MonkeyPatch) -> None:
    networks = [network(kind) for kind in KINDS]
    with node.serve() as running:
        for each in networks:
            deploy(running, each)
            until(until_on_disk(running, each.name))
        weights = [running.engine._catalog.deployed[each.name].weights.values() for each in networks]
        sizes = [device_bytes(running, each.name) for each in networks]
        client._pool.close()
    largest = max(page_aligned(weight.size_bytes) for each in weights for weight in each)
    host_bytes = max(2 * largest, sum(sizes) // 2)
    node.resize(max(max(sizes), sum(sizes) // 3), host_bytes)
    memory, most, draw = node.memory(), Most(monkeypatch), random.Random(0)
    with node.serve(memory) as running:
        for number in range(120):
            check(draw.choice(networks), number % 3)
        found = ask(running, "memory")
        assert found["residency"]["evictions"]["room"] > 0
        assert found["store_bytes"] == 0
        assert min(found["kept_bytes"], found["host_kept_bytes"], found["block_file_bytes"]) > 0
        assert found["host_budget_bytes"] == host_bytes
    memory.check_invariants()
    assert 0 < most.device_bytes <= node.budget_bytes
    assert 0 < most.host_bytes <= host_bytes


class Most:
    """What both tiers held at most, as they count it, and of the host's as the system does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.device_bytes = self.host_bytes = 0
        on_device, below = DeviceTier.allocate, HostTier.allocate

        def allocate(tier: DeviceTier, weight: Weight) -> bool:
            is_placed = on_device(tier, weight)
            self.device_bytes = max(self.device_bytes, tier.allocated_bytes)
            return is_placed

        def allocate_below(tier: HostTier, key: str, size_bytes: int) -> memoryview:
            room = below(tier, key, size_bytes)
            self.host_bytes = max(self.host_bytes, tier.resident_bytes, tier.allocated_bytes)
            return room

        monkeypatch.setattr(DeviceTier, "allocate", allocate)
        monkeypatch.setattr(HostTier, "allocate", allocate_below)


# --- weights, one by one ----------------------------------------------------------------------------------------------


def weights_of(node: CopyingNode, *sizes: int, seed: int = 0) -> list[Wanted]:
    """Put weights of random bytes into the store."""
    found = []
    for number, size_bytes in enumerate(sizes):
        content = random.Random(1000 * seed + number).randbytes(size_bytes)
        weight = Weight(sha256(content).hexdigest(), "uint8", (size_bytes,), size_bytes, zlib.crc32(content))
        node.source.blobs[weight.digest] = content
        found.append(Wanted(weight, None))
    return found


def bring(memory: SwapMemory, wanted: Sequence[Wanted]) -> list[Any]:
    batch = memory.begin(wanted)
    memory.read(batch)
    return memory.end(batch)


def bytes_of(node: CopyingNode, handle: Any) -> bytes:
    tensor = handle.use()
    node.device.settle()
    return bytes(tensor.tolist())


def check_all(node: CopyingNode, wanted: Sequence[Wanted], handles: Sequence[Any]) -> None:
    for each, handle in zip(wanted, handles, strict=True):
        assert bytes_of(node, handle) == node.source.blobs[each.weight.digest]


def keys(wanted: Sequence[Wanted]) -> list[str]:
    return [each.weight.digest for each in wanted]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[CopyingNode]:
    """A node with room for sixteen pages on the device, and for eight below."""
    made = CopyingNode(tmp_path, 16 * 4096, 8 * 4096)
    yield made
    made.close()


def test_the_host_tier_keeps_what_was_used_last(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, *[4096] * 10)
    for each in wanted[:8]:
        bring(memory, [each])
    # The first leaves the device, which is a use of it below.
    memory.free(keys(wanted[:1]))
    for each in wanted[8:]:
        bring(memory, [each])
    assert memory._host._tier.keys().keys() == {*keys(wanted[:1]), *keys(wanted[3:])}
    assert memory.facts()["host_weight_bytes"] == 8 * 4096
    memory.check_invariants()
    reads = small.source.read_count
    memory._tier._remains.overwrite(memory._tier._extents.holes[0])
    memory.free(keys(wanted[3:5]))
    check_all(small, wanted[:1], bring(memory, wanted[:1]))
    assert small.source.read_count == reads


def test_a_batch_larger_than_the_host_tier_comes_weight_by_weight(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, *[4096] * 10, 4 * 4096)
    check_all(small, wanted, bring(memory, wanted))
    assert memory._host._tier.resident_bytes <= 8 * 4096
    memory.check_invariants()


def test_batches_under_way_leave_room_below_for_one_weight(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 3 * 4096, 4 * 4096, 2 * 4096, 1)
    # All of them begun before the first is ended.
    batches = [memory.begin([each]) for each in wanted]
    assert [len(batch.late) for batch in batches] == [0, 1, 1, 0]  # type: ignore[attr-defined]
    for batch in batches:
        memory.read(batch)
    for each, batch in reversed([*zip(wanted, batches, strict=True)]):
        check_all(small, [each], memory.end(batch))
    memory.check_invariants()


@pytest.mark.parametrize("late", [False, True])
def test_a_host_that_has_no_memory_left_fails_what_is_wanted_and_nothing_else(
    late: bool, small: CopyingNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = small.memory()
    (there, *wanted) = weights_of(small, 4096, *[4096] * (6 if late else 2))
    (handle,) = bring(memory, [there])
    with monkeypatch.context() as patched:

        def refuse(*arguments: object) -> None:
            raise NoRoom("the system has no 4096 bytes of shared memory left", needed_bytes=4096)

        patched.setattr(HostTier, "allocate", refuse)
        outcomes = bring(memory, wanted)
    assert all(isinstance(error, DeviceFault) and "no 4096 bytes" in error.message for error in outcomes)
    # What was cached has left for their sake, in vain.
    assert memory.facts()["host_weight_bytes"] == 0
    assert memory.facts()["weight_bytes"] == 4096
    check_all(small, [there], [handle])
    check_all(small, wanted, bring(memory, wanted))
    memory.check_invariants()


def test_what_is_not_there_can_be_let_go_of(small: CopyingNode) -> None:
    memory = small.memory()
    memory.free(["0" * 64])
    # Nobody need wait for that.
    assert small.device.arrivals._given_count == 0


def test_a_weight_that_cannot_pass_is_refused_with_the_numbers(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096, 4 * 4096 + 1, 4096)
    first, error, last = bring(memory, wanted)
    assert isinstance(error, DeviceFault)
    assert "takes 16385 bytes, and at most 16384 pass through the host tier" in error.message
    assert "--host-budget" in error.message
    check_all(small, [wanted[0], wanted[2]], [first, last])
    assert not memory._tier.holds(wanted[1].weight.digest)
    memory.check_invariants()


@pytest.mark.parametrize("late", [False, True])
def test_a_copy_that_fails_gives_its_room_back(late: bool, small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, *[4096] * (6 if late else 3))
    for each in wanted:
        batch = memory.begin([each])
        memory.read(batch)
        small.device.arrivals.error = RuntimeError("CUDA error: unspecified launch failure")
        (error,) = memory.end(batch)
        assert isinstance(error, DeviceFault)
        assert error.__cause__ is error.__context__ is error.__traceback__ is None
        assert memory.facts()["weight_bytes"] == 0
    memory.check_invariants()
    # Below they are: the disk had nothing to do with it.
    reads = small.source.read_count
    handles = bring(memory, wanted)
    check_all(small, wanted, handles)
    assert small.source.read_count == reads


def test_what_cannot_be_read_fails_alone_and_leaves_nothing(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096, 5000, 4096)
    content = small.source.blobs.pop(wanted[1].weight.digest)
    first, error, last = bring(memory, wanted)
    assert isinstance(error, ModelCorrupt)
    check_all(small, [wanted[0], wanted[2]], [first, last])
    assert memory.facts()["weight_bytes"] == 2 * 4096
    assert memory.facts()["host_weight_bytes"] == 2 * 4096
    small.source.blobs[wanted[1].weight.digest] = content
    check_all(small, wanted[1:2], bring(memory, wanted[1:2]))
    memory.check_invariants()


def test_a_batch_that_broke_gives_all_of_its_room_back(small: CopyingNode, monkeypatch: pytest.MonkeyPatch) -> None:
    memory, wanted, arrived = small.memory(), weights_of(small, 4096, 4096), list[object]()
    mover = Mover(memory, lambda command: command())
    for broken in (True, False):
        with monkeypatch.context() as patched:
            if broken:
                patched.setattr(memory._host._files, "read", None)
            fetch = _Fetch(wanted, lambda pairs, *when: arrived.extend(outcome for _, outcome in pairs))
            mover._begin(fetch)
            mover._read(fetch)
            mover._end(fetch)
    assert all(isinstance(outcome, SidecarFault) for outcome in arrived[:2])
    check_all(small, wanted, arrived[2:])
    memory.check_invariants()


def test_what_was_altered_below_is_read_again(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096, 4096)
    bring(memory, wanted)
    memory = small.memory()
    memory._host._tier.view(wanted[0].weight.digest)[7] ^= 1
    check_all(small, wanted, bring(memory, wanted))
    assert memory.facts()["host_kept_bytes"] == memory.facts()["store_bytes"] == 4096
    memory.check_invariants()


def test_what_no_model_has_any_more_leaves_the_host_tier(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096, 4096, 4096)
    handles = bring(memory, wanted[:2])
    memory.forget(keys(wanted[:2]))
    # Wanted again, before anybody looked: it is on its way.
    memory.free(keys(wanted[:1]))
    batch = memory.begin(wanted[2:])
    assert not memory._host._tier.keys()
    memory.read(batch)
    check_all(small, wanted[1:], [handles[1], *memory.end(batch)])
    memory.check_invariants()


def test_what_is_on_its_way_is_not_taken_for_unwanted(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096, 4096)
    batch = memory.begin(wanted[:1])
    memory.forget(keys(wanted[:1]))
    bring(memory, wanted[1:])
    memory.read(batch)
    check_all(small, wanted[:1], memory.end(batch))
    memory.check_invariants()


def test_more_than_the_device_has_is_refused_and_not_more(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, *[4096] * 17)
    handles = bring(memory, wanted)
    assert isinstance(handles[16], DeviceFault)
    assert "65536 of the budget of 65536 bytes are taken" in handles[16].message
    check_all(small, wanted[:16], handles[:16])


def test_a_weight_without_bytes_has_a_place(small: CopyingNode) -> None:
    empty = Weight(sha256(b"").hexdigest(), "float32", (0, 3), 0, zlib.crc32(b""))
    small.source.blobs[empty.digest] = b""
    memory = small.memory()
    (handle,) = bring(memory, [Wanted(empty, None)])
    assert handle.use().shape == (0, 3)
    assert memory.size_bytes(empty) == ALIGN_BYTES == memory.facts()["weight_bytes"]


def test_idle_memory_below_goes_back_and_what_is_cached_stays(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096, 4096)
    bring(memory, wanted)
    memory._host.free(keys(wanted[:1]))
    assert memory.facts()["host_spare_bytes"] == 4096
    memory.trim()
    assert memory.facts()["host_spare_bytes"] == 0
    assert memory.facts()["host_weight_bytes"] == 4096


def test_books_that_do_not_balance_are_told(small: CopyingNode, caplog: pytest.LogCaptureFixture) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096)
    bring(memory, wanted)
    memory.audit()
    assert "do not balance" not in caplog.text
    memory._host._uses.clear()
    memory.audit()
    assert "do not balance: a weight could never leave" in caplog.text
    memory._tier.allocated_bytes += 1
    memory.audit()
    assert "allocated_bytes disagrees with the ranges" in caplog.text


def test_block_files_are_written_and_read_through(small: CopyingNode) -> None:
    memory = small.memory()
    wanted = weights_of(small, 4096, 9)
    memory.keep(Graph((), (), (), tuple(each.weight for each in wanted), (), ()), {})
    reads, pauses = small.source.read_count, list[object]()
    check_all(small, wanted, bring(memory, wanted))
    assert small.source.read_count == reads
    assert memory.facts()["block_file_bytes"] == 4105
    memory.scrub(lambda: pauses.append(None))
    assert pauses
    assert memory.kept() == ()


# --- in pieces --------------------------------------------------------------------------------------------------------


def in_pieces(node: CopyingNode, memory: SwapMemory) -> tuple[list[Wanted], list[Any]]:
    """Fill the device with weights of one page, and let go of every second; return those that stay."""
    wanted = weights_of(node, *[4096] * 16)
    handles = bring(memory, wanted)
    memory.free(keys(wanted[::2]))
    return wanted[1::2], handles[1::2]


def test_room_in_pieces_is_made_one_in_the_engines_thread(small: CopyingNode) -> None:
    memory, posted, arrived = small.memory(), list[Callable[[], None]](), list[object]()
    others, handles = in_pieces(small, memory)
    replaced: dict[str, object] = {}

    def post(command: Callable[[], None]) -> None:
        posted.append(command)
        command()

    large = weights_of(small, 3 * 4096, 2 * 4096, seed=1)
    with pytest.raises(Scattered, match="20480 bytes are free, but not in one piece"):
        memory.begin(large)
    # Nothing has changed.
    assert memory.facts()["weight_bytes"] == 8 * 4096
    memory.check_invariants()
    mover = Mover(memory, post, replaced.update)
    fetch = _Fetch(large, lambda pairs, *when: arrived.extend(outcome for _, outcome in pairs))
    mover._begin(fetch)
    assert len(posted) == 1
    mover._read(fetch)
    mover._end(fetch)
    check_all(small, large, arrived)
    now = dict(zip(keys(others), handles, strict=True)) | replaced
    assert 0 < len(replaced) < len(others)
    check_all(small, others, [now[each.weight.digest] for each in others])
    assert memory.facts()["compactions"] == 1
    assert memory.facts()["compacted_bytes"] == 4096 * len(replaced)
    memory.check_invariants()


def test_without_an_engine_nobody_waits_for_room_in_one_piece(small: CopyingNode) -> None:
    memory, arrived = small.memory(), list[object]()
    in_pieces(small, memory)
    mover = Mover(memory, lambda command: None)
    mover.stop()
    fetch = _Fetch(weights_of(small, 3 * 4096, seed=1), lambda pairs, *when: arrived.extend(outcome for _, outcome in pairs))
    mover._begin(fetch)
    assert fetch.batch is None
    memory.check_invariants()


def test_an_engine_that_fails_at_it_is_not_waited_for(small: CopyingNode, caplog: pytest.LogCaptureFixture) -> None:
    memory, arrived = small.memory(), list[object]()
    in_pieces(small, memory)

    def fail(handles: object) -> None:
        raise RuntimeError("as it was told")

    def post(command: Callable[[], None]) -> None:
        try:
            command()
        except RuntimeError:
            arrived.append("failed")

    mover = Mover(memory, post, fail)
    wanted = weights_of(small, 3 * 4096, seed=1)
    fetch = _Fetch(wanted, lambda pairs, *when: arrived.extend(outcome for _, outcome in pairs))
    mover._begin(fetch)
    mover._read(fetch)
    mover._end(fetch)
    assert arrived[0] == "failed"
    check_all(small, wanted, arrived[1:])


def test_what_is_under_way_is_moved_without_its_bytes(small: CopyingNode) -> None:
    memory = small.memory()
    first, second, third = ([each] for each in weights_of(small, 4 * 4096, 4 * 4096, 4 * 4096))
    bring(memory, first)
    under_way = memory.begin(second)
    memory.read(under_way)
    (last,) = bring(memory, third)
    memory.free(keys(first))
    with pytest.raises(Scattered):
        memory.begin(weights_of(small, 5 * 4096, seed=1))
    moved = memory.compact(5 * 4096)
    assert moved.keys() == {*keys(third)}
    assert moved[keys(third)[0]] is not last
    assert memory.facts()["compacted_bytes"] == 4 * 4096
    check_all(small, second, memory.end(under_way))
    check_all(small, third, [*moved.values()])
    memory.check_invariants()


@pytest.mark.parametrize("fails", [False, True], ids=["moved", "lost"])
def test_what_was_taken_back_and_not_told_yet_is_told_where_it_lies_then(fails: bool, small: CopyingNode) -> None:
    memory = small.memory()
    first, second = ([each] for each in weights_of(small, 4 * 4096, 4 * 4096))
    bring(memory, first)
    bring(memory, second)
    memory.free(keys(first + second))
    batch = memory.begin(second)
    memory.read(batch)
    if fails:
        small.device.work.error = RuntimeError("CUDA error: unspecified launch failure")
    assert memory.compact(12 * 4096).keys() == {*keys(second)}
    (outcome,) = memory.end(batch)
    if fails:
        assert isinstance(outcome, DeviceFault)
        assert "was lost on the device" in outcome.message
        (outcome,) = bring(memory, second)
    check_all(small, second, [outcome])
    memory.check_invariants()


def move_all(running: Running, name: str) -> None:
    """Evict a model, and have all others slide down to where it was."""
    engine, done = running.engine, threading.Event()
    ask(running, "evict", name=name)
    until(lambda: ask(running, "memory")["weight_bytes"] == ask(running, "memory")["resident_bytes"])
    memory: Any = engine._memory

    def move() -> None:
        engine._moved(memory.compact(memory._tier.budget_bytes - memory._tier.allocated_bytes))
        done.set()

    engine._post(move)
    assert done.wait(PATIENCE_S)


@pytest.mark.parametrize("fails", [False, True], ids=["moved", "lost"])
def test_an_engine_goes_on_with_weights_that_were_moved_or_lost(
    fails: bool, node: CopyingNode, caplog: pytest.LogCaptureFixture
) -> None:
    made = [network(kind) for kind in ("resnet", "vit", "mlp")]
    with node.serve() as running:
        deploy(running, *made)
        for each in made:
            check(each, 0)
        if fails:
            node.device.work.error = RuntimeError("CUDA error: unspecified launch failure")
        move_all(running, made[0].name)
        memory: Any = running.engine._memory
        assert memory.facts()["compactions"] == 1
        assert ("was lost" in caplog.text) == fails
        for number in range(1, 3):
            for each in made:
                check(each, number)
        assert ask(running, "memory")["compacted_bytes"] > 0
    memory.check_invariants()


def test_a_weight_that_is_lost_while_it_is_leased_is_brought_in_anew(node: CopyingNode) -> None:
    made = network("mlp")
    with node.serve() as running:
        deploy(running, made)
        check(made, 0)
        engine, done = running.engine, threading.Event()

        def lose() -> None:
            deployed = engine._catalog.deployed[made.name]
            memory: Any = engine._memory
            engine._residency.lease(deployed.plan)
            digest = next(iter(deployed.weights))
            memory._tier.free(digest)
            # Somebody else's, which left meanwhile, is nobody's any more.
            engine._moved({digest: DeviceFault("lost"), "0" * 64: object()})
            assert deployed in engine._loads
            engine._residency.release(deployed.plan)
            done.set()

        engine._post(lose)
        assert done.wait(PATIENCE_S)
        check(made, 1)
        until(lambda: ask(running, "model", name=made.name)["state"] == "resident")


# --- which memory, and how much ---------------------------------------------------------------------------------------


def test_a_host_budget_may_be_less_than_its_segment(small: CopyingNode) -> None:
    device = CopyingDevice()
    made = memory_of(device, small.source, small.segment.descriptor, small.folder / "blocks", 5 * ALIGN_BYTES, 3 * 4096)
    assert isinstance(made, SwapMemory)
    assert made.facts()["host_budget_bytes"] == 3 * 4096
    assert device.memory()["span_bytes"] == 5 * ALIGN_BYTES
    with pytest.raises(ConfigError):
        memory_of(CopyingDevice(), small.source, small.segment.descriptor, small.folder / "blocks", 1 << 47)


def test_how_much_a_device_is_given(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    device: Any = CopyingDevice()
    monkeypatch.setattr(CopyingDevice, "memory", lambda self: {"total_bytes": 2000, "free_bytes": 1000})
    assert budget_of(device, 0, is_fixed=True) == 700
    assert budget_of(device, 900, is_fixed=True) == 900
    assert budget_of(device, 500, is_fixed=False) == 500
    assert not caplog.text
    assert budget_of(device, 900, is_fixed=False) == 700
    assert "cpu is given 700 bytes for weights instead of 900, 70 % of what it has free" in caplog.text
    monkeypatch.setattr(CopyingDevice, "memory", lambda self: {"total_bytes": 2000})
    assert budget_of(device, 0, is_fixed=False) == 1400
    monkeypatch.setattr(CopyingDevice, "copies", False)
    assert budget_of(device, 900, is_fixed=False) == 900


def test_weights_do_not_leave_for_the_sake_of_computing_where_that_is_of_no_use(
    node: CopyingNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, other = network("mlp"), network("resnet")
    with node.serve() as running:
        deploy(running, made, other)
        check(other, 0)
        run, left = CopyingDevice.run, [2]

        def runs_short(self: CopyingDevice, program: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
            if left[0]:
                left[0] -= 1
                raise torch_out_of_memory()
            return run(self, program, weights, inputs)

        monkeypatch.setattr(CopyingDevice, "run", runs_short)
        with pytest.raises(DeviceFault, match="has no room for stage 1"):
            model(made.name).call(made.inputs(1, 0))
        found = ask(running, "status")
        assert found["shortage"]["reliefs"] == 1
        assert found["memory"]["residency"]["evictions"]["memory"] == 0
        check(made, 0)
        check(other, 1)


def torch_out_of_memory() -> DeviceFault:
    from sidecar.programs import failure

    return failure("it", torch.OutOfMemoryError("Tried to allocate 2.00 MiB."))


def test_a_weight_that_is_lost_is_not_resident_and_keeps_its_room() -> None:
    residency = Residency(100)
    residency.add_plan("a", {"w": 10})
    residency.lease("a")
    residency.arrived("w")
    residency.lost("w")
    assert not residency.is_resident("w")
    assert residency.committed_bytes == 10
    residency.check_invariants()


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_node(node: CopyingNode) -> CopyingNode:
    node.opened = lambda: open_device("cuda")
    return node


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_answers_on_cuda_wherever_its_weights_are(kind: str, cuda_node: CopyingNode) -> None:
    made = network(kind)
    with cuda_node.serve() as running:
        deploy(running, made)
        check(made, 0)
        before = moved(running)
        ask(running, "evict", name=made.name)
        check(made, 1)
        assert since(running, before).keys() == {"kept_bytes"}
        before = moved(running)
        ask(running, "evict", name=made.name)
        overwrite(running)
        check(made, 2)
        assert since(running, before).keys() == {"host_kept_bytes"}
        found = ask(running, "memory")
        assert found["span_bytes"] == cuda_node.budget_bytes <= found["allocated_bytes"]
        client._pool.close()
    cuda_node.source.blobs.clear()
    with cuda_node.serve() as running:
        check(made, 3)
        assert moved(running)["store_bytes"] == moved(running)["block_file_bytes"] == 0


@pytest.mark.gpu
@needs_cuda
def test_models_take_turns_on_cuda(cuda_node: CopyingNode) -> None:
    networks, draw = [network(kind) for kind in KINDS], random.Random(0)
    with cuda_node.serve() as running:
        for each in networks:
            deploy(running, each)
        sizes = [device_bytes(running, each.name) for each in networks]
        client._pool.close()
    cuda_node.resize(max(max(sizes), sum(sizes) // 3), 8 * MB)
    memory = cuda_node.memory()
    with cuda_node.serve(memory) as running:
        for number in range(200):
            check(draw.choice(networks), number % 3)
        found = ask(running, "memory")
        assert found["residency"]["evictions"]["room"] > 0
        assert found["weight_bytes"] <= cuda_node.budget_bytes
    memory.check_invariants()


@pytest.mark.gpu
@needs_cuda
def test_an_engine_goes_on_with_weights_that_were_moved_on_cuda(cuda_node: CopyingNode) -> None:
    made = [network(kind) for kind in ("resnet", "vit", "mlp")]
    with cuda_node.serve() as running:
        deploy(running, *made)
        for each in made:
            check(each, 0)
        for number in range(1, 4):
            move_all(running, made[number % 3].name)
            for each in made:
                check(each, number)
        found = ask(running, "memory")
        assert found["compactions"] == 3
        assert found["compacted_bytes"] > 0
