"""Translation of an exported, functional torch graph into the bundle's own graph.

What does not reach an output is left behind, which takes care of assertions and unused weights. What only moves
memory or restates a device is dropped. Operators that a decomposition took apart are put together again where the
parts are slower or fixed to one kind of device. Everything else is carried over as it is, or refused by name and place.
Must not import anything above layer 2.
"""

from __future__ import annotations

import operator
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Node as FxNode
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from trunkline.protocol import ITEM_BYTES as WIRE_DTYPES
from trunkline.protocol import TensorSpec
from trunkline.signature import UNKNOWN_AXIS

from sidecar import operators
from sidecar.calls import Call
from sidecar.errors import UnsupportedModel, UnsupportedOperator
from sidecar.ir import ITEM_BYTES, Argument, Dtype, Enum, Graph, Node, Value, Weight

_SYMBOLIC: dict[object, str] = {
    operator.add: "sym.add",
    operator.sub: "sym.sub",
    operator.mul: "sym.mul",
    operator.floordiv: "sym.floordiv",
    operator.mod: "sym.mod",
    operator.neg: "sym.neg",
    torch.sym_max: "sym.max",
    torch.sym_min: "sym.min",
}

# These say where and how a tensor lies in memory, or how it gets there. That is the engine's business.
_PLACEMENT = frozenset(("device", "layout", "memory_format", "pin_memory", "non_blocking"))

_FRAME = re.compile(r'File "(.+?)", line (\d+)')
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep
_MAX_REPORTED = 5
_WHOLE_SLICE_END = (1 << 63) - 1


@dataclass(frozen=True)
class Place:
    """Where in the publisher's sources a node comes from; empty strings and 0 where torch did not say."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        source = f"{self.file}:{self.line} " if self.file else ""
        return f"{source}self.{self.module}".rstrip(".")

    def short(self) -> str:
        """Return the place without folders, so that a bundle does not depend on where the sources lay."""
        short = Place(os.path.basename(self.file), self.line, self.module)
        text = "".join(character if character.isprintable() else "?" for character in str(short))
        return text[-200:]


def place_of(node: FxNode) -> Place:
    """Return the line of the model's own code a node was made by, and the module that was running."""
    frames = [(file, int(line)) for file, line in _FRAME.findall(node.meta.get("stack_trace") or "")]
    frames = [frame for frame in frames if not frame[0].startswith("torch/")]  # made by torch's own passes
    own = [frame for frame in frames if not frame[0].startswith(_TORCH_FOLDER)]
    file, line = (own or frames or [("", 0)])[-1]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return Place(file, line, str(stack[-1][0]) if stack and stack[-1][0] != stack[-1][1] else "")


@dataclass
class Translated:
    """A graph, and the tensor behind each of its weights by digest."""

    graph: Graph
    tensors: dict[str, torch.Tensor]


def translate(program: ExportedProgram, call: Call, output_names: list[str | None]) -> Translated:
    """Translate the captured program of a call. ``output_names`` follows its outputs; None drops one.

    Raises UnsupportedOperator naming every operator that is in the way with module and line, and UnsupportedModel.
    """
    return _Translation(program, call).run(output_names)


