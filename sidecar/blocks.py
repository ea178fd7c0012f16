"""Blocks: a model cut into immutable parts at the narrow places of its graph.

A block is a run of consecutive nodes. It ends where nearly everything computed of late is done with: where the nodes that
follow take at most one tensor from the nodes just before. That is after a residual unit or a transformer layer, not inside
one. A normalisation or an activation stays with the operator it finishes.

The rule looks at a short window before the cut and one after it, and at nothing else: two models that begin alike are cut
alike as far as they are alike, whatever follows and whatever else is deployed, and adding a model never cuts another
one anew. Whether *exactly* one tensor is alive at a place cannot be asked: that depends on everything that follows, and
hardly ever holds. A mask or a rotary table stays alive across all layers. Made long before, it does not count, and passes
along as a further output of the block it comes from. Sizes are not tensors and do not count. Weights count where they are
first used.

Pure; must not import torch.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import dataclass
from typing import Final

from sidecar.ir import Graph, Node, Value, node_values
from sidecar.merkle import Identities
from sidecar.operators import FINISHING, SIZES
from sidecar.slices import paced

# Nodes before and after a place that count. Longer than a residual unit, or a transformer layer as torch exports it.
WINDOW: Final = 48
# A block has at least so many bytes of weights of its own, so that moving one pays; a cut is forced beyond the largest.
SMALLEST_BYTES: Final = 256 * 1024
LARGEST_BYTES: Final = 64 * 1024 * 1024


@dataclass(frozen=True)
class Block:
    """Nodes ``first`` to ``end`` - 1 of a graph: what they take from before them, which weights, and what others take of them."""

    first: int
    end: int
    inputs: tuple[Value, ...]
    weights: tuple[int, ...]
    outputs: tuple[Value, ...]


def cut(graph: Graph) -> tuple[Block, ...]:
    """Return the blocks of a graph in order; together they hold every node once."""
    if not graph.nodes:
        return ()
    starts = (0, *_places(graph))
    ends = (*starts[1:], len(graph.nodes))
    # The last node that needs a value; a result is needed after all of them.
    last_use: dict[Value, int] = {}
    for number, node in enumerate(paced(graph.nodes)):
        last_use.update(dict.fromkeys(node_values(node), number))
    last_use.update(dict.fromkeys(graph.results, len(graph.nodes)))
    outputs: dict[int, list[Value]] = {first: [] for first in starts}
    for value, number in last_use.items():
        if value.kind == "node":
            here = bisect.bisect_right(starts, value.index) - 1
            if number >= ends[here]:
                outputs[starts[here]].append(value)
    return tuple(_block(graph, first, end, outputs[first]) for first, end in zip(starts, ends, strict=True))


def block_id(block: Block, identities: Identities, parent: str = "") -> str:
    """Return the name of a block that follows ``parent``, in hexadecimal.

    Equal for the same nodes on the same inputs after the same blocks, in any model: blocks of one name form a tree.
    """
    digest = hashlib.sha256(f"trunkline block 2 {parent}".encode())
    for identity in identities.nodes[block.first : block.end]:
        digest.update(identity.value)
    return digest.hexdigest()


def _places(graph: Graph) -> list[int]:
    """Return the numbers of the nodes that begin a block, without the first."""
    taken = [[value for value in node_values(node) if _is_tensor(graph, value)] for node in paced(graph.nodes)]
    found: list[int] = []
    own_bytes = 0
    counted: set[int] = set()
    for place in paced(range(1, len(graph.nodes))):
        for value in node_values(graph.nodes[place - 1]):
            if value.kind == "weight" and value.index not in counted:
                counted.add(value.index)
                own_bytes += graph.weights[value.index].size_bytes
        if own_bytes < SMALLEST_BYTES or _finishes(graph.nodes[place], place - 1):
            continue
        after = taken[place : place + WINDOW]
        across = {value for values in after for value in values if place - WINDOW <= value.index < place}
        if len(across) <= 1 or own_bytes >= LARGEST_BYTES:
            found.append(place)
            own_bytes = 0
    return found


def _finishes(node: Node, before: int) -> bool:
    return node.op in FINISHING and Value("node", before) in node_values(node)


def _is_tensor(graph: Graph, value: Value) -> bool:
    return value.kind == "node" and graph.nodes[value.index].op not in SIZES


def _block(graph: Graph, first: int, end: int, outputs: list[Value]) -> Block:
    inputs: dict[Value, None] = {}
    weights: dict[int, None] = {}
    for node in paced(graph.nodes[first:end]):
        for value in node_values(node):
            if value.kind == "weight":
                weights[value.index] = None
            elif value.kind == "input" or value.index < first:
                inputs[value] = None
    ordered = sorted(outputs, key=lambda value: (value.index, -1 if value.item is None else value.item))
    return Block(first, end, tuple(inputs), tuple(weights), tuple(ordered))
