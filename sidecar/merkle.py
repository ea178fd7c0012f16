"""Merkle identity: names for what a graph computes, made of nothing but what it computes.

Every input, weight and node gets two ids, each the sha256 of a canonical encoding (its *token*):

structure
    operator, static arguments, and the structures of what it is applied to. A weight's structure is its dtype and shape.
    Equal structure: the same executable, with other weights.
value
    the same with the values of what it is applied to. A weight's value includes the digest of its bytes. Equal value: the same
    result for the same inputs, so it needs to be computed once.

A graph may be in a *domain* (``sidecar.tenants``). Then its values, and the digests its weights are known by, are made of the
domain and of what they would be without one. Everything that shares anything does so by these names; so nothing is shared between
domains, and nobody has to see to that but this module. Structures have no domain: an executable holds no weights. Nor have
weights that are *public*, as an operator says of models: their digests are the same in all domains, so that their bytes are
shared. Values always have: what is computed, of whatever weights, belongs to one domain.

Names do not count: not those of inputs, outputs and symbols, nor where a node came from. Two models that were converted
independently have equal ids wherever they begin with equal computation. An input is known by its dtype, its shape, and its
place among the inputs of the same dtype and shape.

The idea is hash-consing (Ershov, 1958) over a Merkle DAG, as in the stores of Git and Nix. Pure; must not import torch.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from typing import Final

import msgpack
from trunkline.protocol import TensorSpec

from sidecar.ir import Argument, Dtype, Enum, Graph, Node, Value, Weight
from sidecar.slices import paced

# Part of every token, so that an id of this scheme can never be taken for one of the next.
SCHEME: Final = 1
Digest = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Identity:
    """The ids of one input, weight or node. ``content`` is what its value would be without the domain; without one, its value."""

    structure: bytes
    content: bytes
    value: bytes


@dataclass(frozen=True)
class Identities:
    """The identities of a graph's inputs, weights and nodes, each in the graph's order."""

    inputs: tuple[Identity, ...]
    weights: tuple[Identity, ...]
    nodes: tuple[Identity, ...]

    def of(self, value: Value) -> Identity:
        """Return the identity of what ``value`` refers to; of a node's, whichever of its results it picks."""
        return {"input": self.inputs, "weight": self.weights, "node": self.nodes}[value.kind][value.index]


class CollisionError(Exception):
    """Two different tokens have one id. Nothing may be shared by that id."""


class Tokens:
    """The tokens behind ids. An equal id is believed only when the tokens are equal, too."""

    def __init__(self, digest: Digest = lambda token: hashlib.sha256(token).digest()) -> None:
        self._digest = digest
        self._tokens: dict[bytes, bytes] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def name(self, token: bytes) -> bytes:
        """Return the id of ``token``. Raises CollisionError when another token has it."""
        found = self._digest(token)
        self._hold(found, token)
        return found

    def of(self, ids: Iterable[bytes]) -> Tokens:
        """Return some of them: the tokens behind ``ids``."""
        found = Tokens(self._digest)
        found._tokens = {each: self._tokens[each] for each in ids}
        return found

    def add(self, other: Tokens) -> None:
        """Have the tokens of ``other``, too. Raises CollisionError, in which case some of them may be here."""
        for found, token in other._tokens.items():
            self._hold(found, token)

    def _hold(self, found: bytes, token: bytes) -> None:
        if self._tokens.setdefault(found, token) != token:
            raise CollisionError(f"two tokens have the id {found.hex()[:16]}")

    def forget(self, ids: set[bytes]) -> None:
        """Drop the tokens of ids that are in use no more."""
        for each in ids:
            self._tokens.pop(each, None)

    def keep(self, ids: Container[bytes]) -> None:
        """Drop the tokens of all other ids, such as those of a graph that was refused halfway."""
        self._tokens = {each: token for each, token in self._tokens.items() if each in ids}

    def identify(self, graph: Graph) -> Identities:
        """Return the identities of everything in ``graph``."""
        inputs = tuple(self._both(token, token, graph.domain) for token in _input_tokens(graph.inputs))
        weights = tuple(self._weight(weight, graph.domain) for weight in paced(graph.weights))
        nodes: list[Identity] = []
        known = {"input": inputs, "weight": weights, "node": nodes}
        for node in paced(graph.nodes):
            structure = _node_token(node, lambda value: known[value.kind][value.index].structure)
            content = _node_token(node, lambda value: known[value.kind][value.index].content)
            nodes.append(self._both(structure, content, graph.domain))
        return Identities(inputs, weights, tuple(nodes))

    def identify_again(self, found: Identities, domain: str) -> Identities:
        """Return the identities, in another domain, of a graph whose identities were ``found`` here and are not forgotten."""

        def moved(identities: tuple[Identity, ...]) -> tuple[Identity, ...]:
            return tuple(Identity(each.structure, each.content, self._value(each.content, domain)) for each in paced(identities))

        return Identities(moved(found.inputs), moved(found.weights), moved(found.nodes))

    def _both(self, structure: bytes, content: bytes, domain: str) -> Identity:
        known_by = self.name(_token("value", content))
        return Identity(self.name(_token("structure", structure)), known_by, self._value(known_by, domain))

    def _value(self, content: bytes, domain: str) -> bytes:
        return self.name(_token("value in", domain, content)) if domain else content

    def _weight(self, weight: Weight, domain: str) -> Identity:
        structure = _token("weight", weight.dtype, list(weight.shape))
        content = _token("weight", weight.dtype, list(weight.shape), bytes.fromhex(weight.blob))
        return self._both(structure, content, domain)


