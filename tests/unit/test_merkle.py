"""Merkle ids: equal for equal computation, different for anything else, the same on every machine."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline.protocol import TensorSpec

from sidecar.ir import Argument, Dtype, Enum, Graph, Node, Symbol, Value, Weight
from sidecar.merkle import CollisionError, Identity, Tokens, skeleton_id

GOLDEN = Path(__file__).parent.parent / "golden" / "merkle" / "v1.json"


def weight(content: bytes, dtype: str = "uint8") -> Weight:
    return Weight(hashlib.sha256(content).hexdigest(), dtype, (len(content),), len(content), 0)


def graph(*nodes: Node, **changed: Any) -> Graph:
    made = Graph(
        symbols=(Symbol("batch", 1, 64),),
        inputs=(TensorSpec("image", "float32", ("batch", 3)),),
        outputs=(TensorSpec("y", "float32", ("batch", 3)),),
        weights=(weight(b"abc"), weight(b"def")),
        nodes=nodes,
        results=(Value("node", len(nodes) - 1),),
    )
    return replace(made, **changed)


def node(op: str, *args: Argument, **kwargs: Argument) -> Node:
    return Node(op, args, tuple(sorted(kwargs.items())), "somewhere")


X, W0, W1 = Value("input", 0), Value("weight", 0), Value("weight", 1)
LINEAR = node("aten.linear.default", X, W0)


def last(made: Graph) -> Identity:
    return Tokens().identify(made).nodes[-1]


def test_names_and_origins_do_not_count() -> None:
    renamed = graph(
        replace(LINEAR, origin="elsewhere"),
        symbols=(Symbol("rows", 2, 9),),
        inputs=(TensorSpec("x", "float32", ("rows", 3), None, None),),
        outputs=(TensorSpec("z", "float32", ("rows", 3)),),
    )
    assert last(renamed) == last(graph(LINEAR))


def test_where_a_weight_stands_does_not_count() -> None:
    swapped = graph(node("aten.linear.default", X, W1), weights=(weight(b"def"), weight(b"abc")))
    assert last(swapped) == last(graph(LINEAR))


def test_other_bytes_are_another_value_of_the_same_structure() -> None:
    one, other = last(graph(LINEAR)), last(graph(node("aten.linear.default", X, W1)))
    assert one.structure == other.structure
    assert one.value != other.value


def test_what_comes_later_or_beside_does_not_count() -> None:
    relu = node("aten.relu.default", Value("node", 0))
    alone = Tokens().identify(graph(LINEAR, relu)).nodes
    beside = Tokens().identify(
        graph(node("aten.tanh.default", X), LINEAR, node("aten.relu.default", Value("node", 1)), node("aten.neg.default", X))
    )
    assert beside.nodes[1:3] == alone
    assert beside.of(Value("node", 2)) == alone[1]
    assert beside.of(W1) == beside.weights[1]


DIFFERENT: dict[str, Graph] = {
    "plain": graph(LINEAR),
    "operator": graph(node("aten.matmul.default", X, W0)),
    "one more argument": graph(node("aten.linear.default", X, W0, None)),
    "order": graph(node("aten.linear.default", W0, X)),
    "int": graph(node("aten.linear.default", X, W0, 1)),
    "float": graph(node("aten.linear.default", X, W0, 1.0)),
    "bool": graph(node("aten.linear.default", X, W0, True)),
    "zero": graph(node("aten.linear.default", X, W0, 0.0)),
    "minus zero": graph(node("aten.linear.default", X, W0, -0.0)),
    "infinity": graph(node("aten.linear.default", X, W0, float("inf"))),
    "not a number": graph(node("aten.linear.default", X, W0, float("nan"))),
    "word": graph(node("aten.linear.default", X, W0, Enum("mean"))),
    "dtype": graph(node("aten.linear.default", X, W0, Dtype("float16"))),
    "list": graph(node("aten.linear.default", X, W0, (1,))),
    "longer list": graph(node("aten.linear.default", X, W0, (1, 1))),
    "keyword": graph(node("aten.linear.default", X, W0, bias=1)),
    "other keyword": graph(node("aten.linear.default", X, W0, beta=1)),
    "item": graph(node("aten.linear.default", X, replace(W0, item=1))),
    "input's dtype": graph(LINEAR, inputs=(TensorSpec("image", "float16", ("batch", 3)),)),
    "input's shape": graph(LINEAR, inputs=(TensorSpec("image", "float32", ("batch", 4)),)),
    "fixed batch": graph(LINEAR, inputs=(TensorSpec("image", "float32", (1, 3)),)),
    "square": graph(LINEAR, inputs=(TensorSpec("image", "float32", ("batch", "batch")),)),
    "two symbols": graph(LINEAR, inputs=(TensorSpec("image", "float32", ("batch", "rows")),)),
    "weight's dtype": graph(LINEAR, weights=(weight(b"abc", "int8"),)),
}


def test_everything_else_counts() -> None:
    tokens = Tokens()
    values = {name: tokens.identify(made).nodes[-1].value for name, made in DIFFERENT.items()}
    assert len(set(values.values())) == len(DIFFERENT), values


def test_an_input_is_known_by_its_place_among_its_likes() -> None:
    image, mask = TensorSpec("image", "float32", ("batch", 3)), TensorSpec("mask", "int64", ("batch",))
    first = graph(LINEAR, inputs=(image, mask))
    second = graph(node("aten.linear.default", Value("input", 1), W0), inputs=(mask, image))
    twins = graph(node("aten.linear.default", Value("input", 1), W0), inputs=(image, replace(image, name="other")))
    assert last(first) == last(second) == last(graph(LINEAR))
    assert last(twins) != last(first)


def test_a_skeleton_is_the_graph_without_its_bytes() -> None:
    one = graph(LINEAR, node("aten.add.Tensor", Value("node", 0), W1))
    tuned = replace(one, weights=(weight(b"xyz"), weight(b"uvw")), symbols=(Symbol("rows", 1, 2),))
    assert skeleton_id(one) == skeleton_id(tuned)
    swapped = graph(node("aten.linear.default", X, W1), node("aten.add.Tensor", Value("node", 0), W0))
    assert skeleton_id(swapped) != skeleton_id(one)
    assert skeleton_id(replace(one, results=(Value("node", 0),))) != skeleton_id(one)
    assert skeleton_id(replace(one, weights=(weight(b"xyz"), weight(b"uvwx")))) != skeleton_id(one)
    assert skeleton_id(replace(one, inputs=(TensorSpec("x", "float32", ("rows", 3)),))) == skeleton_id(one)
    assert skeleton_id(replace(one, inputs=(TensorSpec("x", "float32", (1, 3)),))) != skeleton_id(one)


def test_ids_never_change() -> None:
    """They name blocks in memory, on disk and between nodes of a cluster: those of a released scheme stay as they are."""
    found = {}
    for name, made in DIFFERENT.items():
        identities = Tokens().identify(made)
        found[name] = [identities.nodes[-1].structure.hex(), identities.nodes[-1].value.hex()]
    assert found == json.loads(GOLDEN.read_text())


def test_a_collision_is_found_by_the_tokens() -> None:
    weak = Tokens(lambda token: bytes([len(token) % 7]))
    with pytest.raises(CollisionError, match="two tokens"):
        for made in DIFFERENT.values():
            weak.identify(made)


def test_forgotten_tokens_are_gone() -> None:
    tokens = Tokens()
    identities = tokens.identify(graph(LINEAR))
    count = len(tokens)
    assert count == 7  # both weights have one structure
    tokens.forget({identities.nodes[0].value, identities.nodes[0].structure})
    assert len(tokens) == count - 2
    tokens.identify(graph(LINEAR))
    assert len(tokens) == count


# --- random programs --------------------------------------------------------------------------------------------------


@st.composite
def programs(draw: st.DrawFn) -> Graph:
    """Sums, products and negations of one input and two weights, with some nodes that nobody uses."""
    nodes: list[Node] = []
    for number in range(draw(st.integers(1, 8))):
        operands = [X, W0, W1, *(Value("node", earlier) for earlier in range(number))]
        op = draw(st.sampled_from(["add", "mul", "neg"]))
        nodes.append(node(op, *(draw(st.sampled_from(operands)) for _ in range(1 if op == "neg" else 2))))
    contents = [draw(st.sampled_from([b"abc", b"def", b"ghi"])) for _ in range(2)]
    return graph(*nodes, weights=tuple(weight(content) for content in contents))


def results(made: Graph, x: int) -> list[int]:
    """Compute a program in integers, weights being numbers made of their digests."""
    numbers = [int(each.digest[:8], 16) for each in made.weights]
    computed: list[int] = []
    for each in made.nodes:
        operands = [{"input": [x], "weight": numbers, "node": computed}[v.kind][v.index] for v in each.args]  # type: ignore[union-attr]
        prime = 2**61 - 1
        computed.append({"add": lambda a, b: a + b, "mul": lambda a, b: a * b, "neg": lambda a: -a}[each.op](*operands) % prime)  # type: ignore[operator]
    return computed


@given(programs(), programs(), st.integers(0, 2**32))
def test_equal_values_are_equal_results(one: Graph, other: Graph, x: int) -> None:
    tokens = Tokens()
    by_value: dict[bytes, int] = {}
    for made in (one, other):
        for identity, result in zip(tokens.identify(made).nodes, results(made, x), strict=True):
            assert by_value.setdefault(identity.value, result) == result


@given(programs())
def test_identifying_twice_adds_nothing(made: Graph) -> None:
    tokens = Tokens()
    first = tokens.identify(made)
    count = len(tokens)
    assert tokens.identify(made) == first
    assert len(tokens) == count
