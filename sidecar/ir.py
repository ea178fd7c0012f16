"""The language of graphs: operations on tensors over inputs, weights and the results of earlier operations.

All values are immutable and compare by content; they may be shared between threads. A ``Graph`` that came out of
``sidecar.graphfile`` is known to be well formed; one that a program builds is checked when it is written and read back.
Must not import torch, nor anything that does I/O.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from trunkline.protocol import TensorSpec

# Bytes per element of every dtype a weight may have. What travels has numpy's dtypes, so no bfloat16.
ITEM_BYTES = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
}
INTEGER_DTYPES = frozenset({"uint8", "int8", "int16", "int32", "int64"})


@dataclass(frozen=True)
class Symbol:
    """A size that differs between calls, such as the batch; both bounds are inclusive."""

    name: str
    minimum: int
    maximum: int


@dataclass(frozen=True)
class Weight:
    """One constant tensor; dtype and shape say how to read its bytes.

    ``digest`` is its identity: whatever holds weights knows it by that, and weights of one digest are one. It is the sha256 of
    its bytes, except in a domain (``sidecar.merkle.in_domain``), where ``stored_as`` is that.
    """

    digest: str
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    crc32: int
    stored_as: str = ""

    @property
    def blob(self) -> str:
        """Return the sha256 of its bytes, under which the store has them."""
        return self.stored_as or self.digest


@dataclass(frozen=True)
class Value:
    """A reference to a tensor or size: input, weight or node number ``index``.

    ``item`` picks one result of a node whose operator returns several; None otherwise.
    """

    kind: Literal["input", "weight", "node"]
    index: int
    item: int | None = None


@dataclass(frozen=True)
class Dtype:
    """An argument that is an element type, by numpy's name (or ``bfloat16``)."""

    name: str


@dataclass(frozen=True)
class Enum:
    """An argument that is one word of the fixed list ``operators.ENUMS``."""

    word: str


Argument = int | float | bool | None | Value | Dtype | Enum | tuple["Argument", ...]


@dataclass(frozen=True)
class Node:
    """One operation. ``kwargs`` is sorted by name. ``origin`` tells people where it came from and means nothing."""

    op: str
    args: tuple[Argument, ...]
    kwargs: tuple[tuple[str, Argument], ...] = ()
    origin: str = ""


@dataclass(frozen=True)
class Graph:
    """A pure function of its inputs. ``results`` has one reference per output. Nodes stand in order of execution.

    ``domain`` is whose it is: graphs of different domains have nothing in common but their structure. Not written to files.
    """

    symbols: tuple[Symbol, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: tuple[Weight, ...]
    nodes: tuple[Node, ...]
    results: tuple[Value, ...]
    domain: str = ""


def values_in(argument: Argument) -> Iterator[Value]:
    """Yield the references in an argument, those in lists included."""
    if isinstance(argument, Value):
        yield argument
    elif isinstance(argument, tuple):
        for member in argument:
            yield from values_in(member)


def node_values(node: Node) -> Iterator[Value]:
    """Yield all references of a node, positional arguments first."""
    for argument in node.args:
        yield from values_in(argument)
    for _, argument in node.kwargs:
        yield from values_in(argument)


def model_bytes(graph: Graph) -> int:
    """Return the bytes of the graph's weights, each digest counted once."""
    return sum({weight.digest: weight.size_bytes for weight in graph.weights}.values())
