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
    # Leases, of whatever plan, from one of its own to the next: a mean in which the latest counts for half; 0 before the second.
    interval: float = 0.0
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


class LeastOften:
    """What is asked for least often leaves first: once in so many leases lately, or since the last one if that is longer.

    The rates of several users add up. A plan that was asked for once has none yet, so one pass over many models pushes out none
    that come again and again. Of equal rates the latest leaves first: in a cycle over more than fits, it is needed last.
    """

    name = "rate"
    whole = False

    def __init__(self) -> None:
        self._now = 0

    def used(self, use: Use) -> None:
        self._now = use.last

    def value(self, uses: Sequence[Use], size_bytes: int, weight_count: int) -> Value:
        rate = sum(1 / max(use.interval, self._now - use.last + 1) for use in uses if use.interval)
        return (rate, -max(use.last for use in uses))

    def let_go(self, value: Value) -> None:
        pass


class Either:
    """What one of several policies says; ``chosen`` is its number. They are told everything alike."""

    name = "adaptive"
    whole = False

    def __init__(self, policies: Sequence[Policy]) -> None:
        self.chosen = 0
        self._policies = policies

    def used(self, use: Use) -> None:
        for policy in self._policies:
            policy.used(use)

    def value(self, uses: Sequence[Use], size_bytes: int, weight_count: int) -> Value:
        return self._policies[self.chosen].value(uses, size_bytes, weight_count)

    def let_go(self, value: Value) -> None:
        self._policies[self.chosen].let_go(value)


POLICIES: Final[dict[str, Callable[[], Policy]]] = {
    policy.name: policy for policy in (LeastRecentlyUsed, GreedyDualSizeFrequency, LeastOften, WholeModelLeastRecentlyUsed)
}
