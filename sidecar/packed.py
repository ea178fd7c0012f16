"""Packed weights: weights laid out as oneDNN wants them, and the operators of lowered graphs that take them.

A packed convolution gives its result with the channels last, whatever it was given; the operators of torch between two of
them keep that order, so the picture is turned once at the beginning. One packed weight serves every batch and picture size:
oneDNN laid none out anew in calls with batches of 1, 8 and 32. What an operator is given is checked where torch would
read on without a word. CPU only; callable from any thread.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from sidecar.ir import Enum, Node
from sidecar.lowering import CONV2D, TURNED_LINEAR, Recipe

_NAMES = ("_convolution_pointwise", "_linear_pointwise", "_reorder_convolution_weight", "_reorder_linear_weight", "_nbytes")
_linear: Callable[..., torch.Tensor] = torch._C._nn.linear
_ALIGN_BYTES: Final = 64


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Packed:
    """The handle of one packed weight of shape ``shape``. ``rest`` is what its operator takes after the inputs."""

    shape: tuple[int, ...]
    rest: tuple[Any, ...]
    size_bytes: int


@functools.cache
def available() -> bool:
    """Return whether this torch has oneDNN with the operators that are needed."""
    return bool(torch._C._has_mkldnn) and all(hasattr(torch.ops.mkldnn, name) for name in _NAMES)


def packed_bytes(recipe: Recipe) -> int:
    """Return the bytes of the packed weight that ``recipe`` makes. Measured, once for all recipes of one skeleton."""
    size = _measured.get(recipe.skeleton)
    if size is None:
        zeros = [torch.zeros(weight.shape) for weight in recipe.sources]
        size = _measured[recipe.skeleton] = pack(recipe, zeros).size_bytes
    return size


_measured: dict[str, int] = {}


def pack(recipe: Recipe, sources: Sequence[torch.Tensor]) -> Packed:
    """Return the packed weight made of ``sources``, float32 on the CPU in the recipe's order. It shares no memory with them.

    Raises RuntimeError when there is no memory.
    """
    parts = dict(zip(recipe.roles, sources, strict=True))
    options: dict[str, Any] = dict(recipe.options)
    with torch.inference_mode():
        if recipe.kind == "conv2d":
            return _pack_conv2d(parts, options)
        weight, bias = parts["weight"], _copy(parts.get("bias"))
        shape = tuple(weight.shape)
        if options["layout"] == "transposed":
            # The same matrix to look at, with its columns one after the other: what MKL multiplies with fastest.
            turned = weight.t().contiguous().t()
            return Packed(shape, (turned, bias), _size_bytes(turned.nbytes, bias))
        blocked = torch.ops.mkldnn._reorder_linear_weight(weight)
        return Packed(shape, (blocked, bias), _size_bytes(torch.ops.mkldnn._nbytes(blocked), bias))


def _pack_conv2d(parts: dict[str, torch.Tensor], options: dict[str, Any]) -> Packed:
    weight, bias = folded_conv2d(parts, options)
    steps = (list(options["padding"]), list(options["stride"]), list(options["dilation"]), options["groups"])
    turned = weight.contiguous(memory_format=torch.channels_last)
    blocked = torch.ops.mkldnn._reorder_convolution_weight(turned, *steps)
    return Packed(tuple(weight.shape), (blocked, _copy(bias), *steps), _size_bytes(torch.ops.mkldnn._nbytes(blocked), bias))


def folded_conv2d(parts: dict[str, torch.Tensor], options: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return weight and bias of a convolution, a norm after it folded in, its kernel widened. They may be the sources."""
    weight, bias = parts["weight"], parts.get("bias")
    if "norm mean" in parts:
        # norm(conv(x)) = conv(x) * scale + (bias - mean) * scale + norm bias; in float64, so that nothing is rounded twice.
        scale = (parts["norm variance"].double() + options["epsilon"]).rsqrt()
        if "norm weight" in parts:
            scale = scale * parts["norm weight"].double()
        shift = ((0.0 if bias is None else bias.double()) - parts["norm mean"].double()) * scale
        if "norm bias" in parts:
            shift = shift + parts["norm bias"].double()
        weight, bias = weight * scale.float()[:, None, None, None], shift.float()
    if "zeros" in options:
        weight = torch.nn.functional.pad(weight, options["zeros"])
    return weight, bias


