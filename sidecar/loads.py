"""Loads: weights on their way into memory, and the requests that wait for them. Owned by the engine thread.

Weights are read in the order of the stages that need them. A request is let go on its way when those of its first stage are
there; the others arrive while it is computed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from trunkline.errors import TrunklineError

from sidecar.bundle import Weight
from sidecar.catalog import Deployed, Joint, Step
from sidecar.memory import Wanted
from sidecar.mover import Mover
from sidecar.ports import Device, Work
from sidecar.residency import Residency
from sidecar.tracing import RequestNotes

# Copies of weights that were stacked may take this part of the budget beside it.
_STACKED_SHARE: Final = 0.01
# A copy of the weights of several steps serves a part of them, too, from one of so many on.
_LEAST_PART: Final = 2

log = logging.getLogger("trunkline.engine")


@dataclass(slots=True, eq=False)
class _Load:
    """Weights still on their way for a model, and what went wrong so far."""

    deployed: Deployed
    waiting: set[str]
    error: TrunklineError | None = None


@dataclass(frozen=True, slots=True)
class Stacked:
    """Copies of the weights of several steps as one, in the order of the steps' ``keys``."""

    keys: tuple[str, ...]
    weights: Any
    size_bytes: int


@dataclass(slots=True, eq=False)
class Parked:
    """A request that waits for weights of its ``parts``: those of their first stages, or all when it is for a load."""

    work: Work
    parts: tuple[Deployed, ...]
    joint: Joint | None
    waiting: set[str]


