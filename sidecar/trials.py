"""Trials: what must be known of a model before it is served as well as it can be, found by trying it out.

A model is tried in a thread of its own, with its own weights, one stage in memory at a time.

*Independence.* It is run on three fixed rows beside six different neighbours: random numbers, not-a-number, infinity, 1e30,
zeros, and in reverse order. Rows are independent when what belongs to the three never differs by a bit, whatever is beside
them, and agrees with what they give alone. Zeros only, or random numbers only, would pass models whose rows do touch each other:
a global maximum, a dynamic quantisation. The same runs show where the rows lie in all that passes from stage to stage.

*Form.* Where a stage can be lowered (``sidecar.lowering``), all forms of it take turns: as it is, packed for oneDNN, in blocks
for ONNX Runtime. The fastest of those that agree is taken; of a model with several stages, blocks also where they are a little
slower, since several stages in blocks can be run as one (``sidecar.stretches``). Stages of one structure have one form, whichever
models they are in, so that their weights are shared.

*Seconds.* What each stage takes for one row is noted on the way, so that how long a run takes can be told before the first.

Owned by its thread; the outcome is posted.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeGuard

import numpy as np
from numpy.typing import NDArray
from trunkline.errors import DeviceOutOfMemory, TrunklineError

from sidecar.bundle import Bundle
from sidecar.errors import BundleError, StoreError
from sidecar.ir import Graph
from sidecar.lowering import Form, Lowered, Recipe, lower
from sidecar.memory import packed_from_store, reader
from sidecar.merkle import skeleton_id
from sidecar.ports import Device, Source
from sidecar.stages import Key, Stage, Staged
from sidecar.stretches import JOINED
from sidecar.verdicts import Verdicts
from sidecar.wavefront import INPUT, Layouts

log = logging.getLogger("trunkline.trials")

# Of four rows, the second is the neighbour that changes.
_ROWS: Final = 4
_FIXED: Final = (0, 2, 3)
_FILLINGS: Final = ("random", "not-a-number", "infinity", "1e30", "zeros")
# Sizes to try for axes that differ between calls; some models refuse small ones.
# Of eight tokens a product takes as long in any form.
_SIZES: Final = (32, 64, 224)
# Nothing waits for a trial: it must not take the processor from those who are waited for.
_NICE: Final = 10
# A trial that the engine did not outlive may have had nothing to do with it, once.
_MOST_DEATHS: Final = 2
# Of one row. The trial holds some thirty of them, outside the budget.
_LARGEST_INPUT_BYTES: Final = 16 * 2**20
# How much longer a padded input is.
_LONGER: Final = 5
# How often each form of a stage is run, and what folding and another order of additions may change of its results.
_TURNS: Final = 9
_FORMS: Final = ("plain", "packed", "blocked")
_ROUNDING: Final = 1e-4


@dataclass(frozen=True)
class Verdict:
    """Whether a model's rows are independent; if so, where they lie in every tensor, and if not, why.

    ``forms`` has an entry per stage: its lowered graph, None where it runs as it is. ``padded`` names the symbol along which
    inputs may be padded with zeros; empty where there is none. ``run_s`` has the seconds that each stage takes in its form, for
    one row, or for the batch that a model is fixed to; empty where nobody has measured. Where the trial could not be ``held``,
    nothing is known.
    """

    layouts: Layouts | None
    reason: str = ""
    forms: tuple[Lowered | None, ...] = ()
    padded: str = ""
    run_s: tuple[float, ...] = ()
    held: bool = True


class Trials:
    """Tries models, one after the other. ``run`` is the thread's body; ``ask`` and ``stop`` may be called anywhere."""

    def __init__(
        self,
        device: Device,
        source: Source,
        verdicts: Verdicts,
        post: Callable[[Callable[[], None]], None],
        *,
        packing: bool = True,
        keep: Callable[[Graph, Mapping[str, Recipe], bool], None] | None = None,
    ) -> None:
        """``keep`` writes what a stage needs to disk, in the form it was found to be best in; in place of others, or not."""
        self._device = device
        self._source = source
        self._verdicts = verdicts
        self._post = post
        self._packing = packing and device.can_pack
        self._keep = keep
        # Of packed weights, by skeleton.
        self._sizes: dict[str, int] = {}
        self._trying = ""
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def ask(self, bundle: Bundle, staged: Staged, told: Callable[[Verdict], None]) -> None:
        """Try a model; ``told`` is run in the engine thread with the verdict, unless the trial could not be held."""
        self._jobs.put(lambda: self._tell(bundle, staged, told))

    def keep(self, bundle: Bundle, staged: Staged, forms: Sequence[Lowered | None], *, evicts: bool) -> None:
        """Have the weights of a model written to disk as they are needed in memory, where that is done."""
        if self._keep is not None:
            self._jobs.put(lambda: self._kept(bundle, staged, forms, evicts))

    def then(self, work: Callable[[], None]) -> None:
        """Do something in this thread, after all that was asked before."""
        self._jobs.put(work)

    def stop(self) -> None:
        """End the thread after the trial that it is at. A process that ends before that has not died of it."""
        if trying := self._trying:
            self._verdicts.end("rows", trying, None)
        self._jobs.put(None)

    def run(self) -> None:
        self._device.enter()
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while (job := self._jobs.get()) is not None:
            job()

    def _tell(self, bundle: Bundle, staged: Staged, told: Callable[[Verdict], None]) -> None:
        try:
            verdict = self._verdict(bundle, staged)
        except Exception as error:
            # A damaged weight, say. Requests will be told; the trial is held when the model is deployed again.
            log.warning("%s could not be tried; its requests are not batched", bundle.name, exc_info=error)
            verdict = Verdict(None, f"it could not be tried: {error}", held=False)
        if verdict.reason:
            log.info("%s is served unbatched: %s", bundle.name, verdict.reason)
        self._post(lambda: told(verdict))

    def _kept(self, bundle: Bundle, staged: Staged, forms: Sequence[Lowered | None], evicts: bool) -> None:
        assert self._keep is not None
        try:
            for stage, lowered in zip(staged.stages, forms or (None,) * len(staged.stages), strict=True):
                self._keep(*((stage.graph, {}) if lowered is None else (lowered.graph, lowered.recipes)), evicts)
        except Exception as error:
            log.warning("the weights of %s are not kept as they are needed in memory", bundle.name, exc_info=error)

    def known(self, bundle: Bundle, staged: Staged) -> Verdict | None:
        """Return the verdict on a model that was tried before, None where it must be. Any thread."""
        state = self._state(bundle, staged)
        return state if isinstance(state, Verdict) else state.verdict()

    def _verdict(self, bundle: Bundle, staged: Staged) -> Verdict:
        state = self._state(bundle, staged)
        if isinstance(state, Verdict):
            return state
        if (known := state.verdict()) is not None:
            return known
        self._verdicts.begin("rows", state.tried_as)
        self._trying = state.tried_as
        tried: dict[str, Any] | None = None
        try:
            tried, found = self._try(bundle, staged, {number: state.lowered[number] for number in state.unknown().values()})
            for number, form in found.items():
                state.forms[state.structures[number]] = form
                self._verdicts.end("form", state.structures[number], form)
        finally:
            self._verdicts.end("rows", state.tried_as, tried)
            self._trying = ""
        state.rows = tried
        return state.outcome(tried)

    def _state(self, bundle: Bundle, staged: Staged) -> _State | Verdict:
        """Return what is known of a model, or a verdict where no trial is to be held."""
        # Not by structure: where a weight chooses what is computed, siblings differ in whether rows touch each other.
        tried_as = f"{bundle.graph_digest} {bundle.batch}"
        if self._verdicts.unfinished("rows", tried_as) >= _MOST_DEATHS:
            return Verdict(None, "the engine ended when it was tried")
        if (input_bytes := _input_bytes(bundle, _SIZES[0])) > _LARGEST_INPUT_BYTES:
            return Verdict(None, f"its inputs take {input_bytes} bytes, at most {_LARGEST_INPUT_BYTES} are tried")
        lowered = [self._lowered(stage) for stage in staged.stages]
        structures = {number: skeleton_id(staged.stages[number].graph) for number, each in enumerate(lowered) if each}
        forms = {structure: self._verdicts.find("form", structure) for structure in structures.values()}
        return _State(bundle, staged, tried_as, self._verdicts.find("rows", tried_as), lowered, structures, forms)

    def _lowered(self, stage: Stage) -> dict[Form, Lowered]:
        """Return the forms that a stage might be run in, beside the one it has."""
        if not self._packing:
            return {}
        found: dict[Form, Lowered] = {}
        if (packed := lower(stage.graph, self._packed_bytes)).recipes:
            found["packed"] = packed
        block = self._device.block
        # What can be stacked with others of its structure gains more by that.
        if block and not self._device.stacks(packed.graph):
            blocked = lower(stage.graph, self._packed_bytes, block)
            if blocked.recipes and self._device.can_run_in_session(blocked.graph):
                found["blocked"] = blocked
        return found

    def _packed_bytes(self, recipe: Recipe) -> int:
        """Return the bytes of a packed weight. To find out, one is packed for oneDNN: that is done once on a machine."""
        if recipe.block is not None:
            return self._device.packed_bytes(recipe)
        size_bytes = self._sizes.get(recipe.skeleton)
        if size_bytes is None:
            known = (self._verdicts.find("size", recipe.skeleton) or {}).get("bytes")
            size_bytes = known if isinstance(known, int) and not isinstance(known, bool) and known > 0 else None
            if size_bytes is None:
                size_bytes = self._device.packed_bytes(recipe)
                self._verdicts.end("size", recipe.skeleton, {"bytes": size_bytes})
            self._sizes[recipe.skeleton] = size_bytes
        return size_bytes

    def _try(
        self, bundle: Bundle, staged: Staged, lowered: Mapping[int, Mapping[Form, Lowered]]
    ) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """Return the verdict on the rows, and one on the form of each stage that can be lowered."""
        failed = ""
        for size in _SIZES:
            if _input_bytes(bundle, size) > _LARGEST_INPUT_BYTES:
                break
            trial = _Trial(self._device, self._source, bundle, size)
            try:
                layouts = trial.run(staged, lowered)
            except (BundleError, StoreError, DeviceOutOfMemory):
                # That says nothing of the model.
                raise
            except TrunklineError as error:
                failed = failed or error.message
                continue
            rows: dict[str, Any] = {"layouts": None, "reason": trial.dependence}
            if not trial.dependence:
                rows = {"layouts": layouts, "padded": bool(trial.padded)}
            return rows | {"run_us": trial.run_us}, trial.forms
        return {"layouts": None, "reason": f"it could not be run on {_ROWS} rows: {failed}"}, {}


