"""Forms: in which of its forms a stage is run, found by running all of them in turns.

Where a stage can be lowered (``sidecar.lowering``) it may run as it is, packed for oneDNN, or in blocks for ONNX Runtime. The
fastest of those that agree is taken; of a model with several stages, blocks also where they are a little slower, since several
stages in blocks can be run as one (``sidecar.stretches``). What was found is plain data, for a file of verdicts.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard

from trunkline.errors import TrunklineError

from sidecar.lowering import Form, Lowered, Recipe, lower
from sidecar.memory import packed_from_store, reader
from sidecar.ports import Device, Source
from sidecar.stages import Stage
from sidecar.stretches import JOINED
from sidecar.verdicts import Verdicts

log = logging.getLogger("trunkline.trials")

_FORMS: Final = ("plain", "packed", "blocked")
# How often each form of a stage is run, and what folding and another order of additions may change of its results.
_TURNS: Final = 9
_ROUNDING: Final = 1e-4


class _Unfit(Exception):
    """A stage is not to be run in a form: it fails in it, or gives something else."""


class Forms:
    """What stages may be run in, and which of it is fastest. Owned by one thread."""

    def __init__(self, device: Device, source: Source, verdicts: Verdicts, *, packing: bool) -> None:
        """Look for no form but the one a stage has unless ``packing``. ``verdicts`` keeps the sizes of packed weights."""
        self._device = device
        self._source = source
        self._verdicts = verdicts
        self._packing = packing and device.can_pack
        # Of packed weights, by skeleton.
        self._sizes: dict[str, int] = {}

    def of(self, stage: Stage) -> dict[Form, Lowered]:
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
            size_bytes = known if is_count(known) and known else None
            if size_bytes is None:
                size_bytes = self._device.packed_bytes(recipe)
                self._verdicts.end("size", recipe.skeleton, {"bytes": size_bytes})
            self._sizes[recipe.skeleton] = size_bytes
        return size_bytes

    def compare(
        self,
        forms: Mapping[Form, Lowered],
        plain: tuple[Any, Sequence[Any]],
        inputs: Sequence[Any],
        expected: Sequence[Any],
        *,
        tolerance: float,
        joins: bool,
    ) -> dict[str, Any]:
        """Run a stage in all its forms in turns; return which one is to be taken, and why.

        ``plain`` is its program and its weights as it is, which gives ``expected``. ``joins`` says that there are others to run
        it as one with.
        """
        found: dict[str, Any] = {"form": "plain"}
        ways: dict[str, tuple[Any, Sequence[Any]]] = {"plain": plain}
        for form, lowered in forms.items():
            try:
                ways[form] = self._made(lowered, inputs, expected, max(tolerance, _ROUNDING))
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

    def _made(self, lowered: Lowered, inputs: Sequence[Any], expected: Sequence[Any], tolerance: float) -> tuple[Any, list[Any]]:
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
        if not all(device.agree(one, other, tolerance) for one, other in zip(given, expected, strict=True)):
            raise _Unfit("the results differ")
        return program, handles


def is_form(found: Mapping[str, Any] | None) -> bool:
    """Say whether what was read from disk is a verdict on a form."""
    return found is not None and found.get("form") in _FORMS


def ratio(form: Mapping[str, Any]) -> float:
    """Return how long a stage takes in the form that was taken / as it is; 1 where that is not known."""
    base_us, form_us = form.get("base_us"), form.get(_figure(form.get("form", "plain")))
    return form_us / base_us if is_count(base_us) and is_count(form_us) and base_us else 1.0


def is_count(found: object) -> TypeGuard[int]:
    """Say whether what was read from disk counts something."""
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _fastest(seconds: Mapping[str, float], joins: bool) -> str:
    return min(seconds, key=lambda form: seconds[form] * (JOINED if joins and form == "blocked" else 1.0))


def _figure(form: str) -> str:
    return "base_us" if form == "plain" else f"{form}_us"
