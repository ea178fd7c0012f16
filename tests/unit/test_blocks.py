"""Where models are cut: at narrow places, by what lies before and shortly after, never by anything else."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline.protocol import TensorSpec

from sidecar import blocks
from sidecar.blocks import WINDOW, Block, block_id, cut
from sidecar.ir import Graph, Node, Value, Weight, node_values
from sidecar.merkle import Tokens

X = Value("input", 0)


def graph(nodes: list[Node], weight_bytes: list[int], results: tuple[Value, ...] | None = None) -> Graph:
    weights = tuple(
        Weight(hashlib.sha256(f"{number} {size}".encode()).hexdigest(), "uint8", (size,), size, 0)
        for number, size in enumerate(weight_bytes)
    )
    return Graph(
        symbols=(),
        inputs=(TensorSpec("x", "float32", (1,)),),
        outputs=(TensorSpec("y", "float32", (1,)),),
        weights=weights,
        nodes=tuple(nodes),
        results=results or (Value("node", len(nodes) - 1),),
    )


def residual(units: int, size: int = blocks.SMALLEST_BYTES // 2) -> Graph:
    """Units of two weighted operators around a shortcut, with sizes taken off the input all along."""
    nodes: list[Node] = [Node("aten.sym_size.int", (X, 0)), Node("aten.relu.default", (X,))]
    last = Value("node", 1)
    for unit in range(units):
        nodes.append(Node("aten.linear.default", (last, Value("weight", 2 * unit))))
        nodes.append(Node("aten.reshape.default", (Value("node", len(nodes) - 1), (Value("node", 0), -1))))
        nodes.append(Node("aten.linear.default", (Value("node", len(nodes) - 1), Value("weight", 2 * unit + 1))))
        nodes.append(Node("aten.add.Tensor", (Value("node", len(nodes) - 1), last)))
        last = Value("node", len(nodes) - 1)
    return graph(nodes, [size] * 2 * units)


def check(made: Graph, found: tuple[Block, ...]) -> None:
    """Every node once and in order; nothing is taken that was not given."""
    assert [(block.first, block.end) for block in found] == [
        (first, end) for first, end in zip([0, *(b.end for b in found)], [b.end for b in found], strict=False)
    ]
    assert found[-1].end == len(made.nodes)
    given: set[Value] = set()
    for block in found:
        own = {value for node in made.nodes[block.first : block.end] for value in node_values(node)}
        assert {value for value in own if value.kind == "node" and value.index < block.first} <= given
        assert set(block.inputs) == {v for v in own if v.kind == "input" or (v.kind == "node" and v.index < block.first)}
        assert {value.index for value in own if value.kind == "weight"} == set(block.weights)
        given |= set(block.outputs)
    assert {value for value in made.results if value.kind == "node"} <= given


def test_a_residual_network_is_cut_between_its_units() -> None:
    made = residual(6)
    found = cut(made)
    check(made, found)
    assert [block.end for block in found] == [6, 10, 14, 18, 22, 26]
    # The size passes along beside the one tensor.
    assert all(len(block.outputs) <= 2 for block in found)


def test_a_mask_that_all_layers_take_does_not_keep_them_together() -> None:
    """As a transformer's: made once at the beginning, taken by every layer."""
    nodes = [Node("aten.where.self", (X, X, X)), Node("aten.embedding.default", (Value("weight", 0), X))]
    last, layers = Value("node", 1), 12
    for layer in range(layers):
        first = len(nodes)
        nodes.append(Node("aten.linear.default", (last, Value("weight", 1 + layer))))
        nodes.append(Node("aten.scaled_dot_product_attention.default", (Value("node", first), Value("node", 0))))
        nodes.extend(Node("aten.gelu.default", (Value("node", first + 1 + n),)) for n in range(10))
        nodes.append(Node("aten.add.Tensor", (Value("node", len(nodes) - 1), last)))
        last = Value("node", len(nodes) - 1)
    made = graph(nodes, [blocks.SMALLEST_BYTES] * (layers + 1))
    found = cut(made)
    check(made, found)
    # The first layers stand within a window of the mask's making.
    assert [block.end - block.first for block in found[1:]] == [13] * (len(found) - 1)
    assert len(found) >= layers - WINDOW // 13
    assert all(Value("node", 0) in block.inputs for block in found[1:])


