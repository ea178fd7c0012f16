"""Stacked programs: one stage of several models, alike but for their weights, run as a single program.

Many heads on one trunk are the case: each is a few small operators, and what it takes to begin one costs more than its
arithmetic. The weights of all heads lie in one tensor with the heads along a new first axis. What does not depend on them is
computed once for each input: all models have one in common, or each has its own, of one shape. A linear layer of all heads is one
matrix product on a common input, a batched one after that and on inputs of their own; operators that work number by number run as
they are. A graph with anything else is not stacked. The idea is HFTA's (Wang et al., 2021), here for inference and found by
structure. Must not import anything above layer 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple

import torch
from torch.nn import functional

from sidecar.ir import Graph, Node, Value, node_values
from sidecar.lowering import TURNED_LINEAR
from sidecar.packed import Packed
from sidecar.programs import FAILURES, Program, translate

# Number by number: the axis of the heads does not matter to them. Their other arguments are constants.
_POINTWISE: Final = frozenset(
    f"aten.{name}.default"
    for name in (
        *("relu", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "leaky_relu"),
        *("hardtanh", "hardsigmoid", "hardswish", "softplus", "sigmoid", "tanh"),
    )
)
_LINEAR: Final = frozenset({"aten.linear.default", TURNED_LINEAR})
# Larger weights are worth their own multiplication, and not worth a copy.
LARGEST_BYTES: Final = 1024 * 1024

# A weight of all heads: [heads, ...]; of a packed linear layer its matrix and its bias.
Stack = torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]


class _Linear(NamedTuple):
    """A linear layer: where its input lies among a program's values, and its weight and bias among the weights.

    ``is_first``: what it is applied to depends on no weight.
    """

    source: int
    weight: int
    bias: int | None
    is_packed: bool
    is_first: bool


class StackedProgram:
    """A prepared graph for any number of models that have its structure."""

    def __init__(self, graph: Graph, program: Program) -> None:
        self._program = program
        first = len(graph.weights) + len(graph.inputs)
        # Of each step: how it differs from head to head by its weights; None where it does not.
        self._kinds: list[_Linear | Literal["pointwise"] | None] = []
        places = _places(graph)
        for step in program.steps:
            varies = step.node in places and step.target == first + step.node
            node = graph.nodes[step.node]
            self._kinds.append(
                _linear(graph, node, places[step.node]) if varies and node.op in _LINEAR else "pointwise" if varies else None
            )

    def run(self, weights: Sequence[Stack], inputs: Sequence[Sequence[torch.Tensor]]) -> list[list[torch.Tensor]]:
        """Return the outputs of each model. ``inputs`` are those that all of them run on, or one list for each, of equal shapes.

        Raises ValueOutOfBounds when an index of any of them is out of range, DeviceFault, and what torch raises.
        """
        # Of each input; what differs by weights lies with the first, that of all heads in one tensor.
        each: list[list[Any]] = [[*weights, *own, *self._program.blank] for own in inputs]
        values = each[0]
        with torch.inference_mode():
            try:
                for step, kind in zip(self._program.steps, self._kinds, strict=True):
                    if kind is None:
                        for own in each:
                            own[step.target] = step.call(*step.gather(own))
                    elif kind == "pointwise":
                        values[step.target] = step.call(*step.gather(values))
                    else:
                        values[step.target] = _apply(kind, each)
            except FAILURES as error:
                translate(error, self._program.nodes[step.node], step.node)
            for own in each:
                self._program.look(own)
            return [list(outputs) for outputs in zip(*(values[slot].unbind() for slot in self._program.results), strict=True)]


def _linear(graph: Graph, node: Node, is_first: bool) -> _Linear:
    (source, weight, *rest) = node_values(node)
    before = len(graph.weights) if source.kind == "input" else len(graph.weights) + len(graph.inputs)
    return _Linear(before + source.index, weight.index, rest[0].index if rest else None, node.op == TURNED_LINEAR, is_first)


def _apply(linear: _Linear, each: Sequence[list[Any]]) -> torch.Tensor:
    """Compute a linear layer of all heads: [heads, ..., width]."""
    values = each[0]
    x = values[linear.source]
    if linear.is_packed:
        matrix, bias = values[linear.weight]
    else:
        matrix, bias = values[linear.weight], None if linear.bias is None else values[linear.bias]
    heads, outside, inside = matrix.shape
    if linear.is_first and len(each) > 1:
        x = torch.stack([own[linear.source] for own in each])
    elif linear.is_first:
        y = functional.linear(x, matrix.reshape(heads * outside, inside), None if bias is None else bias.reshape(-1))
        return y.reshape(*y.shape[:-1], heads, outside).movedim(-2, 0)
    rows = x.reshape(heads, -1, inside)
    turned = matrix.transpose(1, 2)
    y = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, turned)
    return y.reshape(*x.shape[:-1], outside)


def _places(graph: Graph) -> dict[int, bool]:
    """Return the nodes that differ from head to head by weights, and of each whether what it is applied to does not."""
    found: dict[int, bool] = {}
    for number, node in enumerate(graph.nodes):
        if any(value.kind == "weight" or value.index in found for value in node_values(node) if value.kind != "input"):
            source = next(node_values(node))
            found[number] = not (source.kind == "node" and source.index in found)
    return found


def stackable(graph: Graph) -> bool:
    """Say whether models that have this graph in common, but for the weights, can be run as one program."""
    found = _places(graph)
    if not found or sum(weight.size_bytes for weight in graph.weights) > LARGEST_BYTES:
        return False
    for number in found:
        node = graph.nodes[number]
        values = list(node_values(node))
        if any(value.item is not None for value in values) or node.kwargs or values[0].kind == "weight":
            return False
        if node.op in _LINEAR:
            if any(value.kind != "weight" for value in values[1:]) or not isinstance(node.args[0], Value):
                return False
        elif node.op not in _POINTWISE or len(values) != 1:
            return False
    return all(value.kind == "node" and value.index in found for value in graph.results)


def stack(handles: Sequence[Sequence[Any]]) -> list[Stack]:
    """Return the weights of several models, in the graph's order, each as one tensor. Copies them; raises what torch raises."""
    stacks: list[Stack] = []
    with torch.inference_mode():
        for weights in zip(*handles, strict=True):
            if isinstance(weights[0], Packed):
                biases = [weight.rest[1] for weight in weights]
                bias = None if biases[0] is None else torch.stack(biases)
                stacks.append((torch.stack([weight.rest[0] for weight in weights]), bias))
            else:
                stacks.append(torch.stack(list(weights)))
    return stacks
