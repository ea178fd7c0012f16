"""Priority and keep-alive: who leaves memory first, who leaves by itself, and what outlives restarts and pushes."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import client, model
from trunkline.admin import AdminConnection
from trunkline.errors import InvalidInput, ModelCorrupt, UnknownModel

from sidecar.keeping import Keep
from sidecar.pins import Pins
from tests.fakes import ADMIN_TOKEN, FakeDevice, FakeSource, Running, bundle_of, running_server
from tests.forms import prefer
from tests.integration.test_sharing import deploy, serving
from tests.networks import network
from tests.waiting import PATIENCE_S

X = np.ones((1, 3), np.float32)


class Clock:
    """Stands still until it is set. Deadlines of callers, which are the real clock's, are far ahead of it."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def source() -> FakeSource:
    """Three models of 100 bytes, `a` and `b` with 60 of them in common."""
    made = FakeSource()
    for name, contents in {"a": [b"t" * 60, b"a" * 40], "b": [b"t" * 60, b"b" * 40], "c": [b"c" * 100]}.items():
        made.put(bundle_of(name, contents), contents)
    return made


@pytest.fixture(autouse=True)
def sessions_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    yield
    client._pool.close()


def ask(running: Running, command: str, **arguments: object) -> Any:
    connection = AdminConnection(running.path, ADMIN_TOKEN)
    try:
        return connection.command(command, arguments)
    finally:
        connection.close()


def call(running: Running, *names: str) -> None:
    for name in names:
        assert model(name)(X) is not None
    # An answer is sent before its lease is given back; what asks now is heard after that.
    ask(running, "status")


def states(running: Running) -> dict[str, str]:
    # Whatever has been due until now is done before this is answered.
    ask(running, "status")
    return {entry["name"]: entry["state"] for entry in ask(running, "models")["models"]}


def kept(running: Running, name: str) -> tuple[int, float | None]:
    found = ask(running, "model", name=name)
    return found["priority"], found["keep_alive_s"]


def test_of_two_models_the_one_of_lower_priority_leaves(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source, budget_bytes=240) as running:
        for name, priority in (("a", 6), ("c", 4)):
            assert ask(running, "keep", name=name, priority=priority)["priority"] == priority
        call(running, "a", "c", "b")
        assert states(running) == {"a": "resident", "b": "resident", "c": "resident"}
    with running_server(tmp_path, source, budget_bytes=200) as running:
        call(running, "a", "c", "b")
        assert states(running) == {"a": "resident", "b": "resident", "c": "stored"}, "the older one stayed"
        ask(running, "keep", name="a", priority=0)
        ask(running, "keep", name="b", priority=0)
        call(running, "c", "b")
        ask(running, "keep", name="c", priority=9)
        call(running, "a")
        assert states(running) == {"a": "resident", "b": "stored", "c": "resident"}
        assert ask(running, "memory")["residency"]["evictions"]["ttl"] == 0


def test_what_is_idle_for_too_long_leaves_memory(tmp_path: Path, source: FakeSource, clock: Clock) -> None:
    with running_server(tmp_path, source, clock=clock) as running:
        assert kept(running, "a") == (5, None)
        assert ask(running, "keep", name="a", keep_alive_s=10)["keep_alive_s"] == 10.0
        assert ask(running, "keep", name="c", keep_alive_s=20)["priority"] == 5
        call(running, "a", "c")
        clock.now_s = 9.0
        assert states(running) == {"a": "resident", "b": "stored", "c": "resident"}
        call(running, "a")
        clock.now_s = 18.5
        assert states(running)["a"] == "resident", "a request is what keeps it"
        clock.now_s = 19.0
        assert states(running) == {"a": "stored", "b": "stored", "c": "resident"}
        assert running.device.allocated_bytes == 100
        clock.now_s = 20.0
        assert states(running)["c"] == "stored"
        assert running.device.allocated_bytes == 0
        found = ask(running, "memory")["residency"]
        assert (found["evictions"]["ttl"], found["evicted_bytes"]["ttl"]) == (3, 200)
        assert found["evicted_bytes"]["room"] == 0
        call(running, "a", "c")
        assert running.device.allocated_bytes == 200, "they are loaded as ever"


