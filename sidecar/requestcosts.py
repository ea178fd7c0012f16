"""Request costs: what requests for a model take here of late, and what else it costs to have it asked on this device.

By this is chosen where models are asked (``sidecar.placing``). Part of the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final

from sidecar.catalog import Catalog
from sidecar.placement import Cost

# How much the latest request counts in what requests for a model take, how long that is believed, and of how many models.
_WEIGHT: Final = 0.1
_MEASURED_FOR_S: Final = 600.0
_MOST_MEASURED: Final = 1024


class RequestCosts:
    """What was measured of requests, by the name of the model or models they were for."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float]) -> None:
        self._catalog = catalog
        self._residency = catalog.residency
        self._clock = clock
        # Device seconds that a request for a model took of late, and when; what was measured long ago may have been a bad moment.
        self._measured: dict[str, tuple[float, float]] = {}

    def note(self, name: str, seconds: float, now: float) -> None:
        """Note the device seconds that a request took."""
        if name not in self._measured and len(self._measured) >= _MOST_MEASURED:
            self._measured.clear()
        known, _ = self._measured.get(name, (seconds, 0.0))
        self._measured[name] = known + _WEIGHT * (seconds - known), now

    def recent(self) -> dict[str, float]:
        """Return the device seconds that a request took of late, by the name of its model or models."""
        since_s = self._clock() - _MEASURED_FOR_S
        return {name: seconds for name, (seconds, measured_s) in self._measured.items() if measured_s > since_s}

    def of(self, names: Sequence[str]) -> dict[str, Cost]:
        """Return what those of some models cost that are deployed, alone or several together."""
        return {name: self._cost(name) for name in names if self._catalog.has_all(name)}

    def _cost(self, name: str) -> Cost:
        parts = self._catalog.parts(name)
        weights = tuple(self._residency.weights(deployed.plan) for deployed in parts)
        seconds, measured_s = self._measured.get(name, (None, -math.inf))
        resident_bytes = sum(
            size_bytes for part in weights for digest, size_bytes in part.items() if self._residency.is_resident(digest)
        )
        return Cost(
            seconds if self._clock() < measured_s + _MEASURED_FOR_S else None,
            sum(sum(deployed.run_s) for deployed in parts) if all(deployed.run_s for deployed in parts) else None,
            tuple(deployed.plan for deployed in parts),
            weights,
            resident_bytes,
            any(self._residency.is_pinned(deployed.plan) for deployed in parts),
        )