def _copy(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.clone()


def _size_bytes(weight_bytes: int, bias: torch.Tensor | None) -> int:
    return weight_bytes if bias is None else padded_bytes(weight_bytes) + bias.nbytes


def padded_bytes(weight_bytes: int) -> int:
    """Return where the bias of a packed weight begins: at the next line of the processor's cache."""
    return -(-weight_bytes // _ALIGN_BYTES) * _ALIGN_BYTES


# --- operators --------------------------------------------------------------------------------------------------------

# What oneDNN calls the two forms of gelu; of the others word and name are the same.
_FORMS = {"gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh")}


def operator(node: Node) -> Callable[..., torch.Tensor]:
    """Return the callable of a node of a graph lowered for oneDNN: of input, packed weight, and what is added, if anything."""
    _, _, activation, numbers, added = node.args
    assert isinstance(activation, Enum)
    assert isinstance(numbers, tuple)
    if node.op == TURNED_LINEAR:
        return _turned_linear
    adding, plain = (_adding_conv2d, _conv2d) if node.op == CONV2D else (_adding_linear, _blocked_linear)
    if added is not None:
        return functools.partial(adding, activation.word)
    word, algorithm = _FORMS.get(activation.word, (activation.word, ""))
    return functools.partial(plain, (word, list(numbers), algorithm))


_NOTHING: tuple[Any, ...] = ("none", [], "")


def _conv2d(finish: tuple[Any, ...], source: torch.Tensor, held: Packed) -> torch.Tensor:
    _check(source)
    if source.dim() == 3:
        return _conv2d(finish, source[None], held)[0]
    return _op("_convolution_pointwise", "default")(source, *held.rest, *finish)


def _adding_conv2d(activation: str, source: torch.Tensor, held: Packed, added: torch.Tensor) -> torch.Tensor:
    """Convolve, add, and apply ``activation``, relu or none. oneDNN adds tensors of one shape only, torch any that fit."""
    if source.dim() == 4 and added.dtype is torch.float32 and added.shape == _conv2d_shape(source, held):
        _check(source)
        finish: tuple[Any, ...] = ("add", 1.0, None if activation == "none" else activation, [], None)
        return _op("_convolution_pointwise", "binary")(source, added, *held.rest, *finish)
    total = _conv2d(_NOTHING, source, held) + added
    return total if activation == "none" else torch.relu(total)


def _conv2d_shape(source: torch.Tensor, held: Packed) -> tuple[int, ...]:
    (channels, _, *kernel), (_, _, padding, stride, dilation, _) = held.shape, held.rest
    sizes = (
        (size + 2 * beside - apart * (wide - 1) - 1) // step + 1
        for size, beside, apart, wide, step in zip(source.shape[2:], padding, dilation, kernel, stride, strict=True)
    )
    return (source.shape[0], channels, *sizes)


def _blocked_linear(finish: tuple[Any, ...], source: torch.Tensor, held: Packed) -> torch.Tensor:
    _check(source)
    return _op("_linear_pointwise", "default")(source, *held.rest, *finish)


def _adding_linear(activation: str, source: torch.Tensor, held: Packed, added: torch.Tensor) -> torch.Tensor:
    assert activation == "none"
    if added.dtype is torch.float32 and added.shape == (*source.shape[:-1], held.shape[0]):
        _check(source)
        weight, bias = held.rest
        return _op("_linear_pointwise", "binary")(source, added, weight, bias, "add")
    return _blocked_linear(_NOTHING, source, held) + added


def _turned_linear(source: torch.Tensor, held: Packed) -> torch.Tensor:
    return _linear(source, *held.rest)


def _check(source: torch.Tensor) -> None:
    """Refuse what torch's own operators refuse and oneDNN's would take, as numbers of another kind."""
    if source.dtype is not torch.float32:
        raise TypeError(f"packed weights take float32, not {source.dtype}")


@functools.cache
def _op(name: str, overload: str) -> Callable[..., torch.Tensor]:
    return getattr(getattr(torch.ops.mkldnn, name), overload)._op  # type: ignore[no-any-return]
