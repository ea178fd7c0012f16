"""Requests in the wavefront: everybody gets his own answer, what is equal runs once, and one's failure stays his own."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline.errors import DeviceFault

from sidecar.costs import BatchCosts
from sidecar.wavefront import INPUT, Group, Layouts, Padding, Ticket, Wavefront

X = b"x"


@dataclass(frozen=True)
class Step:
    """Multiplies by ``factor`` and adds one; beside that it passes on what some later step of its model wants."""

    key: str
    factor: int
    takes: tuple[bytes, ...]
    gives: tuple[bytes, ...]
    alive: frozenset[bytes]


class Arrays:
    """numpy, counting."""

    def __init__(self) -> None:
        self.joins = 0
        self.copies = 0
        self.full = False

    def join(self, tensors: Sequence[Any], axis: int) -> Any:
        if self.full:
            raise DeviceFault("full")
        self.joins += 1
        return np.concatenate(tensors, axis)

    def pad(self, tensor: Any, axis: int, size: int) -> Any:
        widths = [(0, size - length if number == axis else 0) for number, length in enumerate(tensor.shape)]
        return np.pad(tensor, widths)

    def part(self, tensor: Any, axis: int, start: int, length: int) -> Any:
        return tensor.take(range(start, start + length), axis)

    def same(self, one: Any, other: Any) -> bool:
        return bool(one.shape == other.shape and (one == other).all())

    def copy(self, tensor: Any) -> Any:
        self.copies += 1
        return tensor.copy()


def model(*factors: int, skip: bool = False) -> tuple[list[Step], tuple[bytes, ...], Layouts]:
    """Return steps, results and layouts of a chain; with ``skip`` its first tensor, folded, and a constant stay to the end."""
    steps: list[Step] = []
    layouts: dict[bytes, int | None] = {X: INPUT}
    path, last = "", X
    for number, factor in enumerate(factors):
        path += f"/{factor}"
        given = path.encode()
        gives: tuple[bytes, ...] = (given,)
        takes: tuple[bytes, ...] = (last,)
        alive = {given}
        layouts[given] = INPUT
        if skip:
            path += "s"
            layouts |= {b"folded": 1, b"constant": None}
            alive |= {b"folded", b"constant"}
            gives = (given, b"folded", b"constant") if number == 0 else gives
        steps.append(Step(path, factor, takes, gives, frozenset(alive)))
        last = given
    return steps, (last, b"folded", b"constant") if skip else (last,), layouts


def run(step: Step, takes: Sequence[Any]) -> list[Any]:
    """Compute a step: rows along axis 0; ``folded`` has two places along axis 1 for each row."""
    x = takes[0]
    outputs = [x * step.factor + 1]
    if len(step.gives) == 3:
        outputs += [np.stack([x[:, 0], -x[:, 0]], 1).reshape(1, -1), np.arange(3)]
    return outputs


def alone(made: tuple[list[Step], tuple[bytes, ...], Layouts], x: Any) -> list[Any]:
    values = {X: x}
    for step in made[0]:
        values |= zip(step.gives, run(step, [values[key] for key in step.takes]), strict=True)
    return [values[key] for key in made[1]]


def ticket(call: object, made: tuple[list[Step], tuple[bytes, ...], Layouts], x: Any, **changed: Any) -> Ticket[Any]:
    return Ticket(call, made[0], made[1], {X: x}, len(x), **({"layouts": made[2]} | changed))


def front(arrays: Arrays | None = None, most_rows: int = 8) -> Wavefront[Any]:
    return Wavefront(arrays or Arrays(), BatchCosts(), most_rows)


def finish(wavefront: Wavefront[Any], ran: Counter[str] | None = None) -> dict[object, list[list[Any]]]:
    answers: dict[object, list[list[Any]]] = {}
    while (group := wavefront.choose()) is not None:
        if ran is not None:
            ran[group.step.key] += 1
        for done, results in wavefront.advance(group, run(group.step, group.takes())):  # type: ignore[arg-type]
            answers.setdefault(done.call, []).append(results)
    return answers


def rows(*numbers: float) -> Any:
    return np.array([[number, number] for number in numbers])


def test_models_asked_together_run_their_trunk_once() -> None:
    wavefront, ran = front(), Counter[str]()
    one, other = model(2, 3, 5), model(2, 3, 7)
    wavefront.add([ticket("call", one, rows(1)), ticket("call", other, rows(1))])
    answers = finish(wavefront, ran)["call"]
    assert [answer[0].tolist() for answer in answers] == [alone(one, rows(1))[0].tolist(), alone(other, rows(1))[0].tolist()]
    assert ran == {"/2": 1, "/2/3": 1, "/2/3/5": 1, "/2/3/7": 1}


def test_requests_of_different_functions_are_one_batch_until_they_part() -> None:
    wavefront, ran = front(), Counter[str]()
    for number, head in enumerate((5, 7, 5)):
        wavefront.add([ticket(number, model(2, 3, head), rows(number))])
    answers = finish(wavefront, ran)
    assert ran == {"/2": 1, "/2/3": 1, "/2/3/5": 1, "/2/3/7": 1}
    for number, head in enumerate((5, 7, 5)):
        assert answers[number][0][0].tolist() == alone(model(2, 3, head), rows(number))[0].tolist()


def test_an_equal_input_joins_the_row_under_way() -> None:
    arrays, ran = Arrays(), Counter[str]()
    wavefront = front(arrays)
    made = model(2, 3, 5)
    wavefront.add([ticket("first", made, rows(1))])
    group = wavefront.choose()
    assert group is not None
    ran[group.step.key] += 1
    wavefront.advance(group, run(group.step, group.takes()))  # type: ignore[arg-type]
    wavefront.add([ticket("second", model(2, 3, 7), rows(1))])
    wavefront.add([ticket("other", made, rows(9))])
    wavefront.add([ticket("private", made, rows(1), shares=False)])
    answers = finish(wavefront, ran)
    assert set(answers) == {"first", "second", "other", "private"}
    # Once for the two, once for the batch of the others.
    assert ran["/2"] == 2
    assert answers["second"][0][0].tolist() == alone(model(2, 3, 7), rows(1))[0].tolist()


def test_a_row_that_others_joined_does_not_depend_on_whose_it_was() -> None:
    arrays = Arrays()
    wavefront = front(arrays)
    mine = rows(1)
    wavefront.add([ticket("short", model(2), mine)])
    wavefront.add([ticket("long", model(3, 5), mine.copy())])  # parts at once: a row of its own
    wavefront.add([ticket("joined", model(3, 7), mine.copy())])
    assert arrays.copies == 1
    answers = finish(wavefront)
    assert answers["joined"][0][0].tolist() == alone(model(3, 7), rows(1))[0].tolist()


class NoCopies(Arrays):
    def copy(self, tensor: Any) -> Any:
        raise DeviceFault("no room")


def test_where_there_is_no_room_for_a_copy_nobody_joins_a_row() -> None:
    wavefront, ran = front(NoCopies(), most_rows=1), Counter[str]()
    for number, factor in enumerate((5, 7)):
        wavefront.add([ticket(number, model(2, factor), rows(1))])
    answers = finish(wavefront, ran)
    assert ran["/2"] == 2
    for number, factor in enumerate((5, 7)):
        assert answers[number][0][0].tolist() == alone(model(2, factor), rows(1))[0].tolist()


def test_places_that_do_not_go_to_rows_in_equal_parts_are_a_fault() -> None:
    wavefront = front()
    for number in range(2):
        wavefront.add([ticket(number, model(2), rows(number))])
    group = wavefront.choose()
    assert group is not None
    assert group.places(X) == (0, 1)
    group.values[X] = rows(1, 2, 3)
    with pytest.raises(DeviceFault, match="3 places of a tensor do not go to 2 rows"):
        group.places(X)


def test_a_model_whose_rows_touch_each_other_is_alone() -> None:
    wavefront, ran = front(), Counter[str]()
    made = model(2, 3)
    for number in range(3):
        wavefront.add([ticket(number, made, rows(number), layouts=None)])
    # Who asks the same may join all the same: that is one row.
    wavefront.add([ticket("same", made, rows(1), layouts=None)])
    answers = finish(wavefront, ran)
    assert ran == {"/2": 3, "/2/3": 3}
    assert len(answers) == 4


def test_a_batch_has_a_largest_size() -> None:
    wavefront, ran = front(most_rows=4), Counter[str]()
    for number in range(10):
        wavefront.add([ticket(number, model(2), rows(number))])
    wavefront.add([ticket("large", model(2), rows(*range(9)))])
    assert len(finish(wavefront, ran)) == 11
    assert ran == {"/2": 4}


def test_no_batch_is_larger_than_a_model_takes() -> None:
    wavefront, ran = front(), Counter[str]()
    for number in range(6):
        wavefront.add([ticket(number, model(2), rows(number), most=2 if number == 5 else 64)])
    finish(wavefront, ran)
    assert ran == {"/2": 2}


def test_calls_of_nearly_one_length_are_padded_to_one_batch() -> None:
    """Sums of rows with a mask of their own: what is padded with zeros changes nothing."""
    wavefront, ran = front(), Counter[str]()
    path = ("/a", "/a/b")
    steps = [
        Step(path[0], 1, (X,), (b"y",), frozenset((b"y",))),
        Step(path[1], 1, (b"y",), (b"z",), frozenset((b"z",))),
    ]
    layouts: Layouts = {X: INPUT, b"y": INPUT, b"z": INPUT}
    lengths = (3, 5, 16, 17, 30)
    for length in lengths:
        x = np.arange(1.0, length + 1)[None]
        wavefront.add([Ticket(length, steps, (b"z",), {X: x}, 1, layouts, padding=Padding({X: 1}, (1,), length))])
    answers: dict[object, Any] = {}
    while (group := wavefront.choose()) is not None:
        ran[group.step.key] += 1
        for done, results in wavefront.advance(group, [group.takes()[0] * 2]):
            answers[done.call] = results[0]
    # Up to 16, and up to 32.
    assert ran == {"/a": 2, "/a/b": 2}
    for length in lengths:
        assert answers[length].tolist() == (4 * np.arange(1.0, length + 1)[None]).tolist()


def test_those_who_come_early_enough_catch_up_once() -> None:
    wavefront, ran = front(), Counter[str]()
    made = model(2, 3, 5, 7)

    def step() -> None:
        group = wavefront.choose()
        assert group is not None
        ran[group.step.key] += 1
        wavefront.advance(group, run(group.step, group.takes()))  # type: ignore[arg-type]

    wavefront.add([ticket(0, made, rows(0))])
    step()
    wavefront.add([ticket(1, made, rows(1))])
    step()
    assert ran == {"/2": 2}
    step()
    assert ran == {"/2": 2, "/2/3": 1}
    # A third one is not waited for: the two have waited already.
    wavefront.add([ticket(2, made, rows(2))])
    step()
    assert ran["/2/3/5"] == 1
    finish(wavefront, ran)
    assert ran == {"/2": 3, "/2/3": 2, "/2/3/5": 2, "/2/3/5/7": 2}


def test_a_failure_is_one_row_s() -> None:
    wavefront = front()
    made = model(2, 3)
    for number in range(3):
        wavefront.add([ticket(number, made, rows(number))])
    failed: list[object] = []
    answers: dict[object, Any] = {}
    while (group := wavefront.choose()) is not None:
        if group.index == 0 and (group.takes()[0] == 1).any():
            failed += [each.call for each in wavefront.fail(group)]
            continue
        for done, results in wavefront.advance(group, run(group.step, group.takes())):  # type: ignore[arg-type]
            answers[done.call] = results
    assert failed == [1]
    assert answers.keys() == {0, 2}


class Torn(Arrays):
    def part(self, tensor: Any, axis: int, start: int, length: int) -> Any:
        raise DeviceFault("no room")


def batch_that_cannot_be_parted() -> tuple[Wavefront[object], Group[object]]:
    wavefront = front(Torn())
    for number in range(3):
        wavefront.add([ticket(number, model(2, 3), rows(number))])
    group = wavefront.choose()
    assert group is not None
    return wavefront, group


def test_where_there_is_no_room_even_to_part_a_batch_all_of_it_fails() -> None:
    wavefront, group = batch_that_cannot_be_parted()
    assert sorted(each.call for each in wavefront.fail(group)) == [0, 1, 2]
    assert len(wavefront) == 0


def test_a_group_of_which_nothing_can_be_chosen_is_abandoned() -> None:
    wavefront, group = batch_that_cannot_be_parted()
    wavefront.advance(group, run(group.step, group.takes()))  # type: ignore[arg-type]
    wavefront.drop(lambda each: each.call == 1)
    with pytest.raises(DeviceFault):
        wavefront.choose()
    assert sorted(each.call for each in wavefront.abandon()) == [0, 2]
    assert wavefront.choose() is None


def test_where_there_is_no_room_for_a_batch_there_is_none() -> None:
    arrays, ran = Arrays(), Counter[str]()
    arrays.full = True
    wavefront = front(arrays)
    for number in range(3):
        wavefront.add([ticket(number, model(2, 3), rows(number))])
    assert len(finish(wavefront, ran)) == 3
    assert ran == {"/2": 3, "/2/3": 3}


def test_rows_nobody_waits_for_are_not_run() -> None:
    wavefront, ran = front(), Counter[str]()
    for number in range(3):
        wavefront.add([ticket(number, model(2, 3, skip=True), rows(number))])
    group = wavefront.choose()
    assert group is not None
    wavefront.advance(group, run(group.step, group.takes()))  # type: ignore[arg-type]
    assert [each.call for each in wavefront.drop(lambda each: each.call in (0, 2))] == [0, 2]
    group = wavefront.choose()
    assert group is not None
    assert group.extent == 1
    answers = {done.call: results for done, results in wavefront.advance(group, run(group.step, group.takes()))}  # type: ignore[arg-type]
    assert [value.tolist() for value in answers[1]] == [value.tolist() for value in alone(model(2, 3, skip=True), rows(1))]
    wavefront.add([ticket(3, model(2, 3), rows(3))])
    wavefront.drop(lambda each: True)
    assert not finish(wavefront, ran)
    assert len(wavefront) == 0


@settings(deadline=None, max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_everybody_gets_the_answer_he_would_get_alone(seed: int, most_rows: int) -> None:
    """Random arrivals, models, equal inputs, failures and departures: one right answer each, and none for those who left."""
    chance = random.Random(seed)
    wavefront = front(most_rows=most_rows)
    expected: dict[int, list[list[Any]]] = {}
    answers: dict[int, list[list[Any]]] = {}
    gone: set[int] = set()
    calls = 0
    while calls < 25 or len(wavefront):
        if calls < 25 and chance.random() < 0.5:
            skip = chance.random() < 0.3
            x = rows(*(chance.randrange(4) for _ in range(chance.choice((1, 1, 2)))))
            made = [model(2, *(chance.choice((3, 5)) for _ in range(chance.randrange(4))), skip=skip) for _ in range(2)]
            parts = made[: chance.choice((1, 2))]
            together = chance.random() < 0.8
            wavefront.add(
                [ticket(calls, part, x, layouts=part[2] if together else None, shares=chance.random() < 0.8) for part in parts]
            )
            expected[calls] = [alone(part, x) for part in parts]
            calls += 1
        group: Group[Any] | None = wavefront.choose()
        if group is None:
            continue
        if chance.random() < 0.05:
            for each in wavefront.fail(group):
                gone.add(each.call)
                wavefront.drop(lambda other, each=each: other.call == each.call)  # type: ignore[misc]
            continue
        for done, results in wavefront.advance(group, run(group.step, group.takes())):  # type: ignore[arg-type]
            answers.setdefault(done.call, []).append(results)
        if chance.random() < 0.05:
            left = chance.randrange(calls)
            if wavefront.drop(lambda other, left=left: other.call == left):  # type: ignore[misc]
                gone.add(left)

    def plain(parts: list[list[Any]]) -> list[str]:
        return sorted(str([value.tolist() for value in values]) for values in parts)

    for call, parts in expected.items():
        if call not in gone:
            assert plain(answers[call]) == plain(parts)


def test_costs_of_one_lane_say_nothing_of_another_number() -> None:
    costs = BatchCosts()

    def measure(lanes: int | None, one_s: float, four_s: float) -> None:
        for _ in range(5):
            costs.record("a", 1, one_s, lanes)
            costs.record("a", 4, four_s, lanes)

    measure(None, 1.0, 2.0)
    assert costs.pays(["a"], 1, 4)
    costs.lanes = 2
    assert not costs.is_known("a", 1)
    measure(None, 1.0, 8.0)
    assert not costs.pays(["a"], 1, 4)
    # Of a stage that had the whole device meanwhile.
    measure(1, 1.0, 8.0)
    assert not costs.pays(["a"], 1, 4)
    costs.lanes = 1
    assert costs.is_known("a", 4)
    assert costs.pays(["a"], 1, 4)


def test_a_batch_that_does_not_pay_is_not_made_and_tried_again_later() -> None:
    costs = BatchCosts()
    for _ in range(4):
        costs.record("conv", 1, 1.0)
        costs.record("conv", 8, 9.0)
        costs.record("layer", 1, 1.0)
        costs.record("layer", 8, 2.0)
    assert not costs.pays(["conv"], 1, 8)
    assert costs.pays(["layer"], 1, 8)
    assert costs.pays(["conv", "layer"], 1, 8)
    assert costs.pays(["conv", "unknown"], 5, 8)
    assert costs.pays(["conv"], 1, 4)
    # The worse it was, the later.
    assert not any(costs.pays(["conv"], 1, 8) for _ in range(223))
    assert costs.pays(["conv"], 1, 8)
    # One run decides: it was a bad moment, or it was not.
    assert costs.pays(["conv"], 1, 8)
    costs.record("conv", 8, 16.0)
    assert not costs.pays(["conv"], 1, 8)
    assert any(costs.pays(["conv"], 1, 8) for _ in range(225))
    costs.record("conv", 8, 7.0)
    assert costs.pays(["conv"], 1, 8)


def test_no_single_run_says_what_a_batch_costs() -> None:
    costs = BatchCosts()
    for seconds in (9.0, 9.0, 1.0, 9.0):
        # The first sets something up; of the next three the fastest counts.
        assert not costs.is_known("a", 1)
        assert costs.pays(["a"], 1, 2)
        costs.record("a", 1, seconds)
        costs.record("a", 2, 2 * seconds)
    assert costs.is_known("a", 1)
    for _ in range(9):
        costs.record("a", 2, 2.0)
    # A run that takes a hundred times as long counts as one that takes twice, and for little.
    costs.record("a", 2, 200.0)
    assert not costs.pays(["a"], 1, 2)
    costs.record("a", 2, 1.6)
    assert costs.pays(["a"], 1, 2)
    # What is slower for good is found to be.
    for _ in range(9):
        costs.record("a", 2, 2.4)
    assert not costs.pays(["a"], 1, 2)


def test_what_a_row_costs_alone_is_measured_again_now_and_then() -> None:
    costs = BatchCosts()
    for rows, seconds in ((1, 1.0), (4, 2.0)):
        for _ in range(4):
            costs.record("stage", rows, seconds)
    # Alone it was measured in a bad moment.
    asked = [costs.pays(["stage"], 1, 4) for _ in range(200)]
    assert asked == [True] * 199 + [False]
    costs.record("stage", 1, 0.4)
    assert not costs.pays(["stage"], 1, 4)


def test_the_first_run_and_old_stages_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs._MOST", 4)
    costs = BatchCosts()
    for rows_ in (1, 8):
        costs.record("a", rows_, 100.0 * rows_ * rows_)
    assert costs.pays(["a"], 1, 8)
    for number in range(9):
        costs.record(f"s{number}", 1, 1.0)
    assert len(costs._seen) <= 4


def test_groups_on_tensors_of_their_own_are_found_abreast() -> None:
    wavefront = front(most_rows=1)
    wavefront.add([ticket("first", model(2), rows(1))])
    given = {
        "second": ticket("second", model(3), rows(2)),
        # The same stage again: that would be a batch.
        "third": ticket("third", model(3), rows(3)),
        "more rows": ticket("more rows", model(5), rows(1, 2)),
        "other numbers": ticket("other numbers", model(7), rows(1).astype(np.float32)),
        "untried": ticket("untried", model(11), rows(4), layouts=None),
        "not alike": ticket("not alike", model(13), rows(5)),
        "not equal": ticket("not equal", model(17), rows(6)),
        "running": ticket("running", model(19), rows(7)),
        "apart": ticket("apart", model(23), rows(8)),
        "last": ticket("last", model(29), rows(9)),
    }
    for each in reversed(given.values()):
        wavefront.add([each])
    groups = {group.first.call: group for group in wavefront._groups}
    groups["running"].running = groups["apart"].apart = True

    def abreast(group: Group[Any]) -> list[object]:
        others = wavefront.others(group, lambda one, other: "/13" not in (one.key, other.key))
        found = wavefront.abreast(group, others, lambda one, other: other.first.call != "not equal")
        return [each.first.call for each in found]

    # The oldest first; of those before one stage, the oldest.
    assert abreast(groups["first"]) == ["last", "third"]
    assert abreast(groups["more rows"]) == []
    assert abreast(groups["apart"]) == abreast(groups["untried"]) == []
