"""Packed models on the CPU: the answers of the models they are made of, in the memory that was promised."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from trunkline.errors import DeviceFault
from trunkline.protocol import TensorSpec

from sidecar import packed
from sidecar.devices import TorchDevice, open_device
from sidecar.errors import BundleError
from sidecar.export import Source
from sidecar.ir import Argument, Graph, Node, Value, Weight
from sidecar.lowering import CONV2D, LINEAR, TURNED_LINEAR, Lowered, lower
from tests import zoo

X = Value("input", 0)
Y = Value("input", 1)
Blobs = dict[str, bytes]


@pytest.fixture
def device() -> TorchDevice:
    found = open_device("cpu")
    if not found.can_pack:
        pytest.skip("this torch has no packed form")
    return found


def filler(content: bytes) -> Callable[[memoryview], None]:
    return lambda target: target.__setitem__(slice(None), content)


def load(device: TorchDevice, lowered: Lowered, blobs: Blobs) -> list[object]:
    """Return the handles of a lowered graph's weights."""
    handles: list[object] = []
    for weight in lowered.graph.weights:
        recipe = lowered.recipes.get(weight.digest)
        if recipe is None:
            handles.append(device.new_weight(weight, filler(blobs[weight.digest])))
        else:
            handles.append(device.new_packed(recipe, [filler(blobs[source.digest]) for source in recipe.sources]))
    return handles


def resized(inputs: list[torch.Tensor], batch: int) -> list[torch.Tensor]:
    """Return inputs of another batch; integers are those there are, again."""
    torch.manual_seed(batch)
    made = []
    for tensor in inputs:
        rows = tensor[torch.arange(batch) % len(tensor)]
        made.append(torch.randn_like(rows) if rows.is_floating_point() else rows)
    return made


def assert_close(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        scale = other.abs().max().item() if other.is_floating_point() and other.numel() else 1.0
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * max(scale, 1e-6))


# --- whole models ---------------------------------------------------------------------------------------------------


def wide_resnet() -> Source:
    return zoo.resnet(64, 64, 1000)


def large_vit() -> Source:
    """Linear layers large enough for blocks."""
    return zoo.vit(width=384, heads=4, depth=1)


LARGER = {"wide resnet": wide_resnet, "wide mobilenet": lambda: zoo.mobilenet(16, 64), "large vit": large_vit}
OPERATORS = {
    "wide resnet": {CONV2D, TURNED_LINEAR},
    "wide mobilenet": {CONV2D, TURNED_LINEAR},
    "large vit": {CONV2D, LINEAR, TURNED_LINEAR},
    "resnet": {CONV2D},
    "bert": {TURNED_LINEAR},
}


@pytest.mark.parametrize("name", [*zoo.ALL, *LARGER])
def test_a_packed_model_answers_as_the_model_does(device: TorchDevice, name: str) -> None:
    if name in LARGER:
        source = LARGER[name]()
        made = zoo.packed(source)
        graph, blobs = made.bundle.graph, {digest: bytes(content) for digest, content in made.blobs}
    else:
        source, bundle, blobs = zoo.stored(name)
        graph = bundle.graph
    lowered = lower(graph, device.packed_bytes)
    assert {node.op for node in lowered.graph.nodes} >= OPERATORS.get(name, set())
    if lowered.graph is not graph:
        assert len(lowered.graph.nodes) <= len(graph.nodes)
    base = [device.new_weight(weight, filler(blobs[weight.digest])) for weight in graph.weights]
    before = device.memory()["weight_bytes"]
    handles = load(device, lowered, blobs)
    assert device.memory()["weight_bytes"] - before == sum(weight.size_bytes for weight in lowered.graph.weights)

    inputs = list(source.inputs.values()) if isinstance(source.inputs, dict) else list(source.inputs)
    plain, program = device.prepare(graph), device.prepare_lowered(lowered.graph)
    for batch in (1, 2, 5):
        given = resized(inputs, batch)
        kept = [tensor.clone() for tensor in given]
        answer = device.run(program, handles, given)
        assert_close(answer, device.run(plain, base, given))
        assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))
        again = device.run(program, handles, given)
        assert all(torch.equal(one, other) for one, other in zip(answer, again, strict=True))


# --- single layers --------------------------------------------------------------------------------------------------


