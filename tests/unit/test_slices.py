"""Slices: work stops where it is paced, and nowhere else."""

from __future__ import annotations

import pytest

from sidecar.slices import ITEMS, Slices, paced, stopping


def test_what_is_not_done_in_slices_is_not_paced() -> None:
    items = [1, 2, 3]
    assert paced(items) is items


def test_work_stops_after_some_items_and_goes_on_where_it_was() -> None:
    slices, done = Slices(), list[int]()
    assert not slices

    @stopping()
    def work() -> None:
        done.extend(paced(range(2 * ITEMS + 1)))

    slices.add(work)
    slices.add(lambda: done.append(-1))
    seen = []
    while slices:
        slices.go_on()
        seen.append(len(done))
    # The last slice of the first has what is left; the second is small.
    assert len(seen) == 4
    assert done == [*range(2 * ITEMS + 1), -1]


def test_what_goes_through_several_lists_stops_as_often() -> None:
    slices, seen = Slices(), list[int]()

    @stopping()
    def work() -> None:
        for number in paced(range(ITEMS // 2 + 1)):
            for _ in paced(range(2)):
                seen.append(number)

    slices.add(work)
    turns = 0
    while slices:
        slices.go_on()
        turns += 1
    assert turns == 1 + 3 * (ITEMS // 2 + 1) // ITEMS
    assert len(seen) == 2 * (ITEMS // 2 + 1)


def test_work_that_fails_is_over_and_the_next_is_done() -> None:
    slices, done = Slices(), list[str]()

    @stopping()
    def failing() -> None:
        for _ in paced(range(ITEMS)):
            pass
        raise ValueError("as it happens")

    slices.add(failing)
    slices.add(lambda: done.append("next"))
    slices.go_on()
    with pytest.raises(ValueError, match="as it happens"):
        slices.go_on()
    slices.go_on()
    assert done == ["next"]
    assert not slices


def test_work_stops_nowhere_else() -> None:
    slices, done = Slices(), list[int]()

    def work() -> None:
        done.extend(paced(range(5 * ITEMS)))
        with stopping():
            done.extend(paced(range(ITEMS)))
        done.extend(paced(range(5 * ITEMS)))

    slices.add(work)
    slices.go_on()
    assert len(done) == 5 * ITEMS + ITEMS - 1
    slices.go_on()
    assert len(done) == 11 * ITEMS
    assert not slices
