"""Room in a span: nothing overlaps, what is given back is one with its neighbours, a request fails only for want of a hole."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sidecar.extents import Extent, Extents, Remains

SPAN = 64


def with_holes(*holes: Extent) -> Extents:
    made = Extents(SPAN)
    assert made.claim(Extent(0, SPAN))
    for hole in holes:
        made.give(hole)
    return made


def test_the_smallest_hole_that_fits_is_taken() -> None:
    made = with_holes(Extent(0, 10), Extent(20, 4), Extent(30, 3))
    assert made.take(4) == Extent(20, 4)
    assert made.take(4) == Extent(0, 4)


def test_of_equal_holes_the_lowest_is_taken() -> None:
    assert with_holes(Extent(40, 4), Extent(8, 4)).take(4) == Extent(8, 4)


def test_without_a_hole_that_is_large_enough_nothing_is_taken() -> None:
    made = with_holes(Extent(0, 10), Extent(20, 10))
    assert made.take(11) is None
    assert made.largest_hole_bytes == 10
    assert with_holes().take(1) is None
    assert with_holes().largest_hole_bytes == 0


@pytest.mark.parametrize("given", [Extent(4, 2), Extent(0, 3), Extent(7, 4), Extent(SPAN - 1, 2), Extent(3, 6)])
def test_what_is_free_cannot_be_given_back(given: Extent) -> None:
    made = with_holes(Extent(2, 2), Extent(4, 4))
    with pytest.raises(AssertionError, match="twice"):
        made.give(given)


@pytest.mark.parametrize("claimed", [Extent(0, 1), Extent(9, 3), Extent(15, 6), Extent(5, 20), Extent(SPAN, 1), Extent(60, 10)])
def test_what_is_taken_or_outside_cannot_be_claimed(claimed: Extent) -> None:
    made = with_holes(Extent(10, 10))
    assert not made.claim(claimed)
    assert made.holes == (Extent(10, 10),)


class Random(RuleBasedStateMachine):
    """Compared with a list that says of every byte whether it is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.made = Extents(SPAN)
        self.taken: list[Extent] = []
        self.bytes = [False] * SPAN

    def mark(self, extent: Extent, taken: bool) -> None:
        assert self.bytes[extent.offset : extent.end] == [not taken] * extent.size_bytes
        self.bytes[extent.offset : extent.end] = [taken] * extent.size_bytes

    def holes(self) -> list[Extent]:
        found: list[Extent] = []
        for offset, taken in enumerate(self.bytes):
            if taken:
                continue
            if found and found[-1].end == offset:
                found[-1] = Extent(found[-1].offset, found[-1].size_bytes + 1)
            else:
                found.append(Extent(offset, 1))
        return found

    @rule(size_bytes=st.integers(1, SPAN // 2))
    def take(self, size_bytes: int) -> None:
        fitting = [hole.size_bytes for hole in self.holes() if hole.size_bytes >= size_bytes]
        extent = self.made.take(size_bytes)
        assert (extent is None) == (not fitting)
        if extent is not None:
            assert extent.size_bytes == size_bytes
            self.taken.append(extent)
            self.mark(extent, True)

    @rule(size_bytes=st.integers(1, SPAN), most=st.integers(1, 6))
    def gather(self, size_bytes: int, most: int) -> None:
        largest = sorted((hole.size_bytes for hole in self.holes()), reverse=True)[:most]
        extents = self.made.gather(size_bytes, most)
        assert (extents is None) == (sum(largest) < size_bytes)
        if extents is not None:
            assert sum(extent.size_bytes for extent in extents) == size_bytes
            # No fewer would have done.
            assert sum(largest[: len(extents) - 1]) < size_bytes
            for extent in extents:
                self.taken.append(extent)
                self.mark(extent, True)

    @rule(offset=st.integers(0, SPAN), size_bytes=st.integers(1, SPAN))
    def claim(self, offset: int, size_bytes: int) -> None:
        extent = Extent(offset, size_bytes)
        is_free = extent.end <= SPAN and not any(self.bytes[offset : extent.end])
        assert self.made.claim(extent) == is_free
        if is_free:
            self.taken.append(extent)
            self.mark(extent, True)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        extent = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.made.give(extent)
        self.mark(extent, False)

    @invariant()
    def the_holes_are_what_is_not_taken(self) -> None:
        self.made.check_invariants()
        assert list(self.made.holes) == self.holes()


Random.TestCase.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
TestRandom = Random.TestCase


# --- what is left ---------------------------------------------------------------------------------------------------------


def left(*extents: Extent) -> Remains[int]:
    made: Remains[int] = Remains()
    for number, extent in enumerate(extents):
        made.add(str(number), extent, number)
    return made


@pytest.mark.parametrize(
    ("written", "whole"),
    [
        (Extent(0, 4), ["0", "1", "2"]),
        (Extent(3, 2), ["1", "2"]),
        (Extent(6, 1), ["1", "2"]),
        (Extent(9, 2), ["2"]),
        (Extent(13, 1), ["0", "2"]),
        (Extent(14, 6), ["0", "1", "2"]),
        (Extent(0, SPAN), []),
    ],
)
def test_what_is_written_over_in_part_is_gone(written: Extent, whole: list[str]) -> None:
    # Two that are neighbours, and one far off.
    made = left(Extent(4, 6), Extent(10, 4), Extent(20, 4))
    made.overwrite(written)
    assert [name for name in ("0", "1", "2") if made.take(name) is not None] == whole


def test_what_is_left_is_taken_once() -> None:
    made = left(Extent(4, 6))
    assert made.take("1") is None
    assert made.take("0") == 0
    assert made.take("0") is None
    made.overwrite(Extent(0, SPAN))
    assert list(made) == []


def test_what_is_left_agrees_with_a_search_through_everything() -> None:
    chosen = random.Random(0)
    made: Remains[None] = Remains()
    there: dict[str, Extent] = {}
    for number in range(2000):
        extent = Extent(chosen.randrange(SPAN), chosen.randint(1, 8))
        made.overwrite(extent)
        there = {name: each for name, each in there.items() if each.end <= extent.offset or extent.end <= each.offset}
        made.add(str(number), extent, None)
        there[str(number)] = extent
        if there and chosen.random() < 0.3:
            name = chosen.choice(list(there))
            del there[name]
            made.take(name)
        assert {name: each for each, name, _ in made} == there
