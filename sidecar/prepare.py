"""Preparation: from a graph to a program for one device.

Every node is checked against its operator's schema in the torch that is installed, and resolved to a callable once, so
that running needs no look-up by name. Pure apart from torch's registry; callable from any thread. Must not import
anything above layer 2.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from sidecar import blocked, indices, operators, packed, quotients
from sidecar.errors import BundleError
from sidecar.graphfile import MAX_LISTED_INTEGER
from sidecar.ir import Argument, Dtype, Enum, Graph, Node, Value, node_values, values_in
from sidecar.lowering import BLOCKED
from sidecar.lowering import OPERATORS as PACKED
from sidecar.programs import Program, Step
from sidecar.recurrent import checked

# The boxed call of an overload costs 1 to 3 µs more than torch's own binding of the same operator (measured with
# one-element tensors), so the operators that networks consist of are called through their binding.
_nn = torch._C._nn
_BINDINGS: dict[str, Callable[..., Any]] = {
    "aten.add.Tensor": torch.add,
    "aten.sub.Tensor": torch.sub,
    "aten.mul.Tensor": torch.mul,
    "aten.div.Tensor": torch.div,
    "aten.pow.Tensor_Scalar": torch.pow,
    "aten.rsqrt.default": torch.rsqrt,
    "aten.tanh.default": torch.tanh,
    "aten.sigmoid.default": torch.sigmoid,
    "aten.relu.default": torch.relu,
    "aten.hardtanh.default": _nn.hardtanh,
    "aten.gelu.default": _nn.gelu,
    "aten.silu.default": _nn.silu,
    "aten.softmax.int": torch.softmax,
    "aten.linear.default": _nn.linear,
    "aten.matmul.default": torch.matmul,
    "aten.bmm.default": torch.bmm,
    "aten.conv2d.default": torch.conv2d,
    "aten.batch_norm.default": torch.batch_norm,
    "aten.layer_norm.default": torch.layer_norm,
    "aten.max_pool2d.default": torch.max_pool2d,
    "aten.avg_pool2d.default": _nn.avg_pool2d,
    "aten.adaptive_avg_pool2d.default": _nn.adaptive_avg_pool2d,
    "aten.scaled_dot_product_attention.default": _nn.scaled_dot_product_attention,
    "aten.embedding.default": torch.embedding,
    "aten.mean.dim": torch.mean,
    "aten.sum.dim_IntList": torch.sum,
    "aten.cat.default": torch.cat,
    "aten.reshape.default": torch.reshape,
    # Whether a view is legal depends on the order in which an operator left its result in memory, which is our affair.
    "aten.view.default": torch.reshape,
    "aten.view_as.default": torch.Tensor.reshape_as,
    "aten.permute.default": torch.permute,
    "aten.transpose.int": torch.transpose,
    "aten.unsqueeze.default": torch.unsqueeze,
    "aten.squeeze.dim": torch.squeeze,
    "aten.select.int": torch.select,
    "aten.expand.default": torch.Tensor.expand,
    "aten.contiguous.default": torch.Tensor.contiguous,
    "aten.where.self": torch.where,
    "aten.sym_size.int": torch.Tensor.size,
}

# Results that may share memory with an argument although the schema does not say so.
_HIDDEN_VIEWS = frozenset(
    (
        "aten.type_as.default",
        "aten.meshgrid.default",
        "aten.meshgrid.indexing",
        "aten.pixel_shuffle.default",
        "aten.pixel_unshuffle.default",
        "aten.channel_shuffle.default",
    )
)

_OPTIONAL = re.compile(r"Optional\[(.+)\]")
_LIST = re.compile(r"List\[(.+)\]")
_SIZE_LIMIT = 1 << 63


def _bounded(function: Callable[..., int]) -> Callable[..., int]:
    """Keep arithmetic on sizes within 64 bits, so that a long chain of products cannot grow without end."""

    @functools.wraps(function)
    def checked(*sizes: int) -> int:
        result = function(*sizes)
        if not -_SIZE_LIMIT <= result < _SIZE_LIMIT:
            raise OverflowError("a size does not fit into 64 bits")
        return result

    return checked


def _within_reach(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keep sizes that an operator gets in lists, as windows or steps, to what it multiplies without leaving 64 bits."""

    @functools.wraps(function)
    def checked(*arguments: Any, **named: Any) -> Any:
        for argument in (*arguments, *named.values()):
            for each in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(each, int) and abs(each) > MAX_LISTED_INTEGER:
                    raise OverflowError(f"{each} is beyond {MAX_LISTED_INTEGER}")
        return function(*arguments, **named)

    return checked


