"""Independence: whether the rows of a batch touch each other, found by running the same ones beside different neighbours.

Three rows are fixed, beside six different neighbours: random numbers, not-a-number, infinity, 1e30, zeros, and in reverse order.
Rows are independent when what belongs to the three never differs by a bit, whatever is beside them, and agrees with what they
give alone. Zeros only, or random numbers only, would pass models whose rows do touch each other: a global maximum, a dynamic
quantisation. The same runs show where the rows lie in all that passes from stage to stage, and whether an input that is masked
may be padded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from sidecar.bundle import Bundle
from sidecar.ports import Device
from sidecar.stages import Key, Staged

# Of four rows, the second is the neighbour that changes.
ROWS: Final = 4
_FIXED: Final = (0, 2, 3)
_FILLINGS: Final = ("random", "not-a-number", "infinity", "1e30", "zeros")
# Sizes to try for axes that differ between calls; some models refuse small ones.
# Of eight tokens a product takes as long in any form.
SIZES: Final = (32, 64, 224)
# How much longer a padded input is.
_LONGER: Final = 5


class _Dependent(Exception):
    """Rows touch each other, or it cannot be told where they lie."""


class Rows:
    """What a model computes for one row, and for four rows with six fillings, as far as it was run.

    ``runs`` has the values by filling; whoever runs a stage adds what it gives. ``dependence`` says why the model's rows are not
    independent, empty as long as they are; then "alone" is the only run. ``padded`` is the symbol along which inputs may be
    padded, empty where there is none.
    """

    def __init__(self, device: Device, bundle: Bundle, staged: Staged, size: int) -> None:
        """Make the inputs; axes that may vary have ``size`` if they may."""
        self._device = device
        self._bundle = bundle
        self.dependence = _fixed_size(bundle)
        self.padded = ""
        self.runs: dict[str, dict[Key, Any]] = {}
        inputs = self._inputs(tried_sizes(bundle, size))
        for filling in inputs[0] if inputs else ():
            arrays = [filled[filling] for filled in inputs]
            views = [device.view(array.reshape(-1).view(np.uint8).data, array.dtype.name, array.shape) for array in arrays]
            self.runs[filling] = dict(zip(staged.inputs, views, strict=True))
        if not self.runs:
            self.dependence, self.runs = "it has no inputs", {"alone": {}}

    def _inputs(self, sizes: Mapping[str, int]) -> list[dict[str, NDArray[Any]]]:
        """Return each input by filling."""
        random = np.random.default_rng(0)
        bundle, made = self._bundle, list[dict[str, NDArray[Any]]]()
        for spec in bundle.graph.inputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape]
            dtype, bounds = np.dtype(spec.dtype), (spec.minimum, spec.maximum)
            if self.dependence:
                shape = [1 if axis == bundle.batch else size for axis, size in zip(spec.shape, shape, strict=True)]
                made.append({"alone": _values("random", dtype, shape, bounds, random)})
                continue
            shape[0] = ROWS
            base = _values("random", dtype, shape, bounds, random)
            filled = {"random": base}
            for filling in _FILLINGS[1:]:
                filled[filling] = base.copy()
                filled[filling][1] = _values(filling, dtype, shape[1:], bounds, random)
            filled["reverse order"] = np.ascontiguousarray(base[::-1])
            filled["alone"] = base[:1].copy()
            made.append(filled)
        symbol = masked(bundle)
        most = next((each.maximum for each in bundle.graph.symbols if each.name == symbol), 0)
        if symbol and not self.dependence and sizes[symbol] + _LONGER <= most:
            self.padded = symbol
            for spec, filled in zip(bundle.graph.inputs, made, strict=True):
                widths = [(0, _LONGER if axis == symbol else 0) for axis in spec.shape]
                filled["padded"] = np.pad(filled["alone"], widths)
        return made

    def layout(self, keys: Sequence[Key], where: str) -> list[int | None]:
        """Return in which axis the rows lie in each of these values; an empty list where rows are not independent."""
        if self.dependence:
            return []
        try:
            return [self._axis(key, where) for key in keys]
        except _Dependent as found:
            self.dependence, self.padded, self.runs = str(found), "", {"alone": self.runs["alone"]}
            return []

    def let_go(self, alive: Collection[Key]) -> None:
        """Forget all values but these."""
        for values in self.runs.values():
            for key in values.keys() - alive:
                del values[key]

    def survives_padding(self, results: Sequence[Key]) -> bool:
        """Say whether a longer input, masked, gives the same results, cut to the length of the shorter."""
        for key, spec in zip(results, self._bundle.graph.outputs, strict=True):
            short, long = self.runs["alone"][key], self.runs["padded"][key]
            if self.padded in spec.shape:
                axis = spec.shape.index(self.padded)
                long = self._device.part(long, axis, 0, short.shape[axis])
            if not self._device.agree(long, short, self._bundle.tolerance):
                return False
        return True

    def _axis(self, key: Key, where: str) -> int | None:
        alone, together = self.runs["alone"][key], self.runs["random"][key]
        one, four = tuple(alone.shape), tuple(together.shape)
        axes = [axis for axis, (small, large) in enumerate(zip(one, four, strict=False)) if small != large]
        if len(one) != len(four) or len(axes) > 1 or (axes and four[axes[0]] != ROWS * one[axes[0]]):
            raise _Dependent(f"{where} gives {list(one)} for one row and {list(four)} for four")
        axis = axes[0] if axes else None
        agree, tolerance = self._device.agree, self._bundle.tolerance
        for filling in _FILLINGS:
            for row in _FIXED if axes else (0,):
                if not agree(self._row(self.runs[filling][key], axis, row), self._row(together, axis, row), None):
                    raise _Dependent(f"{where} gives something else for a row beside {filling}")
        for row in _FIXED if axes else (0,):
            back = self._row(self.runs["reverse order"][key], axis, ROWS - 1 - row)
            if not agree(back, self._row(together, axis, row), tolerance):
                raise _Dependent(f"{where} gives something else for a row at another place")
        if not agree(alone, self._row(together, axis, 0), tolerance if axes else None):
            raise _Dependent(f"{where} gives something else for a row alone")
        return axis

    def _row(self, tensor: Any, axis: int | None, row: int) -> Any:
        if axis is None:
            return tensor
        per_row = tensor.shape[axis] // ROWS
        return self._device.part(tensor, axis, row * per_row, per_row)


def masked(bundle: Bundle) -> str:
    """Return the symbol along which a model declares a mask, empty when there is none.

    A mask is an input whose name ends in ``mask``, of a size [batch, symbol], of truth values or of integers from 0 to 1. That it
    masks is for the trial to see.
    """
    for spec in bundle.graph.inputs:
        is_switch = spec.dtype == "bool" or (spec.minimum, spec.maximum) == (0, 1)
        if spec.name.endswith("mask") and is_switch and len(spec.shape) == 2 and spec.shape[0] == bundle.batch:
            symbol = spec.shape[1]
            others = [other for other in bundle.graph.inputs if symbol in other.shape]
            # Zero must be a value that all of them take.
            if isinstance(symbol, str) and all((other.minimum or 0) <= 0 for other in others):
                return symbol
    return ""


def tried_sizes(bundle: Bundle, size: int = SIZES[0]) -> dict[str, int]:
    """Return the sizes of the axes that may vary: all ``size``, the first that is tried, as far as they may be.

    One that may be padded is short enough for it.
    """
    longer = masked(bundle)
    return {
        symbol.name: max(min(size, symbol.maximum - (_LONGER if symbol.name == longer else 0)), symbol.minimum)
        for symbol in bundle.graph.symbols
    }


def _sizes_of_a_row(bundle: Bundle, size: int) -> dict[str, int]:
    return tried_sizes(bundle, size) | ({bundle.batch: 1} if bundle.batch else {})


def input_bytes(bundle: Bundle, size: int) -> int:
    """Return the bytes of one row of a model's inputs, where axes that may vary have ``size`` if they may."""
    sizes = _sizes_of_a_row(bundle, size)
    return sum(
        math.prod(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape) * np.dtype(spec.dtype).itemsize
        for spec in bundle.graph.inputs
    )


