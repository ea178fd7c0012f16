"""Trials: what must be known of a model before its requests may share a batch, found by trying it out.

A model is tried in a thread of its own, with its own weights, one stage in memory at a time. It is run on three fixed rows beside
six different neighbours: random numbers, not-a-number, infinity, 1e30, zeros, and in reverse order. Rows are *independent* when
what belongs to the three never differs by a bit, whatever is beside them, and agrees with what they give alone. Zeros only, or
random numbers only, would pass models whose rows do touch each other: a global maximum, a dynamic quantisation.

The same runs show where the rows lie in every tensor that passes from stage to stage. Owned by its thread; the outcome is posted.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from trunkline.errors import TrunklineError

from sidecar.bundle import Bundle, Weight
from sidecar.errors import BundleError, StoreError
from sidecar.merkle import skeleton_id
from sidecar.ports import Device, Source
from sidecar.stages import Key, Stage, Staged
from sidecar.verdicts import Verdicts
from sidecar.wavefront import INPUT, Layout, Layouts

log = logging.getLogger("trunkline.trials")

# Of four rows, the second is the neighbour that changes.
_ROWS: Final = 4
_FIXED: Final = (0, 2, 3)
_FILLINGS: Final = ("random", "not-a-number", "infinity", "1e30", "zeros")
# Sizes to try for axes that differ between calls; some models refuse small ones.
_SIZES: Final = (8, 64, 224)
# Nothing waits for a trial: it must not take the processor from those who are waited for.
_NICE: Final = 10


@dataclass(frozen=True)
class Verdict:
    """Whether a model's rows are independent; if so, where they lie in every tensor, and if not, why."""

    layouts: Layouts | None
    reason: str = ""


class Trials:
    """Tries models, one after the other. ``run`` is the thread's body; ``ask`` and ``stop`` may be called anywhere."""

    def __init__(self, device: Device, source: Source, verdicts: Verdicts, post: Callable[[Callable[[], None]], None]) -> None:
        self._device = device
        self._source = source
        self._verdicts = verdicts
        self._post = post
        self._jobs: queue.SimpleQueue[tuple[Bundle, Staged, Callable[[Verdict], None]] | None] = queue.SimpleQueue()

    def ask(self, bundle: Bundle, staged: Staged, told: Callable[[Verdict], None]) -> None:
        """Try a model; ``told`` is run in the engine thread with the verdict, unless the trial could not be held."""
        self._jobs.put((bundle, staged, told))

    def stop(self) -> None:
        self._jobs.put(None)

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while (job := self._jobs.get()) is not None:
            bundle, staged, told = job
            try:
                verdict = self._verdict(bundle, staged)
            except (TrunklineError, OSError) as error:
                # A damaged weight, say. Requests will be told; the trial is held when the model is deployed again.
                log.warning("%s could not be tried (%s); its requests are not batched", bundle.name, error)
                continue
            if verdict.reason:
                log.info("%s is served unbatched: %s", bundle.name, verdict.reason)
            self._post(lambda told=told, verdict=verdict: told(verdict))  # type: ignore[misc]

    def _verdict(self, bundle: Bundle, staged: Staged) -> Verdict:
        if bundle.batch is None:
            return Verdict(None, "its batch size is fixed")
        most = next(symbol.maximum for symbol in bundle.graph.symbols if symbol.name == bundle.batch)
        if most < _ROWS:
            return Verdict(None, f"it takes at most {most} rows")
        structure = skeleton_id(bundle.graph)
        known = self._verdicts.find("rows", structure)
        if known is None or not _is_whole(known, staged):
            self._verdicts.begin("rows", structure)
            plain: dict[str, Any] | None = None
            try:
                plain = self._try(bundle, staged)
            finally:
                self._verdicts.end("rows", structure, plain)
            known = plain
        if known.get("died"):
            return Verdict(None, "the engine ended when it was tried")
        if known["layouts"] is None:
            return Verdict(None, str(known["reason"]))
        layouts: dict[Key, Layout | None] = dict.fromkeys(staged.inputs, INPUT)
        for stage, found in zip(staged.stages, known["layouts"], strict=True):
            for key, layout in zip(stage.gives, found, strict=True):
                layouts[key] = None if layout is None else Layout(*layout)
        return Verdict(layouts)

    def _try(self, bundle: Bundle, staged: Staged) -> dict[str, Any]:
        failed = ""
        for size in _SIZES:
            try:
                return {"layouts": _Trial(self._device, self._source, bundle, size).run(staged)}
            except _Dependent as found:
                return {"layouts": None, "reason": str(found)}
            except (BundleError, StoreError):
                raise
            except TrunklineError as error:
                failed = failed or error.message
        return {"layouts": None, "reason": f"it could not be run on four rows: {failed}"}


class _Dependent(Exception):
    """Rows touch each other, or it cannot be told where they lie."""