@dataclass
class _State:
    """What is known of a model before it is tried: its rows, and by structure the form of the stages that can be ``lowered``.

    One form for all stages of one structure, in this model and in others: they may have weights in common.
    """

    bundle: Bundle
    staged: Staged
    tried_as: str
    rows: dict[str, Any] | None
    lowered: list[dict[Form, Lowered]]
    structures: dict[int, str]
    forms: dict[str, dict[str, Any] | None]

    def unknown(self) -> dict[str, int]:
        """Return the structures whose form is not known, each with a stage that has it."""
        found: dict[str, int] = {}
        for number, structure in self.structures.items():
            if not _is_form(self.forms[structure]):
                found.setdefault(structure, number)
        return found

    def verdict(self) -> Verdict | None:
        """Return the verdict, None where the trial is still to be held."""
        if self.rows is None or not _is_whole(self.rows, self.staged) or self.unknown():
            return None
        return self.outcome(self.rows)

    def outcome(self, rows: Mapping[str, Any]) -> Verdict:
        taken = tuple(
            each.get((self.forms[self.structures[number]] or {}).get("form", "plain")) if each else None
            for number, each in enumerate(self.lowered)
        )
        run_s = self._run_s(rows, taken)
        if rows["layouts"] is None:
            return Verdict(None, str(rows["reason"]), taken, run_s=run_s)
        layouts: dict[Key, int | None] = dict.fromkeys(self.staged.inputs, INPUT)
        for stage, known in zip(self.staged.stages, rows["layouts"], strict=True):
            layouts.update(zip(stage.gives, known, strict=True))
        # Verdicts know structures, which have no names.
        return Verdict(layouts, "", taken, _masked(self.bundle) if rows["padded"] else "", run_s)

    def _run_s(self, rows: Mapping[str, Any], taken: Sequence[Lowered | None]) -> tuple[float, ...]:
        found = rows.get("run_us")
        if not isinstance(found, list) or len(found) != len(taken) or not all(map(_is_count, found)):
            # A verdict of before they were measured.
            return ()
        seconds = []
        for number, (plain_us, lowered) in enumerate(zip(found, taken, strict=True)):
            # Its own time as it is, and what another form was seen to make of it, with another input perhaps.
            ratio = 1.0 if lowered is None else _ratio(self.forms[self.structures[number]] or {})
            seconds.append(plain_us * 1e-6 * ratio)
        return tuple(seconds)


