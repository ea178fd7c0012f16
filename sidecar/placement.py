"""Placement: on which devices each model is asked, chosen from what runs cost, what is asked, and what fits. Pure: the clock is
passed in.

A device that needs ``u`` seconds for what is asked in one second has ``u / (1 - u)`` requests with it in the mean (one server
that divides its time among all who are there), which by Little's law are the seconds that everybody together waits in a second.
The sum of that over the devices is what a change has to lower: a model goes where it is answered soonest, beside what is there
already, and is *replicated* where that takes more from one device than it adds to another. Replicas divide a model's requests so
that none is better off elsewhere. Beyond most of a device's time the sum goes on in a straight line, so that too much on all
devices is divided as well as it can be. What does not fit into a device's memory together is read again and again, which is time,
too; weights that models have in common count once.

That models are moved between devices as the mix changes is the idea of "AI Multi-Tenancy on Edge" (Subedi et al., 2021). So that
noise moves nothing, a change must lower the sum of the devices concerned by a sixth, and a model rests after one: meanwhile it
may only have one device more, which it then keeps for longer than that.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

# How much fewer must be waiting after a change, as a factor; and how many more may be after a replica is given up.
GAIN: Final = 1.2
_TOLERATED: Final = 1.1
# How long a model stays as it is after a change.
REST_S: Final = 15.0
# How long a model must do with fewer devices before it has fewer: who asks in bursts asks again, and weights that nobody asks for
# leave memory in any case when others need it.
KEEP_S: Final = 60.0
# Most changes at one look: each changes what the next is worth.
_MOST_CHANGES: Final = 4
# The part of a device's time from which on waiting grows in a straight line.
_CROWDED: Final = 0.95
# A model's requests are divided in parts of this size among its replicas.
_PARTS: Final = 16
# How far a single model's trials may differ from others', as a factor, and how many others say anything.
_BELIEVED: Final = 2.0
_ENOUGH: Final = 3
# What a request is taken to cost of which nothing is known, in seconds.
UNKNOWN_S: Final = 0.01
# Fewer requests per second are nobody's reason to move anything.
_FEWEST: Final = 0.02


@dataclass(frozen=True, slots=True)
class Site:
    """A device: bytes for weights, and how many of them are read in a second."""

    name: str
    budget_bytes: int
    pace: float


@dataclass(frozen=True, slots=True)
class Profile:
    """What a model costs: device seconds of a request, by the devices where it may be, and the bytes of its weights, by name.

    ``rate`` are the requests per second that ask for it, of which ``under_way`` are unanswered in the mean. ``resident_bytes``
    are of its weights in memory, by device.
    """

    seconds: Mapping[str, float]
    weights: Mapping[str, int]
    rate: float = 0.0
    under_way: float = 0.0
    resident_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        return sum(self.weights.values())


@dataclass(frozen=True, slots=True)
class Cost:
    """What one device tells of a model: device seconds that its requests took of late, and that a run took when it was tried.

    None where nothing was measured. ``weights`` has the bytes of each, by digest, for each of ``plans``; ``resident_bytes`` of
    them are in memory. A model stays where it ``is_pinned``.
    """

    seconds: float | None
    tried_s: float | None
    plans: tuple[str, ...]
    weights: tuple[Mapping[str, int], ...]
    resident_bytes: int
    is_pinned: bool = False


@dataclass(slots=True)
class _Load:
    """What is asked of one device: seconds of computing, and bytes that would be read were nothing in memory, in a second."""

    site: Site
    busy: float = 0.0
    asked_bytes: float = 0.0
    # How many models have a weight, and the bytes of all.
    users: Counter[str] = field(default_factory=Counter)
    size_bytes: int = 0

    def new_bytes(self, weights: Mapping[str, int]) -> int:
        """Return the bytes of weights that no model has here."""
        return sum(size_bytes for digest, size_bytes in weights.items() if digest not in self.users)

    def needed(self, busy: float = 0.0, asked_bytes: float = 0.0, size_bytes: int = 0) -> float:
        """Return the part of its time that a device needs, with so much more asked of it; beyond 1, it cannot keep up."""
        held_bytes = self.size_bytes + size_bytes
        # Of what is too much, each request finds this part gone; nothing better is known of an order of requests to come.
        missing = max(0.0, 1 - self.site.budget_bytes / held_bytes) if held_bytes else 0.0
        return self.busy + busy + missing * (self.asked_bytes + asked_bytes) / self.site.pace

    def put(self, profile: Profile, part: float, sign: int) -> None:
        """Add a part of a model's requests, or take it away."""
        self.busy += sign * part * profile.rate * profile.seconds[self.site.name]
        self.asked_bytes += sign * part * profile.rate * profile.size_bytes
        for digest, size_bytes in profile.weights.items():
            before = self.users[digest]
            self.users[digest] = before + sign
            if not before or not before + sign:
                self.size_bytes += sign * size_bytes
            if not before + sign:
                del self.users[digest]