class _Trial:
    """One model on one row, and on four rows with six fillings."""

    def __init__(self, device: Device, source: Source, bundle: Bundle, size: int) -> None:
        self._device = device
        self._source = source
        self._tolerance = bundle.tolerance
        random = np.random.default_rng(0)
        sizes = {symbol.name: min(max(size, symbol.minimum), symbol.maximum) for symbol in bundle.graph.symbols}
        self._inputs: list[dict[str, NDArray[Any]]] = []
        for spec in bundle.graph.inputs:
            shape = (_ROWS, *(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape[1:]))
            base = _values("random", np.dtype(spec.dtype), shape, spec.minimum, spec.maximum, random)
            filled = {"random": base}
            for filling in _FILLINGS[1:]:
                filled[filling] = base.copy()
                filled[filling][1] = _values(filling, base.dtype, shape[1:], spec.minimum, spec.maximum, random)
            filled["reverse order"] = np.ascontiguousarray(base[::-1])
            filled["alone"] = base[:1].copy()
            self._inputs.append(filled)

    def run(self, staged: Staged) -> list[list[Layout | None]]:
        """Return the layout of everything each stage gives. Raises _Dependent, and what a device raises."""
        runs: dict[str, dict[Key, Any]] = {}
        for filling in self._inputs[0] if self._inputs else ():
            arrays = [filled[filling] for filled in self._inputs]
            views = [self._device.view(array.reshape(-1).view(np.uint8).data, array.dtype.name, array.shape) for array in arrays]
            runs[filling] = dict(zip(staged.inputs, views, strict=True))
        if not runs:
            raise _Dependent("it has no inputs")
        found: list[list[Layout | None]] = []
        for number, stage in enumerate(staged.stages):
            weights = self._weights(stage)
            program = self._device.prepare(stage.graph)
            for values in runs.values():
                given = self._device.run(program, weights, [values[key] for key in stage.takes])
                values.update(zip(stage.gives, given, strict=True))
            del weights
            found.append([self._layout(runs, key, f"stage {number} of {len(staged.stages)}") for key in stage.gives])
            for filling, values in runs.items():
                runs[filling] = {key: values[key] for key in stage.alive}
        return found

    def _weights(self, stage: Stage) -> list[Any]:
        return [self._device.new_weight(weight, self._reader(weight)) for weight in stage.graph.weights]

    def _reader(self, weight: Weight) -> Callable[[memoryview], None]:
        return lambda target: self._source.read_blob(weight.digest, target, weight.crc32)

    def _layout(self, runs: Mapping[str, Mapping[Key, Any]], key: Key, where: str) -> Layout | None:
        alone, together = runs["alone"][key], runs["random"][key]
        one, four = tuple(alone.shape), tuple(together.shape)
        axes = [axis for axis, (small, large) in enumerate(zip(one, four, strict=False)) if small != large]
        if len(one) != len(four) or len(axes) > 1 or (axes and four[axes[0]] != _ROWS * one[axes[0]]):
            raise _Dependent(f"{where} gives {list(one)} for one row and {list(four)} for four")
        layout = Layout(axes[0], one[axes[0]]) if axes else None
        agree = self._device.agree
        for filling in _FILLINGS:
            for row in _FIXED if layout else (0,):
                if not agree(self._row(runs[filling][key], layout, row), self._row(together, layout, row), None):
                    raise _Dependent(f"{where} gives something else for a row beside {filling}")
        for row in _FIXED if layout else (0,):
            back = self._row(runs["reverse order"][key], layout, _ROWS - 1 - row)
            if not agree(back, self._row(together, layout, row), self._tolerance):
                raise _Dependent(f"{where} gives something else for a row at another place")
        if not agree(alone, self._row(together, layout, 0), self._tolerance if layout else None):
            raise _Dependent(f"{where} gives something else for a row alone")
        return layout

    def _row(self, tensor: Any, layout: Layout | None, row: int) -> Any:
        if layout is None:
            return tensor
        return self._device.part(tensor, layout.axis, row * layout.per_row, layout.per_row)


def _values(
    filling: str,
    dtype: np.dtype[Any],
    shape: Sequence[int],
    minimum: int | None,
    maximum: int | None,
    random: np.random.Generator,
) -> NDArray[Any]:
    """Return an array filled in one of the six ways; of integers, with values that the model takes."""
    if dtype.kind == "f":
        if filling == "random":
            return random.standard_normal(shape).astype(dtype)
        number = {"not-a-number": np.nan, "infinity": np.inf, "1e30": 1e30, "zeros": 0.0}[filling]
        with np.errstate(over="ignore"):  # 1e30 is infinity in half precision
            return np.full(shape, number).astype(dtype)
    low, high = minimum or 0, 1 if maximum is None else maximum
    if dtype.kind == "b" or high < low:
        low, high = 0, 1
    if filling == "random":
        return random.integers(low, high, shape, np.int64, endpoint=True).astype(dtype)
    number = {"not-a-number": low, "infinity": high, "1e30": (low + high) // 2, "zeros": max(low, 0)}[filling]
    return np.full(shape, number).astype(dtype)


def _is_whole(plain: Mapping[str, Any], staged: Staged) -> bool:
    """Say whether what was read from disk is a verdict on this model."""
    if plain.get("died") is True:
        return True
    layouts = plain.get("layouts", False)
    if layouts is None:
        return isinstance(plain.get("reason"), str)

    def fits(found: object, stage: Stage) -> bool:
        return isinstance(found, list) and len(found) == len(stage.gives) and all(map(_is_layout, found))

    return isinstance(layouts, list) and len(layouts) == len(staged.stages) and all(map(fits, layouts, staged.stages))


def _is_layout(found: object) -> bool:
    return found is None or (
        isinstance(found, list) and len(found) == 2 and all(isinstance(number, int) and 0 <= number < 2**31 for number in found)
    )
