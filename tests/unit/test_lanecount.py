"""How many lanes there should be: what promises clearly more, and never soon after the last change."""

from __future__ import annotations

import pytest

from sidecar.lanecount import CHANGE_EVERY_S, ENOUGH, GAIN, LOOK_EVERY_S, LaneChoice

# Seconds of a run by the number of lanes that run: one that more threads make no faster, and one that they do.
SMALL = {1: 1.0, 2: 1.0, 4: 1.2}
LARGE = {1: 1.0, 2: 2.2, 4: 5.0}


def asked(choice: LaneChoice, model: str, under_way: int, count: int = ENOUGH) -> LaneChoice:
    for _ in range(count):
        choice.answered(model, under_way)
    return choice


def choice_of(count: int = 1) -> LaneChoice:
    choice = LaneChoice(count, 0.0)
    choice.learn("small", SMALL)
    choice.learn("large", LARGE)
    return choice


@pytest.mark.parametrize(
    ("model", "under_way", "expected"),
    [("small", 1, 1), ("small", 2, 2), ("small", 3, 4), ("small", 16, 4), ("large", 1, 1), ("large", 16, 1)],
)
def test_the_number_suits_the_model_and_how_many_ask(model: str, under_way: int, expected: int) -> None:
    assert asked(choice_of(), model, under_way).look(0.0) == expected


def test_a_single_caller_does_not_care() -> None:
    for count in (1, 2, 4):
        assert asked(choice_of(count), "large", 1).look(0.0) == count


def test_who_is_under_way_alone_is_answered_as_by_one_lane() -> None:
    choice = asked(asked(choice_of(), "small", 1, 30), "small", 4, 10)
    assert choice.rates() == pytest.approx({1: 1.0, 2: (30 * 1.0 + 10 * 2.0) / 40, 4: (30 * 1.0 + 10 * 4 / 1.2) / 40})


def test_promises_are_requests_per_second() -> None:
    choice = asked(asked(choice_of(), "small", 4, 30), "large", 2, 10)
    # 3.5 under way in the mean, and as many lanes at work if there are four.
    assert choice.rates() == pytest.approx({1: 1.0, 2: 2 * 40 / (30 + 22), 4: 3.5 * 40 / (36 + 50)})


def test_less_than_a_tenth_more_changes_nothing() -> None:
    for gain, expected in ((0.99 * GAIN, 1), (1.01 * GAIN, 2)):
        choice = LaneChoice(1, 0.0)
        choice.learn("model", {1: 1.0, 2: 2.0 / gain})
        assert asked(choice, "model", 8).look(0.0) == expected


def test_little_that_was_asked_says_nothing() -> None:
    choice = asked(choice_of(), "small", 8, ENOUGH - 1)
    assert choice.look(0.0) == 1
    assert asked(choice, "small", 8, 1).look(0.0) == 4


def test_it_looks_once_a_minute_and_changes_once_in_ten() -> None:
    choice = asked(choice_of(), "small", 8)
    assert choice.look(0.0) == 4
    asked(choice, "large", 8, 20 * ENOUGH)
    assert choice.look(LOOK_EVERY_S / 2) == 4
    # It sees that one lane would be better, and waits.
    assert choice.look(LOOK_EVERY_S) == 4
    assert choice.rates()[1] > GAIN * choice.rates()[4]
    asked(choice, "large", 8, 20 * ENOUGH)
    assert choice.look(CHANGE_EVERY_S) == 1


def test_what_is_asked_now_counts_more_than_what_was() -> None:
    choice = choice_of()
    now_s = 0.0
    for model in ["large"] * 5 + ["small"] * 5:
        now_s += LOOK_EVERY_S
        count = asked(choice, model, 4).look(now_s)
    assert count == 4


def test_models_that_were_not_measured_say_nothing_if_most_requests_are_for_them() -> None:
    choice = asked(asked(choice_of(), "unknown", 4, 60), "small", 4, 30)
    assert choice.rates() == {}
    assert choice.look(0.0) == 1
    # What was measured later counts at once.
    choice.learn("unknown", {1: 1.0, 2: 1.0})
    assert set(choice.rates()) == {1, 2}
    assert asked(choice, "unknown", 4).look(LOOK_EVERY_S) == 2


def test_what_is_not_known_any_more_counts_for_nothing() -> None:
    choice = asked(choice_of(), "small", 4)
    assert choice.rates()
    choice.learn("small", {})
    assert choice.rates() == {}