_SYMBOLIC: dict[str, Callable[..., int]] = {
    "sym.add": _bounded(operator.add),
    "sym.sub": _bounded(operator.sub),
    "sym.mul": _bounded(operator.mul),
    "sym.floordiv": operator.floordiv,
    "sym.mod": operator.mod,
    "sym.neg": operator.neg,
    "sym.max": max,
    "sym.min": min,
}


def prepare(graph: Graph, device: torch.device, lowered: bool = False, guarded: bool | None = None) -> Program:
    """Return the program of a graph for one device. Raises BundleError naming operator and node.

    Only a graph that ``lowering`` made, ``lowered``, may have packed operators. They are taken at its word. ``guarded``: a kernel
    must not meet an index that is out of range (``indices``); unless said, that is so on CUDA.
    """
    is_guarded = device.type == "cuda" if guarded is None else guarded
    return _Preparation(graph, device, lowered, indices.GUARDED if is_guarded else indices.EVERYWHERE).program()


# Where an argument comes from: one slot, or the slots of a list's members.
_Place = int | tuple[int, ...]


class _Call(NamedTuple):
    function: Callable[..., Any]
    places: tuple[_Place, ...]
    target: int
    node: int


class _Preparation:
    """Working state of ``prepare``: the slot of every value, and its kind.

    A kind is ``Tensor``, ``int`` (a size), ``List[Tensor]``, or ``tuple:N`` for N tensors.
    """

    def __init__(self, graph: Graph, device: torch.device, lowered: bool, guarded: frozenset[str]) -> None:
        self.graph = graph
        self.device = device
        self.lowered = lowered
        self.base = len(graph.weights) + len(graph.inputs)
        self.blank: list[Any] = [None] * len(graph.nodes)
        self.kinds: list[str] = []
        self.sources: list[frozenset[int]] = []
        self.calls: list[_Call] = []
        self.items: dict[int, dict[int, int]] = {}  # node -> item -> slot
        for value in (*(value for node in graph.nodes for value in node_values(node)), *graph.results):
            if value.item is not None and value.item not in self.items.setdefault(value.index, {}):
                self.items[value.index][value.item] = self._new_slot()
        # Node -> slots of the result with its flag, and of the flag.
        self.guards = {
            index: (self._new_slot(), self._new_slot()) for index, node in enumerate(graph.nodes) if node.op in guarded
        }
        self.first_constant = self.base + len(self.blank)

    def program(self) -> Program:
        for index, node in enumerate(self.graph.nodes):
            if self.lowered and node.op in PACKED:
                self._add_packed(index, node)
                continue
            operators.check_node(node, index)
            if node.op in operators.SYMBOLIC:
                self._add_symbolic(index, node)
            else:
                self._add_operator(index, node)
        for number, value in enumerate(self.graph.results):
            if self._kind(value, f"result {number}") != "Tensor":
                raise BundleError(f"result {number} is not a tensor", result=number)
        results = tuple(self._slot(value) for value in self.graph.results)
        return Program(
            nodes=self.graph.nodes,
            weight_count=len(self.graph.weights),
            input_count=len(self.graph.inputs),
            blank=tuple(self.blank),
            steps=tuple(self._steps(frozenset(results) | {flag for _, flag in self.guards.values()})),
            results=results,
            sources=tuple(tuple(sorted(self._sources(value))) for value in self.graph.results),
            flags=tuple((flag, index) for index, (_, flag) in self.guards.items()),
        )

    # --- slots and kinds --------------------------------------------------------------------------------------------

    def _new_slot(self, content: Any = None) -> int:
        self.blank.append(content)
        return self.base + len(self.blank) - 1

    def _slot(self, value: Value) -> int:
        if value.kind == "weight":
            return value.index
        if value.kind == "input":
            return len(self.graph.weights) + value.index
        return self.base + value.index if value.item is None else self.items[value.index][value.item]

    def _kind(self, value: Value, where: str) -> str:
        if value.kind != "node":
            return "Tensor"
        kind = self.kinds[value.index]
        if value.item is None:
            return kind
        if kind == "List[Tensor]" or (kind.startswith("tuple:") and value.item < int(kind[6:])):
            return "Tensor"
        raise BundleError(f"{where}: node {value.index} has no result number {value.item}", node=value.index)

    def _sources(self, value: Value) -> frozenset[int]:
        return self.sources[value.index] if value.kind == "node" else frozenset((self._slot(value),))

    def _place(self, argument: Argument) -> _Place:
        if isinstance(argument, Value):
            return self._slot(argument)
        if isinstance(argument, tuple) and any(isinstance(member, Value) for member in argument):
            return tuple(
                self._slot(member) if isinstance(member, Value) else self._new_slot(_constant(member)) for member in argument
            )
        return self._new_slot(_constant(argument))

    # --- steps ------------------------------------------------------------------------------------------------------

    def _steps(self, kept: frozenset[int]) -> Iterator[Step]:
        """Yield a step per call, which releases what no later call reads: its own result too, when nobody does."""
        last: dict[int, int] = {}
        for position, call in enumerate(self.calls):
            last[call.target] = position
            for slot in _slots(call.places):
                last[slot] = position
        released: list[list[int]] = [[] for _ in self.calls]
        for slot, position in last.items():
            if self.base <= slot < self.first_constant and slot not in kept:
                released[position].append(slot)
        for call, slots in zip(self.calls, released, strict=True):
            yield Step(call.function, _gather(call.places), call.target, tuple(slots), call.node)

    def _add_symbolic(self, index: int, node: Node) -> None:
        for argument in node.args:
            self._check(argument, "int", f"node {index} ({node.op})")
        places = tuple(self._place(argument) for argument in node.args)
        self.calls.append(_Call(_SYMBOLIC[node.op], places, self.base + index, index))
        self.kinds.append("int")
        self.sources.append(frozenset())

    def _add_packed(self, index: int, node: Node) -> None:
        where = f"node {index} ({node.op})"
        for value in node_values(node):
            if self._kind(value, where) != "Tensor":
                raise BundleError(f"{where}: must be Tensor, not {self._kind(value, where)}", node=index, operator=node.op)
        places = tuple(self._slot(value) for value in node_values(node))
        function = blocked.operator(node) if node.op in BLOCKED else packed.operator(node)
        self.calls.append(_Call(function, places, self.base + index, index))
        self.kinds.append("Tensor")
        self.sources.append(frozenset())

    def _add_operator(self, index: int, node: Node) -> None:
        where = f"node {index} ({node.op})"
        _, name, overload_name = node.op.split(".")
        overload = getattr(getattr(torch.ops.aten, name, None), overload_name, None)
        if overload is None:
            raise BundleError(f"{where}: this torch has no such operator", node=index, operator=node.op)
        schema = overload._schema
        if schema.is_mutable:
            raise BundleError(f"{where}: the operator changes its arguments", node=index, operator=node.op)
        takes_sizes = self._match(schema, node, where)
        function = _BINDINGS.get(node.op, overload._op)
        if node.op in operators.RECURRENT:
            function = checked(node.op, function)
        if node.op in quotients.OPERATORS:
            function = quotients.safe(node.op, function)
        if takes_sizes:
            function = _within_reach(function)
        if index in self.guards:
            function = indices.guarded(node.op, function, [parameter.name for parameter in schema.arguments])
        fixed = {key: _constant(argument) for key, argument in node.kwargs if not any(values_in(argument))}
        if node.op in operators.FACTORIES:
            fixed["device"] = self.device
        if fixed:
            function = functools.partial(function, **fixed)
        moving = {key: self._place(argument) for key, argument in node.kwargs if key not in fixed}
        if moving:
            function = _with_keywords(function, len(node.args), tuple(moving))
        places = (*(self._place(argument) for argument in node.args), *moving.values())
        target = self.base + index
        if index in self.guards:
            both, flag = self.guards[index]
            self.calls += [
                _Call(function, places, both, index),
                _Call(operator.itemgetter(0), (both,), target, index),
                _Call(operator.itemgetter(1), (both,), flag, index),
            ]
        else:
            self.calls.append(_Call(function, places, target, index))
        returns = [str(result.real_type) for result in schema.returns]
        self.kinds.append(returns[0] if len(returns) == 1 else f"tuple:{len(returns)}")
        shares = node.op in _HIDDEN_VIEWS or any(result.alias_info is not None for result in schema.returns)
        self.sources.append(frozenset().union(*map(self._sources, node_values(node))) if shares else frozenset())
        for item, slot in self.items.get(index, {}).items():
            self._kind(Value("node", index, item), where)
            self.calls.append(_Call(operator.itemgetter(item), (self.base + index,), slot, index))

    # --- the operator's schema --------------------------------------------------------------------------------------

    def _match(self, schema: Any, node: Node, where: str) -> bool:
        """Check number, names and types of a node's arguments against the operator's schema.

        Return whether a list of known length, of steps or paddings, say, has sizes in it that only a run knows.
        """
        takes_sizes = False
        parameters = list(schema.arguments)
        ordinary = sum(not parameter.kwarg_only for parameter in parameters)
        if len(node.args) > ordinary:
            raise BundleError(f"{where}: takes {ordinary} positional arguments, has {len(node.args)}")
        given = {parameter.name: argument for parameter, argument in zip(parameters, node.args, strict=False)}
        for key, argument in node.kwargs:
            if key in given:
                raise BundleError(f"{where}: argument {key} is given twice")
            given[key] = argument
        for parameter in parameters:
            if parameter.name in given:
                kind = str(parameter.real_type)
                argument = given.pop(parameter.name)
                if parameter.N is not None and isinstance(argument, int):
                    if abs(argument) > MAX_LISTED_INTEGER:
                        raise BundleError(f"{where}: argument {parameter.name} is beyond {MAX_LISTED_INTEGER}")
                    argument = (argument,)  # one number may stand for a list of known length
                elif parameter.N is not None and any(values_in(argument)):
                    takes_sizes = takes_sizes or "int" in kind
                self._check(argument, kind, f"{where}, argument {parameter.name}")
            elif not parameter.has_default_value():
                raise BundleError(f"{where}: argument {parameter.name} is missing")
        if given:
            raise BundleError(f"{where}: the operator has no argument {min(given)}")
        return takes_sizes

    def _check(self, argument: Argument, kind: str, where: str) -> None:
        if optional := _OPTIONAL.fullmatch(kind):
            if argument is not None:
                self._check(argument, optional[1], where)
            return
        if members := _LIST.fullmatch(kind):
            if not isinstance(argument, tuple):
                raise BundleError(f"{where}: must be a list")
            for member in argument:
                self._check(member, members[1], where)
            return
        found = self._kind(argument, where) if isinstance(argument, Value) else type(argument).__name__
        if found not in _ACCEPTED.get(kind, ()):
            raise BundleError(f"{where}: must be {kind}, not {found}")


