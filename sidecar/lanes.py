"""Lanes: threads that run stages at the same time, each with a share of the device of its own. They own no state.

On a CPU the threads that one operator may use are divided among the lanes; on CUDA each lane has a stream. What pays depends on
the models: an operator that is too small for many threads is better run beside another than by more of them. With one lane there
are no threads here at all: the engine runs stages itself.

The engine hands a lane one run at a time, and gets what it gave, or the error, through its inbox. From here to there nobody may
write to the inputs, and the weights must stay; that is the engine's to see to. A lane has let go of all of them, and what it gave
is complete, before the engine is told.
"""

from __future__ import annotations

import functools
import queue
import threading
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from sidecar.ports import Device


class Outcome(NamedTuple):
    """What a run gave, or why it failed, and the seconds it took."""

    given: Any
    seconds: float
    error: Exception | None = None


_Run = Callable[[], Any]
_Ended = Callable[[Outcome], None]


def attempt(run: _Run, clock: Callable[[], float]) -> Outcome:
    """Run something and return the outcome, whatever it is."""
    started_s = clock()
    try:
        given = run()
    except Exception as error:  # noqa: BLE001 - whoever gets the outcome answers for it
        _let_go(error)
        # This frame is one of them.
        del run
        return Outcome(None, clock() - started_s, error)
    return Outcome(given, clock() - started_s)


def _let_go(error: BaseException | None) -> None:
    """Have an error, and those behind it, hold on to nothing of the frames they came through: weights, and what was computed."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Lanes:
    """``count`` lanes on a device. Belongs to the engine thread; ``post`` puts something into its inbox.

    Raises DeviceFault when the device cannot be divided so.
    """

    def __init__(
        self, device: Device, count: int, post: Callable[[Callable[[], None]], None], clock: Callable[[], float]
    ) -> None:
        self.count = count
        self.idle_count = count
        self._device = device
        self._post = post
        self._clock = clock
        self._jobs: queue.SimpleQueue[tuple[_Run, _Ended] | None] = queue.SimpleQueue()
        begun: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        for number in range(count):
            threading.Thread(target=self._work, args=(begun,), name=f"lane {number}", daemon=True).start()
        errors = [error for error in (begun.get() for _ in range(count)) if error is not None]
        if errors:
            self.stop()
            raise errors[0]

    def hand(self, run: _Run, ended: _Ended) -> None:
        """Have an idle lane run something; ``ended`` is called in the engine thread with the outcome."""
        assert self.idle_count > 0, "no lane is idle"
        self.idle_count -= 1
        self._jobs.put((functools.partial(self._in_lane, self._device.mark(), run), ended))

    def _in_lane(self, mark: object, run: _Run) -> Any:
        self._device.begin_after(mark)
        try:
            return run()
        finally:
            self._device.settle()

    def stop(self) -> None:
        """End the threads, each after the run that it is at."""
        for _ in range(self.count):
            self._jobs.put(None)

    def _ended(self, ended: _Ended, outcome: Outcome) -> None:
        self.idle_count += 1
        ended(outcome)

    def _work(self, begun: queue.SimpleQueue[Exception | None]) -> None:
        begun.put(attempt(lambda: self._device.begin_lane(self.count), self._clock).error)
        while self._take():
            pass

    def _take(self) -> bool:
        # A frame of its own: a local of the loop would keep the last weights in memory after their eviction.
        job = self._jobs.get()
        if job is None:
            return False
        run, ended = job
        outcome = attempt(run, self._clock)
        del job, run
        self._post(functools.partial(self._ended, ended, outcome))
        # An error knows this frame, which must not know the error.
        del outcome, ended
        return True
