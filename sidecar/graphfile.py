"""``graph.json``: the canonical text of a graph, and the strict reader that turns a stranger's text into a ``Graph``.

A node may refer only to inputs, weights and nodes with a smaller number, so what was read has no cycle and no dangling
reference. Operators and words come from the lists of ``sidecar.operators``; sizes are integers or declared symbols and
nothing is parsed as an expression. Pure functions, callable from any thread. Must not import torch.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Literal

from trunkline import protocol
from trunkline.protocol import TensorSpec
from trunkline.signature import UNKNOWN_AXIS

from sidecar import operators
from sidecar.errors import BundleError
from sidecar.ir import INTEGER_DTYPES, ITEM_BYTES, Argument, Dtype, Enum, Graph, Node, Symbol, Value, Weight
from sidecar.slices import paced
from sidecar.strictjson import (
    choice,
    elements,
    encode_json,
    integer,
    load_json,
    members,
    printable,
    refuse,
    shown,
    text,
)

FORMAT = "trunkline-graph-1"

MAX_GRAPH_BYTES = 64 << 20
# An 80-layer decoder has 5,000 or so. Before a stage is run first, each of its nodes takes the engine some hundredths of a
# millisecond, in which it answers nobody.
MAX_NODE_COUNT = 20_000
MAX_WEIGHT_COUNT = 100_000
MAX_SYMBOL_COUNT = 16
MAX_RANK = 12
MAX_ELEMENT_COUNT = (1 << 48) - 1  # of one tensor
MAX_SYMBOL_VALUE = (1 << 31) - 1
MAX_ARGUMENT_COUNT = 32
MAX_LIST_COUNT = 4096
MAX_LIST_DEPTH = 2
# Lists hold sizes, strides and paddings. torch walks along some of them without looking whether there is anything to
# compute: a padding of 2**40 around an empty tensor never ends.
MAX_LISTED_INTEGER = (1 << 31) - 1
MAX_ITEM = 4095
MAX_ORIGIN_COUNT = 200

DIGEST = re.compile(r"[0-9a-f]{64}")
SYMBOL = re.compile(r"[a-z][a-z0-9_]{0,31}")
TENSOR_NAME = re.compile(rf"[A-Za-z_][A-Za-z0-9_.]{{0,{protocol.MAX_NAME - 1}}}")
KEYWORD = re.compile(r"[a-z_][a-z0-9_]{0,31}")


def _encode_argument(argument: Argument) -> object:
    match argument:
        case Value(kind, index, None):
            return {kind: index}
        case Value(kind, index, item):
            return {kind: index, "item": item}
        case Dtype(name):
            return {"dtype": name}
        case Enum(word):
            return {"enum": word}
        case tuple():
            return [_encode_argument(member) for member in argument]
        case float() if not math.isfinite(argument):
            return {"float": "nan" if math.isnan(argument) else "inf" if argument > 0 else "-inf"}
        case _:
            return argument


def _encode_tensor(spec: TensorSpec) -> dict[str, object]:
    return {
        "name": spec.name,
        "dtype": spec.dtype,
        "shape": list(spec.shape),
        "minimum": spec.minimum,
        "maximum": spec.maximum,
    }


def _encode_weight(weight: Weight) -> dict[str, object]:
    return {
        "digest": weight.blob,
        "dtype": weight.dtype,
        "shape": list(weight.shape),
        "size_bytes": weight.size_bytes,
        "crc32": weight.crc32,
    }


def canonical_graph(graph: Graph) -> bytes:
    """Return the one JSON text of a graph, whichever domain it is in; its sha256 is the graph's digest."""
    return encode_json(
        {
            "format": FORMAT,
            "symbols": [vars(symbol) for symbol in graph.symbols],
            "inputs": [_encode_tensor(spec) for spec in graph.inputs],
            "outputs": [_encode_tensor(spec) for spec in graph.outputs],
            "weights": [_encode_weight(weight) for weight in paced(graph.weights)],
            "nodes": [
                {
                    "op": node.op,
                    "args": [_encode_argument(argument) for argument in node.args],
                    "kwargs": {name: _encode_argument(argument) for name, argument in node.kwargs},
                    "origin": node.origin,
                }
                for node in paced(graph.nodes)
            ],
            "results": [_encode_argument(value) for value in graph.results],
        }
    )


def graph_digest(graph: Graph) -> str:
    """Return the sha256 of the canonical text, in hexadecimal."""
    return hashlib.sha256(canonical_graph(graph)).hexdigest()


