"""Room to compute, shared out: half of the activation budget is reserved for tenants by their weights, the rest is for all.

What a tenant has beyond its reserve it takes from the common half, so that nobody's growth takes what another was promised. Who
waits for room is waited for: meanwhile nobody else gets any that is common. Pure; owned by the engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from sidecar.tenants import Tenant

_RESERVED: Final = 0.5


class Reserves:
    """``budget_bytes`` shared out between the tenants of ``use``. A single tenant has all of it."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._reserves: dict[str, int] = {}

    def use(self, tenants: Iterable[Tenant]) -> None:
        """Share out anew."""
        weights = {tenant.name: tenant.weight for tenant in tenants}
        total = sum(weights.values())
        reserved = _RESERVED * self.budget_bytes if len(weights) > 1 else self.budget_bytes
        self._reserves = {name: int(reserved * weight / total) for name, weight in weights.items()}

    def most_bytes(self, tenant: str) -> int:
        """Return the most that a tenant can ever have at a time."""
        return self.budget_bytes - sum(reserve for name, reserve in self._reserves.items() if name != tenant)

    def fits(self, tenant: str, needed_bytes: int, taken: Mapping[str, int], waiting: bool) -> bool:
        """Say whether a tenant can have so many bytes beside those that are ``taken``; ``waiting``: others wait for room."""
        own = self._reserves.get(tenant, 0)
        after = {**taken, tenant: taken.get(tenant, 0) + needed_bytes}
        if after[tenant] <= own:
            return True
        common = self.budget_bytes - sum(self._reserves.values())
        beyond = sum(max(0, size_bytes - self._reserves.get(name, 0)) for name, size_bytes in after.items())
        return not waiting and beyond <= common
