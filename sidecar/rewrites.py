"""Rewrites: nodes of a captured graph that a bundle expresses otherwise, or not at all.

What only moves memory is dropped. Operators that a decomposition took apart are put together again, where the parts are
slower or were chosen for one kind of device. Part of the converter. Must not import anything above layer 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch.fx import Node as FxNode

from sidecar.fxgraph import operand, operator_name
from sidecar.ir import Argument

_WHOLE_SLICE_END = (1 << 63) - 1


class Emitter(Protocol):
    """What a rewrite needs of the translation it is part of."""

    found: dict[FxNode, Argument]

    def value(self, node: FxNode) -> Argument:
        """Return what stands for a node that was translated before."""

    def emit(self, node: FxNode, name: str, args: Any, kwargs: Mapping[str, Any] | None = None) -> bool:
        """Add an operation that stands for ``node``; return whether it has a form in a bundle."""


Rewrite = Callable[[Emitter, FxNode, set[FxNode]], None]


def _same(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    """Drop an operator that only gives its first argument another name or other memory."""
    emitter.found[node] = emitter.value(operand(node.args[0]))


def _reshape(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    """A view was legal for the strides the operators of one device produce; a reshape is legal for all."""
    emitter.emit(node, "aten.reshape.default", node.args)


def _clone(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    """In a functional graph a copy matters for nothing but the order of elements in memory."""
    source = operand(node.args[0])
    if node.kwargs.get("memory_format") is torch.contiguous_format:
        emitter.emit(node, "aten.contiguous.default", (source,))
    elif source.meta["val"].is_contiguous():
        _same(emitter, node, live)
    else:
        emitter.emit(node, "aten.clone.default", (source,))


def _to_copy(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    source = operand(node.args[0])
    dtype = node.kwargs.get("dtype")
    if dtype is None or dtype == source.meta["val"].dtype:
        _same(emitter, node, live)
    else:
        emitter.emit(node, "aten._to_copy.default", (source,), {"dtype": dtype})


def _slice(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    arguments = dict(zip(("self", "dim", "start", "end", "step"), node.args, strict=False))
    start, end, step = arguments.get("start"), arguments.get("end"), arguments.get("step", 1)
    if start in (None, 0) and end in (None, _WHOLE_SLICE_END) and step == 1:
        _same(emitter, node, live)
    else:
        emitter.emit(node, "aten.slice.Tensor", node.args)


def _permute(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    order: Any = node.args[1]
    if list(order) == list(range(len(order))):
        _same(emitter, node, live)
    else:
        emitter.emit(node, "aten.permute.default", node.args)


def _batch_norm(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    """Put a batch norm together again; its decomposed form makes two more results that inference does not use."""
    first = _only_result(node, live)
    source, weight, bias, mean, variance, momentum, epsilon = node.args
    arguments = (source, weight, bias, mean, variance, False, momentum, epsilon, True)
    if first is not None and emitter.emit(node, "aten.batch_norm.default", arguments):
        emitter.found[first] = emitter.found[node]


def _max_pool(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
    """Drop the indices of a maximum pool that only training uses."""
    first = _only_result(node, live)
    name = operator_name(node)
    if first is None:
        emitter.emit(node, name, node.args)
    elif emitter.emit(node, name.replace("_with_indices", ""), node.args):
        emitter.found[first] = emitter.found[node]


def _named(name: str) -> Rewrite:
    """Return the rewrite to another name of the same operator."""

    def rename(emitter: Emitter, node: FxNode, live: set[FxNode]) -> None:
        emitter.emit(node, name, node.args, node.kwargs)

    return rename


REWRITES: dict[str, Rewrite] = {
    "aten.alias.default": _same,
    "aten.detach.default": _same,
    "aten.lift_fresh_copy.default": _same,
    "aten.__and__.Scalar": _named("aten.bitwise_and.Scalar"),
    "aten.__and__.Tensor": _named("aten.bitwise_and.Tensor"),
    "aten.__or__.Scalar": _named("aten.bitwise_or.Scalar"),
    "aten.__or__.Tensor": _named("aten.bitwise_or.Tensor"),
    "aten.__xor__.Scalar": _named("aten.bitwise_xor.Scalar"),
    "aten.__xor__.Tensor": _named("aten.bitwise_xor.Tensor"),
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