def _shape(value: object, place: str, symbols: dict[str, Symbol], unknown: bool) -> tuple[int | str, ...]:
    shape: list[int | str] = []
    count = 1
    for axis, size in enumerate(elements(value, place, protocol.MAX_DIMENSIONS)):
        where = f"{place}[{axis}]"
        if isinstance(size, str):
            if size in symbols:
                # The smallest size counts: what a call may ask for in all is the engine's to decide, per call.
                count *= symbols[size].minimum
            elif not (unknown and size == UNKNOWN_AXIS):
                refuse(where, f"{shown(size)} is no declared symbol")
            shape.append(size)
        else:
            shape.append(integer(size, where, 0, MAX_ELEMENT_COUNT))
            count *= integer(size, where, 0, MAX_ELEMENT_COUNT)
        if count > MAX_ELEMENT_COUNT:
            refuse(place, f"has more than {MAX_ELEMENT_COUNT} elements")
    return tuple(shape)


def _tensors(value: object, place: str, symbols: dict[str, Symbol], outputs: bool) -> tuple[TensorSpec, ...]:
    found: list[TensorSpec] = []
    for number, entry in enumerate(elements(value, place, protocol.MAX_TENSORS)):
        where = f"{place}[{number}]"
        fields = members(entry, where, ("name", "dtype", "shape", "minimum", "maximum"))
        dtype = choice(fields["dtype"], f"{where}.dtype", protocol.ITEM_BYTES)
        bounds: list[int | None] = []
        for key in ("minimum", "maximum"):
            bound = fields[key]
            if bound is not None and (outputs or dtype not in INTEGER_DTYPES):
                refuse(f"{where}.{key}", "bounds belong to integer inputs only")
            bounds.append(None if bound is None else integer(bound, f"{where}.{key}", -(1 << 63), (1 << 63) - 1))
        if bounds[0] is not None and bounds[1] is not None and bounds[0] > bounds[1]:
            refuse(where, f"minimum {bounds[0]} is above maximum {bounds[1]}")
        found.append(
            TensorSpec(
                name=text(fields["name"], f"{where}.name", TENSOR_NAME),
                dtype=dtype,
                shape=_shape(fields["shape"], f"{where}.shape", symbols, unknown=outputs),
                minimum=bounds[0],
                maximum=bounds[1],
            )
        )
    if not found:
        refuse(place, "must not be empty")
    if len({spec.name for spec in found}) != len(found):
        refuse(place, "names one tensor twice")
    return tuple(found)


def _symbols(value: object) -> dict[str, Symbol]:
    found: dict[str, Symbol] = {}
    for number, entry in enumerate(elements(value, "graph.json: symbols", MAX_SYMBOL_COUNT)):
        place = f"graph.json: symbols[{number}]"
        fields = members(entry, place, ("name", "minimum", "maximum"))
        name = text(fields["name"], f"{place}.name", SYMBOL)
        minimum = integer(fields["minimum"], f"{place}.minimum", 1, MAX_SYMBOL_VALUE)
        maximum = integer(fields["maximum"], f"{place}.maximum", minimum, MAX_SYMBOL_VALUE)
        if name in found:
            refuse(place, f"symbol {name!r} is declared twice")
        found[name] = Symbol(name, minimum, maximum)
    return found


def _weights(value: object) -> tuple[Weight, ...]:
    found: list[Weight] = []
    first: dict[str, Weight] = {}
    for number, entry in enumerate(paced(elements(value, "graph.json: weights", MAX_WEIGHT_COUNT))):
        place = f"graph.json: weights[{number}]"
        fields = members(entry, place, ("digest", "dtype", "shape", "size_bytes", "crc32"))
        dtype = choice(fields["dtype"], f"{place}.dtype", ITEM_BYTES)
        shape = tuple(
            integer(size, f"{place}.shape", 0, MAX_ELEMENT_COUNT)
            for size in elements(fields["shape"], f"{place}.shape", MAX_RANK)
        )
        expected = math.prod(shape) * ITEM_BYTES[dtype]
        if expected > MAX_ELEMENT_COUNT:
            refuse(f"{place}.shape", f"has more than {MAX_ELEMENT_COUNT} bytes")
        size_bytes = integer(fields["size_bytes"], f"{place}.size_bytes", 0, MAX_ELEMENT_COUNT)
        if size_bytes != expected:
            refuse(f"{place}.size_bytes", f"is {size_bytes}, dtype and shape need {expected}")
        weight = Weight(
            digest=text(fields["digest"], f"{place}.digest", DIGEST),
            dtype=dtype,
            shape=shape,
            size_bytes=size_bytes,
            crc32=integer(fields["crc32"], f"{place}.crc32", 0, (1 << 32) - 1),
        )
        other = first.setdefault(weight.digest, weight)
        if (other.size_bytes, other.crc32) != (weight.size_bytes, weight.crc32):
            refuse(place, "size or checksum differs from another weight of the same digest")
        found.append(weight)
    return tuple(found)


