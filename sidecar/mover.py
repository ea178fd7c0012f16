"""The mover: reads weights into memory in a thread of its own, that owns no state, and posts what came of it."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable

from trunkline.errors import ModelCorrupt, SidecarFault, TrunklineError

from sidecar.bundle import Weight
from sidecar.errors import BlobCorrupt, BlobMissing
from sidecar.lowering import Recipe
from sidecar.ports import Device, Source

_Arrived = Callable[[Weight, object], None]


def reader(source: Source, weight: Weight) -> Callable[[memoryview], None]:
    """Return the function that writes a weight's bytes, checked, where it is told to."""
    return lambda target: source.read_blob(weight.digest, target, weight.crc32)


class Mover:
    """Reads weights one after the other. ``run`` is its thread's body; ``fetch`` and ``stop`` may be called anywhere."""

    def __init__(self, device: Device, source: Source, post: Callable[[Callable[[], None]], None]) -> None:
        self._device = device
        self._source = source
        self._post = post
        self._jobs: queue.SimpleQueue[tuple[Weight, Recipe | None, _Arrived] | None] = queue.SimpleQueue()

    def fetch(self, weight: Weight, recipe: Recipe | None, arrived: _Arrived) -> None:
        """Read a weight, or make it by its recipe; ``arrived`` is run in the engine thread with its handle, or with a
        TrunklineError."""
        self._jobs.put((weight, recipe, arrived))

    def stop(self) -> None:
        self._jobs.put(None)

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            self._move(*job)

    def _move(self, weight: Weight, recipe: Recipe | None, arrived: _Arrived) -> None:
        # A frame of its own: a local of the loop would keep the last weight in memory after its eviction.
        outcome = self._read(weight, recipe)
        self._post(lambda: arrived(weight, outcome))

    def _read(self, weight: Weight, recipe: Recipe | None) -> object:
        # Errors are made anew, without trace, cause or context: the frames those hold on to hold the bytes that were read,
        # which are outside the budget from here on.
        failed: TrunklineError
        try:
            if recipe is not None:
                return self._device.new_packed(recipe, [reader(self._source, each) for each in recipe.sources])
            return self._device.new_weight(weight, reader(self._source, weight))
        except (BlobMissing, BlobCorrupt):
            message = f"weight {weight.digest[:12]} is damaged or missing in the store; push the model again"
            failed = ModelCorrupt(message, digest=weight.digest)
        except TrunklineError as error:
            failed = type(error)(error.message, **error.details)
        except OSError as error:
            failed = SidecarFault(f"the store cannot be read ({os.strerror(error.errno or 0)})", digest=weight.digest)
        failed.__context__ = None
        return failed
