"""How many stages stay, and how long a run is predicted to take."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.timeline import _HANDOVER_S, Leg, plan, predict, smallest_room

legs = st.lists(
    st.builds(Leg, st.integers(0, 100), st.floats(0, 1, allow_nan=False), st.floats(0, 1, allow_nan=False)),
    min_size=1,
    max_size=12,
)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free is read into at the same moment."""
    monkeypatch.setattr("sidecar.timeline._HANDOVER_S", 0.0)


def even(count: int, load_s: float, run_s: float) -> list[Leg]:
    return [Leg(10, load_s, run_s)] * count


@pytest.mark.usefixtures("at_once")
def test_where_computing_is_slower_two_stages_stream_and_all_else_stays() -> None:
    found = plan(even(10, load_s=0.5, run_s=1.0), room_bytes=60)
    assert found is not None
    assert found.kept == 4
    # The first that streams is read while those that stay are run.
    assert found.predicted_s == pytest.approx(10.0)
    assert found.floor_s == pytest.approx(10.0)


@pytest.mark.usefixtures("at_once")
def test_where_reading_is_slower_there_is_room_to_read_ahead() -> None:
    stages = even(10, load_s=2.0, run_s=1.0)
    found = plan(stages, room_bytes=60)
    assert found is not None
    assert found.predicted_s == min(predict(stages, kept, 60) for kept in range(5))
    # Six are read, in twelve seconds; the third must wait a second for the room of the first, and the last is run after all.
    assert (found.kept, found.predicted_s) == (4, pytest.approx(14.0))
    # With a faster disk for the later ones it pays to keep fewer: the disk then reads from the start on.
    slow_first = [Leg(10, 0.5, 2.0)] * 3 + [Leg(10, 2.0, 0.5)] * 7
    fewer = plan(slow_first, room_bytes=60)
    assert fewer is not None
    assert predict(slow_first, 4, 60) > fewer.predicted_s


def test_what_fits_stays_whole() -> None:
    found = plan(even(4, load_s=2.0, run_s=1.0), room_bytes=40)
    assert found is not None
    assert (found.kept, found.predicted_s, found.floor_s) == (4, 4.0, 4.0)


def test_where_two_neighbours_do_not_fit_nothing_streams() -> None:
    stages = [Leg(10, 1, 1), Leg(30, 1, 1), Leg(20, 1, 1)]
    assert smallest_room(stages) == 50
    assert plan(stages, 49) is None
    assert plan(stages, 50) is not None
    assert smallest_room(stages[:1]) == 10
    assert smallest_room([]) == 0


@given(legs, st.integers(0, 1200))
@settings(max_examples=300, deadline=None)
def test_a_timeline_fits_and_is_never_below_the_floor(stages: list[Leg], room: int) -> None:
    found = plan(stages, room)
    if found is None:
        assert smallest_room(stages) > room
        return
    kept_bytes = sum(leg.size_bytes for leg in stages[: found.kept])
    assert kept_bytes + smallest_room(stages[found.kept :]) <= room or found.kept == 0
    assert found.predicted_s >= sum(leg.run_s for leg in stages) - 1e-9
    assert found.predicted_s >= sum(leg.load_s for leg in stages[found.kept :]) - 1e-9
    most_s = sum(leg.run_s for leg in stages) + sum(leg.load_s + _HANDOVER_S for leg in stages[found.kept :])
    assert found.predicted_s <= most_s + 1e-9


@given(legs, st.integers(0, 1200), st.integers(0, 200))
@settings(max_examples=200, deadline=None)
def test_more_room_never_makes_a_run_longer(stages: list[Leg], room: int, more: int) -> None:
    small, large = plan(stages, room), plan(stages, room + more)
    if small is not None:
        assert large is not None
        assert large.predicted_s <= small.predicted_s + 1e-9


def test_where_stages_take_little_longer_than_handing_over_room_there_is_room_for_a_third() -> None:
    # Reading two at a time, the disk would pause after each of them.
    found = plan(even(20, load_s=3e-3, run_s=3e-3), room_bytes=100)
    assert found is not None
    assert found.kept < 8
