"""Models asked together: each input once, all outputs, and no input that means two things."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from trunkline.errors import InvalidInput
from trunkline.protocol import TensorSpec

from sidecar.ir import Argument, Graph, Node, Symbol, Value, Weight
from sidecar.merkle import Tokens
from sidecar.together import join

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


def test_an_input_of_all_is_taken_once_and_all_outputs_are_given() -> None:
    joint = join({"age": headed(b"age"), "gender": headed(b"gender", batch="rows", name="face")})
    assert joint.inputs == headed(b"age").inputs
    assert [(spec.name, spec.shape) for spec in joint.outputs] == [("age/y", ("batch", 3)), ("gender/y", ("batch", 3))]


def test_inputs_are_called_what_stages_call_them() -> None:
    for graph in (headed(b"age"), headed(b"gender", batch="rows", name="face")):
        identities = Tokens().identify(graph)
        assert join({"one": graph}).values == tuple(identity.value for identity in identities.inputs)


def test_what_only_one_takes_is_taken_too() -> None:
    mask = TensorSpec("mask", "int64", ("batch", 3), 0, 1)
    with_mask = replace(graph(op("mul.Tensor", X, Y)), inputs=(*headed(b"a").inputs, mask))
    joint = join({"a": headed(b"a"), "b": with_mask})
    assert [spec.name for spec in joint.inputs] == ["x", "mask"]


def test_bounds_are_those_that_suit_all() -> None:
    one = replace(headed(b"a"), inputs=(TensorSpec("ids", "int64", ("batch",), 0, 99),))
    two = replace(headed(b"b"), inputs=(TensorSpec("ids", "int64", ("batch",), 5, None),), symbols=(Symbol("batch", 2, 8),))
    joint = join({"one": one, "two": two})
    assert joint.inputs == (TensorSpec("ids", "int64", ("batch",), 5, 99),)
    assert joint.symbols == (Symbol("batch", 2, 8),)


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
        join({"a": ONE, "b": other})


def test_where_names_and_places_disagree_nothing_is_guessed() -> None:
    x, y = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("y", "float32", ("batch", 3))
    minus = replace(graph(op("sub.Tensor", X, Y)), inputs=(x, y))
    swapped = replace(graph(op("sub.Tensor", Y, X)), inputs=(y, x))
    only_y = replace(graph(op("relu.default", X)), inputs=(y,))
    other = replace(minus, inputs=(replace(x, name="first"), replace(y, name="second")))
    for graphs in ({"a": minus, "b": swapped}, {"a": minus, "b": only_y}, {"a": only_y, "b": minus}):
        with pytest.raises(InvalidInput, match="means another input by"):
            join(graphs)
    # Names that have nothing to do with each other leave the place to decide.
    assert len(join({"a": minus, "b": other}).inputs) == 2


def test_the_order_of_inputs_does_not_untie_their_sizes() -> None:
    x, z = TensorSpec("x", "float32", ("batch", 3)), TensorSpec("z", "float32", ("batch", 7))
    both = replace(graph(op("relu.default", Y)), inputs=(z, x))
    for graphs in ({"a": headed(b"a"), "b": both}, {"a": both, "b": headed(b"a")}):
        assert {spec.shape[0] for spec in join(graphs).inputs} == {"batch"}


def test_sizes_that_are_tied_otherwise_are_refused() -> None:
    free = replace(
        graph(op("mul.Tensor", X, Y)),
        symbols=(Symbol("a", 1, 9), Symbol("b", 1, 9)),
        inputs=(TensorSpec("x", "float32", ("a", 3)), TensorSpec("z", "float32", ("b", 3))),
    )
    tied = replace(free, symbols=(Symbol("n", 1, 9),), inputs=tuple(replace(s, shape=("n", 3)) for s in free.inputs))
    with pytest.raises(InvalidInput, match="ties the sizes"):
        join({"free": free, "tied": tied})
    # The other way round the first one's tie holds for both.
    assert [spec.shape for spec in join({"tied": tied, "x": free}).inputs] == [("n", 3), ("n", 3)]


def test_integers_no_value_of_which_suits_all_are_refused() -> None:
    one = replace(ONE, inputs=(TensorSpec("ids", "int64", ("batch",), 0, 5),))
    two = replace(ONE, inputs=(TensorSpec("ids", "int64", ("batch",), 6, 9),))
    with pytest.raises(InvalidInput, match="no value of ids"):
        join({"one": one, "two": two})


def test_symbols_of_other_inputs_keep_apart() -> None:
    mask = replace(
        graph(op("neg.default", X)), inputs=(TensorSpec("mask", "int64", ("batch",)),), symbols=(Symbol("batch", 1, 4),)
    )
    joint = join({"a": ONE, "b": mask})
    assert joint.symbols == (Symbol("batch", 1, 64), Symbol("batch_2", 1, 4))
    assert joint.inputs[1].shape == ("batch_2",)


def test_too_many_outputs_are_refused() -> None:
    many = replace(ONE, outputs=tuple(TensorSpec(f"y{n}", "float32", (3,)) for n in range(9)), results=(Value("node", 2),) * 9)
    with pytest.raises(InvalidInput, match="18 outputs together, one call has at most 16"):
        join({"a": many, "b": many})