def _value(fields: dict[str, object], place: str, counts: dict[str, int]) -> Value:
    kind: Literal["input", "weight", "node"]
    if "input" in fields:
        kind = "input"
    elif "weight" in fields:
        kind = "weight"
    elif "node" in fields:
        kind = "node"
    else:
        refuse(place, "must refer to an input, a weight or a node")
    members(fields, place, (kind,), ("item",) if kind == "node" else ())
    index = integer(fields[kind], f"{place}.{kind}", 0, counts[kind] - 1)
    item = integer(fields["item"], f"{place}.item", 0, MAX_ITEM) if "item" in fields else None
    return Value(kind, index, item)


def _argument(value: object, place: str, counts: dict[str, int], depth: int = 0) -> Argument:
    if value is None or isinstance(value, (bool, float)):
        return value
    if isinstance(value, int):
        limit = MAX_LISTED_INTEGER if depth else (1 << 63) - 1
        return integer(value, place, -limit - 1, limit)
    if isinstance(value, list):
        if depth == MAX_LIST_DEPTH:
            refuse(place, f"lists are nested deeper than {MAX_LIST_DEPTH}")
        return tuple(
            _argument(entry, f"{place}[{number}]", counts, depth + 1)
            for number, entry in enumerate(elements(value, place, MAX_LIST_COUNT))
        )
    if not isinstance(value, dict):
        refuse(place, f"{shown(value)} is no argument")
    if "dtype" in value:
        return Dtype(choice(members(value, place, ("dtype",))["dtype"], f"{place}.dtype", ITEM_BYTES))
    if "enum" in value:
        return Enum(choice(members(value, place, ("enum",))["enum"], f"{place}.enum", operators.ENUMS))
    if "float" in value:
        return float(choice(members(value, place, ("float",))["float"], f"{place}.float", ("inf", "-inf", "nan")))
    return _value(value, place, counts)


def _node(entry: object, number: int, counts: dict[str, int]) -> Node:
    place = f"graph.json: nodes[{number}]"
    fields = members(entry, place, ("op", "args", "kwargs", "origin"))
    keywords = fields["kwargs"]
    if not isinstance(keywords, dict):
        refuse(f"{place}.kwargs", f"must be an object, not {shown(keywords)}")
    if len(keywords) > MAX_ARGUMENT_COUNT:
        refuse(f"{place}.kwargs", f"has {len(keywords)} entries, the limit is {MAX_ARGUMENT_COUNT}")
    op = choice(fields["op"], f"{place}.op", operators.ALLOWED)
    try:
        args = tuple(
            _argument(argument, f"{place}.args[{position}]", counts)
            for position, argument in enumerate(elements(fields["args"], f"{place}.args", MAX_ARGUMENT_COUNT))
        )
        kwargs = tuple(
            (text(key, f"{place}.kwargs", KEYWORD), _argument(keywords[key], f"{place}.kwargs.{key[:32]}", counts))
            for key in sorted(keywords)
        )
    except BundleError as error:
        raise BundleError(f"{error.message} (an argument of {op})", node=number, operator=op) from error
    node = Node(op, args, kwargs, printable(fields["origin"], f"{place}.origin", MAX_ORIGIN_COUNT))
    operators.check_node(node, number)
    return node


def parse_graph(data: bytes) -> Graph:
    """Read the bytes of ``graph.json``. Raises ``BundleError`` naming the place of the first thing that is wrong."""
    root = members(
        load_json(data, "graph.json", MAX_GRAPH_BYTES),
        "graph.json",
        ("format", "symbols", "inputs", "outputs", "weights", "nodes", "results"),
    )
    choice(root["format"], "graph.json: format", (FORMAT,))
    symbols = _symbols(root["symbols"])
    inputs = _tensors(root["inputs"], "graph.json: inputs", symbols, outputs=False)
    outputs = _tensors(root["outputs"], "graph.json: outputs", symbols, outputs=True)
    bound = {axis for spec in inputs for axis in spec.shape}
    for name in symbols:
        if name not in bound:
            refuse("graph.json: symbols", f"no input has an axis of size {name!r}")
    weights = _weights(root["weights"])
    counts = {"input": len(inputs), "weight": len(weights), "node": 0}
    nodes: list[Node] = []
    for number, entry in enumerate(paced(elements(root["nodes"], "graph.json: nodes", MAX_NODE_COUNT))):
        counts["node"] = number  # a node sees only those before it
        nodes.append(_node(entry, number, counts))
    counts["node"] = len(nodes)
    results: list[Value] = []
    for number, entry in enumerate(elements(root["results"], "graph.json: results", protocol.MAX_TENSORS)):
        place = f"graph.json: results[{number}]"
        if not isinstance(entry, dict):
            refuse(place, f"must be an object, not {shown(entry)}")
        results.append(_value(entry, place, counts))
    if len(results) != len(outputs):
        refuse("graph.json: results", f"has {len(results)} entries for {len(outputs)} outputs")
    return Graph(tuple(symbols.values()), inputs, outputs, weights, tuple(nodes), tuple(results))
