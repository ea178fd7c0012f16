"""How many lanes there should be: what does clearly more work when it is tried, and seldom tried what does not."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping

import pytest

from sidecar.lanecount import AGAINST, FOR, GAIN, PATIENCE_S, SETTLE_S, SHARE, WINDOW_S, LaneChoice

# Work per second of the device's time by the number of lanes.
Rates = Mapping[int, float]
SMALL: Rates = {1: 1.0, 2: 1.3, 4: 1.6}
LARGE: Rates = {1: 1.0, 2: 0.8, 4: 0.5}
# What a trial takes at most: the windows of both, and what is between them.
TRIAL_S = 2 * (FOR + AGAINST - 1) * (WINDOW_S + SETTLE_S + 0.05)
RUN_S = 0.02


class Device:
    """Runs one stage after the other, for so long as a test says; how much work that is depends on the lanes."""

    def __init__(self, choice: LaneChoice, noise: float = 0.0, seed: int = 0) -> None:
        self.choice = choice
        self.now_s = 0.0
        self.busy_s = 0.0
        self.not_chosen_s = 0.0
        # The chosen numbers, one after the other, when each was, and how many windows of others there were.
        self.chosen = [choice.chosen]
        self.changed_s = [0.0]
        self.windows = 0
        self._noise = noise
        self._random = random.Random(seed)
        # The host's, which comes and goes.
        self._slowness = 1.0

    def run(self, model: str, rates: Rates, under_way: int = 4, count: int | None = None) -> None:
        """Run a stage once, with as many lanes as there are to be."""
        count = self.choice.count if count is None else count
        if self._noise and self._random.random() < 0.02:
            self._slowness = 1 + self._random.uniform(-self._noise, self._noise)
        seconds = RUN_S / rates[count] * self._slowness * (1 + self._random.uniform(-self._noise, self._noise))
        before = self.choice.count
        self.now_s += seconds
        self.busy_s += seconds
        self.not_chosen_s += seconds * (self.choice.count != self.choice.chosen)
        self.choice.ran(self.now_s, count, [(model, 1)], seconds, under_way)
        self.windows += self.choice.count != before and self.choice.count != self.choice.chosen
        if self.choice.chosen != self.chosen[-1]:
            self.chosen.append(self.choice.chosen)
            self.changed_s.append(self.now_s)

    def work(self, seconds: float, model: str = "small", rates: Rates = SMALL, under_way: int = 4) -> Device:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.run(model, rates, under_way)
        return self


def device(chosen: int = 1, noise: float = 0.0, seed: int = 0) -> Device:
    return Device(LaneChoice((1, 2, 4), chosen), noise, seed)


@pytest.mark.parametrize("chosen", [1, 2, 4])
@pytest.mark.parametrize(("rates", "best"), [(SMALL, 4), (LARGE, 1), ({1: 1.0, 2: 1.5, 4: 0.7}, 2)])
def test_the_best_is_found_within_a_trial_of_each(chosen: int, rates: Rates, best: int) -> None:
    found = device(chosen).work(2 * TRIAL_S + 1.0, rates=rates)
    assert found.choice.chosen == best
    # In units of what it did when that was first measured.
    assert found.choice.rates == pytest.approx({count: rate / rates[chosen] for count, rate in rates.items()})


def test_two_lanes_are_chosen_within_seconds() -> None:
    found = Device(LaneChoice((1, 2), 1)).work(15.0, rates={1: 1.0, 2: 1.3})
    assert found.chosen == [1, 2]
    assert found.changed_s[1] < TRIAL_S + 0.5


@pytest.mark.parametrize("seed", range(20))
def test_noise_does_not_keep_the_best_from_being_found_nor_makes_it_flap(seed: int) -> None:
    found = device(noise=0.15, seed=seed).work(1000.0)
    assert found.choice.chosen == 4
    assert len(found.chosen) <= 4
    alike = device(noise=0.15, seed=seed).work(1000.0, rates={1: 1.0, 2: 1.02, 4: 0.99})
    assert len(alike.chosen) <= 3
    for each in (found, alike):
        # One round is free.
        assert each.not_chosen_s <= SHARE * each.busy_s + 3 * TRIAL_S


def test_less_than_a_tenth_more_changes_nothing() -> None:
    for gain, expected in ((0.99 * GAIN, 1), (1.01 * GAIN, 2)):
        found = Device(LaneChoice((1, 2), 1)).work(60.0, rates={1: 1.0, 2: gain})
        assert found.choice.chosen == expected


def test_what_does_not_pay_is_tried_more_and_more_seldom() -> None:
    found, times = Device(LaneChoice((1, 2), 1)), []
    while len(times) < 6:
        windows = found.windows
        found.work(0.1, rates={1: 1.0, 2: 0.9})
        if found.windows > windows and windows % AGAINST == 0:
            times.append(found.now_s)
    rests = [after - before for before, after in itertools.pairwise(times)]
    # Two windows show it, and then it rests.
    assert rests[0] == pytest.approx(AGAINST * (WINDOW_S + SETTLE_S) / SHARE, rel=0.1)
    assert [after / before for before, after in itertools.pairwise(rests)] == pytest.approx([2.0] * 4, rel=0.1)
    assert found.not_chosen_s / found.busy_s < SHARE


@pytest.mark.parametrize(
    "after",
    [
        pytest.param(lambda found, seconds: found.work(seconds, "other", SMALL), id="another model"),
        pytest.param(lambda found, seconds: found.work(seconds, "large", SMALL, 16), id="more at a time"),
    ],
)
def test_when_what_is_asked_changes_it_looks_again(after: Callable[[Device, float], Device]) -> None:
    found = device().work(1800.0, "large", LARGE)
    assert found.choice.chosen == 1
    # By now it rests for many minutes of busy time; a change is seen within seconds.
    after(found, 2 * TRIAL_S + 20.0)
    assert found.choice.chosen == 4
    # And back.
    found.work(150.0, "large", LARGE)
    assert found.choice.chosen == 1


def test_who_asks_alone_is_no_measure_and_no_reason() -> None:
    found = device().work(600.0, under_way=1)
    assert found.windows == 0
    assert found.choice.rates == {}


def test_what_is_finished_before_a_change_counts_for_nothing() -> None:
    found = device()
    while found.choice.count == 1:
        found.run("small", SMALL)
    for _ in range(1000):
        found.run("small", SMALL, count=1)
    assert found.choice.count == 2
    assert found.choice.rates.keys() == {1}


def test_a_trial_that_nobody_asks_anything_of_ends() -> None:
    found = device()
    while found.choice.count == 1:
        found.run("small", SMALL)
    found.run("small", SMALL)
    found.now_s += 1.1 * PATIENCE_S
    found.run("small", SMALL, under_way=1)
    assert found.choice.count == found.choice.chosen == 1
    # Another round finds out, after a rest for what this one cost.
    found.work(100.0)
    assert found.choice.chosen == 4


def test_a_window_in_which_little_is_asked_says_nothing() -> None:
    found = device()
    for _ in range(1000):
        found.run("small", SMALL)
        found.now_s += PATIENCE_S
    assert found.choice.rates == {}


def test_a_number_that_the_device_refuses_is_not_tried_again() -> None:
    found = device()
    while found.choice.count == 1:
        found.run("small", SMALL)
    found.choice.cannot(2)
    assert found.choice.count == 1
    found.work(300.0)
    assert found.choice.chosen == 4
    assert 2 not in found.choice.rates
    # Nor does it stay with one that it began with.
    other = LaneChoice((1, 2), 2)
    other.cannot(2)
    assert (other.chosen, other.count) == (1, 1)
    assert Device(other).work(60.0).windows == 0


def test_work_is_measured_alike_whatever_is_asked() -> None:
    """Requests that are ten times as much work are ten times as much, in windows with more of them as in others."""
    choice = LaneChoice((1, 2), 1)
    mixed, heavy = random.Random(1), {"light": 0.001, "heavy": 0.01}
    now_s = 0.0
    for _ in range(30_000):
        model = mixed.choice(["light", "heavy"]) if (now_s // 3) % 2 else mixed.choice(["light"] * 9 + ["heavy"])
        seconds = heavy[model] / {1: 1.0, 2: 1.05}[choice.count]
        now_s += seconds
        choice.ran(now_s, choice.count, [(model, 1)], seconds, 4)
    assert choice.chosen == 1
    assert choice.rates == pytest.approx({1: 1.0, 2: 1.05}, rel=1e-6)


def test_rows_of_a_batch_and_stages_that_are_stacked_count_each() -> None:
    choice, now_s = LaneChoice((1, 2), 1), 0.0
    for number in range(2000):
        # In batches of four, half the seconds for a row; two stages at a time after that.
        stages = [("a", 1)] if number < 3 else [("b", 1)] if number < 6 else [("a", 4)] if number % 2 else [("a", 1), ("b", 1)]
        seconds = 0.01 if number < 6 else 0.02 if number % 2 else 0.01
        now_s += seconds
        choice.ran(now_s, choice.count, stages, seconds, 4)
    assert choice.rates[1] == pytest.approx((4 + 2) * 0.01 / 0.03, rel=0.02)


def test_stages_beyond_what_is_remembered_are_known_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.lanecount._MOST", 8)
    found = device().work(1.0)
    for number in range(20):
        found.run(f"other {number}", SMALL)
    found.work(2 * TRIAL_S + 2.0)
    assert found.choice.chosen == 4
