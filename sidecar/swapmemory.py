"""Weights in a span of a device that copies them there (``sidecar.devicetier``), with the host tier as a cache below it.

What is wanted is taken back if it still lies where it was let go of; else its bytes are copied from the host tier, and only what
is not there either is read, from block files or from the store. Both tiers have a budget of their own. The device's is kept by
whoever decides what leaves it; the host's is a cache's own business: what leaves the device may stay there.

Of a batch, as much goes through the host tier at one stroke as there is room for beside others that are under way; the rest goes
weight by weight.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from trunkline.errors import DeviceFault, TrunklineError

from sidecar.bundle import Weight
from sidecar.devicetier import DeviceTier, Span, aligned
from sidecar.errors import NoRoom, anew
from sidecar.hostcache import HostCache
from sidecar.ir import Graph
from sidecar.lowering import Recipe
from sidecar.memory import Batch, Scattered, Wanted
from sidecar.verdicts import Verdicts

log = logging.getLogger("trunkline.engine")


@dataclass(slots=True, eq=False)
class _Swap(Batch):
    """Weights on their way to the device. Nobody has a handle of any of them before it is ended: until then they may be moved.

    ``host`` are those that are in the host tier meanwhile, ``late`` come one by one, ``taken`` were on the device still.
    """

    taken: set[str] = field(default_factory=set)
    host: Batch | None = None
    late: list[Wanted] = field(default_factory=list)

    @property
    def absent(self) -> list[Wanted]:
        """Those that are to be copied, and have not failed."""
        return [each for each in self.missing if each.weight.digest not in self.taken]


class SwapMemory:
    """Weights on a device, and below it. They are plain: packed ones are a CPU's."""

    # The span is the device's for good.
    gives_back: Final = False

    def __init__(self, span: Span, host: HostCache) -> None:
        self._span = span
        self._tier = DeviceTier(span)
        self._host = host
        # Bytes that were found on the device still.
        self._kept_bytes = 0

    def size_bytes(self, weight: Weight) -> int:
        return aligned(weight.size_bytes)

    def is_in_host(self, digest: str) -> bool:
        return self._host.has(digest)

    def kept(self) -> Iterable[str]:
        """Return nothing: what an earlier engine had on the device is gone with it; the host tier is no part of this budget."""
        return ()

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        batch = _Swap(wanted)
        for each in wanted:
            if self._tier.take_back(each.weight.digest):
                batch.taken.add(each.weight.digest)
                batch.kept_bytes += each.weight.size_bytes
        for each in batch.absent:
            try:
                is_placed = self._tier.allocate(each.weight)
            except NoRoom as error:
                batch.found[each.weight.digest] = DeviceFault(error.message, **error.details)
                continue
            if not is_placed:
                self._take_down(wanted)
                raise Scattered(sum(aligned(each.weight.size_bytes) for each in wanted))
        self._kept_bytes += batch.kept_bytes
        together = self._host.choose(batch.absent)
        chosen = {each.weight.digest for each in together}
        batch.late = [each for each in batch.absent if each.weight.digest not in chosen]
        batch.host = self._host.begin(together)
        return batch

    def _take_down(self, wanted: Sequence[Wanted]) -> None:
        for each in wanted:
            if self._tier.holds(each.weight.digest):
                self._tier.free(each.weight.digest)

    def read(self, batch: Batch) -> None:
        assert isinstance(batch, _Swap)
        assert batch.host is not None
        self._host.read(batch.host)

    def end(self, batch: Batch) -> list[object]:
        assert isinstance(batch, _Swap)
        assert batch.host is not None
        self._copy(batch, batch.host)
        for each in batch.late:
            self._copy_alone(batch, each)
        if copied := batch.absent:
            mark = self._span.mark()
            for each in copied:
                self._tier.seal(each.weight.digest, mark)
        for each in batch.missing:
            key = each.weight.digest
            batch.found[key] = self._tier.handle(key) or DeviceFault(f"weight {key[:12]} was lost on the device; try again")
        return [batch.found[each.weight.digest] for each in batch.wanted]

    def _copy_alone(self, batch: _Swap, wanted: Wanted) -> None:
        size_bytes, largest_bytes = wanted.weight.size_bytes, self._host.largest_bytes
        if size_bytes > largest_bytes:
            error = DeviceFault(
                f"weight {wanted.weight.digest[:12]} takes {size_bytes} bytes, and at most {largest_bytes} pass through the host "
                "tier at a time, half of its budget; raise --host-budget",
                size_bytes=size_bytes,
                largest_bytes=largest_bytes,
            )
            self._fail(batch, wanted, error)
            return
        alone = self._host.begin([wanted])
        self._host.read(alone)
        self._copy(batch, alone)

    def _copy(self, batch: _Swap, host: Batch) -> None:
        """Have what is in the host tier now copied to the device, and let go of it there."""
        contents = self._host.end(host)
        batch.in_host_s = max(batch.in_host_s, host.in_host_s)
        for each, content in zip(host.wanted, contents, strict=True):
            if isinstance(content, TrunklineError):
                self._fail(batch, each, content)
            else:
                assert isinstance(content, memoryview)
                try:
                    self._span.write(self._tier.offset(each.weight.digest), content)
                except DeviceFault as error:
                    # The frames that it came through hold what is not theirs from here on.
                    self._fail(batch, each, anew(error))
            self._host.let_go(each.weight.digest)

    def _fail(self, batch: _Swap, wanted: Wanted, error: TrunklineError) -> None:
        batch.found[wanted.weight.digest] = error
        self._tier.free(wanted.weight.digest)

    def free(self, digests: Iterable[str]) -> None:
        held = False
        for digest in digests:
            if self._tier.holds(digest):
                self._tier.free(digest)
                held = True
            self._host.let_go(digest)
        if held:
            self._span.let_go()

    def compact(self, needed_bytes: int) -> Mapping[str, object]:
        moved = self._tier.compact(needed_bytes)
        log.info("%d weights were moved on the device, so that %d bytes are free in one piece", len(moved), needed_bytes)
        return moved

    def trim(self) -> None:
        self._host.trim()

    def audit(self) -> None:
        try:
            self.check_invariants()
        except AssertionError as error:
            log.error("the books of the device tier or its cache do not balance: %s; restart the sidecar, and report it", error)

    def check_invariants(self) -> None:
        """Raise AssertionError when the books of one of the tiers do not balance."""
        self._tier.check_invariants()
        self._host.check_invariants()

    def compare(self, limit_bytes: int) -> Sequence[str]:
        return self._host.compare(limit_bytes)

    def facts(self) -> Mapping[str, int]:
        host = self._host.facts()
        return {
            "weight_bytes": self._tier.allocated_bytes,
            "compactions": self._tier.compactions,
            "compacted_bytes": self._tier.compacted_bytes,
            "host_budget_bytes": self._host.budget_bytes,
            "host_weight_bytes": host["weight_bytes"],
            "host_spare_bytes": host["spare_bytes"],
            # Where the bytes that were brought in came from.
            "kept_bytes": self._kept_bytes,
            "host_kept_bytes": host["kept_bytes"],
            "block_file_bytes": host["block_file_bytes"],
            "store_bytes": host["store_bytes"],
            **{key: value for key, value in host.items() if key.startswith("block_files_")},
        }

    def keep(self, graph: Graph, recipes: Mapping[str, Recipe], evicts: bool = True) -> None:
        self._host.keep(graph, recipes, evicts)

    def forget(self, digests: Iterable[str]) -> None:
        self._host.forget(digests)

    def calibrate(self, verdicts: Verdicts) -> float | None:
        return self._host.calibrate(verdicts)

    def scrub(self, pause: Callable[[], object]) -> None:
        self._host.scrub(pause)
