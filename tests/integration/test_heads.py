"""Heads of one structure on inputs of their own, on a real device: one run for all of them, and everybody's own answer."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from trunkline.errors import DeviceFault, TrunklineError, ValueOutOfBounds

from sidecar.devices import TorchDevice
from sidecar.ports import OutputSpecs, Work
from tests.fakes import Running
from tests.forms import prefer
from tests.integration.test_lanes import LATE, Asker, handled, leases
from tests.integration.test_sharing import ask, at_once, counted, deploy, heads, network_of, serving
from tests.integration.test_shortage import asked_at_once
from tests.networks import Arrays, Network, agrees


class Watched(TorchDevice):
    """A device that notes on how many inputs stacked models were run, and fails or waits where it is told to."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.inputs: list[int] = []
        # A weight of a model that always fails; whether whatever is stacked does.
        self.fails: torch.Tensor | None = None
        self.broken = False
        self.error: type[TrunklineError] = DeviceFault
        self.held: threading.Event | None = None
        self.entered = threading.Semaphore(0)

    def run_stacked(self, program: Any, weights: Any, inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        self.inputs.append(len(inputs))
        if self.held is not None:
            self.entered.release()
            assert self.held.wait(LATE), "nobody let it go on"
        if self.broken or self.fails is not None:
            raise self.error("one of them fails")
        return super().run_stacked(program, weights, inputs)

    def run(self, program: Any, weights: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        if self.fails is not None and any(torch.equal(self.fails, weight) for weight in weights):
            raise self.error("this one fails")
        return super().run(program, weights, inputs)


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be stacked is stacked at once."""
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    monkeypatch.setattr("sidecar.costs.BatchCosts.is_known", lambda *arguments: True)


@pytest.fixture(autouse=True)
def two_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A trunk, and a head."""
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 16 * 1024)


def asked(running: Running, made: Sequence[Network], extents: Sequence[int], first_seed: int = 0) -> dict[str, int]:
    """Ask models at once, each about an input of its own; see that the answers are right, and return what was counted."""
    inputs = [each.inputs(extent, first_seed + number) for number, (each, extent) in enumerate(zip(made, extents, strict=True))]
    with counted(running) as counts:
        answers = at_once(running, *((each.name, given) for each, given in zip(made, inputs, strict=True)))
    for each, given, answer in zip(made, inputs, answers, strict=True):
        assert agrees(answer, each.eager(given), exact=False)
    return counts


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("packing", [True, False])
def test_heads_on_inputs_of_their_own_run_as_one(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever is faster on this machine at this moment.
    prefer(monkeypatch, *["blocked", "packed"] * packing)
    made, device = heads(6), Watched()
    with serving(tmp_path, monkeypatch, device, packing=packing) as running:
        deploy(running, *made)
        assert ask(running, "model", name="head-0")["stage_count"] == 2
        counts = asked(running, made, [1] * 6)
        # The trunk as a batch, the heads stacked.
        assert counts == {"stages": 2, "stage_rows": 12, "stage_requests": 12, "stacked": 5}
        assert device.inputs == [6]
        # A head with several rows of different callers is one of them.
        counts = asked(running, [*made[:3], made[0], made[1], made[2]], [1] * 6, 10)
        assert counts == {"stages": 2, "stage_rows": 12, "stage_requests": 12, "stacked": 2}


@pytest.mark.usefixtures("pays")
def test_a_copy_of_weights_serves_a_part_of_the_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, device = heads(6), Watched()
    with serving(tmp_path, monkeypatch, device) as running:
        deploy(running, *made)
        stacks = running.engine._loads._stacks
        for part, inputs, copies in ((made, 6, 1), (made[1:5], 6, 1), (made[:2], 2, 2), (made[1:4], 6, 2), (made[:1], None, 2)):
            device.inputs.clear()
            counts = asked(running, part, [1] * len(part))
            assert (counts["stages"], counts["stacked"]) == (2, len(part) - 1)
            assert device.inputs == ([] if inputs is None else [inputs])
            assert len(stacks) == copies
        # Weights that go take their copies along.
        ask(running, "evict", name="head-5")
        assert not stacks
        assert asked(running, made[:5], [1] * 5)["stacked"] == 4


def test_what_was_not_measured_one_by_one_is_not_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = heads(6)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, *made)
        # The first run sets something up, three are measured, and the other two are tried as one.
        counts = asked(running, made, [1] * 6)
        assert (counts["stages"], counts["stacked"]) == (6, 1)


@pytest.mark.usefixtures("pays")
def test_heads_whose_weights_would_be_copied_each_time_are_not_stacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, device = heads(4), Watched()
    with serving(tmp_path, monkeypatch, device) as running:
        deploy(running, *made)
        size_bytes = sum(weight.size_bytes for weight in running.engine._catalog.deployed["head-0"].steps[-1].graph.weights)
        # Room for three.
        monkeypatch.setattr("sidecar.loads._STACKED_SHARE", 3.5 * size_bytes / (1 << 26))
        # The first of four runs by itself, nobody looks for the second one, and the others fit.
        assert asked(running, made, [1] * 4)["stacked"] == 1
        assert asked(running, made[:3], [1] * 3)["stacked"] == 2
        assert device.inputs == [2, 3]


def test_where_it_does_not_pay_heads_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = 0

    def pays(costs: Any, keys: Sequence[Any], apart: int, together: int, times: int = 1) -> bool:
        nonlocal looked
        looked += keys[0][0] == "abreast"
        return keys[0][0] != "abreast"

    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", pays)
    monkeypatch.setattr("sidecar.costs.BatchCosts.is_known", lambda *arguments: True)
    made, device = heads(6), Watched()
    with serving(tmp_path, monkeypatch, device) as running:
        deploy(running, *made)
        counts = [asked(running, made[:count], [1] * count) for count in (3, 3, 4, 4, 3, 6)]
        assert [each["stages"] for each in counts] == [4, 4, 5, 5, 4, 7]
        assert not any(each["stacked"] for each in counts)
        assert not device.inputs
        # After it did not pay nobody looks for one head, then for two, four and eight, unless there are more than before.
        assert looked == 5


@pytest.mark.usefixtures("pays")
def test_stacking_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = heads(3)
    with serving(tmp_path, monkeypatch, stacking=False) as running:
        deploy(running, *made)
        assert asked(running, made, [1] * 3) == {"stages": 4, "stage_rows": 6, "stage_requests": 6, "stacked": 0}


@pytest.mark.usefixtures("pays")
def test_heads_with_as_many_rows_run_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = heads(5)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, *made)
        counts = asked(running, made, [1, 2, 1, 2, 2])
        assert counts == {"stages": 3, "stage_rows": 10, "stage_requests": 10, "stacked": 3}


