"""What calls take beside weights: reckoned without computing, kept within a budget."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trunkline import model, models
from trunkline.errors import BudgetExceeded

from sidecar.activations import Activations
from sidecar.devices import open_device
from sidecar.dryrun import DryRun
from sidecar.export import convert
from sidecar.ir import Graph, Node, Value
from sidecar.programs import Program
from sidecar.verdicts import Verdicts
from tests.fakes import FakeDevice, Running, bundle_of
from tests.integration.test_sharing import at_once, counted, deploy, serving
from tests.networks import agrees, network
from tests.waiting import PATIENCE_S, until

FLOAT = 4


def graph_of(module: torch.nn.Module, *example: torch.Tensor) -> Graph:
    return convert(module.eval(), example, name="made").bundle.graph


def test_what_is_alive_at_a_time_counts_and_no_more() -> None:
    layers = [torch.nn.Linear(256, 1024), torch.nn.ReLU(), torch.nn.Linear(1024, 256)]
    dry_run = DryRun(graph_of(torch.nn.Sequential(*layers), torch.ones(2, 256)))
    # The input, and both the wide result and what relu makes of it.
    assert dry_run.peak_bytes([("float32", (1, 256))]) == FLOAT * (256 + 1024 + 1024)
    assert dry_run.peak_bytes([("float32", (8, 256))]) == 8 * FLOAT * (256 + 1024 + 1024)


def test_views_of_one_storage_count_once() -> None:
    class Views(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second = x.chunk(2, 1)
            return first.transpose(1, 2).reshape(x.shape[0], -1)[:, :8] + second.flatten(1)[:, :8]

    found = DryRun(graph_of(Views(), torch.ones(2, 4, 16))).peak_bytes([("float32", (1, 4, 16))])
    assert found is not None
    # The input, its transposed copy, and eight sums.
    assert found <= FLOAT * (64 + 32 + 8)


@pytest.mark.parametrize("kind", ["resnet", "densenet", "unet", "vit", "minilm"])
def test_a_dry_run_agrees_with_a_run(kind: str) -> None:
    made = network(kind)
    graph, inputs = made.bundle.graph, made.inputs(2, 0)
    given = [torch.from_numpy(inputs[spec.name]) for spec in graph.inputs]
    found = DryRun(graph).peak_bytes([(spec.dtype, tuple(value.shape)) for spec, value in zip(graph.inputs, given, strict=True)])
    device = open_device("cpu")
    program = device.prepare(graph)
    weights = [torch.zeros(weight.shape, dtype=getattr(torch, weight.dtype)) for weight in graph.weights]
    assert found == live_bytes(program, weights, given)


def live_bytes(program: Program, weights: list[torch.Tensor], inputs: list[torch.Tensor]) -> int:
    """Return the most bytes of storages alive at a time in a real run."""
    values: list[Any] = [*weights, *inputs, *program.blank]
    constant = {tensor.untyped_storage().data_ptr() for tensor in (*weights, *program.blank) if isinstance(tensor, torch.Tensor)}
    most = 0

    def alive() -> int:
        flat = [each for value in values for each in (value if isinstance(value, (list, tuple)) else [value])]
        storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in flat if torch.is_tensor(each)}
        return sum(size for address, size in storages.items() if address not in constant)

    with torch.inference_mode():
        for call, gather, target, released, _ in program.steps:
            values[target] = call(*gather(values))
            most = max(most, alive())
            for slot in released:
                values[slot] = None
    return most


def test_where_numbers_are_needed_nothing_is_known() -> None:
    graph = graph_of(torch.nn.Linear(4, 4), torch.ones(2, 4))
    assert DryRun(graph).peak_bytes([("float32", (1, 5))]) is None
    broken = Graph((), graph.inputs, graph.outputs, (), (Node("aten.nothing.default", (), ()),), (Value("node", 0),))
    assert DryRun(broken).peak_bytes([("float32", (1, 4))]) is None


# --- reckoning --------------------------------------------------------------------------------------------------------


class Reckoned:
    """``Activations`` whose thread is this one."""

    def __init__(self, device: Any = None, budget_bytes: int = 1 << 20) -> None:
        posted: list[Callable[[], None]] = []
        self.learned = 0
        self.made = Activations(device or open_device("cpu"), budget_bytes, posted.append, self._note)
        self._posted = posted

    def _note(self) -> None:
        self.learned += 1

    def work(self) -> None:
        """Have all that was asked found out."""
        self.made.stop()
        thread = threading.Thread(target=self.made.run)
        thread.start()
        thread.join(PATIENCE_S)
        for each in self._posted:
            each()
        self._posted.clear()


def test_a_call_goes_alone_until_it_is_known_what_it_takes() -> None:
    made, reckoned = network("minilm"), Reckoned()
    inputs = [made.inputs(1, 0)[spec.name] for spec in made.bundle.graph.inputs]
    assert reckoned.made.needed_bytes(made.bundle, inputs) is None
    reckoned.made.needed_bytes(made.bundle, inputs)
    reckoned.work()
    # Asked twice, found once.
    assert reckoned.learned == 1
    assert 0 < reckoned.made.needed_bytes(made.bundle, inputs) < 1 << 20


def test_rows_count_each_and_sizes_by_their_class() -> None:
    made, reckoned = network("resnet"), Reckoned()
    reckoned.made.expect(made.bundle)
    reckoned.work()
    one, four = (
        reckoned.made.needed_bytes(made.bundle, [made.inputs(rows, 0)[spec.name] for spec in made.bundle.graph.inputs])
        for rows in (1, 4)
    )
    assert four == 4 * one
    # Of models whose sizes differ from call to call nothing can be expected.
    texts = Reckoned()
    texts.made.expect(network("minilm").bundle)
    texts.work()
    assert texts.learned == 0


def test_where_a_dry_run_does_not_tell_inputs_are_what_is_known() -> None:
    made, reckoned = network("mlp"), Reckoned(FakeDevice())
    reckoned.made.expect(made.bundle)
    reckoned.work()
    inputs = [made.inputs(1, 0)[spec.name] for spec in made.bundle.graph.inputs]
    assert reckoned.made.needed_bytes(made.bundle, inputs) == 16 * sum(value.nbytes for value in inputs)


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.activations._MOST", 1)
    reckoned = Reckoned()
    for kind in ("mlp", "resnet"):
        made = network(kind)
        reckoned.made.expect(made.bundle)
        reckoned.work()
        inputs = [made.inputs(1, 0)[spec.name] for spec in made.bundle.graph.inputs]
        assert reckoned.made.needed_bytes(made.bundle, inputs) < 1 << 20
    assert len(reckoned.made._known) == len(reckoned.made._needed) == 1


# --- in the engine ----------------------------------------------------------------------------------------------------


@pytest.fixture
def one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    """An engine with room for one row of the network ``resnet``, and not for two."""
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made, reckoned = network("resnet"), Reckoned()
    reckoned.made.expect(made.bundle)
    reckoned.work()
    one = reckoned.made.needed_bytes(made.bundle, list(made.inputs(1, 0).values()))
    with serving(tmp_path, monkeypatch, activation_budget_bytes=2 * one - 1) as running:
        deploy(running, made)
        model(made.name).call(made.inputs(1, 0))
        yield running


def test_calls_wait_for_each_other_where_they_would_take_too_much_together(one_at_a_time: Running) -> None:
    made = network("resnet")
    with counted(one_at_a_time) as counts:
        inputs = [made.inputs(1, seed) for seed in range(3)]
        answers = at_once(one_at_a_time, *((made.name, each) for each in inputs))
    for given, each in zip(answers, inputs, strict=True):
        assert agrees(given, made.eager(each), exact=False)
    assert counts["stage_rows"] == counts["stages"]


def test_a_call_that_takes_too_much_alone_is_refused_with_the_numbers(one_at_a_time: Running) -> None:
    made = network("resnet")
    caught: list[BudgetExceeded] = []

    def is_refused() -> bool:
        try:
            model(made.name).call(made.inputs(4, 0))
        except BudgetExceeded as error:
            caught.append(error)
        return bool(caught)

    # What calls take is found out aside; until then they go alone.
    until(is_refused)
    assert "activation budget" in caught[0].message
    assert caught[0].details["needed_bytes"] > caught[0].details["budget_bytes"]
    assert agrees(model(made.name).call(made.inputs(1, 0)), made.eager(made.inputs(1, 0)), exact=False)


def test_models_in_one_call_are_reckoned_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    twin = made.called("twin")
    with serving(tmp_path, monkeypatch, activation_budget_bytes=1 << 30) as running:
        deploy(running, made, twin)
        reckoned: list[int] = []
        needed_bytes = Activations.needed_bytes
        monkeypatch.setattr(Activations, "needed_bytes", lambda *given: reckoned.append(needed_bytes(*given)) or reckoned[-1])

        def is_known() -> bool:
            reckoned.clear()
            assert models(made.name, twin.name).call(made.inputs(1, 0))
            assert len(reckoned) == 2
            return None not in reckoned

        # Dry runs are made aside.
        until(is_known)
        assert reckoned[0] == reckoned[1] < 1 << 30


def test_a_first_call_of_unknown_sizes_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("minilm")
    with serving(tmp_path, monkeypatch, activation_budget_bytes=1 << 30) as running:
        deploy(running, made)
        inputs = [made.inputs(1, seed) for seed in range(4)]
        answers = at_once(running, *((made.name, each) for each in inputs))
        for given, each in zip(answers, inputs, strict=True):
            assert agrees(given, made.eager(each), exact=False)


def run_dry(device: FakeDevice, verdicts: Verdicts) -> dict[Any, Any]:
    """Have found out what calls of a model take; return what was learned."""
    activations = Activations(device, 1 << 20, lambda learn: learn(), lambda: None, verdicts)
    activations.expect(bundle_of("plain", [b"x"]))
    activations.stop()
    activations.run()
    return activations._known


@pytest.mark.parametrize("damage", [{}, {"base_bytes": -1, "row_bytes": 0}, {"base_bytes": True, "row_bytes": 1}])
def test_what_a_dry_run_found_is_not_found_again_after_a_restart(
    damage: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, verdicts = FakeDevice(), Verdicts(tmp_path, "test")
    count = 0

    class Dry:
        def peak_bytes(self, inputs: Any) -> int:
            return 100 * int(inputs[0][1][0])

    def dry_run(graph: Graph) -> Dry:
        nonlocal count
        count += 1
        return Dry()

    monkeypatch.setattr(device, "dry_run", dry_run)
    first = run_dry(device, verdicts)
    assert [tuple(cost) for cost in first.values()] == [(0, 100)]
    assert run_dry(device, Verdicts(tmp_path, "test")) == first
    assert count == 1
    # Of another torch.
    assert run_dry(device, Verdicts(tmp_path, "other")) == first
    assert count == 2
    if damage:
        bundle = bundle_of("plain", [b"x"])
        verdicts.end("activations", f"{bundle.graph_digest} {bundle.batch} ()", damage)
        assert run_dry(device, verdicts) == first
        assert count == 3
