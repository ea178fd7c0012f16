"""The host tier as a cache, for a device that copies weights: what left the device may still be here, and need not be read again.

It has a budget of its own, and what was used longest ago leaves when there is no room. The handle of a weight is its bytes, which
stay until they are let go of. It outlives the engine, as on a CPU: the next one finds here what the device had.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from trunkline.arena import page_aligned

from sidecar.blockfiles import BlockFiles
from sidecar.errors import NoRoom
from sidecar.hosttier import HostTier
from sidecar.memory import Batch, Wanted
from sidecar.ports import Device, Source
from sidecar.tiermemory import TierMemory


class HostCache(TierMemory):
    """Bytes of weights. A batch that was ended is to be let go of, weight by weight."""

    def __init__(self, device: Device, source: Source, tier: HostTier, files: BlockFiles) -> None:
        super().__init__(device, source, tier, files)
        # Those that are whole, what was used longest ago first.
        self._uses: dict[str, None] = dict.fromkeys(tier.keys())
        # Bytes of whole pages of those that were begun and not let go of.
        self._in_use: dict[str, int] = {}
        # What no model has any more, as told by other threads.
        self._unwanted: deque[str] = deque()

    @property
    def budget_bytes(self) -> int:
        return self._tier.budget_bytes

    @property
    def largest_bytes(self) -> int:
        """How large a weight may be. Batches under way have as much together, and no more: there is always room for one."""
        return self._tier.budget_bytes // 2

    def has(self, key: str) -> bool:
        """Say whether a weight is here whole, and may stay. Any thread."""
        return key in self._uses

    def choose(self, wanted: Sequence[Wanted]) -> list[Wanted]:
        """Return those that may be begun together, beside those that are in use."""
        room_bytes = self.largest_bytes - sum(self._in_use.values())
        chosen = []
        for each in wanted:
            size_bytes = page_aligned(each.weight.size_bytes)
            if size_bytes <= room_bytes:
                chosen.append(each)
                room_bytes -= size_bytes
        return chosen

    def begin(self, wanted: Sequence[Wanted]) -> Batch:
        while self._unwanted:
            if (key := self._unwanted.popleft()) not in self._in_use:
                self._evict(key)
        for each in wanted:
            self._in_use[each.weight.digest] = page_aligned(each.weight.size_bytes)
        return super().begin(wanted)

    def _allocate(self, key: str, size_bytes: int) -> None:
        while True:
            try:
                self._tier.allocate(key, size_bytes)
                return
            except NoRoom:
                # Whatever it is that there is too little of: what leaves gives some back.
                idle = next((other for other in self._uses if other not in self._in_use), None)
                if idle is None:
                    raise
            self._evict(idle)

    def _evict(self, key: str) -> None:
        self._uses.pop(key, None)
        self.free([key])

    def _over(self, wanted: Wanted, meta: bytes) -> object:
        return self._tier.view(wanted.weight.digest)

    def let_go(self, key: str) -> None:
        """Say that the bytes of a weight are not used for now. What is not whole is gone."""
        self._in_use.pop(key, None)
        self._uses.pop(key, None)
        if key in self._tier:
            self._uses[key] = None
        elif self._tier.holds(key):
            self._tier.free(key)

    def forget(self, digests: Iterable[str]) -> None:
        unwanted = list(digests)
        super().forget(unwanted)
        self._unwanted.extend(unwanted)

    def check_invariants(self) -> None:
        """Raise AssertionError when something is in the tier that could never leave it, or the tier's books do not balance."""
        self._tier.check_invariants()
        assert self._tier.keys().keys() <= self._uses.keys() | self._in_use.keys(), "a weight could never leave"
