"""Trials: what must be known of a model before it is served as well as it can be, found by trying it out.

A model is tried in a thread of its own, with its own weights, one stage in memory at a time.

*Independence.* Whether rows that are run together touch each other (``sidecar.independence``).

*Form.* In which of its forms each stage is fastest (``sidecar.forms``). Stages of one structure have one form, whichever models
they are in, so that their weights are shared.

*Seconds.* What each stage takes for one row is noted on the way, so that how long a run takes can be told before the first.

Owned by its thread; the outcome is posted.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trunkline.errors import DeviceOutOfMemory, TrunklineError

from sidecar.bundle import Bundle
from sidecar.errors import BundleError, StoreError
from sidecar.forms import Forms, is_count, is_form, ratio
from sidecar.independence import ROWS, SIZES, Rows, input_bytes, masked
from sidecar.ir import Graph
from sidecar.lowering import Form, Lowered, Recipe
from sidecar.memory import reader
from sidecar.merkle import skeleton_id
from sidecar.ports import Device, Source
from sidecar.stages import Key, Stage, Staged
from sidecar.verdicts import Verdicts
from sidecar.wavefront import INPUT, Layouts

log = logging.getLogger("trunkline.trials")

# Nothing waits for a trial: it must not take the processor from those who are waited for.
_NICE: Final = 10
# A trial that the engine did not outlive may have had nothing to do with it, once.
_MOST_DEATHS: Final = 2
# Of one row. The trial holds some thirty of them, outside the budget.
_LARGEST_INPUT_BYTES: Final = 16 * 2**20


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
        self._forms = Forms(device, source, verdicts, packing=packing)
        self._keep = keep
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
        if (told := self._refusal(bundle)) is not None:
            return told
        # What it could be lowered to is looked at only then: to know the size of a packed weight, one may have to be packed.
        return None if self._verdicts.find("rows", _tried_as(bundle)) is None else self._state(bundle, staged).verdict()

    def _verdict(self, bundle: Bundle, staged: Staged) -> Verdict:
        if (told := self._refusal(bundle)) is not None:
            return told
        state = self._state(bundle, staged)
        if (known := state.verdict()) is not None:
            return known
        self._trying = state.tried_as
        self._verdicts.begin("rows", state.tried_as)
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

    def _refusal(self, bundle: Bundle) -> Verdict | None:
        """Return a verdict where no trial is to be held, otherwise None."""
        tried_as = _tried_as(bundle)
        # The one that is held now, for another domain perhaps, has not ended yet either.
        if self._verdicts.unfinished("rows", tried_as) - (self._trying == tried_as) >= _MOST_DEATHS:
            return Verdict(None, "the engine ended when it was tried")
        if (size_bytes := input_bytes(bundle, SIZES[0])) > _LARGEST_INPUT_BYTES:
            return Verdict(None, f"its inputs take {size_bytes} bytes, at most {_LARGEST_INPUT_BYTES} are tried")
        return None

    def _state(self, bundle: Bundle, staged: Staged) -> _State:
        """Return what is known of a model."""
        tried_as = _tried_as(bundle)
        lowered = [self._forms.of(stage) for stage in staged.stages]
        structures = {number: skeleton_id(staged.stages[number].graph) for number, each in enumerate(lowered) if each}
        forms = {structure: self._verdicts.find("form", structure) for structure in structures.values()}
        return _State(bundle, staged, tried_as, self._verdicts.find("rows", tried_as), lowered, structures, forms)

    def _try(
        self, bundle: Bundle, staged: Staged, lowered: Mapping[int, Mapping[Form, Lowered]]
    ) -> tuple[dict[str, Any], dict[int, dict[str, Any]]]:
        """Return the verdict on the rows, and one on the form of each stage that can be lowered."""
        failed = ""
        for size in SIZES:
            if input_bytes(bundle, size) > _LARGEST_INPUT_BYTES:
                break
            trial = _Trial(self._device, self._source, self._forms, bundle, staged, size)
            try:
                layouts = trial.run(lowered)
            except (BundleError, StoreError, DeviceOutOfMemory):
                # That says nothing of the model.
                raise
            except TrunklineError as error:
                failed = failed or error.message
                continue
            rows: dict[str, Any] = {"layouts": None, "reason": trial.rows.dependence}
            if not trial.rows.dependence:
                rows = {"layouts": layouts, "padded": bool(trial.rows.padded)}
            return rows | {"run_us": trial.run_us}, trial.forms
        return {"layouts": None, "reason": f"it could not be run on {ROWS} rows: {failed}"}, {}


def _tried_as(bundle: Bundle) -> str:
    # Not by structure: where a weight chooses what is computed, siblings differ in whether rows touch each other.
    return f"{bundle.graph_digest} {bundle.batch}"


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
            if not is_form(self.forms[structure]):
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
        return Verdict(layouts, "", taken, masked(self.bundle) if rows["padded"] else "", run_s)

    def _run_s(self, rows: Mapping[str, Any], taken: Sequence[Lowered | None]) -> tuple[float, ...]:
        found = rows.get("run_us")
        if not isinstance(found, list) or len(found) != len(taken) or not all(map(is_count, found)):
            # A verdict of before they were measured.
            return ()
        seconds = []
        for number, (plain_us, lowered) in enumerate(zip(found, taken, strict=True)):
            # Its own time as it is, and what another form was seen to make of it, with another input perhaps.
            form = {} if lowered is None else self.forms[self.structures[number]] or {}
            seconds.append(plain_us * 1e-6 * ratio(form))
        return tuple(seconds)


class _Trial:
    """One model on one row, and on four rows with six fillings.

    ``run_us`` has how long each stage took for the row alone, as it is. Where it ran on four rows before, what a first run sets
    up is not in it.
    """

    def __init__(self, device: Device, source: Source, forms: Forms, bundle: Bundle, staged: Staged, size: int) -> None:
        self._device = device
        self._source = source
        self._forms = forms
        self._tolerance = bundle.tolerance
        self._staged = staged
        self.rows = Rows(device, bundle, staged, size)
        self.forms: dict[int, dict[str, Any]] = {}
        self.run_us: list[int] = []

    def run(self, lowered: Mapping[int, Mapping[Form, Lowered]]) -> list[list[int | None]]:
        """Return where rows lie in all that each stage gives; fill all that can be asked for. Raises what a device raises."""
        rows, stages = self.rows, self._staged.stages
        layouts: list[list[int | None]] = []
        for number, stage in enumerate(stages):
            weights = [self._device.new_weight(weight, reader(self._source, weight)) for weight in stage.graph.weights]
            program = self._device.prepare(stage.graph)
            for filling, values in rows.runs.items():
                inputs = [values[key] for key in stage.takes]
                started = time.perf_counter()
                given = self._device.run(program, weights, inputs)
                if filling == "alone":
                    self.run_us.append(round((time.perf_counter() - started) * 1e6))
                values.update(zip(stage.gives, given, strict=True))
            if forms := lowered.get(number):
                alone, joins = rows.runs["alone"], len(stages) > 1
                inputs, expected = [alone[key] for key in stage.takes], [alone[key] for key in stage.gives]
                compared = self._forms.compare(
                    forms, (program, weights), inputs, expected, tolerance=self._tolerance, joins=joins
                )
                self.forms[number] = compared
                # The same run, measured more than once.
                self.run_us[number] = compared.get("base_us", self.run_us[number])
            del weights
            # Where rows touch each other there is still the form of the stages to come.
            layouts.append(rows.layout(stage.gives, f"stage {number} of {len(stages)}"))
            rows.let_go(stage.alive)
        if rows.padded and not rows.survives_padding(self._staged.results):
            rows.padded = ""
        return layouts


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
    return found is None or (is_count(found) and found < 64)
