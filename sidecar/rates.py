"""Rates: what counters tell when they are looked at again and again. Pure.

An engine counts from its start; whoever looks on wants to know what happens now. Kept are the counts of about the last minute.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, zip_longest
from typing import Any, Final

# What rates and percentiles are of, and how far apart what is kept lies.
RATE_S: Final = 10.0
WINDOW_S: Final = 60.0
_STEP_S: Final = 2.0


@dataclass(slots=True)
class Totals:
    """What was counted at a time, on all devices together. ``life`` tells one engine from another.

    ``answered`` has for each model the requests between the bounds of their latencies.
    """

    at_s: float
    life: str
    bounds_s: Sequence[float] = ()
    answered: dict[str, list[int]] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)
    # By device and model.
    by_device: dict[tuple[str, str], int] = field(default_factory=dict)
    tenant_s: Counter[str] = field(default_factory=Counter)
    # By model, how requests came.
    transports: dict[str, Counter[str]] = field(default_factory=dict)
    fetched_bytes: int = 0
    evicted_bytes: int = 0
    hits: int = 0
    misses: int = 0


def totals_of(devices: Mapping[str, Any], connections: Mapping[str, Any], at_s: float) -> Totals:
    """Return the counts in what the ``metrics`` command tells of each device, and ``connections`` of how requests came."""
    engine = next(iter(devices.values()))["engine"]
    found = Totals(at_s, f"{engine['pid']}-{engine['generation']}")
    for device, each in devices.items():
        outcomes, residency = each["outcomes"], each["memory"]["residency"]
        found.bounds_s = outcomes["bounds_s"]
        for model, outcome in outcomes["models"].items():
            found.answered[model] = added(found.answered.get(model, ()), outcome["counts"])
            found.by_device[device, model] = sum(outcome["counts"])
            found.failed[model] += sum(outcome["failed"].values())
        for tenant, load in each["queues"]["tenants"].items():
            found.tenant_s[tenant] += load["device_s"]
        found.fetched_bytes += each["requests"]["fetched_bytes"]
        found.evicted_bytes += each["requests"]["evicted_bytes"]
        found.hits += residency["hits"]
        found.misses += residency["misses"]
    for transport, asked in connections["asked"].items():
        for model, count in asked.items():
            found.transports.setdefault(model, Counter())[transport] = count
    return found


class History:
    """Totals of the last minute, while somebody looks."""

    def __init__(self) -> None:
        self._kept: deque[Totals] = deque()

    def note(self, totals: Totals) -> None:
        """Keep totals. What is of another engine, or from before a pause, is forgotten."""
        if self._kept and (self._kept[-1].life != totals.life or totals.at_s - self._kept[-1].at_s > RATE_S):
            self._kept.clear()
        is_dense = len(self._kept) > 1 and self._kept[-1].at_s - self._kept[-2].at_s < _STEP_S
        if is_dense or (self._kept and self._kept[-1].at_s == totals.at_s):
            self._kept.pop()
        self._kept.append(totals)
        while len(self._kept) > 2 and totals.at_s - self._kept[1].at_s >= WINDOW_S:
            self._kept.popleft()

    def before(self, seconds: float) -> Totals | None:
        """Return the totals of so many seconds before the latest, or the oldest there are; None where there are no others."""
        if len(self._kept) < 2:
            return None
        latest_s = self._kept[-1].at_s
        return next((each for each in reversed(self._kept) if latest_s - each.at_s >= seconds), self._kept[0])


def added(one: Sequence[int], other: Sequence[int], sign: int = 1) -> list[int]:
    """Return counts between the same bounds together, or with -1 how much those of ``one`` have grown."""
    return [a + sign * b for a, b in zip_longest(one, other, fillvalue=0)]


def quantile(bounds: Sequence[float], counts: Sequence[int], part: float) -> float | None:
    """Return below what a part of all lies, by counts between bounds; of what is beyond the last bound, that.

    Between two bounds all is taken to be spread evenly. None for no counts.
    """
    total = sum(counts)
    if not total:
        return None
    reached = list(accumulate(counts))
    place = bisect_left(reached, part * total)
    if place >= len(bounds):
        return bounds[-1]
    low = bounds[place - 1] if place else 0.0
    return low + (bounds[place] - low) * (part * total - (reached[place] - counts[place])) / counts[place]
