"""Real models on a real device, tried out, batched, packed and stacked: right answers, and nothing computed twice."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trunkline import client, model, models
from trunkline.admin import AdminConnection
from trunkline.errors import DeviceFault, DeviceOutOfMemory
from trunkline.pool import Pool

from sidecar.bundle import Bundle, graph_digest
from sidecar.devices import TorchDevice, open_device
from sidecar.export import Source, convert
from sidecar.ir import Graph, Node, Value
from sidecar.stacked import stackable
from sidecar.verdicts import Verdicts
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, running_server
from tests.forms import prefer
from tests.networks import Arrays, Network, agrees, network
from tests.waiting import PATIENCE_S, soon

COUNTS = ("stages", "stage_rows", "stage_requests", "stacked")


@contextlib.contextmanager
def serving(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    device: TorchDevice | None = None,
    source: FakeSource | None = None,
    **settings: Any,
) -> Iterator[Running]:
    made = running_server(
        folder,
        source or FakeSource(),
        device=device or open_device("cpu"),
        budget_bytes=1 << 26,
        verdicts=Verdicts(folder / "verdicts", "test"),
        **settings,
    )
    with made as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        yield running
        client._pool.close()


def ask(running: Running, command: str, **arguments: object) -> Any:
    return AdminConnection(running.path, ADMIN_TOKEN).command(command, arguments)


def deploy(running: Running, *networks: Network) -> None:
    """Deploy models, wait until they were tried, and load them: one that is still loading stands in no batch."""
    for each in networks:
        each.put(running.source)
        ask(running, "model_changed", name=each.name)
    deadline = soon()
    for each in networks:
        while ask(running, "model", name=each.name)["unbatched_because"] == "it was not tried yet":
            assert time.monotonic() < deadline, f"{each.name} was never tried"
            time.sleep(0.02)
    for each in networks:
        ask(running, "load", name=each.name)


@contextlib.contextmanager
def counted(running: Running) -> Iterator[dict[str, int]]:
    """Count what the engine does inside the block."""
    found: dict[str, int] = {}
    before = ask(running, "status")["sharing"]
    yield found
    after = ask(running, "status")["sharing"]
    found |= {name: after[name] - before[name] for name in COUNTS}


def at_once(running: Running, *calls: tuple[str, Arrays]) -> list[Any]:
    """Ask about everything while the engine is held up, so that all of it is there when the first is begun."""
    # A pool each: clients that know nothing of each other. Their sessions are open before: that is told to the engine, too.
    pools = [Pool() for _ in calls]
    asked = [client.Model(name, pool) for (name, _), pool in zip(calls, pools, strict=True)]
    assert all(each.signature for each in asked)
    ask(running, "status")
    release, engine, submitted = threading.Event(), running.engine, []
    submit = engine.submit
    engine._post(lambda: release.wait(PATIENCE_S))  # type: ignore[arg-type, return-value]
    engine.submit = lambda work: (submit(work), submitted.append(work))  # type: ignore[method-assign,assignment]
    with ThreadPoolExecutor(len(calls)) as threads:
        answers = [threads.submit(each.call, inputs) for each, (_, inputs) in zip(asked, calls, strict=True)]
        deadline = soon()
        while len(submitted) < len(calls) and time.monotonic() < deadline:
            time.sleep(0.005)
        engine.submit = submit  # type: ignore[method-assign]
        release.set()
        found = [answer.result() for answer in answers]
    for pool in pools:
        pool.close()
    return found


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)


@pytest.mark.parametrize("kind", ["resnet", "mobilenet", "densenet", "vit", "minilm", "pair", "unet"])
@pytest.mark.usefixtures("small_blocks")
def test_networks_answer_alone_and_in_batches_as_the_original_does(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network(kind)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, made)
        inputs = [made.inputs(batch, seed) for seed, batch in enumerate((1, 1, 2, 1))]
        with counted(running) as counts:
            answers = at_once(running, *((made.name, each) for each in inputs))
        for given, each in zip(answers, inputs, strict=True):
            assert agrees(given, made.eager(each), exact=False)
        shown = ask(running, "model", name=made.name)
        assert shown["batched"], shown["unbatched_because"]
        assert counts["stages"] == shown["stage_count"]
        assert counts["stage_rows"] == 4 * counts["stages"]


def test_a_model_that_numbers_its_rows_is_served_one_by_one_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("outputs")
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, made)
        inputs = [made.inputs(2, seed) for seed in range(3)]
        with counted(running) as counts:
            answers = at_once(running, *((made.name, each) for each in inputs))
        assert all(agrees(given, made.eager(each), exact=False) for given, each in zip(answers, inputs, strict=True))
        assert counts["stages"] == counts["stage_rows"] == 3
        assert "for a row at another place" in ask(running, "model", name=made.name)["unbatched_because"]


@pytest.mark.usefixtures("small_blocks")
def test_siblings_share_their_trunk_whoever_asks_and_however(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whatever this machine measures at this moment.
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    original = network("resnet")
    siblings = [original.tuned(f"sibling-{number}", number) for number in range(3)]
    with serving(tmp_path, monkeypatch, stacking=False) as running:
        deploy(running, *siblings)
        count = ask(running, "model", name=siblings[0].name)["stage_count"]
        names = [each.name for each in siblings]
        inputs = [original.inputs(1, seed) for seed in range(3)]
        # One call about three models: the trunk once, three heads.
        with counted(running) as counts:
            answers = models(*names).call(inputs[0])
        assert counts["stages"] == count + 2
        assert counts["stage_requests"] == 3 * count
        for each in siblings:
            assert agrees(answers[each.name], each.eager(inputs[0]), exact=False)
        # Three functions, one input: the same.
        with counted(running) as counts:
            alone = at_once(running, *((name, inputs[0]) for name in names))
        assert counts["stages"] == count + 2
        assert counts["stage_rows"] == count + 2
        assert all(np.array_equal(given, answers[name]) for name, given in zip(names, alone, strict=True))
        # Three functions, three inputs: one batch up to the heads.
        with counted(running) as counts:
            given = at_once(running, *zip(names, inputs, strict=True))
        assert counts["stages"] == count + 2
        assert counts["stage_rows"] == 3 * (count - 1) + 3
        for each, array, answer in zip(siblings, inputs, given, strict=True):
            assert agrees(answer, each.eager(array), exact=False)


def test_an_idle_device_may_wait_a_little_for_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("mlp")
    inputs = made.inputs(1)
    with serving(tmp_path, monkeypatch, batch_window_s=5.0, batch_limit=2, stacking=False) as running:
        deploy(running, made)
        with counted(running) as counts, ThreadPoolExecutor(2) as threads:
            pools = [Pool(), Pool()]
            first = threads.submit(client.Model(made.name, pools[0]).call, inputs)
            time.sleep(0.3)
            assert not first.done()
            # The second fills the batch: nobody waits for the end of the window.
            second = threads.submit(client.Model(made.name, pools[1]).call, inputs)
            assert np.array_equal(first.result(PATIENCE_S), second.result(PATIENCE_S))
        assert (counts["stages"], counts["stage_requests"]) == (1, 2)
        for pool in pools:
            pool.close()
    with serving(tmp_path, monkeypatch, batch_window_s=0.05) as running:
        deploy(running, made)
        assert agrees(model(made.name).call(inputs), made.eager(inputs), exact=False)


@pytest.mark.usefixtures("small_blocks")
def test_each_form_of_sharing_can_be_switched_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = network("resnet")
    siblings = [original.tuned(f"sibling-{number}", number) for number in range(2)]
    names = [each.name for each in siblings]
    one, other = original.inputs(1, 0), original.inputs(1, 1)
    with serving(tmp_path, monkeypatch, batch_limit=1, compute_once=False, packing=False, stacking=False) as running:
        deploy(running, *siblings)
        shown = ask(running, "model", name=names[0])
        assert shown["packed_stage_count"] == 0
        for inputs in ((one, one), (one, other)):
            with counted(running) as counts:
                given = at_once(running, *zip(names, inputs, strict=True))
            assert counts["stages"] == counts["stage_rows"] == counts["stage_requests"] == 2 * shown["stage_count"]
            # Unpacked and unbatched: to the bit.
            for each, array, answer in zip(siblings, inputs, given, strict=True):
                assert agrees(answer, each.eager(array), exact=True)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", ["packed", "blocked"])
def test_packed_weights_stand_in_for_those_they_are_made_of(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("resnet")
    # Whatever is faster on this machine at this moment: here the packed form is taken wherever there is one.
    prefer(monkeypatch, form)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, made)
        assert agrees(model(made.name).call(made.inputs(1)), made.eager(made.inputs(1)), exact=False)
        shown, memory = ask(running, "model", name=made.name), ask(running, "memory")
        assert shown["packed_stage_count"] > 0
        assert memory["weight_bytes"] == memory["resident_bytes"]
        digests = set(running.engine._loads._handles)
        # The convolutions and norms themselves are nowhere.
        folded = {weight.digest for weight in made.bundle.graph.weights if len(weight.shape) == 4}
        assert len(folded & digests) < len(folded)
        ask(running, "evict", name=made.name)
        assert ask(running, "memory")["weight_bytes"] == 0
        assert agrees(model(made.name).call(made.inputs(1)), made.eager(made.inputs(1)), exact=False)
        assert {block["form"] for block in ask(running, "blocks")["blocks"]} <= {form, "plain"}
        del running.source.bundles[made.name]
        ask(running, "model_removed", name=made.name)
        assert ask(running, "memory")["weight_bytes"] == 0


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("form", ["packed", "blocked"])
def test_a_model_in_use_changes_its_form_without_losing_a_request(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network("resnet")
    inputs = made.inputs(1)
    expected = made.eager(inputs)
    prefer(monkeypatch, form)
    with serving(tmp_path, monkeypatch) as running:
        made.put(running.source)
        ask(running, "model_changed", name=made.name)
        forms: set[int] = set()
        deadline = soon()
        while time.monotonic() < deadline and len(forms) < 2:
            assert agrees(model(made.name).call(inputs), expected, exact=False)
            forms.add(ask(running, "model", name=made.name)["packed_stage_count"])
        assert len(forms) == 2
        # Nothing of the form before is left.
        model(made.name).call(inputs)
        memory = ask(running, "memory")
        assert memory["weight_bytes"] == memory["resident_bytes"]


@pytest.mark.parametrize("kind", ["bert", "minilm"])
@pytest.mark.usefixtures("small_blocks")
def test_texts_of_different_lengths_share_a_batch_where_the_model_takes_a_mask(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = network(kind)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, made)
        shown = ask(running, "model", name=made.name)
        assert shown["padded_along"]
        calls = []
        for seed, length in enumerate((2, 3, 5)):
            whole = made.inputs(1, seed)
            calls.append({name: np.ascontiguousarray(array[:, :length]) for name, array in whole.items()})
        with counted(running) as counts:
            answers = at_once(running, *((made.name, inputs) for inputs in calls))
        for given, inputs in zip(answers, calls, strict=True):
            assert agrees(given, made.eager(inputs), exact=False)
        assert counts["stages"] == shown["stage_count"]
        assert counts["stage_rows"] == 3 * counts["stages"]


# --- whose rows are whose ----------------------------------------------------------------------------------------------


class Folded(torch.nn.Module):
    """Folds all tokens of all rows into one axis: how many places a row has depends on its length."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU())
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(64, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x.reshape(-1, 16))).reshape(x.shape[0], -1, 4)


