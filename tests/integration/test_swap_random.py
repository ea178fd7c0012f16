"""Random calls on a device that copies weights: exact answers, and neither tier ever beyond its budget.

As ``test_random_calls`` does it in place: models of small whole numbers, one right answer each, compared byte for byte. What is
let go of on the device, and what weights move away from, is filled with not-a-numbers behind all that the device was given; and
it copies as late as it may, so that whoever does not wait for a weight's bytes computes with such.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import client
from trunkline.arena import page_aligned
from trunkline.pool import Pool

from sidecar.devicetier import DeviceTier, aligned
from sidecar.hosttier import HostTier
from sidecar.span import Span
from sidecar.swapmemory import SwapMemory
from tests.copying import CopyingNode, until_on_disk
from tests.fakes import Running
from tests.integration.test_random_calls import ASKED, LARGE, Watch, asking, inputs_of, networks, one_thread
from tests.integration.test_sharing import ask, deploy
from tests.integration.test_swap_memory import bring, bytes_of, weights_of
from tests.networks import Arrays
from tests.waiting import PATIENCE_S, until

__all__ = ["one_thread"]

CALL_COUNT = 4000
CALLS_AT_ONCE = 3
CALLS_PER_CHECK = 200
INPUT_COUNT = 8


class Tiers(Watch):
    """What is seen of both tiers."""

    most_on_device: int = 0
    moved_count: int = 0


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CopyingNode]:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 30_000)
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    made = CopyingNode(tmp_path, 8 << 20, 8 << 20)
    yield made
    client._pool.close()
    made.close()


@pytest.fixture
def watch(node: CopyingNode, monkeypatch: pytest.MonkeyPatch) -> Tiers:
    """Poison what leaves the device or its host, and note how much both hold whenever it has grown."""
    made = Tiers()
    allocate, free, take_back, move = DeviceTier.allocate, DeviceTier.free, DeviceTier.take_back, Span.move
    below, free_below, take_back_below = HostTier.allocate, HostTier.free, HostTier.take_back
    graves: dict[str, Any] = {}
    freed: dict[str, bytes] = {}

    def noted_allocate(tier: DeviceTier, weight: Any) -> bool:
        is_placed = allocate(tier, weight)
        made.most_on_device = max(made.most_on_device, tier.allocated_bytes)
        return is_placed

    def poisoned_free(tier: DeviceTier, key: str) -> None:
        # Behind all that may still be read, as what is written there next.
        node.device.settle()
        held = tier._held[key]
        room = node.device.room[held.extent.offset : held.extent.end]
        graves[key] = room.clone()
        room.fill_(0xFF)
        made.poisoned_count += 1
        free(tier, key)

    def cured_take_back(tier: DeviceTier, key: str) -> bool:
        is_back = take_back(tier, key)
        if is_back:
            extent = tier._held[key].extent
            node.device.room[extent.offset : extent.end] = graves[key]
        return is_back

    def poisoned_move(span: Span, source: int, target: int, size_bytes: int) -> None:
        move(span, source, target, size_bytes)
        node.device.settle()
        node.device.room[max(source, target + size_bytes) : source + size_bytes] = 0xFF
        made.moved_count += 1

    def poison(tier: HostTier, key: str) -> None:
        pages = tier.pages(key)
        pages[:] = b"\xff" * len(pages)

    def poisoned_below(tier: HostTier, key: str, size_bytes: int) -> memoryview:
        room = below(tier, key, size_bytes)
        made.most_bytes = max(made.most_bytes, tier.resident_bytes)
        poison(tier, key)
        return room

    def poisoned_free_below(tier: HostTier, key: str) -> None:
        freed[key] = bytes(tier.view(key))
        poison(tier, key)
        free_below(tier, key)

    def cured_take_back_below(tier: HostTier, key: str) -> bool:
        is_back = take_back_below(tier, key)
        if is_back:
            tier.view(key)[:] = freed[key]
        return is_back

    for owner, name, function in (
        (DeviceTier, "allocate", noted_allocate),
        (DeviceTier, "free", poisoned_free),
        (DeviceTier, "take_back", cured_take_back),
        (Span, "move", poisoned_move),
        (HostTier, "allocate", poisoned_below),
        (HostTier, "free", poisoned_free_below),
        (HostTier, "take_back", cured_take_back_below),
    ):
        monkeypatch.setattr(owner, name, function)
    return made


def check_books(running: Running, memory: SwapMemory, watch: Tiers) -> threading.Event:
    """Have the engine's books checked in its thread, then the tiers' in the mover's; return what is set when that was done."""
    engine, done = running.engine, threading.Event()

    def check_engine() -> None:
        watch.guard("the engine's books", engine.check_invariants)
        committed = engine._residency._committed.copy()
        engine._mover._tell(lambda: check_tiers(committed))

    def check_tiers(committed: dict[str, int]) -> None:
        def check() -> None:
            memory.check_invariants()
            assert memory._tier._held.keys() == committed.keys(), "the device holds other weights than are counted"
            assert memory._tier.allocated_bytes == sum(committed.values())

        watch.guard("the tiers' books", check)
        watch.check_count += 1
        done.set()

    engine._post(check_engine)
    return done