@pytest.mark.usefixtures("pays")
def test_on_equal_inputs_it_is_one_product_for_all_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, device = heads(4), Watched()
    with serving(tmp_path, monkeypatch, device) as running:
        deploy(running, *made)
        inputs = made[0].inputs(1)
        with counted(running) as counts:
            answers = at_once(running, *((each.name, inputs) for each in made))
        assert all(agrees(given, each.eager(inputs), exact=False) for each, given in zip(made, answers, strict=True))
        assert counts == {"stages": 2, "stage_rows": 5, "stage_requests": 8, "stacked": 3}
        assert device.inputs == [1]


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize(("error", "stays"), [(DeviceFault, False), (ValueOutOfBounds, True)])
def test_a_failure_is_that_of_the_guilty_head(
    error: type[TrunklineError], stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, device = heads(4), Watched()
    device.error = error
    with serving(tmp_path, monkeypatch, device, packing=False) as running:
        deploy(running, *made)
        device.fails = made[2].source.module.head[0].bias
        inputs = [each.inputs(1, number) for number, each in enumerate(made)]
        calls: list[tuple[str, Arrays]] = [(each.name, given) for each, given in zip(made, inputs, strict=True)]
        with counted(running) as counts:
            answers = asked_at_once(running, *calls)
        failed = answers.pop(2)
        assert isinstance(failed, error)
        assert failed.message == "this one fails"
        for each, given, answer in zip([*made[:2], made[3]], [*inputs[:2], inputs[3]], answers, strict=True):
            assert agrees(answer, each.eager(given), exact=False)
        assert counts["stacked"] == 0
        # They were run as one once, and are not any more, unless it was for a caller's index.
        assert device.inputs == [4]
        device.fails = None
        assert asked(running, made, [1] * 4)["stacked"] == (3 if stays else 0)


@pytest.mark.usefixtures("pays")
def test_each_head_is_charged_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = heads(4)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, *made)
        charge, charged = running.engine._queue.charge, Counter[str]()

        def note(work: Work, seconds: float) -> None:
            charged[work.model] += seconds  # type: ignore[assignment]
            charge(work, seconds)

        monkeypatch.setattr(running.engine._queue, "charge", note)
        assert asked(running, made, [1] * 4)["stacked"] == 3
        assert set(charged) == {each.name for each in made}
        assert len({round(seconds, 9) for seconds in charged.values()}) == 1


