"""The trace: which models were leased when, and what that cost in bytes; the latest leases, in a ring. Pure: no I/O, no torch.

It describes all that is needed to replay it elsewhere, without the store: each plan's weights, and their sizes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

LIMIT: Final = 10_000


class Lease(NamedTuple):
    """``time_s`` is since the engine started. ``evicted_bytes`` are those that left to make room for it."""

    time_s: float
    plans: tuple[str, ...]
    hit_bytes: int
    missed_bytes: int
    evicted_bytes: int


class Recorder:
    """The latest leases, at most ``limit``."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._leases: deque[Lease] = deque(maxlen=limit)
        # Sizes by digest of the plans that were leased: some of them are gone when somebody asks.
        self._weights: dict[str, Mapping[str, int]] = {}
        self._recorded = 0

    def record(self, lease: Lease, weights: Sequence[Mapping[str, int]]) -> None:
        """Keep a lease; ``weights`` are the sizes in bytes by digest of its plans, in the order of use."""
        self._leases.append(lease)
        self._weights.update(zip(lease.plans, weights, strict=True))
        self._recorded += 1
        if self._recorded % LIMIT == 0:
            kept = {plan for each in self._leases for plan in each.plans}
            self._weights = {plan: weights for plan, weights in self._weights.items() if plan in kept}

    def to_plain(self, limit: int = LIMIT) -> dict[str, object]:
        """Return the latest ``limit`` leases, oldest first, and the plans that are in them.

        ``weights`` are sizes in bytes; ``models`` name their weights, and ``leases`` their models, by number, from 0 on.
        """
        leases = list(self._leases)[max(0, len(self._leases) - limit) :]
        plans = {plan: number for number, plan in enumerate(dict.fromkeys(plan for lease in leases for plan in lease.plans))}
        sizes = {digest: size_bytes for plan in plans for digest, size_bytes in self._weights[plan].items()}
        numbers = {digest: number for number, digest in enumerate(sizes)}
        return {
            "recorded": self._recorded,
            "weights": list(sizes.values()),
            "models": {plan: [numbers[digest] for digest in self._weights[plan]] for plan in plans},
            "leases": [(round(lease[0], 6), [plans[plan] for plan in lease[1]], *lease[2:]) for lease in leases],
        }