# For each type in schemas, the values (by kind) and constants (by Python type) that may be given. A number may stand
# for a tensor. Types that are not here, such as devices and layouts, are the engine's to choose and accept nothing.
_ACCEPTED: dict[str, tuple[str, ...]] = {
    "Tensor": ("Tensor", "int", "float", "bool"),
    "number": ("int", "float", "bool"),
    "int": ("int",),
    "float": ("int", "float"),
    "bool": ("bool",),
    "str": ("Enum",),
    "ScalarType": ("Dtype",),
}


def _constant(argument: Argument) -> Any:
    match argument:
        case Dtype(name):
            return getattr(torch, name)
        case Enum(word):
            return word
        case tuple():
            return [_constant(member) for member in argument]
        case _:
            return argument


def _slots(places: Iterable[_Place]) -> Iterator[int]:
    for place in places:
        yield from (place,) if isinstance(place, int) else place


def _gather(places: Sequence[_Place]) -> Callable[[list[Any]], Sequence[Any]]:
    """Return the function that picks a call's arguments out of the values; without lists it is all C."""
    if not all(isinstance(place, int) for place in places):
        getters = [operator.itemgetter(place) if isinstance(place, int) else _gather(place) for place in places]
        return lambda values: [getter(values) for getter in getters]
    slots = list(_slots(places))
    if len(slots) < 2:
        start = slots[0] if slots else 0
        return operator.itemgetter(slice(start, start + len(slots)))
    return operator.itemgetter(*slots)


def _with_keywords(function: Callable[..., Any], count: int, keys: tuple[str, ...]) -> Callable[..., Any]:
    """Return a function that takes the keyword arguments ``keys`` after ``count`` positional ones."""

    def call(*arguments: Any) -> Any:
        return function(*arguments[:count], **dict(zip(keys, arguments[count:], strict=True)))

    return call
