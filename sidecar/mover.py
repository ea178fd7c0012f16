"""The mover: brings weights into memory and lets them go, in the order it was told, in a thread of its own that owns no state."""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from trunkline.errors import SidecarFault

from sidecar.bundle import Weight
from sidecar.memory import Memory, Wanted

log = logging.getLogger("trunkline.engine")

_FIRST_PACE: Final = 500e6
# How much the latest measurement counts in a running mean, and from how many bytes on it says something.
_WEIGHT: Final = 0.2
_ENOUGH_BYTES: Final = 1 << 20

# Run in the engine thread, with each weight and its handle, or a TrunklineError.
_Arrived = Callable[[Sequence[tuple[Weight, object]]], None]


class Mover:
    """Moves weights, what is asked first first. ``run`` is its thread's body; all else may be called anywhere.

    What is freed before something is fetched is gone when that is brought in: so bytes in memory stay within what the engine
    has counted.
    """

    def __init__(self, memory: Memory, post: Callable[[Callable[[], None]], None]) -> None:
        self._memory = memory
        self._post = post
        # Bytes that are brought in per second, as measured; before that, what most disks can do.
        self.pace = _FIRST_PACE
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def fetch(self, wanted: Sequence[Wanted], arrived: _Arrived) -> None:
        """Bring the weights of a step in; ``arrived`` is told of all of them at once."""
        self._jobs.put(lambda: self._fetch(wanted, arrived))

    def free(self, digests: Iterable[str]) -> None:
        """Let go of weights. No handle of them may be left."""
        self._jobs.put(lambda: self._memory.free(digests))

    def trim(self) -> None:
        """Give back what is kept for what comes next."""
        self._jobs.put(self._memory.trim)

    def stop(self) -> None:
        self._jobs.put(None)

    def run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:
                # A bug; what it was about is lost, but not the thread.
                log.exception("the mover failed at a job")

    def _fetch(self, wanted: Sequence[Wanted], arrived: _Arrived) -> None:
        # A frame of its own: a local of the loop would keep the last weights in memory after their eviction.
        outcomes: Sequence[object]
        started_s = time.perf_counter()
        try:
            outcomes = self._memory.bring(wanted)
            self._measure(sum(each.weight.size_bytes for each in wanted), time.perf_counter() - started_s)
        except Exception:
            log.exception("%d weights could not be brought in", len(wanted))
            outcomes = [SidecarFault("a weight could not be brought into memory; the sidecar's log says why")] * len(wanted)
        pairs = [(each.weight, outcome) for each, outcome in zip(wanted, outcomes, strict=True)]
        self._post(lambda: arrived(pairs))

    def _measure(self, size_bytes: int, seconds: float) -> None:
        if size_bytes >= _ENOUGH_BYTES:
            self.pace += _WEIGHT * (size_bytes / seconds - self.pace)
