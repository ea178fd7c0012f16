"""Memory for weights: what the engine and its mover need of it, and what all kinds of it have in common.

There are three kinds (``sidecar.memories`` chooses): in the host tier, where a CPU works on them in place (``tiermemory``); in a
span of a device that copies, with the host tier as a cache below (``swapmemory``); one by one in memory that the device allocates
(``devicememory``).

What is wanted at one stroke is a *batch*. It is brought in by three calls, ``begin``, ``read`` and ``end``, so that the disk
reads for one batch while another is got ready or made use of.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from trunkline.errors import ModelCorrupt, SidecarFault, TrunklineError

from sidecar.blockfiles import Entry
from sidecar.bundle import Weight
from sidecar.errors import BlobCorrupt, BlobMissing, anew
from sidecar.ir import Graph
from sidecar.lowering import Recipe
from sidecar.ports import Device, Source
from sidecar.verdicts import Verdicts


class Wanted(NamedTuple):
    """A weight to bring in; packed ones are made by their ``recipe``."""

    weight: Weight
    recipe: Recipe | None


@dataclass(slots=True, eq=False)
class Batch:
    """Weights on their way. ``found`` has the handles of those that are there, and the errors of those that cannot be."""

    wanted: Sequence[Wanted]
    found: dict[str, object] = field(default_factory=dict)
    # What is read from block files, and where to; in the end, what was.
    entries: dict[str, Entry] = field(default_factory=dict)
    targets: list[memoryview] = field(default_factory=list)
    # Of those that were in memory already, so that nothing had to be read.
    kept_bytes: int = 0
    # When the last of those that had to be read was in host memory, of ``time.monotonic``; 0: nothing had to be.
    in_host_s: float = 0.0

    @property
    def missing(self) -> list[Wanted]:
        return [each for each in self.wanted if each.weight.digest not in self.found]


class Scattered(Exception):
    """There is room for a batch, but in pieces; ``compact`` makes one piece of ``needed_bytes``. Nothing has changed."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes are free, but not in one piece")
        self.needed_bytes = needed_bytes


class Memory(Protocol):
    """What loads and the mover need. All that does not say otherwise belongs to the mover's thread, once it runs."""

    @property
    def gives_back(self) -> bool:
        """Say whether what weights leave behind can be computed with. Any thread."""

    def size_bytes(self, weight: Weight) -> int:
        """Return the bytes that a weight takes of the budget. Any thread."""

    def is_in_host(self, digest: str) -> bool:
        """Say whether the cache in host memory has a weight, where there is one below a device. Any thread."""

    def kept(self) -> Iterable[str]:
        """Return the digests of weights that an earlier engine left here. Called once, before all else."""

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        """Make room for weights. Batches may be begun before others are ended. Raises Scattered."""

    def read(self, batch: Batch) -> None:
        """Have the disk read what is there as it is needed. Any thread, while nobody else has the batch."""

    def end(self, batch: Batch) -> list[object]:
        """Have all else read or made; return for each weight its handle, or a TrunklineError."""

    def free(self, digests: Iterable[str]) -> None:
        """Let go of weights of which no handle is left."""

    def compact(self, needed_bytes: int) -> Mapping[str, object]:
        """Move weights until ``needed_bytes`` that are free are in one piece.

        Return the handles of those that were moved, which replace all from before, and errors for those that were lost. For
        whoever uses the handles, while the mover waits.
        """

    def trim(self) -> None:
        """Give back to the system what was let go of and is kept for what comes next."""

    def audit(self) -> None:
        """Compare the books with what is there, and log what does not fit."""

    def compare(self, limit_bytes: int) -> Sequence[str]:
        """Compare weights in host memory with their checksums, the next ones each time, until so many bytes were read.

        Return those that differ.
        """

    def facts(self) -> Mapping[str, int]:
        """Return what an operator wants to know, in bytes. Any thread."""

    def keep(self, graph: Graph, recipes: Mapping[str, Recipe], evicts: bool = True) -> None:
        """Write the weights of a step to disk as they are needed, where that is done, in place of others if it ``evicts``.

        Any thread; raises what reading raises.
        """

    def forget(self, digests: Iterable[str]) -> None:
        """Remove from there what no model has any more. Any thread."""

    def calibrate(self, verdicts: Verdicts) -> float | None:
        """Find out, once on a machine, how the disk is read best; return the bytes per second, if known. Any thread."""

    def scrub(self, pause: Callable[[], object]) -> None:
        """Read all that is kept on disk, with a pause after each piece; what is damaged is forgotten. Any thread."""


def reader(source: Source, weight: Weight) -> Callable[[memoryview], None]:
    """Return the function that writes a weight's bytes, checked, where it is told to."""
    return lambda target: source.read_blob(weight.blob, target, weight.crc32)


def packed_from_store(device: Device, source: Source, recipe: Recipe) -> Any:
    """Return the handle of a packed weight, made of what the store has."""
    return device.new_packed(recipe, [reader(source, each) for each in recipe.sources])


def outcome_of(wanted: Wanted, bring: Callable[[Wanted], object]) -> object:
    """Return what ``bring`` does, or as a TrunklineError what it raises."""
    # Errors are made anew, without trace, cause or context: the frames those hold on to hold the bytes that were read,
    # which are outside the budget from here on.
    weight = wanted.weight
    failed: TrunklineError
    try:
        return bring(wanted)
    except (BlobMissing, BlobCorrupt):
        message = f"weight {weight.blob[:12]} is damaged or missing in the store; push the model again"
        failed = ModelCorrupt(message, digest=weight.blob)
    except TrunklineError as error:
        failed = anew(error)
    except OSError as error:
        failed = SidecarFault(f"the store cannot be read ({os.strerror(error.errno or 0)})", digest=weight.blob)
    failed.__context__ = None
    return failed