@dataclass
class _Translation:
    program: ExportedProgram
    call: Call
    # What stands for each node of torch's graph: a reference, or a constant.
    found: dict[FxNode, Argument] = field(default_factory=dict)
    nodes: list[Node] = field(default_factory=list)
    weights: dict[tuple[str, str, tuple[int, ...]], int] = field(default_factory=dict)
    weight_list: list[Weight] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[object, str] = field(default_factory=dict)  # torch's symbol -> ours

    def run(self, output_names: list[str | None]) -> Translated:
        self._refuse_mutation()
        nodes = list(self.program.graph.nodes)
        results = nodes[-1].args[0]
        wanted = [(name, result) for name, result in zip(output_names, results, strict=True) if name is not None]
        for name, result in wanted:
            if not isinstance(result, FxNode) or not isinstance(result.meta.get("val"), torch.Tensor):
                raise UnsupportedModel(f"output {name!r} is no tensor but {str(result)[:40]}; return tensors only")
        live = _live(nodes, [result for _, result in wanted])
        inputs = self._take_placeholders([node for node in nodes if node.op == "placeholder"], live)
        problems: list[tuple[str, Place, str]] = []
        for node in nodes:
            if node not in live or node in self.found or node.op == "output":
                continue
            name = _operator_name(node)
            if node.op == "call_function" and self._carry(name, node, live):
                continue
            problems.append((name, place_of(node), _reason(name, node)))
            self.found[node] = None  # go on, so that one run names everything that is in the way
        if problems:
            _refuse(problems)
        return Translated(
            Graph(
                symbols=tuple(self.call.symbols.values()),
                inputs=tuple(inputs),
                outputs=tuple(self._output_spec(name, result.meta["val"]) for name, result in wanted),
                weights=tuple(self.weight_list),
                nodes=tuple(self.nodes),
                results=tuple(self._result(result) for _, result in wanted),
            ),
            self.tensors,
        )

    # --- inputs, weights, outputs -----------------------------------------------------------------------------------

    def _refuse_mutation(self) -> None:
        for spec in self.program.graph_signature.output_specs:
            if spec.kind == OutputKind.USER_OUTPUT:
                continue
            maker = next((node for node in self.program.graph.nodes if node.name == spec.arg.name), None)
            place = f" at {place_of(maker)}" if maker is not None else ""
            if spec.kind == OutputKind.USER_INPUT_MUTATION:
                raise UnsupportedModel(
                    f"the model changes its input {spec.target!r} in place{place}; clone it first",
                    input=str(spec.target),
                )
            if spec.target is None:
                raise UnsupportedModel(f"the model returns something other than tensors ({spec.kind.name.lower()})")
            raise UnsupportedModel(
                f"the model changes its own state self.{spec.target}{place}; a served model must be a pure function of "
                "its inputs",
                state=str(spec.target),
            )

    def _take_placeholders(self, nodes: list[FxNode], live: set[FxNode]) -> list[TensorSpec]:
        inputs: list[TensorSpec] = []
        names = iter(self.input_names())
        for node, spec in zip(nodes, self.program.graph_signature.input_specs, strict=True):
            if spec.kind == InputKind.USER_INPUT:
                self.found[node] = Value("input", len(inputs))
                inputs.append(self._input_spec(next(names), node.meta["val"]))
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                if node in live:
                    target = str(spec.target)
                    stored = self.program.state_dict if target in self.program.state_dict else self.program.constants
                    self.found[node] = self._weight(target, stored[target])
            elif node in live:
                raise UnsupportedModel(f"the model needs an object that is no tensor: {spec.target} ({spec.kind.name})")
        return inputs

    def input_names(self) -> list[str]:
        """Return the names of the inputs in the program's order, which for named inputs is torch's to choose."""
        _, named = self.program.call_spec.in_spec.children()
        return list(named.context) if self.call.by_name else list(self.call.names)

    def _weight(self, target: str, tensor: Any) -> Value:
        dtype = _dtype_name(tensor.dtype)
        if dtype not in ITEM_BYTES or tensor.layout != torch.strided or tensor.is_quantized:
            raise UnsupportedModel(
                f"weight self.{target} has dtype {dtype} and layout {tensor.layout}; bundles hold dense tensors of "
                f"{', '.join(ITEM_BYTES)}",
                weight=target,
            )
        if tensor.device.type != "cpu":
            raise UnsupportedModel(f"weight self.{target} lies on {tensor.device}; move the model to the CPU first")
        dense = tensor.detach().contiguous()
        content = weight_bytes(dense)
        digest = sha256(content).hexdigest()
        key = (digest, dtype, tuple(dense.shape))
        if key not in self.weights:
            self.weights[key] = len(self.weight_list)
            self.weight_list.append(Weight(digest, dtype, tuple(dense.shape), len(content), zlib.crc32(content)))
            self.tensors[digest] = dense
        return Value("weight", self.weights[key])

    def _input_spec(self, name: str, fake: torch.Tensor) -> TensorSpec:
        shape: list[int | str] = []
        declared = self.call.axes.get(name, {})
        for axis, size in enumerate(fake.shape):
            symbol = declared.get(axis)
            if symbol is None:
                shape.append(int(size))
                continue
            expression = size.node.expr if isinstance(size, torch.SymInt) else size
            if not getattr(expression, "is_Symbol", False) or self.names.setdefault(expression, symbol) != symbol:
                raise UnsupportedModel(
                    f"axis {axis} of input {name!r} cannot vary freely: the model fixes it to {expression}",
                    input=name,
                    axis=axis,
                )
            shape.append(symbol)
        low, high = self.call.bounds.get(name, (None, None))
        return TensorSpec(name, self._wire_dtype("input", name, fake.dtype), tuple(shape), low, high)

    def _output_spec(self, name: str, fake: torch.Tensor) -> TensorSpec:
        shape = tuple(
            size if isinstance(size, int) else self.names.get(size.node.expr, UNKNOWN_AXIS) for size in fake.shape
        )
        return TensorSpec(name, self._wire_dtype("output", name, fake.dtype), shape)

    @staticmethod
    def _wire_dtype(kind: str, name: str, dtype: torch.dtype) -> str:
        text = _dtype_name(dtype)
        if text not in WIRE_DTYPES:
            raise UnsupportedModel(
                f"{kind} {name!r} has dtype {text}, which cannot travel; convert it inside the model to one of "
                f"{', '.join(WIRE_DTYPES)}"
            )
        return text

    def _result(self, node: FxNode) -> Value:
        value = self.found[node]
        assert isinstance(value, Value), "an output is the result of an operator"
        return value

    # --- operators --------------------------------------------------------------------------------------------------

    def _carry(self, name: str, node: FxNode, live: set[FxNode]) -> bool:
        """Translate one call; return whether it could be."""
        rewrite = _REWRITES.get(name)
        if rewrite is not None:
            rewrite(self, node, live)
            return node in self.found
        if name == "getitem":
            parent, item = self.found[_fx(node.args[0])], node.args[1]
            if parent is None:
                self.found[node] = None  # the parent was refused and is reported
            else:
                assert isinstance(parent, Value), "only several results are indexed"
                self.found[node] = Value("node", parent.index, int(item))  # type: ignore[arg-type]
            return True
        if name not in operators.ALLOWED:
            return False
        return self.emit(node, name, node.args, node.kwargs)

    def emit(self, node: FxNode, name: str, args: Any, kwargs: Mapping[str, Any] | None = None) -> bool:
        """Add a node of the bundle's graph that stands for ``node``; return whether it has a form there."""
        try:
            self.nodes.append(
                Node(
                    op=name,
                    args=tuple(self._argument(argument) for argument in args),
                    kwargs=tuple(
                        (key, self._argument(argument))
                        for key, argument in sorted((kwargs or {}).items())
                        if key not in _PLACEMENT
                    ),
                    origin=place_of(node).short(),
                )
            )
        except _Inexpressible:
            return False
        if free_unbacked_symbols(node.meta.get("val")):
            return False
        self.found[node] = Value("node", len(self.nodes) - 1)
        return True

    def _argument(self, argument: Any) -> Argument:
        match argument:
            case FxNode():
                return self.found[argument]
            case torch.dtype():
                if _dtype_name(argument) not in ITEM_BYTES:
                    raise _Inexpressible
                return Dtype(_dtype_name(argument))
            case str():
                if argument not in operators.ENUMS:
                    raise _Inexpressible
                return Enum(argument)
            case list() | tuple():
                return tuple(self._argument(member) for member in argument)
            case None | bool() | int() | float():
                return argument
            case _:
                raise _Inexpressible


