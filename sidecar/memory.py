"""Memory for weights: where the bytes of those that are brought in lie, and how they get there. For the mover's thread.

*Device memory* is the device's own: each weight is read from the store, or packed from what the store has, and goes with its
handle. *Tier memory* is the host tier (``sidecar.hosttier``): on a CPU the operators work on it in place. Weights come from block
files where they are in one, the whole of a step at one stroke, else from the store; and what an engine that is no more has left
there is taken as it is, once its checksum was compared.

What is wanted at one stroke is a *batch*. It is brought in by three calls, ``begin``, ``read`` and ``end``, so that the disk
reads for one batch while another is got ready or made use of.
"""

from __future__ import annotations

import logging
import math
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

from isal import isal_zlib
from trunkline.arena import page_aligned
from trunkline.errors import DeviceFault, ModelCorrupt, SidecarFault, TrunklineError

from sidecar.blockfiles import BlockFiles, Entry
from sidecar.bundle import Weight
from sidecar.disk import BUFFERED_STRICT, DIRECT
from sidecar.errors import BlobCorrupt, BlobMissing, EntriesUnusable, NoRoom
from sidecar.hosttier import HostTier
from sidecar.ir import Graph
from sidecar.lowering import Recipe
from sidecar.ports import Device, Source
from sidecar.verdicts import Verdicts

log = logging.getLogger("trunkline.engine")

# What a block file keeps of an entry beside its bytes: their checksum, and of packed weights how to read them.
_CHECKSUM: Final = struct.Struct("<I")
# Neither leaves anything in the page cache: memory that no budget counts.
SOURCES: Final = {source.name: source for source in (DIRECT, BUFFERED_STRICT)}


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

    @property
    def missing(self) -> list[Wanted]:
        return [each for each in self.wanted if each.weight.digest not in self.found]


class Memory(Protocol):
    """What loads and the mover need. All that does not say otherwise belongs to the mover's thread, once it runs."""

    def size_bytes(self, weight: Weight) -> int:
        """Return the bytes that a weight takes of the budget. Any thread."""

    def kept(self) -> Iterable[str]:
        """Return the digests of weights that an earlier engine left here. Called once, before all else."""

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        """Make room for weights. Batches may be begun before others are ended."""

    def read(self, batch: Batch) -> None:
        """Have the disk read what is there as it is needed. Any thread, while nobody else has the batch."""

    def end(self, batch: Batch) -> list[object]:
        """Have all else read or made; return for each weight its handle, or a TrunklineError."""

    def free(self, digests: Iterable[str]) -> None:
        """Let go of weights of which no handle is left."""

    def trim(self) -> None:
        """Give back to the system what was let go of and is kept for what comes next."""

    def audit(self) -> None:
        """Compare the books with what is there, and log what does not fit."""

    def facts(self) -> Mapping[str, int]:
        """Return what an operator wants to know, in bytes. Any thread."""

    def keep(self, graph: Graph, recipes: Mapping[str, Recipe]) -> None:
        """Write the weights of a step to disk as they are needed, where that is done. Any thread; raises what reading raises."""

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


class DeviceMemory:
    """Weights in memory that the device allocates, one by one."""

    def __init__(self, device: Device, source: Source) -> None:
        self._device = device
        self._source = source

    def size_bytes(self, weight: Weight) -> int:
        return weight.size_bytes

    def kept(self) -> Iterable[str]:
        return ()

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        return Batch(wanted)

    def read(self, batch: Batch) -> None:
        """Do nothing: there are no block files."""

    def end(self, batch: Batch) -> list[object]:
        return [_outcome(each, self._bring) for each in batch.wanted]

    def _bring(self, wanted: Wanted) -> object:
        weight, recipe = wanted
        if recipe is not None:
            return packed_from_store(self._device, self._source, recipe)
        return self._device.new_weight(weight, reader(self._source, weight))

    def free(self, digests: Iterable[str]) -> None:
        """Do nothing: the bytes went with the handles."""

    def trim(self) -> None:
        """Do nothing, as before."""

    def audit(self) -> None:
        """Do nothing: the handles are the books."""

    def facts(self) -> Mapping[str, int]:
        return {}

    def keep(self, graph: Graph, recipes: Mapping[str, Recipe]) -> None:
        """Do nothing, nor below: device memory has nothing on disk but the store."""

    def forget(self, digests: Iterable[str]) -> None:
        pass

    def calibrate(self, verdicts: Verdicts) -> float | None:
        return None

    def scrub(self, pause: Callable[[], object]) -> None:
        pass


