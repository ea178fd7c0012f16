"""What memory is held for, and what would leave it next: what operators look at before they make room, and how they make it.

In the engine thread. What is told is of one device, under its name, so that several devices are told beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from trunkline.errors import InvalidInput

from sidecar.catalog import Catalog, Deployed
from sidecar.loads import Loads

# A trunk may be of a thousand models; so many of them are named.
_MOST_NAMES: Final = 16
_LARGEST_BYTES: Final = 2**50
# Of what the memory tells: where the bytes came from that were brought in.
_ORIGINS: Final = ("kept_bytes", "host_kept_bytes", "block_file_bytes", "store_bytes")


class Holdings:
    """Leases, pins, tiers, and the order in which weights leave. ``drop`` is the engine's."""

    def __init__(self, catalog: Catalog, loads: Loads, drop: Callable[[Sequence[str]], None]) -> None:
        self._catalog = catalog
        self._residency = catalog.residency
        self._loads = loads
        self._drop = drop

    def leases(self) -> dict[str, object]:
        """Return which models requests hold in memory, how many requests, and for how many seconds; and which are pinned."""
        residency, known = self._residency, list(self._catalog.all())
        return self._of_device(
            {
                "leases": [
                    self._named(deployed)
                    | {
                        "leases": residency.lease_count(deployed.plan),
                        "since_s": round(residency.leased_for_s(deployed.plan), 3),
                        "streaming": residency.is_streaming(deployed.plan),
                    }
                    for deployed in known
                    if residency.lease_count(deployed.plan)
                ],
                "pinned": [self._named(deployed) for deployed in known if residency.is_pinned(deployed.plan)],
            }
        )

    def _named(self, deployed: Deployed) -> dict[str, object]:
        return {
            "model": deployed.name,
            "version": deployed.bundle.version,
            "bytes": sum(self._residency.weights(deployed.plan).values()),
        }

    def residency(self, limit: int) -> dict[str, object]:
        """Return the tiers with their budgets, what was found and fetched, and the first ``limit`` of what would leave next."""
        residency = self._residency
        facts = self._catalog.memory.facts()
        names = {deployed.plan: deployed.name for deployed in self._catalog.all()}
        tiers = [{"tier": "device", "budget_bytes": residency.budget_bytes, "used_bytes": residency.committed_bytes}]
        for tier, budget, used in (
            ("host", "host_budget_bytes", "host_weight_bytes"),
            ("block_files", "block_files_limit_bytes", "block_files_taken_bytes"),
        ):
            if budget in facts:
                tiers.append({"tier": tier, "budget_bytes": facts[budget], "used_bytes": facts[used]})
        leaving = residency.leaving()
        return self._of_device(
            {
                "tiers": tiers,
                "pinned_bytes": residency.pinned_bytes,
                **residency.metrics(),
                "fetched": {key: facts[key] for key in _ORIGINS if key in facts},
                "leaving_bytes": sum(each.size_bytes for each in leaving),
                "leaving": [
                    {
                        "models": sorted(names[plan] for plan in each.plans)[:_MOST_NAMES],
                        "model_count": len(each.plans),
                        "weights": each.weight_count,
                        "bytes": each.size_bytes,
                        "priority": each.priority,
                        "idle_s": round(each.idle_s, 3),
                    }
                    for each in leaving[:limit]
                ],
            }
        )

    def relieve(self, free_bytes: object) -> dict[str, object]:
        """Have the weights leave that are worth least until so many bytes of the budget are free. Raises InvalidInput."""
        if isinstance(free_bytes, bool) or not isinstance(free_bytes, int) or not 0 < free_bytes <= _LARGEST_BYTES:
            raise InvalidInput(f"bytes must be an integer from 1 to {_LARGEST_BYTES}: how many are to be free")
        residency = self._residency
        before_bytes = residency.committed_bytes
        wanted_bytes = free_bytes - (residency.budget_bytes - before_bytes)
        if wanted_bytes > 0:
            self._drop(residency.relieve(wanted_bytes, "operator"))
            # Whoever says so wants the memory.
            self._loads.trim()
        return self._of_device(
            {
                "freed_bytes": before_bytes - residency.committed_bytes,
                "free_bytes": residency.budget_bytes - residency.committed_bytes,
                "budget_bytes": residency.budget_bytes,
            }
        )

    def _of_device(self, plain: Mapping[str, Any]) -> dict[str, object]:
        return {"devices": {self._catalog.device.name: plain}}