class _Node:
    """What is asked of all devices, model by model."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.loads = {site.name: _Load(site) for site in sites}
        # The part of each model's requests that each of its devices gets.
        self._parts: dict[str, dict[str, float]] = {}

    def put(self, name: str, profile: Profile, where: frozenset[str]) -> None:
        """Have a model asked on some devices: its requests go, part by part, where one more is answered soonest."""
        parts = dict.fromkeys(where, 0.0)
        if len(where) == 1:
            parts = dict.fromkeys(where, 1.0)
        elif where:
            new_bytes = {each: self.loads[each].new_bytes(profile.weights) for each in where}
            for _ in range(_PARTS):
                longer = {each: self._longer(profile, each, parts[each], new_bytes[each]) for each in sorted(where)}
                parts[min(longer, key=lambda each: longer[each])] += 1 / _PARTS
        for each, part in parts.items():
            self.loads[each].put(profile, part, 1)
        self._parts[name] = parts

    def _longer(self, profile: Profile, name: str, part: float, new_bytes: int) -> float:
        """Return how many more wait for one part more on a device."""
        before, after = (
            self.loads[name].needed(
                each * profile.rate * profile.seconds[name], each * profile.rate * profile.size_bytes, new_bytes
            )
            for each in (part, part + 1 / _PARTS)
        )
        return _waiting(after) - _waiting(before)

    def take(self, name: str, profile: Profile) -> None:
        """Undo ``put``."""
        for each, part in self._parts.pop(name).items():
            self.loads[each].put(profile, part, -1)

    def waiting(self, names: Iterable[str]) -> float:
        """Return how many requests are with some devices in the mean."""
        return sum(_waiting(self.loads[name].needed()) for name in names)


class Placement:
    """``placed`` tells where each model is asked. Who calls ``look`` brings about what it says, and then says so to ``place``."""

    def __init__(self, sites: Iterable[Site]) -> None:
        self.sites = {site.name: site for site in sites}
        self.placed: dict[str, frozenset[str]] = {}
        self._changed_s: dict[str, float] = {}
        # Those whose last change came to nothing, because they could not be loaded.
        self._stuck: set[str] = set()
        # Since when models would do with fewer devices.
        self._spare_s: dict[str, float] = {}

    def first(self, profile: Profile, profiles: Mapping[str, Profile]) -> str:
        """Return where a model is to be that is nowhere yet: where most of it lies, or else where it is answered soonest."""
        here = max(profile.seconds, key=lambda name: profile.resident_bytes.get(name, 0))
        if 2 * profile.resident_bytes.get(here, 0) > profile.size_bytes:
            return here
        loads = self._node(profiles).loads
        # What nobody asks for yet will be asked for.
        placed_bytes = {
            name: sum(profiles[model].size_bytes for model, where in self.placed.items() if name in where and model in profiles)
            for name in self.sites
        }

        def answered_s(name: str) -> tuple[float, int]:
            site = self.sites[name]
            over_bytes = max(0, placed_bytes[name] + profile.size_bytes - site.budget_bytes)
            seconds = profile.seconds[name] + min(over_bytes, profile.size_bytes) / site.pace
            # What is alike but for some per cent is alike.
            return float(f"{seconds / max(1 - loads[name].needed(), 1 - _CROWDED):.1g}"), placed_bytes[name]

        return min(profile.seconds, key=answered_s)

    def look(self, now_s: float, profiles: Mapping[str, Profile]) -> dict[str, frozenset[str]]:
        """Return the models that should be elsewhere, and where."""
        changes = self._driven_out(profiles)
        placed = self.placed | changes
        node = self._node(profiles, placed)
        for _ in range(_MOST_CHANGES):
            free = [
                name for name, profile in profiles.items() if name in placed and name not in changes and profile.rate > _FEWEST
            ]
            found = [(*self._best(node, name, profiles[name], placed[name], now_s), name) for name in free]
            found = [
                (gain, where, name)
                for gain, where, name in found
                if not self._may_be_needed(name, gain > 0 and len(where) < len(placed[name]), now_s)
            ]
            gain, where, name = max(found, key=lambda each: each[0], default=(0.0, frozenset(), ""))
            if gain <= 0:
                break
            node.take(name, profiles[name])
            node.put(name, profiles[name], where)
            changes[name] = placed[name] = where
        return changes

    def _driven_out(self, profiles: Mapping[str, Profile]) -> dict[str, frozenset[str]]:
        """Return what may not stay where it is, which rests for nobody."""
        changes = {}
        for name in sorted(self.placed.keys() & profiles.keys()):
            allowed = self.placed[name] & profiles[name].seconds.keys()
            if allowed != self.placed[name]:
                changes[name] = allowed or frozenset({self.first(profiles[name], profiles)})
        return changes

    def _may_be_needed(self, name: str, is_less: bool, now_s: float) -> bool:
        """Say whether a model would have fewer devices, and has not been as well off with them for long enough."""
        if not is_less:
            self._spare_s.pop(name, None)
            return False
        return now_s < self._spare_s.setdefault(name, now_s) + KEEP_S

    def _rests(self, name: str, now_s: float) -> bool:
        return now_s < self._changed_s.get(name, now_s - REST_S) + REST_S

    def _best(self, node: _Node, name: str, profile: Profile, now: frozenset[str], now_s: float) -> tuple[float, frozenset[str]]:
        """Return where a model would best be, and how many fewer would wait; 0 where it should stay."""
        choices = _choices(profile, now)
        if self._rests(name, now_s):
            choices = [where for where in choices if where > now and name not in self._stuck]
        node.take(name, profile)
        try:
            return max(
                ((self._gain(node, name, profile, now, where), where) for where in choices),
                key=lambda each: (each[0], sorted(each[1])),
                default=(0.0, now),
            )
        finally:
            node.put(name, profile, now)

    def _gain(self, node: _Node, name: str, profile: Profile, now: frozenset[str], where: frozenset[str]) -> float:
        """Return how many fewer would wait if a model, which nobody asks anywhere in ``node``, were elsewhere; 0 for too few."""
        concerned = sorted(now | where)
        counts = []
        for each in (now, where):
            node.put(name, profile, each)
            counts.append(node.waiting(concerned))
            node.take(name, profile)
        before, after = counts
        if where < now:
            # Memory is worth something as well: a replica that takes next to nothing off the others is given up.
            # With fewer requests under way than it has devices, for more than that.
            tolerated = GAIN if profile.under_way < len(now) - 0.75 else _TOLERATED
            return max(before - after, 1e-9) if after <= tolerated * before else 0.0
        return before - after if before >= GAIN * after else 0.0

    def place(self, name: str, where: Iterable[str], now_s: float) -> None:
        """Note where a model is asked from now on."""
        where = frozenset(where)
        self._stuck.discard(name)
        if name in self.placed:
            self._changed_s[name] = now_s
            if where == self.placed[name]:
                self._stuck.add(name)
        self._spare_s.pop(name, None)
        self.placed[name] = where

    def forget(self, name: str) -> None:
        """Forget a model that is asked no more."""
        self.placed.pop(name, None)
        self._stuck.discard(name)
        self._changed_s.pop(name, None)
        self._spare_s.pop(name, None)

    def needed(self, profiles: Mapping[str, Profile]) -> dict[str, float]:
        """Return the part of its time that each device needs for what is asked of it."""
        return {name: load.needed() for name, load in self._node(profiles).loads.items()}

    def _node(self, profiles: Mapping[str, Profile], placed: Mapping[str, frozenset[str]] | None = None) -> _Node:
        placed = self.placed if placed is None else placed
        node = _Node(self.sites.values())
        # Those of one device first: around them, the others divide their requests.
        for name in sorted(placed.keys() & profiles.keys(), key=lambda name: (len(placed[name]), name)):
            if profiles[name].rate > _FEWEST:
                node.put(name, profiles[name], placed[name] & profiles[name].seconds.keys())
        return node


def _choices(profile: Profile, now: frozenset[str]) -> list[frozenset[str]]:
    """Return where a model might be instead: on one device, on one more, or on one less."""
    allowed = profile.seconds.keys()
    found = {frozenset({name}) for name in allowed}
    # More of them than requests under way have nothing to do.
    if len(now) + 1 <= max(1, round(profile.under_way)):
        found |= {now | {name} for name in allowed}
    if len(now) > 1:
        found |= {now - {name} for name in now}
    return sorted(found - {now}, key=sorted)


def _waiting(needed: float) -> float:
    """Return how many requests are in the mean with a device that needs this part of its time for them."""
    if needed < _CROWDED:
        return needed / (1 - needed)
    return _CROWDED / (1 - _CROWDED) + (needed - _CROWDED) / (1 - _CROWDED) ** 2


def seconds_of(costs: Mapping[str, Cost], slow: Mapping[str, float]) -> dict[str, float]:
    """Return what a request of one model takes on each device: as measured there, or by how its trials compare with another's.

    What a request costs in batches, and with what others have computed, is known where it was asked; a trial knows one run, in a
    bad moment perhaps: it is believed as far as it is within a factor of two of how ``slow`` devices are for other models.
    """
    measured = {name: cost.seconds for name, cost in costs.items() if cost.seconds is not None}
    found = {}
    for name, cost in costs.items():
        ratios = []
        for other, seconds in measured.items():
            if cost.tried_s and (tried_s := costs[other].tried_s):
                usual = slow[name] / slow[other] if name in slow and other in slow else cost.tried_s / tried_s
                ratios.append(seconds * min(max(cost.tried_s / tried_s, usual / _BELIEVED), usual * _BELIEVED))
        if name in measured:
            found[name] = measured[name]
        elif ratios:
            found[name] = min(ratios)
        else:
            # Without a trial nothing tells one device from another.
            found[name] = cost.tried_s or min(measured.values(), default=UNKNOWN_S)
    return found


def speeds(costs: Mapping[str, Mapping[str, Cost]]) -> dict[str, float]:
    """Return how many times as long a run takes on each device as on the first, in the median of models that were tried there.

    Devices of which too little is known are left out.
    """
    first = next(iter(costs.values()))
    found = {}
    for device, told in costs.items():
        ratios = [
            cost.tried_s / tried_s
            for name, cost in told.items()
            if cost.tried_s and name in first and (tried_s := first[name].tried_s)
        ]
        if len(ratios) >= _ENOUGH:
            found[device] = statistics.median(ratios)
    return found


def condensed(weights: Mapping[str, Iterable[Mapping[str, int]]]) -> dict[str, dict[str, int]]:
    """Return the bytes of models' weights with those as one that the same models have: names of them all, and their bytes."""
    users: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, parts in weights.items():
        merged = {digest: size_bytes for part in parts for digest, size_bytes in part.items()}
        sizes |= merged
        for digest in merged:
            users.setdefault(digest, []).append(name)
    found: dict[str, dict[str, int]] = {name: {} for name in weights}
    # What models have in common is called by the first weight of it.
    called: dict[tuple[str, ...], str] = {}
    for digest, names in users.items():
        shared = called.setdefault(tuple(names), digest)
        for name in names:
            found[name][shared] = found[name].get(shared, 0) + sizes[digest]
    return found
