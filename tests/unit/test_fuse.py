"""Several graphs as one: everything equal once, all outputs, and no input that means two things."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline.errors import InvalidInput
from trunkline.protocol import TensorSpec

from sidecar.fuse import fuse
from sidecar.graphfile import canonical_graph, parse_graph
from sidecar.ir import Argument, Graph, Node, Symbol, Value, Weight, node_values

X, Y = Value("input", 0), Value("input", 1)


def weight(content: bytes) -> Weight:
    return Weight(hashlib.sha256(content).hexdigest(), "float32", (1,), 4, 0)


def graph(*nodes: Node, weights: tuple[bytes, ...] = (b"trunk", b"head"), batch: str = "batch", name: str = "x") -> Graph:
    return Graph(
        symbols=(Symbol(batch, 1, 64),),
        inputs=(TensorSpec(name, "float32", (batch, 3)),),
        outputs=(TensorSpec("y", "float32", (batch, 3)),),
        weights=tuple(map(weight, weights)),
        nodes=nodes,
        results=(Value("node", len(nodes) - 1),),
    )


def op(name: str, *args: Argument) -> Node:
    return Node(f"aten.{name}", args, (), "test")


def headed(head: bytes, **changed: str) -> Graph:
    return graph(
        op("mul.Tensor", X, Value("weight", 0)),
        op("relu.default", Value("node", 0)),
        op("add.Tensor", Value("node", 1), Value("weight", 1)),
        weights=(b"trunk", head),
        **changed,  # type: ignore[arg-type]
    )


def test_a_common_trunk_is_computed_once() -> None:
    fused = fuse({"age": headed(b"age"), "gender": headed(b"gender", batch="rows", name="face")})
    assert [node.op for node in fused.nodes] == ["aten.mul.Tensor", "aten.relu.default", "aten.add.Tensor", "aten.add.Tensor"]
    assert fused.weights == (weight(b"trunk"), weight(b"age"), weight(b"gender"))
    assert fused.inputs == headed(b"age").inputs
    assert [(spec.name, spec.shape) for spec in fused.outputs] == [("age/y", ("batch", 3)), ("gender/y", ("batch", 3))]
    assert fused.results == (Value("node", 2), Value("node", 3))
    assert fused.nodes[3].args == (Value("node", 1), Value("weight", 2))


def test_a_fused_graph_is_a_graph_like_any_other() -> None:
    fused = fuse({"age": headed(b"age"), "gender": headed(b"gender")})
    named = replace(fused, outputs=tuple(replace(spec, name=spec.name.replace("/", ".")) for spec in fused.outputs))
    assert parse_graph(canonical_graph(named)) == named


def test_one_graph_under_two_names_is_one() -> None:
    fused = fuse({"a": headed(b"h"), "b": headed(b"h")})
    assert len(fused.nodes) == 3
    assert fused.results == (Value("node", 2), Value("node", 2))


def test_what_only_one_takes_is_taken_too() -> None:
    mask = TensorSpec("mask", "int64", ("batch", 3), 0, 1)
    with_mask = replace(graph(op("mul.Tensor", X, Y)), inputs=(*headed(b"a").inputs, mask))
    fused = fuse({"a": headed(b"a"), "b": with_mask})
    assert [spec.name for spec in fused.inputs] == ["x", "mask"]
    assert fused.nodes[-1].args == (X, Y)


def test_bounds_are_those_that_suit_all() -> None:
    one = replace(headed(b"a"), inputs=(TensorSpec("ids", "int64", ("batch",), 0, 99),))
    two = replace(headed(b"b"), inputs=(TensorSpec("ids", "int64", ("batch",), 5, None),), symbols=(Symbol("batch", 2, 8),))
    fused = fuse({"one": one, "two": two})
    assert fused.inputs == (TensorSpec("ids", "int64", ("batch",), 5, 99),)
    assert fused.symbols == (Symbol("batch", 2, 8),)


ONE = headed(b"a")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (replace(ONE, symbols=(Symbol("batch", 65, 70),)), "takes batch from 65 to 70, the others from 1 to 64"),
        (replace(ONE, inputs=(TensorSpec("x", "float32", (3,)),)), "means another input by x"),
        (replace(ONE, outputs=(TensorSpec("y" * 127, "float32", (3,)),)), "name of 129 characters"),
    ],
)
def test_graphs_that_cannot_be_asked_together_are_refused(other: Graph, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        fuse({"a": ONE, "b": other})


def test_where_names_and_places_disagree_nothing_is_guessed() -> None:
    x, y = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch", 3))
    minus = replace(graph(op("sub.Tensor", X, Y)), inputs=(x, y))
    swapped = replace(graph(op("sub.Tensor", Y, X)), inputs=(y, x))
    only_y = replace(graph(op("relu.default", X)), inputs=(y,))
    other = replace(minus, inputs=(replace(x, name="first"), replace(y, name="second")))
    for graphs in ({"a": minus, "b": swapped}, {"a": minus, "b": only_y}, {"a": only_y, "b": minus}):
        with pytest.raises(InvalidInput, match="means another input by"):
            fuse(graphs)
    # Names that have nothing to do with each other leave the place to decide.
    assert len(fuse({"a": minus, "b": other}).nodes) == 1


def test_the_order_of_inputs_does_not_untie_their_sizes() -> None:
    x, z = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("z", "float32", ("batch", 7))
    both = replace(graph(op("relu.default", Y)), inputs=(z, x))
    for graphs in ({"a": headed(b"a"), "b": both}, {"a": both, "b": headed(b"a")}):
        assert {spec.shape[0] for spec in fuse(graphs).inputs} == {"batch"}


def test_sizes_that_are_tied_otherwise_are_refused() -> None:
    free = replace(
        graph(op("mul.Tensor", X, Y)),
        symbols=(Symbol("a", 1, 9), Symbol("b", 1, 9)),
        inputs=(TensorSpec("x", "float32", ("a", 3)), TensorSpec("z", "float32", ("b", 3))),
    )
    tied = replace(free, symbols=(Symbol("n", 1, 9),), inputs=tuple(replace(s, shape=("n", 3)) for s in free.inputs))
    with pytest.raises(InvalidInput, match="ties the sizes"):
        fuse({"free": free, "tied": tied})
    # The other way round the first one's tie holds for both.
    assert [spec.shape for spec in fuse({"tied": tied, "x": free}).inputs] == [("n", 3), ("n", 3)]


def test_integers_no_value_of_which_suits_all_are_refused() -> None:
    one = replace(ONE, inputs=(TensorSpec("ids", "int64", ("batch",), 0, 5),))
    two = replace(ONE, inputs=(TensorSpec("ids", "int64", ("batch",), 6, 9),))
    with pytest.raises(InvalidInput, match="no value of ids"):
        fuse({"one": one, "two": two})


def test_symbols_of_other_inputs_keep_apart() -> None:
    mask = replace(
        graph(op("neg.default", X)), inputs=(TensorSpec("mask", "int64", ("batch",)),), symbols=(Symbol("batch", 1, 4),)
    )
    fused = fuse({"a": ONE, "b": mask})
    assert fused.symbols == (Symbol("batch", 1, 64), Symbol("batch_2", 1, 4))
    assert fused.inputs[1].shape == ("batch_2",)


def test_too_many_outputs_are_refused() -> None:
    many = replace(ONE, outputs=tuple(TensorSpec(f"y{n}", "float32", (3,)) for n in range(9)), results=(Value("node", 2),) * 9)
    with pytest.raises(InvalidInput, match="18 outputs together, one call has at most 16"):
        fuse({"a": many, "b": many})


# --- random programs --------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> Graph:
    nodes: list[Node] = []
    for number in range(draw(st.integers(1, 8))):
        operands = [X, Value("weight", 0), Value("weight", 1), *(Value("node", earlier) for earlier in range(number))]
        name = draw(st.sampled_from(["add", "mul", "neg"]))
        nodes.append(op(name, *(draw(st.sampled_from(operands)) for _ in range(1 if name == "neg" else 2))))
    contents = tuple(draw(st.sampled_from([b"a", b"b", b"c"])) for _ in range(2))
    return graph(*nodes, weights=contents)


def computed(made: Graph, x: int) -> list[int]:
    """Return the results in integers, weights being numbers made of their digests."""
    numbers = [int(each.digest[:8], 16) for each in made.weights]
    found: list[int] = []
    for each in made.nodes:
        values = [{"input": [x], "weight": numbers, "node": found}[value.kind][value.index] for value in node_values(each)]
        found.append({"add": sum(values), "mul": values[0] * values[-1], "neg": -values[0]}[each.op[5:]] % (2**61 - 1))
    return [found[result.index] for result in made.results]


@given(st.lists(programs(), min_size=1, max_size=4), st.integers(0, 2**32))
def test_the_fused_graph_computes_what_its_parts_do(parts: list[Graph], x: int) -> None:
    fused = fuse({f"m{number}": part for number, part in enumerate(parts)})
    assert computed(fused, x) == [result for part in parts for result in computed(part, x)]
    assert len(fused.nodes) <= sum(len(part.nodes) for part in parts)
    assert fuse({"again": fused}).nodes == fused.nodes
