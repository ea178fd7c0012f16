"""Several devices as one: requests go where they are answered soonest, models move, and nothing is lost on the way."""

from __future__ import annotations

import itertools
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import client, model, models
from trunkline.admin import AdminConnection
from trunkline.client import Model
from trunkline.connection import Connection
from trunkline.errors import Draining, InvalidInput, QueueFull, QuotaExceeded, TrunklineError, UnknownModel
from trunkline.pool import Pool
from trunkline.protocol import JOINT

from sidecar import placing
from sidecar.devicememory import DeviceMemory
from sidecar.engine import Engine
from sidecar.placement import REST_S
from sidecar.placing import LOOK_EVERY_S, MOST_JOINT, Placing
from sidecar.tenants import ANYONE, OPEN, Quotas, Tenant, hash_of
from tests.fakes import ADMIN_TOKEN, FakeDevice, FakeSource, Running, bundle_of, running_server
from tests.integration.test_lanes import Gate
from tests.waiting import PATIENCE_S, until

LATE = 30.0
X = np.ones((1, 3), np.float32)


class Device(FakeDevice):
    """A device that counts its runs, and whose runs can be held."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.run_count = 0
        self.gate: Gate | None = None
        self.on_run = self._ran

    def _ran(self) -> None:
        self.run_count += 1
        if self.gate is not None:
            self.gate.pass_through()


class Time:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Two:
    """A sidecar with two devices, whose models are placed when a test says so."""

    def __init__(self, running: Running, one: Device, other: Device, clock: Time) -> None:
        self.running = running
        self.one = one
        self.other = other
        self.clock = clock

    @property
    def placing(self) -> Placing:
        assert self.running.engines is not None
        return self.running.engines._placing

    def command(self, command: str, **arguments: object) -> Any:
        return AdminConnection(self.running.path, ADMIN_TOKEN).command(command, arguments)

    def where(self, name: str) -> list[str]:
        return sorted(self.placing.table[name])

    def look(self, seconds: float = LOOK_EVERY_S) -> None:
        """Have what was asked looked at, as after so long, and wait until that is done."""
        self.clock.now += seconds
        for _ in range(2):
            # The first has engines tell what the second goes by.
            self.placing._inbox.put(self.placing._look)
            self.command("memory")
            self.command("placement")

    def rest(self) -> None:
        """Let so much time pass that models may be moved again."""
        self.look(REST_S)

    def start_on(self, name: str, device: str) -> None:
        """Have a model be asked on one device, from where it may go anywhere."""
        for allowed in ([device], []):
            self.command("place", name=name, allow=allowed)

    def until_on(self, name: str, *devices: str) -> None:
        """Wait until a model is asked on just these devices."""
        until(lambda: self.where(name) == sorted(devices))

    def asks(self, name: str, rate: float, under_way: float, **seconds: float) -> None:
        """Have it seem as if so much was asked of a model, and its requests took so long on each device."""
        made = Demand(rate, under_way)
        self.placing._inbox.put(lambda: self.placing._demands.__setitem__(name, made))
        for device, each in seconds.items():
            self.placing._engines[device]._request_costs._measured[name] = each, time.monotonic()


class Demand(placing._Demand):
    """What is asked always."""

    def __init__(self, rate: float, under_way: float) -> None:
        super().__init__()
        self._rate.value = self._rate.latest = rate
        self._under_way.value = under_way

    def note(self, count: int, under_way: int, seconds: float) -> None:
        pass


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def two(tmp_path: Path, source: FakeSource, clock: Time, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    # Looks are the test's: none comes of itself.
    monkeypatch.setattr(Placing, "_pause_s", lambda self: 3600.0)
    one, other = Device("one"), Device("other")
    source.put(bundle_of("other", [b"other"]), [b"other"])
    with running_server(tmp_path, source, device=one, beside=[other], placing_clock=clock) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        yield Two(made, one, other, clock)
        for device in (one, other):
            if device.gate is not None:
                device.gate.leave.set()
        client._pool.close()


def check(name: str) -> None:
    """Ask a model of one input and one output, and compare the answer: x and the sum of its weights' bytes."""
    contents = b"t" * 100 + name.encode() if name in ("age", "gender") else name.encode()
    assert model(name)(X).tolist() == [[1 + sum(contents)] * 3]