class TierMemory:
    """Weights in the host tier. ``keep`` may be called by any thread, and writes block files."""

    def __init__(self, device: Device, source: Source, tier: HostTier, files: BlockFiles) -> None:
        self._device = device
        self._source = source
        self._tier = tier
        self._files = files
        # Where the bytes that were brought in came from.
        self._moved = {"kept_bytes": 0, "block_file_bytes": 0, "store_bytes": 0}

    def size_bytes(self, weight: Weight) -> int:
        return page_aligned(weight.size_bytes)

    def kept(self) -> Iterable[str]:
        return self._tier.keys()

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        batch = Batch(wanted)
        for each in wanted:
            key = each.weight.digest
            if (key in self._tier or self._tier.take_back(key)) and (handle := self._taken_over(each)) is not None:
                batch.found[key] = handle
                batch.kept_bytes += each.weight.size_bytes
        self._moved["kept_bytes"] += batch.kept_bytes
        for each in batch.missing:
            key = each.weight.digest
            try:
                self._tier.allocate(key, each.weight.size_bytes)
            except NoRoom as error:
                batch.found[key] = DeviceFault(error.message, **error.details)
                continue
            entry = self._files.find(key)
            if entry is not None and entry.size_bytes == each.weight.size_bytes:
                batch.entries[key] = entry
                batch.targets.append(self._tier.pages(key))
        return batch

    def read(self, batch: Batch) -> None:
        try:
            self._files.read([*batch.entries], batch.targets)
        except EntriesUnusable as error:
            for key in error.keys:
                del batch.entries[key]

    def end(self, batch: Batch) -> list[object]:
        # Before any of its pages is let go of.
        batch.targets.clear()
        for each in batch.missing:
            key = each.weight.digest
            handle = self._from_file(each, batch.entries[key]) if key in batch.entries else None
            batch.found[key] = _outcome(each, self._from_store) if handle is None else handle
            if isinstance(batch.found[key], TrunklineError):
                self._tier.free(key)
        return [batch.found[each.weight.digest] for each in batch.wanted]

    def _taken_over(self, wanted: Wanted) -> object | None:
        """Return the handle of a weight that is in the tier already, None where it is of no use; it is freed then."""
        key = wanted.weight.digest
        entry = self._files.find(key)
        if wanted.recipe is not None and (entry is None or _checksum(entry) != self._tier.checksum(key)):
            # Only its block file says how it is laid out; and that may be of another processor's than the bytes are.
            self._tier.free(key)
            return None
        if not self._tier.check(key):
            return None
        try:
            handle = self._over(wanted, b"" if entry is None else _meta(entry))
        except ValueError as error:
            log.error("packed weight %s cannot be used as it lies in memory (%s); it is made anew", key[:12], error)
            self._tier.free(key)
            return None
        return handle

    def _over(self, wanted: Wanted, meta: bytes) -> object:
        """Return the handle of a weight's bytes in the tier. Raises ValueError when what is said of them does not fit them."""
        room = self._tier.view(wanted.weight.digest)
        if wanted.recipe is None:
            return self._device.over(room, wanted.weight)
        return self._device.packed_over(meta, room)

    def _from_file(self, wanted: Wanted, entry: Entry) -> object | None:
        """Return the handle of what was read from a block file, None where it is of no use."""
        try:
            handle = self._over(wanted, _meta(entry))
        except ValueError as error:
            log.error("packed weight %s cannot be used as it lies on disk (%s); it is made anew", entry.key[:12], error)
            self._files.discard([entry.key])
            return None
        self._tier.seal(entry.key, _checksum(entry))
        self._moved["block_file_bytes"] += entry.size_bytes
        return handle

    def _from_store(self, wanted: Wanted) -> object:
        weight, recipe = wanted
        self._moved["store_bytes"] += sum(each.size_bytes for each in (recipe.sources if recipe is not None else (weight,)))
        meta, checksum = self._make(wanted, self._tier.view(weight.digest))
        self._tier.seal(weight.digest, checksum)
        return self._over(wanted, meta)

    def _make(self, wanted: Wanted, target: memoryview) -> tuple[bytes, int]:
        """Write the bytes of a weight, made of what the store has; return how they are to be read, and their checksum."""
        weight, recipe = wanted
        if recipe is None:
            reader(self._source, weight)(target)
            return b"", weight.crc32
        flat = self._device.flatten(packed_from_store(self._device, self._source, recipe))
        if flat.size_bytes != weight.size_bytes:
            raise DeviceFault(
                f"packed weight {weight.digest[:12]} takes {flat.size_bytes} bytes instead of {weight.size_bytes}; remove the "
                "folder verdicts from the store and start the sidecar again",
                size_bytes=flat.size_bytes,
            )
        flat.copy_to(target)
        return flat.meta, isal_zlib.crc32(target)

    def free(self, digests: Iterable[str]) -> None:
        for digest in digests:
            if self._tier.holds(digest):
                self._tier.free(digest)

    def trim(self) -> None:
        self._tier.trim()

    def audit(self) -> None:
        try:
            self._tier.check_invariants()
        except AssertionError as error:
            log.error("weights in shared memory and their ledger do not agree: %s; restart the sidecar, and report it", error)

    def facts(self) -> Mapping[str, int]:
        return {"weight_bytes": self._tier.allocated_bytes, "spare_bytes": self._tier.spare_bytes, **self._moved}

    def keep(self, graph: Graph, recipes: Mapping[str, Recipe]) -> None:
        made: list[tuple[Entry, memoryview]] = []
        for weight in graph.weights:
            if self._files.find(weight.digest) is not None:
                continue
            content = memoryview(bytearray(weight.size_bytes))
            meta, checksum = self._make(Wanted(weight, recipes.get(weight.digest)), content)
            made.append((Entry(weight.digest, weight.size_bytes, _CHECKSUM.pack(checksum) + meta), content))
        if made:
            self._files.write(made)

    def forget(self, digests: Iterable[str]) -> None:
        self._files.discard(digests)

    def calibrate(self, verdicts: Verdicts) -> float | None:
        known = verdicts.find("disk", "reading") or {}
        if known.get("source") not in SOURCES:
            found = self._files.calibrate()
            known = {"source": found.source.name, "bytes_per_s": found.bytes_per_s}
            verdicts.end("disk", "reading", known)
        self._files.source = SOURCES[known["source"]]
        figures = known.get("bytes_per_s")
        pace = figures.get(known["source"]) if isinstance(figures, dict) else None
        return pace if isinstance(pace, float) and 0 < pace < math.inf else None

    def scrub(self, pause: Callable[[], object]) -> None:
        self._files.scrub(pause)


def _checksum(entry: Entry) -> int:
    (checksum,) = _CHECKSUM.unpack_from(entry.meta)
    return int(checksum)


def _meta(entry: Entry) -> bytes:
    return entry.meta[_CHECKSUM.size :]


def memory_of(device: Device, source: Source, segment: int, folder: Path) -> Memory:
    """Return the memory that suits a device: ``segment`` is a descriptor of what outlives us, ``folder`` for block files.

    Only a CPU works on the host tier in place, and packed weights only lie there where this torch can tell their bytes.
    """
    if not device.works_in_place:
        return DeviceMemory(device, source)
    return TierMemory(device, source, HostTier(segment), BlockFiles(folder, *device.layout_facts()))


def _outcome(wanted: Wanted, bring: Callable[[Wanted], object]) -> object:
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
        failed = type(error)(error.message, **error.details)
    except OSError as error:
        failed = SidecarFault(f"the store cannot be read ({os.strerror(error.errno or 0)})", digest=weight.blob)
    failed.__context__ = None
    return failed