class _Unfit(Exception):
    """A stage is not to be run in a form: it fails in it, or gives something else."""


class _Dependent(Exception):
    """Rows touch each other, or it cannot be told where they lie."""


class _Trial:
    """One model on one row, and on four rows with six fillings. ``dependence`` says why its rows are not independent.

    ``run_us`` has how long each stage took for the row alone, as it is. Where it ran on four rows before, what a first run sets
    up is not in it.
    """

    def __init__(self, device: Device, source: Source, bundle: Bundle, size: int) -> None:
        self._device = device
        self._source = source
        self._tolerance = bundle.tolerance
        self.dependence = _fixed_size(bundle)
        self.padded = ""
        self._graph = bundle.graph
        self.forms: dict[int, dict[str, Any]] = {}
        self.run_us: list[int] = []
        random = np.random.default_rng(0)
        sizes = tried_sizes(bundle, size)
        self._inputs: list[dict[str, NDArray[Any]]] = []
        for spec in bundle.graph.inputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape]
            dtype, bounds = np.dtype(spec.dtype), (spec.minimum, spec.maximum)
            if self.dependence:
                shape = [1 if axis == bundle.batch else size for axis, size in zip(spec.shape, shape, strict=True)]
                self._inputs.append({"alone": _values("random", dtype, shape, bounds, random)})
                continue
            shape[0] = _ROWS
            base = _values("random", dtype, shape, bounds, random)
            filled = {"random": base}
            for filling in _FILLINGS[1:]:
                filled[filling] = base.copy()
                filled[filling][1] = _values(filling, dtype, shape[1:], bounds, random)
            filled["reverse order"] = np.ascontiguousarray(base[::-1])
            filled["alone"] = base[:1].copy()
            self._inputs.append(filled)
        symbol = _masked(bundle)
        most = next((each.maximum for each in bundle.graph.symbols if each.name == symbol), 0)
        if symbol and not self.dependence and sizes[symbol] + _LONGER <= most:
            self.padded = symbol
            for spec, filled in zip(bundle.graph.inputs, self._inputs, strict=True):
                widths = [(0, _LONGER if axis == symbol else 0) for axis in spec.shape]
                filled["padded"] = np.pad(filled["alone"], widths)

    def run(self, staged: Staged, lowered: Mapping[int, Mapping[Form, Lowered]]) -> list[list[int | None]]:
        """Return where rows lie in all that each stage gives; fill all that can be asked for. Raises what a device raises."""
        runs: dict[str, dict[Key, Any]] = {}
        for filling in self._inputs[0] if self._inputs else ():
            arrays = [filled[filling] for filled in self._inputs]
            views = [self._device.view(array.reshape(-1).view(np.uint8).data, array.dtype.name, array.shape) for array in arrays]
            runs[filling] = dict(zip(staged.inputs, views, strict=True))
        if not runs:
            self.dependence, runs = "it has no inputs", {"alone": {}}
        layouts: list[list[int | None]] = []
        for number, stage in enumerate(staged.stages):
            weights = [self._device.new_weight(weight, reader(self._source, weight)) for weight in stage.graph.weights]
            program = self._device.prepare(stage.graph)
            for filling, values in runs.items():
                inputs = [values[key] for key in stage.takes]
                started = time.perf_counter()
                given = self._device.run(program, weights, inputs)
                if filling == "alone":
                    self.run_us.append(round((time.perf_counter() - started) * 1e6))
                values.update(zip(stage.gives, given, strict=True))
            if forms := lowered.get(number):
                compared = self._compare(stage, program, weights, forms, runs["alone"], len(staged.stages) > 1)
                self.forms[number] = compared
                # The same run, measured more than once.
                self.run_us[number] = compared.get("base_us", self.run_us[number])
            del weights
            if not self.dependence:
                try:
                    layouts.append([self._axis(runs, key, f"stage {number} of {len(staged.stages)}") for key in stage.gives])
                except _Dependent as found:
                    # There is still the form of the stages to come.
                    self.dependence, self.padded, runs = str(found), "", {"alone": runs["alone"]}
            for values in runs.values():
                for key in values.keys() - stage.alive:
                    del values[key]
        if self.padded and not self._survives_padding(staged, runs):
            self.padded = ""
        return layouts

    def _survives_padding(self, staged: Staged, runs: Mapping[str, Mapping[Key, Any]]) -> bool:
        """Say whether a longer input, masked, gives the same results, cut to the length of the shorter."""
        for key, spec in zip(staged.results, self._graph.outputs, strict=True):
            short, long = runs["alone"][key], runs["padded"][key]
            if self.padded in spec.shape:
                axis = spec.shape.index(self.padded)
                long = self._device.part(long, axis, 0, short.shape[axis])
            if not self._device.agree(long, short, self._tolerance):
                return False
        return True

    def _compare(
        self,
        stage: Stage,
        program: Any,
        weights: Sequence[Any],
        forms: Mapping[Form, Lowered],
        values: Mapping[Key, Any],
        joins: bool,
    ) -> dict[str, Any]:
        """Run a stage in all its forms in turns; return which one is to be taken, and why.

        ``joins`` says that there are others to run it as one with.
        """
        inputs = [values[key] for key in stage.takes]
        expected = [values[key] for key in stage.gives]
        found: dict[str, Any] = {"form": "plain"}
        ways: dict[str, tuple[Any, Sequence[Any]]] = {"plain": (program, weights)}
        for form, lowered in forms.items():
            try:
                ways[form] = self._made(lowered, inputs, expected)
            except _Unfit as unfit:
                log.warning("a stage does not run in the form %s: %s", form, unfit)
                found[f"{form}_reason"] = str(unfit)
        if len(ways) == 1:
            return found
        seconds: dict[str, list[float]] = {form: [] for form in ways}
        for _ in range(_TURNS):
            for way, (made, bound) in ways.items():
                # Its threads are awake then, as after the stage before.
                self._device.run(made, bound, inputs)
                started = time.perf_counter()
                self._device.run(made, bound, inputs)
                seconds[way].append(time.perf_counter() - started)
        # Others have the processor, too: what was not disturbed tells most.
        least_s = {way: min(each) for way, each in seconds.items()}
        found |= {_figure(way): round(each_s * 1e6) for way, each_s in least_s.items()}
        return found | {"form": _fastest(least_s, joins)}

    def _made(self, lowered: Lowered, inputs: Sequence[Any], expected: Sequence[Any]) -> tuple[Any, list[Any]]:
        """Return the program and the weights of a stage in another form. Raises _Unfit where that gives something else."""
        device = self._device
        handles = []
        for weight in lowered.graph.weights:
            if (recipe := lowered.recipes.get(weight.digest)) is not None:
                handles.append(packed_from_store(device, self._source, recipe))
            else:
                handles.append(device.new_weight(weight, reader(self._source, weight)))
        try:
            program = device.prepare_lowered(lowered.graph)
            given = device.run(program, handles, inputs)
        except TrunklineError as error:
            raise _Unfit(error.message) from error
        tolerance = max(self._tolerance, _ROUNDING)
        if not all(device.agree(one, other, tolerance) for one, other in zip(given, expected, strict=True)):
            raise _Unfit("the results differ")
        return program, handles

    def _axis(self, runs: Mapping[str, Mapping[Key, Any]], key: Key, where: str) -> int | None:
        alone, together = runs["alone"][key], runs["random"][key]
        one, four = tuple(alone.shape), tuple(together.shape)
        axes = [axis for axis, (small, large) in enumerate(zip(one, four, strict=False)) if small != large]
        if len(one) != len(four) or len(axes) > 1 or (axes and four[axes[0]] != _ROWS * one[axes[0]]):
            raise _Dependent(f"{where} gives {list(one)} for one row and {list(four)} for four")
        axis = axes[0] if axes else None
        agree = self._device.agree
        for filling in _FILLINGS:
            for row in _FIXED if axes else (0,):
                if not agree(self._row(runs[filling][key], axis, row), self._row(together, axis, row), None):
                    raise _Dependent(f"{where} gives something else for a row beside {filling}")
        for row in _FIXED if axes else (0,):
            back = self._row(runs["reverse order"][key], axis, _ROWS - 1 - row)
            if not agree(back, self._row(together, axis, row), self._tolerance):
                raise _Dependent(f"{where} gives something else for a row at another place")
        if not agree(alone, self._row(together, axis, 0), self._tolerance if axes else None):
            raise _Dependent(f"{where} gives something else for a row alone")
        return axis

    def _row(self, tensor: Any, axis: int | None, row: int) -> Any:
        if axis is None:
            return tensor
        per_row = tensor.shape[axis] // _ROWS
        return self._device.part(tensor, axis, row * per_row, per_row)