class Leaver(Asker):
    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        self.answers.put([output.clone() for output in outputs])

    def ask_about(self, network: Network, seed: int) -> None:
        (inputs,) = network.inputs(1, seed).values()
        self.engine.submit(Work(self, 1, network.name, time.monotonic() + LATE, inputs=[torch.from_numpy(inputs)]))


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("fails", [False, True])
def test_who_leaves_while_the_heads_run_takes_nothing_from_the_others(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    made, device = heads(4), Watched()
    try:
        with serving(tmp_path, monkeypatch, device, lanes=2) as running:
            deploy(running, *made)
            engine, askers = running.engine, [Leaver(running.engine) for _ in made]
            device.held, device.broken = threading.Event(), fails
            hold = threading.Event()
            engine._post(lambda: hold.wait(LATE) and None)
            for seed, (asker, each) in enumerate(zip(askers, made, strict=True)):
                asker.ask_about(each, seed)
            hold.set()
            # Both lanes are at two heads each.
            assert all(device.entered.acquire(timeout=LATE) for _ in range(2))
            engine.session_closed(askers[1])
            handled(engine)
            engine._post(engine.check_invariants)
            assert leases(engine, made[1].name) == 1
            device.held.set()
            for number in (0, 2, 3):
                (answer,) = askers[number].told()
                (wanted,) = made[number].eager(made[number].inputs(1, number)).values()
                torch.testing.assert_close(answer, torch.from_numpy(wanted))
            assert askers[1].gone.wait(LATE)
            assert askers[1].events == ["released"]
            assert leases(engine, made[1].name) == 0
            assert ask(running, "status")["sharing"]["stacked"] == (0 if fails else 2)
            for number in (0, 2, 3):
                engine.session_closed(askers[number])
    finally:
        torch.set_num_threads(threads)


class Unlike(torch.nn.Module):
    """A trunk that all have in common, and a head of one's own: how wide, and with a bias or without, differs."""

    def __init__(self, seed: int, width: int, bias: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(64, width, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("own", [True, False])
def test_heads_that_are_unlike_are_not_stacked(own: bool, packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prefer(monkeypatch, *["blocked", "packed"] * packing)
    kinds = ((8, True), (8, False), (16, True), (8, True), (16, True), (8, False))
    made = [network_of(Unlike(number + 1, *kind), f"unlike-{number}") for number, kind in enumerate(kinds)]
    with serving(tmp_path, monkeypatch, packing=packing) as running:
        deploy(running, *made)
        inputs = [made[0].inputs(1, number if own else 0) for number in range(len(made))]
        with counted(running) as counts:
            answers = at_once(running, *((each.name, given) for each, given in zip(made, inputs, strict=True)))
        for each, given, answer in zip(made, inputs, answers, strict=True):
            assert agrees(answer, each.eager(given), exact=False)
        # Two of each kind.
        assert (counts["stages"], counts["stacked"]) == (4, 3)
