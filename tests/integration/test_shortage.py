"""A device that runs out of memory while it computes: everybody who can be answered is, and the books balance afterwards.

The device runs out where a test says so. How much memory something takes is said in rows, or in numbers that a stage takes.
"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trunkline import client, model
from trunkline.errors import DeviceOutOfMemory, TrunklineError
from trunkline.pool import Pool

from sidecar.devices import TorchDevice
from tests.fakes import Running
from tests.forms import run_apart
from tests.integration.test_sharing import ask, at_once, counted, deploy, serving
from tests.integration.test_streams import rooms, streams
from tests.networks import Arrays, Network, agrees, network
from tests.nodes import Node, check
from tests.waiting import PATIENCE_S

# A request with this number in it has no room, however little it takes.
GUILTY = 99.0


class Small(TorchDevice):
    """A device whose memory is as small as ``lacks`` says: it is asked before each run, once it is there."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.lacks: Callable[[Any, Sequence[torch.Tensor]], bool] | None = None
        # Rows that were run, or were to be.
        self.asked: list[int] = []
        self.trims = 0

    def run(self, program: Any, weights: Sequence[object], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.lacks is not None:
            self.asked.append(inputs[0].shape[0])
            if self.lacks(program, inputs):
                raise DeviceOutOfMemory("injected", node=3)
        return super().run(program, weights, inputs)

    def trim(self) -> None:
        self.trims += 1
        super().trim()


def small(running: Running) -> Small:
    assert isinstance(running.device, Small)
    return running.device


def more_rows_than(most: int) -> Callable[[Any, Sequence[torch.Tensor]], bool]:
    return lambda program, inputs: inputs[0].shape[0] > most


def is_guilty(program: Any, inputs: Sequence[torch.Tensor]) -> bool:
    return bool((inputs[0] == GUILTY).any())


def shortage(running: Running) -> tuple[int, int, int]:
    found = ask(running, "status")["shortage"]
    return found["splits"], found["reliefs"], found["refused"]


def evicted(running: Running) -> int:
    count: int = ask(running, "memory")["residency"]["evictions"]["memory"]
    return count


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    # Whatever this machine measures at this moment.
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    with serving(tmp_path, monkeypatch, Small()) as made:
        yield made


def marked(made: Network, seed: int, rows: int = 1) -> Arrays:
    """Return inputs of a guilty request."""
    inputs = made.inputs(rows, seed)
    for array in inputs.values():
        array.flat[0] = GUILTY
    return inputs


def asked_at_once(running: Running, *calls: tuple[str, Arrays]) -> list[Any]:
    """Ask about everything in one batch; return answers and errors."""
    call = client.Model.call

    def outcome(asked: client.Model, inputs: Arrays) -> Any:
        try:
            return call(asked, inputs)
        except TrunklineError as error:
            return error

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(client.Model, "call", outcome)
        return at_once(running, *calls)


# --- in halves --------------------------------------------------------------------------------------------------------


def test_a_batch_without_room_is_run_in_halves(running: Running) -> None:
    made = network("mlp")
    deploy(running, made)
    stages = ask(running, "model", name=made.name)["stage_count"]
    small(running).lacks = more_rows_than(1)
    inputs = [made.inputs(1, seed) for seed in range(4)]
    with counted(running) as counts:
        answers = at_once(running, *((made.name, each) for each in inputs))
    for given, each in zip(answers, inputs, strict=True):
        assert agrees(given, made.eager(each), exact=False)
    assert small(running).asked == stages * [4, 2, 1, 1, 2, 1, 1]
    assert shortage(running) == (3 * stages, 0, 0)
    # It stays one batch to whoever looks on.
    assert (counts["stages"], counts["stage_rows"]) == (stages, 4 * stages)


def test_one_call_of_many_rows_is_run_in_halves_down_to_single_ones(running: Running) -> None:
    made = network("mlp")
    deploy(running, made)
    small(running).lacks = more_rows_than(1)
    inputs = made.inputs(5)
    assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)
    assert small(running).asked[:9] == [5, 2, 1, 1, 3, 1, 2, 1, 1]
    assert shortage(running)[1:] == (0, 0)