def test_small_units_are_put_together_and_huge_ones_cut_apart() -> None:
    assert len(cut(residual(8, blocks.SMALLEST_BYTES // 8))) == 2
    straight = graph(
        [Node("aten.linear.default", (X, Value("weight", 0)))]
        + [Node("aten.addmm.default", (X, Value("node", n), Value("node", 0), Value("weight", n + 1))) for n in range(5)],
        [blocks.LARGEST_BYTES] * 6,
    )
    # The first result is taken by all: never narrow, but too large to stay together.
    assert len(cut(straight)) == 6
    check(straight, cut(straight))


def test_a_graph_without_nodes_has_no_blocks() -> None:
    assert cut(graph([], [], results=(X,))) == ()


def test_a_weight_counts_where_it_is_first_used() -> None:
    tied = residual(4)
    nodes = [
        replace(node, args=tuple(Value("weight", 0) if isinstance(a, Value) and a.kind == "weight" else a for a in node.args))
        for node in tied.nodes
    ]
    assert len(cut(graph(nodes, [blocks.SMALLEST_BYTES // 2]))) == 1


def test_two_heads_on_one_trunk_have_its_blocks_in_common() -> None:
    trunk = residual(5)
    end = len(trunk.nodes)
    tokens = Tokens()
    ids = []
    for head in range(2):
        weights = [blocks.SMALLEST_BYTES // 2] * 10 + [1000 + head]
        made = graph([*trunk.nodes, Node("aten.linear.default", (Value("node", end - 1), Value("weight", 10)))], weights)
        identities = tokens.identify(made)
        ids.append([block_id(block, identities) for block in cut(made)])
    assert len(ids[0]) == len(ids[1]) == 6
    assert ids[0][:5] == ids[1][:5]
    assert ids[0][5] != ids[1][5]


def network(seed: int) -> Graph:
    """A random graph, longer than two windows more often than not."""
    chosen = random.Random(seed)
    nodes: list[Node] = []
    sizes: list[int] = []
    for number in range(chosen.randint(1, 200)):
        near = [X, *(Value("node", n) for n in range(max(0, number - chosen.choice([1, 1, 4, 60])), number))]
        operands = chosen.choices(near, k=chosen.randint(1, 3))
        if chosen.random() < 0.5:
            operands.append(Value("weight", len(sizes)))
            sizes.append(chosen.choice([64, blocks.SMALLEST_BYTES // 3, blocks.SMALLEST_BYTES]))
        nodes.append(Node(chosen.choice(["aten.add.Tensor", "aten.sym_size.int"]), tuple(operands)))
    return graph(nodes, sizes)


@given(st.integers(0, 2**32), st.data())
def test_what_follows_a_common_beginning_does_not_change_its_blocks(seed: int, data: st.DataObject) -> None:
    made = network(seed)
    check(made, cut(made))
    length = data.draw(st.integers(1, len(made.nodes)))
    beginning = replace(made, nodes=made.nodes[:length], results=(Value("node", length - 1),))
    check(beginning, cut(beginning))
    sure = length - WINDOW
    places = [[block.end for block in cut(each) if block.end <= sure] for each in (made, beginning)]
    assert places[0] == places[1]


@pytest.mark.parametrize("field", ["first", "end"])
def test_a_block_is_named_by_its_nodes(field: str) -> None:
    made = residual(3)
    identities = Tokens().identify(made)
    block = cut(made)[1]
    moved = replace(block, **{field: getattr(block, field) + 1})
    assert block_id(block, identities) != block_id(moved, identities)
    assert block_id(block, identities) != block_id(block, identities, "another before it")


def test_a_norm_and_an_activation_stay_with_what_they_finish() -> None:
    nodes: list[Node] = []
    last = X
    for layer in range(4):
        nodes.append(Node("aten.conv2d.default", (last, Value("weight", layer))))
        nodes.append(Node("aten.batch_norm.default", (Value("node", len(nodes) - 1),)))
        nodes.append(Node("aten.relu.default", (Value("node", len(nodes) - 1),)))
        last = Value("node", len(nodes) - 1)
    found = cut(graph(nodes, [blocks.SMALLEST_BYTES] * 4))
    assert [block.end for block in found] == [3, 6, 9, 12]
