"""Which ranges move so that one hole is large enough: no byte is lost, and none moves without need."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from sidecar.compaction import Move, plan
from sidecar.extents import Extent

SPAN = 24


@st.composite
def ranges(draw: st.DrawFn) -> list[Extent]:
    """Return ranges in a span, in the order of their addresses."""
    places, offset = [], 0
    while offset < SPAN:
        size_bytes = draw(st.integers(1, 6))
        if offset + size_bytes > SPAN:
            break
        if draw(st.booleans()):
            places.append(Extent(offset, size_bytes))
        offset += size_bytes
    return places


def holes(taken: list[Extent]) -> list[int]:
    starts, ends = [0, *(each.end for each in taken)], [*(each.offset for each in taken), SPAN]
    return [end - start for start, end in zip(starts, ends, strict=True)]


@given(ranges(), st.integers(1, SPAN))
def test_what_is_free_is_one_piece_and_every_byte_is_where_it_belongs(taken: list[Extent], needed_bytes: int) -> None:
    moves = plan(taken, SPAN, needed_bytes)
    if sum(holes(taken)) < needed_bytes:
        assert moves is None
        return
    assert moves is not None
    content: list[int | None] = [None] * SPAN
    for number, extent in enumerate(taken):
        content[extent.offset : extent.end] = [number] * extent.size_bytes
    places = dict(enumerate(taken))
    for move in moves:
        number = taken.index(move.source)
        assert move.offset < move.source.offset
        assert {*content[move.offset : move.target.end]} <= {None, number}, "a range is written over another"
        content[move.source.offset : move.source.end] = [None] * move.source.size_bytes
        content[move.offset : move.target.end] = [number] * move.source.size_bytes
        places[number] = move.target
    for number, extent in places.items():
        assert content[extent.offset : extent.end] == [number] * extent.size_bytes
    assert max(holes(sorted(places.values(), key=lambda extent: extent.offset))) >= needed_bytes


@given(ranges(), st.integers(1, SPAN))
def test_no_fewer_bytes_would_do(taken: list[Extent], needed_bytes: int) -> None:
    moves = plan(taken, SPAN, needed_bytes)
    if moves is None:
        return
    free = holes(taken)
    costs = [
        sum(extent.size_bytes for extent in taken[first:last])
        for first, last in itertools.combinations_with_replacement(range(len(free)), 2)
        if sum(free[first : last + 1]) >= needed_bytes
    ]
    assert sum(move.source.size_bytes for move in moves) <= min(costs)


def test_a_hole_that_is_large_enough_moves_nothing() -> None:
    assert plan([Extent(4, 4), Extent(12, 4)], SPAN, 8) == []
    assert plan([], SPAN, SPAN) == []


def test_ranges_slide_down_in_order() -> None:
    taken = [Extent(0, 2), Extent(4, 4), Extent(8, 2), Extent(12, 12)]
    assert plan(taken, SPAN, 4) == [Move(Extent(4, 4), 2), Move(Extent(8, 2), 6)]
