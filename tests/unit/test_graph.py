"""Which weights models have in common: found by content, forgotten exactly when nobody uses them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from trunkline.errors import UnknownModel

from sidecar.graph import FusedGraph, Looked
from sidecar.merkle import in_domain
from sidecar.slices import ITEMS, Slices, stopping
from tests.fakes import bundle_of, weight_of

TRUNK = b"t" * 100
MODELS = {"age": [TRUNK, b"age"], "gender": [TRUNK, b"gender"], "other": [b"own"]}


def graph(*names: str) -> FusedGraph:
    made = FusedGraph()
    for name in names:
        made.add(bundle_of(name, MODELS[name]))
    made.check_invariants()
    return made


def test_equal_weights_are_one() -> None:
    made = graph("age", "gender", "other")
    assert len(made.all_weights()) == 4
    assert made.users(weight_of(TRUNK).digest) == ["age", "gender"]
    assert made.sharers("age") == ["gender"]
    assert made.sharers("other") == []
    assert made.bytes_of("age") == (103, 100)
    assert made.bytes_of("other") == (3, 0)


def test_adding_twice_adds_nothing() -> None:
    made = graph("age", "gender")
    before = made.all_weights()
    made.add(bundle_of("age", MODELS["age"]))
    made.check_invariants()
    assert made.all_weights() == before


def test_the_order_of_adding_does_not_matter() -> None:
    graphs = [graph(*order) for order in itertools.permutations(MODELS)]
    assert all(made.all_weights() == graphs[0].all_weights() for made in graphs)
    assert all(list(made) == sorted(MODELS) for made in graphs)


@pytest.mark.parametrize("name", MODELS)
def test_removing_forgets_what_nobody_else_uses(name: str) -> None:
    made = graph(*MODELS)
    made.remove(name)
    made.check_invariants()
    others = [other for other in MODELS if other != name]
    assert made.all_weights() == graph(*others).all_weights()
    assert name not in made


def test_replacing_a_model_forgets_its_old_weights() -> None:
    made = graph("age", "gender")
    made.add(bundle_of("age", [b"new"]))
    made.check_invariants()
    assert made.users(weight_of(TRUNK).digest) == ["gender"]
    assert made.users(weight_of(b"age").digest) == []


def test_an_unknown_model_is_told_with_those_there_are() -> None:
    for ask in (graph("age").bundle, graph("age").weights, graph("age").remove):
        with pytest.raises(UnknownModel, match="it holds age"):
            ask("nobody")


def test_equal_computation_is_counted() -> None:
    """Both begin with the trunk's weight; what follows is each one's own."""
    made = graph("age", "gender")
    assert made.nodes_of("age") == made.nodes_of("gender") == (2, 1)
    made.remove("gender")
    made.check_invariants()
    assert made.nodes_of("age") == (2, 0)


def test_blocks_of_models_that_begin_alike_are_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    made = graph("other", "gender", "age")
    trunk, age, gender, other = made.blocks()
    assert (trunk.parent, trunk.models, trunk.weights) == (None, ["age", "gender"], {weight_of(TRUNK).digest: 100})
    assert (age.parent, age.models, gender.parent, gender.models) == (trunk.id, ["age"], trunk.id, ["gender"])
    assert (other.parent, other.models, other.node_count) == (None, ["other"], 1)
    plain = made.tree()
    assert (plain["logical_bytes"], plain["unique_bytes"], plain["saved_bytes"]) == (212, 112, 100)
    assert plain["blocks"][0] == {  # type: ignore[index]
        "id": trunk.id,
        "parent": None,
        "nodes": 1,
        "bytes": 100,
        "models": ["age", "gender"],
    }
    made.remove("gender")
    assert [block.id for block in made.blocks()] == [trunk.id, age.id, other.id]


def test_equal_weights_under_different_computation_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    made = FusedGraph()
    made.add(bundle_of("one", [b"first", TRUNK]))
    made.add(bundle_of("two", [b"other", TRUNK]))
    assert [sum(block.weights.values()) for block in made.blocks()] == [5, 100, 5, 0]


@pytest.mark.parametrize("turns", range(1, 16))
def test_the_same_model_in_another_domain_may_be_removed_while_one_is_looked_at(turns: int) -> None:
    bundle = bundle_of("large", [b"%d" % number for number in range(2 * ITEMS)])
    there, here = (replace(bundle, name=f"large@{name}", graph=in_domain(bundle.graph, name)) for name in ("there", "here"))
    made, found = graph("age"), list[Looked]()
    expected = made.look(here)
    made.add(there)

    def look() -> None:
        with stopping():
            found.append(made.look(here))

    slices = Slices()
    slices.add(look)
    for _ in range(turns):
        if slices:
            slices.go_on()
    made.remove("large@there")
    made.add(bundle_of("gender", MODELS["gender"]))
    while slices:
        slices.go_on()
    assert found[0].identities == expected.identities
    made.add(here, found[0])
    made.check_invariants()
