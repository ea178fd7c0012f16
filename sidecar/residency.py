"""Which weights are in memory, and which must leave: a byte budget that is never exceeded. Pure: no I/O, no torch.

A *plan* is the set of weights one model needs, in the order of their use, named by an id of the caller's. A *lease* on a plan
forbids the eviction of its weights; it is taken before they are loaded and given back after the reply. Weights that
several plans need count once.

When room is needed, only the shortfall leaves, weight by weight, and a plan may then be in memory in part:

1. A weight that a leased or pinned plan uses never leaves, nor one that the newcomer needs.
2. What only plans use that were idle beyond their ``ttl_s`` leaves first.
3. Then lower priority leaves before higher; a weight has the highest priority of its users.
4. Then the policy says what is worth least (``sidecar.policies``); with ``lru``, what was leased longest ago by all of its users.
5. Of what is equal in all that, the weights used last leave first: the first ones of a plan stay, because nothing could hide
   the time it takes to bring them back.

The caller does what this module decides: it drops the weights named as evicted *before* it allocates the ones named as
missing, so the bytes in memory never pass the budget. Owned by the engine thread.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from trunkline.errors import BudgetExceeded

from sidecar.keeping import DEFAULT_PRIORITY, HIGHEST_PRIORITY
from sidecar.moves import FETCH, Moves
from sidecar.policies import LeastRecentlyUsed, Policy, Use, Value

# Below the lowest: that of what only plans use that were idle for too long.
_EXPIRED: Final = -1
# Why weights leave: for others, idle for too long, on command, their model is gone, their load failed, so that there is memory to
# compute with, so that their tenant stays within its quota.
REASONS: Final = ("room", "ttl", "operator", "removed", "failed", "memory", "quota")


@dataclass(frozen=True)
class Grant:
    """A lease was taken. Drop ``evict`` first, then load ``fetch``; the plan is ready when all of it has arrived.

    ``hit_bytes`` were there already, or on their way.
    """

    evict: tuple[str, ...]
    fetch: tuple[str, ...]
    hit_bytes: int = field(default=0, compare=False)
    missed_bytes: int = field(default=0, compare=False)
    evicted_bytes: int = field(default=0, compare=False)


@dataclass(slots=True)
class Counts:
    """What has happened since the start. ``hits`` and ``misses`` are weights, found and ordered by leases."""

    hits: int = 0
    hit_bytes: int = 0
    misses: int = 0
    missed_bytes: int = 0
    # Weights and bytes by reason.
    evictions: Counter[str] = field(default_factory=Counter)
    evicted_bytes: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Plan:
    """``weights`` are sizes in bytes by digest, in the order of use, ``places`` their numbers in it."""

    weights: dict[str, int]
    places: dict[str, int]
    size_bytes: int
    priority: int
    ttl_s: float | None
    use: Use = field(default_factory=Use)
    # When the first of the leases was taken that there are now.
    leased_at_s: float = 0.0

    def is_idle_too_long(self, now_s: float) -> bool:
        return self.ttl_s is not None and self.use.at_s + self.ttl_s <= now_s


@dataclass(slots=True)
class _Group:
    """The weights that exactly these plans use. ``committed`` are the sizes in bytes of those that are."""

    users: frozenset[str]
    digests: set[str] = field(default_factory=set)
    committed: dict[str, int] = field(default_factory=dict)


class Leaving(NamedTuple):
    """Weights that may leave, all used by the same plans. ``priority`` is None for those of plans that were idle for too long."""

    plans: frozenset[str]
    weight_count: int
    size_bytes: int
    priority: int | None
    idle_s: float


class _Rank(NamedTuple):
    """What is smaller leaves first."""

    priority: int
    value: Value


class Residency:
    """Weights in memory under one budget.

    A weight is *committed* from the moment a lease orders it until it is evicted; it is *resident* once ``arrived`` was
    told of it. A plan is *in use* from its first lease until the last of its weights has left or it was let go; it is *held*
    while, since its latest lease, none of them has left.
    """

    def __init__(self, budget_bytes: int, policy: Policy | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_bytes = budget_bytes
        self.policy = policy or LeastRecentlyUsed()
        self.counts = Counts()
        self.moves = Moves()
        # How long ago the weight that left last to make room had been used then.
        self.lru_age_s: float | None = None
        self.committed_bytes = 0
        # In seconds of the clock: nothing expires earlier. Kept on the way, so that nobody has to look through all plans.
        self.quiet_until_s = math.inf
        self._clock = clock
        self._plans: dict[str, _Plan] = {}
        self._groups: dict[frozenset[str], _Group] = {}
        self._group_of: dict[str, _Group] = {}
        self._in_use: set[str] = set()
        self._held: set[str] = set()
        self._leases: dict[str, int] = {}
        self._pinned: set[str] = set()
        self._committed: dict[str, int] = {}
        self._arrived: set[str] = set()
        # Of plans that stream: what of them must stay. And the weights they are through with, the latest last.
        self._windows: dict[str, frozenset[str]] = {}
        self._spent: dict[str, str] = {}
        self._lease_count = 0

    # --- plans -------------------------------------------------------------------------------------------------------

    def add_plan(
        self, plan: str, weights: Mapping[str, int], *, priority: int = DEFAULT_PRIORITY, ttl_s: float | None = None
    ) -> None:
        """Register a plan: size in bytes by digest, in the order of use. Registering it again is harmless.

        ``priority`` is 0 to 9; ``ttl_s`` is for how long it is kept without a lease, None: as long as there is room.
        """
        if plan in self._plans:
            return
        assert 0 <= priority <= HIGHEST_PRIORITY, "a priority is 0 to 9"
        places = {digest: place for place, digest in enumerate(weights)}
        self._plans[plan] = _Plan(dict(weights), places, sum(weights.values()), priority, ttl_s)
        self._regroup(weights, lambda users: users | {plan})

    def remove_plan(self, plan: str) -> tuple[str, ...]:
        """Forget an unleased plan and its pin; return the weights to drop."""
        assert not self._leases.get(plan), "a leased plan cannot be removed"
        self._pinned.discard(plan)
        freed = self.evict(plan, "removed")
        self._regroup(self._plans[plan].weights, lambda users: users - {plan})
        del self._plans[plan]
        return freed

    def set_priority(self, plan: str, priority: int) -> None:
        """Say how dear a plan is, 0 to 9."""
        assert 0 <= priority <= HIGHEST_PRIORITY, "a priority is 0 to 9"
        self._plans[plan].priority = priority

    def set_ttl(self, plan: str, ttl_s: float | None) -> None:
        """Say for how long a plan is kept without a lease; None: as long as there is room."""
        self._plans[plan].ttl_s = ttl_s
        self._expect(plan)

    def priority(self, plan: str) -> int:
        return self._plans[plan].priority

    def ttl_s(self, plan: str) -> float | None:
        return self._plans[plan].ttl_s

    def weights(self, plan: str) -> Mapping[str, int]:
        """Return the sizes in bytes of a plan's weights, by digest, in the order of use."""
        return self._plans[plan].weights

    def _regroup(self, digests: Iterable[str], users: Callable[[frozenset[str]], frozenset[str]]) -> None:
        """Move weights into the groups of those that use them now."""
        nobody = _Group(frozenset())
        # Most weights of a plan come from a few groups: theirs is found once.
        targets: dict[frozenset[str], _Group] = {}
        for digest in digests:
            group = self._group_of.pop(digest, nobody)
            target = targets.get(group.users)
            if target is None:
                now = users(group.users)
                target = targets[group.users] = self._groups.setdefault(now, _Group(now)) if now else nobody
            group.digests.discard(digest)
            if group.users and not group.digests:
                del self._groups[group.users]
            if target is nobody:
                continue
            self._group_of[digest] = target
            target.digests.add(digest)
            if digest in group.committed:
                target.committed[digest] = group.committed.pop(digest)

    def take_over(self, plan: str, digests: Collection[str]) -> None:
        """Count in weights of a plan that are in memory from an earlier life of the caller. Each is read over, and "arrives"
        anew, when the plan is leased; until then they are what was used longest ago."""
        weights = self._plans[plan].weights
        self._commit({digest: weights[digest] for digest in digests if digest not in self._committed})
        if digests:
            self._in_use.add(plan)
            # Who used it when has died with the caller: it has been idle since now.
            self._plans[plan].use.at_s = self._clock()
            self._expect(plan)

    # --- leases ------------------------------------------------------------------------------------------------------

    def lease(self, *plans: str) -> Grant | None:
        """Take a lease on each of ``plans`` at one stroke; None when they would fit but for leases that others hold now.

        Raises BudgetExceeded when they cannot fit even with every other lease returned. Leases of one call that were taken
        one by one could wait for each other without end.
        """
        missing: dict[str, int] = {}
        for plan in plans:
            if plan not in self._held:
                weights = self._plans[plan].weights
                missing |= {digest: size for digest, size in weights.items() if digest not in self._committed}
        missed_bytes = sum(missing.values())
        victims = self._choose_victims(self.committed_bytes + missed_bytes - self.budget_bytes, plans)
        if victims is None:
            self._refuse_the_impossible(plans)
            return None
        evicted_bytes = self._let_go(victims, "room")
        self._commit(missing)
        self._note_fetch(plans, missing, missed_bytes)
        self._note_uses(plans)
        count, size_bytes = self._extent(plans)
        self.counts.misses += len(missing)
        self.counts.missed_bytes += missed_bytes
        self.counts.hits += count - len(missing)
        self.counts.hit_bytes += size_bytes - missed_bytes
        return Grant(tuple(victims), tuple(missing), size_bytes - missed_bytes, missed_bytes, evicted_bytes)

    def _commit(self, weights: Mapping[str, int]) -> None:
        for digest, size_bytes in weights.items():
            self._committed[digest] = self._group_of[digest].committed[digest] = size_bytes
            self.committed_bytes += size_bytes

    def _note_fetch(self, plans: Sequence[str], missing: Mapping[str, int], missed_bytes: int) -> None:
        if missing:
            self.moves.note(FETCH, plans, len(missing), missed_bytes, self._clock())

    def _extent(self, plans: Sequence[str]) -> tuple[int, int]:
        """Return how many weights plans have together, each once, and their bytes."""
        if len(plans) == 1:
            plan = self._plans[plans[0]]
            return len(plan.weights), plan.size_bytes
        weights = {digest: size for plan in plans for digest, size in self._plans[plan].weights.items()}
        return len(weights), sum(weights.values())

    def _note_uses(self, plans: Sequence[str]) -> None:
        now_s = self._clock()
        for plan in plans:
            use = self._plans[plan].use
            if plan not in self._leases:
                self._plans[plan].leased_at_s = now_s
            self._lease_count += 1
            gap = self._lease_count - use.last if use.last else 0
            use.interval = (use.interval + gap) / 2 if use.interval else gap
            use.last, use.at_s = self._lease_count, now_s
            use.count = use.count + 1 if plan in self._in_use else 1
            self.policy.used(use)
            self._in_use.add(plan)
            self._held.add(plan)
            self._leases[plan] = self._leases.get(plan, 0) + 1

    def lease_again(self, plan: str) -> None:
        """Take one more lease on a leased plan, for the same use of it."""
        assert self._leases.get(plan, 0) > 0, "the plan is not leased"
        self._leases[plan] += 1

    def _refuse_the_impossible(self, plans: Sequence[str]) -> None:
        plan_bytes = self._extent(plans)[1]
        if plan_bytes > self.budget_bytes:
            raise BudgetExceeded(
                f"the weights of {_named(plans)} take {plan_bytes} bytes, the memory budget is {self.budget_bytes}; start the "
                "sidecar with a larger memory budget, or deploy a smaller model",
                needed_bytes=plan_bytes,
                budget_bytes=self.budget_bytes,
            )
        together_bytes = self._extent((*plans, *self._pinned))[1]
        if together_bytes > self.budget_bytes:
            raise BudgetExceeded(
                f"{_named(plans)} and the pinned models take {together_bytes} bytes together, the memory budget is "
                f"{self.budget_bytes}; unpin a model or raise the budget",
                needed_bytes=together_bytes,
                budget_bytes=self.budget_bytes,
            )

    def arrived(self, digest: str) -> None:
        """Note that a fetched weight is in memory."""
        assert digest in self._committed, "a weight arrived that nobody ordered"
        self._arrived.add(digest)

    def lost(self, digest: str) -> None:
        """Note that a weight is not in memory any more, though its room is: it is to be brought in anew."""
        self._arrived.discard(digest)

    def release(self, plan: str) -> None:
        """Give one lease back."""
        assert self._leases.get(plan, 0) > 0, "a lease was given back twice"
        self._leases[plan] -= 1
        if not self._leases[plan]:
            del self._leases[plan]
            self._plans[plan].use.at_s = self._clock()
            self._expect(plan)
            if plan in self._windows:
                del self._windows[plan]
                self._spent.clear()

    # --- streams: leases on plans that do not fit ----------------------------------------------------------------------

    @property
    def room_bytes(self) -> int:
        """Bytes that no pinned plan may claim."""
        return self.budget_bytes - self._extent([*self._pinned])[1]

    def begin_stream(self, plan: str) -> None:
        """Take a lease on a plan of which only a window is held: nothing yet, then what ``hold`` says."""
        assert not self._leases.get(plan), "a plan that is held does not stream"
        self._note_uses([plan])
        self._held.discard(plan)
        if self._committed.keys().isdisjoint(self._plans[plan].weights):
            self._in_use.discard(plan)
        self._windows[plan] = frozenset()

    def hold(self, plan: str, digests: Sequence[str], keep: Collection[str] = ()) -> Grant | None:
        """Have ``digests`` of a streaming plan in memory until told otherwise, and what of ``keep`` is there already.

        All else of it may leave. None, and nothing changes, when there is no room before leases of others are returned.
        """
        weights = self._plans[plan].weights
        missing = {digest: weights[digest] for digest in digests if digest not in self._committed}
        window = frozenset((*digests, *(digest for digest in keep if digest in self._committed)))
        missed_bytes = sum(missing.values())
        before, self._windows[plan] = self._windows[plan], window
        victims = self._choose_victims(self.committed_bytes + missed_bytes - self.budget_bytes, ())
        if victims is None:
            self._windows[plan] = before
            return None
        evicted_bytes = self._let_go(victims, "room")
        self._commit(missing)
        self._note_fetch([plan], missing, missed_bytes)
        self._in_use.add(plan)
        self.counts.misses += len(missing)
        self.counts.missed_bytes += missed_bytes
        hit_bytes = sum(weights[digest] for digest in window - before - missing.keys())
        self.counts.hits += len(window - before - missing.keys())
        self.counts.hit_bytes += hit_bytes
        return Grant(tuple(victims), tuple(missing), hit_bytes, missed_bytes, evicted_bytes)

    def window(self, plan: str) -> frozenset[str]:
        """Return what is held of a streaming plan."""
        return self._windows[plan]

    def spend(self, plan: str, digests: Iterable[str]) -> None:
        """Say that a streaming plan is through with weights: what nobody else has leaves before all else, the latest first."""
        for digest in digests:
            if digest in self._committed:
                self._spent.pop(digest, None)
                self._spent[digest] = plan

    def is_leased_beside(self, plan: str) -> bool:
        """Say whether any other plan is leased."""
        return not self._leases.keys() <= {plan}

    def pinned_weights(self) -> set[str]:
        """Return the digests of the weights that pins protect."""
        return {digest for plan in self._pinned for digest in self._plans[plan].weights}

    # --- what leaves -------------------------------------------------------------------------------------------------

    def _choose_victims(self, shortfall: int, wanted: Sequence[str]) -> list[str] | None:
        """Return the weights to let go, or None when what may leave does not free enough. The rule is the module's docstring."""
        victims: list[str] = []
        if shortfall <= 0:
            return victims
        staying, windows = self._staying(wanted)
        for digest in reversed(self._spent):
            users = self._group_of[digest].users
            if (
                shortfall > 0
                and digest not in windows
                and staying.isdisjoint(users)
                and users & self._in_use <= {self._spent[digest]}
            ):
                victims.append(digest)
                shortfall -= self._committed[digest]
        if shortfall <= 0:
            return victims
        spent = frozenset(victims)
        now_s = self._clock()
        ranked = self._ranked(staying, now_s)
        for rank, equals in itertools.groupby(ranked, key=lambda pair: pair[0]):
            for digest, size_bytes in self._last_first([group for _, group in equals]):
                if shortfall <= 0 and not self.policy.whole:
                    break
                if digest in windows or digest in spent:
                    continue
                victims.append(digest)
                shortfall -= size_bytes
            if shortfall <= 0:
                self.policy.let_go(rank.value)
                self.lru_age_s = now_s - max(each.use.at_s for each in self._users_of(self._group_of[victims[-1]]))
                return victims
        return None

    def _staying(self, wanted: Sequence[str] = ()) -> tuple[frozenset[str], frozenset[str]]:
        """Return the plans of which nothing may leave, and the weights of others that may not."""
        staying = frozenset((*wanted, *(self._leases.keys() - self._windows.keys()), *self._pinned))
        return staying, frozenset[str]().union(*self._windows.values())

    def _ranked(self, staying: frozenset[str], now_s: float) -> list[tuple[_Rank, _Group]]:
        """Return the groups that may leave, those first that leave first."""
        ranked = [
            (self._rank(group, now_s), group)
            for group in self._groups.values()
            if group.committed and staying.isdisjoint(group.users)
        ]
        ranked.sort(key=lambda pair: pair[0])
        return ranked

    def leaving(self) -> list[Leaving]:
        """Return what may leave now, in the order in which it would: weights of the same plans together."""
        staying, windows = self._staying()
        now_s = self._clock()
        found = []
        for rank, group in self._ranked(staying, now_s):
            sizes = [size_bytes for digest, size_bytes in group.committed.items() if digest not in windows]
            if sizes:
                idle_s = now_s - max(each.use.at_s for each in self._users_of(group))
                priority = None if rank.priority == _EXPIRED else rank.priority
                found.append(Leaving(group.users & self._in_use, len(sizes), sum(sizes), priority, idle_s))
        return found

    def _rank(self, group: _Group, now_s: float) -> _Rank:
        users = self._users_of(group)
        priority = max(_EXPIRED if user.is_idle_too_long(now_s) else user.priority for user in users)
        return _Rank(
            priority, self.policy.value([user.use for user in users], sum(group.committed.values()), len(group.committed))
        )

    def _users_of(self, group: _Group) -> list[_Plan]:
        """Return the plans for whose sake a group is in memory."""
        return [self._plans[plan] for plan in group.users & self._in_use]

    def _last_first(self, groups: Sequence[_Group]) -> list[tuple[str, int]]:
        """Return the weights of equal groups, the one used last first: last in the latest of the plans that use them."""
        placed = []
        for group in groups:
            places = max(self._users_of(group), key=lambda user: user.use.last).places
            placed += [(places[digest], digest, size_bytes) for digest, size_bytes in group.committed.items()]
        placed.sort(reverse=True)
        return [(digest, size_bytes) for _, digest, size_bytes in placed]

    def _let_go(self, digests: Sequence[str], reason: str, whose: str = "") -> int:
        """Count weights out; return their bytes. They are a single plan's, or of all that have them in use."""
        before_bytes = self.committed_bytes
        touched: dict[frozenset[str], _Group] = {}
        for digest in digests:
            group = self._group_of[digest]
            touched[group.users] = group
            size_bytes = self._committed.pop(digest)
            del group.committed[digest]
            self._arrived.discard(digest)
            self._spent.pop(digest, None)
            self.committed_bytes -= size_bytes
            self.counts.evictions[reason] += 1
            self.counts.evicted_bytes[reason] += size_bytes
        if touched:
            plans = [whose] if whose else self._in_use & frozenset[str]().union(*touched)
            self.moves.note(reason, plans, len(digests), before_bytes - self.committed_bytes, self._clock())
        for users in touched:
            self._held -= users
            for plan in users & self._in_use:
                if not any(digest in self._committed for digest in self._plans[plan].weights):
                    self._in_use.discard(plan)
        return before_bytes - self.committed_bytes

    def evict(self, plan: str, reason: str = "operator") -> tuple[str, ...]:
        """Let an unleased plan go now; return the weights to drop. Weights in use by others stay.

        Nor does a weight stay that never arrived and that no lease waits for: its load failed.
        """
        assert not self._leases.get(plan), "a leased plan cannot be evicted"
        if plan not in self._in_use:
            return ()
        self._in_use.discard(plan)
        self._held.discard(plan)
        freed = [digest for digest in self._plans[plan].weights if digest in self._committed and not self._has_use_for(digest)]
        self._let_go(freed, reason, plan)
        return tuple(freed)

    def relieve(self, size_bytes: int, reason: str = "memory") -> tuple[str, ...]:
        """Let so many bytes go, or all that may leave if that is less: memory is needed for something else than weights.

        What leaves first is chosen as ever. Returns the weights to drop.
        """
        staying, windows = self._staying()
        most_bytes = sum(
            size
            for group in self._groups.values()
            if staying.isdisjoint(group.users)
            for digest, size in group.committed.items()
            if digest not in windows
        )
        # That age tells whether the budget is large enough, which is not what this is about.
        age_s = self.lru_age_s
        victims = self._choose_victims(min(size_bytes, most_bytes), ()) or []
        self.lru_age_s = age_s
        self._let_go(victims, reason)
        return tuple(victims)

    def _has_use_for(self, digest: str) -> bool:
        users = self._group_of[digest].users
        return not users.isdisjoint(self._in_use if digest in self._arrived else self._leases.keys())

    def expire(self) -> tuple[str, ...]:
        """Let go of what has been idle beyond its ``ttl_s``; return the weights to drop."""
        now_s = self._clock()
        freed = tuple(
            digest for plan in self._mortal() if self._plans[plan].is_idle_too_long(now_s) for digest in self.evict(plan, "ttl")
        )
        expiry_s = self.next_expiry_s()
        self.quiet_until_s = math.inf if expiry_s is None else expiry_s
        return freed

    def _expect(self, plan: str) -> None:
        entry = self._plans[plan]
        if entry.ttl_s is not None and plan in self._in_use:
            self.quiet_until_s = min(self.quiet_until_s, entry.use.at_s + entry.ttl_s)

    def next_expiry_s(self) -> float | None:
        """Return when ``expire`` is next worth calling, in seconds of the clock; None: not before another lease."""
        return min(
            (plan.use.at_s + plan.ttl_s for plan in map(self._plans.__getitem__, self._mortal()) if plan.ttl_s is not None),
            default=None,
        )

    def _mortal(self) -> list[str]:
        return [plan for plan in self._in_use - self._leases.keys() - self._pinned if self._plans[plan].ttl_s is not None]

    # --- pins, and what there is -------------------------------------------------------------------------------------

    def pin(self, plan: str) -> None:
        """Forbid the eviction of a plan until it is unpinned. Pinning alone loads nothing.

        Raises BudgetExceeded when the pinned plans would not fit together.
        """
        self._refuse_the_impossible([plan])
        self._pinned.add(plan)

    def unpin(self, plan: str) -> None:
        """Allow eviction again."""
        self._pinned.discard(plan)
        self._expect(plan)

    def is_ready(self, plan: str) -> bool:
        """Say whether every weight of the plan is in memory."""
        return self._plans[plan].weights.keys() <= self._arrived

    def is_held(self, plan: str) -> bool:
        """Say whether all of the plan's weights are in memory or on their way, and have been since its latest lease."""
        return plan in self._held

    def is_pinned(self, plan: str) -> bool:
        return plan in self._pinned

    def lease_count(self, plan: str) -> int:
        return self._leases.get(plan, 0)

    def leased_for_s(self, plan: str) -> float:
        """Return for how long a leased plan has been leased without a break."""
        assert plan in self._leases, "the plan is not leased"
        return self._clock() - self._plans[plan].leased_at_s

    def is_streaming(self, plan: str) -> bool:
        """Say whether but a window of a plan is held."""
        return plan in self._windows

    def __contains__(self, plan: str) -> bool:
        return plan in self._plans

    def is_committed(self, digest: str) -> bool:
        """Say whether a weight is in memory, or on its way."""
        return digest in self._committed

    def is_resident(self, digest: str) -> bool:
        return digest in self._arrived

    @property
    def pinned_bytes(self) -> int:
        """Bytes in memory that pins protect."""
        return sum(self._committed.get(digest, 0) for digest in self.pinned_weights())

    @property
    def evicted_bytes(self) -> int:
        """Bytes that left since the start, for whatever reason."""
        return self.counts.evicted_bytes.total()

    def metrics(self) -> dict[str, object]:
        """Return what operators steer by, as plain values."""
        counts = self.counts
        return {
            "policy": self.policy.name,
            "hits": counts.hits,
            "hit_bytes": counts.hit_bytes,
            "misses": counts.misses,
            "missed_bytes": counts.missed_bytes,
            "evictions": {reason: counts.evictions[reason] for reason in REASONS},
            "evicted_bytes": {reason: counts.evicted_bytes[reason] for reason in REASONS},
            "lru_age_s": None if self.lru_age_s is None else round(self.lru_age_s, 3),
        }

    def check_invariants(self) -> None:
        """Raise AssertionError when the books do not balance."""
        assert self.committed_bytes == sum(self._committed.values()), "committed_bytes disagrees with the weights"
        assert self.committed_bytes <= self.budget_bytes, (
            f"{self.committed_bytes} bytes are committed, the budget is {self.budget_bytes}"
        )
        expiry_s = self.next_expiry_s()
        assert expiry_s is None or self.quiet_until_s <= expiry_s, "something expires before anybody looks"
        needed = {digest for plan in self._in_use for digest in self._plans[plan].weights}
        assert self._committed.keys() <= needed, "a weight is committed for nobody"
        assert self._arrived <= self._committed.keys(), "a weight is in memory that is not committed"
        assert self._leases.keys() - self._windows.keys() <= self._held <= self._in_use, "a leased plan is not held"
        assert self._windows.keys() <= self._leases.keys(), "a window is kept for nobody"
        for window in self._windows.values():
            assert window <= self._committed.keys(), "a weight of a window has left"
        assert self._spent.keys() <= self._committed.keys(), "what has left is still to leave"
        assert all(count > 0 for count in self._leases.values())
        for plan in self._in_use:
            weights = self._plans[plan].weights.keys()
            assert plan not in self._held or weights <= self._committed.keys(), "a weight of a held plan has left"
            assert not weights or weights & self._committed.keys(), "a plan is in use of which nothing is in memory"
        users: dict[str, set[str]] = {}
        for plan, entry in self._plans.items():
            for digest in entry.weights:
                users.setdefault(digest, set()).add(plan)
        assert users == {digest: group.users for digest, group in self._group_of.items()}, "users of weights are wrong"
        grouped = {digest: size for group in self._groups.values() for digest, size in group.committed.items()}
        assert grouped == self._committed, "the groups disagree with the weights"
        assert set(self._groups) == {group.users for group in self._group_of.values()}, "a group is kept for nothing"


def _named(plans: Sequence[str]) -> str:
    return "the model" if len(plans) == 1 else f"the {len(plans)} models"