class Centred(torch.nn.Module):
    """A trunk that others have, too, and after it perhaps a step in which rows touch each other."""

    def __init__(self, seed: int, mixing: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 64), torch.nn.ReLU())
        torch.manual_seed(seed)
        self.head, self.mixing = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3)), mixing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.trunk(x)
        return self.head(y - y.mean(0, keepdim=True) if self.mixing else y)


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every batch that can be made is made."""
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("length", [1, 5, 8, 16])
def test_rows_are_told_apart_whatever_their_length(length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example, axes = {"x": torch.randn(2, 5, 16)}, {"x": {1: ("tokens", 1, 32)}}
    made = [network_of(Folded(seed), f"m{seed}", example, dynamic_axes=axes) for seed in (1, 2)]
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, *made)
        calls = [
            (f"m{seed}", {"x": np.random.default_rng(seed).random((rows, length, 16), np.float32)})
            for seed, rows in ((1, 1), (2, 2))
        ]
        with counted(running) as counts:
            answers = at_once(running, *calls)
        assert counts["stage_rows"] > counts["stages"]
        for each, (_, inputs), given in zip(made, calls, answers, strict=True):
            assert agrees(given, each.eager(inputs), exact=False)


@pytest.mark.usefixtures("batches")
def test_a_batch_of_several_rows_that_others_join_keeps_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [network_of(Centred(1, mixing=True), "mixing"), network_of(Centred(2, mixing=False), "apart")]
    with serving(tmp_path, monkeypatch, stacking=False) as running:
        deploy(running, *made)
        assert not ask(running, "model", name="mixing")["batched"]
        large, small = made[0].inputs(3, 0), made[0].inputs(1, 1)
        calls = [("mixing", large), ("apart", large), ("apart", small)]
        answers = at_once(running, *calls)
        for each, (_, inputs), given in zip((made[0], made[1], made[1]), calls, answers, strict=True):
            assert agrees(given, each.eager(inputs), exact=False)


@pytest.mark.usefixtures("batches")
def test_models_with_batch_axes_of_their_own_are_asked_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = network_of(torch.nn.Sequential(torch.nn.Linear(16, 3)), "one", {"input": torch.randn(2, 16)})
    other = network_of(torch.nn.Sequential(torch.nn.Linear(24, 3)), "other", {"input": torch.randn(2, 24)})
    one = Network(renamed(one.bundle, "x"), one.blobs, one.source)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, one, other)
        random = np.random.default_rng(0)
        for sizes in (((1, 3), (1, 3)), ((2, 1), (2, 1)), ((1, 3), (1, 1)), ((2, 2), (1, 1))):
            calls = [
                ("one+other", {"x": random.random((a, 16), np.float32), "input": random.random((b, 24), np.float32)})
                for a, b in sizes
            ]
            for (_, inputs), given in zip(calls, at_once(running, *calls), strict=True):
                assert agrees(given["one/output"], one.eager({"x": inputs["x"]}), exact=False)
                assert agrees(given["other/output"], other.eager({"input": inputs["input"]}), exact=False)


def renamed(bundle: Bundle, name: str) -> Bundle:
    """Return a bundle whose input has another name."""
    graph = replace(bundle.graph, inputs=(replace(bundle.graph.inputs[0], name=name),))
    return replace(bundle, graph=graph, graph_digest=graph_digest(graph))


def test_a_model_that_goes_while_others_of_its_call_are_loaded_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [network_of(torch.nn.Sequential(torch.nn.Linear(64, seed)), f"m{seed}") for seed in (2, 3)]
    inputs = made[0].inputs(1)
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, *made)
        both = models("m2", "m3")
        # Its connection is open: a new one names models that are read ahead, before anything is asked.
        both.call(inputs)
        for each in made:
            ask(running, "evict", name=each.name)
        reading, leave = threading.Event(), threading.Event()
        running.source.before_read = lambda digest: (reading.set(), leave.wait(PATIENCE_S))
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(lambda: both.call(inputs))
            assert reading.wait(PATIENCE_S)
            del running.source.bundles["m3"]
            ask(running, "model_removed", name="m3")
            leave.set()
            given = answer.result(PATIENCE_S)
        for each in made:
            assert agrees(given[each.name], each.eager(inputs), exact=False)
        assert ask(running, "model", name="m2")["leases"] == 0


# --- stacking ---------------------------------------------------------------------------------------------------------


class Head(torch.nn.Module):
    """A trunk that all have in common, and a perceptron of one's own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU())
        torch.manual_seed(seed)
        self.head = torch.nn.Sequential(torch.nn.Linear(64, 16), torch.nn.GELU(), torch.nn.Linear(16, 3, bias=seed < 100))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(x))


