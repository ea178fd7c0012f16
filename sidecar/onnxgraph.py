"""ONNX graphs: a lowered graph as ONNX Runtime runs it, its weights among the inputs.

Operators are written out one by one, so that nothing of a graph is computed but what stands here; what is not here is not
translated (``Untranslatable``), and neither is what depends on numbers that only a run knows. Results of convolutions and linear
layers stay in blocks of channels (``sidecar.blocked``) as long as what follows can read them so; ``com.microsoft.nchwc`` has
the operators for that, which ONNX Runtime's optimiser writes otherwise.

Axes are followed by name: two tensors have one shape when their axes have one name. A residual is added within a convolution only
then. Must not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from sidecar.ir import Argument, Dtype, Enum, Graph, Node, Value
from sidecar.lowering import ACTIVATIONS, BLOCKED_CONV2D, BLOCKED_LINEAR, CHANNELS_AT_ONCE, activation_of, arguments_of, pair

_BLOCKS: Final = "com.microsoft.nchwc"
_MICROSOFT: Final = "com.microsoft"
_OPSET: Final = 20
_IR_VERSION: Final = 9

# The size of an axis: a number, or a name that stands for one.
Axis = int | Hashable
# How a tensor lies in memory: as torch counts its axes; with the channels last; in blocks of channels; or in blocks of what was
# its last axis, its rows side by side.
Order = Literal["plain", "last", "blocks", "rows"]


class Untranslatable(Exception):
    """A graph, or one with such inputs, that is not run by a session."""


class InputForm(NamedTuple):
    """What a session depends on of an input: its dtype, its axes by size or name, and whether its channels lie last."""

    dtype: str
    axes: tuple[Axis, ...]
    is_last: bool = False


class WeightForm(NamedTuple):
    """What it depends on of a weight: dtype and shape; in blocks, the layout (``sidecar.blocked.Layout``)."""

    dtype: str
    shape: tuple[int, ...]
    layout: Any = None


class Translation(NamedTuple):
    """A model as bytes. ``outputs`` has, for each result, the name of the output and whether its channels lie last there."""

    model: bytes
    outputs: tuple[tuple[str, bool], ...]


@dataclasses.dataclass(frozen=True)
class _Tensor:
    name: str
    axes: tuple[Axis, ...]
    order: Order = "plain"


@dataclasses.dataclass(frozen=True)
class _Size:
    axis: Axis


# What a node gives; an operator that gives several tensors, all of them.
_Found = _Tensor | _Size | tuple[_Tensor, ...]


def weight_name(number: int) -> str:
    return f"w{number}"


def bias_name(number: int) -> str:
    return f"b{number}"


def input_name(number: int) -> str:
    return f"x{number}"


def translatable(graph: Graph) -> bool:
    """Say whether there is a translation for each of a graph's operators; with some inputs there may be none nevertheless."""
    return all(node.op in _OPERATORS for node in graph.nodes)


def translate(graph: Graph, inputs: Sequence[InputForm], weights: Sequence[WeightForm]) -> Translation:
    """Return a lowered graph for such inputs and weights as an ONNX model. Raises Untranslatable."""
    return _Translation(graph, inputs, weights).run()


def probe() -> bytes:
    """Return a model that puts a picture ``x`` of four channels into blocks, ``y``: so many channels are in a block."""
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=_BLOCKS, channels_last=0)
    return _model([node], [_info("x", "float32", None)], [_info("y", "float32", None)], [])


def _model(
    nodes: Sequence[NodeProto], takes: Sequence[ValueInfoProto], gives: Sequence[ValueInfoProto], constants: Sequence[TensorProto]
) -> bytes:
    opsets = [helper.make_opsetid(domain, version) for domain, version in (("", _OPSET), (_BLOCKS, 1), (_MICROSOFT, 1))]
    graph = helper.make_graph(nodes, "stage", takes, gives, constants)
    model: ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    return bytes(model.SerializeToString())


def _info(name: str, dtype: str, axes: Sequence[int | None] | None) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), axes)