def test_what_others_need_stays_when_a_model_leaves(tmp_path: Path, source: FakeSource, clock: Clock) -> None:
    with running_server(tmp_path, source, clock=clock) as running:
        call(running, "a", "b")
        ask(running, "keep", name="a", keep_alive_s=0)
        assert states(running) == {"a": "stored", "b": "resident", "c": "stored"}
        assert running.device.allocated_bytes == 100
        call(running, "b", "a", "b")
        assert states(running)["a"] == "stored", "with its last answer"
        assert running.device.allocated_bytes == 100


def test_a_pinned_model_does_not_leave_for_being_idle(tmp_path: Path, source: FakeSource, clock: Clock) -> None:
    with running_server(tmp_path, source, clock=clock) as running:
        ask(running, "keep", name="a", keep_alive_s=1)
        ask(running, "pin", name="a")
        assert states(running)["a"] == "resident"
        clock.now_s = 10.0
        assert states(running)["a"] == "resident"
        ask(running, "unpin", name="a")
        assert states(running)["a"] == "stored"


def test_a_request_under_way_is_not_idle(tmp_path: Path, source: FakeSource, clock: Clock) -> None:
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        entered.set()
        assert leave.wait(PATIENCE_S)

    with running_server(tmp_path, source, clock=clock) as running:
        ask(running, "keep", name="a", keep_alive_s=1)
        running.device.on_run = hold
        caller = threading.Thread(target=call, args=(running, "a"))
        caller.start()
        assert entered.wait(PATIENCE_S)
        clock.now_s = 5.0
        leave.set()
        caller.join(PATIENCE_S)
        assert states(running)["a"] == "resident", "its time begins with the answer"
        clock.now_s = 6.0
        assert states(running)["a"] == "stored"


def test_the_engine_wakes_by_itself(tmp_path: Path, source: FakeSource) -> None:
    emptied = threading.Event()

    class Watched(FakeDevice):
        """Sets ``emptied`` when it has no weight left."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "allocated_bytes" and value == 0:
                emptied.set()

    with running_server(tmp_path, source, device=Watched()) as running:
        ask(running, "keep", name="c", keep_alive_s=0.01)
        emptied.clear()
        call(running, "c")
        assert emptied.wait(PATIENCE_S)


class Inbox(queue.SimpleQueue[Any]):
    """Notes for how long whoever looks into it would wait, and how much was put in."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.put_count = 0
        self.asleep = threading.Event()

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        self.put_count += 1
        super().put(item)

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if block:
            self.waits.append(math.inf if timeout is None else timeout)
            if timeout is not None and timeout > 1:
                self.asleep.set()
        return super().get(block, timeout)


