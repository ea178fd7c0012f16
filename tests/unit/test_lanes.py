"""Lanes: what they were given runs in them, whatever comes of it is told, and nothing is kept of it."""

from __future__ import annotations

import functools
import gc
import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from trunkline.errors import DeviceFault

from sidecar.lanes import Lanes, Outcome, attempt
from tests.fakes import FakeDevice
from tests.unit.test_wavefront import alone, finish, front, model, rows, run, ticket
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.usefixtures("nothing_leaks")


class Traced(FakeDevice):
    """Notes what lanes ask of it."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def mark(self) -> object:
        return f"mark of {threading.current_thread().name}"

    def begin_after(self, mark: object) -> None:
        self.asked.append(f"after {mark}")

    def settle(self) -> None:
        self.asked.append("settle")


class Inbox:
    """The engine's inbox, emptied by the test."""

    def __init__(self) -> None:
        self.commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def take(self) -> None:
        self.commands.get(timeout=PATIENCE_S)()


def lanes_of(count: int, device: FakeDevice | None = None) -> tuple[Lanes, Inbox]:
    inbox = Inbox()
    return Lanes(device or FakeDevice(), count, inbox.commands.put, time.monotonic), inbox


def test_what_lanes_are_given_runs_at_the_same_time_and_is_told() -> None:
    device = FakeDevice()
    lanes, inbox = lanes_of(2, device)
    assert device.lanes_begun == 2
    both, told = threading.Barrier(2), []

    def meet(number: int) -> int:
        both.wait(PATIENCE_S)
        return number

    for number in range(2):
        lanes.hand(functools.partial(meet, number), told.append)
    assert lanes.idle_count == 0
    with pytest.raises(AssertionError, match="no lane is idle"):
        lanes.hand(lambda: None, told.append)
    assert not told
    for left in (1, 2):
        inbox.take()
        assert lanes.idle_count == left
    assert sorted(outcome.given for outcome in told) == [0, 1]
    assert all(outcome.seconds >= 0 and outcome.error is None for outcome in told)
    lanes.stop()


def test_a_run_begins_after_what_the_engine_began_and_ends_when_it_is_complete() -> None:
    device, told = Traced(), []
    lanes, inbox = lanes_of(1, device)
    lanes.hand(lambda: device.asked.append("run"), told.append)
    inbox.take()
    assert device.asked == ["after mark of MainThread", "run", "settle"]
    lanes.stop()


def test_what_a_lane_raises_is_told_and_the_lane_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    lanes, inbox = lanes_of(1, device)
    told: list[Outcome] = []

    def fail() -> None:
        raise RuntimeError("a bug")

    lanes.hand(fail, told.append)
    inbox.take()
    monkeypatch.setattr(device, "settle", fail)
    lanes.hand(lambda: 1, told.append)
    inbox.take()
    monkeypatch.undo()
    lanes.hand(lambda: 2, told.append)
    inbox.take()
    assert [str(outcome.error) for outcome in told] == ["a bug", "a bug", "None"]
    assert told[2].given == 2
    lanes.stop()


class Weight:
    """Something whose life is watched."""


@pytest.mark.parametrize("fails", [False, True])
def test_a_lane_keeps_nothing_of_what_it_ran(fails: bool) -> None:
    lanes, inbox = lanes_of(1)
    told: list[Outcome] = []
    weight = Weight()
    watched = weakref.ref(weight)

    def compute(bound: Weight) -> None:
        values = [bound]
        if fails:
            try:
                raise LookupError("first")
            except LookupError as error:
                raise DeviceFault(f"{len(values)} failed") from error

    lanes.hand(functools.partial(compute, weight), told.append)
    del weight
    inbox.take()
    # Though the error is still there, and tells where it came from.
    assert (told[0].error is not None) == fails
    assert told[0].error is None or told[0].error.__traceback__ is not None
    gc.collect()
    assert watched() is None
    lanes.stop()


def test_a_device_that_cannot_be_divided_says_so() -> None:
    class Whole(FakeDevice):
        def begin_lane(self, count: int) -> None:
            super().begin_lane(count)
            if self.lanes_begun == count:
                raise DeviceFault("no room for a stream")

    with pytest.raises(DeviceFault, match="no room for a stream"):
        lanes_of(3, Whole())


def test_an_attempt_takes_as_long_as_it_takes() -> None:
    times = iter([1.0, 3.5])
    assert attempt(lambda: "done", lambda: next(times)) == Outcome("done", 2.5)


# --- the wavefront with several lanes ---------------------------------------------------------------------------------


def begin(wavefront: Any, idle: int = 1) -> Any:
    group = wavefront.choose(idle=idle)
    assert group is not None
    group.running = True
    return group


def end(wavefront: Any, group: Any) -> dict[object, Any]:
    group.running = False
    return {done.call: results for done, results in wavefront.advance(group, run(group.step, group.takes()))}


