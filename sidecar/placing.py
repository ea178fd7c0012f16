"""Placing: a thread that looks once a second at what is asked of the engines of several devices, and moves models between them.

Every engine has all models deployed and fetches weights that are not there, so where a model is asked is a matter of speed, never
of whether it is answered. To move one is to have it loaded on the other device, and then to change the *table* that says where
each is asked, which is replaced as a whole: requests under way are answered where they are, and nothing is lost.

Decisions are those of ``sidecar.placement``. All state belongs to this thread; others read the table, and post what they have to
say.
"""

from __future__ import annotations

import functools
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from trunkline.errors import InvalidInput, TrunklineError
from trunkline.protocol import JOINT

from sidecar.constraints import Constraint, Constraints
from sidecar.engine import Engine
from sidecar.placement import Cost, Placement, Profile, Site, condensed, seconds_of, speeds
from sidecar.places import read_places, write_places
from sidecar.relays import Line

log = logging.getLogger("trunkline.engine")

LOOK_EVERY_S: Final = 1.0
# How much the latest second counts in the rate of requests, and in how many are under way, as a part of 1: when they change, and
# as long as they may be what they were.
_WEIGHT: Final = 0.3
_STEADY: Final = 0.03
# By so many standard deviations something has changed.
_DEVIATIONS: Final = 4.0
# Models that are asked together less often in a second are placed anew when they are.
_FEWEST: Final = 0.01
# In so many ways models are asked together on a device that it is counted and placed; there are more ways than are worth that.
MOST_JOINT: Final = 64


class Tally:
    """Requests that were sent to one device, and those that are under way, by what was asked for. Any thread.

    The server's thread counts them in, the engine's out.
    """

    def __init__(self) -> None:
        self.under_way = 0
        self._lock = threading.Lock()
        self._begun: dict[str, int] = {}
        self._open: Counter[str] = Counter()

    def begin(self, name: str) -> str:
        """Count a request in; return under which name, which is none for what is asked together in too many ways."""
        with self._lock:
            if JOINT in name and name not in self._begun and sum(JOINT in each for each in self._begun) >= MOST_JOINT:
                name = ""
            self._begun[name] = self._begun.get(name, 0) + 1
            self._open[name] += 1
            self.under_way += 1
        return name

    def end(self, name: str) -> None:
        """Count out one that was counted in as ``name``."""
        with self._lock:
            self._open[name] -= 1
            self.under_way -= 1

    def read(self) -> tuple[dict[str, int], dict[str, int]]:
        """Return how many requests there were, and how many are under way, by name."""
        with self._lock:
            return dict(self._begun), dict(self._open)

    def forget(self, names: Iterable[str]) -> None:
        """Forget names of which no request is under way."""
        with self._lock:
            for name in names:
                if not self._open[name]:
                    self._begun.pop(name, None)
                    del self._open[name]


class _Mean:
    """A running mean of what comes by chance: over half a minute, and over seconds once these say that it has changed.

    What comes seldom is never the same from one second to the next: models would move for that. Half as many requests as before
    are seen within seconds where they were many, and are believed later where they were few.
    """

    __slots__ = ("latest", "value")

    def __init__(self) -> None:
        self.value = self.latest = 0.0

    def note(self, found: float, seconds: float) -> None:
        self.latest += (1 - (1 - _WEIGHT) ** seconds) * (found - self.latest)
        self.value += (1 - (1 - _STEADY) ** seconds) * (found - self.value)
        # Counts vary as their square root; so many seconds, about, are in the latest mean.
        many_s = (2 - _WEIGHT) / _WEIGHT
        if abs(self.latest - self.value) > _DEVIATIONS * math.sqrt(max(self.value, 1 / many_s) / many_s):
            self.value = self.latest


