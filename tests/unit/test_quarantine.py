"""Who is suspect when an engine has died, who is refused, and for how long."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from trunkline.errors import Quarantined
from trunkline.protocol import JOINT

from sidecar.errors import NotQuarantined
from sidecar.journal import MOST_MARKS, Asked, Entry, Running
from sidecar.quarantine import FIRST_S, LONGEST_S, Kind, Quarantine, Suspects, nobody


class Life:
    """A supervisor and the engines that it starts, on a clock of their own."""

    def __init__(self) -> None:
        self.now = 100.0
        self.books = Quarantine()
        self.marked: list[int] = []
        self.lifted: list[int] = []
        self.engine = self.start()

    def start(self) -> Suspects:
        self.marked, self.lifted = [], []
        self.books.engine_starts(self.now)
        return self.books.suspects(self.marked.append, lambda: self.now, self.lifted.append)

    def die(self, *runs: Sequence[tuple[str, str]], by_hand: bool = False) -> dict[tuple[str, str], float]:
        """Have the engine die with these runs on its devices, and start another; return who is refused, and for how long."""
        entries = [
            Entry(Running(place, 1, self.now, 0.0, len(calls)), tuple(Asked(*call, "id") for call in calls))
            for place, calls in enumerate(runs)
        ]
        self.books.lift(self.lifted)
        judged = self.books.engine_died(entries, self.marked, self.now, by_hand=by_hand)
        # What it takes to start one is nobody's time in quarantine.
        self.now += 0.7
        self.engine = self.start()
        return {tuple(each.kind): each.refused_s for each in judged}

    def is_refused(self, tenant: str, model: str) -> bool:
        try:
            self.engine.check(tenant, model)
        except Quarantined:
            return True
        return False


POISON, GOOD = ("bad", "poison"), ("good", "model")


@pytest.fixture
def life() -> Life:
    return Life()


def test_nobody_is_suspect_before_an_engine_has_died(life: Life) -> None:
    for suspects in (life.engine, nobody()):
        assert not suspects
        assert not suspects.has(*POISON)
        suspects.check(*POISON)
        suspects.clear(*POISON)


def test_all_that_was_under_way_is_run_alone_once(life: Life) -> None:
    assert life.die([POISON, GOOD]) == {POISON: 0, GOOD: 0}
    assert life.engine.has(*POISON)
    assert life.engine.has(*GOOD)
    assert not life.engine.has("bad", "model"), "another model, and another tenant's"
    assert not life.is_refused(*POISON)
    life.engine.clear(*GOOD)
    assert not life.engine.has(*GOOD)
    assert life.engine.has(*POISON)


def test_what_ends_two_engines_the_second_time_alone_is_refused(life: Life) -> None:
    life.die([POISON, GOOD])
    assert life.die([POISON]) == {POISON: FIRST_S}
    with pytest.raises(Quarantined) as refused:
        life.engine.check(*POISON)
    # From when there is an engine again.
    assert refused.value.details == {"retry_after_s": FIRST_S, "certain": True}
    assert refused.value.retryable
    assert "poison" in refused.value.message
    assert not life.is_refused(*GOOD)
    assert not life.is_refused("bad", "model")
    life.now += FIRST_S
    assert not life.is_refused(*POISON)
    assert life.engine.has(*POISON), "one is let through, alone"


def test_what_was_cleared_is_a_stranger_the_next_time(life: Life) -> None:
    for _ in range(100):
        assert life.die([GOOD]) == {GOOD: 0}
        life.engine.clear(*GOOD)
        assert not life.is_refused(*GOOD)
    assert life.books.count == 0


def test_each_time_it_is_refused_twice_as_long_and_five_minutes_at_most(life: Life) -> None:
    life.die([POISON])
    waits = []
    for _ in range(12):
        waits.append(life.die([POISON])[POISON])
        life.now += waits[-1]
    assert waits[:9] == [FIRST_S * 2**number for number in range(9)]
    assert waits[9:] == [LONGEST_S] * 3
    assert life.books.count == 12


def test_who_was_let_through_and_lives_is_remembered_for_a_while(life: Life) -> None:
    life.die([POISON])
    life.die([POISON])
    life.now += FIRST_S
    life.engine.clear(*POISON)
    # A first death makes it a suspect again, no more, and then it is refused for longer than at first.
    assert life.die([POISON]) == {POISON: 0}
    assert life.die([POISON]) == {POISON: 2 * FIRST_S}
    life.now += 2 * FIRST_S
    life.engine.clear(*POISON)
    life.now += LONGEST_S
    assert life.die([GOOD]) == {GOOD: 0}
    assert life.die([POISON]) == {POISON: 0}
    assert life.die([POISON]) == {POISON: FIRST_S}


def test_with_others_computing_elsewhere_it_takes_one_death_more(life: Life) -> None:
    """A suspect is alone on its device; what another one was at may have been the cause as well."""
    life.die([POISON])
    assert life.die([POISON], [GOOD]) == {POISON: 0, GOOD: 0}
    assert life.die([POISON], [GOOD]) == {POISON: FIRST_S, GOOD: 0}
    life.engine.clear(*GOOD)
    assert not life.is_refused(*GOOD)


def test_an_engine_that_was_killed_by_hand_says_little(life: Life) -> None:
    """As does one while others computed elsewhere; and what is refused in the end is told so."""
    life.die([GOOD], by_hand=True)
    assert life.die([GOOD], by_hand=True) == {GOOD: 0}
    assert life.die([GOOD], by_hand=True) == {GOOD: FIRST_S}
    with pytest.raises(Quarantined) as refused:
        life.engine.check(*GOOD)
    assert refused.value.details == {"retry_after_s": FIRST_S, "certain": False}
    life.now += FIRST_S
    life.engine.clear(*GOOD)
    assert life.die([GOOD], by_hand=True) == {GOOD: 0}
    assert life.die([GOOD]) == {GOOD: 2 * FIRST_S}


def test_an_operator_sees_whose_requests_are_refused_or_run_alone(life: Life) -> None:
    assert life.engine.listed() == []
    life.die([POISON, GOOD])
    life.die([POISON])
    by_state = {each["state"]: each for each in life.engine.listed()}
    assert by_state["refused"] == {
        "id": Kind(*POISON).id,
        "tenant": "bad",
        "model": "poison",
        "state": "refused",
        "refused_for_s": FIRST_S,
        "certain": True,
    }
    assert by_state["alone"]["tenant"] == "good"
    life.now += FIRST_S
    assert [each["state"] for each in life.engine.listed()] == ["alone", "alone"]
    life.engine.clear(*POISON)
    life.engine.clear(*GOOD)
    assert life.engine.listed() == []


def test_what_an_operator_lifts_is_forgotten_by_this_engine_and_the_next(life: Life) -> None:
    for _ in range(4):
        life.die([POISON])
    life.die([GOOD])
    assert life.is_refused(*POISON)
    (lifted,) = life.engine.lift(Kind(*POISON).id)
    assert (lifted["tenant"], lifted["state"]) == ("bad", "refused")
    assert not life.is_refused(*POISON)
    assert not life.engine.has(*POISON)
    assert life.engine.has(*GOOD), "what was not meant stays"
    # The next engine knows nothing of it either, and it begins like a stranger.
    assert life.die([("other", "model")]) == {("other", "model"): 0}
    assert not life.is_refused(*POISON)
    assert not life.engine.has(*POISON)
    assert life.engine.has(*GOOD)
    assert life.die([POISON]) == {POISON: 0}
    assert life.die([POISON]) == {POISON: FIRST_S}
    # Also when it is what the engine dies of.
    life.engine.lift()
    assert life.engine.listed() == []
    assert life.die([POISON]) == {POISON: 0}


def test_only_what_is_there_can_be_lifted(life: Life) -> None:
    assert life.engine.lift() == []
    with pytest.raises(NotQuarantined):
        life.engine.lift(Kind(*POISON).id)
    life.die([POISON])
    life.engine.clear(*POISON)
    with pytest.raises(NotQuarantined):
        life.engine.lift(Kind(*POISON).id)
    assert nobody().lift() == []


def test_several_models_in_one_call_are_one_call(life: Life) -> None:
    both = ("bad", JOINT.join(("poison", "head")))
    assert life.die([both]) == {POISON: 0, ("bad", "head"): 0}
    assert life.engine.has(*both)
    assert life.die([both]) == {POISON: FIRST_S, ("bad", "head"): FIRST_S}
    assert life.is_refused("bad", JOINT.join(("other", "poison")))
    life.now += FIRST_S
    life.engine.clear("bad", "head")
    assert life.engine.has(*both)


def test_an_engine_that_was_at_nothing_makes_nobody_suspect(life: Life) -> None:
    assert life.die() == {}
    assert not life.engine


def test_the_books_have_an_end(life: Life) -> None:
    for number in range(MOST_MARKS + 50):
        life.die([("tenant", f"model-{number}")])
    assert not life.engine.has("tenant", "model-0")
    assert life.engine.has("tenant", f"model-{MOST_MARKS + 49}")
    for number in range(50, MOST_MARKS + 50):
        life.engine.clear("tenant", f"model-{number}")
    assert max(life.marked) < MOST_MARKS
    assert not life.engine


@pytest.mark.parametrize("seed", range(20))
def test_in_a_random_life_the_poison_is_found_and_others_are_never_refused(seed: int) -> None:
    """One of several tenants ends every engine that computes for it; the others are retried and answered."""
    random_ = random.Random(seed)
    life = Life()
    others = [(f"tenant-{number}", "model") for number in range(6)]
    deaths = 0
    for _ in range(300):
        life.now += random_.expovariate(1.0)
        wanted = [each for each in (POISON, *others) if random_.random() < 0.4 and not life.is_refused(*each)]
        while wanted:
            suspects = [each for each in wanted if life.engine.has(*each)]
            batch = suspects[:1] or wanted[: random_.randint(1, len(wanted))]
            if POISON in batch:
                deaths += 1
                refused = life.die(batch)
                assert not any(refused[each] for each in refused if each != POISON)
                wanted = [each for each in wanted if not life.is_refused(*each)]
            else:
                for each in batch:
                    life.engine.clear(*each)
                wanted = [each for each in wanted if each not in batch]
        assert not any(life.is_refused(*each) for each in others)
    # Two, and then one each time that it is let through: in five minutes no more than nine.
    assert life.books.count <= deaths <= 2 + life.books.count
    assert 2 <= deaths <= 12
