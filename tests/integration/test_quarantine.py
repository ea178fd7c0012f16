"""Requests that earlier engines died of: run alone, refused for a while, and cleared; and what the journal says of them."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
from trunkline import client
from trunkline.errors import DeviceFault, DeviceOutOfMemory, Quarantined
from trunkline.protocol import JOINT

from sidecar.journal import Asked, Journal
from sidecar.quarantine import Kind, Suspects
from sidecar.tenants import ANYONE, Tenant
from sidecar.verdicts import Verdicts
from tests.fakes import FakeSource, running_server
from tests.integration.test_lanes import Asker, Gate, Gated, engine_on, expected, handled, lanes_of
from tests.waiting import PATIENCE_S

X = np.ones((1, 3), np.float32)
OTHER = Tenant(name="other", domain=ANYONE.domain)


@pytest.fixture
def device(nothing_leaks: None) -> Gated:
    return Gated()


@pytest.fixture
def marks() -> list[int]:
    return []


def suspects(marks: list[int], *models: str, refused: dict[str, float] | None = None) -> Suspects:
    numbers = {Kind(ANYONE.name, model): number for number, model in enumerate(models)}
    until_s = {Kind(ANYONE.name, model): (until, True) for model, until in (refused or {}).items()}
    return Suspects(numbers, until_s, marks.append, time.monotonic)


# --- alone ------------------------------------------------------------------------------------------------------------


def test_a_suspect_waits_until_it_is_alone_and_nobody_runs_beside_it(device: Gated, marks: list[int], tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b", "c", lanes=3, suspects=suspects(marks, "x", "b")) as engine:
        a, b, c = device.holding("a", "b", "c")
        askers = {name: Asker(engine) for name in "abc"}
        askers["a"].ask("a")
        assert a.entered.wait(PATIENCE_S)
        askers["b"].ask("b")
        askers["c"].ask("c")
        handled(engine)
        assert lanes_of(engine) == (3, 1)
        a.leave.set()
        assert b.entered.wait(PATIENCE_S)
        handled(engine)
        assert lanes_of(engine) == (3, 1)
        assert marks == []
        b.leave.set()
        assert (askers["b"].told()[0] == expected("b")).all()
        assert c.entered.wait(PATIENCE_S)
        assert marks == [1]
        # Nobody holds anything against it any more.
        b.entered.clear()
        askers["b"].ask("b")
        assert b.entered.wait(PATIENCE_S)
        c.leave.set()
        for name in "abc":
            assert (askers[name].told()[0] == expected(name)).all()


def test_the_same_model_of_another_tenant_is_no_suspect(device: Gated, marks: list[int], tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b", suspects=suspects(marks, "b")) as engine:
        a, b = device.holding("a", "b")
        one, other = Asker(engine), Asker(engine)
        one.ask("a")
        assert a.entered.wait(PATIENCE_S)
        other.ask("b", OTHER)
        assert b.entered.wait(PATIENCE_S)
        for gate in (a, b):
            gate.leave.set()
        assert (one.told()[0] == expected("a")).all()
        assert (other.told()[0] == expected("b")).all()
    assert marks == []


def test_several_models_with_a_suspect_among_them_are_run_alone(device: Gated, marks: list[int], tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b", "c", lanes=3, suspects=suspects(marks, "b")) as engine:
        (a,) = device.holding("a")
        alone, joint = Asker(engine), Asker(engine)
        alone.ask("a")
        assert a.entered.wait(PATIENCE_S)
        joint.ask(JOINT.join("bc"))
        handled(engine)
        assert lanes_of(engine) == (3, 1)
        a.leave.set()
        assert len(joint.told()) == 2
        assert len(alone.told()) == 1
    assert marks == [0]


def test_a_suspect_whose_run_fails_is_cleared(device: Gated, marks: list[int], tmp_path: Path) -> None:
    device.errors["b"] = [DeviceFault("no such kernel")]
    with engine_on(device, tmp_path, "b", suspects=suspects(marks, "b")) as engine:
        asker = Asker(engine)
        asker.ask("b")
        assert isinstance(asker.told(), DeviceFault)
    assert marks == [0]


def test_a_suspect_that_was_never_run_is_not_cleared(device: Gated, marks: list[int], tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b", suspects=suspects(marks, "b")) as engine:
        (a,) = device.holding("a")
        one, late = Asker(engine), Asker(engine)
        one.ask("a")
        assert a.entered.wait(PATIENCE_S)
        late.ask("b", deadline_s=0.0)
        a.leave.set()
        assert len(one.told()) == 1
        assert late.told().code == "deadline_exceeded"
        assert marks == []
        late.ask("b")
        assert (late.told()[0] == expected("b")).all()
    assert marks == [0]


# --- refused ----------------------------------------------------------------------------------------------------------


def test_who_is_refused_is_told_for_how_long_and_others_are_served(
    tmp_path: Path, source: FakeSource, marks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = suspects(marks, "age", refused={"age": time.monotonic() + 100})
    with running_server(tmp_path, source, suspects=known) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        for asks in (client.model("age"), client.models("age", "gender")):
            with pytest.raises(Quarantined) as refused:
                asks(X)
            assert 90 < float(refused.value.details["retry_after_s"]) <= 100
            assert "age" in refused.value.message
        assert client.model("gender")(X).shape == (1, 3)
        assert running.device.allocated_bytes, "what is loaded is computed with by nobody yet"
        assert running.engine._outcomes.to_plain()["models"]["age"]["failed"] == {"quarantined": 2}  # type: ignore[index]
        client._pool.close()
    assert marks == []


def test_the_client_waits_for_what_is_refused_for_a_moment(
    tmp_path: Path, source: FakeSource, marks: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    known = suspects(marks, "age", refused={"age": time.monotonic() + 0.5, "gender": time.monotonic() + 0.5})
    with running_server(tmp_path, source, suspects=known) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        # Not beyond its deadline.
        with pytest.raises(Quarantined):
            client.model("gender").call({"x": X}, deadline_s=0.2)
        before = client.counters()["repeats"]
        assert client.model("age")(X).shape == (1, 3)
        assert client.counters()["repeats"] == before + 1
        client._pool.close()
    assert marks == [0]


# --- the journal ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", [1, 2])
def test_what_is_at_work_stands_in_the_journal_until_it_is_answered(device: Gated, tmp_path: Path, lanes: int) -> None:
    journal = Journal()
    with engine_on(device, tmp_path, "a", "b", lanes=lanes, page=journal.page(0)) as engine:
        gates = device.holding(*"ab"[:lanes])
        askers = {name: Asker(engine) for name in "ab"[:lanes]}
        for name, asker in askers.items():
            asker.ask(name)
        for gate in gates:
            assert gate.entered.wait(PATIENCE_S)
        entries = journal.entries()
        assert [each.calls for each in entries] == [(Asked(ANYONE.name, name, ""),) for name in askers]
        assert all(0 < each.running.began_s <= time.monotonic() for each in entries)
        # Nobody has tried these models.
        assert [each.running.expected_s for each in entries] == [0.0] * lanes
        for gate in gates:
            gate.leave.set()
        for asker in askers.values():
            asker.told()
        handled(engine)
        assert journal.entries() == []
        # The first run counts for nothing; by the second it is known.
        device.gates.clear()
        for _ in range(3):
            askers["a"].ask("a")
            askers["a"].told()
        (gate,) = device.holding("a")
        askers["a"].ask("a")
        assert gate.entered.wait(PATIENCE_S)
        (entry,) = journal.entries()
        assert 0 < entry.running.expected_s < 5
        gate.leave.set()
        askers["a"].told()
        device.errors["a"] = [DeviceFault("no such kernel")]
        device.gates.clear()
        askers["a"].ask("a")
        askers["a"].told()
        handled(engine)
        assert journal.entries() == []
    journal.close()


def test_a_trial_may_take_as_long_as_it_likes(device: Gated, tmp_path: Path) -> None:
    """Nobody waits for it: the watchdog is not told of it."""
    journal, gate = Journal(), Gate()

    def hold() -> None:
        if threading.current_thread().name == "trials":
            gate.pass_through()

    device.on_run = hold
    with engine_on(device, tmp_path, "a", verdicts=Verdicts(tmp_path / "verdicts", "test"), page=journal.page(0)) as engine:
        asker = Asker(engine)
        asker.ask("a")
        assert (asker.told()[0] == expected("a")).all()
        assert gate.entered.wait(PATIENCE_S)
        handled(engine)
        assert journal.running() == []
        gate.leave.set()
    journal.close()


# --- a device that is lost --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [DeviceFault("assert triggered"), DeviceOutOfMemory("no room"), ValueError("a bug")], ids=repr)
@pytest.mark.parametrize("when", ["run", "read"])
def test_an_engine_whose_device_is_lost_ends_while_it_is_noted_for_whom_it_computed(
    device: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, when: str
) -> None:
    """Not after other errors. Where nobody ends it the request is told like any other."""
    journal, found = Journal(), []

    def lost() -> None:
        found.extend(journal.entries())

    def fails(session: Asker, *answer: object) -> None:
        raise error

    device.is_lost = lambda: True  # type: ignore[method-assign]
    with engine_on(device, tmp_path, "a", lanes=1, page=journal.page(0), device_lost=lost) as engine:
        asker = Asker(engine)
        if when == "run":
            device.errors["a"] = [error]
        else:
            # On a GPU what a run did wrong shows when its outputs are read.
            monkeypatch.setattr(Asker, "answer", fails)
        asker.ask("a")
        asker.told()
        assert [each.calls for each in found] == ([(Asked(ANYONE.name, "a", ""),)] if type(error) is DeviceFault else [])
    journal.close()


def test_a_fault_that_leaves_the_device_in_order_ends_nothing(device: Gated, tmp_path: Path) -> None:
    ended: list[int] = []
    device.errors["a"] = [DeviceFault("no such kernel")]
    with engine_on(device, tmp_path, "a", device_lost=lambda: ended.append(1)) as engine:
        asker = Asker(engine)
        asker.ask("a")
        assert isinstance(asker.told(), DeviceFault)
        asker.ask("a")
        assert (asker.told()[0] == expected("a")).all()
    assert not ended
