"""What stays bound to a session between runs, and what does not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from typing import Any

import pytest

from sidecar.bindings import Bindings


class Weight:
    pass


class Binding:
    def __init__(self) -> None:
        self.bound: dict[str, Any] = {}
        self.outputs: list[str] = []

    def bind_ortvalue_input(self, name: str, value: Any) -> None:
        self.bound[name] = value

    def bind_output(self, name: str) -> None:
        self.outputs.append(name)

    def clear_binding_outputs(self) -> None:
        self.outputs.clear()

    def get_outputs(self) -> list[Any]:
        return [f"{name} of {self.bound['x']}" for name in self.outputs]


class Session:
    """Remembers its bindings, and with what it was run; fails if told to."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Binding]] = []
        self.runs: list[dict[str, Any]] = []
        self.fails = False

    def io_binding(self) -> Binding:
        binding = Binding()
        self.made.append(weakref.ref(binding))
        return binding

    def run_with_iobinding(self, binding: Binding) -> None:
        self.runs.append(dict(binding.bound))
        if self.fails:
            raise RuntimeError("no")

    def held(self) -> int:
        gc.collect()
        return sum(each() is not None for each in self.made)


def run(bindings: Bindings, weights: Sequence[Weight], x: str = "x") -> list[Any]:
    return bindings.run(weights, lambda: {f"w{number}": id(each) for number, each in enumerate(weights)}, {"x": x}, ["y", "z"])


@pytest.fixture
def session() -> Session:
    return Session()


def test_weights_are_bound_once_and_inputs_each_time(session: Session) -> None:
    bindings, weights = Bindings(session, "nothing"), [Weight(), Weight()]
    for x in ("a", "b"):
        assert run(bindings, weights, x) == [f"y of {x}", f"z of {x}"]
        assert session.runs[-1] == {"w0": id(weights[0]), "w1": id(weights[1]), "x": x}
    assert len(session.made) == 1


def test_between_runs_nothing_of_a_request_is_held(session: Session) -> None:
    bindings, weights = Bindings(session, "nothing"), [Weight()]
    run(bindings, weights)
    (made,) = session.made
    binding = made()
    assert binding is not None
    assert binding.bound["x"] == "nothing"
    assert not binding.outputs


def test_other_weights_in_another_order_have_a_binding_of_their_own(session: Session) -> None:
    bindings, one, other = Bindings(session, "nothing"), Weight(), Weight()
    for weights in ([one, other], [other, one], [one, one], [one, other]):
        run(bindings, weights)
        assert [session.runs[-1][f"w{number}"] for number in range(2)] == [id(each) for each in weights]
    assert len(session.made) == 3


def test_a_binding_goes_with_the_first_of_its_weights(session: Session) -> None:
    bindings, stays = Bindings(session, "nothing"), Weight()
    for _ in range(3):
        run(bindings, [stays, Weight()])
        assert session.held() == 0
    run(bindings, [stays])
    assert session.held() == 1


def test_only_the_last_are_kept(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.bindings._MOST", 2)
    bindings, weights = Bindings(session, "nothing"), [Weight() for _ in range(3)]
    for each in weights:
        run(bindings, [each])
    assert session.held() == 2
    run(bindings, weights[2:])
    assert len(session.made) == 3
    run(bindings, weights[:1])
    assert len(session.made) == 4


def test_a_run_that_fails_leaves_none(session: Session) -> None:
    bindings, weights = Bindings(session, "nothing"), [Weight()]
    session.fails = True
    with pytest.raises(RuntimeError):
        run(bindings, weights)
    assert session.held() == 0


def test_two_runs_at_once_have_one_each(session: Session) -> None:
    bindings, weights = Bindings(session, "nothing"), [Weight()]
    within: list[list[Any]] = []
    runs = session.run_with_iobinding

    def twice(binding: Binding) -> None:
        runs(binding)
        session.run_with_iobinding = runs  # type: ignore[method-assign]
        within.append(run(bindings, weights, "b"))

    session.run_with_iobinding = twice  # type: ignore[method-assign]
    assert run(bindings, weights, "a") == ["y of a", "z of a"]
    assert within == [["y of b", "z of b"]]
    assert len(session.made) == 2


def test_weights_that_go_after_the_bindings_are_nobodys(session: Session) -> None:
    weight = Weight()
    run(Bindings(session, "nothing"), [weight])
    assert session.held() == 0
    del weight
