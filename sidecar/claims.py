"""Claims: which models a tenant uses, and that what they have in memory stays within its quota.

A tenant claims a model by using it, and for as long as the model has weights in memory. A weight that several of its models use
counts once; one that several tenants use counts for each of them. Who would be over its quota pays with its own: of the models
that it claims, those that it has not used for longest leave memory, or, where another tenant claims them as well, are no longer
its. So whoever asks for more models than it may have in memory keeps nobody waiting but itself. Part of the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from trunkline.errors import BudgetExceeded

from sidecar.residency import Residency
from sidecar.tenants import Tenant


class Claims:
    """The plans that each tenant uses, in the order of its last use; as long as some tenant has a quota of resident bytes."""

    def __init__(self, residency: Residency) -> None:
        self._residency = residency
        self._plans: dict[str, dict[str, None]] = {}
        self._limited = False

    def use(self, tenants: Iterable[Tenant]) -> None:
        """Take up what an operator says of all tenants."""
        known = {tenant.name: tenant for tenant in tenants}
        self._limited = any(tenant.resident_limit_bytes != math.inf for tenant in known.values())
        self._plans = {name: claimed for name, claimed in self._plans.items() if self._limited and name in known}

    def prune(self) -> None:
        """Forget claims to plans of which nothing is in memory any more. To be called whenever weights have left."""
        for claimed in self._plans.values():
            for plan in [plan for plan in claimed if not self._has_weights(plan)]:
                del claimed[plan]

    def _has_weights(self, plan: str) -> bool:
        return plan in self._residency and any(map(self._residency.is_committed, self._residency.weights(plan)))

    def make_room(self, tenant: Tenant, plans: Sequence[str]) -> tuple[str, ...] | None:
        """Make room for plans in a tenant's quota; return the weights that had to leave for it.

        None, and nothing changes, while requests of its own hold what would have to leave. Raises BudgetExceeded when the plans
        have no room in its quota even by themselves.
        """
        if not self._limited:
            return ()
        claimed = self._plans.setdefault(tenant.name, {})
        # Of a model that is no more, nothing has left memory if others have all of its weights.
        for plan in [plan for plan in claimed if plan not in self._residency]:
            del claimed[plan]
        leaving = [] if tenant.resident_limit_bytes == math.inf else self._choose(tenant, claimed, plans)
        # Others have use for what they claim.
        evicted = [plan for plan in leaving if sum(plan in others for others in self._plans.values()) == 1]
        if any(map(self._residency.lease_count, evicted)):
            return None
        freed = [digest for plan in evicted for digest in self._residency.evict(plan, "quota")]
        for plan in leaving:
            del claimed[plan]
        return tuple(freed)

    def claim(self, tenant: Tenant, plans: Sequence[str]) -> None:
        """Note that a tenant has leased plans for which there was room."""
        if self._limited:
            claimed = self._plans.setdefault(tenant.name, {})
            for plan in plans:
                # The latest last.
                claimed.pop(plan, None)
                claimed[plan] = None

    def _choose(self, tenant: Tenant, claimed: dict[str, None], plans: Sequence[str]) -> list[str]:
        """Return the claims that have to go. Pinned models are the operator's, and nobody's burden."""
        limit_bytes = tenant.resident_limit_bytes
        own_plans = [plan for plan in plans if not self._residency.is_pinned(plan)]
        sizes = {digest: size_bytes for plan in own_plans for digest, size_bytes in self._residency.weights(plan).items()}
        taken_bytes = sum(sizes.values())
        if taken_bytes > limit_bytes:
            raise BudgetExceeded(
                f"the weights of {'the model' if len(plans) == 1 else f'the {len(plans)} models'} take {taken_bytes} bytes, "
                f"{tenant.name} may have {limit_bytes} in memory; ask the operator for more",
                needed_bytes=taken_bytes,
                budget_bytes=int(limit_bytes),
            )
        # What was used last stays; from the first on that does not fit beside it, all goes.
        leaving: list[str] = []
        for plan in reversed([plan for plan in claimed if plan not in plans and not self._residency.is_pinned(plan)]):
            own = {
                digest: size_bytes
                for digest, size_bytes in self._residency.weights(plan).items()
                if digest not in sizes and self._residency.is_committed(digest)
            }
            own_bytes = sum(own.values())
            if leaving or taken_bytes + own_bytes > limit_bytes:
                leaving.append(plan)
            else:
                sizes |= own
                taken_bytes += own_bytes
        return leaving
