"""A cold model computes while its weights arrive: what is there is run, what is missing waited for, a failure stays whole."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from trunkline import client, model
from trunkline.errors import DeadlineExceeded, ModelCorrupt
from trunkline.pool import Pool

from sidecar.errors import BlobCorrupt
from sidecar.loads import Loads
from tests.fakes import FakeSource, Running
from tests.integration.test_sharing import ask, deploy, serving
from tests.networks import Network, agrees, network

TIMEOUT_S = 60


class Gated(FakeSource):
    """Weights that are held back until they are let through; each read is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[str, threading.Event] = {}
        self.damaged: set[str] = set()
        self.reads: list[str] = []

    def hold(self, digest: str) -> threading.Event:
        self.held[digest] = threading.Event()
        return self.held[digest]

    def read_blob(self, digest: str, target: memoryview, crc32: int | None = None) -> None:
        self.reads.append(digest)
        if digest in self.held:
            assert self.held[digest].wait(TIMEOUT_S)
        if digest in self.damaged:
            raise BlobCorrupt("altered", digest=digest)
        super().read_blob(digest, target, crc32)


@pytest.fixture
def source(monkeypatch: pytest.MonkeyPatch) -> Gated:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    return Gated()


@pytest.fixture
def running(source: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with serving(tmp_path, monkeypatch, source=source, packing=False) as running:
        yield running


def cold(running: Running, made: Network) -> None:
    deploy(running, made)
    ask(running, "evict", name=made.name)


def last_weight(running: Running, made: Network) -> str:
    steps = running.engine._catalog.deployed[made.name].steps
    first = {weight.digest for weight in steps[0].graph.weights}
    later = [weight.digest for step in steps[1:] for weight in step.graph.weights if weight.digest not in first]
    return later[-1]


def stages_run(running: Running) -> int:
    return int(ask(running, "status")["sharing"]["stages"])


def until_stages(running: Running, count: int) -> None:
    """Wait until so many stages have been run; every question is a step of the engine."""
    for _ in range(100_000):
        if stages_run(running) >= count:
            return
    raise AssertionError(f"{stages_run(running)} of {count} stages were run")


def test_stages_are_run_while_later_weights_are_read(source: Gated, running: Running) -> None:
    made = network("mlp")
    cold(running, made)
    shown = ask(running, "model", name=made.name)
    gate, before = source.hold(last_weight(running, made)), stages_run(running)
    inputs = made.inputs(1, 0)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(model(made.name).call, inputs)
        until_stages(running, before + shown["stage_count"] - 1)
        assert not answer.done()
        assert ask(running, "model", name=made.name)["state"] == "loading"
        gate.set()
        assert agrees(answer.result(TIMEOUT_S), made.eager(inputs), exact=True)
    assert stages_run(running) == before + shown["stage_count"]


def test_weights_are_read_in_the_order_of_the_stages(source: Gated, running: Running) -> None:
    made = network("resnet")
    cold(running, made)
    steps = running.engine._catalog.deployed[made.name].steps
    source.reads.clear()
    model(made.name).call(made.inputs(1, 0))
    assert source.reads == list(dict.fromkeys(weight.digest for step in steps for weight in step.graph.weights))


def test_others_are_answered_while_a_model_waits_for_weights(source: Gated, running: Running) -> None:
    made, other = network("mlp"), network("vit")
    deploy(running, other)
    cold(running, made)
    gate, before = source.hold(last_weight(running, made)), stages_run(running)
    with ThreadPoolExecutor(1) as threads:
        inputs = made.inputs(1, 0)
        answer = threads.submit(model(made.name).call, inputs)
        until_stages(running, before + 1)
        for seed in range(3):
            given = other.inputs(1, seed)
            assert agrees(model(other.name).call(given), other.eager(given), exact=True)
        assert not answer.done()
        gate.set()
        assert agrees(answer.result(TIMEOUT_S), made.eager(inputs), exact=True)


def test_a_load_is_answered_when_all_weights_are_there(source: Gated, running: Running) -> None:
    made = network("mlp")
    cold(running, made)
    gate = source.hold(last_weight(running, made))
    with ThreadPoolExecutor(1) as threads:
        loaded = threads.submit(ask, running, "load", name=made.name)
        while last_weight(running, made) not in source.reads[-1:]:
            ask(running, "status")
        assert not loaded.done()
        gate.set()
        assert loaded.result(TIMEOUT_S)["state"] == "resident"


def test_a_weight_that_is_damaged_half_way_fails_all_who_wait_for_it_and_nobody_else(source: Gated, running: Running) -> None:
    made, other = network("mlp"), network("vit")
    deploy(running, other)
    cold(running, made)
    digest, before = last_weight(running, made), stages_run(running)
    gate = source.hold(digest)
    source.damaged.add(digest)
    with ThreadPoolExecutor(3) as threads:
        answers = [threads.submit(model(made.name).call, made.inputs(1, seed)) for seed in range(3)]
        until_stages(running, before + 1)
        gate.set()
        for answer in answers:
            with pytest.raises(ModelCorrupt):
                answer.result(TIMEOUT_S)
    given = other.inputs(1, 0)
    assert agrees(model(other.name).call(given), other.eager(given), exact=True)
    assert ask(running, "memory")["resident_bytes"] == sum(
        weight.size_bytes for weight in running.engine._catalog.deployed[other.name].weights.values()
    )
    source.damaged.clear()
    given = made.inputs(1, 0)
    assert agrees(model(made.name).call(given), made.eager(given), exact=True)


def test_who_leaves_while_weights_are_read_leaves_nothing_behind(source: Gated, running: Running) -> None:
    made = network("mlp")
    cold(running, made)
    gate, before = source.hold(last_weight(running, made)), stages_run(running)
    with pytest.raises(DeadlineExceeded):
        model(made.name).call(made.inputs(1, 0), deadline_s=1)
    until_stages(running, before + 1)
    gate.set()
    while ask(running, "status")["requests"]["running"]:
        pass
    ask(running, "load", name=made.name)
    assert ask(running, "model", name=made.name)["leases"] == 0


def test_an_engine_whose_requests_all_wait_for_weights_sleeps(
    source: Gated, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network("mlp")
    cold(running, made)
    gate, before = source.hold(last_weight(running, made)), stages_run(running)
    looks: list[Any] = []
    is_ready = Loads.is_ready
    monkeypatch.setattr(Loads, "is_ready", lambda self, step: looks.append(step) or is_ready(self, step))
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(model(made.name).call, made.inputs(1, 0))
        stage_count = ask(running, "model", name=made.name)["stage_count"]
        until_stages(running, before + stage_count - 1)
        # One look for each thing that is posted (a session that opens, asks and closes is three), and none between.
        ask(running, "status")
        seen = len(looks)
        for _ in range(10):
            ask(running, "status")
        assert len(looks) - seen <= 40
        gate.set()
        answer.result(TIMEOUT_S)


def test_a_function_that_boots_has_its_model_loaded_before_it_asks(source: Gated, running: Running) -> None:
    made, other = network("mlp"), network("vit")
    cold(running, made)
    cold(running, other)
    source.reads.clear()
    pool = Pool()
    # What a handler does when it is imported; the second is none, and no harm.
    for name in (made.name, "unknown"):
        pool.expect(name)
    connection = pool.take(0, 0, time.monotonic() + TIMEOUT_S)
    while ask(running, "model", name=made.name)["state"] != "resident":
        pass
    wanted = {weight.digest for weight in made.bundle.graph.weights}
    assert set(source.reads) == wanted
    # Another session of it finds everything there.
    pool.take(0, 0, time.monotonic() + TIMEOUT_S).close()
    ask(running, "status")
    assert len(source.reads) == len(wanted)
    connection.close()


def test_a_model_that_does_not_fit_is_not_loaded_ahead(source: Gated, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("mlp")
    cold(running, made)
    source.reads.clear()
    monkeypatch.setattr(running.engine._residency, "budget_bytes", 8)
    pool = Pool()
    pool.expect(made.name)
    pool.take(0, 0, time.monotonic() + TIMEOUT_S).close()
    assert ask(running, "status")["requests"]["failed"] == 0
    assert source.reads == []


def test_a_full_wavefront_that_waits_for_weights_lets_the_engine_sleep(
    source: Gated, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network("mlp")
    cold(running, made)
    gate, engine = source.hold(last_weight(running, made)), running.engine
    pools = [Pool() for _ in range(20)]
    asked = [client.Model(made.name, pool) for pool in pools]
    assert all(each.signature for each in asked)
    with ThreadPoolExecutor(20) as threads:
        answers = [threads.submit(each.call, made.inputs(1, seed)) for seed, each in enumerate(asked)]
        while not len(engine._queue) or len(engine._wavefront) < 2 * engine._batch_limit:
            ask(running, "status")
        ask(running, "status")
        steps: list[None] = []
        go_on = engine._go_on
        monkeypatch.setattr(engine, "_go_on", lambda: (steps.append(None), go_on()))
        for _ in range(5):
            ask(running, "status")
        # Each question is a session that opens, asks and closes.
        assert len(steps) <= 20
        gate.set()
        for answer in answers:
            answer.result(TIMEOUT_S)
    for pool in pools:
        pool.close()
