"""What callers pass in, made what the wire carries, or refused: arrays, sizes of axes, call ids, traceparents. Pure."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trunkline import protocol
from trunkline.errors import SignatureMismatch, UnsupportedTensor, ValueOutOfBounds
from trunkline.protocol import TensorSpec
from trunkline.signature import Signature

Array = NDArray[Any]

# numpy takes microseconds to spell the name of a dtype.
_DTYPE_NAMES = {np.dtype(name): name for name in protocol.ITEM_BYTES}


def by_name(signature: Signature, ordered: Sequence[ArrayLike], named: Mapping[str, ArrayLike]) -> dict[str, ArrayLike]:
    """Return all inputs by name, those given in order named as the model has them."""
    specs = signature.inputs
    if len(ordered) > len(specs):
        raise SignatureMismatch(f"{signature.model} takes {len(specs)} inputs, got {len(ordered)}")
    inputs = dict(named)
    for spec, array in zip(specs, ordered, strict=False):
        if spec.name in inputs:
            raise SignatureMismatch(f"{signature.model} got {spec.name} twice, in order and by name")
        inputs[spec.name] = array
    return inputs


def size_of(model_name: str, axis: str, size: Any) -> int:
    """Return the size of an axis as Python's own integer; numpy's will do, a truth value is none."""
    if isinstance(size, (bool, np.bool_)) or not hasattr(size, "__index__"):
        raise SignatureMismatch(f"{model_name} takes {axis} as an integer, got {type(size).__name__}")
    return operator.index(size)


def dtype_name(array: Array) -> str:
    """Return numpy's name of an array's dtype."""
    return _DTYPE_NAMES.get(array.dtype) or str(array.dtype)


def checked(model_name: str, spec: TensorSpec, array: Array) -> Array:
    """Return ``array`` as the dtype of ``spec``. Values may be rounded; they are never wrapped, cut or made infinite."""
    if dtype_name(array) == spec.dtype:
        return array
    wanted = np.dtype(spec.dtype)
    if array.dtype.hasobject or array.dtype.kind not in "biuf":
        raise UnsupportedTensor(f"{model_name} takes {spec.name} as {spec.dtype}; {array.dtype} cannot be converted")
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        lost = f" ({int(np.isnan(array).sum())} of its values are NaN)" if array.dtype.kind == "f" else ""
        raise SignatureMismatch(
            f"{model_name} takes {spec.name} as {spec.dtype}, got {array.dtype}{lost}; convert it in the handler",
            expected=spec.dtype,
            got=str(array.dtype),
        )
    if not array.size or np.can_cast(array.dtype, wanted, "safe"):
        return array.astype(wanted)
    if wanted.kind in "iu":
        limits = np.iinfo(wanted)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise ValueOutOfBounds(
                f"{model_name} takes {spec.name} as {spec.dtype}; its values reach from {low} to {high}",
                minimum=low,
                maximum=high,
            )
        return array.astype(wanted)
    with np.errstate(over="ignore"):
        converted = array.astype(wanted)
    if wanted.kind == "f" and (infinite := int(np.isinf(converted).sum() - np.isinf(array).sum())):
        raise ValueOutOfBounds(
            f"{model_name} takes {spec.name} as {spec.dtype}, whose largest value is {np.finfo(wanted).max}; {infinite} of its "
            "values are beyond that",
            count=infinite,
        )
    return converted


def sendable(text: str) -> str:
    """Return a call id as it can be sent: it is for the log only, so what cannot be encoded may be lost."""
    text = str(text)
    return (text if text.isascii() else text.encode("utf-8", "replace").decode())[: protocol.MAX_NAME]


def traced(header: str) -> str:
    """Return a W3C traceparent as it can be sent; empty for what is none: no call fails for the sake of its trace."""
    text = header.strip()
    return text if protocol.TRACEPARENT.fullmatch(text) else ""