class _Inexpressible(Exception):
    """An argument has no form in a bundle."""


# --- rewrites: what is dropped or put together again ----------------------------------------------------------------------


def _same(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    """Drop an operator that only gives its first argument another name or other memory."""
    translation.found[node] = translation.found[_fx(node.args[0])]


def _reshape(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    """A view was legal for the strides the operators of one device produce; a reshape is legal for all."""
    translation.emit(node, "aten.reshape.default", node.args)


def _clone(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    """In a functional graph a copy matters for nothing but the order of elements in memory."""
    source = _fx(node.args[0])
    if node.kwargs.get("memory_format") is torch.contiguous_format:
        translation.emit(node, "aten.contiguous.default", (source,))
    elif source.meta["val"].is_contiguous():
        _same(translation, node, live)
    else:
        translation.emit(node, "aten.clone.default", (source,))


def _to_copy(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    source = _fx(node.args[0])
    dtype = node.kwargs.get("dtype")
    if dtype is None or dtype == source.meta["val"].dtype:
        _same(translation, node, live)
    else:
        translation.emit(node, "aten._to_copy.default", (source,), {"dtype": dtype})


def _slice(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    _, _, start, end, step = (*node.args, *(None, 0, None, None, 1)[len(node.args) :])
    if start in (None, 0) and end in (None, _WHOLE_SLICE_END) and step == 1:
        _same(translation, node, live)
    else:
        translation.emit(node, "aten.slice.Tensor", node.args)


def _permute(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    order: Any = node.args[1]
    if list(order) == list(range(len(order))):
        _same(translation, node, live)
    else:
        translation.emit(node, "aten.permute.default", node.args)


def _batch_norm(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    """Put a batch norm together again; its decomposed form makes two more results that inference does not use."""
    first = _only_result(node, live)
    if first is None:
        translation.emit(node, _operator_name(node), node.args)
        return
    source, weight, bias, mean, variance, momentum, epsilon = node.args
    arguments = (source, weight, bias, mean, variance, False, momentum, epsilon, True)
    if translation.emit(node, "aten.batch_norm.default", arguments):
        translation.found[first] = translation.found[node]


def _max_pool(translation: _Translation, node: FxNode, live: set[FxNode]) -> None:
    """Drop the indices of a maximum pool that only training uses."""
    first = _only_result(node, live)
    name = _operator_name(node)
    if first is None:
        translation.emit(node, name, node.args)
    elif translation.emit(node, name.replace("_with_indices", ""), node.args):
        translation.found[first] = translation.found[node]


_REWRITES: dict[str, Callable[[_Translation, FxNode, set[FxNode]], None]] = {
    "aten.alias.default": _same,
    "aten.detach.default": _same,
    "aten.lift_fresh_copy.default": _same,
    "aten.view.default": _reshape,
    "aten._unsafe_view.default": _reshape,
    "aten.clone.default": _clone,
    "aten._to_copy.default": _to_copy,
    "aten.slice.Tensor": _slice,
    "aten.permute.default": _permute,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.max_pool3d_with_indices.default": _max_pool,
}


def _only_result(node: FxNode, live: set[FxNode]) -> FxNode | None:
    """Return the node that takes result 0, when that is the only live result."""
    users = [user for user in node.users if user in live]
    return users[0] if len(users) == 1 and users[0].args[1:] == (0,) else None


# --- torch's graph ------------------------------------------------------------------------------------------------------


def weight_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _fx(argument: object) -> FxNode:
    assert isinstance(argument, FxNode), "the operand of an operator is a node"
    return argument


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _operator_name(node: FxNode) -> str:
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target.__name__}"
    if target is operator.getitem:
        return "getitem"
    return _SYMBOLIC.get(target, getattr(target, "__name__", str(target)))


def _live(nodes: list[FxNode], results: list[FxNode]) -> set[FxNode]:
    live = set(results)
    for node in reversed(nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return live


def _refuse(problems: list[tuple[str, Place, str]]) -> None:
    first: dict[str, str] = {}
    for name, place, reason in problems:
        first.setdefault(name, f"{name} at {place}{reason and f' ({reason})'}")
    more = f"; and {len(first) - _MAX_REPORTED} more" if len(first) > _MAX_REPORTED else ""
    lines = list(first.values())[:_MAX_REPORTED]
    name, place, _ = problems[0]
    raise UnsupportedOperator(
        f"bundles do not take {'; '.join(lines)}{more}", operator=name, module=place.module, line=str(place)
    )


def _reason(name: str, node: FxNode) -> str:
    if free_unbacked_symbols(node.meta.get("val")):
        return "its result, or the size of its result, depends on the values of tensors"
    return next((reason for words, reason in _REASONS if any(word in name for word in words)), "")


_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("rand", "dropout", "bernoulli", "normal", "multinomial"), "its result is random"),
    (("item", "local_scalar"), "it reads a value out of a tensor"),
    (("empty",), "its result is uninitialised memory"),
    (("as_strided",), "it looks beyond a tensor"),
    (("cond", "while_loop", "scan", "map_impl"), "control flow that depends on values"),
)
