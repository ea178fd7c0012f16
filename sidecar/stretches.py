"""Stretches: consecutive stages of a model as one graph, for a request beside which there is nothing to run.

Stages are where requests meet and part. A request that is alone has nothing of their borders, where ONNX Runtime
(``sidecar.sessions``) puts channels into blocks and out again and wakes its threads anew: as nine stages a ResNet-18
took 1.3 times what it took as one, with two threads. What a stage gives and a later one takes stays within; weights are
those of the stages, in their order, and every operator is the same, so that the answer is, to the last bit.

Whoever comes meanwhile waits for the end of it, so a stretch is not longer than ``LONGEST_S``. Pure; must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from sidecar.ir import Argument, Graph, Node, Value, Weight
from sidecar.stages import UNKNOWN, Key

# Of what there is to gain most is gained by then, and a stage of a large model takes as long.
LONGEST_S: Final = 0.025
# What a stage takes in a stretch, of what it takes by itself: 0.75 to 0.8 was measured.
JOINED: Final = 0.75


class Part(Protocol):
    """A stage with its graph, lowered or not."""

    @property
    def graph(self) -> Graph: ...
    @property
    def takes(self) -> tuple[Key, ...]: ...
    @property
    def gives(self) -> tuple[Key, ...]: ...
    @property
    def alive(self) -> frozenset[Key]: ...


@dataclass(slots=True, eq=False)
class Stretch:
    """``count`` stages as one ``graph``, which takes ``takes``, gives ``gives``, and once prepared is run by ``program``."""

    count: int
    graph: Graph
    takes: tuple[Key, ...]
    gives: tuple[Key, ...]
    program: Any = None


def ranges(run_s: Sequence[float], may_join: Sequence[bool]) -> list[range]:
    """Return which stages to join, of those that ``may_join``: as many as take ``LONGEST_S`` together.

    ``run_s`` are the seconds that each takes by itself. No stage is in two of them.
    """
    found: list[range] = []
    start, length_s = 0, 0.0
    for index, (alone_s, joins) in enumerate(zip(run_s, may_join, strict=True)):
        seconds = JOINED * alone_s
        if not joins or length_s + seconds > LONGEST_S:
            found.append(range(start, index))
            start, length_s = (index, 0.0) if joins else (index + 1, 0.0)
        if joins:
            length_s += seconds
    found.append(range(start, len(run_s)))
    return [each for each in found if len(each) > 1]


def joined(parts: Sequence[Part]) -> Stretch:
    """Return consecutive stages as one."""
    nodes: list[Node] = []
    weights: list[Weight] = []
    takes: dict[Key, int] = {}
    given: dict[Key, Value] = {}
    for part in parts:
        moved = _Moved(part, len(weights), len(nodes), takes, given)
        nodes += map(moved.node, part.graph.nodes)
        weights += part.graph.weights
        given |= {key: moved.value(value) for key, value in zip(part.gives, part.graph.results, strict=True)}
    gives = tuple(key for key in given if key in parts[-1].alive)
    graph = Graph(
        symbols=(),
        inputs=(UNKNOWN,) * len(takes),
        outputs=(UNKNOWN,) * len(gives),
        weights=tuple(weights),
        nodes=tuple(nodes),
        results=tuple(given[key] for key in gives),
    )
    return Stretch(len(parts), graph, tuple(takes), gives)


@dataclass
class _Moved:
    """What a stage refers to, as the whole refers to it."""

    part: Part
    first_weight: int
    first_node: int
    takes: dict[Key, int]
    given: dict[Key, Value]

    def node(self, node: Node) -> Node:
        args = tuple(map(self._argument, node.args))
        return replace(node, args=args, kwargs=tuple((name, self._argument(each)) for name, each in node.kwargs))

    def _argument(self, argument: Argument) -> Argument:
        if isinstance(argument, tuple):
            return tuple(map(self._argument, argument))
        return self.value(argument) if isinstance(argument, Value) else argument

    def value(self, value: Value) -> Value:
        if value.kind == "weight":
            return replace(value, index=value.index + self.first_weight)
        if value.kind == "node":
            return replace(value, index=value.index + self.first_node)
        key = self.part.takes[value.index]
        if key in self.given:
            return self.given[key]
        return Value("input", self.takes.setdefault(key, len(self.takes)))