def _masked(bundle: Bundle) -> str:
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


def tried_sizes(bundle: Bundle, size: int = _SIZES[0]) -> dict[str, int]:
    """Return the sizes of the axes that may vary: all ``size``, the first that is tried, as far as they may be.

    One that may be padded is short enough for it.
    """
    masked = _masked(bundle)
    return {
        symbol.name: max(min(size, symbol.maximum - (_LONGER if symbol.name == masked else 0)), symbol.minimum)
        for symbol in bundle.graph.symbols
    }


def _sizes_of_a_row(bundle: Bundle, size: int) -> dict[str, int]:
    return tried_sizes(bundle, size) | ({bundle.batch: 1} if bundle.batch else {})


def _input_bytes(bundle: Bundle, size: int) -> int:
    """Return the bytes of one row of a model's inputs, where axes that may vary have ``size`` if they may."""
    sizes = _sizes_of_a_row(bundle, size)
    return sum(
        math.prod(axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape) * np.dtype(spec.dtype).itemsize
        for spec in bundle.graph.inputs
    )


def _fastest(seconds: Mapping[str, float], joins: bool) -> str:
    return min(seconds, key=lambda form: seconds[form] * (JOINED if joins and form == "blocked" else 1.0))


def _figure(form: str) -> str:
    return "base_us" if form == "plain" else f"{form}_us"


