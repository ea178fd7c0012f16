"""Eviction policies: what of the weights in memory is worth least. Pure: no I/O, no torch.

A policy values *groups*: the weights that exactly the same plans use, which come and go for the same reasons. It sees how each
of these plans has been used, and how many bytes in how many weights are at stake; what it values least leaves first. Of what is
of one value, the last weights leave first (see ``sidecar.residency``). That is all a policy decides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

# To bring a weight back costs its bytes, and besides as much time as reading so many: a request to the mover, an allocation.
WEIGHT_COST_BYTES: Final = 64 << 10

# Compared from the first element on; what is smaller leaves first.
Value = tuple[float, ...]


@dataclass(slots=True)
class Use:
    """How a plan has been used. Leases of all plans are numbered from 1; ``last`` is the number of its own latest."""

    last: int = 0
    # When its latest lease was taken or given back, in seconds of the caller's clock.
    at_s: float = 0.0
    # Leases since the plan was last brought into memory.
    count: int = 0
    # Leases, of whatever plan, from the last but one of its own to the last; 0 where there was one only.
    interval: int = 0
    # The policy's own: what was being evicted when the plan was last used.
    level: float = 0.0


class Policy(Protocol):
    """What ``Residency`` asks. ``whole`` makes all that is of one value leave together, even if less would do."""

    name: str
    whole: bool

    def used(self, use: Use) -> None:
        """Note a lease; ``use`` counts it already."""

    def value(self, uses: Sequence[Use], size_bytes: int, weight_count: int) -> Value:
        """Return what a group is worth to the plans in memory that use it; there is at least one."""

    def let_go(self, value: Value) -> None:
        """Note that something of this value was evicted to make room."""


class LeastRecentlyUsed:
    """What the plan leased longest ago alone needs leaves first: a group is as recent as the latest of its users."""

    name = "lru"
    whole = False

    def used(self, use: Use) -> None:
        pass

    def value(self, uses: Sequence[Use], size_bytes: int, weight_count: int) -> Value:
        return (max(use.last for use in uses),)

    def let_go(self, value: Value) -> None:
        pass


class WholeModelLeastRecentlyUsed(LeastRecentlyUsed):
    """The comparator, as in ShmFaas: whole models leave, however little room is needed."""

    name = "whole-model-lru"
    whole = True


class GreedyDualSizeFrequency:
    """Greedy-Dual-Size-Frequency: cost to bring back per byte, times frequency, with aging.

    After L. Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP Laboratories
    report HPL-98-69R1, 1998: value = L + frequency x cost / size, where L is the value of what was evicted last, as it was when
    the object was last used; so what was popular once does not stay for ever. Of a group that several plans use, the
    frequencies add up.
    """

    name = "gdsf"
    whole = False

    def __init__(self) -> None:
        self._level = 0.0

    def used(self, use: Use) -> None:
        use.level = self._level

    def value(self, uses: Sequence[Use], size_bytes: int, weight_count: int) -> Value:
        cost = 1 + WEIGHT_COST_BYTES * weight_count / max(size_bytes, 1)
        level = max(use.level for use in uses)
        return (level + cost * sum(use.count for use in uses), max(use.last for use in uses))

    def let_go(self, value: Value) -> None:
        self._level = max(self._level, value[0])


POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    policy.name: policy for policy in (LeastRecentlyUsed, GreedyDualSizeFrequency, WholeModelLeastRecentlyUsed)
}