class Maker:
    """A graph of two inputs, written node by node, with its weights' bytes."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.nodes: list[Node] = []
        self.weights: list[Weight] = []
        self.blobs: Blobs = {}

    def weight(self, tensor: torch.Tensor) -> Value:
        content = tensor.contiguous().numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()
        self.blobs[digest] = content
        self.weights.append(Weight(digest, "float32", tuple(tensor.shape), len(content), 0))
        return Value("weight", len(self.weights) - 1)

    def add(self, op: str, *args: Argument, **kwargs: Argument) -> Value:
        self.nodes.append(Node(f"aten.{op}", args, tuple(sorted(kwargs.items())), f"model.py:{len(self.nodes)}"))
        return Value("node", len(self.nodes) - 1)

    def norm(self, source: Value, channels: int, absent: tuple[int, ...] = ()) -> Value:
        parts = (torch.rand(channels) + 0.5, torch.randn(channels), torch.randn(channels), torch.rand(channels) + 0.1)
        given = [None if place in absent else self.weight(part) for place, part in enumerate(parts)]
        return self.add("batch_norm.default", source, *given, False, 0.1, 1e-3, True)

    def both(self, device: TorchDevice, *results: Value) -> Any:
        """Return two functions of inputs, the model as it is and packed, and the lowered graph."""
        specs = tuple(TensorSpec(name, "float32", ()) for name in "xy")
        outputs = tuple(TensorSpec(f"o{number}", "float32", ()) for number in range(len(results)))
        graph = Graph((), specs, outputs, tuple(self.weights), tuple(self.nodes), results)
        lowered = lower(graph, device.packed_bytes)
        base = [device.new_weight(weight, filler(self.blobs[weight.digest])) for weight in self.weights]
        handles = load(device, lowered, self.blobs)
        plain, program = device.prepare(graph), device.prepare_lowered(lowered.graph)
        unused = torch.zeros(1)
        return (
            lambda x, y=unused: device.run(plain, base, [x, y]),
            lambda x, y=unused: device.run(program, handles, [x, y]),
            lowered.graph,
        )


PLANS = [
    # channels in, channels out, kernel, stride, padding, dilation, groups
    (16, 32, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (16, 32, (1, 1), (2, 2), (0, 0), (1, 1), 1),
    (32, 32, (3, 5), (2, 1), (1, 2), (1, 1), 32),
    (32, 64, (3, 3), (1, 2), (2, 2), (2, 2), 2),
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
@pytest.mark.parametrize("absent", [(), (0,), (1,), (0, 1), None], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_with_and_without_norm(device: TorchDevice, plan: Any, absent: tuple[int, ...] | None, bias: bool) -> None:
    inside, outside, kernel, stride, padding, dilation, groups = plan
    make = Maker()
    weight = make.weight(torch.randn(outside, inside // groups, *kernel))
    held = make.weight(torch.randn(outside)) if bias else None
    out = make.add("conv2d.default", X, weight, held, stride, padding, dilation, groups)
    out = make.add("relu.default", out if absent is None else make.norm(out, outside, absent))
    plain, program, graph = make.both(device, out)
    assert [node.op for node in graph.nodes] == [CONV2D]
    for shape in ((1, inside, 9, 12), (3, inside, 16, 11), (inside, 9, 12)):
        x = torch.randn(shape)
        if len(shape) == 4 or absent is None:  # a norm wants a batch
            assert_close(program(x), plain(x))


@pytest.mark.parametrize("margins", [(1, 1, 1, 1), (2, 2, 0, 0), (0, 1, 0, 1), (1, 2, 1, 2), (2, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", [0, 1])
def test_padding_is_taken_in(device: TorchDevice, margins: tuple[int, ...], groups: int, stride: int, padding: int) -> None:
    make = Maker()
    padded = make.add("pad.default", X, margins)
    out = make.add("conv2d.default", padded, make.weight(torch.randn(32, 32 // groups, 3, 3)), None, stride, padding, 1, groups)
    plain, program, graph = make.both(device, make.add("add.Tensor", make.norm(out, 32), Y))
    alike = margins[0] == margins[1] and margins[2] == margins[3]
    # A kernel that would grow too much is not widened either.
    taken_in = alike or (groups == 32 and margins != (2, 0, 0, 1))
    assert [node.op for node in graph.nodes] == ([CONV2D] if taken_in else ["aten.pad.default", CONV2D])
    for size in (9, 14):
        x = torch.randn(2, 32, size, size + 1)
        y = torch.randn(plain(x)[0].shape)
        assert_close(program(x, y), plain(x, y))


ACTIVATIONS: list[tuple[str, tuple[Argument, ...]]] = [
    ("relu", ()),
    ("relu6", ()),
    ("hardtanh", (-0.5, 2.0)),
    ("leaky_relu", (0.2,)),
    ("silu", ()),
    ("sigmoid", ()),
    ("tanh", ()),
    ("hardswish", ()),
    ("hardsigmoid", ()),
    ("gelu", ()),
]


@pytest.mark.parametrize(("name", "args"), ACTIVATIONS)
@pytest.mark.parametrize("kind", ["conv2d", "linear"])
def test_activations_agree(device: TorchDevice, kind: str, name: str, args: tuple[Argument, ...]) -> None:
    make = Maker()
    if kind == "conv2d":
        out, shape = make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3) * 0.05)), (2, 16, 8, 8)
    else:
        out, shape = make.add("linear.default", X, make.weight(torch.randn(1024, 512) * 0.05)), (2, 3, 512)
    plain, program, graph = make.both(device, make.add(f"{name}.default", out, *args))
    assert len(graph.nodes) == 1
    for scale in (0.01, 1.0, 10.0):
        x = torch.randn(shape) * scale
        assert_close(program(x), plain(x))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 6, 6), (1, 16, 6, 6), (16, 1, 1), (2, 1, 6, 6), (1,), (3, 1, 16, 6, 6)], ids=str)
def test_a_residual_of_any_shape_is_added_and_left_as_it_was(
    device: TorchDevice, shape: tuple[int, ...], relu: bool, swapped: bool
) -> None:
    make = Maker()
    out = make.add("conv2d.default", X, make.weight(torch.randn(16, 8, 3, 3)), None, (1, 1), (1, 1))
    out = make.add("add.Tensor", *((Y, out) if swapped else (out, Y)))
    plain, program, graph = make.both(device, make.add("relu.default", out) if relu else out)
    assert len(graph.nodes) == 1
    x, y = torch.randn(2 if len(shape) < 5 else 1, 8, 6, 6), torch.randn(shape)
    for given in (y, y.double(), y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y):
        kept = given.clone()
        assert_close(program(x, given), plain(x, given))
        assert torch.equal(given, kept)


@pytest.mark.parametrize("shape", [(2, 5, 1024), (1024,), (1, 5, 1024), (4, 2, 5, 1024), (2, 5, 1)], ids=str)
def test_a_linear_layer_adds_what_fits(device: TorchDevice, shape: tuple[int, ...]) -> None:
    make = Maker()
    out = make.add("linear.default", X, make.weight(torch.randn(1024, 512)), make.weight(torch.randn(1024)))
    plain, program, graph = make.both(device, make.add("add.Tensor", Y, out))
    assert [node.op for node in graph.nodes] == [LINEAR]
    x, y = torch.randn(2, 5, 512), torch.randn(shape)
    kept = y.clone()
    assert_close(program(x, y), plain(x, y))
    assert_close(program(x.transpose(0, 1).contiguous().transpose(0, 1), y), plain(x, y))
    assert torch.equal(y, kept)


def test_a_view_of_a_packed_result_is_legal(device: TorchDevice) -> None:
    make = Maker()
    out = make.add("conv2d.default", X, make.weight(torch.randn(16, 8, 3, 3)))
    plain, program, _ = make.both(device, make.add("view.default", out, (2, 256)))
    x = torch.randn(2, 8, 6, 6)
    assert_close(program(x), plain(x))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.randn(1, 8, 6, 6),
        torch.randn(1, 32, 6, 6),
        torch.randn(1, 16, 2, 2),
        torch.randn(1, 16, 6, 6).double(),
        torch.randn(1, 16, 6, 6).bfloat16(),
        torch.randn(4, 4),
    ],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_an_input_that_does_not_fit_is_a_fault_with_its_place(device: TorchDevice, wrong: torch.Tensor) -> None:
    make = Maker()
    plain, program, _ = make.both(device, make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3))))
    with pytest.raises(DeviceFault):
        plain(wrong)
    with pytest.raises(DeviceFault, match=r"packed.conv2d \(node 0, model.py:0\) failed"):
        program(wrong)


@pytest.mark.parametrize("rows", [512, 64], ids=["blocked", "transposed"])
@pytest.mark.parametrize("wrong", [torch.randn(2, 1023), torch.randn(2, 1024).double(), torch.randn(2, 1024).bfloat16()])
def test_a_linear_input_that_does_not_fit_is_a_fault(device: TorchDevice, rows: int, wrong: torch.Tensor) -> None:
    make = Maker()
    _, program, _ = make.both(device, make.add("linear.default", X, make.weight(torch.randn(rows, 1024))))
    assert program(torch.randn(2, 1024))[0].shape == (2, rows)
    assert program(torch.randn(1024))[0].shape == (rows,)
    assert program(torch.randn(0, 1024))[0].shape == (0, rows)
    with pytest.raises(DeviceFault, match=r"linear \(node 0, model.py:0\) failed"):
        program(wrong)


# --- handles --------------------------------------------------------------------------------------------------------


def one_recipe(device: TorchDevice, size: int = 16) -> Any:
    make = Maker()
    out = make.norm(make.add("conv2d.default", X, make.weight(torch.randn(size, size, 3, 3))), size)
    graph = Graph(
        (), (TensorSpec("x", "float32", ()),), (TensorSpec("y", "float32", ()),), tuple(make.weights), tuple(make.nodes), (out,)
    )
    (recipe,) = lower(graph, device.packed_bytes).recipes.values()
    return recipe, make.blobs


def test_packed_bytes_follow_the_handle(device: TorchDevice) -> None:
    recipe, blobs = one_recipe(device)
    before = device.memory()["weight_bytes"]
    handle = device.new_packed(recipe, [filler(blobs[source.digest]) for source in recipe.sources])
    assert device.memory()["weight_bytes"] - before == device.packed_bytes(recipe)
    del handle
    gc.collect()
    assert device.memory()["weight_bytes"] == before


def test_what_a_fill_raises_passes_through(device: TorchDevice) -> None:
    recipe, _ = one_recipe(device)

    def fail(target: memoryview) -> None:
        raise OSError("no such blob")

    before = device.memory()["weight_bytes"]
    with pytest.raises(OSError, match="no such blob"):
        device.new_packed(recipe, [fail] * len(recipe.sources))
    assert device.memory()["weight_bytes"] == before


def test_without_memory_a_fault_names_the_size(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, blobs = one_recipe(device)

    def no_memory(*arguments: object) -> packed.Packed:
        raise RuntimeError("not enough memory")

    monkeypatch.setattr(packed, "pack", no_memory)
    with pytest.raises(DeviceFault, match="no room"):
        device.new_packed(recipe, [filler(blobs[source.digest]) for source in recipe.sources])
    monkeypatch.undo()
    first = dataclasses.replace(recipe.sources[0], size_bytes=1 << 60, shape=(1 << 58,))
    with pytest.raises(DeviceFault, match=f"no room for a weight of {1 << 60} bytes"):
        device.new_packed(dataclasses.replace(recipe, sources=(first, *recipe.sources[1:])), [filler(b"")] * len(recipe.sources))


def test_sizes_are_measured_once_per_skeleton(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, _ = one_recipe(device)
    expected = device.packed_bytes(recipe)
    monkeypatch.setattr(packed, "pack", None)
    other = dataclasses.replace(recipe.sources[0], digest="11" * 32)
    assert device.packed_bytes(dataclasses.replace(recipe, sources=(other, *recipe.sources[1:]))) == expected
    assert expected >= math.prod(recipe.sources[0].shape) * 4


@pytest.mark.parametrize("op", [CONV2D, LINEAR, TURNED_LINEAR])
def test_a_bundle_with_a_packed_operator_is_refused(device: TorchDevice, op: str) -> None:
    spec = (TensorSpec("x", "float32", ()),)
    graph = Graph((), spec, spec, (), (Node(op, (X, X)),), (Value("node", 0),))
    with pytest.raises(BundleError, match="is not allowed in a bundle"):
        device.prepare(graph)


def test_a_torch_without_the_operators_packs_nothing(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_NAMES", (*packed._NAMES, "_of_tomorrow"))
    packed.available.cache_clear()
    try:
        assert not device.can_pack
    finally:
        monkeypatch.undo()
        packed.available.cache_clear()
