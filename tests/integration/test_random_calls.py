"""Twenty thousand calls in random order, of six functions with memory for two: exact answers, never over the budget.

The models compute with small whole numbers, of which no order of additions loses a bit: whatever the form of their weights,
and whoever they share a batch with, there is one right answer, which is compared byte for byte. Memory of weights is filled with
not-a-numbers when it is given out and when it is let go, so that an answer shows whether any was read too early or too late.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trunkline import client
from trunkline.pool import Pool

from sidecar.export import Source
from sidecar.hosttier import HostTier
from sidecar.tiermemory import TierMemory
from tests.fakes import Running
from tests.integration.test_sharing import ask, deploy
from tests.networks import Arrays, Network
from tests.nodes import Node, moved, until_on_disk, weight_bytes
from tests.waiting import PATIENCE_S
from tests.zoo import packed

CALL_COUNT = 20_000
CALLS_AT_ONCE = 3
CALLS_PER_CHECK = 200
INPUT_COUNT = 8

WIDTH = 64
LARGE = "speech"
# What is asked in one call, and how often. The first three models begin alike.
ASKED = {
    ("age",): 4,
    ("gender",): 4,
    ("mood",): 4,
    ("text",): 4,
    ("picture",): 4,
    ("age", "gender"): 2,
    (LARGE,): 1,
}


class Text(nn.Module):
    """The sum of what a table has of each word, and two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, WIDTH)
        self.layers = layers(WIDTH, WIDTH, 5)

    def forward(self, words: Tensor) -> Tensor:
        answer: Tensor = self.layers(self.words(words).sum(1))
        return answer


def layers(*widths: int) -> nn.Sequential:
    """Return linear layers, with something between them that keeps their results small."""
    pairs = ((nn.Linear(inside, outside), nn.ReLU6()) for inside, outside in itertools.pairwise(widths))
    return nn.Sequential(*list(itertools.chain.from_iterable(pairs))[:-1])


def picture() -> nn.Sequential:
    convolutions = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU6(), nn.Conv2d(16, 32, 3, 2), nn.ReLU6())
    return nn.Sequential(*convolutions, nn.Flatten(), layers(32 * 9, 32, 5))


def whole(module: nn.Module, seed: int, common: int = 0) -> nn.Module:
    """Fill a module with small whole numbers, its first ``common`` parameters with the same for every seed."""
    for number, parameter in enumerate(module.parameters()):
        generator = torch.Generator().manual_seed(100 * number + (seed if number >= common else 0))
        with torch.no_grad():
            parameter.copy_(torch.randint(-1, 2, parameter.shape, generator=generator))
    return module.eval()


def networks() -> list[Network]:
    features, trunk = {"features": torch.ones(1, 16)}, (16, WIDTH, WIDTH, WIDTH)
    sources = {
        "age": Source(whole(layers(*trunk, 5), 1, common=6), features),
        "gender": Source(whole(layers(*trunk, 5), 2, common=6), features),
        "mood": Source(whole(layers(*trunk, WIDTH, 7), 3, common=4), features),
        "text": Source(whole(Text(), 4), {"words": torch.ones(1, 6, dtype=torch.int64)}, input_bounds={"words": (0, 99)}),
        "picture": Source(whole(picture(), 5), {"picture": torch.ones(1, 3, 8, 8)}),
        LARGE: Source(whole(layers(16, *[112] * 4, 5), 6), features),
    }
    made = []
    for name, source in sources.items():
        model = packed(source, name)
        made.append(Network(model.bundle, {digest: bytes(content) for digest, content in model.blobs}, source))
    return made


def inputs_of(made: Network, number: int) -> Arrays:
    """Return whole numbers as inputs, of one row up to three."""
    given = made.inputs(1 + number % 3, number, scale=2.0)
    return {name: np.rint(array) if array.dtype.kind == "f" else array for name, array in given.items()}


