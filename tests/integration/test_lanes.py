"""Stages in several lanes: everybody is answered as with one, and what a lane needs is not given back before it has ended."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trunkline import client, model
from trunkline.errors import DeviceFault, DeviceOutOfMemory, SidecarFault, TrunklineError
from trunkline.pool import Pool

from sidecar.devices import TorchDevice, open_device
from sidecar.engine import Engine
from sidecar.errors import BlobCorrupt
from sidecar.pins import Pins
from sidecar.ports import OutputSpecs, Work
from sidecar.tenants import ANYONE, Tenant
from tests.fakes import FakeDevice, FakeSource, Running, bundle_of
from tests.forms import prefer
from tests.integration.test_sharing import ask, at_once, counted, deploy, heads, serving
from tests.integration.test_shortage import GUILTY, Small, asked_at_once, is_guilty, marked, shortage
from tests.integration.test_streams import rooms
from tests.networks import Network, agrees, network
from tests.nodes import Node
from tests.waiting import PATIENCE_S

LATE = 30.0
X = np.ones((1, 3), np.float32)


class Gate:
    """What runs here waits until the test lets it go on."""

    def __init__(self) -> None:
        self.entered, self.leave = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        self.entered.set()
        assert self.leave.wait(LATE), "nobody let it go on"


class Gated(FakeDevice):
    """A device whose runs can be held, or made to fail, by model: each has one weight, its name."""

    def __init__(self) -> None:
        super().__init__()
        self.gates: dict[str, Gate] = {}
        self.errors: dict[str, list[Exception]] = {}
        self.ran: queue.SimpleQueue[str] = queue.SimpleQueue()

    def run(self, program: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        name = bytes(weights[0].memory).decode()
        self.ran.put(name)
        if name in self.gates:
            self.gates[name].pass_through()
        if self.errors.get(name):
            raise self.errors[name].pop(0)
        return super().run(program, weights, inputs)

    def holding(self, *names: str) -> list[Gate]:
        self.gates = {name: Gate() for name in names}
        return list(self.gates.values())


class Asker:
    """A session that asks the engine directly, and notes in which order it is told what."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[str] = []
        self.answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.gone = threading.Event()
        engine.session_opened()

    def ask(self, name: str, tenant: Tenant = ANYONE, deadline_s: float = LATE) -> None:
        self.engine.submit(Work(self, 1, name, time.monotonic() + deadline_s, inputs=[X], tenant=tenant))

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        self.events.append("answer")
        self.answers.put([np.array(output) for output in outputs])

    def document(self, request_id: int, plain: object) -> None:
        self.answers.put(plain)

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self.events.append(error.code)
        self.answers.put(error)

    def released(self) -> None:
        self.events.append("released")
        self.gone.set()

    def told(self) -> Any:
        return self.answers.get(timeout=LATE)


@contextlib.contextmanager
def engine_on(device: Gated, folder: Path, *names: str, source: FakeSource | None = None, **settings: Any) -> Iterator[Engine]:
    source = source or FakeSource()
    for name in names:
        source.put(bundle_of(name, [name.encode()]), [name.encode()])
    options: dict[str, Any] = {"budget_bytes": 1 << 20, "lanes": 2} | settings
    engine = Engine(device, source, Pins(folder / "pins.json"), queue_limit=64, **options)
    engine.deploy_stored()
    thread = threading.Thread(target=engine.run)
    thread.start()
    try:
        yield engine
    finally:
        engine.drain(lambda: None)
        thread.join(LATE)
    assert not thread.is_alive()
    engine.check_invariants()
    assert device.peak_bytes <= options["budget_bytes"]


@pytest.fixture
def device(nothing_leaks: None) -> Gated:
    return Gated()


def handled(engine: Engine) -> None:
    """Wait until the engine has seen all that was posted before, and has gone on with it."""
    for _ in range(2):
        seen = threading.Event()
        engine._post(seen.set)
        assert seen.wait(LATE)


def lanes_of(engine: Engine) -> tuple[int, int]:
    """Return how many lanes there are, and how many are at work."""
    found: Any = engine._request_counts()["lanes"]
    return found["count"], found["running"]


def leases(engine: Engine, name: str) -> int:
    return engine._residency.lease_count(engine._catalog.deployed[name].plan)


def expected(name: str) -> Any:
    return X + np.float32(sum(name.encode()))


