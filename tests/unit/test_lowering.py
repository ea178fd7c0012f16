"""Lowering: what is folded into convolutions and linear layers, what must not be, and how packed weights are named."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from hashlib import sha256

import pytest
from trunkline.protocol import TensorSpec

from sidecar.ir import Argument, Enum, Graph, Node, Value, Weight
from sidecar.lowering import CONV2D, LARGEST_LINEAR_BYTES, LINEAR, TURNED_LINEAR, Lowered, Recipe, lower
from tests.waiting import PATIENCE_S

X = Value("input", 0)
Y = Value("input", 1)


def node(number: int, item: int | None = None) -> Value:
    return Value("node", number, item)


class Maker:
    """Writes a graph node by node; weights are named by a letter, on which their digest depends."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.weights: list[Weight] = []

    def weight(self, letter: str, *shape: int, dtype: str = "float32") -> Value:
        made = Weight(sha256(letter.encode()).hexdigest(), dtype, shape, 4 * math.prod(shape), 0)
        if made not in self.weights:
            self.weights.append(made)
        return Value("weight", self.weights.index(made))

    def add(self, op: str, *args: Argument, origin: str = "", **kwargs: Argument) -> Value:
        self.nodes.append(Node(f"aten.{op}", args, tuple(sorted(kwargs.items())), origin))
        return node(len(self.nodes) - 1)

    def conv(self, source: Value, letter: str = "w", *rest: Argument) -> Value:
        return self.add("conv2d.default", source, self.weight(letter, 16, 16, 3, 3), *(rest or (None, (1, 1), (1, 1))))

    def norm(self, source: Value, letter: str = "n", training: bool = False, channels: int = 16) -> Value:
        parts = (self.weight(f"{letter}{part}", channels) for part in range(4))
        return self.add("batch_norm.default", source, *parts, training, 0.1, 1e-5, True)

    def graph(self, *results: Value) -> Graph:
        inputs = tuple(TensorSpec(f"x{number}", "float32", ()) for number in range(2))
        outputs = tuple(TensorSpec(f"y{number}", "float32", ()) for number in range(len(results)))
        return Graph((), inputs, outputs, tuple(self.weights), tuple(self.nodes), results)


@pytest.fixture
def make() -> Maker:
    return Maker()


def size(recipe: Recipe) -> int:
    return recipe.sources[0].size_bytes + 1


def ops(lowered: Lowered) -> list[str]:
    return [node.op.removeprefix("aten.") for node in lowered.graph.nodes]


def only_recipe(lowered: Lowered) -> Recipe:
    (recipe,) = lowered.recipes.values()
    return recipe


def test_lowering_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport sidecar.lowering"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)}, timeout=PATIENCE_S)


# --- what is folded -------------------------------------------------------------------------------------------------


def test_a_convolution_takes_in_norm_and_activation(make: Maker) -> None:
    out = make.add("relu.default", make.norm(make.conv(X)))
    lowered = lower(make.graph(out), size)
    recipe = only_recipe(lowered)
    assert recipe.roles == ("weight", "norm weight", "norm bias", "norm mean", "norm variance")
    assert dict(recipe.options) == {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "epsilon": 1e-5}
    assert lowered.graph.nodes == (Node(CONV2D, (X, Value("weight", 0), Enum("relu"), (), None)),)
    assert lowered.graph.weights == (Weight(recipe.digest, f"packed {recipe.skeleton}", (), size(recipe), 0),)
    assert lowered.graph.results == (node(0),)


def test_a_residual_is_added_by_the_later_convolution(make: Maker) -> None:
    first = make.norm(make.conv(X, "a"), "m")
    second = make.norm(make.conv(X, "b"), "n")
    out = make.add("relu.default", make.add("add.Tensor", second, first))
    lowered = lower(make.graph(out), size)
    assert [one.op for one in lowered.graph.nodes] == [CONV2D, CONV2D]
    assert lowered.graph.nodes[0].args[2:] == (Enum("none"), (), None)
    assert lowered.graph.nodes[1].args[2:] == (Enum("relu"), (), node(0))


def test_a_fused_node_stands_where_its_last_part_stood(make: Maker) -> None:
    early = make.conv(X)
    other = make.add("abs.default", X)
    out = make.add("add.Tensor", other, early)
    lowered = lower(make.graph(out, other), size)
    assert ops(lowered) == ["abs.default", CONV2D]
    assert lowered.graph.nodes[1].args[4] == node(0)
    assert lowered.graph.results == (node(1), node(0))


