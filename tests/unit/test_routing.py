"""Routing: what a name means under a table of releases, and what is told of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import pytest
from trunkline.errors import InvalidInput, ModelCorrupt, UnknownModel
from trunkline.protocol import JOINT, TensorSpec
from trunkline.signature import Signature

from sidecar.releases import RELEASED, Release
from sidecar.routing import ReleaseFiles, Route, Routing
from sidecar.tenants import as_asked

X = (TensorSpec("x", "float32", ("batch", 3)),)


class Engine:
    """Signatures of deployed models: of ``name:label`` its version is the label."""

    def __init__(self, *names: str) -> None:
        self.known = {name: self._made(name) for name in names}

    def _made(self, name: str, version: str = "") -> Signature:
        y = (TensorSpec("y", "float32", ("batch", 3)),)
        label = as_asked(name).partition(":")[2] or version or "1"
        return Signature(as_asked(name), label, X, y, {"batch": (1, 8)}, f"id of {name} {version}")

    def replace(self, name: str, version: str) -> None:
        self.known[name] = self._made(name, version)

    def signature(self, name: str) -> Signature:
        parts = name.split(JOINT)
        if any(part not in self.known for part in parts):
            raise UnknownModel(f"no {name}")
        if len(parts) == 1:
            return self.known[name]
        found = [self.known[part] for part in parts]
        outputs = tuple(TensorSpec(f"{as_asked(part)}/y", "float32", ("batch", 3)) for part in parts)
        return Signature(
            as_asked(name), JOINT.join(each.version for each in found), X, outputs, {"batch": (1, 8)}, f"id of {name}"
        )


def routing(engine: Engine, releases: Mapping[str, Release]) -> Routing:
    return Routing(engine.signature, releases)


def found(made: Routing, name: str) -> Route:
    route = made.route(name)
    assert route is not None
    return route


def drawn(made: Routing, name: str, count: int) -> Counter[str]:
    route = found(made, name)
    return Counter(route.draw("")[0] for _ in range(count))


def test_a_name_without_a_release_is_its_own() -> None:
    made = routing(Engine("a", "b:1"), {"c": Release({"1": 1}), "plain": Release({"": 1})})
    for name in ("a", "a@vision", "a+d", "a:", "c@x@y", "plain"):
        assert made.route(name) is None


def test_a_default_answers_for_its_name_in_every_domain() -> None:
    engine = Engine("a:2", "a:2@vision", "a")
    made = routing(engine, {"a": Release({"2": 1})})
    for name, expected in (("a", "a:2"), ("a@vision", "a:2@vision")):
        route = found(made, name)
        assert route.names == [expected]
        assert route.draw("")[0] == expected
        assert route.draw("")[1] is engine.known[expected]
        assert (route.signature.model, route.signature.version) == ("a", "2")
        assert route.signature.id.startswith(RELEASED)
        assert route.signature is route.signature
    with pytest.raises(UnknownModel):
        _ = found(made, "a@other").signature


def test_a_split_is_drawn_by_turns_in_each_domain_by_itself() -> None:
    made = routing(Engine("a", "a:2", "a@vision", "a:2@vision"), {"a": Release({"": 90, "2": 10})})
    assert found(made, "a").signature.version == "1,2"
    assert drawn(made, "a", 95) == {"a": 86, "a:2": 9}
    assert drawn(made, "a@vision", 100) == {"a@vision": 90, "a:2@vision": 10}
    # Sessions have routes of their own, and take turns all the same.
    assert drawn(made, "a", 5) == {"a": 4, "a:2": 1}


def test_a_sticky_split_goes_by_call_ids_where_there_are_any() -> None:
    made = routing(Engine("a:1", "a:2"), {"a": Release({"1": 1, "2": 1}, sticky=True)})
    route = found(made, "a")
    of = {call_id: route.draw(call_id)[0] for call_id in map(str, range(100))}
    assert set(of.values()) == {"a:1", "a:2"}
    assert {call_id: route.draw(call_id)[0] for call_id in of} == of
    assert drawn(made, "a", 10) == {"a:1": 5, "a:2": 5}


def test_a_change_is_a_new_table_and_begins_anew() -> None:
    made = routing(Engine("a:1", "a:2", "b:1", "b:2"), {name: Release({"1": 1, "2": 1}) for name in "ab"})
    assert [drawn(made, "a", 1), drawn(made, "b", 1)] == [{"a:1": 1}, {"b:1": 1}]
    before = made.table
    made.use("a", Release({"1": 1, "2": 1}))
    assert made.table is not before
    assert [drawn(made, "a", 1), drawn(made, "b", 1)] == [{"a:1": 1}, {"b:2": 1}]
    made.use("a", None)
    assert made.route("a") is None
    made.use("b", Release({"": 1}))
    assert not made.table


def test_a_switch_to_what_callers_cannot_tell_apart_leaves_the_id() -> None:
    engine = Engine("a:1", "a:2", "a:3")
    made = routing(engine, {"a": Release({"1": 1})})
    first = found(made, "a").signature.id
    made.use("a", Release({"1": 1, "2": 1}))
    assert found(made, "a").signature.id == first
    engine.known["a:3"] = Signature("a:3", "3", (), engine.known["a:3"].outputs, {}, "other")
    made.use("a", Release({"3": 1}))
    assert found(made, "a").signature.id != first


def test_a_version_that_is_named_answers_whatever_is_released() -> None:
    engine = Engine("a", "a:2", "a:2@vision")
    made = routing(engine, {"a": Release({"": 1, "2": 1})})
    for name in ("a:2", "a:2@vision"):
        assert found(made, name).signature is engine.known[name]
        assert [found(made, name).draw("")[0] for _ in range(3)] == [name] * 3
    # What was pushed without a version is the one its bundle says, as long as it says so.
    route = found(made, "a:1")
    assert (route.draw("")[0], route.signature.id) == ("a", engine.known["a"].id)
    engine.replace("a", "7")
    with pytest.raises(UnknownModel, match="no version 1 of a here"):
        _ = route.signature
    assert found(made, "a:7").names == ["a"]


def test_several_models_are_told_by_the_names_they_were_asked_by() -> None:
    engine = Engine("a:1", "a:2", "a-b:1", "c")
    made = routing(engine, {"a": Release({"1": 1, "2": 1}), "a-b": Release({"1": 1})})
    route = found(made, "a+a-b+c")
    assert [spec.name for spec in route.signature.outputs] == ["a/y", "a-b/y", "c/y"]
    assert (route.signature.model, route.signature.version) == ("a+a-b+c", "1,2+1+1")
    assert [route.draw("")[0] for _ in range(2)] == ["a:1+a-b:1+c", "a:2+a-b:1+c"]
    assert route.names == ["a:1", "a:2", "a-b:1", "c"]
    # As a client sorts them; the engine stands a version where its model would stand.
    both = found(made, "a-b:1+a:1+a:2")
    assert both.draw("")[0] == "a:1+a:2+a-b:1"
    assert [spec.name for spec in both.signature.outputs] == ["a:1/y", "a:2/y", "a-b:1/y"]
    engine.replace("c", "5")
    assert [spec.name for spec in found(made, "a:2+c:5").signature.outputs] == ["a:2/y", "c:5/y"]


@pytest.mark.parametrize("name", ["a+a:2", "b+a", "a:2+a:2"])
def test_what_has_no_one_meaning_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput):
        routing(Engine("a:1", "a:2", "b"), {"a": Release({"1": 1})}).route(name)


def test_the_signature_is_made_anew_when_a_version_is() -> None:
    engine = Engine("a", "a:2")
    made = routing(engine, {"a": Release({"": 1, "2": 1})})
    route = found(made, "a")
    before = route.signature
    engine.replace("a", "3")
    assert route.signature.version == "3,2"
    assert before.version == "1,2"


class Releases:
    """Files of releases; what is an error cannot be read."""

    def __init__(self, **files: Release | ModelCorrupt) -> None:
        self.files = files

    def releases(self) -> list[str]:
        # One of them is removed before it is read.
        return [*self.files, "gone"]

    def release(self, name: str) -> Release | None:
        found = self.files.get(name)
        if isinstance(found, ModelCorrupt):
            raise found
        return found


def test_a_release_that_cannot_be_read_is_nobodys_guess() -> None:
    source = Releases(a=ModelCorrupt("torn"), b=Release({"1": 1}))
    made = routing(Engine("a", "a:1", "b:1"), ReleaseFiles(source).table())  # type: ignore[arg-type]
    for name in ("a", "a@vision", "a+b"):
        with pytest.raises(ModelCorrupt, match="torn") as first:
            made.route(name)
        with pytest.raises(ModelCorrupt, match="torn") as second:
            made.route(name)
        assert first.value is not second.value
    assert found(made, "a:1").draw("")[0] == "a:1"
    assert found(made, "b").draw("")[0] == "b:1"


def test_files_are_read_one_after_the_other() -> None:
    source = Releases(a=Release({"1": 1}), torn=ModelCorrupt("torn"))
    files = ReleaseFiles(source)
    told: list[object] = []
    for name in ("a", "torn", "none"):
        files.reread(name, told.append)
    files.stop()
    files.run()
    assert told[0] == Release({"1": 1})
    assert isinstance(told[1], ModelCorrupt)
    assert told[2] is None