class _Demand:
    """What is asked for under one name: requests in a second, and how many are under way, as running means."""

    __slots__ = ("_rate", "_under_way", "counted")

    def __init__(self, counted: int = 0) -> None:
        self.counted = counted
        self._rate = _Mean()
        self._under_way = _Mean()

    @property
    def rate(self) -> float:
        return self._rate.value

    @property
    def under_way(self) -> float:
        return self._under_way.value

    @property
    def is_quiet(self) -> bool:
        """Say whether nobody has asked for some time."""
        return self._rate.latest < _FEWEST

    def note(self, count: int, under_way: int, seconds: float) -> None:
        # Fewer than before where its count was begun anew.
        self._rate.note(max(0, count - self.counted) / seconds, seconds)
        self._under_way.note(under_way, seconds)
        self.counted = count


@dataclass(slots=True)
class _Move:
    """Where a model is to be asked, the devices that have not loaded it yet, and those that could not."""

    where: frozenset[str]
    coming: set[str]
    missed: set[str] = field(default_factory=set)


class Placing:
    """``run`` is the thread's body. ``table`` has the devices by what is asked for, ``seconds`` what a request takes on each.

    At ``path`` it is kept where models are asked, for the engines that come after these.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        tallies: Mapping[str, Tally],
        constraints: Constraints,
        path: Path,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.table: Mapping[str, frozenset[str]] = {}
        self.seconds: Mapping[str, Mapping[str, float]] = {}
        self._engines = engines
        self._first = next(iter(engines.values()))
        self._tallies = tallies
        self._constraints = constraints
        self._path = path
        self._clock = clock
        self._placement = Placement(Site(name, engine.budget_bytes, engine.pace) for name, engine in engines.items())
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._demands: dict[str, _Demand] = {}
        self._profiles: dict[str, Profile] = {}
        self._looked_s = clock()
        # What is served, or asked together, and what it costs on each device, as told last.
        self._names: list[str] = []
        self._costs: dict[str, Mapping[str, Cost]] = {device: {} for device in engines}
        # The plans that models had at the last look, and the bytes of their weights, those in common as one.
        self._plans: dict[str, tuple[str, ...]] = {}
        self._weights: dict[str, dict[str, int]] = {}
        # How slow the devices are, relative to each other.
        self._speeds: Mapping[str, float] = {}
        # Models on their way to other devices.
        self._moving: dict[str, _Move] = {}
        # Operators that wait until a model is where it may be.
        self._awaiting: list[tuple[str, Callable[[object], None]]] = []

    # --- any thread --------------------------------------------------------------------------------------------------

    def allowed(self, name: str) -> frozenset[str]:
        """Return the devices where a model, or several together, may be."""
        return frozenset.intersection(*(frozenset(self._constraints.devices_of(part)) for part in name.split(JOINT)))

    def describe(self, line: Line, request_id: int) -> None:
        """Tell what is asked where, and why."""
        self._inbox.put(lambda: line.conclude(request_id, self._described()))

    def constrain(self, line: Line, request_id: int, model: str, asked: Mapping[str, Any]) -> None:
        """Have a model be where an operator wants it; it is told when that is so."""
        self._inbox.put(lambda: self._constrain(line, request_id, model, asked))

    def stop(self) -> None:
        """End ``run``."""
        self._inbox.put(None)

    # --- the thread --------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Place what there is, if it can be where it was before a restart. Before any engine runs."""
        # Since it was there, operators may have had other devices, and what they had said of these counts again.
        known = read_places(self._path, list(self._engines))
        self._placement.placed = {name: allowed for name, where in known.items() if (allowed := where & self.allowed(name))}
        self._names = self._first.names()
        self._costs = {device: engine.costs(self._names) for device, engine in self._engines.items()}
        self._take()

    def run(self) -> None:
        """Look and move until told to stop."""
        while self._step():
            pass

    def _step(self) -> bool:
        try:
            job = self._inbox.get(timeout=self._pause_s())
        except queue.Empty:
            job = self._look
        if job is not None:
            try:
                job()
            except Exception:
                # A bug here leaves models where they are; requests go on.
                log.exception("models could not be placed")
        return job is not None

    def _pause_s(self) -> float:
        return max(0.0, self._looked_s + LOOK_EVERY_S - self._clock())

    def _look(self) -> None:
        """See what was asked since the last look, and have models moved that should be elsewhere."""
        now = self._clock()
        seconds, self._looked_s = max(now - self._looked_s, 1e-3), now
        begun, under_way = zip(*(each.read() for each in self._tallies.values()), strict=True)
        served = self._first.names()
        names = [*dict.fromkeys((*served, *(name for each in begun for name in each if JOINT in name)))]
        demands = {}
        for name in names:
            count = sum(each.get(name, 0) for each in begun)
            # Of a model that comes back, what was asked before it was gone was not asked now.
            demand = demands[name] = self._demands.get(name) or _Demand(0 if JOINT in name else count)
            demand.note(count, sum(each.get(name, 0) for each in under_way), seconds)
        self._demands = demands
        # What is asked together and was not for a while has no place, and leaves room for what is.
        quiet = [name for name in names[len(served) :] if demands[name].is_quiet]
        names = [name for name in names if name not in quiet]
        for tally in self._tallies.values():
            tally.forget(quiet)
        self._names = names
        self._choose()
        # For the next look: an engine that is busy now holds up nothing here.
        for device, engine in self._engines.items():
            engine.tell_costs(names, functools.partial(self._costs_told, device))

    def _costs_told(self, device: str, costs: Mapping[str, Cost]) -> None:
        """Take note of what models cost on a device; for engines."""
        self._inbox.put(lambda: self._costs.__setitem__(device, costs))

    def _choose(self) -> None:
        """Have models moved that should be elsewhere, by what is known."""
        self._take()
        for name, where in self._placement.look(self._clock(), self._profiles).items():
            if name not in self._moving:
                self._move(name, where)
        self._tell_awaiting()

    def _take(self) -> None:
        """Take up what models cost, place those that have no place yet, and forget those that are gone."""
        for device, engine in self._engines.items():
            self._placement.sites[device] = Site(device, engine.budget_bytes, engine.pace)
        # Packed weights may be of other sizes on other devices, but not by much. After a crash one has models deployed, and
        # another others.
        costs: dict[str, Cost] = {}
        for told in self._costs.values():
            costs = {**told, **costs}
        self._weigh(costs)
        self._speeds = speeds(self._costs)
        self._profiles = {name: made for name in self._names if (made := self._profile(name)) is not None}
        names = set(self._names)
        # Models that may not be on one device any more are not asked together.
        for gone in [name for name in self._placement.placed if name not in names or not self.allowed(name)]:
            self._placement.forget(gone)
        for name, profile in self._profiles.items():
            if name not in self._placement.placed:
                self._placement.place(name, {self._placement.first(profile, self._profiles)}, self._clock())
        self.seconds = {name: profile.seconds for name, profile in self._profiles.items()}
        self._publish()

    def _weigh(self, costs: Mapping[str, Cost]) -> None:
        """Find out which weights models have in common, when they are not those of the last look."""
        plans = {name: cost.plans for name, cost in costs.items()}
        if plans != self._plans:
            self._plans = plans
            self._weights = condensed({name: cost.weights for name, cost in costs.items()})

    def _profile(self, name: str) -> Profile | None:
        found = {device: self._costs[device][name] for device in self.allowed(name) if name in self._costs[device]}
        pinned = {device: cost for device, cost in found.items() if cost.is_pinned}
        if not found or name not in self._weights:
            return None
        seconds = seconds_of(found, self._speeds)
        demand = self._demands.get(name) or _Demand()
        return Profile(
            # In whose memory an operator keeps it, there it stays.
            {device: seconds[device] for device in pinned or found},
            self._weights[name],
            demand.rate,
            demand.under_way,
            {device: cost.resident_bytes for device, cost in found.items()},
        )

    def _publish(self) -> None:
        if self.table != self._placement.placed:
            self.table = dict(self._placement.placed)
            write_places(self._path, self.table)

    def _move(self, name: str, where: frozenset[str]) -> None:
        """Have a model loaded where it is to be asked and is not yet; then it is asked there."""
        now = self._placement.placed[name]
        log.info("%s is to be asked on %s instead of %s", name, _listed(where), _listed(now))
        self._moving[name] = _Move(where, set(where - now))
        for device in sorted(where - now):
            self._engines[device].bring(name, functools.partial(self._load_ended, name, device))
        self._end_move(name)

    def _load_ended(self, name: str, device: str, error: TrunklineError | None) -> None:
        """Take note of a load; for engines."""
        self._inbox.put(lambda: self._arrived(name, device, error))

    def _arrived(self, name: str, device: str, error: TrunklineError | None) -> None:
        move = self._moving[name]
        move.coming.discard(device)
        if error is not None:
            log.info("%s could not be loaded on %s: %s", name, device, error.message)
            move.missed.add(device)
        self._end_move(name)

    def _end_move(self, name: str) -> None:
        """Have a model asked where it is now, when nothing of it is on its way any more."""
        move = self._moving[name]
        if move.coming:
            return
        del self._moving[name]
        if name in self._placement.placed:
            now, allowed = self._placement.placed[name], self.allowed(name)
            # Where it could not be loaded it is asked only if it may be nowhere else: there it streams, or is told why not.
            where = (move.where - move.missed) & allowed or now & allowed or move.where & allowed
            if where:
                self._placement.place(name, where, self._clock())
                self._publish()
        self._tell_awaiting()

    def _constrain(self, line: Line, request_id: int, model: str, asked: Mapping[str, Any]) -> None:
        try:
            self._first.check_deployed(model)
            self._check_pins(model, self._constraints.of(model).changed(asked, list(self._engines)))
            self._constraints.change(model, asked)
        except TrunklineError as error:
            line.conclude(request_id, error)
            return
        if model not in self._profiles:
            # It is not deployed yet, and so nowhere: it will be loaded where it is asked first.
            allowed = self.allowed(model)
            placed = self._placement.placed.get(model, frozenset())
            self._placement.place(model, placed & allowed or [min(allowed)], self._clock())
            self._publish()
        self._awaiting.append((model, functools.partial(line.conclude, request_id)))
        self._choose()

    def _check_pins(self, model: str, constraint: Constraint) -> None:
        """Raise InvalidInput where a model is pinned that it may not be: a pin is a device's, and does not move."""
        left = [device for device in self._engines if device not in constraint.of(self._engines)]
        if held := [device for device in left if self._engines[device].is_pinned(model)]:
            raise InvalidInput(f"{model} is pinned on {', '.join(held)}; unpin it first")

    def _tell_awaiting(self) -> None:
        """Tell operators of models that are now where they may be."""
        for waiting in list(self._awaiting):
            name, tell = waiting
            if name in self._moving or not self._placement.placed.get(name, frozenset()) <= self.allowed(name):
                continue
            self._awaiting.remove(waiting)
            tell(self._described_model(name))

    def _described(self) -> dict[str, object]:
        needed = self._placement.needed(self._profiles)
        return {
            "devices": {
                device: {
                    "load": round(needed[device], 3),
                    "budget_bytes": engine.budget_bytes,
                    "under_way": self._tallies[device].under_way,
                }
                for device, engine in self._engines.items()
            },
            "models": [self._described_model(name) for name in sorted(self._placement.placed)],
        }

    def _described_model(self, name: str) -> dict[str, object]:
        profile = self._profiles.get(name)
        described: dict[str, object] = {
            "name": name,
            "devices": sorted(self._placement.placed.get(name, ())),
            "moving_to": sorted(self._moving[name].where) if name in self._moving else [],
            **self._constraints.of(name).to_plain(),
        }
        if profile is not None:
            described |= {
                "rate": round(profile.rate, 3),
                "under_way": round(profile.under_way, 3),
                "seconds": {device: round(seconds, 6) for device, seconds in profile.seconds.items()},
            }
        return described


def _listed(devices: frozenset[str]) -> str:
    return " and ".join(sorted(devices))
