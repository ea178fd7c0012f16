"""Blocked weights: weights in blocks of channels, as ONNX Runtime's own convolutions read them.

Such a weight is a plain tensor in another order: of a block of output channels, for each block of input channels and each place
of the kernel, what every pair of channels has in common lies side by side. Channels that are missing to a whole block are zeros.
It is given to a session with each run, by reference, so one session serves every model of its structure. A linear layer is a
convolution of one place.

The operators here compute the same with torch, at the price of putting the weight in order each time: for what a session does not
take. CPU only; callable from any thread.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch.nn import functional as F

from sidecar.ir import Enum, Node
from sidecar.lowering import BLOCKED_CONV2D, Recipe
from sidecar.packed import folded_conv2d, padded_bytes

_FLOAT_BYTES: Final = 4


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a weight lies in blocks of ``block`` channels.

    ``shape`` is [out, in each group, height, width], the last two 1 where it is of a linear layer. ``padding`` has rows and
    columns, as many on either side.
    """

    shape: tuple[int, int, int, int]
    block: int
    groups: int = 1
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    is_linear: bool = False

    @property
    def reads_blocks(self) -> bool:
        """Return whether the input is in blocks, too; pictures of a few channels are read as they are."""
        return self.groups > 1 or self.shape[1] >= self.block

    @property
    def is_depthwise(self) -> bool:
        return self.groups > 1 and self.shape[1] == 1

    @property
    def has_inner_blocks(self) -> bool:
        """Return whether the weight's own input channels are in blocks, too; within each channel there is but one."""
        return self.reads_blocks and not self.is_depthwise

    @property
    def padded_shape(self) -> tuple[int, int, int, int]:
        """Return the shape with channels up to whole blocks: what a session is told."""
        outside, inside, *kernel = self.shape
        if self.has_inner_blocks:
            inside = self._up(inside)
        return (self._up(outside), inside, kernel[0], kernel[1])

    @property
    def padded_groups(self) -> int:
        return self.padded_shape[0] if self.is_depthwise else self.groups

    @property
    def weight_count(self) -> int:
        """Return how many numbers the weight has in blocks."""
        outside, inside, height, width = self.padded_shape
        return outside * inside * height * width

    @property
    def size_bytes(self) -> int:
        """Return the bytes of the weight, and of the bias after it on the next line of the processor's cache."""
        return self.bias_offset + self.padded_shape[0] * _FLOAT_BYTES

    @property
    def bias_offset(self) -> int:
        return padded_bytes(self.weight_count * _FLOAT_BYTES)

    def _up(self, channels: int) -> int:
        return -(-channels // self.block) * self.block


@dataclasses.dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class Blocked:
    """The handle of one weight in blocks, and of its bias, zeros where there was none: both contiguous, of ``padded_shape``."""

    layout: Layout
    weight: torch.Tensor
    bias: torch.Tensor

    @property
    def size_bytes(self) -> int:
        return self.layout.size_bytes

    def dense(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weight and bias as torch has them; the weight is a copy."""
        layout = self.layout
        outside, inside, height, width = layout.padded_shape
        block = layout.block
        if layout.has_inner_blocks:
            parts = self.weight.view(outside // block, inside // block, height, width, block, block)
            whole = parts.permute(0, 5, 1, 4, 2, 3)
        else:
            whole = self.weight.view(outside // block, inside, height, width, block).permute(0, 4, 1, 2, 3)
        whole = whole.reshape(layout.padded_shape)[: layout.shape[0], : layout.shape[1]].contiguous()
        return whole, self.bias[: layout.shape[0]]


def layout_of(recipe: Recipe) -> Layout:
    """Return the layout that a recipe with a ``block`` asks for."""
    options: dict[str, Any] = dict(recipe.options)
    shape = recipe.sources[recipe.roles.index("weight")].shape
    if recipe.kind == "linear":
        return Layout((shape[0], shape[1], 1, 1), options["block"], is_linear=True)
    outside, inside, height, width = shape
    if "zeros" in options:
        left, right, above, below = options["zeros"]
        height, width = height + above + below, width + left + right
    steps = (options["stride"], options["padding"], options["dilation"])
    return Layout((outside, inside, height, width), options["block"], options["groups"], *steps)


def pack_blocked(recipe: Recipe, sources: Sequence[torch.Tensor]) -> Blocked:
    """Return the weight made of ``sources``, float32 on the CPU in the recipe's order. It shares no memory with them.

    Raises RuntimeError when there is no memory.
    """
    layout = layout_of(recipe)
    parts = dict(zip(recipe.roles, sources, strict=True))
    with torch.inference_mode():
        if layout.is_linear:
            weight, bias = parts["weight"][:, :, None, None], parts.get("bias")
        else:
            weight, bias = folded_conv2d(parts, dict(recipe.options))
        outside, inside, height, width = layout.padded_shape
        block = layout.block
        padded = F.pad(weight, (0, 0, 0, 0, 0, inside - weight.shape[1], 0, outside - weight.shape[0]))
        if layout.has_inner_blocks:
            parted = padded.view(outside // block, block, inside // block, block, height, width).permute(0, 2, 4, 5, 3, 1)
        else:
            parted = padded.view(outside // block, block, inside, height, width).permute(0, 2, 3, 4, 1)
        # A permuted view that is contiguous as it is would still be of the source.
        blocked = torch.empty(layout.padded_shape)
        blocked.view(parted.shape).copy_(parted)
        held = torch.zeros(outside)
        if bias is not None:
            held[: bias.shape[0]] = bias
        return Blocked(layout, blocked, held)


def over(layout: Layout, payload: memoryview) -> Blocked:
    """Return the weight whose bytes ``payload`` are, without a copy. Raises ValueError where their number is another."""
    if payload.nbytes != layout.size_bytes:
        raise ValueError(f"the weight in blocks has {layout.size_bytes} bytes, {payload.nbytes} were read; make it anew")
    weight = torch.frombuffer(payload, dtype=torch.float32, count=layout.weight_count).view(layout.padded_shape)
    bias = torch.frombuffer(payload, dtype=torch.float32, offset=layout.bias_offset)
    return Blocked(layout, weight, bias)


# --- operators --------------------------------------------------------------------------------------------------------

_ACTIVATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "none": lambda x: x,
    "relu": torch.relu,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "swish": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def operator(node: Node) -> Callable[..., torch.Tensor]:
    """Return the callable of a node of a lowered graph: of the input, the weight, and what is added, if anything is."""
    _, _, activation, numbers, _ = node.args
    assert isinstance(activation, Enum)
    assert isinstance(numbers, tuple)
    compute = _conv2d if node.op == BLOCKED_CONV2D else _linear
    activate = _ACTIVATIONS[activation.word]

    def finish(total: torch.Tensor) -> torch.Tensor:
        return activate(total, *numbers)

    return functools.partial(_finished, compute, finish)


def _finished(
    compute: Callable[..., torch.Tensor],
    finish: Callable[[torch.Tensor], torch.Tensor],
    source: torch.Tensor,
    held: Blocked,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    total = compute(source, held)
    return finish(total if added is None else total + added)


def _conv2d(source: torch.Tensor, held: Blocked) -> torch.Tensor:
    layout = held.layout
    return F.conv2d(source, *held.dense(), layout.stride, layout.padding, layout.dilation, layout.groups)


def _linear(source: torch.Tensor, held: Blocked) -> torch.Tensor:
    weight, bias = held.dense()
    return F.linear(source, weight[:, :, 0, 0], bias)
