"""Quotients of integers that a processor cannot divide: the smallest one by -1, which ends the process instead of raising.

torch looks for it where quotients are rounded down, and not where they are cut off (``div`` with ``trunc``). Here that is what
it is elsewhere: the smallest integer again. Must not import anything above layer 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch

OPERATORS: Final = frozenset({"aten.div.Tensor_mode", "aten.div.Scalar_mode"})


def safe(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return one of ``OPERATORS`` so that it divides nothing by -1 that is an integer."""

    def call(dividend: Any, divisor: Any, *, rounding_mode: str | None = None) -> Any:
        if rounding_mode != "trunc" or _is_float(dividend) or _is_float(divisor):
            return function(dividend, divisor, rounding_mode=rounding_mode)
        if not isinstance(divisor, torch.Tensor):
            return torch.neg(dividend) if divisor == -1 else function(dividend, divisor, rounding_mode=rounding_mode)
        is_turned = divisor == -1
        quotient = function(dividend, divisor.masked_fill(is_turned, 1), rounding_mode=rounding_mode)
        return torch.where(is_turned, -quotient, quotient)

    return call


def _is_float(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, float)