def test_the_engine_sleeps_until_something_is_due(
    tmp_path: Path, source: FakeSource, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.engine._IDLE_S", 0.01)
    with contextlib.ExitStack() as stack:
        with monkeypatch.context() as patched:
            patched.setattr("sidecar.engine.queue.SimpleQueue", Inbox)
            running = stack.enter_context(running_server(tmp_path, source, clock=clock))
        inbox = running.engine._inbox
        assert isinstance(inbox, Inbox)
        call(running, "c")
        ask(running, "keep", name="a", keep_alive_s=50)
        ask(running, "keep", name="b", keep_alive_s=90)
        assert {*inbox.waits} <= {0.01, math.inf}, "nothing of either is in memory"
        call(running, "b", "a")
        assert inbox.asleep.wait(20)
        clock.now_s = 30.0
        inbox.asleep.clear()
        ask(running, "status")
        assert inbox.asleep.wait(20)
        assert {wait for wait in inbox.waits if 1 < wait < math.inf} == {50.0, 20.0}
        client._pool.close()
    # Once for what comes, and once more when nothing has come for a while; the first of all without anything.
    assert len(inbox.waits) <= 2 * inbox.put_count + 2


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_how_a_model_is_kept_outlives_the_engine(tmp_path: Path, source: FakeSource, clock: Clock) -> None:
    with running_server(tmp_path, source) as running:
        ask(running, "keep", name="a", priority=8, keep_alive_s=10)
        ask(running, "pin", name="b")
        ask(running, "keep", name="b", priority=1)
        client._pool.close()
    with running_server(tmp_path, source, clock=clock) as running:
        assert [kept(running, name) for name in "abc"] == [(8, 10.0), (1, None), (5, None)]
        assert ask(running, "model", name="b")["pinned"]
        call(running, "a")
        clock.now_s = 10.0
        assert states(running)["a"] == "stored"


def test_how_a_model_is_kept_outlives_its_versions(tmp_path: Path, source: FakeSource, clock: Clock) -> None:
    with running_server(tmp_path, source, clock=clock) as running:
        ask(running, "keep", name="c", priority=8, keep_alive_s=10)
        first = source.bundles["c"]
        source.put(bundle_of("c", [b"n" * 80], version="2"), [b"n" * 80])
        found = ask(running, "model_changed", name="c")
        assert (found["version"], found["priority"], found["keep_alive_s"]) == ("2", 8, 10.0)
        call(running, "c")
        clock.now_s = 10.0
        assert states(running)["c"] == "stored"
        # Broken for a while, and whole again.
        del source.bundles["c"]
        source.broken["c"] = ModelCorrupt("altered")
        with pytest.raises(ModelCorrupt):
            ask(running, "model_changed", name="c")
        del source.broken["c"]
        source.bundles["c"] = first
        ask(running, "model_changed", name="c")
        assert kept(running, "c") == (8, 10.0)


def test_a_version_that_comes_back_is_kept_as_was_said_meanwhile(tmp_path: Path, source: FakeSource) -> None:
    reading, leave = threading.Event(), threading.Event()

    def hold(digest: str) -> None:
        reading.set()
        assert leave.wait(PATIENCE_S)

    with running_server(tmp_path, source) as running:
        source.before_read = hold
        caller = threading.Thread(target=call, args=(running, "c"))
        caller.start()
        assert reading.wait(PATIENCE_S)
        first = source.bundles["c"]
        source.put(bundle_of("c", [b"n" * 80], version="2"), [b"n" * 80])
        ask(running, "model_changed", name="c")
        ask(running, "keep", name="c", priority=8, keep_alive_s=10)
        source.bundles["c"] = first
        assert ask(running, "model_changed", name="c")["leases"] > 0, "the request goes on with what it began with"
        assert kept(running, "c") == (8, 10.0)
        leave.set()
        caller.join(PATIENCE_S)


def test_how_a_model_is_kept_outlives_its_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    prefer(monkeypatch, "blocked", "packed")
    made = network("minilm")
    Pins(tmp_path / "pins.json").keep(made.name, Keep(8, 3600.0))
    with serving(tmp_path, monkeypatch) as running:
        deploy(running, made)
        assert ask(running, "model", name=made.name)["packed_stage_count"] > 0
        assert kept(running, made.name) == (8, 3600.0)


def test_how_a_model_is_kept_is_forgotten_with_it(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as running:
        ask(running, "keep", name="c", priority=8, keep_alive_s=10)
        bundle = source.bundles.pop("c")
        ask(running, "model_removed", name="c")
        assert Pins(tmp_path / "pins.json").kept("c") == Keep()
        source.bundles["c"] = bundle
        ask(running, "model_changed", name="c")
        assert kept(running, "c") == (5, None)


def test_what_is_refused_changes_nothing(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as running:
        ask(running, "keep", name="a", priority=8)
        for bad in ({}, {"priority": 10}, {"priority": 1, "keep_alive_s": -1}, {"keep_alive_s": math.nan}, {"colour": 1}):
            with pytest.raises(InvalidInput):
                ask(running, "keep", name="a", **bad)
        with pytest.raises(UnknownModel):
            ask(running, "keep", name="nobody", priority=1)
        assert kept(running, "a") == (8, None)
        assert Pins(tmp_path / "pins.json").kept("a") == Keep(8)