def test_models_are_placed_at_the_start_and_asked_there(two: Two) -> None:
    for name in ("age", "gender", "other"):
        runs = {"one": two.one.run_count, "other": two.other.run_count}
        check(name)
        (where,) = two.where(name)
        moved = {"one": two.one.run_count - runs["one"], "other": two.other.run_count - runs["other"]}
        assert moved[where] > 0
        assert moved[{"one": "other", "other": "one"}[where]] == 0


def test_a_slower_device_is_left_for_a_faster_one(two: Two) -> None:
    two.start_on("age", "one")
    assert two.where("age") == ["one"]
    two.asks("age", 20.0, 1.0, one=0.04, other=0.004)
    two.rest()
    two.until_on("age", "other")
    runs = two.one.run_count
    check("age")
    assert two.one.run_count == runs


def test_a_model_that_one_device_cannot_keep_up_with_is_asked_on_both(two: Two) -> None:
    two.start_on("age", "one")
    two.asks("age", 500.0, 12.0, one=0.01, other=0.01)
    two.rest()
    two.until_on("age", "one", "other")
    # While one is held, the other answers.
    two.one.gate, two.other.gate = Gate(), None
    with ThreadPoolExecutor(2) as threads:
        asked = [threads.submit(check, "age") for _ in range(2)]
        assert two.one.gate.entered.wait(LATE)
        until(lambda: sum(each.done() for each in asked) == 1)
        two.one.gate.leave.set()
        for each in asked:
            each.result(LATE)


def test_requests_under_way_are_answered_where_they_are_while_their_model_moves(two: Two) -> None:
    two.command("place", name="age", allow=["one"])
    two.one.gate = Gate()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(check, "age")
        assert two.one.gate.entered.wait(LATE)
        assert two.command("place", name="age", allow=["other"])["devices"] == ["other"]
        check("age")
        assert not asked.done()
        two.one.gate.leave.set()
        asked.result(LATE)


def test_nothing_is_lost_while_models_move_to_and_fro(two: Two) -> None:
    stop = threading.Event()
    counts: dict[str, int] = {}

    def keep_asking(name: str) -> None:
        while not stop.is_set():
            check(name)
            counts[name] = counts.get(name, 0) + 1

    with ThreadPoolExecutor(4) as threads:
        asked = [threads.submit(keep_asking, name) for name in ("age", "age", "gender", "other")]
        try:
            for name, device in itertools.islice(itertools.product(("age", "gender", "other") * 10, ("one", "other")), 60):
                assert two.command("place", name=name, allow=[device])["devices"] == [device]
        finally:
            stop.set()
        for each in asked:
            each.result(LATE)
    assert set(counts) == {"age", "gender", "other"}
    found = two.command("status")["requests"]
    assert found["failed"] == 0
    assert found["answered"] == sum(counts.values())
    placed = two.command("placement")
    assert [each["under_way"] for each in placed["devices"].values()] == [0, 0]


