"""Releases: what operators may say, what the store keeps of it, and whose turn it is."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline.errors import InvalidInput
from trunkline.protocol import TensorSpec

from sidecar.bundle import Symbol
from sidecar.errors import BundleError
from sidecar.labels import LABEL, STORED_NAME, labelled, parted
from sidecar.releases import (
    HEAVIEST,
    MOST_VERSIONS,
    Release,
    RoundRobin,
    as_asked,
    by_call_id,
    difference,
    parse_release,
    release_bytes,
)
from tests.bundles import adding_bundle

labels = st.from_regex(LABEL, fullmatch=True)
weights = st.dictionaries(labels, st.integers(1, HEAVIEST), min_size=1, max_size=MOST_VERSIONS)


# --- names ------------------------------------------------------------------------------------------------------------


@given(labels)
def test_the_name_of_a_version_comes_apart_again(label: str) -> None:
    name = labelled("embed-2.1", label)
    assert parted(name) == ("embed-2.1", label)
    assert bool(STORED_NAME.fullmatch(name)) is (".." not in label)
    assert not {"@", "+", "/"} & set(name)


@pytest.mark.parametrize(
    "name", ["embed", "embed:", "embed:a b", "embed:2:3", "embed:-2", "embed:2-", ":2@", "embed:" + "1" * 33]
)
def test_what_is_no_label_is_part_of_a_name_that_nobody_has(name: str) -> None:
    assert parted(name) == (name, "")
    assert bool(STORED_NAME.fullmatch(name)) is (name == "embed")


# --- what operators may say -------------------------------------------------------------------------------------------


def test_a_default_and_a_split() -> None:
    assert as_asked({"default": "2"}) == Release({"2": 1})
    found = as_asked({"split": {"1": 90, "v2.0-rc": 10}, "sticky": True})
    assert found == Release({"1": 90, "v2.0-rc": 10}, sticky=True)
    assert (found.is_split, found.is_plain) == (True, False)
    assert found.to_plain() == {"split": {"1": 90, "v2.0-rc": 10}, "sticky": True}
    assert as_asked({"split": {"1": 7}}).to_plain() == {"default": "1"}
    assert Release({"": 1}).is_plain
    assert not Release({"": 1, "2": 1}).is_plain
    assert Release({"": 9, "2": 1}).relabelled({"": "1"}) == Release({"1": 9, "2": 1})


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({}, "a release is"),
        ({"default": "1", "split": {"1": 1}}, "a release is"),
        ({"default": "1", "sticky": True}, "a release is"),
        ({"default": ""}, "no label"),
        ({"default": 2}, "no label"),
        ({"default": "../2"}, "no label"),
        ({"default": "a+b"}, "no label"),
        ({"split": {}}, "1 to 8 versions"),
        ({"split": []}, "1 to 8 versions"),
        ({"split": {str(n): 1 for n in range(MOST_VERSIONS + 1)}}, "1 to 8 versions"),
        ({"split": {"1": 0}}, "outside 1..10000"),
        ({"split": {"1": 0, "2": 0}}, "outside 1..10000"),
        ({"split": {"1": -5, "2": 5}}, "outside 1..10000"),
        ({"split": {"1": 10**400}}, "outside 1..10000"),
        ({"split": {"1": 0.5}}, "must be an integer"),
        ({"split": {"1": math.nan}}, "must be an integer"),
        ({"split": {"1": True}}, "must be an integer"),
        ({"split": {"1": "90"}}, "must be an integer"),
        ({"split": {"": 90, "2": 10}}, "no label"),
        ({"split": {"1": 1, "2": 1}, "sticky": "yes"}, "true or false"),
    ],
)
def test_anything_else_is_refused(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInput, match=text):
        as_asked(asked)


# --- what is kept -----------------------------------------------------------------------------------------------------


@given(weights, st.booleans())
def test_what_is_kept_comes_back(given_weights: dict[str, int], sticky: bool) -> None:
    for kept in (
        Release(given_weights, sticky),
        Release({"": 5} | given_weights) if len(given_weights) < MOST_VERSIONS else Release({"": 1}),
    ):
        assert parse_release(release_bytes("embed", kept), "embed") == kept


@given(st.binary(max_size=200))
def test_whatever_is_found_instead_is_refused(data: bytes) -> None:
    with pytest.raises(BundleError):
        parse_release(data, "embed")


@pytest.mark.parametrize(
    "text",
    [
        b'{"name": "other", "weights": {"1": 1}, "sticky": false}',
        b'{"name": "embed", "weights": {"1": 1}, "sticky": 0}',
        b'{"name": "embed", "weights": {"1": 1, "1": 2}, "sticky": false}',
        b'{"name": "embed", "weights": {"a/b": 1}, "sticky": false}',
        b'{"name": "embed", "weights": {"1": 0}, "sticky": false}',
        b'{"name": "embed", "weights": {}, "sticky": false}',
        b'{"name": "embed", "weights": {"1": 1}}',
        b'{"name": "embed", "weights": {"1": 1}, "sticky": false, "more": 1}',
    ],
)
def test_a_file_that_says_something_else_is_refused(text: bytes) -> None:
    with pytest.raises(BundleError):
        parse_release(text, "embed")


@given(weights)
def test_a_torn_file_is_refused(given_weights: dict[str, int]) -> None:
    whole = release_bytes("embed", Release(given_weights))
    for length in range(len(whole)):
        with pytest.raises(BundleError):
            parse_release(whole[:length], "embed")


# --- whose turn it is -------------------------------------------------------------------------------------------------


@given(weights, st.integers(0, 50))
def test_each_version_has_its_weight_of_any_run_of_draws(given_weights: dict[str, int], begin: int) -> None:
    small = {label: weight % 50 + 1 for label, weight in given_weights.items()}
    turns = RoundRobin(small)
    for _ in range(begin):
        turns.draw()
    assert Counter(turns.draw() for _ in range(sum(small.values()))) == small


def test_draws_of_a_canary_lie_far_from_each_other() -> None:
    turns = RoundRobin({"1": 90, "2": 10})
    drawn = [turns.draw() for _ in range(1000)]
    at = [number for number, label in enumerate(drawn) if label == "2"]
    assert len(at) == 100
    assert {later - earlier for earlier, later in itertools.pairwise(at)} == {10}


@given(weights, st.integers(1, 500))
def test_no_version_is_ahead_of_its_weight_by_a_whole_draw_each(given_weights: dict[str, int], count: int) -> None:
    turns = RoundRobin(given_weights)
    drawn = Counter(turns.draw() for _ in range(count))
    total = sum(given_weights.values())
    for label, weight in given_weights.items():
        assert abs(drawn[label] - count * weight / total) < len(given_weights)


@given(weights, st.text(max_size=20))
def test_a_call_id_has_one_version_whatever_the_order(given_weights: dict[str, int], call_id: str) -> None:
    chosen = by_call_id("embed", call_id, given_weights)
    assert chosen in given_weights
    assert by_call_id("embed", call_id, dict(reversed(given_weights.items()))) == chosen


def test_call_ids_are_spread_by_weight_and_stay_when_it_grows() -> None:
    ids = [f"call-{number}" for number in range(20_000)]
    before = {call_id: by_call_id("embed", call_id, {"1": 90, "2": 10}) for call_id in ids}
    after = {call_id: by_call_id("embed", call_id, {"1": 50, "2": 50}) for call_id in ids}
    assert 1800 < Counter(before.values())["2"] < 2200
    assert 9600 < Counter(after.values())["2"] < 10_400
    assert all(after[call_id] == "2" for call_id in ids if before[call_id] == "2")
    # Another model's are spread anew: a caller is not the first to meet every canary.
    others = {call_id: by_call_id("other", call_id, {"1": 90, "2": 10}) for call_id in ids}
    assert 100 < sum(before[call_id] == others[call_id] == "2" for call_id in ids) < 300


# --- what callers can tell apart --------------------------------------------------------------------------------------


def test_versions_are_compared_by_what_callers_see() -> None:
    graph = adding_bundle("m", [1.0, 2.0])[0].graph
    assert difference(graph, adding_bundle("m", [3.0, 4.0])[0].graph) == ""
    assert (
        difference(graph, adding_bundle("m", [1.0])[0].graph) == "one takes x float32 [batch, 2], the other x float32 [batch, 1]"
    )
    renamed = replace(graph, outputs=(TensorSpec("z", "float32", ("batch", 2)),))
    assert difference(graph, renamed) == "one gives y float32 [batch, 2], the other z float32 [batch, 2]"
    bounded = replace(graph, inputs=(TensorSpec("x", "int64", ("batch", 2), 0, 9),))
    assert difference(graph, bounded).endswith("the other x int64 [batch, 2] from 0 to 9")
    assert (
        difference(graph, replace(graph, symbols=(Symbol("batch", 1, 4),))) == "one has batch from 1 to 8, the other from 1 to 4"
    )
    assert difference(graph, replace(graph, symbols=())) == "one has batch from 1 to 8, the other from nothing"
