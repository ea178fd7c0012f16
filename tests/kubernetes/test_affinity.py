"""Labels of nodes, and what pods prefer: both by one rule."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from sidecar.kubernetes.affinity import label_of, labels_of, preferred_terms, score

KEY = re.compile(r"model\.trunkline\.dev/[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?")


def test_a_name_that_fits_is_the_label() -> None:
    assert label_of("resnet-50.v1") == "model.trunkline.dev/resnet-50.v1"
    assert label_of("a" * 63) == f"model.trunkline.dev/{'a' * 63}"


def test_a_name_that_does_not_fit_is_hashed_and_stays_the_same() -> None:
    assert label_of("a" * 64) == "model.trunkline.dev/sha256-ffe054fe7ae0cb6dc65c3af9b61d5209"
    assert label_of("classify:2") == label_of("classify:2") != label_of("classify")


@given(st.text(min_size=1, max_size=130), st.text(min_size=1, max_size=130))
def test_any_name_has_a_label_of_its_own_that_the_api_server_takes(one: str, other: str) -> None:
    assert KEY.fullmatch(label_of(one))
    assert (label_of(one) == label_of(other)) == (one == other)


def test_no_model_can_be_called_so_that_it_has_anothers_label() -> None:
    taken = label_of("classify:2")
    assert label_of(taken.removeprefix("model.trunkline.dev/")) != taken


def test_states_are_resident_stored_or_nothing() -> None:
    states = [("a", "resident"), ("b", "stored"), ("c", "loading"), ("d", "corrupt"), ("e", "unheard-of")]
    assert labels_of(states, 10) == {label_of("a"): "resident", label_of("c"): "resident", label_of("b"): "stored"}


def test_the_best_of_several_states_counts() -> None:
    assert labels_of([("a", "stored"), ("a", "resident"), ("a", "stored")], 10) == {label_of("a"): "resident"}


def test_of_too_many_models_those_in_memory_come_first() -> None:
    states = [("a", "stored"), ("z", "resident"), ("b", "stored")]
    assert labels_of(states, 2) == {label_of("z"): "resident", label_of("a"): "stored"}
    assert labels_of(reversed(states), 2) == labels_of(states, 2)
    assert labels_of(states, 0) == {}


def test_a_node_with_more_of_the_models_is_worth_more() -> None:
    terms = preferred_terms(["a", "b", "a"])
    assert len(terms) == 4
    assert all(1 <= term["weight"] <= 100 for term in terms)
    nodes = [
        {},
        {label_of("a"): "stored"},
        {label_of("a"): "resident"},
        {label_of("a"): "stored", label_of("b"): "stored"},
        {label_of("a"): "resident", label_of("b"): "stored"},
        {label_of("a"): "resident", label_of("b"): "resident", label_of("c"): "resident"},
    ]
    worth = [score(terms, labels) for labels in nodes]
    assert worth == sorted(set(worth))
    assert worth[0] == 0