class Loads:
    """Handles of the weights in memory, and the loads under way.

    ``ready`` is called with a request that need not wait any more; ``failed`` with a model whose load failed, the requests that
    waited for it, and the error; ``done`` with one whose weights are all there.
    """

    def __init__(
        self,
        device: Device,
        residency: Residency,
        mover: Mover,
        ready: Callable[[Parked], None],
        failed: Callable[[Deployed, Sequence[Parked], TrunklineError], None],
        done: Callable[[Deployed], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._residency = residency
        self._mover = mover
        self._ready = ready
        self._failed = failed
        self._done = done
        self._clock = clock
        # Requests of which it is noted when weights of a model arrive, by the model's plan.
        self._watching: dict[str, list[RequestNotes]] = {}
        self._handles: dict[str, object] = {}
        self._loads: dict[str, _Load] = {}
        # Weights that the mover was asked for and has not brought yet.
        self._in_flight: set[str] = set()
        # By the steps' keys, the latest last.
        self._stacks: dict[tuple[str, ...], Stacked] = {}
        self.parked: list[Parked] = []
        self.fetched_bytes = 0

    def __contains__(self, deployed: Deployed) -> bool:
        return deployed.plan in self._loads

    def want(self, work: Work, parts: tuple[Deployed, ...], joint: Joint | None) -> None:
        """Have the weights of leased models loaded; the request is ready, at once or later. Until it is, it is ``parked``.

        ``joint`` is what several models were when they were leased: one of them may be gone before the others are loaded.
        """
        waiting: set[str] = set()
        for deployed in parts:
            if deployed.plan not in self._loads:
                self._start(deployed)
            if (load := self._loads.get(deployed.plan)) is None:
                continue
            if work.notes is not None:
                self.watch(deployed, work.notes)
            first = {weight.digest for weight in deployed.steps[0].graph.weights}
            waiting |= load.waiting if work.inputs is None else load.waiting & first
        parked = Parked(work, parts, joint, waiting)
        if waiting:
            self.parked.append(parked)
        else:
            self._ready(parked)

    def _start(self, deployed: Deployed) -> None:
        if deployed.loaded:
            return
        # In the order of the stages.
        missing = [digest for digest in deployed.weights if not self._residency.is_resident(digest)]
        if not missing:
            deployed.loaded = True
            return
        self.fetch(deployed, missing)

    def fetch(self, deployed: Deployed, missing: Sequence[str]) -> None:
        """Have some weights of a leased model loaded, beside those that are on their way."""
        if not missing:
            return
        load = self._loads.get(deployed.plan)
        if load is None:
            # The load itself holds a lease: bytes that are being read must not be taken for evictable.
            self._residency.lease_again(deployed.plan)
            load = self._loads[deployed.plan] = _Load(deployed, set())
        load.waiting.update(missing)
        # Those on their way for another model are waited for; those that failed on it are tried again.
        absent = set(missing) - self._in_flight
        self._in_flight |= absent
        for step in deployed.steps:
            wanted = []
            for weight in step.graph.weights:
                if weight.digest in absent:
                    absent.discard(weight.digest)
                    wanted.append(Wanted(weight, step.recipes.get(weight.digest)))
            if wanted:
                self._mover.fetch(wanted, self._arrived)

    def watch(self, deployed: Deployed, notes: RequestNotes) -> None:
        """Have it noted of a request when weights of a model arrive, until the request is over."""
        watching = [each for each in self._watching.get(deployed.plan, ()) if not each.ended_s and each is not notes]
        self._watching[deployed.plan] = [*watching, notes]

    def _note(self, pairs: Sequence[tuple[Weight, object]], begun_s: float, in_host_s: float) -> None:
        now, digests = self._clock(), {weight.digest for weight, _ in pairs}
        for plan, watching in list(self._watching.items()):
            left = [each for each in watching if not each.ended_s]
            load = self._loads.get(plan)
            if load is not None and not load.waiting.isdisjoint(digests):
                for notes in left:
                    notes.moved(begun_s, in_host_s, now)
            if left:
                self._watching[plan] = left
            else:
                del self._watching[plan]

    def _arrived(self, pairs: Sequence[tuple[Weight, object]], begun_s: float, in_host_s: float) -> None:
        if self._watching:
            self._note(pairs, begun_s, in_host_s)
        for weight, outcome in pairs:
            self._weight_arrived(weight, outcome)

    def _weight_arrived(self, weight: Weight, outcome: object) -> None:
        error = outcome if isinstance(outcome, TrunklineError) else None
        self._in_flight.discard(weight.digest)
        if error is None:
            self._handles[weight.digest] = outcome
            self._residency.arrived(weight.digest)
            self.fetched_bytes += weight.size_bytes
        else:
            log.error("weight %s could not be loaded: %s", weight.digest[:12], error.message)
        for load in list(self._loads.values()):
            if weight.digest in load.waiting:
                load.waiting.discard(weight.digest)
                load.error = load.error or error
                if not load.waiting:
                    self._finish(load)
        if error is None:
            self._wake(weight.digest)

    def _finish(self, load: _Load) -> None:
        deployed = load.deployed
        del self._loads[deployed.plan]
        if load.error is not None or self._residency.is_held(deployed.plan):
            # One that streams has further loads.
            self._watching.pop(deployed.plan, None)
        if load.error is not None:
            # Weights of another of their models may have kept them here.
            concerned = [parked for parked in self.parked if deployed in parked.parts]
            self.parked = [parked for parked in self.parked if parked not in concerned]
            self._failed(deployed, concerned, load.error)
            return
        # Not of one that streams.
        deployed.loaded = self._residency.is_held(deployed.plan)
        self._done(deployed)

    def _wake(self, digest: str) -> None:
        for parked in [parked for parked in self.parked if digest in parked.waiting]:
            parked.waiting.discard(digest)
            if not parked.waiting:
                self.parked.remove(parked)
                self._ready(parked)

    def on_their_way(self, weights: Collection[str]) -> list[str]:
        """Return those weights that the mover was asked for and has not brought yet; until then they must not be evicted."""
        return [digest for digest in self._in_flight if digest in weights]

    def is_ready(self, step: Step) -> bool:
        """Say whether all weights of a step are in memory."""
        return step.bound is not None or all(weight.digest in self._handles for weight in step.graph.weights)

    def bind(self, step: Step) -> list[object]:
        """Return the handles of a step's weights, which are in memory."""
        if step.bound is None:
            step.bound = [self._device.as_weight(self._handles[weight.digest], weight) for weight in step.graph.weights]
        return step.bound

    def stack(self, steps: Sequence[Step]) -> Stacked:
        """Return the weights of steps of one structure as one; those of some others may be among them.

        What was stacked lately is kept, up to a small size: which of many heads are asked at the same time changes all the time,
        and to copy their weights takes longer than to multiply by a few more.
        """
        wanted = {step.key: step for step in steps}
        found = min(
            (
                each
                for each in self._stacks.values()
                if wanted.keys() <= set(each.keys) and len(each.keys) <= _LEAST_PART * len(wanted)
            ),
            key=lambda each: len(each.keys),
            default=None,
        )
        if found is None:
            keys = tuple(sorted(wanted))
            size_bytes = sum(map(_size_bytes, wanted.values()))
            found = Stacked(keys, self._device.stack([self.bind(wanted[key]) for key in keys]), size_bytes)
        self._stacks.pop(found.keys, None)
        self._stacks[found.keys] = found
        while sum(each.size_bytes for each in self._stacks.values()) > self._stacks_limit_bytes:
            del self._stacks[next(iter(self._stacks))]
        return found

    @property
    def _stacks_limit_bytes(self) -> float:
        return self._residency.budget_bytes * _STACKED_SHARE

    def keeps(self, step: Step, count: int) -> bool:
        """Say whether the weights of so many steps like this one are kept once they are stacked, and not copied each time."""
        return count * _size_bytes(step) <= self._stacks_limit_bytes

    def moved(self, handles: Mapping[str, object]) -> list[str]:
        """Take new handles for those of weights that lie elsewhere now; return the weights that were lost on the way."""
        lost = []
        for digest in handles.keys() & self._handles.keys():
            handle = handles[digest]
            if isinstance(handle, TrunklineError):
                log.error("weight %s was lost: %s", digest[:12], handle.message)
                del self._handles[digest]
                self._residency.lost(digest)
                lost.append(digest)
            else:
                self._handles[digest] = handle
        return lost

    def drop(self, digests: Sequence[str]) -> None:
        """Forget the handles of weights that were evicted, and copies of them."""
        self.drop_copies()
        for digest in digests:
            self._handles.pop(digest, None)

    def drop_copies(self) -> None:
        """Forget weights that were stacked; they are stacked anew when they are needed."""
        self._stacks.clear()

    def free(self, digests: Sequence[str]) -> None:
        """Have the memory of weights freed, of which no handle is left."""
        self._mover.free(digests)

    def trim(self) -> None:
        """Have what was freed given back to the system."""
        self._mover.trim()

    def count(self, plan: str) -> int:
        """Return how many leases on a plan are held from here."""
        return (plan in self._loads) + sum(1 for parked in self.parked for deployed in parked.parts if deployed.plan == plan)

    def check_invariants(self) -> None:
        """Raise AssertionError when a handle is kept of a weight that is not in memory."""
        for digest in self._handles:
            assert self._residency.is_resident(digest), f"weight {digest[:12]} is kept though it was evicted"


def _size_bytes(step: Step) -> int:
    return sum(weight.size_bytes for weight in step.graph.weights)