def _fixed_size(bundle: Bundle) -> str:
    """Return why a model cannot be run on several rows, empty when it can."""
    if bundle.batch is None:
        return "its batch size is fixed"
    most = next(symbol.maximum for symbol in bundle.graph.symbols if symbol.name == bundle.batch)
    return f"it takes at most {most} rows" if most < ROWS else ""


def _values(
    filling: str,
    dtype: np.dtype[Any],
    shape: Sequence[int],
    bounds: tuple[int | None, int | None],
    random: np.random.Generator,
) -> NDArray[Any]:
    """Return an array filled in one of the six ways; of integers, with values that the model takes."""
    if dtype.kind == "f":
        if filling == "random":
            return random.standard_normal(shape).astype(dtype)
        number = {"not-a-number": np.nan, "infinity": np.inf, "1e30": 1e30, "zeros": 0.0}[filling]
        with np.errstate(over="ignore"):  # 1e30 is infinity in half precision
            return np.full(shape, number).astype(dtype)
    low, high = bounds[0] or 0, 1 if bounds[1] is None else bounds[1]
    if dtype.kind == "b" or high < low:
        low, high = 0, 1
    if filling == "random":
        return random.integers(low, high, shape, np.int64, endpoint=True).astype(dtype)
    number = {"not-a-number": low, "infinity": high, "1e30": (low + high) // 2, "zeros": max(low, 0)}[filling]
    return np.full(shape, number).astype(dtype)
