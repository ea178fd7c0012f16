"""Where the parts of the picture lie: inside it, beside each other, and what is shared over the lanes of all who share it."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar.sankey import WIDTH, laid_out


def run(id: str, parent: int | None, ends: list[str], size: int = 100, rest: bool = False) -> dict[str, Any]:
    return {"id": id, "parent": parent, "blocks": 1, "nodes": 3, "bytes": size, "packed": 0, "rest": rest, "ends": ends}


def test_a_trunk_spans_its_models_and_fans_out():
    drawn = laid_out([run("trunk", None, []), run("a", 0, ["a"], 400), run("b", 0, ["b"]), run("c", None, ["c"], 0)])
    trunk, a, b, c = drawn["runs"]
    assert [lane["name"] for lane in drawn["lanes"]] == ["a", "b", "c"]
    assert [(each["first"], each["lanes"]) for each in drawn["runs"]] == [(0, 2), (0, 1), (1, 1), (2, 1)]
    assert drawn["height"] == 3 * drawn["row"]
    # Twice as wide for four times the bytes; something for nothing, too.
    assert a["w"] == 2 * b["w"] == 2 * trunk["w"]
    assert c["w"] > 0
    assert trunk["h"] > a["h"]
    assert a["x"] == b["x"] > trunk["x"] + trunk["w"]
    assert a["about"] == "block a · 3 operators · 400 B · plain"
    # Two to the heads, three to the names.
    assert len(drawn["bands"]) == 5


def test_blocks_of_one_model_stand_side_by_side():
    drawn = laid_out([run("a", None, []), run("b", 0, ["m"])])
    first, second = drawn["runs"]
    assert first["x"] + first["w"] == second["x"]
    assert len(drawn["bands"]) == 1


def test_a_model_may_end_where_others_go_on_and_the_rest_has_one_lane():
    drawn = laid_out([run("t", None, ["short"]), run("u", 0, ["long"]), run("v", 0, ["x", "y", "z"], rest=True)])
    assert [(lane["name"], lane["models"]) for lane in drawn["lanes"]] == [("short", 1), ("long", 1), ("3 more models", 3)]
    assert drawn["runs"][0]["lanes"] == 3


def test_nothing_is_laid_out_of_nothing():
    drawn = laid_out([])
    assert (drawn["height"], drawn["runs"], drawn["bands"], drawn["lanes"]) == (0, [], [], [])


@st.composite
def forests(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(1, 25))
    parents = [None if not place else draw(st.one_of(st.none(), st.integers(0, place - 1))) for place in range(count)]
    made = [run(str(place), parent, [], draw(st.integers(0, 10**9))) for place, parent in enumerate(parents)]
    for place, each in enumerate(made):
        if place not in parents or draw(st.booleans()):
            each["ends"] = [f"m{place}"]
    return made


@settings(max_examples=60, deadline=None)
@given(forests())
def test_all_lies_within_and_nothing_over_another(runs: list[dict[str, Any]]):
    drawn = laid_out(runs)
    boxes = drawn["runs"]
    assert sorted(lane["name"] for lane in drawn["lanes"]) == sorted(name for each in runs for name in each["ends"])
    for box in boxes:
        assert box["x"] >= 0
        assert box["x"] + box["w"] <= WIDTH + 0.1
        assert box["w"] > 0
        top, bottom = box["first"] * drawn["row"], (box["first"] + box["lanes"]) * drawn["row"]
        assert top <= box["y"] + 0.1
        assert box["y"] + box["h"] <= bottom + 0.1
    for place, one in enumerate(boxes):
        for other in boxes[:place]:
            beside = one["x"] + 0.2 > other["x"] + other["w"] or other["x"] + 0.2 > one["x"] + one["w"]
            below = one["first"] >= other["first"] + other["lanes"] or other["first"] >= one["first"] + one["lanes"]
            assert beside or below
