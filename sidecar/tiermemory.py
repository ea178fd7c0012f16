"""Weights in the host tier (``sidecar.hosttier``), where the operators of a CPU work on them in place.

They come from block files where they are in one, the whole of a step at one stroke, else from the store; and what an engine that
is no more has left there is taken as it is, once its checksum was compared.
"""

from __future__ import annotations

import bisect
import logging
import math
import struct
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from isal import isal_zlib
from trunkline.arena import page_aligned
from trunkline.errors import DeviceFault, TrunklineError

from sidecar.blockfiles import BlockFiles, Entry
from sidecar.bundle import Weight
from sidecar.disk import BUFFERED_STRICT, DIRECT
from sidecar.errors import EntriesUnusable, NoRoom
from sidecar.hosttier import HostTier
from sidecar.ir import Graph
from sidecar.lowering import Recipe
from sidecar.memory import Batch, Wanted, outcome_of, packed_from_store, reader
from sidecar.ports import Device, Source
from sidecar.verdicts import Verdicts

log = logging.getLogger("trunkline.engine")

# What a block file keeps of an entry beside its bytes: their checksum, and of packed weights how to read them.
_CHECKSUM: Final = struct.Struct("<I")
# The name of what is known of the disk; another one when sources are chosen by another rule, so that the choice is made anew.
_READING: Final = "reading.2"
# Neither leaves anything in the page cache: memory that no budget counts.
SOURCES: Final = {source.name: source for source in (DIRECT, BUFFERED_STRICT)}


class TierMemory:
    """Weights in the host tier. ``keep`` may be called by any thread, and writes block files."""

    gives_back: Final = True

    def __init__(self, device: Device, source: Source, tier: HostTier, files: BlockFiles) -> None:
        self._device = device
        self._source = source
        self._tier = tier
        self._files = files
        # The last that was compared with its checksum.
        self._compared = ""
        # Where the bytes that were brought in came from.
        self._moved = {"kept_bytes": 0, "block_file_bytes": 0, "store_bytes": 0}

    def size_bytes(self, weight: Weight) -> int:
        return page_aligned(weight.size_bytes)

    def is_in_host(self, digest: str) -> bool:
        return False

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
                self._allocate(key, each.weight.size_bytes)
            except NoRoom as error:
                batch.found[key] = DeviceFault(error.message, **error.details)
                continue
            entry = self._files.find(key)
            if entry is not None and entry.size_bytes == each.weight.size_bytes:
                batch.entries[key] = entry
                batch.targets.append(self._tier.pages(key))
        return batch

    def _allocate(self, key: str, size_bytes: int) -> None:
        """Make room for a weight. Raises NoRoom."""
        self._tier.allocate(key, size_bytes)

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
            batch.found[key] = outcome_of(each, self._from_store) if handle is None else handle
            if isinstance(batch.found[key], TrunklineError):
                self._tier.free(key)
            batch.in_host_s = time.monotonic()
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

    def compact(self, needed_bytes: int) -> Mapping[str, object]:
        """Do nothing: what is in pieces is mapped side by side."""
        return {}

    def trim(self) -> None:
        self._tier.trim()

    def audit(self) -> None:
        try:
            self._tier.check_invariants()
        except AssertionError as error:
            log.error("weights in shared memory and their ledger do not agree: %s; restart the sidecar, and report it", error)

    def compare(self, limit_bytes: int) -> Sequence[str]:
        sizes = self._tier.keys()
        keys = sorted(sizes)
        first = bisect.bisect_right(keys, self._compared)
        altered, done_bytes = [], 0
        for key in keys[first:] + keys[:first]:
            if done_bytes >= limit_bytes:
                break
            self._compared = key
            done_bytes += sizes[key]
            if not self._tier.is_whole(key):
                altered.append(key)
        return altered

    def facts(self) -> Mapping[str, int]:
        return {
            "weight_bytes": self._tier.allocated_bytes,
            "spare_bytes": self._tier.spare_bytes,
            **self._moved,
            **self._files.facts(),
        }

    def keep(self, graph: Graph, recipes: Mapping[str, Recipe], evicts: bool = True) -> None:
        made: list[tuple[Entry, memoryview]] = []
        absent = {weight.digest: weight for weight in graph.weights if self._files.find(weight.digest) is None}
        if absent and not self._files.has_room([weight.size_bytes for weight in absent.values()], evicts=evicts):
            # To make them would be in vain.
            return
        for weight in absent.values():
            content = memoryview(bytearray(weight.size_bytes))
            meta, checksum = self._make(Wanted(weight, recipes.get(weight.digest)), content)
            made.append((Entry(weight.digest, weight.size_bytes, _CHECKSUM.pack(checksum) + meta), content))
        if made:
            self._files.write(made, evicts=evicts)

    def forget(self, digests: Iterable[str]) -> None:
        self._files.discard(digests)

    def calibrate(self, verdicts: Verdicts) -> float | None:
        known = verdicts.find("disk", _READING) or {}
        if known.get("source") not in SOURCES:
            found = self._files.calibrate()
            known = {"source": found.source.name, "bytes_per_s": found.bytes_per_s}
            verdicts.end("disk", _READING, known)
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
