"""Stacked programs: one stage of several models, alike but for their weights, run on one input as a single program.

Many heads on one trunk are the case: each is a few small operators, and what it takes to begin one costs more than its
arithmetic. The weights of all heads lie in one tensor with the heads along a new first axis. What does not depend on them is
computed once; a linear layer of all heads is one matrix product on a common input, a batched one after that; operators that work
number by number run as they are. A graph with anything else is not stacked. The idea is HFTA's (Wang et al., 2021), here for
inference and found by structure. Must not import anything above layer 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch.nn import functional

from sidecar.ir import Graph, Node, Value, node_values
from sidecar.lowering import TURNED_LINEAR
from sidecar.packed import Packed
from sidecar.programs import Program

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


class StackedProgram:
    """A prepared graph for any number of models that have its structure."""

    def __init__(self, graph: Graph, program: Program) -> None:
        self._graph = graph
        self._program = program
        self._places = _places(graph)

    def run(self, weights: Sequence[Stack], inputs: Sequence[torch.Tensor], count: int) -> list[list[torch.Tensor]]:
        """Return the outputs of each of ``count`` models on one input. Raises what torch raises."""
        values: list[Any] = [*weights, *inputs, *self._program.blank]
        first = len(weights) + len(inputs)
        with torch.inference_mode():
            for step in self._program.steps:
                node = self._graph.nodes[step.node]
                if step.node in self._places and step.target == first + step.node:
                    values[step.target] = _apply(node, self._places[step.node], values, step, first, len(weights))
                else:
                    values[step.target] = step.call(*step.gather(values))
            outputs = [values[slot] for slot in self._program.results]
            return [[output[head] for output in outputs] for head in range(count)]


def _apply(node: Node, is_first: bool, values: list[Any], step: Any, first: int, weight_count: int) -> torch.Tensor:
    """Compute a node that differs from head to head: [heads, ..., width]. ``is_first``: what it takes is common to all."""
    if node.op not in _LINEAR:
        return step.call(*step.gather(values))  # type: ignore[no-any-return]
    (source, weight, *rest) = node_values(node)
    x = values[_slot(source, first, weight_count)]
    if node.op == TURNED_LINEAR:
        matrix, bias = values[weight.index]
    else:
        matrix, bias = values[weight.index], values[rest[0].index] if rest else None
    heads, outside, inside = matrix.shape
    if is_first:
        y = functional.linear(x, matrix.reshape(heads * outside, inside), None if bias is None else bias.reshape(-1))
        return y.reshape(*y.shape[:-1], heads, outside).movedim(-2, 0)
    rows = x.reshape(heads, -1, inside)
    turned = matrix.transpose(1, 2)
    y = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, turned)
    return y.reshape(*x.shape[:-1], outside)


def _slot(value: Value, first: int, weight_count: int) -> int:
    return weight_count + value.index if value.kind == "input" else first + value.index


def _places(graph: Graph) -> dict[int, bool]:
    """Return the nodes that differ from head to head, and of each whether what it is applied to is common to all."""
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