def test_a_model_that_cannot_be_loaded_elsewhere_stays(two: Two, source: FakeSource, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.engine")
    two.start_on("age", "one")
    check("age")
    two.other.capacity_bytes = 0
    two.asks("age", 20.0, 1.0, one=0.04, other=0.004)
    two.rest()
    until(lambda: "could not be loaded on other" in caplog.text)
    two.look()
    assert two.where("age") == ["one"]
    check("age")
    # It rests before that is tried again.
    caplog.clear()
    two.look()
    assert "could not be loaded" not in caplog.text


def test_a_model_that_may_be_nowhere_else_is_asked_where_it_cannot_be_loaded(two: Two) -> None:
    two.command("place", name="age", allow=["one"])
    two.other.capacity_bytes = 0
    assert two.command("place", name="age", allow=["other"])["devices"] == ["other"]
    with pytest.raises(TrunklineError, match="out of memory"):
        model("age")(X)
    two.other.capacity_bytes = 1 << 40
    check("age")


def test_models_asked_together_are_asked_on_one_device(two: Two) -> None:
    for _ in range(3):
        found = models("age", "gender")(X)
        assert {name: each.tolist() for name, each in found.items()} == {
            name: [[1 + sum(b"t" * 100 + name.encode())] * 3] for name in ("age", "gender")
        }
    two.look()
    (together,) = [name for name in two.placing.table if "age" in name and "gender" in name]
    assert len(two.where(together)) == 1
    models("age", "gender")(X)
    # Nobody asks for it any more.
    for _ in range(60):
        two.look()
    assert together not in two.placing.table


def test_a_pinned_model_is_not_taken_from_where_it_is(two: Two) -> None:
    (pinned_on,) = two.where("age")
    two.command("pin", name="age")
    for asked in ({"forbid": [pinned_on]}, {"allow": [each for each in ("one", "other") if each != pinned_on]}):
        with pytest.raises(InvalidInput, match=f"age is pinned on {pinned_on}; unpin it first"):
            two.command("place", name="age", **asked)
    assert two.command("place", name="age", allow=[pinned_on])["devices"] == [pinned_on]
    two.command("unpin", name="age")
    assert pinned_on not in two.command("place", name="age", allow=[], forbid=[pinned_on])["devices"]


def test_models_that_may_not_be_together_cannot_be_asked_together(two: Two) -> None:
    two.command("place", name="age", allow=["one"])
    two.command("place", name="gender", forbid=["one"])
    with pytest.raises(InvalidInput, match="age, gender may not be on one device"):
        models("age", "gender")(X)
    check("age")
    check("gender")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "age", "allow": ["third"]}, "there is no device 'third' here; the devices are one, other"),
        ({"name": "age", "allow": "one"}, "allow is 'one'; it must be a list of names of devices"),
        ({"name": "age", "forbid": ["one", "other"]}, "that leaves none of the devices one, other"),
        ({"name": "age"}, "allow and forbid: one of them, or both"),
        ({"name": "age", "only": ["one"]}, "allow and forbid: one of them, or both"),
    ],
)
def test_a_constraint_that_makes_no_sense_is_refused(two: Two, arguments: dict[str, object], message: str) -> None:
    before = two.where("age")
    with pytest.raises(InvalidInput, match=message):
        two.command("place", **arguments)
    assert two.where("age") == before
    assert (
        two.command("placement")["models"][0] | {"name": "age", "allow": [], "forbid": []}
        == two.command("placement")["models"][0]
    )


def test_nobody_can_be_placed_who_is_not_there(two: Two) -> None:
    with pytest.raises(UnknownModel):
        two.command("place", name="nobody", allow=["one"])


def test_constraints_outlive_the_engines(tmp_path: Path, source: FakeSource, clock: Time) -> None:
    for device in ("one", "other"):
        with running_server(tmp_path, source, device=Device("one"), beside=[Device("other")], placing_clock=clock) as made:
            AdminConnection(made.path, ADMIN_TOKEN).command("place", {"name": "age", "allow": [device]})
        with running_server(tmp_path, source, device=Device("one"), beside=[Device("other")], placing_clock=clock) as made:
            assert made.engines is not None
            assert made.engines._placing.table["age"] == {device}


def test_a_pinned_model_stays(two: Two) -> None:
    two.start_on("age", "one")
    assert two.command("pin", name="age")["pinned"]
    two.asks("age", 20.0, 1.0, one=0.04, other=0.004)
    two.rest()
    two.look()
    assert two.where("age") == ["one"]
    assert not two.command("unpin", name="age")["pinned"]
    two.asks("age", 20.0, 1.0, one=0.04, other=0.004)
    two.rest()
    two.until_on("age", "other")


def test_models_are_described_once_for_all_devices(two: Two) -> None:
    two.command("place", name="age", allow=["one"])
    check("age")
    two.command("place", name="age", allow=["other"])
    check("age")
    status = two.command("status")
    assert status["engine"]["device"] == "one, other"
    (age,) = [each for each in status["models"] if each["name"] == "age"]
    assert age["state"] == "resident"
    assert age["resident_on"] == ["one", "other"]
    assert age["requests"] == 2
    assert status["memory"]["budget_bytes"] == 2 << 20
    assert status["memory"]["resident_bytes"] == sum(each["memory"]["resident_bytes"] for each in status["devices"].values())
    # Those of the test before may still be ending.
    until(lambda: two.command("status")["sessions"] == 2)
    assert two.command("memory")["devices"].keys() == {"one", "other"}
    assert [each["name"] for each in two.command("models")["models"]] == [each["name"] for each in status["models"]]
    assert two.command("model", name="age")["resident_on"] == ["one", "other"]
    assert two.command("evict", name="age")["freed_bytes"] == 2 * 103
    assert two.command("model", name="age")["resident_on"] == []


