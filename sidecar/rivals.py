"""Which policy suits what is being asked: two of them keep books beside the real ones, and the better one lately decides.

No rule known beforehand is best at everything: ``lru`` cannot be beaten where models are used in bursts, and keeps nothing of a
cycle over more models than fit; ``rate`` is the other way round. So each runs over the same leases in a residency of its own,
in which nothing is loaded. Part of the engine thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final

from sidecar.keeping import DEFAULT_PRIORITY
from sidecar.policies import POLICIES, Either, LeastOften, LeastRecentlyUsed
from sidecar.residency import Grant, Residency

# What of the bytes that a policy would have fetched still counts after one lease more: about the last 500 matter.
_KEPT: Final = 0.998
# A policy takes over when it would have fetched less by so many budgets: to change one's mind may cost as much as one.
_BETTER: Final = 1.0


def open_residency(budget_bytes: int, policy: str, clock: Callable[[], float] = time.monotonic) -> Residency:
    """Return a residency with the policy of this name."""
    if policy == Either.name:
        return AdaptiveResidency(budget_bytes, clock)
    return Residency(budget_bytes, POLICIES[policy](), clock)


class AdaptiveResidency(Residency):
    """Evicts as ``lru`` or as ``rate`` says, whichever would have fetched less of late.

    Its rivals know nothing of pins, of failed loads, nor of what an operator evicts or has to leave so that there is memory to
    compute with: those are nobody's choice.
    """

    def __init__(self, budget_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._either = Either([LeastRecentlyUsed(), LeastOften()])
        super().__init__(budget_bytes, self._either, clock)
        self._rivals = [Residency(budget_bytes, make(), clock) for make in (LeastRecentlyUsed, LeastOften)]
        # Bytes they would have fetched; the older, the less they count.
        self._fetched = [0.0 for _ in self._rivals]
        # Of all weights of all plans. As long as they fit together, nothing ever leaves, and there is nothing to compare.
        self._all_bytes = 0

    def add_plan(
        self, plan: str, weights: Mapping[str, int], *, priority: int = DEFAULT_PRIORITY, ttl_s: float | None = None
    ) -> None:
        for each in self._rivals:
            each.add_plan(plan, weights, priority=priority, ttl_s=ttl_s)
        self._all_bytes += sum(size_bytes for digest, size_bytes in weights.items() if digest not in self._group_of)
        super().add_plan(plan, weights, priority=priority, ttl_s=ttl_s)

    def remove_plan(self, plan: str) -> tuple[str, ...]:
        for each in self._rivals:
            each.remove_plan(plan)
        weights = self.weights(plan)
        freed = super().remove_plan(plan)
        self._all_bytes -= sum(size_bytes for digest, size_bytes in weights.items() if digest not in self._group_of)
        return freed

    def set_priority(self, plan: str, priority: int) -> None:
        for each in self._rivals:
            each.set_priority(plan, priority)
        super().set_priority(plan, priority)

    def set_ttl(self, plan: str, ttl_s: float | None) -> None:
        for each in self._rivals:
            each.set_ttl(plan, ttl_s)
        super().set_ttl(plan, ttl_s)

    def lease(self, *plans: str) -> Grant | None:
        grant = super().lease(*plans)
        if grant is not None and self._all_bytes > self.budget_bytes:
            self._compare(plans)
        return grant

    def expire(self) -> tuple[str, ...]:
        for each in self._rivals:
            each.expire()
        return super().expire()

    def _compare(self, plans: tuple[str, ...]) -> None:
        for number, rival in enumerate(self._rivals):
            grant = rival.lease(*plans)
            assert grant is not None, "nothing is leased there, so there is room"
            for digest in grant.fetch:
                rival.arrived(digest)
            for plan in plans:
                rival.release(plan)
            self._fetched[number] = _KEPT * self._fetched[number] + grant.missed_bytes
        best = min(range(len(self._rivals)), key=self._fetched.__getitem__)
        if self._fetched[self._either.chosen] - self._fetched[best] > _BETTER * self.budget_bytes:
            self._either.chosen = best

    def check_invariants(self) -> None:
        super().check_invariants()
        sizes = {digest: size_bytes for plan in self._plans.values() for digest, size_bytes in plan.weights.items()}
        assert self._all_bytes == sum(sizes.values()), "the bytes of all weights are wrong"
        for each in self._rivals:
            each.check_invariants()