@dataclass
class Watch:
    """What is seen while calls run, each in the thread that owns it. ``most_bytes`` is what the system counts in the tier."""

    problems: list[str] = field(default_factory=list)
    most_bytes: int = 0
    poisoned_count: int = 0
    check_count: int = 0

    def guard(self, what: str, check: Callable[[], None]) -> None:
        """Note whatever a check raises: in threads of others nobody else would."""
        try:
            check()
        except Exception as error:  # noqa: BLE001 - told at the end
            self.problems.append(f"{what}: {error!r}")


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Poison what the host tier gives out and lets go, and note how large it is whenever it has grown."""
    made = Watch()
    allocate, free, take_back = HostTier.allocate, HostTier.free, HostTier.take_back
    freed: dict[str, bytes] = {}

    def poison(tier: HostTier, key: str) -> None:
        pages = tier.pages(key)
        pages[:] = b"\xff" * len(pages)  # in every float dtype a not-a-number
        made.poisoned_count += 1

    def poisoned_allocate(tier: HostTier, key: str, size_bytes: int) -> memoryview:
        room = allocate(tier, key, size_bytes)
        made.most_bytes = max(made.most_bytes, tier.resident_bytes)
        poison(tier, key)
        return room

    def poisoned_free(tier: HostTier, key: str) -> None:
        freed[key] = bytes(tier.view(key))
        poison(tier, key)
        free(tier, key)

    def cured_take_back(tier: HostTier, key: str) -> bool:
        is_back = take_back(tier, key)
        if is_back:
            tier.view(key)[:] = freed[key]
        return is_back

    monkeypatch.setattr(HostTier, "allocate", poisoned_allocate)
    monkeypatch.setattr(HostTier, "free", poisoned_free)
    monkeypatch.setattr(HostTier, "take_back", cured_take_back)
    return made


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Matrices this small are not worth a second thread, which would only be in the way of ours."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check_books(running: Running, memory: TierMemory, watch: Watch) -> threading.Event:
    """Have the engine's books checked in its thread, then the tier's in the mover's; return what is set when that was done."""
    engine, done = running.engine, threading.Event()

    def check_engine() -> None:
        watch.guard("the engine's books", engine.check_invariants)
        committed = engine._residency._committed.copy()
        # Once the mover has done what it was told up to now, this is what it has: no weight less, and none more.
        engine._mover._tell(lambda: check_tier(committed))

    def check_tier(committed: dict[str, int]) -> None:
        def check() -> None:
            memory._tier.check_invariants()
            assert memory._tier._held.keys() == committed.keys(), "the tier holds other weights than are counted"
            assert memory._tier.allocated_bytes == sum(committed.values())

        watch.guard("the tier's books", check)
        watch.check_count += 1
        done.set()

    engine._post(check_engine)
    return done


def asking(names: Sequence[str], pool: Pool) -> Callable[[Arrays], dict[str, Any]]:
    parts = [client.Model(name, pool) for name in names]
    if len(parts) > 1:
        return client.Models(parts).call
    return lambda inputs: {parts[0].name: parts[0].call(inputs)}


def test_memory_that_is_given_out_or_let_go_is_poisoned(node: Node, watch: Watch) -> None:
    tier = node.memory()._tier
    view = np.frombuffer(tier.allocate("ab" * 32, 400), np.float32)
    assert np.isnan(view).all()
    view[:] = 1
    tier.free("ab" * 32)
    assert np.isnan(view).all()
    assert watch.poisoned_count == 2
    assert watch.most_bytes == 4096


@pytest.mark.row("F26")
def test_twenty_thousand_random_calls_of_six_functions_in_memory_for_two(
    node: Node, watch: Watch, one_thread: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 30_000)
    # Some stages are served with packed weights, some in blocks and some as they are, whatever is faster.
    forms = itertools.cycle(("packed", "plain", "blocked"))
    monkeypatch.setattr("sidecar.forms._fastest", lambda seconds, joins: form if (form := next(forms)) in seconds else "plain")
    made = {each.name: each for each in networks()}
    with node.serve() as running:
        deploy(running, *made.values())
        for name in made:
            until_on_disk(node, running, name)
        sizes = {name: sum(weight_bytes(running, name)) for name in made}
        packed_count = sum(ask(running, "model", name=name)["packed_stage_count"] for name in made)
        assert 0 < packed_count < sum(len(running.engine._catalog.deployed[name].steps) for name in made)
        client._pool.close()
    # Two of those that fit, at their largest; one does not fit.
    node.resize(sum(sorted(size for name, size in sizes.items() if name != LARGE)[-2:]))
    assert node.budget_bytes < sizes[LARGE]

    inputs = {names: [inputs_of(made[names[0]], number) for number in range(INPUT_COUNT)] for names in ASKED}
    rights = {names: [{name: made[name].eager(given)["output"] for name in names} for given in inputs[names]] for names in ASKED}
    draw = random.Random(4)
    drawn = draw.choices(list(ASKED), list(ASKED.values()), k=CALL_COUNT)
    calls = enumerate([(names, draw.randrange(INPUT_COUNT)) for names in drawn])
    memory = node.memory()
    watch.most_bytes = 0
    with node.serve(memory) as running:
        pools = {names: Pool() for names in ASKED}
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
        status, found = ask(running, "status"), moved(running)
        for pool in pools.values():
            pool.close()
    assert not watch.problems, watch.problems[:5]
    # The budget was needed to the last page, and nothing beyond it.
    assert watch.most_bytes == node.budget_bytes
    assert watch.check_count == CALL_COUNT // CALLS_PER_CHECK + 1
    assert (status["requests"]["answered"], status["requests"]["failed"]) == (CALL_COUNT, 0)
    assert status["memory"]["residency"]["evictions"]["room"] > CALL_COUNT // 2
    assert status["streams"]["runs"] > 100
    assert found["block_file_bytes"] > 1000 * node.budget_bytes
    assert found["store_bytes"] == 0
