"""Who is next: device time is shared out between tenants, by their weights and priorities, as it was measured.

Every tenant has an account of the seconds that the device worked for it, which count the more the less its weight. Of those who
want some, whoever is within a *quantum* of the one that has had least is as good as any, and the oldest request goes first;
whoever has had more waits. So tenants who ask for little never wait for those who ask for a lot, and equals are served in the
order they came, not a stage each in turn, which would only make all of them late. Who asks for nothing saves up two quanta, and
no more; nor does who asks and cannot run, its weights being on their way.

A higher priority goes first. But as long as somebody of a lower one wants some, a sixteenth is put by for it, and spent as soon
as it is worth a quantum: nobody waits for ever. What a stage takes beyond it is paid for before the next.

This is start-time fair queueing (Goyal et al., 1996) with measured instead of announced costs, and the credit for newcomers of
borrowed virtual time (Duda and Cheriton, 1999). A deficit round-robin would have to know what a request costs before it runs,
and lets newcomers wait for a round. Pure: nothing here knows a clock. Owned by the engine thread.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, Generic, NamedTuple, TypeVar

from sidecar.tenants import Tenant

# Seconds of device time that tenants may differ by and still count as equal.
QUANTUM_S: Final = 0.05
# What who asks for nothing saves up at most.
_SAVED_S: Final = 2 * QUANTUM_S
# The part of all device time that is put by for each lower priority.
LEAST_SHARE: Final = 1 / 16
# Quanta that are put by at most: who could not spend them in time must not have the device for itself afterwards.
_MOST_CREDIT: Final = 4

T = TypeVar("T")


class Contender(NamedTuple, Generic[T]):
    """Something that could run: for whom, and how old it is; the smaller, the older."""

    tenants: Collection[str]
    order: int
    what: T


@dataclass(slots=True)
class _Account:
    # The largest of all weights divided by this one's: so many seconds count as one of the weightiest tenant's.
    factor: float
    priority: int
    served_s: float = 0.0
    # Requests that wait or run.
    active_count: int = 0


@dataclass(slots=True)
class _Level:
    """The tenants of one priority. ``served_s`` is what the one of them that had least has had, of those who want some."""

    served_s: float = 0.0
    active_count: int = 0
    # What was put by for it.
    credit_s: float = 0.0
    spending: bool = False

    def entering_s(self, account: _Account) -> float:
        """Return what a tenant that wants some again is reckoned to have had: of what it did not want, it has saved up little."""
        return max(account.served_s, self.served_s - _SAVED_S)


class Shares:
    """The accounts of all tenants."""

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._levels: dict[int, _Level] = {}
        self._heaviest = 1.0
        # Tenants that want some.
        self._active_count = 0

    @property
    def contended(self) -> bool:
        """Return whether more than one tenant wants device time. If not, the oldest request is the next."""
        return self._active_count > 1

    def use(self, tenants: Iterable[Tenant]) -> None:
        """Take up what an operator says of all tenants. What they have had so far is forgotten, what they want is not."""
        before = {name: account for name, account in self._accounts.items() if account.active_count}
        known = {tenant.name: tenant for tenant in tenants}
        self._heaviest = max((tenant.weight for tenant in known.values()), default=1.0)
        self._accounts, self._levels, self._active_count = {}, {}, 0
        for tenant in known.values():
            self._accounts[tenant.name] = _Account(self._heaviest / tenant.weight, tenant.priority)
        for name, old in before.items():
            # Of one that is no more, what is under way comes to an end.
            account = self._accounts.setdefault(name, _Account(1.0, old.priority))
            self._activate(account)
            account.active_count = old.active_count

    def enter(self, tenant: Tenant) -> None:
        """Note that a tenant has one request more."""
        account = self._accounts.get(tenant.name)
        if account is None:
            account = self._accounts[tenant.name] = _Account(max(1.0, self._heaviest / tenant.weight), tenant.priority)
        if not account.active_count:
            self._activate(account)
        account.active_count += 1

    def _activate(self, account: _Account) -> None:
        level = self._levels.setdefault(account.priority, _Level())
        account.served_s = level.entering_s(account)
        level.active_count += 1
        self._active_count += 1

    def leave(self, name: str) -> None:
        """Note that a tenant has one request less."""
        account = self._accounts[name]
        account.active_count -= 1
        if not account.active_count:
            level = self._levels[account.priority]
            level.active_count -= 1
            self._active_count -= 1
            if level.active_count:
                self._move_on(account.priority)
            else:
                level.served_s = max(level.served_s, account.served_s)
                # Not what is owed: who leaves and comes back gains nothing by it.
                level.credit_s, level.spending = min(0.0, level.credit_s), False

    def charge(self, name: str, seconds: float) -> None:
        """Note that the device has worked for a tenant. Its request may be gone already."""
        account = self._accounts.get(name)
        if account is None:
            return
        account.served_s += seconds * account.factor
        if account.active_count:
            self._move_on(account.priority)
        for priority, level in self._levels.items():
            if priority == account.priority and level.spending:
                level.credit_s -= seconds
                level.spending = level.credit_s > 0
            elif priority < account.priority and level.active_count:
                level.credit_s = min(level.credit_s + LEAST_SHARE * seconds, _MOST_CREDIT * QUANTUM_S)
                level.spending |= level.credit_s >= QUANTUM_S

    def begin(self, tenants: Collection[str]) -> None:
        """Note for whom the device is about to run. Who has had less, and wants some, could not run: it saves up two quanta."""
        contender = Contender(tenants, 0, None)
        priority, least_s = self._priority(contender), self._served_s(contender) - _SAVED_S
        for account in self._accounts.values():
            if account.active_count and account.priority == priority:
                account.served_s = max(account.served_s, least_s)

    def _move_on(self, priority: int) -> None:
        """Bring up to date what the tenant of a priority has had that has had least, of those who want some."""
        level = self._levels[priority]
        active = [each.served_s for each in self._accounts.values() if each.active_count and each.priority == priority]
        level.served_s = max(level.served_s, min(active))

    def served_s(self, name: str) -> float:
        """Return what a tenant is reckoned to have had, in seconds of the weightiest; 0 for one that never wanted any."""
        account = self._accounts.get(name)
        return 0.0 if account is None else account.served_s

    def ahead_s(self, name: str, tenant: Tenant, seconds: float) -> float:
        """Return how long the device may work for the tenant ``name`` before it has worked ``seconds`` for ``tenant``."""
        other, own = self._accounts[name], self._accounts.get(tenant.name)
        level = self._levels.get(tenant.priority, _Level())
        served_s, factor = level.served_s, 1.0
        if own is not None:
            factor = own.factor
            served_s = own.served_s if own.active_count else level.entering_s(own)
        if other.priority != tenant.priority:
            return math.inf if other.priority > tenant.priority else LEAST_SHARE * seconds
        return max(0.0, served_s + seconds * factor + QUANTUM_S - other.served_s) / other.factor

    def first(self, contenders: Sequence[Contender[T]]) -> Contender[T]:
        """Return what is to run next, of what could."""
        priority = self._level_of(contenders)
        rivals = [each for each in contenders if self._priority(each) == priority]
        served = [self._served_s(each) for each in rivals]
        enough_s = min(served) + QUANTUM_S
        return min((each for each, has_s in zip(rivals, served, strict=True) if has_s <= enough_s), key=lambda each: each.order)

    def is_before(self, name: str, other: str) -> bool:
        """Say whether it is rather a tenant's turn than another's, which cannot run: so far may others overtake it."""
        one, two = self._accounts[name], self._accounts[other]
        if one.priority != two.priority:
            return one.priority > two.priority and not self._levels[two.priority].spending
        return one.served_s + QUANTUM_S < two.served_s

    def equal(self, one: Collection[str], other: Collection[str]) -> bool:
        """Say whether what runs for ``other`` takes nothing from ``one``: neither has had more than the other, to a quantum."""
        if one == other:
            return True
        accounts = [self._accounts[name] for name in {*one, *other}]
        served = [account.served_s for account in accounts]
        return len({account.priority for account in accounts}) == 1 and max(served) - min(served) <= QUANTUM_S

    def _level_of(self, contenders: Sequence[Contender[T]]) -> int:
        found = {self._priority(each) for each in contenders}
        return min((priority for priority in found if self._levels[priority].spending), default=max(found))

    def _priority(self, contender: Contender[T]) -> int:
        return max(self._accounts[name].priority for name in contender.tenants)

    def _served_s(self, contender: Contender[T]) -> float:
        """Return the least that somebody has had for whom it would run, of its highest priority."""
        priority = self._priority(contender)
        accounts = (self._accounts[name] for name in contender.tenants)
        return min(account.served_s for account in accounts if account.priority == priority)

    def check_invariants(self) -> None:
        """Raise AssertionError when the counts do not add up."""
        active = [account for account in self._accounts.values() if account.active_count]
        assert self._active_count == len(active), "tenants were lost count of"
        for priority, level in self._levels.items():
            count = sum(1 for account in active if account.priority == priority)
            assert level.active_count == count, f"priority {priority} has {count} tenants, not {level.active_count}"
