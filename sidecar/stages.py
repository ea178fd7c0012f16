"""Stages: a model's blocks as graphs of their own, which take and give tensors by name.

A model runs as a sequence of stages. What one gives and a later one takes is known by its Merkle value, so that a tensor means
the same in every model that has it: two models that begin alike can be run as one as far as their stages are the same.

Only tensors pass from stage to stage. Sizes are computed again from the tensors they are sizes of, so that they are right for
whatever rows a stage is run on, and so are lists of tensors, which are views. Pure; must not import torch.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final

from trunkline.protocol import TensorSpec

from sidecar.blocks import Block
from sidecar.ir import Argument, Graph, Node, Value, Weight, node_values
from sidecar.merkle import Identities
from sidecar.operators import LISTS, SIZES
from sidecar.slices import paced

# The name of a tensor: its Merkle value, and which result of an operator that gives several.
Key = bytes

_ANEW: Final = SIZES | LISTS
# What a stage takes is known only when it runs.
UNKNOWN: Final = TensorSpec("tensor", "float32", ())


@dataclass(frozen=True)
class Stage:
    """One block as a graph. ``graph`` takes ``takes``, in that order, and gives ``gives``; ``alive`` is what is needed later.

    Stages of one ``id`` compute the same from the same, and follow the same blocks.
    """

    id: str
    block: str
    graph: Graph
    takes: tuple[Key, ...]
    gives: tuple[Key, ...]
    alive: frozenset[Key]


@dataclass(frozen=True)
class Staged:
    """A model as stages: the names of its inputs, the stages in order, the names of its results."""

    inputs: tuple[Key, ...]
    stages: tuple[Stage, ...]
    results: tuple[Key, ...]


def split(graph: Graph, identities: Identities, blocks: Mapping[str, Block]) -> Staged:
    """Return a graph as stages, one per block (by id, in order); a graph without operators is one stage without any."""
    name = _Names(identities)
    picked = _picked(graph)
    parts = [_extract(graph, block, picked, name) for block in blocks.values()] or [_Part()]
    results = tuple(name.of(value) for value in graph.results)
    for value, key in zip(graph.results, results, strict=True):
        if value.kind == "weight" and key not in parts[-1].places:
            # A constant output; any stage could give it.
            parts[-1].places[key] = parts[-1].weight(value)
    stages: list[Stage] = []
    alive = frozenset(results)
    for block_id, part in reversed(list(zip([*blocks] or [""], parts, strict=True))):
        gives = tuple(key for key in part.places if key in alive and key not in part.takes)
        stages.append(_stage(graph, block_id, part, gives, alive))
        alive = (alive - frozenset(gives)) | frozenset(part.takes)
    return Staged(tuple(identity.value for identity in identities.inputs), tuple(reversed(stages)), results)


@dataclass
class _Names:
    identities: Identities

    def of(self, value: Value) -> Key:
        key = self.identities.of(value).value
        return key if value.item is None else key + b"/%d" % value.item


@dataclass
class _Part:
    """A block being taken out: its nodes so far, where values lie in it, what it takes and which weights it uses."""

    nodes: list[Node] = field(default_factory=list)
    places: dict[Key, Value] = field(default_factory=dict)
    takes: dict[Key, int] = field(default_factory=dict)
    weights: dict[int, int] = field(default_factory=dict)
    numbers: dict[int, int] = field(default_factory=dict)

    def weight(self, value: Value) -> Value:
        return replace(value, index=self.weights.setdefault(value.index, len(self.weights)))


def _extract(graph: Graph, block: Block, picked: Mapping[int, list[Value]], name: _Names) -> _Part:
    part = _Part()

    def add(number: int) -> None:
        node = graph.nodes[number]
        args = tuple(moved(argument) for argument in node.args)
        kwargs = tuple((key, moved(argument)) for key, argument in node.kwargs)
        part.numbers[number] = len(part.nodes)
        part.nodes.append(Node(node.op, args, kwargs, node.origin))

    def moved(argument: Argument) -> Argument:
        if isinstance(argument, tuple):
            return tuple(moved(member) for member in argument)
        return place(argument) if isinstance(argument, Value) else argument

    def place(value: Value) -> Value:
        if value.kind == "weight":
            return part.weight(value)
        if value.kind == "node" and value.index not in part.numbers and graph.nodes[value.index].op in _ANEW:
            anew(value.index)
        if value.kind == "node" and value.index in part.numbers:
            return Value(value.kind, part.numbers[value.index], value.item)
        return Value("input", part.takes.setdefault(name.of(value), len(part.takes)))

    def anew(number: int) -> None:
        # What it is computed from comes first; a chain of sizes can be longer than Python's stack is deep.
        waiting = [number]
        while waiting:
            needed = {
                value.index
                for value in node_values(graph.nodes[waiting[-1]])
                if value.kind == "node" and value.index not in part.numbers and graph.nodes[value.index].op in _ANEW
            }
            if needed:
                waiting.extend(sorted(needed, reverse=True))
                continue
            if (last := waiting.pop()) not in part.numbers:
                add(last)

    for number in paced(range(block.first, block.end)):
        if number not in part.numbers:
            add(number)
        if graph.nodes[number].op not in _ANEW:
            part.places.setdefault(name.of(Value("node", number)), Value("node", part.numbers[number]))
    for number in paced(range(block.first, block.end)):
        for value in picked.get(number, ()):
            part.places.setdefault(name.of(value), replace(value, index=part.numbers[number]))
    return part


def _picked(graph: Graph) -> dict[int, list[Value]]:
    """Return, of operators that give several tensors, those that are used."""
    picked: dict[int, dict[Value, None]] = {}
    for value in itertools.chain(graph.results, *map(node_values, graph.nodes)):
        if value.item is not None:
            picked.setdefault(value.index, {})[value] = None
    return {number: list(values) for number, values in picked.items()}


def _stage(graph: Graph, block_id: str, part: _Part, gives: tuple[Key, ...], alive: frozenset[Key]) -> Stage:
    weights: tuple[Weight, ...] = tuple(graph.weights[index] for index in part.weights)
    own = Graph(
        symbols=(),
        inputs=(UNKNOWN,) * len(part.takes),
        outputs=(UNKNOWN,) * len(gives),
        weights=weights,
        nodes=tuple(part.nodes),
        results=tuple(part.places[key] for key in gives),
    )
    digest = hashlib.sha256(f"trunkline stage 1 {block_id} ".encode())
    for key in gives:
        digest.update(b"%d " % len(key) + key)
    return Stage(digest.hexdigest(), block_id, own, tuple(part.takes), gives, alive)