# --- at the same time -------------------------------------------------------------------------------------------------


def test_two_models_run_at_the_same_time_and_a_third_waits_for_a_lane(device: Gated, tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b", "c") as engine:
        first, second = device.holding("a", "b")
        askers = {name: Asker(engine) for name in "abc"}
        for name, asker in askers.items():
            asker.ask(name)
            if name in device.gates:
                assert device.gates[name].entered.wait(LATE)
        handled(engine)
        # The engine goes on with its inbox, and no more is out than there are lanes.
        assert lanes_of(engine) == (2, 2)
        assert [device.ran.get() for _ in range(device.ran.qsize())] == ["a", "b"]
        second.leave.set()
        for name in "bc":
            assert (askers[name].told()[0] == expected(name)).all()
        first.leave.set()
        assert (askers["a"].told()[0] == expected("a")).all()


def test_with_one_lane_stages_run_in_the_engine_s_own_thread(device: Gated, tmp_path: Path) -> None:
    threads: list[str] = []
    device.on_run = lambda: threads.append(threading.current_thread().name)
    for lanes in (1, 2):
        with engine_on(device, tmp_path, "a", lanes=lanes) as engine:
            names = {each.name for each in threading.enumerate()}
            asker = Asker(engine)
            asker.ask("a")
            asker.told()
        assert ("lane 0" in names) == (lanes == 2)
        assert threads.pop().startswith("lane ") == (lanes == 2)
    assert device.lanes_begun == 2


@pytest.mark.parametrize("whole", [False, True])
def test_a_stage_with_nothing_beside_it_has_the_whole_device(device: Gated, tmp_path: Path, whole: bool) -> None:
    device.is_shared_by_lanes = whole
    threads: queue.SimpleQueue[str] = queue.SimpleQueue()
    device.on_run = lambda: threads.put(threading.current_thread().name.split()[0])
    with engine_on(device, tmp_path, "a", "b") as engine:
        askers = {name: Asker(engine) for name in "ab"}
        for name, asker in askers.items():
            asker.ask(name)
            assert (asker.told()[0] == expected(name)).all()
            assert (threads.get() == "lane") == (not whole)
        handled(engine)
        # Two that are there at the same time are run side by side; the second does not wait for the first.
        gates = device.holding("a", "b")
        held = threading.Event()
        engine._post(lambda: held.wait(LATE) or None)
        for name, asker in askers.items():
            asker.ask(name)
        held.set()
        assert all(gate.entered.wait(LATE) for gate in gates)
        for gate in gates:
            gate.leave.set()
        for name, asker in askers.items():
            assert (asker.told()[0] == expected(name)).all()
        assert [threads.get(), threads.get()] == ["lane", "lane"]
        # What a run costs there is another matter than what it costs in a lane.
        assert {lanes for (lanes, _), _ in engine._runs._costs._seen} == ({1, 2} if whole else {2})


def test_one_that_comes_while_a_lane_computes_has_the_other_lane(device: Gated, tmp_path: Path) -> None:
    device.is_shared_by_lanes = True
    with engine_on(device, tmp_path, "a", "b", "c") as engine:
        askers = {name: Asker(engine) for name in "abc"}
        for name, asker in askers.items():
            asker.ask(name)
            asker.told()
        gates = device.holding("a", "b")
        held = threading.Event()
        engine._post(lambda: held.wait(LATE) or None)
        for name in "ab":
            askers[name].ask(name)
        held.set()
        assert all(gate.entered.wait(LATE) for gate in gates)
        gates[1].leave.set()
        askers["b"].told()
        askers["c"].ask("c")
        assert (askers["c"].told()[0] == expected("c")).all()
        assert lanes_of(engine) == (2, 1)
        gates[0].leave.set()
        askers["a"].told()


def test_where_the_device_cannot_be_divided_stages_run_one_at_a_time(
    device: Gated, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(count: int) -> None:
        raise DeviceFault("no room for a stream")

    monkeypatch.setattr(device, "begin_lane", refuse)
    with engine_on(device, tmp_path, "a") as engine:
        asker = Asker(engine)
        asker.ask("a")
        assert (asker.told()[0] == expected("a")).all()
        assert lanes_of(engine) == (1, 0)
    assert "fake cannot be divided into 2 lanes (no room for a stream)" in caplog.text


def test_an_engine_drains_when_its_lanes_have_ended(device: Gated, tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b") as engine:
        (gate,) = device.holding("a")
        asker, other = Asker(engine), Asker(engine)
        asker.ask("a")
        assert gate.entered.wait(LATE)
        drained = threading.Event()
        engine.drain(drained.set)
        # Nobody waits for what runs: it is waited for all the same.
        engine.session_closed(asker)
        other.ask("b")
        assert other.told().code == "draining"
        handled(engine)
        assert not engine._wavefront
        assert not drained.is_set()
        gate.leave.set()
        assert drained.wait(LATE)
        assert asker.events == ["released"]


def test_an_engine_whose_lanes_compute_is_not_idle(device: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine._IDLE_S", 0.0)
    trimmed = threading.Event()
    with engine_on(device, tmp_path, "a") as engine:
        (gate,) = device.holding("a")
        asker = Asker(engine)
        asker.ask("a")
        assert gate.entered.wait(LATE)
        handled(engine)
        monkeypatch.setattr(device, "trim", trimmed.set)
        handled(engine)
        assert not trimmed.is_set()
        gate.leave.set()
        asker.told()
        assert trimmed.wait(LATE)


def test_lanes_that_compute_at_the_same_time_share_what_it_costs(device: Gated, tmp_path: Path) -> None:
    now = [time.monotonic()]
    with engine_on(device, tmp_path, "a", "b", clock=lambda: now[0]) as engine:
        first, second = device.holding("a", "b")
        askers = {name: Asker(engine) for name in "ab"}
        for name, asker in askers.items():
            asker.ask(name, Tenant(name=name, domain=""))
            assert device.gates[name].entered.wait(LATE)
        now[0] += 1.0
        # Who leaves is charged, too.
        engine.session_closed(askers["a"])
        handled(engine)
        first.leave.set()
        assert askers["a"].gone.wait(LATE)
        assert engine._queue.shares.served_s("a") == pytest.approx(0.5)
        now[0] += 1.0
        second.leave.set()
        askers["b"].told()
        handled(engine)
        # Two seconds of the device, and nobody had them twice.
        assert engine._queue.shares.served_s("b") == pytest.approx(1.5)


# --- those who leave, and those who fail ------------------------------------------------------------------------------


def test_who_leaves_while_his_stage_runs_keeps_what_he_has_until_it_has_ended(device: Gated, tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b") as engine:
        (gate,) = device.holding("a")
        asker, other = Asker(engine), Asker(engine)
        asker.ask("a")
        assert gate.entered.wait(LATE)
        engine.session_closed(asker)
        other.ask("b")
        other.told()
        handled(engine)
        # His request is over, his input and the weights are still read.
        assert not asker.events
        assert leases(engine, "a") == 1
        engine._post(engine.check_invariants)
        handled(engine)
        gate.leave.set()
        assert asker.gone.wait(LATE)
        assert asker.events == ["released"]
        assert leases(engine, "a") == 0


def test_who_leaves_when_nothing_of_his_runs_is_let_go_at_once(device: Gated, tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b", "c") as engine:
        gates = device.holding("a", "b")
        askers = [Asker(engine) for _ in range(3)]
        for asker, name in zip(askers, "abc", strict=True):
            asker.ask(name)
        assert all(gate.entered.wait(LATE) for gate in gates)
        handled(engine)
        assert leases(engine, "c") == 1
        engine.session_closed(askers[2])
        assert askers[2].gone.wait(LATE)
        assert leases(engine, "c") == 0
        for gate in gates:
            gate.leave.set()
        for asker in askers[:2]:
            asker.told()
    assert "c" not in {device.ran.get() for _ in range(device.ran.qsize())}


def test_a_call_that_fails_is_told_so_when_its_other_stage_has_ended(device: Gated, tmp_path: Path) -> None:
    """Told before that, its function would write the next input over the one that a lane reads."""
    with engine_on(device, tmp_path, "a", "b") as engine:
        slow, fails = device.holding("a", "b")
        device.errors["b"] = [DeviceFault("broken")]
        asker = Asker(engine)
        asker.ask("a+b")
        assert slow.entered.wait(LATE)
        assert fails.entered.wait(LATE)
        fails.leave.set()
        failed = threading.Event()
        engine._post(lambda: failed.set() if not engine._wavefront else None)
        while not failed.wait(0.01):
            engine._post(lambda: failed.set() if not engine._wavefront else None)
        assert not asker.events
        assert (leases(engine, "a"), leases(engine, "b")) == (1, 1)
        engine._post(engine.check_invariants)
        # Whoever leaves now is told first.
        engine.session_closed(asker)
        handled(engine)
        assert not asker.events
        slow.leave.set()
        assert asker.gone.wait(LATE)
        assert asker.events == ["device_fault", "released"]
        assert (leases(engine, "a"), leases(engine, "b")) == (0, 0)


def test_a_call_that_has_become_late_is_told_so_when_its_stage_has_ended(device: Gated, tmp_path: Path) -> None:
    now = [time.monotonic()]
    with engine_on(device, tmp_path, "a", "b", clock=lambda: now[0]) as engine:
        (gate,) = device.holding("a")
        asker, other = Asker(engine), Asker(engine)
        asker.ask("a")
        assert gate.entered.wait(LATE)
        now[0] += 2 * LATE
        # Whoever asks next has the engine look.
        other.ask("b", deadline_s=4 * LATE)
        assert (other.told()[0] == expected("b")).all()
        handled(engine)
        assert not engine._wavefront
        assert not asker.events
        assert leases(engine, "a") == 1
        gate.leave.set()
        assert asker.told().code == "deadline_exceeded"
        handled(engine)
        assert leases(engine, "a") == 0
        assert asker.events == ["deadline_exceeded"]


def test_models_asked_one_after_the_other_are_let_go_when_their_caller_leaves(device: Gated, tmp_path: Path) -> None:
    """Too large to be in memory together: the call is late, and its caller leaves, while a lane is at its first part."""
    now = [time.monotonic()]
    names = ("a" * 100, "b" * 100)
    with engine_on(device, tmp_path, *names, "c", budget_bytes=150, clock=lambda: now[0]) as engine:
        (gate,) = device.holding(names[0])
        asker, other = Asker(engine), Asker(engine)
        asker.ask("+".join(names))
        assert gate.entered.wait(LATE)
        now[0] += 2 * LATE
        other.ask("c", deadline_s=4 * LATE)
        other.told()
        engine.session_closed(asker)
        handled(engine)
        assert "released" not in asker.events
        gate.leave.set()
        assert asker.gone.wait(LATE)
        assert leases(engine, names[0]) == 0
        assert not engine._in_turn


def test_what_a_lane_raises_fails_that_request_alone(device: Gated, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with engine_on(device, tmp_path, "a", "b") as engine:
        (gate,) = device.holding("a")
        device.errors["b"] = [RuntimeError("a bug"), DeviceFault("broken")]
        asker, other = Asker(engine), Asker(engine)
        asker.ask("a")
        assert gate.entered.wait(LATE)
        other.ask("b")
        error = other.told()
        assert type(error) is SidecarFault
        assert error.details["incident"] in caplog.text
        assert "a bug" in caplog.text
        other.ask("b")
        assert other.told().message == "broken"
        other.ask("b")
        assert (other.told()[0] == expected("b")).all()
        gate.leave.set()
        assert (asker.told()[0] == expected("a")).all()


def test_what_fails_when_nobody_waits_for_it_any_more_fails_nobody(device: Gated, tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a") as engine:
        (gate,) = device.holding("a")
        device.errors["a"] = [DeviceFault("broken")]
        asker = Asker(engine)
        asker.ask("a")
        assert gate.entered.wait(LATE)
        engine.session_closed(asker)
        handled(engine)
        gate.leave.set()
        assert asker.gone.wait(LATE)
        assert engine._request_counts()["requests"]["failed"] == 0  # type: ignore[index]
        other = Asker(engine)
        other.ask("a")
        assert (other.told()[0] == expected("a")).all()


def test_what_is_done_with_outputs_may_fail_as_ever(device: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine_on(device, tmp_path, "a") as engine:

        def refuse(group: object, outputs: object) -> None:
            raise DeviceFault("no room to part them")

        monkeypatch.setattr(engine._wavefront, "advance", refuse)
        asker = Asker(engine)
        asker.ask("a")
        assert asker.told().message == "no room to part them"


# --- weights ----------------------------------------------------------------------------------------------------------


def test_weights_of_a_running_stage_stay_though_others_need_the_room(device: Gated, tmp_path: Path) -> None:
    names = ("a" * 100, "b" * 100)
    with engine_on(device, tmp_path, *names, budget_bytes=150) as engine:
        (gate,) = device.holding(names[0])
        asker, other = Asker(engine), Asker(engine)
        asker.ask(names[0])
        assert gate.entered.wait(LATE)
        # Even if nobody waits for it any more.
        engine.session_closed(asker)
        other.ask(names[1])
        handled(engine)
        assert engine._admission._first_in_line is not None
        assert device.allocated_bytes == 100
        assert not other.events
        gate.leave.set()
        assert (other.told()[0] == expected(names[1])).all()


def test_a_model_is_replaced_while_a_lane_runs_it(device: Gated, tmp_path: Path) -> None:
    source = FakeSource()
    with engine_on(device, tmp_path, "a", source=source) as engine:
        (gate,) = device.holding("a")
        asker = Asker(engine)
        asker.ask("a")
        assert gate.entered.wait(LATE)
        source.put(bundle_of("a", [b"new"], version="2"), [b"new"])
        engine._post(lambda: engine._drop(engine._catalog.deploy("a")))
        engine._post(engine._catalog.publish)
        handled(engine)
        assert len(engine._catalog.retired) == 1
        gate.leave.set()
        assert (asker.told()[0] == expected("a")).all()
        handled(engine)
        assert not engine._catalog.retired
        asker.ask("a")
        assert (asker.told()[0] == expected("new")).all()


def test_a_load_that_fails_while_another_stage_of_the_call_runs(
    device: Gated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    source = FakeSource()
    contents = [b"first" * 10, b"second" * 10]
    source.put(bundle_of("deep", contents), contents)
    reading, leave = threading.Event(), threading.Event()

    def before_read(digest: str) -> None:
        if source.blobs[digest] == contents[1]:
            reading.set()
            assert leave.wait(LATE)
            raise BlobCorrupt("altered")

    source.before_read = before_read
    with engine_on(device, tmp_path, source=source) as engine:
        assert len(engine._catalog.deployed["deep"].steps) > 1
        (gate,) = device.holding(contents[0].decode())
        asker = Asker(engine)
        asker.ask("deep")
        assert gate.entered.wait(LATE)
        assert reading.wait(LATE)
        leave.set()
        gone = threading.Event()
        while not gone.wait(0.01):
            engine._post(lambda: gone.set() if not engine._wavefront else None)
        assert not asker.events
        assert leases(engine, "deep") == 1
        gate.leave.set()
        assert asker.told().code == "model_corrupt"
        handled(engine)
        # What did arrive is gone, and the next request begins afresh.
        assert engine._residency.committed_bytes == 0
        source.before_read = lambda digest: None
        asker.ask("deep")
        assert (asker.told()[0] == X + sum(sum(content) for content in contents)).all()


# --- no room to compute -----------------------------------------------------------------------------------------------


def test_who_has_no_room_beside_others_is_run_when_nobody_else_is(device: Gated, tmp_path: Path) -> None:
    no_room = [DeviceOutOfMemory("injected"), DeviceOutOfMemory("injected")]
    with engine_on(device, tmp_path, "a", "b", "c") as engine:
        (gate,) = device.holding("a")
        device.errors["b"] = [*no_room]
        first, second, third = (Asker(engine) for _ in range(3))
        first.ask("a")
        assert gate.entered.wait(LATE)
        second.ask("b")
        # Once, once more after something was let go of, and then it waits, and others with it.
        assert [device.ran.get(timeout=LATE) for _ in range(3)] == ["a", "b", "b"]
        while engine._runs.alone is None:
            handled(engine)
        third.ask("c")
        handled(engine)
        assert not second.events
        assert not third.events
        gate.leave.set()
        assert (first.told()[0] == expected("a")).all()
        assert (second.told()[0] == expected("b")).all()
        assert (third.told()[0] == expected("c")).all()
        assert [device.ran.get(timeout=LATE) for _ in range(2)] == ["b", "c"]
        assert engine._shortage.counts.refused == 0


def test_who_has_no_room_alone_is_refused(device: Gated, tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b") as engine:
        (gate,) = device.holding("a")
        # Beside another twice, alone twice: what the other had in memory leaves between them.
        device.errors["b"] = [DeviceOutOfMemory("injected") for _ in range(4)]
        first, second = Asker(engine), Asker(engine)
        first.ask("a")
        assert gate.entered.wait(LATE)
        second.ask("b")
        while engine._runs.alone is None:
            handled(engine)
        gate.leave.set()
        assert "has no room for stage 1 of 1" in second.told().message
        first.told()
        assert engine._shortage.counts.refused == 1
        second.ask("b")
        assert (second.told()[0] == expected("b")).all()


def test_who_waits_to_be_alone_may_leave(device: Gated, tmp_path: Path) -> None:
    with engine_on(device, tmp_path, "a", "b", "c") as engine:
        (gate,) = device.holding("a")
        device.errors["b"] = [DeviceOutOfMemory("injected") for _ in range(2)]
        first, second, third = (Asker(engine) for _ in range(3))
        first.ask("a")
        assert gate.entered.wait(LATE)
        second.ask("b")
        while engine._runs.alone is None:
            handled(engine)
        engine.session_closed(second)
        assert second.gone.wait(LATE)
        gate.leave.set()
        third.ask("c")
        assert (third.told()[0] == expected("c")).all()
        first.told()
        assert second.events == ["released"]


# --- real models ------------------------------------------------------------------------------------------------------


def asked_by_many(running: Running, made: Sequence[Network], seeds: int) -> list[tuple[Network, Any, Any]]:
    """Have a client for each model and seed ask at the same time, and again; return models, inputs and answers."""
    pools = {(each.name, seed): Pool() for each in made for seed in range(seeds)}

    def call(each: Network, seed: int) -> list[tuple[Network, Any, Any]]:
        asked, inputs = client.Model(each.name, pools[each.name, seed]), each.inputs(1, seed)
        return [(each, inputs, asked.call(inputs)) for _ in range(3)]

    with ThreadPoolExecutor(len(pools)) as threads:
        found = [threads.submit(call, each, seed) for each in made for seed in range(seeds)]
        answers = [answer for future in found for answer in future.result(PATIENCE_S)]
    for pool in pools.values():
        pool.close()
    return answers


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_lane_has_its_share_of_the_threads_and_nobody_else_has_less() -> None:
    found: dict[str, int] = {}
    device = open_device("cpu")

    def lane() -> None:
        device.begin_lane(2)
        # Something that uses threads, should they be counted anew then.
        torch.randn(256, 256) @ torch.randn(256, 256)
        found["lane"] = torch.get_num_threads()

    def other() -> None:
        torch.randn(256, 256) @ torch.randn(256, 256)
        found["other"] = torch.get_num_threads()

    for target in (lane, other):
        thread = threading.Thread(target=target)
        thread.start()
        thread.join()
    assert (found["lane"], found["other"], torch.get_num_threads()) == (1, 2, 2)


def test_a_device_whose_weights_move_is_not_divided() -> None:
    device = open_device("cpu")
    device._span_bytes = 1
    with pytest.raises(DeviceFault, match="may be moved while a lane reads them"):
        device.begin_lane(2)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("form", ["packed", "blocked"])
def test_many_clients_get_right_answers_to_the_bit_of_one_thread(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two lanes of one thread each answer as one lane with one thread does, whoever computes beside."""
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    # Whatever is faster on this machine at this moment: one form in both.
    prefer(monkeypatch, form)
    # And nothing by itself, with both threads.
    monkeypatch.setattr(TorchDevice, "is_shared_by_lanes", False)
    made = [network(kind) for kind in ("resnet", "minilm", "densenet")]
    settings: dict[str, Any] = {"batch_limit": 1, "compute_once": False, "stacking": False}
    with serving(tmp_path, monkeypatch, lanes=2, **settings) as running:
        deploy(running, *made)
        answers = asked_by_many(running, made, 3)
        assert lanes_of(running.engine) == (2, 0)
    torch.set_num_threads(1)
    with serving(tmp_path, monkeypatch, source=running.source, **settings) as running:
        deploy(running, *made)
        for each, inputs, given in answers:
            alone = model(each.name).call(inputs)
            assert agrees(given, alone if isinstance(alone, dict) else {next(iter(each.eager(inputs))): alone}, exact=True)
            assert agrees(given, each.eager(inputs), exact=False)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("lanes", [2, 3])
def test_everything_that_is_shared_is_shared_by_lanes_too(lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches, equal inputs, models asked together: right answers with several lanes."""
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    original = network("resnet")
    siblings = [original.tuned(f"sibling-{number}", number) for number in range(3)]
    with serving(tmp_path, monkeypatch, lanes=lanes) as running:
        deploy(running, *siblings)
        for each, inputs, given in asked_by_many(running, siblings, 4):
            assert agrees(given, each.eager(inputs), exact=False)
        names = [each.name for each in siblings]
        inputs = original.inputs(1)
        with counted(running) as counts:
            answers = at_once(running, *((name, inputs) for name in names))
        for each, given in zip(siblings, answers, strict=True):
            assert agrees(given, each.eager(inputs), exact=False)
        # One row for all of them, up to the heads.
        assert counts["stage_requests"] > counts["stage_rows"]


@pytest.mark.usefixtures("two_threads")
def test_rows_of_one_model_are_shared_out_among_lanes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made = network("mlp")
    with serving(tmp_path, monkeypatch, lanes=2) as running:
        deploy(running, made)
        inputs = [made.inputs(1, seed) for seed in range(6)]
        stages = ask(running, "model", name=made.name)["stage_count"]
        with counted(running) as counts:
            answers = at_once(running, *((made.name, each) for each in inputs))
        for given, each in zip(answers, inputs, strict=True):
            assert agrees(given, made.eager(each), exact=False)
        # Two batches of three.
        assert (counts["stages"], counts["stage_rows"]) == (2 * stages, 6 * stages)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("fails", [False, True])
def test_heads_of_one_structure_run_as_one_in_a_lane(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 16 * 1024)
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    monkeypatch.setattr("sidecar.costs.BatchCosts.is_known", lambda *arguments: True)
    made, device = heads(4), open_device("cpu")

    def refuse(*arguments: object) -> Any:
        raise DeviceFault("no room")

    if fails:
        monkeypatch.setattr(device, "run_stacked", refuse)
    with serving(tmp_path, monkeypatch, device, lanes=2) as running:
        deploy(running, *made)
        inputs = made[0].inputs(1)
        with counted(running) as counts:
            answers = at_once(running, *((each.name, inputs) for each in made))
        assert all(agrees(given, each.eager(inputs), exact=False) for each, given in zip(made, answers, strict=True))
        assert (counts["stacked"] > 0) == (not fails)


@pytest.mark.usefixtures("two_threads")
def test_only_the_request_that_has_no_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.costs.BatchCosts.pays", lambda *arguments: True)
    made, device = network("mlp"), Small()
    with serving(tmp_path, monkeypatch, device, lanes=2) as running:
        deploy(running, made)
        device.lacks = is_guilty
        inputs = [made.inputs(1, 0), made.inputs(1, 1), marked(made, 2), made.inputs(1, 3)]
        answers = asked_at_once(running, *((made.name, each) for each in inputs))
        assert type(answers.pop(2)) is DeviceOutOfMemory
        del inputs[2]
        for given, each in zip(answers, inputs, strict=True):
            assert agrees(given, made.eager(each), exact=False)
        assert shortage(running)[2] == 1
    assert GUILTY == 99.0


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("kind", ["resnet", "minilm"])
def test_a_model_larger_than_the_budget_streams_through_one_lane(kind: str, node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    made, small = network(kind), network("mlp")
    (size, _), (smallest, _) = rooms(node, made, small)
    node.resize((smallest + size) // 2)
    running_at_once: list[int] = []
    with node.serve(lanes=2) as running:
        engine, run = running.engine, running.device.run

        def watched(program: Any, weights: Any, inputs: Any) -> Any:
            streaming = [
                each for each in engine._runs.running if made.name in {part.name for call in each.calls for part in call.parts}
            ]
            running_at_once.append(len(streaming))
            return run(program, weights, inputs)

        monkeypatch.setattr(running.device, "run", watched)
        for each, inputs, given in asked_by_many(running, [made, small], 3):
            assert agrees(given, each.eager(inputs), exact=False)
        assert max(running_at_once) == 1
        assert ask(running, "memory")["resident_bytes"] <= node.budget_bytes
        assert ask(running, "status")["streams"]["runs"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_streams_of_a_gpu_give_what_the_original_gives(lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    original = network("resnet")
    made = [network("minilm"), *(original.tuned(f"sibling-{number}", number) for number in range(3))]
    device: TorchDevice = open_device("cuda")
    with serving(tmp_path, monkeypatch, device, lanes=lanes) as running:
        deploy(running, *made)
        for each, inputs, given in asked_by_many(running, made, 4):
            assert agrees(given, each.eager(inputs), exact=False)