@pytest.mark.parametrize("kind", ["resnet", "densenet", "vit", "minilm", "pair", "unet"])
@pytest.mark.row("F17")
def test_what_halves_give_is_what_the_whole_gives(kind: str, running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever rows lie in what passes from stage to stage: room for two of them."""
    run_apart(monkeypatch)
    made = network(kind)
    deploy(running, made)
    device = small(running)
    room: dict[int, int] = {}

    def learn(program: Any, inputs: Sequence[torch.Tensor]) -> bool:
        room[id(program)] = max(room.get(id(program), 0), sum(each.numel() for each in inputs))
        return False

    device.lacks = learn
    model(made.name).call(made.inputs(2))
    device.lacks = lambda program, inputs: sum(each.numel() for each in inputs) > room[id(program)]
    inputs = made.inputs(7)
    assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)
    splits, reliefs, refused = shortage(running)
    assert splits >= ask(running, "model", name=made.name)["stage_count"]
    assert (reliefs, refused) == (0, 0)


def test_where_what_halves_give_has_no_room_together_requests_run_alone(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network("mlp")
    deploy(running, made)
    device = small(running)
    device.lacks = more_rows_than(1)
    join, refused = device.join, []

    def full(tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        # The batch itself is made, its results are not.
        if device.asked:
            refused.append(len(tensors))
            raise DeviceOutOfMemory("no room")
        return join(tensors, axis)

    monkeypatch.setattr(device, "join", full)
    inputs = [made.inputs(1, seed) for seed in range(2)]
    answers = at_once(running, *((made.name, each) for each in inputs))
    for given, each in zip(answers, inputs, strict=True):
        assert agrees(given, made.eager(each), exact=False)
    assert refused == [2]
    assert shortage(running)[1:] == (0, 0)


def test_a_model_whose_rows_touch_each_other_is_not_run_in_halves(running: Running) -> None:
    made = network("outputs")
    deploy(running, made)
    small(running).lacks = more_rows_than(1)
    with pytest.raises(DeviceOutOfMemory, match="with 2 rows"):
        model(made.name).call(made.inputs(2))
    # Once more after all was let go of that could be.
    assert small(running).asked == [2, 2]
    assert shortage(running) == (0, 1, 1)


# --- one by itself ----------------------------------------------------------------------------------------------------


@pytest.mark.row("F17")
def test_only_the_request_that_has_no_room_by_itself_is_refused(running: Running) -> None:
    made = network("mlp")
    deploy(running, made)
    small(running).lacks = is_guilty
    inputs = [made.inputs(1, 0), made.inputs(1, 1), marked(made, 2), made.inputs(1, 3)]
    before = ask(running, "status")["requests"]
    answers = asked_at_once(running, *((made.name, each) for each in inputs))
    error = answers.pop(2)
    del inputs[2]
    for given, each in zip(answers, inputs, strict=True):
        assert agrees(given, made.eager(each), exact=False)
    assert type(error) is DeviceOutOfMemory
    assert (error.retryable, error.http_status) == (True, 503)
    weight_bytes = ask(running, "memory")["resident_bytes"]
    assert error.details == {"node": 3, "rows": 1, "weight_bytes": weight_bytes, "budget_bytes": 1 << 26}
    assert f"stage 1 of 2 with 1 rows: injected; weights that are in use take {weight_bytes} bytes" in error.message
    after = ask(running, "status")["requests"]
    assert (after["failed"] - before["failed"], after["answered"] - before["answered"]) == (1, 3)
    # The four in two halves, of which the second is halved once more; each by itself; and the guilty one once more.
    assert small(running).asked.count(4) == 1
    assert shortage(running)[1:] == (1, 1)
    assert running.engine._residency.lease_count(running.engine._catalog.deployed[made.name].plan) == 0


def test_for_its_sake_what_nobody_uses_leaves_a_little_first(running: Running) -> None:
    made, pinned = network("mlp"), network("resnet")
    others = [network(kind) for kind in ("densenet", "pair", "vit")]
    deploy(running, made, *others, pinned)
    ask(running, "pin", name=pinned.name)
    residency = running.engine._residency
    # What leaves first, a sixteenth of the budget, is a quarter of what is there.
    residency.budget_bytes = 16 * (residency.committed_bytes // 4)
    weights = dict(residency._committed)
    device = small(running)
    limit_bytes = device.memory()["weight_bytes"] - 1
    device.lacks = lambda program, inputs: device.memory()["weight_bytes"] > limit_bytes
    inputs = made.inputs(1)
    assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)
    assert shortage(running) == (0, 1, 0)
    assert device.asked[:2] == [1, 1]
    assert device.trims >= 1
    assert evicted(running) == len(weights) - len(residency._committed) > 0
    # Not all of it, and nothing of what is pinned or in use.
    assert residency.is_ready(running.engine._catalog.deployed[pinned.name].plan)
    assert residency.is_ready(running.engine._catalog.deployed[made.name].plan)
    assert ask(running, "memory")["weight_bytes"] == residency.committed_bytes
    # What left comes back.
    device.lacks = None
    for other in others:
        assert agrees(model(other.name).call(other.inputs(1)), other.eager(other.inputs(1)), exact=False)


def test_more_and_more_leaves_until_there_is_room(running: Running) -> None:
    made = network("mlp")
    idle = [network(kind) for kind in ("resnet", "densenet", "vit", "pair")]
    deploy(running, made, *idle)
    residency = running.engine._residency
    residency.budget_bytes = 2 * residency.committed_bytes
    plan = running.engine._catalog.deployed[made.name].plan
    device = small(running)
    own_bytes = sum(residency.weights(plan).values())
    device.lacks = lambda program, inputs: device.memory()["weight_bytes"] > own_bytes
    inputs = made.inputs(1)
    assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)
    # A sixteenth of the budget, an eighth, a quarter and a half at most; weights leave as a whole.
    splits, reliefs, refused = shortage(running)
    assert (splits, refused) == (0, 0)
    assert 2 <= reliefs <= 4
    assert len(device.asked) - ask(running, "model", name=made.name)["stage_count"] == reliefs
    assert residency.committed_bytes == own_bytes
    # The next shortage begins with a little again.
    assert running.engine._shortage._wanted_bytes == 0


def test_nothing_is_run_until_the_bytes_are_gone_and_commands_are_answered(running: Running) -> None:
    made, idle = network("mlp"), network("resnet")
    deploy(running, made, idle)
    engine, device = running.engine, small(running)
    freeing, release = threading.Event(), threading.Event()
    freed: list[str] = []

    def free(digests: Sequence[str]) -> None:
        freeing.set()
        assert release.wait(PATIENCE_S)
        freed.extend(digests)

    engine._memory.free = free  # type: ignore[method-assign,assignment]
    device.lacks = lambda program, inputs: not freed
    inputs = made.inputs(1)
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(model(made.name).call, inputs)
        assert freeing.wait(PATIENCE_S)
        for _ in range(3):
            assert ask(running, "status")["requests"]["running"] == 1
        assert device.asked == [1]
        release.set()
        assert agrees(answer.result(PATIENCE_S), made.eager(inputs), exact=False)
    assert device.asked[:2] == [1, 1]


def test_copies_of_weights_leave_where_nothing_else_does(running: Running) -> None:
    made = network("mlp")
    deploy(running, made)
    engine, device = running.engine, small(running)
    engine._loads._stacks[("copy",)] = object()  # type: ignore[assignment]
    device.lacks = lambda program, inputs: bool(engine._loads._stacks)
    inputs = made.inputs(1)
    assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)
    assert shortage(running) == (0, 1, 0)
    assert evicted(running) == 0


def test_a_caller_who_leaves_meanwhile_takes_his_request_along(running: Running) -> None:
    made, idle = network("mlp"), network("resnet")
    deploy(running, made, idle)
    engine, device = running.engine, small(running)
    freeing, release, gone = threading.Event(), threading.Event(), threading.Event()

    def free(digests: Sequence[str]) -> None:
        freeing.set()
        assert release.wait(PATIENCE_S)

    engine._memory.free = free  # type: ignore[method-assign,assignment]
    device.lacks = lambda program, inputs: True
    forget = engine._forget
    engine._forget = lambda session: (forget(session), gone.set())  # type: ignore[method-assign,assignment,func-returns-value]
    pool = Pool()
    with ThreadPoolExecutor(1) as threads:
        answer = threads.submit(client.Model(made.name, pool).call, made.inputs(1), deadline_s=1.0)
        assert freeing.wait(PATIENCE_S)
        assert answer.exception(60) is not None
        pool.close()
        assert gone.wait(PATIENCE_S)
    release.set()
    device.lacks = None
    inputs = made.inputs(1, 1)
    assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)
    assert shortage(running)[2] == 0


def injected(running: Running, lacks: Callable[[], bool]) -> list[int]:
    """Have a device run out of memory when ``lacks`` says so; return the list of what the host tier holds at each run."""
    run, seen = running.device.run, []

    def short(program: Any, weights: Sequence[object], inputs: Sequence[torch.Tensor]) -> Any:
        seen.append(running.engine._memory._tier.resident_bytes)  # type: ignore[attr-defined]
        if lacks():
            raise DeviceOutOfMemory("injected")
        return run(program, weights, inputs)

    running.device.run = short
    return seen


def test_pages_of_the_host_tier_are_gone_before_it_is_tried_again(node: Node) -> None:
    made, idle = network("mlp"), network("resnet")
    with node.serve() as running:
        deploy(running, made, idle)
        once = iter([True])
        seen = injected(running, lambda: next(once, False))
        check(made, 0)
        # No spare pages are kept of what left, either.
        assert seen[1] < seen[0]
        assert seen[1] == ask(running, "memory")["weight_bytes"]
        assert shortage(running) == (0, 1, 0)
        check(idle, 0)


def test_a_model_that_streams_is_tried_again_at_each_stage(node: Node) -> None:
    made = network("resnet")
    (size,), (smallest,) = rooms(node, made)
    node.resize((smallest + size) // 2)
    with node.serve() as running:
        check(made, 0)
        stages = ask(running, "model", name=made.name)["stage_count"]
        turns = itertools.cycle([True, False])
        seen = injected(running, lambda: next(turns))
        for seed in range(3):
            check(made, seed)
            check_in_the_engine(running)
        assert len(seen) == 2 * 3 * stages
        assert shortage(running) == (0, 3 * stages, 0)
        assert streams(running)["runs"] == 4


# --- what is left afterwards ------------------------------------------------------------------------------------------


class Ballast(Small):
    """A device on which much is under way when it runs out, and which sees how much of that is still there at the next run."""

    def __init__(self) -> None:
        super().__init__()
        self.thrown: list[weakref.ref[torch.Tensor]] = []
        self.given: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    def run(self, program: Any, weights: Sequence[object], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        self.alive.append(sum(each() is not None for each in self.thrown))
        ballast = torch.ones(1000)
        self.thrown.append(weakref.ref(ballast))
        try:
            outputs = super().run(program, weights, inputs)
        except DeviceOutOfMemory as error:
            # As an operator's: with a cause that has frames of its own.
            raise DeviceOutOfMemory(error.message) from error
        self.given += [weakref.ref(output) for output in outputs]
        return outputs


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
def test_nothing_of_a_run_without_room_is_kept(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    made, idle, device = network(kind), network("pair"), Ballast()
    with serving(tmp_path, monkeypatch, device) as running:
        deploy(running, made, idle)
        model(made.name).call(made.inputs(1))
        first = running.engine._catalog.deployed[made.name].steps[0].program
        device.thrown.clear()
        device.given.clear()
        device.alive.clear()
        # There is room for the first stage; for the others only row by row, and then not at all.
        device.lacks = lambda program, inputs: program is not first and inputs[0].shape[0] > 1
        inputs = [made.inputs(1, seed) for seed in range(3)]
        gc.collect()
        gc.disable()
        try:
            answers = at_once(running, *((made.name, each) for each in inputs))
            for given, each in zip(answers, inputs, strict=True):
                assert agrees(given, made.eager(each), exact=False)
            device.lacks = lambda program, inputs: program is not first
            with pytest.raises(DeviceOutOfMemory) as caught:
                model(made.name).call(made.inputs(2, 9))
            ask(running, "status")
            alive = sum(each() is not None for each in device.thrown), sum(each() is not None for each in device.given)
        finally:
            gc.enable()
        assert device.alive
        assert set(device.alive) == {0}
        assert alive == (0, 0)
        assert caught.value.details["rows"] == 2
        assert not running.engine._wavefront
        running.engine.check_invariants()


def check_in_the_engine(running: Running) -> None:
    checked: Future[None] = Future()

    def check() -> None:
        try:
            running.engine.check_invariants()
        except AssertionError as error:
            checked.set_exception(error)
        else:
            checked.set_result(None)

    running.engine._post(check)
    checked.result(PATIENCE_S)


@pytest.mark.row("F17")
def test_books_balance_whichever_runs_have_no_room(running: Running) -> None:
    nets = [network(kind) for kind in ("mlp", "resnet", "pair")]
    deploy(running, *nets)
    device = small(running)
    chance = np.random.default_rng(7)
    device.lacks = lambda program, inputs: bool(chance.random() < 0.3)
    expected = {(each.name, seed): each.eager(each.inputs(2, seed)) for each in nets for seed in range(3)}
    refused = answered = 0
    # Six calls each.
    for _ in range(34):
        calls = [(each, int(chance.integers(3))) for each in nets for _ in range(2)]
        answers = asked_at_once(running, *((each.name, each.inputs(2, seed)) for each, seed in calls))
        for (each, seed), given in zip(calls, answers, strict=True):
            if isinstance(given, DeviceOutOfMemory):
                refused += 1
            else:
                assert agrees(given, expected[each.name, seed], exact=False)
                answered += 1
        check_in_the_engine(running)
    splits, reliefs, counted_refusals = shortage(running)
    assert answered > 0
    assert splits > 0
    assert reliefs > 0
    assert counted_refusals <= refused
    memory = ask(running, "memory")
    assert memory["weight_bytes"] == memory["resident_bytes"]
    for each in nets:
        assert running.engine._residency.lease_count(running.engine._catalog.deployed[each.name].plan) == 0
