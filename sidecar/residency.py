"""Which weights are in memory, and which must leave: a byte budget that is never exceeded. Pure: no I/O, no torch.

A *plan* is the set of weights one model needs, named by an id of the caller's. A *lease* on a plan forbids the
eviction of its weights; it is taken before they are loaded and given back after the reply. Weights that several plans need
count once. When room is needed, whole plans leave, least recently leased first, and of those only the weights
that no plan which stays is using: the LRU of ShmFaas, made aware of sharing.

The caller does what this module decides: it drops the weights named as evicted *before* it allocates the ones named as
missing, so the bytes in memory never pass the budget. Owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trunkline.errors import BudgetExceeded


@dataclass(frozen=True)
class Grant:
    """A lease was taken. Drop ``evict`` first, then load ``fetch``; the plan is ready when all of it has arrived."""

    evict: tuple[str, ...]
    fetch: tuple[str, ...]


_NOTHING_TO_DO = Grant((), ())


class Residency:
    """Weights in memory under one budget.

    A weight is *committed* from the moment a lease orders it until it is evicted; it is *resident* once ``arrived`` was
    told of it. Leased or pinned plans are never chosen for eviction.
    """

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._plans: dict[str, dict[str, int]] = {}
        # Plans whose weights are committed, least recently leased first; a dict keeps that order.
        self._held: dict[str, None] = {}
        self._leases: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._committed: dict[str, int] = {}
        self._arrived: set[str] = set()
        self.committed_bytes = 0
        # Since the start.
        self.evicted_bytes = 0

    def add_plan(self, plan: str, weights: Mapping[str, int]) -> None:
        """Register a plan: size in bytes by digest. Registering it again is harmless."""
        self._plans.setdefault(plan, dict(weights))

    def remove_plan(self, plan: str) -> tuple[str, ...]:
        """Forget an unleased plan and its pin; return the weights to drop."""
        assert not self._leases.get(plan), "a leased plan cannot be removed"
        self._pinned.discard(plan)
        freed = self._let_go([plan]) if plan in self._held else ()
        del self._plans[plan]
        return freed

    def lease(self, *plans: str) -> Grant | None:
        """Take a lease on each of ``plans`` at one stroke; None when they would fit but for leases that others hold now.

        Raises BudgetExceeded when they cannot fit even with every other lease returned. Leases of one call that were taken
        one by one could wait for each other without end.
        """
        weights: dict[str, int] = {}
        for plan in plans:
            if plan not in self._held:
                weights |= self._plans[plan]
        missing = [digest for digest in weights if digest not in self._committed]
        shortfall = self.committed_bytes + sum(weights[digest] for digest in missing) - self.budget_bytes
        victims = self._choose_victims(shortfall, plans)
        if victims is None:
            self._refuse_the_impossible(plans)
            return None
        evicted = self._let_go(victims, keep=weights.keys())
        for digest in missing:
            self._committed[digest] = weights[digest]
            self.committed_bytes += weights[digest]
        for plan in plans:
            # To the recent end.
            self._held.pop(plan, None)
            self._held[plan] = None
            self._leases[plan] = self._leases.get(plan, 0) + 1
        return Grant(evicted, tuple(missing)) if evicted or missing else _NOTHING_TO_DO

    def _refuse_the_impossible(self, plans: Sequence[str]) -> None:
        weights = {digest: size for plan in plans for digest, size in self._plans[plan].items()}
        plan_bytes = sum(weights.values())
        if plan_bytes > self.budget_bytes:
            raise BudgetExceeded(
                f"the weights of {_named(plans)} take {plan_bytes} bytes, the memory budget is {self.budget_bytes}; start the "
                "sidecar with a larger memory budget, or deploy a smaller model",
                needed_bytes=plan_bytes,
                budget_bytes=self.budget_bytes,
            )
        pinned = dict(weights)
        for other in self._pinned:
            pinned.update(self._plans[other])
        together_bytes = sum(pinned.values())
        if together_bytes > self.budget_bytes:
            raise BudgetExceeded(
                f"{_named(plans)} and the pinned models take {together_bytes} bytes together, the memory budget is "
                f"{self.budget_bytes}; unpin a model or raise the budget",
                needed_bytes=together_bytes,
                budget_bytes=self.budget_bytes,
            )

    def _choose_victims(self, shortfall: int, wanted: Sequence[str]) -> list[str] | None:
        """Return the plans to let go, least recently leased first, or None when that would not free enough."""
        victims: list[str] = []
        if shortfall <= 0:
            return victims
        staying = dict.fromkeys((*self._held, *wanted))
        freed = 0
        for plan in list(self._held):
            if plan in wanted or self._leases.get(plan) or plan in self._pinned:
                continue
            del staying[plan]
            victims.append(plan)
            freed += sum(
                size for digest, size in self._plans[plan].items() if not any(digest in self._plans[other] for other in staying)
            )
            if freed >= shortfall:
                return victims
        return None

    def _let_go(self, plans: Iterable[str], keep: Iterable[str] = ()) -> tuple[str, ...]:
        candidates: set[str] = set()
        for plan in plans:
            del self._held[plan]
            candidates.update(self._plans[plan])
        candidates.difference_update(keep)
        for plan in self._held:
            candidates.difference_update(self._plans[plan])
        for digest in candidates:
            size_bytes = self._committed.pop(digest)
            self.committed_bytes -= size_bytes
            self.evicted_bytes += size_bytes
            self._arrived.discard(digest)
        return tuple(sorted(candidates))

    def arrived(self, digest: str) -> None:
        """Note that a fetched weight is in memory."""
        assert digest in self._committed, "a weight arrived that nobody ordered"
        self._arrived.add(digest)

    def release(self, plan: str) -> None:
        """Give one lease back."""
        assert self._leases.get(plan, 0) > 0, "a lease was given back twice"
        self._leases[plan] -= 1
        if not self._leases[plan]:
            del self._leases[plan]

    def evict(self, plan: str) -> tuple[str, ...]:
        """Let an unleased plan go now; return the weights to drop. Weights in use by others stay."""
        assert not self._leases.get(plan), "a leased plan cannot be evicted"
        return self._let_go([plan]) if plan in self._held else ()

    def pin(self, plan: str) -> None:
        """Forbid the eviction of a plan until it is unpinned. Pinning alone loads nothing.

        Raises BudgetExceeded when the pinned plans would not fit together.
        """
        self._refuse_the_impossible([plan])
        self._pinned.add(plan)

    def unpin(self, plan: str) -> None:
        """Allow eviction again."""
        self._pinned.discard(plan)

    def is_ready(self, plan: str) -> bool:
        """Say whether every weight of the plan is in memory."""
        return self._plans[plan].keys() <= self._arrived

    def is_held(self, plan: str) -> bool:
        """Say whether the plan's weights are in memory or on their way."""
        return plan in self._held

    def is_pinned(self, plan: str) -> bool:
        return plan in self._pinned

    def lease_count(self, plan: str) -> int:
        return self._leases.get(plan, 0)

    def is_resident(self, digest: str) -> bool:
        return digest in self._arrived

    @property
    def pinned_bytes(self) -> int:
        """Bytes in memory that pins protect."""
        pinned = {digest for plan in self._pinned for digest in self._plans[plan]}
        return sum(self._committed.get(digest, 0) for digest in pinned)

    def check_invariants(self) -> None:
        """Raise AssertionError when the books do not balance."""
        assert self.committed_bytes == sum(self._committed.values()), "committed_bytes disagrees with the weights"
        assert self.committed_bytes <= self.budget_bytes, (
            f"{self.committed_bytes} bytes are committed, the budget is {self.budget_bytes}"
        )
        needed = {digest for plan in self._held for digest in self._plans[plan]}
        assert needed == self._committed.keys(), "committed weights are not those of the held plans"
        assert self._arrived <= self._committed.keys(), "a weight is in memory that is not committed"
        assert self._leases.keys() <= self._held.keys(), "a leased plan is not held"
        assert all(count > 0 for count in self._leases.values())


def _named(plans: Sequence[str]) -> str:
    return "the model" if len(plans) == 1 else f"the {len(plans)} models"
