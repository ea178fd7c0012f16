"""Shortage: what is done when the device has no room to compute. Part of the engine thread.

1. A stage is run on its rows in halves, down to single ones, and what the halves gave is put together: nobody notices. Where rows
   touch each other, and where not even one has room, the requests of the group are run each by itself (``Wavefront.fail``).
2. For a request that has no room by itself, what nobody uses leaves: copies of weights, what allocators keep, and weights that
   nobody leases, by the rule by which they always leave; a little at first, then twice as much each time. Nothing is run until
   the mover has let go of their bytes. Weights whose memory is theirs for good (a device's span) stay: it would be of no use.
3. When nothing is left to let go of, or all the memory there is would not be enough, that request is refused, and no other. Where
   other lanes computed at the same time, it is run once more while none does.

An error holds on to the frames it came through, and so to all that was computed there. Before anything else is tried it is made
anew, without them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trunkline.errors import Detail, DeviceOutOfMemory

from sidecar.errors import anew
from sidecar.loads import Loads
from sidecar.mover import Mover
from sidecar.ports import Device
from sidecar.residency import Residency
from sidecar.stages import Key
from sidecar.wavefront import Group

log = logging.getLogger("trunkline.engine")

# The part of the weight budget that leaves first when there is no room to compute.
_FIRST_SHARE: Final = 1 / 16


@dataclass(slots=True)
class Counts:
    """Runs of a stage that were split in two, times that something had to leave for a request, and requests that were refused."""

    splits: int = 0
    reliefs: int = 0
    refused: int = 0


@dataclass(slots=True)
class Splits:
    """How often one run of a stage was split in two."""

    count: int = 0


class Shortage:
    """``drop`` forgets evicted weights. While it is ``relieving``, nothing is to be run; whatever is posted may end that."""

    def __init__(
        self,
        device: Device,
        residency: Residency,
        loads: Loads,
        mover: Mover,
        drop: Callable[[Sequence[str]], None],
        gives_back: bool = True,
    ) -> None:
        """``gives_back`` says whether there is more room to compute when weights leave."""
        self.counts = Counts()
        self.relieving = False
        self._device = device
        self._residency = residency
        self._loads = loads
        self._mover = mover
        self._drop = drop
        self._gives_back = gives_back
        # How much is to leave the next time; 0 after a run that had room.
        self._wanted_bytes = 0

    def run(self, group: Group[Any], program: Any, weights: Sequence[Any], splits: Splits) -> list[Any]:
        """Run a stage on a group, in parts where there is no room for the whole; return its outputs. Any thread, see ``ran``.

        Raises DeviceOutOfMemory when there is no room for a part that cannot be divided, and what the device raises.
        """
        return self._run(group, program, weights, splits, 0, group.extent)

    def ran(self, group: Group[Any] | None, splits: Splits) -> None:
        """Note that a run has ended, and the ``group`` that it was for, unless it failed."""
        self.counts.splits += splits.count
        if group is not None:
            self._wanted_bytes, group.relieved = 0, False

    def _run(self, group: Group[Any], program: Any, weights: Sequence[Any], splits: Splits, start: int, length: int) -> list[Any]:
        """Run a stage on ``length`` rows from ``start`` on."""
        step = group.step
        whole = length == group.extent
        inputs = group.takes() if whole else [self._part(group, key, start, length) for key in step.takes]
        outputs = self._try(program, weights, inputs)
        if not isinstance(outputs, DeviceOutOfMemory):
            return outputs
        if length == 1 or not group.is_divisible:
            # Not the same: this frame would hold on to an error that holds on to this frame.
            raise anew(outputs)
        splits.count += 1
        half = length // 2
        first = self._run(group, program, weights, splits, start, half)
        second = self._run(group, program, weights, splits, start + half, length - half)
        return [
            one if (axis := group.axis(key)) is None else self._device.join([one, other], axis)
            for key, one, other in zip(step.gives, first, second, strict=True)
        ]

    def _try(self, program: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any] | DeviceOutOfMemory:
        try:
            return self._device.run(program, weights, inputs)
        except DeviceOutOfMemory as error:
            return anew(error)

    def _part(self, group: Group[Any], key: Key, start: int, length: int) -> Any:
        value = group.values[key]
        if (places := group.places(key)) is None:
            return value
        axis, per_row = places
        return self._device.part(value, axis, start * per_row, length * per_row)

    def relieve(self, group: Group[Any], error: DeviceOutOfMemory) -> bool:
        """Let go of something for the sake of a request that has no room by itself; False when that is of no use.

        It may be run again when this is over, and at least once.
        """
        asked_bytes = error.details.get("asked_bytes", 0)
        found = self._device.memory()
        if isinstance(asked_bytes, int) and asked_bytes > found.get("total_bytes", asked_bytes) - found.get("span_bytes", 0):
            # More than there is: others would have to come back for nothing.
            return False
        self._wanted_bytes = max(2 * self._wanted_bytes, int(_FIRST_SHARE * self._residency.budget_bytes))
        evicted = self._residency.relieve(self._wanted_bytes) if self._gives_back else ()
        if group.relieved and not evicted:
            return False
        group.relieved = group.apart = True
        self.counts.reliefs += 1
        log.warning(
            "%s has no room for stage %d of a request; %d weights nobody uses leave, others take %d bytes",
            self._device.name,
            group.index + 1,
            len(evicted),
            self._residency.committed_bytes,
        )
        self._loads.drop_copies()
        self._drop(evicted)
        self._device.trim()
        self._mover.trim()
        self.relieving = True
        self._mover.then(self._relieved)
        return True

    def _relieved(self) -> None:
        self.relieving = False

    def refusal(self, group: Group[Any], error: DeviceOutOfMemory) -> DeviceOutOfMemory:
        """Return what a request is told for which nothing more can be done."""
        self.counts.refused += 1
        weight_bytes = self._residency.committed_bytes
        details: dict[str, Detail] = {
            "rows": group.extent,
            "weight_bytes": weight_bytes,
            "budget_bytes": self._residency.budget_bytes,
        }
        return DeviceOutOfMemory(
            f"{self._device.name} has no room for stage {group.index + 1} of {len(group.first.steps)} with {group.extent} rows: "
            f"{error.message}; weights that are in use take {weight_bytes} bytes, and to let go of others is of no use; send "
            "less at a time, try again when fewer requests are under way, or start the sidecar with a smaller --memory-budget",
            **(error.details | details),
        )
