"""Merkle ids: equal for equal computation, different for anything else, the same on every machine."""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline.protocol import TensorSpec

from sidecar.graphfile import canonical_graph
from sidecar.ir import Argument, Dtype, Enum, Graph, Node, Symbol, Value, Weight
from sidecar.merkle import CollisionError, Identity, Tokens, in_domain, input_values, skeleton_id

GOLDEN = Path(__file__).parent.parent / "golden" / "merkle" / "v1.json"
GOLDEN_DOMAINS = GOLDEN.with_name("domains-v1.json")


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


# --- domains ----------------------------------------------------------------------------------------------------------

TWO = graph(LINEAR, node("aten.add.Tensor", Value("node", 0), W1))


def test_in_two_domains_nothing_has_one_name_but_structures() -> None:
    tokens = Tokens()
    found = [tokens.identify(in_domain(TWO, domain)) for domain in ("", "a", "b")]
    everything = [(*each.inputs, *each.weights, *each.nodes) for each in found]
    values = [{identity.value for identity in each} for each in everything]
    assert not values[0] & values[1]
    assert not values[0] & values[2]
    assert not values[1] & values[2]
    for here, there in itertools.pairwise(everything):
        assert [identity.structure for identity in here] == [identity.structure for identity in there]
        assert [identity.content for identity in here] == [identity.content for identity in there]
    weights = [{weight.digest for weight in in_domain(TWO, domain).weights} for domain in ("", "a", "b")]
    assert len(set.union(*weights)) == 6
    assert len({skeleton_id(in_domain(TWO, domain)) for domain in ("", "a", "b")}) == 1


def test_within_a_domain_equal_things_have_one_name() -> None:
    other = graph(LINEAR, node("aten.relu.default", Value("node", 0)), weights=(weight(b"abc"),))
    one, two = (Tokens().identify(in_domain(each, "a")) for each in (TWO, other))
    assert one.nodes[0] == two.nodes[0]
    assert one.inputs == two.inputs
    assert in_domain(TWO, "a").weights[0] == in_domain(other, "a").weights[0]


def test_a_weight_of_a_domain_says_where_its_bytes_are() -> None:
    made = in_domain(TWO, "a")
    assert canonical_graph(made) == canonical_graph(TWO)
    assert [each.blob for each in made.weights] == [each.blob for each in TWO.weights] == [each.digest for each in TWO.weights]
    for before, after in zip(TWO.weights, made.weights, strict=True):
        assert after == replace(before, digest=after.digest, stored_as=before.digest)
        # One that is tuned has other bytes, wherever it came from.
        assert replace(before, digest="f" * 64).blob == "f" * 64


@pytest.mark.parametrize("way", [("a",), ("b", "a"), ("a", "a"), ("", "a")])
def test_the_way_into_a_domain_does_not_count(way: tuple[str, ...]) -> None:
    made = TWO
    for domain in way:
        made = in_domain(made, domain)
    assert made == in_domain(TWO, "a")
    assert in_domain(made, "") == TWO


def test_public_weights_have_one_name_everywhere_and_values_never() -> None:
    tokens = Tokens()
    public = {TWO.weights[0].blob}
    one, two = (in_domain(TWO, domain, public) for domain in ("a", "b"))
    assert one.weights[0] == two.weights[0] == TWO.weights[0]
    assert {weight.digest for weight in one.weights[1:]}.isdisjoint(weight.digest for weight in two.weights[1:])
    found = [tokens.identify(graph) for graph in (one, two)]
    # What is computed has the names that it would have were nothing public.
    assert found == [Tokens().identify(in_domain(TWO, domain)) for domain in ("a", "b")]
    assert in_domain(one, "a") == in_domain(TWO, "a")
    assert in_domain(in_domain(TWO, "a"), "a", public) == one


def test_what_was_found_in_one_domain_holds_in_others() -> None:
    for made in DIFFERENT.values():
        tokens = Tokens()
        found = tokens.identify(in_domain(made, "a"))
        for domain in ("b", "a", ""):
            assert tokens.identify_again(found, domain) == Tokens().identify(in_domain(made, domain))


def test_what_has_no_weights_and_no_inputs_is_of_its_domain_too() -> None:
    alone = graph(node("aten.full.default", (1,), 1.0), inputs=(), weights=())
    values = {Tokens().identify(in_domain(alone, domain)).nodes[0].value for domain in ("", "a", "b")}
    assert len(values) == 3


def test_inputs_are_named_alike_wherever_they_are_named() -> None:
    for domain in ("", "a"):
        made = in_domain(TWO, domain)
        assert input_values(made) == tuple(identity.value for identity in Tokens().identify(made).inputs)


def test_ids_in_a_domain_never_change() -> None:
    """Weights in memory that outlives the engine, and in block files, are found again by them."""
    made = in_domain(TWO, "vision")
    found = Tokens().identify(made)
    assert {
        "weights": [each.digest for each in made.weights],
        "values": [each.value.hex() for each in (*found.inputs, *found.weights, *found.nodes)],
    } == json.loads(GOLDEN_DOMAINS.read_text())


def test_a_collision_between_domains_is_found() -> None:
    tokens = Tokens()
    found = tokens.identify(TWO)
    tokens._digest = lambda token: found.nodes[0].value
    with pytest.raises(CollisionError):
        tokens.identify_again(found, "a")


# ----------------------------------------------------------------------------------------------------------------------


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


def test_some_tokens_are_taken_along_with_how_they_are_named() -> None:
    weak = Tokens(lambda token: token[:1])
    weak.name(b"a1")
    weak.name(b"b1")
    some = weak.of([b"a"])
    assert (len(some), len(weak.of(()))) == (1, 0)
    with pytest.raises(CollisionError):
        some.name(b"a2")
    # What becomes of them is their own affair.
    some.name(b"c1")
    weak.forget({b"a"})
    assert (len(some), len(weak)) == (2, 1)
    weak.add(some)
    assert len(weak) == 3


def test_tokens_are_added_only_as_long_as_none_has_the_id_of_another() -> None:
    weak, other = (Tokens(lambda token: token[:1]) for _ in range(2))
    weak.name(b"a1")
    other.name(b"a2")
    with pytest.raises(CollisionError, match="two tokens have the id 61"):
        weak.add(other)


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