def test_what_waits_is_added_up(two: Two) -> None:
    two.command("place", name="age", allow=["one"])
    two.command("place", name="gender", allow=["other"])
    check("age")
    check("gender")
    found = two.command("queues")
    device_s = [each["tenants"]["anyone"]["device_s"] for each in found["devices"].values()]
    assert all(device_s)
    assert found["tenants"]["anyone"]["device_s"] == pytest.approx(sum(device_s), abs=1e-5)


@pytest.mark.parametrize("command", ["blocks", "graph", "trace"])
def test_what_one_device_has_is_told_by_that_device(two: Two, command: str) -> None:
    assert two.command(command) == two.command(command, device="one")
    assert two.command(command, device="other")
    with pytest.raises(InvalidInput, match="no device 'third' here: one, other"):
        two.command(command, device="third")


def test_a_new_version_serves_on_every_device(two: Two, source: FakeSource) -> None:
    two.command("place", name="age", allow=["one"])
    check("age")
    source.put(bundle_of("age", [b"new"], version="2"), [b"new"])
    assert two.command("model_changed", name="age")["version"] == "2"
    for device in ("one", "other"):
        two.command("place", name="age", allow=[device])
        assert model("age")(X).tolist() == [[1 + sum(b"new")] * 3]
    del source.bundles["age"]
    two.command("model_removed", name="age")
    with pytest.raises(UnknownModel):
        model("age")(X)
    two.look()
    assert "age" not in two.placing.table


def test_a_new_model_is_placed(two: Two, source: FakeSource) -> None:
    source.put(bundle_of("late", [b"late"]), [b"late"])
    two.command("model_changed", name="late")
    assert "late" not in two.placing.table
    check("late")
    two.look()
    assert len(two.where("late")) == 1
    check("late")


def test_an_unknown_command_is_refused(two: Two) -> None:
    with pytest.raises(InvalidInput, match="there is no command"):
        two.command("dance")