def _fixed_size(bundle: Bundle) -> str:
    """Return why a model cannot be run on several rows, empty when it can."""
    if bundle.batch is None:
        return "its batch size is fixed"
    most = next(symbol.maximum for symbol in bundle.graph.symbols if symbol.name == bundle.batch)
    return f"it takes at most {most} rows" if most < _ROWS else ""


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


def _ratio(form: Mapping[str, Any]) -> float:
    """Return how long a stage takes in the form that was taken / as it is; 1 where that is not known."""
    base_us, form_us = form.get("base_us"), form.get(_figure(form["form"]))
    return form_us / base_us if _is_count(base_us) and _is_count(form_us) and base_us else 1.0


def _is_count(found: object) -> TypeGuard[int]:
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _is_form(plain: Mapping[str, Any] | None) -> bool:
    return plain is not None and plain.get("form") in _FORMS


def _is_whole(plain: Mapping[str, Any], staged: Staged) -> bool:
    """Say whether what was read from disk is a verdict on this model."""
    layouts = plain.get("layouts", False)
    if layouts is None:
        return isinstance(plain.get("reason"), str)

    def fits(found: object, stage: Stage) -> bool:
        return isinstance(found, list) and len(found) == len(stage.gives) and all(map(_is_axis, found))

    if not isinstance(plain.get("padded"), bool):
        return False
    return isinstance(layouts, list) and len(layouts) == len(staged.stages) and all(map(fits, layouts, staged.stages))


def _is_axis(found: object) -> bool:
    return found is None or (_is_count(found) and found < 64)