def heads(count: int) -> list[Network]:
    return [network_of(Head(number + 1), f"head-{number}") for number in range(count)]


def network_of(module: torch.nn.Module, name: str, inputs: Any = None, **settings: Any) -> Network:
    source = Source(module.eval(), (torch.randn(2, 64),) if inputs is None else inputs, **settings)
    given = tuple(source.inputs.values()) if isinstance(module, torch.nn.Sequential) and inputs else source.inputs
    made = convert(source.module, given, name=name, **settings)
    return Network(made.bundle, {digest: bytes(content) for digest, content in made.blobs}, source)


@pytest.mark.parametrize("packing", [True, False])
def test_heads_of_one_structure_run_as_one(packing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 16 * 1024)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made = heads(6)
    with serving(tmp_path, monkeypatch, packing=packing) as running:
        deploy(running, *made)
        assert ask(running, "model", name="head-0")["stage_count"] == 2
        together = models(*(each.name for each in made))
        for turn in range(4):
            inputs = made[0].inputs(1 + turn % 2, turn)
            with counted(running) as counts:
                answers = together.call(inputs)
            for each in made:
                assert agrees(answers[each.name], each.eager(inputs), exact=False)
        assert counts["stages"] == 2
        assert counts["stacked"] == 5
        assert counts["stage_requests"] == 12
        assert running.engine._loads._stacks
        # Weights that go take their copies along.
        ask(running, "evict", name="head-0")
        assert not running.engine._loads._stacks