def test_with_one_device_there_is_nothing_to_place(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as made:
        admin = AdminConnection(made.path, ADMIN_TOKEN)
        with pytest.raises(InvalidInput, match="one device, fake; start it with --device"):
            admin.command("place", {"name": "age", "allow": ["fake"]})
        with pytest.raises(InvalidInput, match="one device, fake; start it with --device"):
            admin.command("placement")


def test_what_a_connection_has_anywhere_ends_with_it(two: Two) -> None:
    two.command("place", name="age", allow=["other"])
    two.other.gate = Gate()
    engines = two.running.engines
    assert engines is not None
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(lambda: model("age").call({"x": X}, deadline_s=0.2))
        assert two.other.gate.entered.wait(PATIENCE_S)
        # Its function does not wait any longer, and ends the connection that is of no more use.
        with pytest.raises(TrunklineError):
            asked.result(LATE)
    until(lambda: not engines._relays)
    assert two.running.server._ending
    two.other.gate.leave.set()
    until(lambda: not two.running.server._ending)
    assert [each.under_way for each in engines._tallies.values()] == [0, 0]


def test_a_bug_in_placing_ends_nothing(two: Two, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise RuntimeError("a bug")

    two.placing._inbox.put(fail)
    two.look()
    check("age")
    assert "models could not be placed" in caplog.text


def test_an_engine_that_is_busy_holds_up_no_look(two: Two) -> None:
    two.command("place", name="age", allow=["one"])
    two.one.gate = Gate()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(check, "age")
        assert two.one.gate.entered.wait(LATE)
        for device in ("other", "one"):
            two.placing._inbox.put(two.placing._look)
            if device == "other":
                assert two.command("place", name="gender", allow=[device])["devices"] == [device]
        two.one.gate.leave.set()
        asked.result(LATE)


def test_a_tenant_is_told_to_wait_only_when_no_device_has_room(tmp_path: Path, source: FakeSource) -> None:
    one, other = Device("one"), Device("other")
    with running_server(tmp_path, source, device=one, beside=[other], queue_limit=1) as made:
        engines = made.engines
        assert engines is not None
        full = QueueFull("full")

        def refuse(*arguments: object) -> None:
            raise full

        each_engine = [engine._queue for engine in engines._engines.values()]
        each_engine[0].check_room = refuse  # type: ignore[method-assign]
        engines.check_room(ANYONE)
        each_engine[1].check_room = refuse  # type: ignore[method-assign]
        with pytest.raises(QueueFull):
            engines.check_room(ANYONE)
        assert made.engine._turned_away == 1


def test_caps_on_what_is_under_way_hold_for_all_devices_together(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    quotas = Quotas({"anyone": replace(ANYONE, in_flight_limit=2)})
    one, other = Device("one"), Device("other")
    with running_server(tmp_path, source, device=one, beside=[other], quotas=quotas) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        admin = AdminConnection(made.path, ADMIN_TOKEN)
        for name, device in (("age", "one"), ("gender", "other")):
            admin.command("place", {"name": name, "allow": [device]})
        one.gate, other.gate = Gate(), Gate()
        pools = [Pool() for _ in range(3)]
        with ThreadPoolExecutor(3) as threads:
            asked = [threads.submit(Model(name, pool), X) for name, pool in zip(("age", "gender"), pools, strict=False)]
            assert one.gate.entered.wait(LATE)
            assert other.gate.entered.wait(LATE)
            for name in ("age", "gender"):
                with pytest.raises(QuotaExceeded, match="2 requests of anyone are under way, its quota is 2"):
                    Model(name, pools[2])(X)
            one.gate.leave.set()
            other.gate.leave.set()
            for each in asked:
                each.result(LATE)
            Model("age", pools[2])(X)
        for pool in pools:
            pool.close()


def test_models_are_asked_where_they_were_before_a_restart(tmp_path: Path, source: FakeSource, clock: Time) -> None:
    for device in ("other", "one"):
        with running_server(tmp_path, source, device=Device("one"), beside=[Device("other")], placing_clock=clock) as made:
            admin = AdminConnection(made.path, ADMIN_TOKEN)
            for limits in ([device], []):
                admin.command("place", {"name": "age", "allow": limits})
        with running_server(tmp_path, source, device=Device("one"), beside=[Device("other")], placing_clock=clock) as made:
            assert made.engines is not None
            assert made.engines._placing.table["age"] == {device}


def test_a_change_of_quotas_is_over_when_it_is_on_all_devices(two: Two) -> None:
    engines = two.running.engines
    assert engines is not None
    two.command("place", name="age", allow=["one"])
    two.one.gate = Gate()
    done = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(check, "age")
        assert two.one.gate.entered.wait(LATE)
        engines.use_quotas(OPEN, done.set)
        # The other device has done this after that.
        two.command("place", name="gender", allow=["other"])
        assert not done.is_set()
        two.one.gate.leave.set()
        asked.result(LATE)
    assert done.wait(LATE)


def test_while_one_device_drains_the_other_still_says_so(two: Two) -> None:
    two.command("place", name="age", allow=["one"])
    two.command("place", name="gender", allow=["other"])
    two.one.gate = Gate()
    engines = two.running.engines
    assert engines is not None
    stopped = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(check, "age")
        assert two.one.gate.entered.wait(LATE)
        pool = Pool()
        Model("gender", pool)(X)
        engines.drain(stopped.set)
        # Told twice, as by a service manager and by the supervisor.
        engines.drain(stopped.set)
        with pytest.raises(Draining):
            Model("gender", pool).call({"x": X}, deadline_s=LATE)
        assert not stopped.is_set()
        two.one.gate.leave.set()
        asked.result(LATE)
        pool.close()
    assert stopped.wait(LATE)
    two.running.server.stop()


def test_models_that_were_parted_are_not_asked_together_any_more(two: Two) -> None:
    models("age", "gender")(X)
    two.look()
    assert any(JOINT in name for name in two.placing.table)
    two.command("place", name="age", allow=["one"])
    two.command("place", name="gender", allow=["other"])
    with pytest.raises(InvalidInput, match="may not be on one device"):
        models("age", "gender")(X)


def test_a_model_that_is_pushed_again_is_asked_as_much_as_it_is(two: Two, source: FakeSource) -> None:
    for _ in range(50):
        check("age")
    for _ in range(30):
        two.look()
    bundle = source.bundles.pop("age")
    two.command("model_removed", name="age")
    two.look()
    source.bundles["age"] = bundle
    two.command("model_changed", name="age")
    two.look()
    (age,) = [each for each in two.command("placement")["models"] if each["name"] == "age"]
    assert age["rate"] < 0.01


def test_there_is_room_again_for_what_is_asked_together_when_others_rest(two: Two) -> None:
    engines = two.running.engines
    assert engines is not None
    for tally in engines._tallies.values():
        for number in range(2 * MOST_JOINT):
            # Somebody asks others together each time.
            tally.end(tally.begin(f"age{JOINT}b{number}"))
    models("age", "gender")(X)
    two.look()
    assert f"age{JOINT}gender" not in two.placing.table
    for _ in range(40):
        two.look()
    models("age", "gender")(X)
    two.look()
    assert f"age{JOINT}gender" in two.placing.table
    assert [each.under_way for each in engines._tallies.values()] == [0, 0]


def test_what_left_memory_on_one_device_only_is_told(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(tmp_path, source, device=Device("one"), beside=[Device("other")], budget_bytes=107) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        admin = AdminConnection(made.path, ADMIN_TOKEN)
        for name in ("age", "gender"):
            admin.command("place", {"name": name, "allow": ["one"]})
        for name in ("age", "gender", "age"):
            check(name)
        ages = [each["residency"]["lru_age_s"] for each in admin.command("memory", {})["devices"].values()]
        assert admin.command("status", {})["memory"]["residency"]["lru_age_s"] == pytest.approx(ages[0], abs=10)
        assert ages[1] is None
        client._pool.close()


def test_a_model_that_is_not_deployed_yet_can_be_placed(
    tmp_path: Path, source: FakeSource, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As after a crash: there are weights in memory, and models are deployed when they are asked for.
    monkeypatch.setattr(DeviceMemory, "kept", lambda self: ["f" * 64])
    monkeypatch.setattr(Engine, "_can_complete", lambda self: False)
    monkeypatch.setattr(Placing, "_pause_s", lambda self: 3600.0)
    one, other = Device("one"), Device("other")
    with running_server(tmp_path, source, device=one, beside=[other], placing_clock=clock) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        two = Two(made, one, other, clock)
        assert two.command("place", name="gender", allow=["other"])["devices"] == ["other"]
        check("gender")
        assert (one.run_count, other.run_count > 0) == (0, True)
        # That it is asked is known, though it is deployed on this device alone.
        for _ in range(3):
            two.clock.now += LOOK_EVERY_S
            two.placing._inbox.put(two.placing._look)
            two.command("placement")
            check("gender")
        until(lambda: "gender" in two.placing._costs["other"])
        assert "gender" not in two.placing._costs["one"]
        two.placing._inbox.put(two.placing._look)
        until(lambda: "gender" in two.placing._profiles and two.placing._profiles["gender"].rate > 0)
        client._pool.close()


def test_a_move_is_nobodys_request(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    quotas = Quotas({"anyone": replace(ANYONE, in_flight_limit=1)})
    with running_server(tmp_path, source, device=Device("one"), beside=[Device("other")], quotas=quotas) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        admin = AdminConnection(made.path, ADMIN_TOKEN)
        for name in ("age", "gender"):
            admin.command("place", {"name": name, "allow": ["one"]})
        check("age")
        reading, go_on = threading.Event(), threading.Event()

        def wait(digest: str) -> None:
            reading.set()
            assert go_on.wait(LATE)

        source.before_read = wait
        with ThreadPoolExecutor(1) as threads:
            placed = threads.submit(admin.command, "place", {"name": "gender", "allow": ["other"]})
            assert reading.wait(LATE)
            check("age")
            go_on.set()
            placed.result(LATE)
        client._pool.close()


def test_a_tenant_that_was_let_in_need_not_wait_for_its_turn(
    tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "constraints.json").write_text(json.dumps({"gender@t": {"allow": ["other"]}}))
    other = Device("other")
    token = b"t" * 32
    quotas = Quotas({"anyone": ANYONE, "t": Tenant(name="t", domain="t", token_hashes=(hash_of(token),), models=("*",))})
    with running_server(tmp_path, source, device=Device("one"), beside=[other]) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        AdminConnection(made.path, ADMIN_TOKEN).command("place", {"name": "age", "allow": ["other"]})
        other.gate = Gate()
        pool = Pool(lambda path, **options: Connection(path, **{**options, "token": token}))
        with ThreadPoolExecutor(2) as threads:
            asked = threads.submit(check, "age")
            assert other.gate.entered.wait(LATE)
            made.server.use_quotas(quotas)
            until(lambda: "gender@t" in made.engine.names())
            found = threads.submit(Model("gender", pool), X)
            assert made.engines is not None
            tally = made.engines._tallies["other"]
            until(lambda: tally.under_way == 2)
            other.gate.leave.set()
            asked.result(LATE)
            assert found.result(LATE).shape == (1, 3)
        pool.close()
        client._pool.close()
