"""Programs: graphs made ready to run on torch, without their weights.

A program is a list of steps over one flat list of values: weights first, then inputs, then results and constants.
Running it binds weights and inputs by reference, so one program serves whatever copies of the weights lie on the device
at the moment. A ``Program`` is immutable and may be run by several threads at once. Must not import anything above
layer 2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from trunkline.errors import DeviceFault, ValueOutOfBounds

from sidecar import operators
from sidecar.ir import Node

# What torch raises when an operator refuses its arguments, or our arithmetic on sizes does.
_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError)


class Step(NamedTuple):
    """One call: ``values[target] = call(*gather(values))``, after which the ``released`` values are forgotten."""

    call: Callable[..., Any]
    gather: Callable[[list[Any]], Sequence[Any]]
    target: int
    released: tuple[int, ...]
    node: int


@dataclass(frozen=True, slots=True)
class Program:
    """A prepared graph. ``blank`` holds the constants, and None where a result will lie."""

    nodes: tuple[Node, ...]
    weight_count: int
    input_count: int
    blank: tuple[Any, ...]
    steps: tuple[Step, ...]
    results: tuple[int, ...]
    sources: tuple[tuple[int, ...], ...]  # per result: weights and inputs whose memory it may share

    def run(self, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs, none of which shares memory with a weight or an input.

        Raises ValueOutOfBounds when an index taken from an input is out of range, DeviceFault for any other failure.
        """
        assert len(weights) == self.weight_count, f"{len(weights)} weights for {self.weight_count}"
        assert len(inputs) == self.input_count, f"{len(inputs)} inputs for {self.input_count}"
        values = [*weights, *inputs, *self.blank]
        node = 0
        with torch.inference_mode():
            try:
                for call, gather, target, released, node in self.steps:  # noqa: B007  (read when a call fails)
                    values[target] = call(*gather(values))
                    for slot in released:
                        values[slot] = None
            except _FAILURES as error:
                _translate(error, self.nodes[node], node)
            return [self._output(number, values) for number in range(len(self.results))]

    def _output(self, number: int, values: list[Any]) -> Any:
        output = values[self.results[number]]
        try:
            if min(output.shape, default=0) < 0:  # which expand makes without a word
                raise DeviceFault(f"output {number} has the shape {list(output.shape)}", output=number)
            start = output.untyped_storage().data_ptr() if self.sources[number] else None
            if any(values[source].untyped_storage().data_ptr() == start for source in self.sources[number]):
                return output.clone()
        except _FAILURES as error:
            raise DeviceFault(f"output {number} failed: {type(error).__name__}", output=number) from error
        return output


def _translate(error: Exception, node: Node, index: int) -> NoReturn:
    text = str(error)
    where = f"{node.op} (node {index}, {node.origin or 'no origin'})"
    if node.op in operators.INDEXING and (isinstance(error, IndexError) or "out of bounds" in text):
        raise ValueOutOfBounds(f"an index is out of range in {where}", node=index, operator=node.op) from error
    reason = type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in text or "allocate" in text:
        reason = "out of memory"
    raise DeviceFault(f"{where} failed: {reason}", node=index, operator=node.op) from error