@pytest.mark.parametrize(
    ("op", "args", "kwargs", "word", "numbers"),
    [
        ("relu.default", (), {}, "relu", ()),
        ("relu6.default", (), {}, "hardtanh", (0.0, 6.0)),
        ("hardtanh.default", (0, 6), {}, "hardtanh", (0.0, 6.0)),
        ("hardtanh.default", (), {}, "hardtanh", (-1.0, 1.0)),
        ("silu.default", (), {}, "swish", ()),
        ("gelu.default", (), {}, "gelu", ()),
        ("gelu.default", (), {"approximate": Enum("tanh")}, "gelu_tanh", ()),
        ("leaky_relu.default", (0.2,), {}, "leaky_relu", (0.2,)),
    ],
)
def test_activations(
    make: Maker, op: str, args: tuple[Argument, ...], kwargs: dict[str, Argument], word: str, numbers: tuple[float, ...]
) -> None:
    out = make.add(op, make.conv(X), *args, **kwargs)
    (only,) = lower(make.graph(out), size).graph.nodes
    assert only.args[2:4] == (Enum(word), numbers)


def test_linear_layers_are_packed_by_their_size(make: Maker) -> None:
    small = make.add("gelu.default", make.add("linear.default", X, make.weight("s", 64, 64), make.weight("b", 64)))
    large = make.add("gelu.default", make.add("linear.default", X, make.weight("l", 1024, 1024)))
    side = LARGEST_LINEAR_BYTES // 4 // 1024
    largest = make.add("linear.default", X, make.weight("L", side + 1, 1024))
    lowered = lower(make.graph(small, large, largest), size)
    assert ops(lowered) == [TURNED_LINEAR, "gelu.default", LINEAR, "linear.default"]
    assert {(recipe.roles, recipe.options) for recipe in lowered.recipes.values()} == {
        (("weight", "bias"), (("layout", "transposed"),)),
        (("weight",), (("layout", "blocked"),)),
    }


def test_a_plain_convolution_operator_is_packed(make: Maker) -> None:
    weight = make.weight("w", 16, 1, 3, 3)
    out = make.add("convolution.default", X, weight, None, (2,), (1,), (1,), False, (0,), 16, origin="model.py:3 self.stem")
    lowered = lower(make.graph(out), size)
    assert dict(only_recipe(lowered).options) == {"stride": (2, 2), "padding": (1, 1), "dilation": (1, 1), "groups": 16}
    assert lowered.graph.nodes[0].origin == "model.py:3 self.stem"


def test_the_norms_of_equal_bytes_are_one_weight_and_still_fold(make: Maker) -> None:
    one = make.norm(make.conv(X, "a"))
    out = make.norm(make.conv(one, "b"))
    assert ops(lower(make.graph(out), size)) == [CONV2D, CONV2D]


def test_an_item_of_a_node_moves_with_it(make: Maker) -> None:
    folded = make.norm(make.conv(X))
    out = make.add("max.dim", folded, 1)
    lowered = lower(make.graph(node(out.index, 1)), size)
    assert lowered.graph.results == (node(1, 1),)
    assert lowered.graph.nodes[1].args == (node(0), 1)


# --- what is not ----------------------------------------------------------------------------------------------------


def test_a_result_on_the_way_is_kept(make: Maker) -> None:
    plain = make.conv(X)
    normed = make.norm(plain)
    out = make.add("relu.default", normed)
    assert ops(lower(make.graph(out, plain), size)) == [CONV2D, "batch_norm.default", "relu.default"]
    assert ops(lower(make.graph(out, normed), size)) == [CONV2D, "relu.default"]


def test_a_result_with_two_users_is_kept(make: Maker) -> None:
    normed = make.norm(make.conv(X))
    out = make.add("mul.Tensor", make.add("relu.default", normed), normed)
    assert ops(lower(make.graph(out), size)) == [CONV2D, "relu.default", "mul.Tensor"]


@pytest.mark.parametrize("kwargs", [{"alpha": 2}, {"alpha": 1.0}, {"out": None}])
def test_other_additions_are_kept(make: Maker, kwargs: dict[str, Argument]) -> None:
    out = make.add("add.Tensor", make.conv(X), Y, **kwargs)
    assert ops(lower(make.graph(out), size)) == [CONV2D, "add.Tensor"]


@pytest.mark.parametrize("other", [1, 2.5, "size", "itself"])
def test_what_is_added_must_be_another_tensor(make: Maker, other: object) -> None:
    made = make.conv(X)
    extent = make.add("sym_size.int", X, 0)
    added = {"size": extent, "itself": made}.get(other, other) if isinstance(other, str) else other
    out = make.add("add.Tensor", made, added)  # type: ignore[arg-type]
    assert "add.Tensor" in ops(lower(make.graph(out, extent), size))


def test_after_an_addition_only_a_relu_is_taken_in(make: Maker) -> None:
    out = make.add("silu.default", make.add("add.Tensor", make.conv(X), Y))
    assert ops(lower(make.graph(out), size)) == [CONV2D, "silu.default"]


def test_a_norm_that_trains_or_has_other_channels_is_kept(make: Maker) -> None:
    training = make.norm(make.conv(X, "a"), "m", training=True)
    other = make.norm(make.conv(X, "b"), "n", channels=8)
    kept = ops(lower(make.graph(training, other), size))
    assert kept == [CONV2D, "batch_norm.default", CONV2D, "batch_norm.default"]


