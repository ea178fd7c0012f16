"""Stretches: consecutive stages of a model in one run, for a request beside which there is nothing to run.

Stages are where requests meet and part. A request that is alone has nothing of their borders, where the engine looks around, and
where ONNX Runtime (``sidecar.sessions``) puts channels into blocks and out again and wakes its threads anew: as nine stages a
ResNet-18 took 1.3 times what it took as one, with two threads. So neighbours in sessions become one graph, and what is between
them follows within the same run. Weights are those of the stages, in their order, and every operator is the same, so that the
answer is, to the last bit.

Whoever comes meanwhile waits for the end of it, so a stretch is not longer than ``LONGEST_S``, by what its stages
took when they were tried. Pure; must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Protocol

from sidecar.ir import Argument, Graph, Node, Value, Weight
from sidecar.stages import UNKNOWN, Key

# Of what there is to gain most is gained by then, and a stage of a large model takes as long.
LONGEST_S: Final = 0.025
# What a stage takes in a stretch, of what it takes by itself: 0.75 to 0.8 was measured.
JOINED: Final = 0.75


class Unjoined(Exception):
    """Several stages cannot be run as one on inputs like these; one by one they can."""


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
class Piece:
    """``count`` stages from ``start`` on as one ``graph``, which takes ``takes``, gives ``gives``, and is run by ``program``.

    ``start`` counts from the stretch's first stage; ``alive`` is what anybody needs afterwards; whoever has it prepares it.
    """

    start: int
    count: int
    graph: Graph
    takes: tuple[Key, ...]
    gives: tuple[Key, ...]
    alive: frozenset[Key]
    program: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Stretch:
    """``count`` stages as ``pieces``, which are run one after the other; taken together, they take and give what is said here."""

    count: int
    pieces: tuple[Piece, ...]
    takes: tuple[Key, ...]
    gives: tuple[Key, ...]

    def run(
        self,
        run: Callable[[Any, Sequence[Any], Sequence[Any]], Sequence[Any]],
        weights: Sequence[Sequence[Any]],
        inputs: Sequence[Any],
    ) -> list[Any]:
        """Return what is given, in the order of ``gives``. ``run`` is a device's; ``weights`` has those of each stage."""
        held = dict(zip(self.takes, inputs, strict=True))
        for piece in self.pieces:
            bound = [weight for each in weights[piece.start : piece.start + piece.count] for weight in each]
            given = run(piece.program, bound, [held[key] for key in piece.takes])
            held.update(zip(piece.gives, given, strict=True))
            for key in held.keys() - piece.alive:
                del held[key]
        return [held[key] for key in self.gives]


def ranges(run_s: Sequence[float]) -> list[range]:
    """Return which stages to run as one: as many as take ``LONGEST_S`` together. ``run_s`` are the seconds that each takes."""
    found: list[range] = []
    start, length_s = 0, 0.0
    for index, seconds in enumerate(run_s):
        if length_s + seconds > LONGEST_S:
            found.append(range(start, index))
            start, length_s = index, 0.0
        length_s += seconds
    found.append(range(start, len(run_s)))
    return [each for each in found if len(each) > 1]


def stretched(parts: Sequence[Part], in_session: Sequence[bool]) -> Stretch:
    """Return consecutive stages as one stretch, in which neighbours that are run ``in_session`` are one graph."""
    pieces: list[Piece] = []
    start = 0
    while start < len(parts):
        end = start + 1
        while in_session[start] and end < len(parts) and in_session[end]:
            end += 1
        pieces.append(_piece(start, parts[start:end]))
        start = end
    takes: dict[Key, None] = {}
    given: dict[Key, None] = {}
    for piece in pieces:
        takes |= dict.fromkeys(key for key in piece.takes if key not in given)
        given |= dict.fromkeys(piece.gives)
    return Stretch(len(parts), tuple(pieces), tuple(takes), tuple(key for key in given if key in parts[-1].alive))


def _piece(start: int, parts: Sequence[Part]) -> Piece:
    """Return consecutive stages as one graph; one of them as it is."""
    last = parts[-1]
    if len(parts) == 1:
        return Piece(start, 1, last.graph, last.takes, last.gives, last.alive)
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
    return Piece(start, len(parts), graph, tuple(takes), gives, last.alive)


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
