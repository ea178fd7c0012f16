"""Lowering: a graph rewritten so that its convolutions and linear layers take weights packed for one device.

There are two ways to pack: as oneDNN wants them, for torch's operators, and in blocks of channels, for ONNX Runtime's
(``sidecar.blocked``). A graph is lowered to one of them as a whole.

The rewritten graph computes the same up to rounding. A batch norm is folded into the weights of the convolution before it,
padding with zeros into the convolution after it; an activation, and the addition of a residual, become part of the operator.
How one packed weight is made is written down as a *recipe*: from which weights of the store, with which settings. Packed
weights stand in for the weights they are made of, which the rewritten graph no longer takes.

What is rewritten depends on nodes and weights alone, never on the specs of inputs, so that a part of a model may be lowered
whose inputs are results of another. Nodes that would fail as they are written are left alone, to fail as before. One
difference remains, where an input or a result is infinite or not a number: a fused relu, hardtanh or hardsigmoid makes a
number of one that is none, and a widened kernel sees one pixel more.

Pure; must not import torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgpack

from sidecar.ir import Argument, Enum, Graph, Node, Value, Weight, node_values
from sidecar.operators import SIZES

# Part of every token, so that a recipe of this scheme can never be taken for one of the next.
SCHEME: Final = 1
CONV2D: Final = "packed.conv2d"
LINEAR: Final = "packed.linear"
TURNED_LINEAR: Final = "packed.turned_linear"
BLOCKED_CONV2D: Final = "blocked.conv2d"
BLOCKED_LINEAR: Final = "blocked.linear"
# The operators of lowered graphs: (input, packed weight, activation, its numbers, what is added before it or None).
BLOCKED: Final = frozenset({BLOCKED_CONV2D, BLOCKED_LINEAR})
OPERATORS: Final = frozenset({CONV2D, LINEAR, TURNED_LINEAR}) | BLOCKED

# A linear weight larger than this stays as it is: packing one takes its size again for a moment.
LARGEST_LINEAR_BYTES: Final = 32 * 1024 * 1024
# From this size on, blocks are faster than a transposed matrix at most batch sizes. Below, what oneDNN needs to begin, some
# 60 µs, is more than they gain (measured with 1 to 128 rows).
SMALLEST_BLOCKED_BYTES: Final = 2 * 1024 * 1024
# ONNX Runtime puts channels into blocks four at a time.
CHANNELS_AT_ONCE: Final = 4
# Blocks of a few channels are mostly padding: they would need more memory and take longer than the weight as it is.
LARGEST_GROWTH: Final = 1.5

Option = int | float | str | tuple[int, ...]
Kind = Literal["conv2d", "linear"]
# How weights are packed: for oneDNN, or in blocks of channels for ONNX Runtime.
Form = Literal["packed", "blocked"]


@dataclass(frozen=True)
class Recipe:
    """How one packed weight is made.

    ``roles`` says what each of ``sources`` is: ``weight``, ``bias``, or of the batch norm ``norm weight``, ``norm bias``,
    ``norm mean``, ``norm variance``. Sources have the shape of their role, all are float32. ``options``, sorted by name:
    of conv2d ``stride``, ``padding``, ``dilation`` (two numbers each), ``groups``, ``epsilon`` where there is a norm, and
    ``zeros`` where the kernel is widened (left, right, above, below); of linear ``layout``: ``blocked`` or ``transposed``.
    With ``block``, the number of channels in a block, either is in blocks of channels, linear without ``layout``.
    """

    kind: Kind
    roles: tuple[str, ...]
    sources: tuple[Weight, ...]
    options: tuple[tuple[str, Option], ...]

    @property
    def block(self) -> int | None:
        """Return the number of channels in a block; None where the weight is packed for oneDNN."""
        block = dict(self.options).get("block")
        assert block is None or isinstance(block, int)
        return block

    @property
    def digest(self) -> str:
        """Return the name of the packed weight, in hexadecimal: equal for equal content, wherever it is used."""
        return self._name("recipe", [[weight.dtype, list(weight.shape), bytes.fromhex(weight.digest)] for weight in self.sources])

    @property
    def skeleton(self) -> str:
        """Return the name of the recipe without its content, in hexadecimal: equal skeletons are packed to equal sizes."""
        return self._name("skeleton", [[weight.dtype, list(weight.shape)] for weight in self.sources])

    def _name(self, word: str, sources: list[list[Any]]) -> str:
        fields = [SCHEME, word, self.kind, list(self.roles), sources, [[key, option] for key, option in self.options]]
        return hashlib.sha256(msgpack.packb(fields, use_bin_type=True)).hexdigest()


@dataclass(frozen=True)
class Lowered:
    """A lowered graph, and the recipes of its packed weights by digest. Only ``prepare_lowered`` takes such a graph."""

    graph: Graph
    recipes: dict[str, Recipe]

    @property
    def form(self) -> Form:
        """Return how its weights are packed."""
        return "blocked" if any(recipe.block is not None for recipe in self.recipes.values()) else "packed"


def lower(graph: Graph, packed_bytes: Callable[[Recipe], int], block: int = 0) -> Lowered:
    """Return ``graph`` with whatever can be packed packed; itself and no recipes where that is nothing.

    ``packed_bytes`` tells the bytes of a packed weight. A weight that several nodes take stays as it is. With ``block``, weights
    are packed in blocks of so many channels, else for oneDNN.
    """
    return _Lowering(graph, packed_bytes, block).run()


@dataclass
class _Fusion:
    """A convolution or linear layer with the nodes it takes in. ``last`` is the last of them, where all of it will stand."""

    recipe: Recipe
    source: Value
    origin: str
    last: int
    members: set[int]
    added: Value | None = None
    activation: str = "none"
    numbers: tuple[float, ...] = ()

    @property
    def op(self) -> str:
        options = dict(self.recipe.options)
        if "block" in options:
            return BLOCKED_CONV2D if self.recipe.kind == "conv2d" else BLOCKED_LINEAR
        if self.recipe.kind == "conv2d":
            return CONV2D
        return LINEAR if options["layout"] == "blocked" else TURNED_LINEAR


class _Lowering:
    def __init__(self, graph: Graph, packed_bytes: Callable[[Recipe], int], block: int) -> None:
        self.graph = graph
        self.packed_bytes = packed_bytes
        self.block = block
        # Who takes the result of each node, once per time it is taken; a result of the graph is taken by nobody (-1).
        self.users: dict[int, list[int]] = {}
        self.weight_uses: dict[str, int] = {}
        takers = [(number, value) for number, node in enumerate(graph.nodes) for value in node_values(node)]
        for number, value in (*takers, *((-1, value) for value in graph.results)):
            if value.kind == "node":
                self.users.setdefault(value.index, []).append(number)
            elif value.kind == "weight":
                digest = graph.weights[value.index].digest
                self.weight_uses[digest] = self.weight_uses.get(digest, 0) + 1
        self.fusions: dict[int, _Fusion] = {}  # by their last node
        self.taken: set[int] = set()

    def run(self) -> Lowered:
        # From the end, so that an addition goes to the later of the two convolutions that lead to it: the other is done.
        for number in reversed(range(len(self.graph.nodes))):
            fusion = self._fusion(number)
            if fusion is not None:
                self.fusions[fusion.last] = fusion
                self.taken |= fusion.members
        if not self.fusions:
            return Lowered(self.graph, {})
        return _Rewriting(self.graph, self.fusions, self.taken, self.packed_bytes).run()

    # --- what can be packed -----------------------------------------------------------------------------------------

    def _fusion(self, number: int) -> _Fusion | None:
        node = self.graph.nodes[number]
        match node.op:
            case "aten.conv2d.default" | "aten.convolution.default":
                fusion = self._conv2d(number, node, may_widen=True)
                if fusion is not None and not self._fits(fusion):
                    fusion = self._conv2d(number, node, may_widen=False)
            case "aten.linear.default":
                fusion = self._linear(number, node)
            case _:
                return None
        if fusion is None or not self._fits(fusion):
            return None
        if fusion.op != TURNED_LINEAR:  # oneDNN has no part in it
            self._take_in_addition(fusion)
            self._take_in_activation(fusion)
        return fusion

    def _fits(self, fusion: _Fusion) -> bool:
        source_bytes = sum(weight.size_bytes for weight in fusion.recipe.sources)
        return self.packed_bytes(fusion.recipe) <= LARGEST_GROWTH * source_bytes

    def _conv2d(self, number: int, node: Node, may_widen: bool) -> _Fusion | None:
        names = ("input", "weight", "bias", "stride", "padding", "dilation")
        if node.op == "aten.convolution.default":
            found = arguments_of(node, (*names, "transposed", "output_padding", "groups"))
            if found.get("transposed") is not False:
                return None
        else:
            found = arguments_of(node, (*names, "groups"))
        source, groups = found.get("input"), found.get("groups", 1)
        weight = self._weight(found.get("weight"), once=True)
        steps = pair(found.get("stride", 1), 1), pair(found.get("padding", 0), 0), pair(found.get("dilation", 1), 1)
        if not isinstance(source, Value) or weight is None or len(weight.shape) != 4 or type(groups) is not int or groups < 1:
            return None
        stride, padding, dilation = steps
        if stride is None or padding is None or dilation is None or weight.shape[0] % groups or not math.prod(weight.shape):
            return None
        channels = (weight.shape[0],)
        parts = {"weight": weight}
        if not self._add_part(parts, "bias", found.get("bias"), channels):
            return None
        if self.block and not _fits_blocks(weight.shape, groups, self.block):
            return None
        options: dict[str, Option] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        options |= self._blocks
        members, last = {number}, number
        padded = self._padding(number, source)
        if padded is not None and (
            moved := _joined(padded[1], padding, may_widen and weight.shape[1] == 1 and dilation == (1, 1))
        ):
            members.add(source.index)
            source = padded[0]
            options |= moved
        norm = self._only_user(number, "aten.batch_norm.default")
        if norm is not None and (folded := self._norm(norm, number, channels)):
            norm_parts, options["epsilon"] = folded
            parts |= norm_parts
            members.add(norm)
            last = norm
        return _Fusion(_recipe("conv2d", parts, options), source, node.origin, last, members)

    def _padding(self, number: int, source: Value) -> tuple[Value, tuple[int, ...]] | None:
        """Return what a node's input pads with zeros, and by how much left, right, above and below; None where it does not."""
        if source.kind != "node" or self.users[source.index] != [number]:
            return None
        node = self.graph.nodes[source.index]
        if node.op == "aten.pad.default":
            found = arguments_of(node, ("self", "pad", "mode", "value"))
        elif node.op == "aten.constant_pad_nd.default":
            found = arguments_of(node, ("self", "pad", "value"))
        else:
            return None
        inner, sizes = found.get("self"), found.get("pad")
        if (
            not isinstance(inner, Value)
            or not isinstance(sizes, tuple)
            or found.get("mode", Enum("constant")) != Enum("constant")
        ):
            return None
        margins = tuple(size for size in sizes if type(size) is int and size >= 0)
        return (inner, margins) if len(margins) == len(sizes) == 4 and not found.get("value") else None

    def _linear(self, number: int, node: Node) -> _Fusion | None:
        found = arguments_of(node, ("input", "weight", "bias"))
        source, weight = found.get("input"), self._weight(found.get("weight"), once=True)
        if not isinstance(source, Value) or weight is None or len(weight.shape) != 2 or not math.prod(weight.shape):
            return None
        parts = {"weight": weight}
        if weight.size_bytes > LARGEST_LINEAR_BYTES or not self._add_part(parts, "bias", found.get("bias"), weight.shape[:1]):
            return None
        if self.block and (weight.shape[1] < self.block or weight.shape[1] % CHANNELS_AT_ONCE):
            return None
        layout = "blocked" if weight.size_bytes >= SMALLEST_BLOCKED_BYTES else "transposed"
        options: dict[str, Option] = self._blocks or {"layout": layout}
        return _Fusion(_recipe("linear", parts, options), source, node.origin, number, {number})

    @property
    def _blocks(self) -> dict[str, Option]:
        return {"block": self.block} if self.block else {}

    def _norm(self, number: int, before: int, channels: tuple[int, ...]) -> tuple[dict[str, Weight], float] | None:
        """Return the parts and the epsilon of a batch norm that can be folded into node ``before``, whose result it takes."""
        names = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
        found = arguments_of(self.graph.nodes[number], names)
        epsilon = found.get("eps")
        parts: dict[str, Weight] = {}
        if found.get("input") != Value("node", before) or found.get("training") is not False:
            return None
        if not isinstance(epsilon, int | float) or isinstance(epsilon, bool):
            return None
        for role, name in (("weight", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("variance", "running_var")):
            if not self._add_part(parts, f"norm {role}", found.get(name), channels):
                return None
        return (parts, float(epsilon)) if {"norm mean", "norm variance"} <= set(parts) else None

    def _add_part(self, parts: dict[str, Weight], role: str, argument: Argument, shape: tuple[int, ...]) -> bool:
        """Add a part that may be absent; return False when what is there is no weight of that shape."""
        if argument is None:
            return True
        weight = self._weight(argument, once=False)
        if weight is None or weight.shape != shape:
            return False
        parts[role] = weight
        return True

    def _weight(self, argument: Argument, once: bool) -> Weight | None:
        """Return the float32 weight an argument refers to; with ``once`` only when nothing else takes it."""
        if not isinstance(argument, Value) or argument.kind != "weight":
            return None
        weight = self.graph.weights[argument.index]
        return weight if weight.dtype == "float32" and not (once and self.weight_uses[weight.digest] > 1) else None

    # --- what is taken in -------------------------------------------------------------------------------------------

    def _only_user(self, number: int, *ops: str) -> int | None:
        """Return the node that alone takes the result of another, once, when it is one of ``ops`` and still free."""
        users = self.users.get(number, [])
        if len(users) != 1 or users[0] < 0 or users[0] in self.taken or self.graph.nodes[users[0]].op not in ops:
            return None
        return users[0]

    def _take_in_addition(self, fusion: _Fusion) -> None:
        number = self._only_user(fusion.last, "aten.add.Tensor")
        if number is None:
            return
        found = arguments_of(self.graph.nodes[number], ("self", "other", "alpha"))
        first, second, scale = found.get("self"), found.get("other"), found.get("alpha", 1)
        added = second if first == Value("node", fusion.last) else first
        is_size = isinstance(added, Value) and added.kind == "node" and self.graph.nodes[added.index].op in SIZES
        if isinstance(added, Value) and not is_size and type(scale) is int and scale == 1:
            fusion.added = added
            fusion.members.add(number)
            fusion.last = number

    def _take_in_activation(self, fusion: _Fusion) -> None:
        # After an addition oneDNN's convolution takes in a relu and nothing else, its linear layer nothing.
        if fusion.added is None:
            number = self._only_user(fusion.last, *ACTIVATIONS)
        elif fusion.recipe.kind == "conv2d":
            number = self._only_user(fusion.last, "aten.relu.default")
        else:
            return
        if number is None:
            return
        activation = activation_of(self.graph.nodes[number])
        if activation is not None:
            fusion.activation, fusion.numbers = activation
            fusion.members.add(number)
            fusion.last = number


class _Rewriting:
    """The new graph: every fusion one node in place of its last, weights in the order of their first use."""

    def __init__(self, graph: Graph, fusions: dict[int, _Fusion], taken: set[int], packed_bytes: Callable[[Recipe], int]) -> None:
        self.graph = graph
        self.fusions = fusions
        self.taken = taken
        self.packed_bytes = packed_bytes
        self.nodes: list[Node] = []
        self.places: dict[int, int] = {}  # of old nodes among the new
        self.weights: dict[Weight, int] = {}
        self.recipes: dict[str, Recipe] = {}

    def run(self) -> Lowered:
        for number, node in enumerate(self.graph.nodes):
            if number in self.fusions:
                made = self._fused(self.fusions[number])
            elif number in self.taken:
                continue
            else:
                keywords = tuple((key, self._moved(argument)) for key, argument in node.kwargs)
                made = dataclasses.replace(node, args=tuple(map(self._moved, node.args)), kwargs=keywords)
            self.places[number] = len(self.nodes)
            self.nodes.append(made)
        results = tuple(self._moved_value(value) for value in self.graph.results)
        graph = dataclasses.replace(self.graph, weights=tuple(self.weights), nodes=tuple(self.nodes), results=results)
        return Lowered(graph, self.recipes)

    def _fused(self, fusion: _Fusion) -> Node:
        digest = fusion.recipe.digest
        self.recipes[digest] = fusion.recipe
        # Its dtype tells how it is made: a stage with a weight of another shape, or without its bias, is of another structure.
        weight = Weight(digest, f"packed {fusion.recipe.skeleton}", (), self.packed_bytes(fusion.recipe), 0)
        added = None if fusion.added is None else self._moved_value(fusion.added)
        arguments = (self._moved_value(fusion.source), self._place(weight), Enum(fusion.activation), fusion.numbers, added)
        return Node(fusion.op, arguments, (), fusion.origin)

    def _moved(self, argument: Argument) -> Argument:
        if isinstance(argument, Value):
            return self._moved_value(argument)
        return tuple(map(self._moved, argument)) if isinstance(argument, tuple) else argument

    def _moved_value(self, value: Value) -> Value:
        if value.kind == "weight":
            return self._place(self.graph.weights[value.index])
        return Value("node", self.places[value.index], value.item) if value.kind == "node" else value

    def _place(self, weight: Weight) -> Value:
        return Value("weight", self.weights.setdefault(weight, len(self.weights)))


def _fits_blocks(shape: tuple[int, ...], groups: int, block: int) -> bool:
    """Say whether ONNX Runtime has a convolution in blocks for a weight of this shape: [out, in each group, height, width]."""
    outside, inside = shape[:2]
    if groups == 1:
        # Pictures of a few channels are read as they are.
        return inside < block or inside % CHANNELS_AT_ONCE == 0
    if inside == 1 and outside == groups:
        return outside >= block and outside % CHANNELS_AT_ONCE == 0
    return inside % block == 0 and outside // groups % block == 0


def _recipe(kind: Kind, parts: dict[str, Weight], options: dict[str, Option]) -> Recipe:
    return Recipe(kind, tuple(parts), tuple(parts.values()), tuple(sorted(options.items())))


def arguments_of(node: Node, names: tuple[str, ...]) -> dict[str, Argument]:
    """Return a node's arguments by name; nothing when one has no name or is given twice."""
    given = [*zip(names, node.args, strict=False), *node.kwargs]
    found = dict(given)
    fits = len(found) == len(given) == len(node.args) + len(node.kwargs) and found.keys() <= set(names)
    return found if fits else {}


def pair(argument: Argument, smallest: int) -> tuple[int, int] | None:
    """Return two constant sizes of at least ``smallest``; one stands for both."""
    sizes = argument if isinstance(argument, tuple) else (argument,)
    numbers = [size for size in sizes if type(size) is int and size >= smallest]
    if len(numbers) != len(sizes) or len(sizes) not in (1, 2):
        return None
    return numbers[0], numbers[-1]


def _joined(margins: tuple[int, ...], padding: tuple[int, int], may_widen: bool) -> dict[str, Option] | None:
    """Return the options of a convolution that also does the padding before it, or None.

    oneDNN's operator pads both sides alike. Where they differ, the kernel may be widened by zeros on the narrower side, which
    the longer padding then covers; for a convolution within each channel this costs less than a padded copy of its input.
    """
    left, right, top, bottom = margins
    longest = (padding[0] + max(top, bottom), padding[1] + max(left, right))
    if top == bottom and left == right:
        return {"padding": longest}
    zeros = (max(right - left, 0), max(left - right, 0), max(bottom - top, 0), max(top - bottom, 0))
    return {"padding": longest, "zeros": zeros} if may_widen else None


# What oneDNN calls each activation, and the names and values of the constants it takes.
ACTIVATIONS: dict[str, tuple[str, dict[str, Argument]]] = {
    "aten.relu.default": ("relu", {}),
    "aten.relu6.default": ("hardtanh", {}),
    "aten.hardtanh.default": ("hardtanh", {"min_val": -1.0, "max_val": 1.0}),
    "aten.leaky_relu.default": ("leaky_relu", {"negative_slope": 0.01}),
    "aten.silu.default": ("swish", {}),
    "aten.sigmoid.default": ("sigmoid", {}),
    "aten.tanh.default": ("tanh", {}),
    "aten.hardswish.default": ("hardswish", {}),
    "aten.hardsigmoid.default": ("hardsigmoid", {}),
    "aten.gelu.default": ("gelu", {}),
}


def activation_of(node: Node) -> tuple[str, tuple[float, ...]] | None:
    """Return the word and the numbers of an activation, or None where it has other arguments than constants."""
    word, defaults = ACTIVATIONS[node.op]
    if word == "gelu":
        form = arguments_of(node, ("self", "approximate")).get("approximate", Enum("none"))
        return {Enum("none"): ("gelu", ()), Enum("tanh"): ("gelu_tanh", ())}.get(form) if isinstance(form, Enum) else None
    if node.op == "aten.relu6.default":
        return word, (0.0, 6.0)
    found = defaults | arguments_of(node, ("self", *defaults))
    numbers = [found[name] for name in defaults]
    floats = tuple(float(number) for number in numbers if isinstance(number, int | float) and not isinstance(number, bool))
    return (word, floats) if len(floats) == len(numbers) else None
