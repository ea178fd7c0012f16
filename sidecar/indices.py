"""Indices: operators that take them, so that one out of range is an error of its request, whatever the device makes of it.

On a CPU torch refuses such an index. On CUDA a kernel that meets one ends the whole context, for everybody; there indices are
brought into range, and a flag on the device says whether any was not: ``Program.run`` looks at it when all else has begun. Where
torch takes any index modulo the size, as ``take_along_dim`` does, that is done on every device. Must not import anything above
layer 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch


class _Kind(NamedTuple):
    """How an operator takes indices: by which argument, along which axis of which other one, whether they count from the end."""

    by: str
    source: str = "self"
    from_end: bool = False
    # Else it is the first axis.
    has_dim: bool = True


_SCATTER: Final = ("scatter.src", "scatter.value", "scatter_add.default", "scatter_reduce.two")
_KINDS: Final[dict[str, _Kind]] = {
    "aten.embedding.default": _Kind("indices", "weight", has_dim=False),
    "aten.take_along_dim.default": _Kind("indices", from_end=True),
    **{f"aten.{name}.default": _Kind("index") for name in ("index_select", "gather", "index_add", "index_copy")},
    **{f"aten.index_fill.{overload}": _Kind("index", from_end=True) for overload in ("int_Scalar", "int_Tensor")},
    **{f"aten.{name}": _Kind("index") for name in _SCATTER},
}
_LISTS: Final = frozenset({"aten.index.Tensor", "aten.index_put.default"})
_ONE_HOT: Final = "aten.one_hot.default"
_MASKED: Final = "aten.masked_scatter.default"
# What torch computes something with where there is nothing to be had.
EVERYWHERE: Final = frozenset({"aten.take_along_dim.default"})
GUARDED: Final = frozenset(_KINDS) | _LISTS | {_ONE_HOT, _MASKED}

# What an operator is called with, and whether something in it was out of range: a truth value on the device, None for no.
_Safe = tuple[Any, torch.Tensor | None]


def guarded(op: str, function: Callable[..., Any], names: Sequence[str]) -> Callable[..., tuple[Any, torch.Tensor | None]]:
    """Return an operator of ``GUARDED`` that gives its result and the flag. ``names`` are those of its parameters, in order.

    It raises IndexError for what can be told without looking at the device, and what torch raises.
    """
    key = _KINDS[op].by if op in _KINDS else "indices" if op in _LISTS else "self" if op == _ONE_HOT else "mask"
    position = names.index(key)

    def call(*arguments: Any, **named: Any) -> tuple[Any, torch.Tensor | None]:
        safe, flag = _made_safe(op, dict(zip(names, arguments, strict=False)) | named)
        if position < len(arguments):
            arguments = (*arguments[:position], safe, *arguments[position + 1 :])
        else:
            named[key] = safe
        return function(*arguments, **named), flag

    return call


def _made_safe(op: str, given: Mapping[str, Any]) -> _Safe:
    if op in _LISTS:
        return _each_in_range(given["indices"], _shape(given["self"]))
    if op == _ONE_HOT:
        return _in_range(given["self"], 0, given["num_classes"])
    if op == _MASKED:
        return _no_more_than(given["mask"], _shape(given["self"]), given["source"])
    kind = _KINDS[op]
    index, shape = given[kind.by], _shape(given[kind.source])
    dim: int | None = given.get("dim") if kind.has_dim else 0
    if dim is None:
        # All of it, one after the other; torch does not count from the end then.
        return _in_range(index, 0, shape.numel())
    if shape and not -len(shape) <= dim < len(shape):
        # torch says so, before it begins.
        return index, None
    size = shape[dim] if shape else 1
    return _in_range(index, -size if kind.from_end else 0, size)


def _shape(tensor: Any) -> torch.Size:
    # A number may stand for a tensor.
    return tensor.shape if isinstance(tensor, torch.Tensor) else torch.Size()


def _in_range(index: Any, first: int, end: int) -> _Safe:
    """Return an index brought into a range."""
    if not isinstance(index, torch.Tensor):
        if not first <= index < end:
            raise IndexError(f"index {index} is out of range")
        return index, None
    if index.is_floating_point() or not index.numel():
        # Of which torch refuses the first, and there is nothing to be had of the second.
        return index, None
    if first >= end:
        raise IndexError("index into nothing is out of range")
    if index.dtype is torch.bool:
        return index, None
    most = torch.iinfo(index.dtype)
    safe = index.clamp(max(first, most.min), min(end - 1, most.max))
    return safe, (safe != index).any()


def _each_in_range(indices: Sequence[Any], shape: torch.Size) -> _Safe:
    """Return indices, one for each axis, brought into range; a mask stands for as many axes as it has, None for one."""
    safe, flags, axis = [], [], 0
    for index in indices:
        is_mask = isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)
        made, flag = index, None
        if index is not None and not is_mask and axis < len(shape):
            made, flag = _in_range(index, -shape[axis], shape[axis])
        safe.append(made)
        if flag is not None:
            flags.append(flag)
        axis += index.ndim if is_mask else 1
    return safe, torch.stack(flags).any() if flags else None


def _no_more_than(mask: Any, shape: torch.Size, source: Any) -> _Safe:
    """Return a mask with no more places than ``source`` has numbers for."""
    if not isinstance(mask, torch.Tensor) or not isinstance(source, torch.Tensor) or mask.dtype is not torch.bool:
        return mask, None
    whole, _ = torch.broadcast_tensors(mask, mask.new_empty(()).expand(shape))  # type: ignore[no-untyped-call]
    safe = whole & (whole.reshape(-1).cumsum(0).reshape(whole.shape) <= source.numel())
    return safe, (safe != whole).any()