class _Translation:
    """Working state of ``translate``."""

    def __init__(self, graph: Graph, inputs: Sequence[InputForm], weights: Sequence[WeightForm]) -> None:
        self.graph = graph
        self.weights = weights
        self.nodes: list[NodeProto] = []
        self.constants: dict[bytes, TensorProto] = {}
        self.takes: list[ValueInfoProto] = []
        self.found: list[_Found] = []
        self.given: list[_Tensor] = []
        # By name and order: the same tensor in another order.
        self.ordered: dict[tuple[str, Order], _Tensor] = {}
        # Where the size of a named axis can be read: from a tensor, or as a tensor of one number.
        self.sources: dict[Axis, tuple[str, int | None]] = {}
        # Shapes that were put together.
        self.shapes: dict[tuple[Axis, ...], str] = {}
        self.count = 0
        for number, form in enumerate(inputs):
            axes = (form.axes[0], *form.axes[2:], form.axes[1]) if form.is_last else form.axes
            self._take(input_name(number), form.dtype, axes)
            self.given.append(_Tensor(input_name(number), form.axes, "last" if form.is_last else "plain"))

    def run(self) -> Translation:
        for number, weight in enumerate(self.weights):
            if weight.layout is None:
                self._take(weight_name(number), weight.dtype, weight.shape)
            else:
                self._take(weight_name(number), "float32", weight.layout.padded_shape)
                self._take(bias_name(number), "float32", weight.layout.padded_shape[:1])
        for node in self.graph.nodes:
            self.found.append(_OPERATORS[node.op](self, node))
        outputs = [self._result(self._tensor(value)) for value in self.graph.results]
        names = dict.fromkeys(tensor.name for tensor in outputs)
        if any(name.startswith(("x", "w", "b")) for name in names):
            raise Untranslatable("a result is an input or a weight")
        gives = [_info(name, "float32", None) for name in names]
        model = _model(self.nodes, self.takes, gives, list(self.constants.values()))
        return Translation(model, tuple((tensor.name, tensor.order == "last") for tensor in outputs))

    # --- what operators are given -----------------------------------------------------------------------------------

    def _take(self, name: str, dtype: str, axes: Sequence[Axis]) -> None:
        self.takes.append(_info(name, dtype, [axis if isinstance(axis, int) else None for axis in axes]))
        for number, axis in enumerate(axes):
            self.sources.setdefault(axis, (name, number))

    def _tensor(self, argument: Argument) -> _Tensor:
        if not isinstance(argument, Value):
            raise Untranslatable(f"{argument!r} is no tensor")
        if argument.kind == "weight":
            form = self.weights[argument.index]
            if form.layout is not None or form.dtype != "float32":
                raise Untranslatable("a weight that is packed or no float32 is used as it is")
            return _Tensor(weight_name(argument.index), form.shape)
        found = self.given[argument.index] if argument.kind == "input" else self.found[argument.index]
        if isinstance(found, tuple) and argument.item is not None and argument.item < len(found):
            return found[argument.item]
        if not isinstance(found, _Tensor):
            raise Untranslatable("a size, or a list, is used as a tensor")
        return found

    def _plain(self, argument: Argument) -> _Tensor:
        return self.plain(self._tensor(argument))

    def _axis(self, argument: Argument) -> Axis:
        """Return the size that an argument is: a number, or a size computed before."""
        if type(argument) is int:
            return argument
        if isinstance(argument, Value) and argument.kind == "node" and isinstance(size := self.found[argument.index], _Size):
            return size.axis
        raise Untranslatable(f"{argument!r} is no size")

    def named(self, node: Node, *names: str) -> dict[str, Argument]:
        found = arguments_of(node, names)
        if not found:
            raise Untranslatable(f"{node.op} has other arguments than {', '.join(names)}")
        return found

    # --- what is written --------------------------------------------------------------------------------------------

    def emit(self, op: str, *names: str, domain: str = "", **attributes: Any) -> str:
        self.count += 1
        name = f"t{self.count}"
        self.nodes.append(helper.make_node(op, list(names), [name], domain=domain, **attributes))
        return name

    def constant(self, content: Any, dtype: str) -> str:
        array = np.asarray(content, dtype)
        key = f"{dtype}{array.shape}".encode() + array.tobytes()
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(array, f"c{len(self.constants)}")
        return str(self.constants[key].name)

    def made(self, name: str, axes: tuple[Axis, ...], order: Order = "plain") -> _Tensor:
        """Return a tensor that was written, and note where sizes may be read that nobody knew."""
        if order == "plain":
            for number, axis in enumerate(axes):
                self.sources.setdefault(axis, (name, number))
        elif order == "blocks":
            for number in (0, 2, 3):
                self.sources.setdefault(axes[number], (name, number))
        return _Tensor(name, axes, order)

    def sizes(self, axes: Sequence[Axis]) -> str:
        """Return the name of a tensor of int64 with these sizes."""
        if all(isinstance(axis, int) for axis in axes):
            return self.constant(list(axes), "int64")
        if (known := self.shapes.get(tuple(axes))) is not None:
            return known
        parts = []
        for axis in axes:
            if isinstance(axis, int):
                parts.append(self.constant([axis], "int64"))
                continue
            source, number = self.sources.get(axis, ("", None))
            if not source:
                raise Untranslatable(f"nothing tells the size of the axis {axis}")
            if number is not None:
                source = self.emit("Shape", source, start=number, end=number + 1)
                self.sources[axis] = (source, None)
            parts.append(source)
        made = parts[0] if len(parts) == 1 else self.emit("Concat", *parts, axis=0)
        self.shapes[tuple(axes)] = made
        return made

    # --- orders -----------------------------------------------------------------------------------------------------

    def _in_order(self, tensor: _Tensor, order: Order, make: Callable[[_Tensor], str]) -> _Tensor:
        if tensor.order == order:
            return tensor
        key = (tensor.name, order)
        if key not in self.ordered:
            self.ordered[key] = _Tensor(make(tensor), tensor.axes, order)
        return self.ordered[key]

    def plain(self, tensor: _Tensor) -> _Tensor:
        return self._in_order(tensor, "plain", self._as_plain)

    def _as_plain(self, tensor: _Tensor) -> str:
        if tensor.order == "last":
            return self.emit("Transpose", tensor.name, perm=[0, 3, 1, 2])
        if tensor.order == "blocks":
            return self.emit("ReorderOutput", tensor.name, domain=_BLOCKS, channels=tensor.axes[1])
        apart = self.emit("ReorderOutput", tensor.name, domain=_BLOCKS, channels=tensor.axes[-1], channels_last=1)
        return self.emit("Squeeze", apart, self.constant([0, 1] if len(tensor.axes) == 2 else [1], "int64"))

    def blocks(self, tensor: _Tensor) -> _Tensor:
        """Return a picture in blocks of channels."""
        return self._in_order(
            tensor if tensor.order == "last" else self.plain_unless(tensor, "blocks"), "blocks", self._as_blocks
        )

    def plain_unless(self, tensor: _Tensor, order: Order) -> _Tensor:
        return tensor if tensor.order == order else self.plain(tensor)

    def _as_blocks(self, tensor: _Tensor) -> str:
        self._check_channels(tensor.axes[1])
        return self.emit("ReorderInput", tensor.name, domain=_BLOCKS, channels_last=int(tensor.order == "last"))

    def rows(self, tensor: _Tensor) -> _Tensor:
        """Return a matrix, or several, in blocks of the last axis: as a picture of one row."""
        return self._in_order(self.plain_unless(tensor, "rows"), "rows", self._as_rows)

    def _as_rows(self, tensor: _Tensor) -> str:
        self._check_channels(tensor.axes[-1])
        apart = self.emit("Unsqueeze", tensor.name, self.constant([0, 1] if len(tensor.axes) == 2 else [1], "int64"))
        return self.emit("ReorderInput", apart, domain=_BLOCKS, channels_last=1)

    def _check_channels(self, channels: Axis) -> None:
        if not isinstance(channels, int) or channels % CHANNELS_AT_ONCE:
            raise Untranslatable(f"{channels} channels are not put into blocks")

    def _result(self, tensor: _Tensor) -> _Tensor:
        if tensor.order == "blocks":
            name = self.emit("ReorderOutput", tensor.name, domain=_BLOCKS, channels=tensor.axes[1], channels_last=1)
            return _Tensor(name, tensor.axes, "last")
        return tensor if tensor.order == "last" else self.plain(tensor)

    # --- operators: convolutions and linear layers ------------------------------------------------------------------

    def conv2d(self, node: Node) -> _Tensor:
        source, held = self._tensor(node.args[0]), node.args[1]
        assert isinstance(held, Value)
        layout = self.weights[held.index].layout
        if len(source.axes) != 4 or source.axes[1] != layout.shape[1] * layout.groups:
            raise Untranslatable(f"a convolution of {layout.shape} is given {source.axes}")
        source = self.blocks(source) if layout.reads_blocks else self.plain(source)
        windows = [
            _window(size, kernel, step, beside, apart)
            for size, kernel, step, beside, apart in zip(
                source.axes[2:], layout.shape[2:], layout.stride, layout.padding, layout.dilation, strict=True
            )
        ]
        axes = (source.axes[0], layout.shape[0], *windows)
        attributes = {
            "kernel_shape": list(layout.shape[2:]),
            "strides": list(layout.stride),
            "pads": [*layout.padding, *layout.padding],
            "dilations": list(layout.dilation),
            "group": layout.padded_groups,
            "auto_pad": "NOTSET",
        }
        names = [source.name, weight_name(held.index), bias_name(held.index)]
        added = None if node.args[4] is None else self._tensor(node.args[4])
        word, numbers = _activation(node)
        if added is not None and added.axes == axes:
            names.append(self.blocks(added).name)
            added = None
        if added is None and word in _WITHIN:
            attributes["activation"] = _WITHIN[word]
            if word == "hardsigmoid" or numbers:
                attributes["activation_params"] = [1 / 6, 0.5] if word == "hardsigmoid" else list(numbers)
            word = "none"
        total = self.made(self.emit("Conv", *names, domain=_BLOCKS, **attributes), axes, "blocks")
        return self._finished(total, added, word, numbers)

    def plain_conv2d(self, node: Node) -> _Tensor:
        """Return what a convolution gives that is not packed, for its channels do not fill blocks."""
        found = self.named(node, "input", "weight", "bias", "stride", "padding", "dilation", "groups")
        source, weight = self._plain(found.get("input")), self._plain(found.get("weight"))
        step, beside, apart = (_two_of(found.get(name, usual), usual) for name, usual in _STEPS)
        groups = found.get("groups", 1)
        if len(source.axes) != 4 or type(groups) is not int or groups < 1 or source.axes[1] != weight.axes[1] * groups:  # type: ignore[operator]
            raise Untranslatable(f"a convolution of {weight.axes} is given {source.axes}")
        kernel: list[int] = list(weight.axes[2:])  # type: ignore[arg-type]
        windows = [_window(*each) for each in zip(source.axes[2:], kernel, step, beside, apart, strict=True)]
        names = [source.name, weight.name, *(self._plain(bias).name for bias in [found.get("bias")] if bias is not None)]
        attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": list(step), "dilations": list(apart)}
        attributes |= {"pads": [*beside, *beside], "group": groups}
        return self.made(self.emit("Conv", *names, **attributes), (source.axes[0], weight.axes[0], *windows))

    def batch_norm(self, node: Node) -> _Tensor:
        names = ("weight", "bias", "running_mean", "running_var")
        found = self.named(node, "input", *names, "training", "momentum", "eps", "cudnn_enabled")
        source, epsilon = self._plain(found.get("input")), found.get("eps")
        if found.get("training") is not False or not isinstance(epsilon, float):
            raise Untranslatable("a norm of what it is given")
        parts = [self._plain(found.get(name)).name for name in names]
        return self.made(self.emit("BatchNormalization", source.name, *parts, epsilon=epsilon), source.axes)

    def linear(self, node: Node) -> _Tensor:
        source, held = self._tensor(node.args[0]), node.args[1]
        assert isinstance(held, Value)
        layout = self.weights[held.index].layout
        if len(source.axes) not in (2, 3) or source.axes[-1] != layout.shape[1]:
            raise Untranslatable(f"a linear layer of {layout.shape} is given {source.axes}")
        attributes = {"kernel_shape": [1, 1], "strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
        names = (self.rows(source).name, weight_name(held.index), bias_name(held.index))
        total = self.made(
            self.emit("Conv", *names, domain=_BLOCKS, auto_pad="NOTSET", **attributes),
            (*source.axes[:-1], layout.shape[0]),
            "rows",
        )
        added = None if node.args[4] is None else self._tensor(node.args[4])
        return self._finished(total, added, *_activation(node))

    def _finished(self, total: _Tensor, added: _Tensor | None, word: str, numbers: Sequence[float]) -> _Tensor:
        if added is not None:
            total = self._two("Add", total, added)
        return self._activated(total, word, numbers)

    def _activated(self, tensor: _Tensor, word: str, numbers: Sequence[float]) -> _Tensor:
        """Return what an activation of lowering's makes of a tensor in whatever order."""
        if word == "none":
            return tensor
        if word == "swish":
            return dataclasses.replace(tensor, name=self.emit("Mul", tensor.name, self.emit("Sigmoid", tensor.name)))
        if word == "hardtanh":
            low, high = (self.constant(number, "float32") for number in numbers)
            return dataclasses.replace(tensor, name=self.emit("Clip", tensor.name, low, high))
        op, attributes = _ALONE[word]
        if word == "leaky_relu":
            attributes = {"alpha": numbers[0]}
        return dataclasses.replace(tensor, name=self.emit(op, tensor.name, **attributes))

    def plain_linear(self, node: Node) -> _Tensor:
        found = self.named(node, "input", "weight", "bias")
        source, weight = self._plain(found.get("input")), self._plain(found.get("weight"))
        if len(weight.axes) != 2 or len(source.axes) < 2 or source.axes[-1] != weight.axes[1]:
            raise Untranslatable(f"a linear layer of {weight.axes} is given {source.axes}")
        name = self.emit("FusedMatMul", source.name, weight.name, domain=_MICROSOFT, transB=1)
        if found.get("bias") is not None:
            name = self.emit("Add", name, self._plain(found["bias"]).name)
        return self.made(name, (*source.axes[:-1], weight.axes[0]))

    # --- number by number -------------------------------------------------------------------------------------------

    def activation(self, node: Node) -> _Tensor:
        found = activation_of(node)
        if found is None:
            raise Untranslatable(f"{node.op} has other arguments than numbers")
        return self._activated(self._tensor(node.args[0]), *found)

    def arithmetic(self, node: Node) -> _Tensor:
        found = self.named(node, "self", "other", "alpha")
        if found.get("alpha", 1) != 1:
            raise Untranslatable("an addition is scaled")
        op = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div"}[node.op.split(".")[1]]
        one, other = found.get("self"), found.get("other")
        if isinstance(one, Value) and isinstance(other, int | float) and not isinstance(other, bool):
            tensor = self._tensor(one)
            return dataclasses.replace(tensor, name=self.emit(op, tensor.name, self.constant(float(other), "float32")))
        return self._two(op, self._tensor(one), self._tensor(other))

    def _two(self, op: str, one: _Tensor, other: _Tensor) -> _Tensor:
        """Return what an operator makes of two tensors, number by number: in blocks only where their shapes are the same."""
        # What fills up the last block is zeros: divided by each other they are no numbers, and stay so times a weight of zero.
        if one.axes == other.axes and op != "Div":
            for order, arrange in (("blocks", self.blocks), ("rows", self.rows)):
                if order in (one.order, other.order):
                    one, other = arrange(one), arrange(other)
                    return self.made(self.emit(op, one.name, other.name), one.axes, one.order)
        one, other = self.plain(one), self.plain(other)
        return self.made(self.emit(op, one.name, other.name), _spread(one.axes, other.axes))

    def same(self, node: Node) -> _Tensor:
        return self._tensor(node.args[0])

    # --- pictures ---------------------------------------------------------------------------------------------------

    def max_pool(self, node: Node) -> _Tensor:
        found = self.named(node, "self", "kernel_size", "stride", "padding", "dilation", "ceil_mode")
        return self._pool("MaxPool", found, {"storage_order": 0})

    def average_pool(self, node: Node) -> _Tensor:
        names = ("self", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
        found = self.named(node, *names)
        if found.get("divisor_override") is not None:
            raise Untranslatable("an average is divided by another number")
        return self._pool("AveragePool", found, {"count_include_pad": int(found.get("count_include_pad", True) is True)})

    def _pool(self, op: str, found: dict[str, Argument], attributes: dict[str, Any]) -> _Tensor:
        source = self._tensor(found.get("self"))
        kernel = _two_of(found.get("kernel_size"))
        step = kernel if found.get("stride", ()) in ((), None) else _two_of(found["stride"])
        beside, apart = _two_of(found.get("padding", 0), 0), _two_of(found.get("dilation", 1))
        if found.get("ceil_mode", False) is not False or len(source.axes) != 4:
            raise Untranslatable("a pool rounds up, or is not given pictures")
        attributes |= {"kernel_shape": list(kernel), "strides": list(step), "pads": [*beside, *beside], "auto_pad": "NOTSET"}
        if op == "MaxPool":
            attributes |= {"dilations": list(apart), "ceil_mode": 0}
        windows = [_window(*each) for each in zip(source.axes[2:], kernel, step, beside, apart, strict=True)]
        axes = (*source.axes[:2], *windows)
        if source.order != "blocks":
            return self.made(self.emit(op, self.plain(source).name, **attributes), axes)
        return self.made(self.emit(op, source.name, domain=_BLOCKS, **attributes), axes, "blocks")

    def adaptive_pool(self, node: Node) -> _Tensor:
        found = self.named(node, "self", "output_size")
        source, sizes = self._tensor(found.get("self")), _two_of(found.get("output_size"))
        if sizes == source.axes[2:]:
            return source
        if sizes != (1, 1):
            raise Untranslatable("a picture is averaged to several places")
        return self._average(source)

    def _average(self, source: _Tensor) -> _Tensor:
        if len(source.axes) != 4:
            raise Untranslatable("what is averaged is no picture")
        axes = (*source.axes[:2], 1, 1)
        if source.order == "blocks":
            return self.made(self.emit("GlobalAveragePool", source.name, domain=_BLOCKS), axes, "blocks")
        return self.made(self.emit("GlobalAveragePool", self.plain(source).name), axes)

    def mean(self, node: Node) -> _Tensor:
        found = self.named(node, "self", "dim", "keepdim")
        source, dims = self._tensor(found.get("self")), found.get("dim")
        rank = len(source.axes)
        if not isinstance(dims, tuple) or not dims or not all(type(dim) is int for dim in dims):
            raise Untranslatable("a mean has no axes")
        which = sorted(_index(dim, rank) for dim in dims)
        if rank == 4 and which == [2, 3]:
            whole = self._average(source)
            return whole if found.get("keepdim", False) else self._reshaped(whole, whole.axes[:2])
        source, keeps = self.plain(source), found.get("keepdim", False) is True
        name = self.emit("ReduceMean", source.name, self.constant(which, "int64"), keepdims=int(keeps))
        kept = (1 if number in which else axis for number, axis in enumerate(source.axes) if keeps or number not in which)
        return self.made(name, tuple(kept))

    def cat(self, node: Node) -> _Tensor:
        found = self.named(node, "tensors", "dim")
        members = found.get("tensors")
        if not isinstance(members, tuple) or not members:
            raise Untranslatable("nothing is joined")
        tensors = [self._tensor(member) for member in members]
        dim = _index(found.get("dim", 0), len(tensors[0].axes))
        kept = {(*tensor.axes[:dim], *tensor.axes[dim + 1 :]) for tensor in tensors}
        if len(kept) > 1:
            raise Untranslatable("tensors of other shapes are joined")
        sizes = [tensor.axes[dim] for tensor in tensors]
        joined: Axis = sum(sizes) if all(isinstance(size, int) for size in sizes) else ("cat", *sizes)  # type: ignore[arg-type]
        axes = (*tensors[0].axes[:dim], joined, *tensors[0].axes[dim + 1 :])
        if len(axes) == 4 and dim == 1 and all(tensor.order == "blocks" for tensor in tensors) and self._are_whole(sizes):
            return self.made(self.emit("Concat", *(tensor.name for tensor in tensors), axis=1), axes, "blocks")
        tensors = [self.plain(tensor) for tensor in tensors]
        return self.made(self.emit("Concat", *(tensor.name for tensor in tensors), axis=dim), axes)

    def _are_whole(self, channels: Sequence[Axis]) -> bool:
        """Say whether channels, all known, fill their blocks."""
        block = next(weight.layout.block for weight in self.weights if weight.layout is not None)
        return all(isinstance(size, int) and size % block == 0 for size in channels)

    # --- rows -------------------------------------------------------------------------------------------------------

    def layer_norm(self, node: Node) -> _Tensor:
        found = self.named(node, "input", "normalized_shape", "weight", "bias", "eps", "cudnn_enable")
        source, shape, epsilon = self._plain(found.get("input")), found.get("normalized_shape"), found.get("eps", 1e-5)
        if not isinstance(shape, tuple) or source.axes[len(source.axes) - len(shape) :] != shape or found.get("weight") is None:
            raise Untranslatable("a layer norm has no weight, or another shape than its input")
        names = [source.name, *(self._plain(found[part]).name for part in ("weight", "bias") if found.get(part) is not None)]
        name = self.emit("LayerNormalization", *names, axis=-len(shape), epsilon=float(epsilon))  # type: ignore[arg-type]
        return self.made(name, source.axes)

    def softmax(self, node: Node) -> _Tensor:
        found = self.named(node, "self", "dim", "dtype")
        if found.get("dtype") not in (None, Dtype("float32")):
            raise Untranslatable("a softmax of another dtype")
        source = self._plain(found.get("self"))
        return self.made(self.emit("Softmax", source.name, axis=_index(found.get("dim"), len(source.axes))), source.axes)

    def matmul(self, node: Node) -> _Tensor:
        one, other = self._plain(node.args[0]), self._plain(node.args[1])
        return self.made(self.emit("MatMul", one.name, other.name), _product(one.axes, other.axes))

    def attention(self, node: Node) -> _Tensor:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
        found = self.named(node, *names)
        query, key, value = (self._plain(found.get(name)) for name in names[:3])
        width = query.axes[-1]
        if any(found.get(name) for name in names[3:6]) or found.get("enable_gqa") or not isinstance(width, int):
            raise Untranslatable("attention with a mask, or of an unknown width")
        scale = found.get("scale")
        factor = float(scale) if isinstance(scale, int | float) else width**-0.5
        if key.axes[:-2] != query.axes[:-2] or key.axes[-1] != width:
            raise Untranslatable("attention to something else")
        closeness = self.emit("FusedMatMul", query.name, key.name, domain=_MICROSOFT, transB=1, alpha=factor)
        shares = self.emit("Softmax", closeness, axis=-1)
        axes = _product((*query.axes[:-1], key.axes[-2]), value.axes)
        return self.made(self.emit("MatMul", shares, value.name), axes)

    # --- views ------------------------------------------------------------------------------------------------------

    def reshape(self, node: Node) -> _Tensor:
        source, sizes = self._tensor(node.args[0]), node.args[1]
        if not isinstance(sizes, tuple):
            raise Untranslatable("a shape is no list")
        axes = tuple(self._axis(size) for size in sizes)
        return self._reshaped(source, axes)

    def _reshaped(self, source: _Tensor, axes: tuple[Axis, ...]) -> _Tensor:
        if axes == source.axes:
            return source
        source = self.plain(source)
        name = self.emit("Reshape", source.name, self.sizes(axes), allowzero=1 if 0 in axes else 0)
        return self.made(name, tuple(_left_over(source.axes, axes) if axis == -1 else axis for axis in axes))

    def flatten(self, node: Node) -> _Tensor:
        found = self.named(node, "self", "start_dim", "end_dim")
        source = self._tensor(found.get("self"))
        rank = len(source.axes)
        first, last = _index(found.get("start_dim", 0), rank), _index(found.get("end_dim", -1), rank)
        return self._reshaped(source, (*source.axes[:first], -1, *source.axes[last + 1 :]))

    def transpose(self, node: Node) -> _Tensor:
        source = self._plain(node.args[0])
        order = list(range(len(source.axes)))
        one, other = (_index(dim, len(order)) for dim in node.args[1:])
        order[one], order[other] = order[other], order[one]
        return self._permuted(source, order)

    def permute(self, node: Node) -> _Tensor:
        source, dims = self._plain(node.args[0]), node.args[1]
        if not isinstance(dims, tuple):
            raise Untranslatable("an order is no list")
        return self._permuted(source, [_index(dim, len(source.axes)) for dim in dims])

    def _permuted(self, source: _Tensor, order: Sequence[int]) -> _Tensor:
        return self.made(self.emit("Transpose", source.name, perm=list(order)), tuple(source.axes[dim] for dim in order))

    def unsqueeze(self, node: Node) -> _Tensor:
        source = self._plain(node.args[0])
        dim = _index(node.args[1], len(source.axes) + 1)
        return self.made(
            self.emit("Unsqueeze", source.name, self.constant([dim], "int64")), (*source.axes[:dim], 1, *source.axes[dim:])
        )

    def expand(self, node: Node) -> _Tensor:
        source, sizes = self._plain(node.args[0]), node.args[1]
        if not isinstance(sizes, tuple) or len(sizes) < len(source.axes):
            raise Untranslatable("a shape is no list, or too short")
        before = (1,) * (len(sizes) - len(source.axes)) + source.axes
        axes = tuple(old if size == -1 else self._axis(size) for size, old in zip(sizes, before, strict=True))
        if any(old not in (1, new) for old, new in zip(before, axes, strict=True)):
            raise Untranslatable(f"{before} may not become {axes}")
        return source if axes == source.axes else self.made(self.emit("Expand", source.name, self.sizes(axes)), axes)

    def unbind(self, node: Node) -> tuple[_Tensor, ...]:
        found = self.named(node, "self", "dim")
        source = self._plain(found.get("self"))
        dim = _index(found.get("dim", 0), len(source.axes))
        count = source.axes[dim]
        if not isinstance(count, int):
            raise Untranslatable("nobody knows how many parts there are")
        axes = (*source.axes[:dim], *source.axes[dim + 1 :])
        places = [self.constant(place, "int64") for place in range(count)]
        return tuple(self.made(self.emit("Gather", source.name, place, axis=dim), axes) for place in places)

    def select(self, node: Node) -> _Tensor:
        source = self._plain(node.args[0])
        dim, place = _index(node.args[1], len(source.axes)), node.args[2]
        if type(place) is not int:
            raise Untranslatable("a place is no number")
        name = self.emit("Gather", source.name, self.constant(place, "int64"), axis=dim)
        return self.made(name, (*source.axes[:dim], *source.axes[dim + 1 :]))

    # --- sizes ------------------------------------------------------------------------------------------------------

    def size(self, node: Node) -> _Size:
        source = self._tensor(node.args[0])
        return _Size(source.axes[_index(node.args[1], len(source.axes))])

    def size_arithmetic(self, node: Node) -> _Size:
        one, other = (self._axis(argument) for argument in node.args)
        if not (isinstance(one, int) and isinstance(other, int)):
            raise Untranslatable("a size is computed of sizes that only a run knows")
        return _Size(_ARITHMETIC[node.op](one, other))


# --- axes -------------------------------------------------------------------------------------------------------------


def _window(size: Axis, kernel: int, step: int, beside: int, apart: int) -> Axis:
    """Return how many places a window has along an axis: named by what it is computed from, where that is no number."""
    missing = apart * (kernel - 1) - 2 * beside
    if step == 1 and not missing:
        return size
    return (size - missing - 1) // step + 1 if isinstance(size, int) else ("window", size, missing, step)


def _spread(one: tuple[Axis, ...], other: tuple[Axis, ...]) -> tuple[Axis, ...]:
    """Return the axes of two tensors of which one is spread over the other."""
    rank = max(len(one), len(other))
    axes = []
    for first, second in zip((1,) * (rank - len(one)) + one, (1,) * (rank - len(other)) + other, strict=True):
        if first != second and 1 not in (first, second):
            raise Untranslatable(f"{one} and {other} may not fit")
        axes.append(second if first == 1 else first)
    return tuple(axes)


def _product(one: tuple[Axis, ...], other: tuple[Axis, ...]) -> tuple[Axis, ...]:
    if len(one) < 2 or len(one) != len(other) or one[:-2] != other[:-2] or one[-1] != other[-2]:
        raise Untranslatable(f"{one} is multiplied with {other}")
    return (*one[:-1], other[-1])


def _left_over(before: tuple[Axis, ...], after: tuple[Axis, ...]) -> Axis:
    """Return the size of the axis that is -1: what is left of the axes before when those named after are taken out."""
    rest = list(before)
    number = 1
    for axis in after:
        if axis == -1:
            continue
        if axis in rest:
            rest.remove(axis)
        elif isinstance(axis, int):
            number *= axis
        else:
            return ("left over", before, after)
    numbers = [axis for axis in rest if isinstance(axis, int)]
    if len(numbers) == len(rest):
        whole = int(np.prod(numbers, dtype=object))
        return whole // number if number and not whole % number else ("left over", before, after)
    return rest[0] if len(rest) == 1 and number == 1 else ("left over", before, after)


def _index(dim: Argument, rank: int) -> int:
    if type(dim) is not int or not -rank <= dim < rank:
        raise Untranslatable(f"{dim!r} is no axis of {rank}")
    return dim % rank


def _two_of(argument: Argument, smallest: int = 1) -> tuple[int, int]:
    """Return two constant sizes of at least ``smallest``: kernels divide by some of them without a word."""
    sizes = pair(argument, smallest)
    if sizes is None:
        raise Untranslatable(f"{argument!r} are no two sizes of at least {smallest}")
    return sizes


# --- tables -----------------------------------------------------------------------------------------------------------

# What lowering calls activations: those that a convolution has within, and those that stand alone.
_WITHIN: Final = {
    "relu": "Relu",
    "sigmoid": "Sigmoid",
    "tanh": "Tanh",
    "leaky_relu": "LeakyRelu",
    "hardtanh": "Clip",
    "hardsigmoid": "HardSigmoid",
}
_ALONE: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "tanh": ("Tanh", {}),
    "leaky_relu": ("LeakyRelu", {}),
    "hardswish": ("HardSwish", {}),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "gelu": ("Gelu", {"approximate": "none"}),
    "gelu_tanh": ("Gelu", {"approximate": "tanh"}),
}


def _activation(node: Node) -> tuple[str, tuple[float, ...]]:
    activation, numbers = node.args[2], node.args[3]
    assert isinstance(activation, Enum)
    assert isinstance(numbers, tuple)
    return activation.word, tuple(float(number) for number in numbers)  # type: ignore[arg-type]


_STEPS: Final = (("stride", 1), ("padding", 0), ("dilation", 1))
_ARITHMETIC: Final[dict[str, Callable[[int, int], int]]] = {
    "sym.add": lambda one, other: one + other,
    "sym.sub": lambda one, other: one - other,
    "sym.mul": lambda one, other: one * other,
}
_OPERATORS: Final[dict[str, Callable[[_Translation, Node], _Found]]] = {
    BLOCKED_CONV2D: _Translation.conv2d,
    BLOCKED_LINEAR: _Translation.linear,
    "aten.conv2d.default": _Translation.plain_conv2d,
    "aten.batch_norm.default": _Translation.batch_norm,
    "aten.linear.default": _Translation.plain_linear,
    **dict.fromkeys(ACTIVATIONS, _Translation.activation),
    **dict.fromkeys((f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div")), _Translation.arithmetic),
    **dict.fromkeys(("aten.contiguous.default", "aten.alias.default", "aten.detach.default"), _Translation.same),
    "aten.max_pool2d.default": _Translation.max_pool,
    "aten.avg_pool2d.default": _Translation.average_pool,
    "aten.adaptive_avg_pool2d.default": _Translation.adaptive_pool,
    "aten.mean.dim": _Translation.mean,
    "aten.cat.default": _Translation.cat,
    "aten.layer_norm.default": _Translation.layer_norm,
    "aten.softmax.int": _Translation.softmax,
    "aten.matmul.default": _Translation.matmul,
    "aten.bmm.default": _Translation.matmul,
    "aten.scaled_dot_product_attention.default": _Translation.attention,
    "aten.reshape.default": _Translation.reshape,
    "aten.view.default": _Translation.reshape,
    "aten.flatten.using_ints": _Translation.flatten,
    "aten.transpose.int": _Translation.transpose,
    "aten.permute.default": _Translation.permute,
    "aten.unsqueeze.default": _Translation.unsqueeze,
    "aten.expand.default": _Translation.expand,
    "aten.unbind.int": _Translation.unbind,
    "aten.select.int": _Translation.select,
    "aten.sym_size.int": _Translation.size,
    **dict.fromkeys(_ARITHMETIC, _Translation.size_arithmetic),
}