@pytest.mark.parametrize("fails", ["stack", "run_stacked"])
@pytest.mark.parametrize("error", [DeviceFault, DeviceOutOfMemory])
def test_heads_that_cannot_be_stacked_run_one_by_one(
    fails: str, error: type[DeviceFault], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 16 * 1024)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)

    def refuse(*arguments: object) -> Any:
        raise error("no room")

    made, device = heads(3), open_device("cpu")
    monkeypatch.setattr(device, fails, refuse)
    with serving(tmp_path, monkeypatch, device) as running:
        deploy(running, *made)
        inputs = made[0].inputs(1)
        for _ in range(4):
            answers = models(*(each.name for each in made)).call(inputs)
        assert all(agrees(answers[each.name], each.eager(inputs), exact=False) for each in made)
        assert ask(running, "status")["sharing"]["stacked"] == 0


def head_graph(*nodes: Node, results: tuple[Value, ...] = (Value("node", 0),)) -> Graph:
    weights = network("mlp").bundle.graph.weights[:2]
    spec = network("mlp").bundle.graph.inputs[0]
    return Graph((), (spec,), (spec,), weights, nodes, results)


X, W, B = Value("input", 0), Value("weight", 0), Value("weight", 1)


@pytest.mark.parametrize(
    ("graph", "can"),
    [
        (lambda: head_graph(Node("aten.linear.default", (X, W, B))), True),
        (lambda: head_graph(Node("aten.linear.default", (X, W))), True),
        (lambda: head_graph(Node("aten.add.Tensor", (X, B))), False),
        (lambda: head_graph(Node("aten.relu.default", (X,))), False),
        (lambda: head_graph(Node("aten.linear.default", (W, W))), False),
        (lambda: head_graph(Node("aten.linear.default", (X, W)), results=(Value("node", 0), X)), False),
        (lambda: head_graph(Node("aten.linear.default", (X, W)), Node("aten.sum.default", (Value("node", 0),))), False),
    ],
)
def test_what_can_be_stacked(graph: Callable[[], Graph], can: bool) -> None:
    assert stackable(graph()) is can


def test_large_weights_are_not_copied() -> None:
    made = head_graph(Node("aten.linear.default", (X, W)))
    large: Mapping[str, Any] = {**vars(made.weights[0]), "size_bytes": 1 << 21}
    weights = (type(made.weights[0])(**large), made.weights[1])
    assert not stackable(Graph((), made.inputs, made.outputs, weights, made.nodes, made.results))
