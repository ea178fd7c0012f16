"""Quotients of integers that a processor cannot divide: the smallest one by -1, which ends the process instead of raising.

torch looks for it where quotients are rounded down, and not where they are cut off (``div`` with ``trunc``). Here that is what
it is elsewhere: the smallest integer again. Nor where it counts the steps of a range (``arange``): one that begins or ends as far
out as that is refused. Must not import anything above layer 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

_QUOTIENTS: Final = frozenset({"aten.div.Tensor_mode", "aten.div.Scalar_mode"})
_RANGES: Final = frozenset(f"aten.arange.{overload}" for overload in ("default", "start", "start_step"))
OPERATORS: Final = _QUOTIENTS | _RANGES
# The difference of two that are smaller is larger than the smallest integer.
_FAR: Final = 1 << 62


def safe(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of ``OPERATORS`` so that it divides no smallest integer by -1. Raises what torch raises, and OverflowError."""
    return _cut_off(function) if op in _QUOTIENTS else _within_reach(function)


def _within_reach(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        for argument in (*arguments, *named.values()):
            if isinstance(argument, int) and not -_FAR < argument < _FAR:
                raise OverflowError(f"{argument} is too far out for a range")
        return function(*arguments, **named)

    return call


def _cut_off(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(dividend: Any, divisor: Any, *, rounding_mode: str | None = None) -> Any:
        dtype = torch.result_type(dividend, divisor)
        if rounding_mode != "trunc" or dtype.is_floating_point or dtype is torch.bool:
            return function(dividend, divisor, rounding_mode=rounding_mode)
        # As it is divided by: the largest integer of 64 bits is -1 in 32.
        by = torch.as_tensor(divisor).to(dtype)
        is_turned = by == -1
        quotient = torch.div(torch.as_tensor(dividend), by.masked_fill(is_turned, 1), rounding_mode=rounding_mode)
        return torch.where(is_turned, -quotient, quotient)

    return call
