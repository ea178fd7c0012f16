"""Programs: graphs made ready to run on torch, without their weights.

A program is a list of steps over one flat list of values: weights first, then inputs, then results and constants.
Running it binds weights and inputs by reference, so one program serves whatever copies of the weights lie on the device
at the moment. A ``Program`` is immutable and may be run by several threads at once. Must not import anything above
layer 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, NoReturn

import torch
from trunkline.errors import Detail, DeviceFault, DeviceOutOfMemory, ValueOutOfBounds

from sidecar import operators
from sidecar.ir import Node

# What torch raises when an operator refuses its arguments, or our arithmetic on sizes does.
FAILURES: Final = (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError)
# What is said by those that run out of memory and raise a RuntimeError: torch's allocators, CUDA, its libraries, the C++ library.
_NO_MEMORY: Final = ("out of memory", "not enough memory", "allocate memory", "STATUS_ALLOC_FAILED", "bad_alloc")
# What is said of an index, a class, or places for which there are no numbers, by operators that raise a RuntimeError.
_RANGE: Final = (
    "out of bounds",
    "out of range",
    "out of DATA bounds",
    "Class values must be",
    "elements of source < number of ones",
)
# How much was asked for, as the allocators say it.
_ASKED: Final = re.compile(r"allocate (\d+(?:\.\d+)?) (bytes|[KMGT]iB)")
_UNITS: Final = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


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
    # Where nodes leave whether an index was out of range, with the nodes.
    flags: tuple[tuple[int, int], ...] = ()

    def run(self, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        """Return the outputs, none of which shares memory with a weight or an input.

        Raises ValueOutOfBounds when an index is out of range, DeviceOutOfMemory when there is no room for a
        result, DeviceFault for any other failure.
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
            except FAILURES as error:
                translate(error, self.nodes[node], node)
            self.look(values)
            return [self._output(number, values) for number in range(len(self.results))]

    def look(self, values: Sequence[Any]) -> None:
        """Raise ValueOutOfBounds if an index was out of range where nobody else says so. On CUDA this waits for the run."""
        flags = [(values[slot], node) for slot, node in self.flags if values[slot] is not None]
        if not flags:
            return
        try:
            found = torch.stack([flag for flag, _ in flags]).tolist()
        except FAILURES as error:
            raise failure("looking whether indices were in range", error) from error
        for is_bad, (_, node) in zip(found, flags, strict=True):
            if is_bad:
                raise _out_of_range(self.nodes[node], node)

    def _output(self, number: int, values: list[Any]) -> Any:
        output = values[self.results[number]]
        try:
            if min(output.shape, default=0) < 0:  # which expand makes without a word
                raise DeviceFault(f"output {number} has the shape {list(output.shape)}", output=number)
            start = output.untyped_storage().data_ptr() if self.sources[number] else None
            if any(values[source].untyped_storage().data_ptr() == start for source in self.sources[number]):
                return output.clone()
        except FAILURES as error:
            raise failure(f"output {number}", error, output=number) from error
        return output


def translate(error: Exception, node: Node, index: int) -> NoReturn:
    """Raise what is told of an error of torch's that a node has raised."""
    text = str(error)
    is_range = isinstance(error, IndexError) or any(words in text for words in _RANGE)
    # Which axis is a constant of the graph.
    if node.op in operators.INDEXING and is_range and not text.startswith("Dimension out of range"):
        raise _out_of_range(node, index) from error
    raise failure(_where(node, index), error, node=index, operator=node.op) from error


def _out_of_range(node: Node, index: int) -> ValueOutOfBounds:
    return ValueOutOfBounds(f"an index is out of range in {_where(node, index)}", node=index, operator=node.op)


def _where(node: Node, index: int) -> str:
    return f"{node.op} (node {index}, {node.origin or 'no origin'})"


def failure(what: str, error: Exception, **details: Detail) -> DeviceFault:
    """Return the error that tells of one of torch's; how it is raised says whether memory was what it lacked, and how much."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY):
        if asked := _ASKED.search(str(error)):
            details["asked_bytes"] = int(float(asked[1]) * _UNITS[asked[2]])
        return DeviceOutOfMemory(f"{what} failed: out of memory", **details)
    return DeviceFault(f"{what} failed: {type(error).__name__}", **details)
