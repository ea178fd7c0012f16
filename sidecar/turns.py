"""Turns: whose group of requests runs next when several tenants want the device, and who is charged for a run.

Joins the wavefront, which knows groups, and the scheduler, which knows tenants. Part of the engine thread.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from sidecar.ports import Work
from sidecar.scheduler import Scheduler
from sidecar.shares import Contender
from sidecar.wavefront import Group, Wavefront


class Call(Protocol):
    """A call in the wavefront, as far as this module cares."""

    @property
    def work(self) -> Work: ...


C = TypeVar("C", bound=Call)


class Turns(Generic[C]):
    """``most`` is how many tickets of one tenant may be in the wavefront: enough for a batch, and for another to form."""

    def __init__(self, scheduler: Scheduler[Work], most: int) -> None:
        self.most = most
        self._scheduler = scheduler

    @property
    def contended(self) -> bool:
        """Return whether more than one tenant wants the device."""
        return self._scheduler.shares.contended

    def choose(self, wavefront: Wavefront[C], is_ready: Callable[[Any], bool], idle: int) -> Group[C] | None:
        """Return the group to run next, of those whose step ``is_ready``; None when there is none. ``idle`` lanes want one."""
        if not self.contended:
            return wavefront.choose(is_ready, idle)
        chosen = wavefront.choose(is_ready, idle, self._first, self._equal)
        if chosen is not None:
            self._scheduler.shares.begin(_tenants(chosen))
        return chosen

    def _first(self, groups: Sequence[Group[C]]) -> Group[C]:
        return self._scheduler.shares.first([Contender(_tenants(group), group.order, group) for group in groups]).what

    def _equal(self, one: Group[C], other: Group[C]) -> bool:
        return self._scheduler.shares.equal(_tenants(one), _tenants(other))

    def comes_along(self, one: Group[C], other: Group[C]) -> bool:
        """Say whether the second of two groups may be part of the first one's run, with stages and tensors of its own.

        Those for whom the first runs lose nothing by it, and nothing runs for two domains.
        """
        if one.first.call.work.tenant.domain != other.first.call.work.tenant.domain:
            return False
        return not self.contended or self._equal(one, other)

    def charge(self, group: Group[C], seconds: float) -> None:
        """Charge those whom a run was for: each row its part, and each request for a row as much as the others."""
        extent = group.extent or 1
        for row in group.rows:
            for ticket in row.tickets:
                self._scheduler.charge(ticket.call.work, seconds * row.extent / extent / len(row.tickets))

    def occupied(self, wavefront: Wavefront[C]) -> frozenset[str]:
        """Return the tenants that have as much in the wavefront as they may."""
        if len(wavefront) < self.most:
            return frozenset()
        counts = Counter(ticket.call.work.tenant.name for ticket in wavefront.tickets())
        return frozenset(name for name, count in counts.items() if count >= self.most)


def _tenants(group: Group[Any]) -> frozenset[str]:
    return frozenset(ticket.call.work.tenant.name for ticket in group.tickets())
