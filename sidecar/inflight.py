"""How much of each tenant is under way, on all devices together, and the caps on that. For the schedulers of several engines.

The only state that engines' threads share: two numbers for each tenant, behind a lock that is held for a comparison and an
addition.
"""

from __future__ import annotations

import threading

from trunkline.errors import QuotaExceeded

from sidecar.tenants import Tenant


class InFlight:
    """Requests under way and the bytes of their inputs, by tenant. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_tenant: dict[str, tuple[int, int]] = {}

    def of(self, name: str) -> tuple[int, int]:
        """Return how many requests of a tenant are under way, and the bytes of their inputs."""
        return self._by_tenant.get(name, (0, 0))

    def check(self, tenant: Tenant, input_bytes: int, retry_after_s: float) -> None:
        """Raise QuotaExceeded when one more request is over what a tenant may have under way.

        ``retry_after_s`` is when to try again.
        """
        count, size_bytes = self.of(tenant.name)
        if count >= tenant.in_flight_limit:
            raise QuotaExceeded(
                f"{count} requests of {tenant.name} are under way, its quota is {tenant.in_flight_limit}; try again shortly",
                in_flight_count=count,
                limit_count=int(tenant.in_flight_limit),
                retry_after_s=retry_after_s,
            )
        if count and size_bytes + input_bytes > tenant.queued_limit_bytes:
            raise QuotaExceeded(
                f"the requests of {tenant.name} under way have {size_bytes} bytes of inputs, with {input_bytes} more "
                f"that is over its quota of {tenant.queued_limit_bytes}; try again shortly",
                queued_bytes=size_bytes,
                limit_bytes=int(tenant.queued_limit_bytes),
                retry_after_s=retry_after_s,
            )

    def enter(self, tenant: Tenant, input_bytes: int, retry_after_s: float) -> None:
        """Count a request in. Raises QuotaExceeded: others may have entered since it was checked."""
        with self._lock:
            self.check(tenant, input_bytes, retry_after_s)
            self._add(tenant.name, 1, input_bytes)

    def follow(self, tenant: Tenant, input_bytes: int) -> None:
        """Count a part of a request in that is under way."""
        with self._lock:
            self._add(tenant.name, 1, input_bytes)

    def leave(self, name: str, input_bytes: int) -> None:
        """Count a request out."""
        with self._lock:
            self._add(name, -1, -input_bytes)

    def _add(self, name: str, count: int, input_bytes: int) -> None:
        now, now_bytes = self.of(name)
        if now + count:
            self._by_tenant[name] = now + count, now_bytes + input_bytes
        else:
            del self._by_tenant[name]
