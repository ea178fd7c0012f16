"""Translation of a captured, functional torch graph into the bundle's own graph.

What does not reach an output is left behind, which takes care of assertions and unused weights. Everything else is
carried over as it is, rewritten (see ``sidecar.rewrites``), or refused by name and place.
Part of the converter. Must not import anything above layer 2.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
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
from sidecar.errors import BundleError, UnsupportedModel, UnsupportedOperator
from sidecar.fxgraph import Place, dtype_name, live_nodes, operand, operator_name, place_of
from sidecar.ir import ITEM_BYTES, Argument, Dtype, Enum, Graph, Node, Value, Weight
from sidecar.rewrites import REWRITES

# These say where and how a tensor lies in memory, or how it gets there. That is the engine's business.
_PLACEMENT = frozenset(("device", "layout", "memory_format", "pin_memory", "non_blocking"))

_MAX_REPORTED = 5


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
    stored: dict[FxNode, tuple[str, Any]] = field(default_factory=dict)  # name and tensor of weights
    nodes: list[Node] = field(default_factory=list)
    weights: dict[tuple[str, str, tuple[int, ...]], int] = field(default_factory=dict)
    weight_list: list[Weight] = field(default_factory=list)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    names: dict[object, str] = field(default_factory=dict)  # torch's symbol -> ours
    reasons: dict[FxNode, str] = field(default_factory=dict)  # why a node was refused, where its name does not tell

    def run(self, output_names: list[str | None]) -> Translated:
        self._refuse_mutation()
        nodes = list(self.program.graph.nodes)
        results = nodes[-1].args[0]
        wanted = [(name, result) for name, result in zip(output_names, results, strict=True) if name is not None]
        for name, result in wanted:
            if not isinstance(result, FxNode) or not isinstance(result.meta.get("val"), torch.Tensor):
                raise UnsupportedModel(f"output {name!r} is no tensor but {str(result)[:40]}; return tensors only")
        live = live_nodes(nodes, [result for _, result in wanted])
        inputs = self._take_placeholders([node for node in nodes if node.op == "placeholder"], live)
        problems: list[tuple[str, Place, str]] = []
        for node in nodes:
            if node not in live or node in self.found or node.op in ("placeholder", "output"):
                continue
            name = operator_name(node)
            if node.op == "call_function" and self._carry(name, node, live):
                continue
            problems.append((name, place_of(node), self.reasons.get(node) or _reason(name)))
            self.found[node] = None  # go on, so that one run names everything that is in the way
        if problems:
            _refuse(problems)
        references = tuple(self._result(result) for _, result in wanted)
        graph = Graph(
            symbols=tuple(self.call.symbols.values()),
            inputs=tuple(inputs),
            outputs=tuple(self._output_spec(name, result.meta["val"]) for name, result in wanted),
            weights=tuple(self.weight_list),
            nodes=tuple(self.nodes),
            results=references,
        )
        return Translated(graph, self.tensors)

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
                target = str(spec.target)
                stored = self.program.state_dict if target in self.program.state_dict else self.program.constants
                self.stored[node] = target, stored[target]
            elif node in live:
                raise UnsupportedModel(f"the model needs an object that is no tensor: {spec.target} ({spec.kind.name})")
        return inputs

    def input_names(self) -> list[str]:
        """Return the names of the inputs in the program's order, which for named inputs is torch's to choose."""
        _, named = self.program.call_spec.in_spec.children()
        return list(named.context) if self.call.by_name else list(self.call.names)

    def value(self, node: FxNode) -> Argument:
        """Return what stands for a node. Weights are numbered as they are first asked for."""
        if node not in self.found and node in self.stored:
            self.found[node] = self._weight(*self.stored[node])
        return self.found[node]

    def _weight(self, target: str, tensor: Any) -> Value:
        dtype = dtype_name(tensor.dtype)
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
            expression = _expression(size)
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
        shape = tuple(int(size) if type(size) is int else self.names.get(_expression(size), UNKNOWN_AXIS) for size in fake.shape)
        return TensorSpec(name, self._wire_dtype("output", name, fake.dtype), shape)

    @staticmethod
    def _wire_dtype(kind: str, name: str, dtype: torch.dtype) -> str:
        text = dtype_name(dtype)
        if text not in WIRE_DTYPES:
            raise UnsupportedModel(
                f"{kind} {name!r} has dtype {text}, which cannot travel; convert it inside the model to one of "
                f"{', '.join(WIRE_DTYPES)}"
            )
        return text

    def _result(self, node: FxNode) -> Value:
        value = self.value(node)
        assert isinstance(value, Value), "an output is the result of an operator"
        return value

    # --- operators --------------------------------------------------------------------------------------------------

    def _carry(self, name: str, node: FxNode, live: set[FxNode]) -> bool:
        """Translate one call; return whether it could be."""
        rewrite = REWRITES.get(name)
        if rewrite is not None:
            rewrite(self, node, live)
            return node in self.found
        if name == "getitem":
            parent, item = self.found[operand(node.args[0])], node.args[1]
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
            made = Node(
                op=name,
                args=tuple(self._argument(argument) for argument in args),
                kwargs=tuple(
                    (key, self._argument(argument)) for key, argument in sorted((kwargs or {}).items()) if key not in _PLACEMENT
                ),
                origin=place_of(node).short(),
            )
            operators.check_node(made, len(self.nodes))
        except _Inexpressible as error:
            self.reasons[node] = f"argument {str(error)[:80]} has no form in a bundle"
            return False
        except BundleError:
            self.reasons[node] = "with these arguments its result is random or it changes state"
            return False
        sizes = free_unbacked_symbols(node.meta.get("val"))
        if sizes.difference(*(free_unbacked_symbols(source.meta.get("val")) for source in node.all_input_nodes)):
            self.reasons[node] = "its result, or the size of its result, depends on the values of tensors"
            return False
        self.nodes.append(made)
        self.found[node] = Value("node", len(self.nodes) - 1)
        return True

    def _argument(self, argument: Any) -> Argument:
        if isinstance(argument, FxNode):
            return self.value(argument)
        if isinstance(argument, torch.dtype) and dtype_name(argument) in ITEM_BYTES:
            return Dtype(dtype_name(argument))
        if isinstance(argument, str) and argument in operators.ENUMS:
            return Enum(argument)
        if isinstance(argument, (list, tuple)):
            return tuple(self._argument(member) for member in argument)
        if argument is None or isinstance(argument, (bool, int, float)):
            return argument
        raise _Inexpressible(str(argument))


class _Inexpressible(ValueError):
    """An argument has no form in a bundle."""


def _expression(size: Any) -> Any:
    """Return the symbolic expression of a captured size, or the integer it is fixed to."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def weight_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


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


def _reason(name: str) -> str:
    base = name.split(".")[1] if name.count(".") == 2 else name
    return next((reason for words, reason in _REASONS if any(word in base for word in words)), "")


_REASONS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("rand", "dropout", "bernoulli", "normal_functional", "multinomial"), "its result is random"),
    (("item", "local_scalar"), "it reads a value out of a tensor"),
    (("nonzero", "unique", "masked_select"), "the size of its result depends on the values of tensors"),
    (("empty",), "its result is uninitialised memory"),
    (("as_strided",), "it looks beyond a tensor"),
    (("cond", "while_loop", "scan", "map_impl"), "control flow that depends on values"),
)