def test_a_running_group_is_neither_chosen_nor_merged_nor_waited_for() -> None:
    wavefront = front()
    wavefront.lanes = 2
    made = model(2, 3, 5)
    wavefront.add([ticket("first", made, rows(1))])
    first = begin(wavefront)
    wavefront.add([ticket("second", made, rows(2))])
    second = begin(wavefront)
    assert second is not first
    assert [each.extent for each in (first, second)] == [1, 1]
    assert wavefront.choose() is None
    assert wavefront.others(first, lambda one, other: True) == []
    end(wavefront, first)
    # It is ahead, and the other, which is behind, is under way: nobody waits.
    assert begin(wavefront).index == 1
    end(wavefront, second)
    answers = finish(wavefront_of(wavefront))
    for call, x in (("first", rows(1)), ("second", rows(2))):
        assert answers[call][0][0].tolist() == alone(made, x)[0].tolist()


def wavefront_of(wavefront: Any) -> Any:
    """Have nothing run any more."""
    for group in wavefront._groups:
        group.running = False
    return wavefront


def test_rows_are_shared_out_among_idle_lanes() -> None:
    wavefront = front()
    wavefront.lanes = 3
    for number in range(7):
        wavefront.add([ticket(number, model(2), rows(number))])
    sizes = [begin(wavefront, idle).extent for idle in (3, 2, 1)]
    # Each lane takes its share of what is left, rounded up.
    assert sizes == [3, 2, 2]
    assert wavefront.choose() is None


def test_one_idle_lane_takes_as_many_rows_as_it_may() -> None:
    wavefront = front(most_rows=4)
    wavefront.lanes = 2
    for number in range(7):
        wavefront.add([ticket(number, model(2), rows(number))])
    assert begin(wavefront, 1).extent == 4


def test_who_asks_the_same_joins_a_row_that_is_running() -> None:
    wavefront, ran = front(), Counter[str]()
    made, other = model(2, 3, 5), model(2, 3, 7)
    mine = rows(1)
    wavefront.add([ticket("first", made, mine)])
    group = begin(wavefront)
    seen = group.frozen()
    wavefront.add([ticket("second", other, rows(1))])
    assert len(group.rows[0].tickets) == 2
    # The lane goes on with what it was given; who joined does not depend on whose it was.
    assert seen.takes()[0] is mine
    assert group.takes()[0] is not mine
    assert len(list(seen.tickets())) == 1
    group.running = False
    wavefront.advance(group, run(seen.step, seen.takes()))
    wavefront.drop(lambda each: each.call == "first")
    answers = finish(wavefront, ran)
    assert answers["second"][0][0].tolist() == alone(other, rows(1))[0].tolist()
    assert ran == {"/2/3": 1, "/2/3/7": 1}


def test_rows_that_are_left_while_they_run_go_when_that_has_ended() -> None:
    wavefront = front()
    made = model(2, 3)
    for number in range(3):
        wavefront.add([ticket(number, made, rows(number))])
    group = begin(wavefront)
    wavefront.drop(lambda each: each.call in (0, 2))
    assert wavefront.choose() is None
    assert group.extent == 3
    end(wavefront, group)
    last = wavefront.choose()
    assert last is not None
    assert last.extent == 1
    assert end(wavefront, last)[1][0].tolist() == alone(made, rows(1))[0].tolist()


def test_of_a_batch_that_fails_those_who_stayed_are_run_alone() -> None:
    wavefront = front()
    for number in range(3):
        wavefront.add([ticket(number, model(2), rows(number))])
    group = begin(wavefront)
    wavefront.drop(lambda each: each.call == 1)
    group.running = False
    assert wavefront.fail(group) == []
    answers = finish(wavefront)
    assert sorted(answers) == [0, 2]
    assert answers[2][0][0].tolist() == alone(model(2), rows(2))[0].tolist()


def test_a_group_nobody_waits_for_any_more_is_gone_though_it_runs() -> None:
    wavefront = front()
    wavefront.add([ticket(0, model(2, 3), rows(0))])
    begin(wavefront)
    wavefront.drop(lambda each: True)
    assert not wavefront
    # Who comes now begins anew.
    wavefront.add([ticket(1, model(2, 3), rows(0))])
    assert len(finish(wavefront)) == 1


def test_what_is_abandoned_is_not_running() -> None:
    wavefront = front()
    wavefront.lanes = 2
    wavefront.add([ticket("running", model(2), rows(0))])
    begin(wavefront)
    wavefront.add([ticket("waiting", model(3), rows(1))])
    assert [each.call for each in wavefront.abandon()] == ["waiting"]


def test_equal_inputs_that_are_computed_once_are_one_row() -> None:
    wavefront = front()
    for number, row in enumerate((1, 1, 2)):
        wavefront.add([ticket(number, model(2, 3), rows(row))])
    assert wavefront.row_count == 2
