"""Weights one by one in memory that the device allocates: each is read from the store, or packed from what the store has.

They go with their handles. For a CPU whose packed weights cannot be told as bytes, which rules out all other kinds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from sidecar.bundle import Weight
from sidecar.ir import Graph
from sidecar.lowering import Recipe
from sidecar.memory import Batch, Wanted, outcome_of, packed_from_store, reader
from sidecar.ports import Device, Source
from sidecar.verdicts import Verdicts


class DeviceMemory:
    """Weights in memory that the device allocates, one by one."""

    gives_back: Final = True

    def __init__(self, device: Device, source: Source) -> None:
        self._device = device
        self._source = source

    def size_bytes(self, weight: Weight) -> int:
        return weight.size_bytes

    def is_in_host(self, digest: str) -> bool:
        return False

    def kept(self) -> Iterable[str]:
        return ()

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        return Batch(wanted)

    def read(self, batch: Batch) -> None:
        """Do nothing: there are no block files."""

    def end(self, batch: Batch) -> list[object]:
        outcomes = [outcome_of(each, self._bring) for each in batch.wanted]
        batch.in_host_s = time.monotonic()
        return outcomes

    def _bring(self, wanted: Wanted) -> object:
        weight, recipe = wanted
        if recipe is not None:
            return packed_from_store(self._device, self._source, recipe)
        return self._device.new_weight(weight, reader(self._source, weight))

    def free(self, digests: Iterable[str]) -> None:
        """Do nothing: the bytes went with the handles."""

    def compact(self, needed_bytes: int) -> Mapping[str, object]:
        """Do nothing: where weights lie is the device's business."""
        return {}

    def trim(self) -> None:
        """Do nothing, as before."""

    def audit(self) -> None:
        """Do nothing: the handles are the books."""

    def compare(self, limit_bytes: int) -> Sequence[str]:
        """Find nothing: there are no checksums of what the device has."""
        return ()

    def facts(self) -> Mapping[str, int]:
        return {}

    def keep(self, graph: Graph, recipes: Mapping[str, Recipe], evicts: bool = True) -> None:
        """Do nothing, nor below: device memory has nothing on disk but the store."""

    def forget(self, digests: Iterable[str]) -> None:
        pass

    def calibrate(self, verdicts: Verdicts) -> float | None:
        return None

    def scrub(self, pause: Callable[[], object]) -> None:
        pass
