"""Memory that was let go is never read: it is filled with not-a-numbers at once, and no answer ever has one."""

from __future__ import annotations

import collections
import random
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from trunkline import client, errors, model, models
from trunkline.admin import AdminConnection

from sidecar.devices import TorchDevice
from sidecar.ir import Weight
from tests.fakes import ADMIN_TOKEN, FakeSource, running_server
from tests.networks import Arrays, agrees, network

# They ask for so long, and on a busy machine until all of it has happened often enough.
SECONDS = 4.0
MOST_SECONDS = 120.0


class PoisoningDevice(TorchDevice):
    """A device that fills a weight's memory with not-a-numbers as soon as nobody holds its handle any more."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.poisoned_count = 0
        # Kept for a while, so that nothing else gets the memory and hides the poison.
        self._graves: collections.deque[torch.Tensor] = collections.deque(maxlen=5000)

    def new_weight(self, weight: Weight, fill: Callable[[memoryview], None]) -> torch.Tensor:
        handle = super().new_weight(weight, fill)
        if weight.size_bytes:
            weakref.finalize(handle, self._poison, handle.detach().reshape(-1).view(torch.uint8))
        return handle

    def _poison(self, memory: torch.Tensor) -> None:
        memory.fill_(0xFF)  # in every float dtype a not-a-number
        self._graves.append(memory)
        self.poisoned_count += 1


def test_the_device_of_these_tests_poisons_what_is_let_go() -> None:
    device = PoisoningDevice()
    content = np.ones(4, np.float32).tobytes()
    weight = Weight("0" * 64, "float32", (2, 2), len(content), 0)
    handle = device.new_weight(weight, lambda target: target.__setitem__(slice(None), content))
    again = device.as_weight(handle, replace(weight, shape=(4,)))
    left = handle.t()
    del handle
    assert not left.isnan().any(), "a view that the device gave out keeps the handle"
    del again
    assert left.isnan().all()
    assert device.poisoned_count == 1


def test_no_answer_is_made_of_memory_that_was_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for some of the models; they are asked, alone and together, evicted, replaced and removed, all at the same time."""
    mlp, vit = network("mlp").called("mlp"), network("vit").called("vit0")
    stable = [mlp, vit, vit.tuned("vit1", 1), network("decoder").called("decoder"), network("pair").called("pair")]
    # Two versions that take turns, and one that comes and goes.
    versions = [vit.tuned("changing", 2), vit.tuned("changing", 3)]
    passing = mlp.tuned("passing", 4)
    source, device = FakeSource(), PoisoningDevice()
    for each in (*stable, versions[0], passing):
        each.put(source)
    # Two of the transformers asked together fit, with little else.
    heads = sum(weight.size_bytes for each in (vit, stable[2]) for weight in each.bundle.graph.weights)
    budget_bytes = int(0.6 * heads)
    total_bytes = sum({weight.digest: weight.size_bytes for each in stable for weight in each.bundle.graph.weights}.values())
    assert budget_bytes < total_bytes
    problems: list[str] = []
    answered = collections.Counter[str]()
    with running_server(tmp_path, source, device=device, budget_bytes=budget_bytes) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        began_s = time.monotonic()

        def check(name: str, answer: object, rights: list[Arrays]) -> None:
            given = answer.values() if isinstance(answer, dict) else [answer]
            if any(np.isnan(np.asarray(array)).any() for array in given):
                problems.append(f"{name} answered not-a-numbers")
            elif not any(agrees(answer, right, exact=False) for right in rights):
                problems.append(f"{name} answered wrongly")
            answered[name] += 1

        def is_over() -> bool:
            passed_s = time.monotonic() - began_s
            return passed_s > MOST_SECONDS or (passed_s > SECONDS and has_all_happened())

        def has_all_happened() -> bool:
            names = [*(each.name for each in stable), "changing", "passing"]
            return (
                running.engine._residency.evicted_bytes > 10 * budget_bytes
                and device.poisoned_count > 100
                and all(answered[each] > 5 for each in names)
            )

        def guarded(work: Callable[[random.Random], None], seed: int) -> threading.Thread:
            draw = random.Random(seed)

            def loop() -> None:
                while not problems and not is_over():
                    try:
                        work(draw)
                    except Exception as error:  # noqa: BLE001 - told below
                        problems.append(f"{work.__name__}: {error!r}")

            return threading.Thread(target=loop)

        asked = [(each, inputs, each.eager(inputs)) for each in stable for inputs in (each.inputs(1), each.inputs(2, seed=5))]
        picture = vit.inputs(1)
        of_versions = [each.eager(picture) for each in versions]
        features = passing.inputs(1)

        def ask(draw: random.Random) -> None:
            each, inputs, right = draw.choice(asked)
            check(each.name, model(each.name).call(inputs), [right])

        def ask_together(draw: random.Random) -> None:
            answers = both.call(picture)
            for name, right in rights.items():
                check(name, answers[name], [right])

        changing, both = model("changing"), models("vit0", "vit1")
        rights = {each.name: each.eager(picture) for each in (vit, stable[2])}
        right_of_passing = passing.eager(features)

        def ask_changing(draw: random.Random) -> None:
            try:
                check("changing", changing.call(picture), of_versions)
            except errors.SignatureMismatch:
                # Away and back again within one call: the client finds the version it knows and gives up.
                answered["refused"] += 1

        def ask_passing(draw: random.Random) -> None:
            try:
                check("passing", model("passing").call(features), [right_of_passing])
            except errors.UnknownModel:
                answered["refused"] += 1

        control = AdminConnection(running.path, ADMIN_TOKEN)

        def change(draw: random.Random) -> None:
            time.sleep(0.002)
            match draw.randrange(3):
                case 0:
                    try:
                        control.command("evict", {"name": draw.choice(stable).name})
                    except errors.InvalidInput as error:
                        assert "in use" in error.message
                case 1:
                    draw.choice(versions).put(source)
                    control.command("model_changed", {"name": "changing"})
                case _:
                    if source.bundles.pop("passing", None):
                        control.command("model_removed", {"name": "passing"})
                    else:
                        passing.put(source)
                        control.command("model_changed", {"name": "passing"})

        works = [ask, ask, ask, ask_together, ask_changing, ask_passing, change]
        threads = [guarded(work, seed) for seed, work in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        client._pool.close()
        assert not problems, problems[:5]
        assert has_all_happened(), (device.poisoned_count, answered)