def test_random_calls_of_six_functions_with_room_for_two_on_the_device_and_for_two_below(
    node: CopyingNode, watch: Tiers, one_thread: None
) -> None:
    made = {each.name: each for each in networks()}
    with node.serve() as running:
        deploy(running, *made.values())
        for name in made:
            until(until_on_disk(running, name))
        weights = {name: running.engine._catalog.deployed[name].weights.values() for name in made}
        client._pool.close()
    sizes = {name: sum(aligned(weight.size_bytes) for weight in weights[name]) for name in made}
    pages = {name: sum(page_aligned(weight.size_bytes) for weight in weights[name]) for name in made}
    # Two of those that fit, at their largest; one does not fit. As much below.
    fitting = [name for name in made if name != LARGE]
    budget_bytes = sum(sorted(sizes[name] for name in fitting)[-2:])
    node.resize(budget_bytes, sum(sorted(pages[name] for name in fitting)[-2:]))
    assert budget_bytes < sizes[LARGE]

    inputs = {names: [inputs_of(made[names[0]], number) for number in range(INPUT_COUNT)] for names in ASKED}
    rights = {names: [{name: made[name].eager(given)["output"] for name in names} for given in inputs[names]] for names in ASKED}
    draw = random.Random(4)
    drawn = draw.choices(list(ASKED), list(ASKED.values()), k=CALL_COUNT)
    calls = enumerate([(names, draw.randrange(INPUT_COUNT)) for names in drawn])
    memory = node.memory()
    watch.most_bytes = watch.most_on_device = 0
    with node.serve(memory) as running:
        pools = {names: Pool() for names in ASKED}
        functions: dict[tuple[str, ...], Callable[[Arrays], dict[str, Any]]]
        functions = {names: asking(names, pool) for names, pool in pools.items()}

        def call(names: tuple[str, ...], number: int) -> None:
            answer = functions[names](inputs[names][number])
            for name, right in rights[names][number].items():
                got = np.asarray(answer[name])
                assert (got.dtype, got.shape) == (right.dtype, right.shape)
                assert got.tobytes() == right.tobytes(), f"{name} answers {got.tolist()} instead of {right.tolist()}"

        def work() -> None:
            for count, (names, number) in calls:
                watch.guard(f"call {count}, of {names}", lambda names=names, number=number: call(names, number))  # type: ignore[misc]
                if count % CALLS_PER_CHECK == 0:
                    check_books(running, memory, watch)
                if watch.problems:
                    break

        threads = [threading.Thread(target=work) for _ in range(CALLS_AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not watch.problems, watch.problems[:5]
        assert check_books(running, memory, watch).wait(PATIENCE_S)
        status, found = ask(running, "status"), ask(running, "memory")
        for pool in pools.values():
            pool.close()
    assert not watch.problems, watch.problems[:5]
    # Either budget was needed, and nothing beyond it.
    assert watch.most_on_device == node.budget_bytes
    assert 0.9 * found["host_budget_bytes"] < watch.most_bytes <= found["host_budget_bytes"]
    assert watch.check_count == CALL_COUNT // CALLS_PER_CHECK + 1
    assert (status["requests"]["answered"], status["requests"]["failed"]) == (CALL_COUNT, 0)
    assert found["residency"]["evictions"]["room"] > CALL_COUNT // 2
    assert status["streams"]["runs"] > 20
    assert found["compactions"] > 10
    assert watch.moved_count > 10
    assert min(found["host_kept_bytes"], found["block_file_bytes"]) > 50 * node.budget_bytes
    assert found["kept_bytes"] > 0
    assert found["store_bytes"] == 0


def test_memory_that_is_let_go_of_is_poisoned(node: CopyingNode, watch: Tiers) -> None:
    memory = node.memory()
    wanted = weights_of(node, 1000)
    (handle,) = bring(memory, wanted)
    assert bytes_of(node, handle) == node.source.blobs[wanted[0].weight.digest]
    memory.free([wanted[0].weight.digest])
    assert bytes_of(node, handle) == b"\xff" * 1000
    # And is as it was when it is had back.
    (again,) = bring(memory, wanted)
    assert bytes_of(node, again) == node.source.blobs[wanted[0].weight.digest]
    assert watch.poisoned_count == 1
    assert memory.facts()["kept_bytes"] == 1000