def in_domain(graph: Graph, domain: str, public: Container[str] = ()) -> Graph:
    """Return a graph as a domain knows it, whichever it is in: with identities of its own for its weights, and for its values.

    The bytes of its weights are read from the store as before: each says which blob it has. Weights of ``public`` blobs have the
    identity that they have without domains.
    """
    if graph.domain == domain == "":
        return graph
    return replace(graph, domain=domain, weights=tuple(_weight_in(weight, domain, public) for weight in paced(graph.weights)))


def _weight_in(weight: Weight, domain: str, public: Container[str]) -> Weight:
    digest, stored_as = weight.blob, ""
    if domain and weight.blob not in public:
        digest, stored_as = hashlib.sha256(_token("weight in", domain, bytes.fromhex(weight.blob))).hexdigest(), weight.blob
    return Weight(digest, weight.dtype, weight.shape, weight.size_bytes, weight.crc32, stored_as)


def input_values(graph: Graph) -> tuple[bytes, ...]:
    """Return the value ids of a graph's inputs."""
    inputs_only = replace(graph, weights=(), nodes=(), results=())
    return tuple(identity.value for identity in Tokens().identify(inputs_only).inputs)


def skeleton_id(graph: Graph) -> str:
    """Return the name of a graph without the bytes of its weights, in hexadecimal.

    Graphs of one skeleton are run by one prepared program, each with its own weights in the same places: a model and
    all that were tuned from it. Ids of structure would not do here, because they do not tell which of two weights of one
    shape comes first.
    """
    weights = [[weight.dtype, list(weight.shape)] for weight in graph.weights]
    nodes = [_node_token(node, _place) for node in paced(graph.nodes)]
    results = [[_place(value), value.item] for value in graph.results]
    return hashlib.sha256(_token("skeleton", _input_tokens(graph.inputs), weights, nodes, results)).hexdigest()


def _place(value: Value) -> bytes:
    return f"{value.kind} {value.index}".encode()


def _token(*fields: object) -> bytes:
    # msgpack writes every value of these types in one way only: integers as short as they go, floats as eight bytes.
    token: bytes = msgpack.packb([SCHEME, *fields], use_bin_type=True)
    return token


def _input_tokens(inputs: tuple[TensorSpec, ...]) -> list[bytes]:
    counts: dict[bytes, int] = {}
    tokens = []
    for spec in inputs:
        kind = _token("input", spec.dtype, _shape(spec.shape))
        place = counts[kind] = counts.get(kind, -1) + 1
        tokens.append(_token(kind, place))
    return tokens


def _shape(shape: tuple[int | str, ...]) -> list[object]:
    """Return sizes, and for each symbol the number of its first use in this shape: what it is called does not matter."""
    first: dict[str, int] = {}
    return [axis if isinstance(axis, int) else ["symbol", first.setdefault(axis, len(first))] for axis in shape]


def _node_token(node: Node, id_of: Callable[[Value], bytes]) -> bytes:
    arguments = [_argument(argument, id_of) for argument in node.args]
    keywords = [[name, _argument(argument, id_of)] for name, argument in node.kwargs]
    return _token("node", node.op, arguments, keywords)


def _argument(argument: Argument, id_of: Callable[[Value], bytes]) -> list[object]:
    """Return an argument with its type, since 1, 1.0 and True compare equal and mean different things."""
    match argument:
        case Value():
            return ["value", id_of(argument), argument.item]
        case Dtype():
            return ["dtype", argument.name]
        case Enum():
            return ["enum", argument.word]
        case tuple():
            return ["list", *(_argument(member, id_of) for member in argument)]
        case bool() | None:
            return ["word", argument]
        case float():
            # One not-a-number for all, and no rounding of the others.
            return ["float", b"nan" if math.isnan(argument) else struct.pack(">d", argument)]
        case int():
            return ["int", str(argument)]