def test_a_shared_weight_stays_as_it_is(make: Maker) -> None:
    tied = make.weight("t", 64, 64)
    out = make.add("linear.default", make.add("embedding.default", tied, X), tied)
    graph = make.graph(out)
    lowered = lower(graph, size)
    assert lowered.graph is graph
    assert not lowered.recipes


def test_a_weight_that_is_a_result_stays_as_it_is(make: Maker) -> None:
    weight = make.weight("w", 64, 64)
    graph = make.graph(make.add("linear.default", X, weight), weight)
    assert lower(graph, size).graph is graph


@pytest.mark.parametrize(
    "args",
    [
        (None, (0, 1)),  # a stride of nothing
        (None, (1, 1), (-1, -1)),
        (None, (1, 1), (1, 1), (1, 1), 3),  # groups that do not divide
        (None, (1, 1, 1)),
        (None, (1, node(0))),
        (X,),  # a bias that is computed
    ],
)
def test_a_convolution_that_is_odd_or_wrong_is_left_alone(make: Maker, args: tuple[Argument, ...]) -> None:
    make.add("sym_size.int", X, 0)
    graph = make.graph(make.add("conv2d.default", X, make.weight("w", 16, 16, 3, 3), *args))
    assert lower(graph, size).graph is graph


def test_other_dtypes_and_dimensions_are_left_alone(make: Maker) -> None:
    half = make.add("linear.default", X, make.weight("h", 64, 64, dtype="float16"))
    three = make.add("convolution.default", X, make.weight("3", 4, 4, 3, 3, 3), None, 1, 1, 1, False, 0, 1)
    turned = make.add("convolution.default", X, make.weight("2", 4, 4, 3, 3), None, 1, 1, 1, True, 0, 1)
    graph = make.graph(half, three, turned)
    assert lower(graph, size).graph is graph


def test_what_would_grow_is_left_alone(make: Maker) -> None:
    graph = make.graph(make.norm(make.conv(X)))
    assert lower(graph, lambda recipe: 2 * size(recipe)).graph is graph


@pytest.mark.parametrize(
    ("args", "taken_in"),
    [
        (((1, 1, 1, 1),), True),
        (((1, 1, 1, 1), Enum("constant"), 0.0), True),
        (((1, 1, 1, 1), Enum("constant"), 1.0), False),
        (((1, 1, 1, 1), Enum("reflect")), False),
        (((1, 1, 1, -1),), False),
        (((1, 1),), False),
        (((0, 1, 0, 1),), False),  # sides that differ, and channels that mix
    ],
)
def test_padding_with_zeros_is_taken_in(make: Maker, args: tuple[Argument, ...], taken_in: bool) -> None:
    lowered = lower(make.graph(make.conv(make.add("pad.default", X, *args))), size)
    assert ops(lowered) == ([CONV2D] if taken_in else ["pad.default", CONV2D])
    assert dict(only_recipe(lowered).options)["padding"] == ((2, 2) if taken_in else (1, 1))


def test_padding_that_others_take_stays(make: Maker) -> None:
    padded = make.add("pad.default", X, (1, 1, 1, 1))
    assert ops(lower(make.graph(make.conv(padded), padded), size)) == ["pad.default", CONV2D]


# --- names ----------------------------------------------------------------------------------------------------------


def folded(letter: str = "w", stride: int = 1, first: str = "") -> Recipe:
    made = Maker()
    extra = [made.add("abs.default", made.weight(first, 3))] if first else []
    out = made.norm(made.add("conv2d.default", X, made.weight(letter, 16, 16, 3, 3), None, stride), "n")
    return only_recipe(lower(made.graph(*extra, out), size))


def test_equal_content_has_one_name() -> None:
    assert folded().digest == folded(first="q").digest
    assert folded().digest != folded("v").digest
    assert folded().digest != folded(stride=2).digest
    assert folded().skeleton == folded("v").skeleton
    assert folded().skeleton != folded(stride=2).skeleton
    assert folded().skeleton != folded().digest


def test_every_field_counts() -> None:
    recipe = folded()
    names = {recipe.digest}
    names.add(dataclasses.replace(recipe, kind="linear").digest)
    names.add(dataclasses.replace(recipe, roles=("bias", *recipe.roles[1:])).digest)
    names.add(dataclasses.replace(recipe, sources=recipe.sources[::-1]).digest)
    names.add(dataclasses.replace(recipe, options=recipe.options[1:]).digest)
    for change in ({"dtype": "float16"}, {"shape": (16, 16, 9, 1)}, {"digest": "00" * 32}):
        first = dataclasses.replace(recipe.sources[0], **change)  # type: ignore[arg-type]
        names.add(dataclasses.replace(recipe, sources=(first, *recipe.sources[1:])).digest)
    assert len(names) == 8


def test_names_are_those_of_the_first_day() -> None:
    assert folded().digest == "48973261354ff46a5bbc742c2f22870e2e5886f4b23f38244e35fbac08231f29"
    assert folded().skeleton == "b527fd46ce5f3e6b0e5d9ad55ac1eb2c47413dda6f68659b6f90704b24432033"
