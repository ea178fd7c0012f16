"""Sweeps: what a run of a model takes while none, one or several others run beside it, in lanes. Done in the trials' thread.

Stage by stage, with one stage's weights in memory, each number of lanes takes turns with the others: all its lanes run the stage
on one row at the same time. That they share their weights, which requests for different models do not, flatters many lanes a
little; that everything else in the process goes on meanwhile is so for all of them. A sweep is held once on a machine for a model
in the form it is served in.
"""

from __future__ import annotations

import functools
import logging
import math
import queue
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from trunkline.errors import TrunklineError

from sidecar.bundle import Bundle
from sidecar.devicememory import DeviceMemory
from sidecar.lanes import Lanes, Outcome
from sidecar.lowering import Lowered
from sidecar.memory import Wanted
from sidecar.ports import Device, Source
from sidecar.stages import Staged
from sidecar.trials import example_rows
from sidecar.verdicts import Verdicts

log = logging.getLogger("trunkline.trials")

# How often each number of lanes has its turn, and for how long a lane is kept busy with a stage.
_TURNS: Final = 3
_LONG_ENOUGH_S: Final = 0.01
_MOST_RUNS: Final = 50
# A sweep that the engine did not outlive may have had nothing to do with it, once.
_MOST_DEATHS: Final = 2


class Sweeps:
    """Measures models on a device, and keeps what was chosen for that. Belongs to the trials' thread, once it runs."""

    def __init__(self, device: Device, source: Source, verdicts: Verdicts) -> None:
        self._device = device
        self._memory = DeviceMemory(device, source)
        self._verdicts = verdicts

    def last_count(self) -> int:
        """Return how many lanes there were when that was last chosen on this machine; 1 where it never was."""
        known = (self._verdicts.find("lanes", "count") or {}).get("count")
        return known if isinstance(known, int) and known in self._device.lane_counts else 1

    def keep_count(self, count: int) -> None:
        """Keep what was chosen for the next start."""
        self._verdicts.end("lanes", "count", {"count": count})

    def seconds(self, bundle: Bundle, staged: Staged, forms: Sequence[Lowered | None]) -> Mapping[int, float] | None:
        """Return what a run takes by the number of lanes that run at the same time; None where that cannot be found out."""
        counts = self._device.lane_counts
        if len(counts) < 2:
            return None
        lowered = forms or (None,) * len(staged.stages)
        structure = f"{bundle.graph_digest} {[each is not None for each in lowered]}"
        if (known := _read(self._verdicts.find("lanes", structure), counts)) is not None:
            return known
        if self._verdicts.unfinished("lanes", structure) >= _MOST_DEATHS:
            return None
        self._verdicts.begin("lanes", structure)
        found: dict[int, float] | None = None
        try:
            found = self._sweep(bundle, staged, lowered, counts)
        except Exception as error:
            # A damaged weight, or no room just now: those who ask for the model are told. It says nothing of lanes.
            log.warning("%s says nothing of how many lanes there should be", bundle.name, exc_info=error)
        finally:
            plain = None if found is None else {str(count): round(seconds * 1e6) for count, seconds in found.items()}
            self._verdicts.end("lanes", structure, plain)
        return found

    def _sweep(
        self, bundle: Bundle, staged: Staged, lowered: Sequence[Lowered | None], counts: Sequence[int]
    ) -> dict[int, float]:
        inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        divided: list[Lanes] = []
        try:
            divided += (Lanes(self._device, count, inbox.put, time.perf_counter) for count in counts)
            for number, rows in enumerate(example_rows(bundle)):
                try:
                    return self._stages(staged, lowered, rows, divided, inbox)
                except TrunklineError:
                    # Some models refuse small inputs.
                    if number:
                        raise
            raise AssertionError("there is always an example")
        finally:
            for lanes in divided:
                lanes.stop()

    def _stages(
        self,
        staged: Staged,
        lowered: Sequence[Lowered | None],
        rows: Sequence[Any],
        divided: Sequence[Lanes],
        inbox: queue.SimpleQueue[Callable[[], None]],
    ) -> dict[int, float]:
        device = self._device
        views = [device.view(array.reshape(-1).view("uint8").data, array.dtype.name, array.shape) for array in rows]
        values: dict[Any, Any] = dict(zip(staged.inputs, views, strict=True))
        seconds = dict.fromkeys((lanes.count for lanes in divided), 0.0)
        for stage, form in zip(staged.stages, lowered, strict=True):
            graph, recipes = (stage.graph, {}) if form is None else (form.graph, form.recipes)
            program = device.prepare(graph) if form is None else device.prepare_lowered(graph)
            wanted = [Wanted(weight, recipes.get(weight.digest)) for weight in graph.weights]
            weights = self._memory.end(self._memory.begin(wanted))
            for weight in weights:
                if isinstance(weight, TrunklineError):
                    raise weight
            run = functools.partial(device.run, program, weights, [values[key] for key in stage.takes])
            # The first run sets things up, in every lane.
            values.update(zip(stage.gives, run(), strict=True))
            for lanes in divided:
                _all_at_once(lanes, run, 1, inbox)
            once_s = _all_at_once(divided[0], run, 1, inbox)
            count = min(_MOST_RUNS, max(1, math.ceil(_LONG_ENOUGH_S / max(once_s, 1e-9))))
            turns = [[_all_at_once(lanes, run, count, inbox) for lanes in divided] for _ in range(_TURNS)]
            for lanes, measured in zip(divided, zip(*turns, strict=True), strict=True):
                seconds[lanes.count] += statistics.median(measured)
            for key in values.keys() - stage.alive:
                del values[key]
        return seconds


def _all_at_once(lanes: Lanes, run: Callable[[], object], count: int, inbox: queue.SimpleQueue[Callable[[], None]]) -> float:
    """Have all lanes run something ``count`` times at the same time; return the seconds that one run takes."""
    told: list[Outcome] = []

    def again() -> None:
        for _ in range(count):
            run()

    started_s = time.perf_counter()
    for _ in range(lanes.count):
        lanes.hand(again, told.append)
    for _ in range(lanes.count):
        inbox.get()()
    ended_s = time.perf_counter()
    for outcome in told:
        if outcome.error is not None:
            raise outcome.error
    return (ended_s - started_s) / count


def _read(plain: Mapping[str, Any] | None, counts: Sequence[int]) -> dict[int, float] | None:
    """Return what was read from disk, where that is a whole sweep."""
    found = {count: (plain or {}).get(str(count)) for count in counts}
    seconds = {
        count: each * 1e-6 for count, each in found.items() if isinstance(each, int) and not isinstance(each, bool) and each > 0
    }
    return seconds if len(seconds) == len(counts) else None
