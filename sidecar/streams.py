"""Streams: models that do not fit into the memory budget, run a window of stages at a time. Owned by the engine thread.

One model streams at a time; what is asked of others that do not fit waits, and so do requests for the same model that come when
its run has begun. The first stages stay from run to run, as many as ``sidecar.timeline`` finds best. Of the others those are held
that are about to run, as far ahead as there is room, and a stage that was run is the first to leave. Models that fit are served
beside it: what their requests hold is never taken from them; where too little is left, the stream waits until they are answered.
While one of them waits for memory the stream *yields*: it holds the stage that is about to run and the next one, what is being
read already, and nothing else. So neither keeps the other waiting for longer than a few stages, as long as both have room.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from trunkline.errors import BudgetExceeded

from sidecar import timeline
from sidecar.catalog import Deployed, Step
from sidecar.loads import Loads
from sidecar.residency import Residency
from sidecar.timeline import Leg, Timeline

# Stages that a stream holds while others wait for memory: one that runs, and one that is read meanwhile.
_LEAST_AHEAD: Final = 2
# How much the latest measurement counts in a running mean.
_WEIGHT: Final = 0.3
# Stages whose times are remembered.
_MOST: Final = 8192


@dataclass(slots=True)
class Counts:
    """Runs of models that streamed, the seconds they were predicted to take, and took."""

    runs: int = 0
    predicted_s: float = 0.0
    actual_s: float = 0.0
    # Times that there was no room for the next stage, for what others held.
    starved: int = 0


@dataclass(slots=True, eq=False)
class _Stream:
    """``front`` is the first stage that somebody has still to run; those from there to ``end`` are held."""

    deployed: Deployed
    timeline: Timeline
    started_s: float
    front: int = 0
    end: int = 0


@dataclass(slots=True)
class Streams:
    """The model that streams, if any. ``drop`` forgets evicted weights, ``pace`` gives the bytes that are read in a second."""

    residency: Residency
    loads: Loads
    drop: Callable[[Sequence[str]], None]
    pace: Callable[[], float]
    clock: Callable[[], float]
    counts: Counts = field(default_factory=Counts)
    # It cannot go on until leases of others are returned.
    starved: bool = False
    # With its last move it let go of something, which others may have.
    gave_way: bool = False
    _open: _Stream | None = None
    # Seconds a stage takes to run, by key, as measured in streams.
    _run_s: dict[str, float] = field(default_factory=dict)

    @property
    def deployed(self) -> Deployed | None:
        """Return the model that streams."""
        return None if self._open is None else self._open.deployed

    def enter(self, deployed: Deployed) -> bool:
        """Take a lease for a request on a model that does not fit; False when it has to wait for another run to end.

        Raises BudgetExceeded when not even two neighbouring stages fit.
        """
        if self._open is not None:
            # A run that all have left before it began has still to be ended.
            left = not self.residency.lease_count(self._open.deployed.plan)
            if self._open.deployed is not deployed or self._open.front or left:
                return False
            self.residency.lease_again(deployed.plan)
            return True
        legs, room_bytes = self._legs(deployed), self.residency.room_bytes
        found = timeline.plan(legs, room_bytes)
        if found is None:
            needed_bytes = timeline.smallest_room(legs)
            raise BudgetExceeded(
                f"{deployed.name} does not fit into memory, nor do two neighbouring stages of it, which take {needed_bytes} of "
                f"{room_bytes} bytes that are not pinned; raise the memory budget or unpin a model",
                needed_bytes=needed_bytes,
                budget_bytes=self.residency.budget_bytes,
            )
        self.residency.begin_stream(deployed.plan)
        self._open = _Stream(deployed, found, self.clock())
        return True

    def _legs(self, deployed: Deployed) -> list[Leg]:
        pace, pinned, weights = self.pace(), self.residency.pinned_weights(), self.residency.weights(deployed.plan)
        # Until a step has run in a stream its trial tells, and where that did not, nothing.
        tried_s = deployed.run_s or (0.0,) * len(deployed.steps)
        legs = []
        for step, run_s in zip(deployed.steps, tried_s, strict=True):
            # Pinned weights take no room of the stream's, and are not read.
            size_bytes = sum(weights[digest] for digest in dict.fromkeys(_digests([step])) if digest not in pinned)
            legs.append(Leg(size_bytes, size_bytes / pace, self._run_s.get(step.key, run_s)))
        return legs

    def ran(self, step: Step, seconds: float) -> None:
        """Note how long a stage took to run."""
        if len(self._run_s) >= _MOST:
            self._run_s.clear()
        known = self._run_s.get(step.key, seconds)
        self._run_s[step.key] = known + _WEIGHT * (seconds - known)

    def move(self, standing: Collection[int], yields: bool = False) -> bool:
        """Follow the requests of the stream, which stand before these stages. While it ``yields``, others wait for memory.

        Returns whether a run has ended with this, so that another may begin. Raises BudgetExceeded when there is no room for
        the next stage, and nobody from whom there will be.
        """
        stream = self._open
        self.gave_way = False
        if stream is None:
            return False
        if not standing:
            self.starved = False
            if self.residency.lease_count(stream.deployed.plan):
                # Something is still being read.
                return False
            self._open = None
            self.counts.runs += 1
            self.counts.predicted_s += stream.timeline.predicted_s
            self.counts.actual_s += self.clock() - stream.started_s
            return True
        before = self.residency.window(stream.deployed.plan)
        self._follow(stream, standing, yields)
        self.gave_way = not before <= self.residency.window(stream.deployed.plan)
        return False

    def _follow(self, stream: _Stream, standing: Collection[int], yields: bool) -> None:
        steps, plan, kept, front = stream.deployed.steps, stream.deployed.plan, stream.timeline.kept, min(standing)
        if front > stream.front:
            # In the order of the run: of those that were run, the first to leave is the one whose next use is furthest off,
            # the latest.
            self.residency.spend(plan, [*_digests(steps[max(kept, stream.front) : front])])
            stream.front = front
        # What is on its way has no handle yet that could be dropped, and a lane may be at what somebody stands before.
        coming = self.loads.on_their_way(stream.deployed.weights)
        busy = [*coming, *_digests([steps[number] for number in standing])]
        if yields:
            # Anew from the front on: the rest may leave.
            stream.end, most, keep = front, min(front + _LEAST_AHEAD, len(steps)), busy
        else:
            stream.end, most, keep = max(stream.end, front), len(steps), [*busy, *_digests(steps[:kept])]
        while stream.end < most and self._hold(stream, keep):
            stream.end += 1
        if stream.end == front and not self._hold(stream, busy):
            if not self.starved:
                self.counts.starved += 1
            self.starved = True
            if not coming and not self.residency.is_leased_beside(plan):
                raise BudgetExceeded(
                    f"there is no room left for stage {front + 1} of {len(steps)} of {stream.deployed.name}: pinned models take "
                    f"{self.residency.pinned_bytes} of {self.residency.budget_bytes} bytes; unpin one, or raise the budget",
                    pinned_bytes=self.residency.pinned_bytes,
                    budget_bytes=self.residency.budget_bytes,
                )
        else:
            stream.end = max(stream.end, front + 1)
            self.starved = False

    def _hold(self, stream: _Stream, keep: Sequence[str]) -> bool:
        """Have one stage more in memory; return whether there was room."""
        wanted = [*_digests(stream.deployed.steps[stream.front : stream.end + 1])]
        grant = self.residency.hold(stream.deployed.plan, wanted, keep)
        if grant is None:
            return False
        self.drop(grant.evict)
        # Not only what room was made for now: what an engine before this one left in memory has room, and no handle.
        self.loads.fetch(stream.deployed, [digest for digest in wanted if not self.residency.is_resident(digest)])
        return True


def _digests(steps: Sequence[Step]) -> Iterator[str]:
    for step in steps:
        for weight in step.graph.weights:
            yield weight.digest
