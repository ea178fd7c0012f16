"""What operators ask of a running node: who is connected, what is leased, what would leave; to make room, and to drain it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import flask.testing
import numpy as np
import pytest
from trunkline import client, model
from trunkline.admin import AdminConnection
from trunkline.client import Model
from trunkline.connection import Connection
from trunkline.endpoint import Endpoint
from trunkline.errors import Draining, InvalidInput
from trunkline.pool import Pool

from sidecar import loglevels
from sidecar.http import admin
from sidecar.http.admin import create_app
from sidecar.store import Store
from sidecar.tenants import Quotas, Tenant, hash_of
from tests.fakes import ADMIN_TOKEN, FakeDevice, FakeSource, Running, running_server
from tests.integration.test_lanes import Gate
from tests.waiting import until

LATE = 30.0
X = np.ones((1, 3), np.float32)
# Of both together: their trunk of 100 bytes is there once.
AGE, GENDER = 103, 106


class Serving:
    """A sidecar, and the admin endpoint before it."""

    def __init__(self, running: Running, store: Store) -> None:
        self.running = running
        self.connection = AdminConnection(running.path, ADMIN_TOKEN)
        self.http: flask.testing.FlaskClient = create_app(self.connection, store).test_client()

    def get(self, path: str) -> Any:
        return self._told(self.http.get(f"/admin/v1/{path}"))

    def post(self, path: str, **body: object) -> Any:
        return self._told(self.http.post(f"/admin/v1/{path}", json=body))

    def put(self, path: str, **body: object) -> Any:
        return self._told(self.http.put(f"/admin/v1/{path}", json=body))

    def _told(self, answer: Any) -> Any:
        assert answer.status_code == 200, answer.text
        return answer.json

    def ask_held(self, threads: ThreadPoolExecutor, name: str) -> tuple[Any, Gate]:
        """Ask a model, and return while its weights are being read: it is leased, and waits for them."""
        gate = Gate()
        self.running.source.before_read = lambda digest: gate.pass_through()
        asked = threads.submit(lambda: model(name)(X).tolist())
        assert gate.entered.wait(LATE)
        # They may have been ordered before the request came, when its function named the model.
        until(lambda: any(each["in_flight"] and not each["administrator"] for each in self.get("sessions")["sessions"]))
        return asked, gate


Serve = Callable[..., Serving]


@pytest.fixture
def serve(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    served = ExitStack()

    def made(*names: str, **settings: Any) -> Serving:
        devices = [FakeDevice(name) for name in names or ("fake",)]
        running = served.enter_context(running_server(tmp_path, source, device=devices[0], beside=devices[1:], **settings))
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        serving = Serving(running, Store(tmp_path / "store"))
        served.callback(serving.connection.close)
        return serving

    with served:
        yield made
        client._pool.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as made:
        yield made


# --- who is connected -------------------------------------------------------------------------------------------------


def test_sessions_tell_who_is_connected(serve: Serve, threads: ThreadPoolExecutor) -> None:
    tenant = Tenant(name="vision", domain="", models=("*",), token_hashes=(hash_of(b"v1"),))
    serving = serve(quotas=Quotas({"vision": tenant}))
    pool = Pool(endpoint=Endpoint(serving.running.path), credential=lambda: b"v1")
    for _ in range(2):
        Model("age", pool).call({"x": X}, deadline_s=LATE)
    gate = Gate()
    serving.running.device.on_run = gate.pass_through
    asked = threads.submit(lambda: Model("age", pool).call({"x": X}, deadline_s=LATE))
    assert gate.entered.wait(LATE)
    found = serving.get("sessions")
    assert found["total"] == 2
    function, operator = sorted(found["sessions"], key=lambda each: bool(each["administrator"]))
    assert function.pop("age_s") >= 0
    assert function.pop("arena_bytes") > 0
    assert function == {
        "session": function["session"],
        "tenant": "vision",
        "administrator": False,
        "pid": os.getpid(),
        "uid": os.getuid(),
        "transport": serving.running.server.transport,
        "requests": 3,
        "in_flight": 1,
    }
    assert (operator["tenant"], operator["administrator"], operator["requests"], operator["in_flight"]) == (None, True, 0, 0)
    gate.leave.set()
    asked.result(LATE)
    pool.close()
    until(lambda: serving.get("sessions")["total"] == 1)


def test_sessions_come_in_pages(serve: Serve) -> None:
    serving = serve()
    made = [Connection(serving.running.path, token=b"", request_bytes=1, reply_bytes=1, deadline=float("inf")) for _ in range(3)]
    numbers = [each["session"] for each in serving.get("sessions")["sessions"]]
    assert numbers == sorted(numbers)
    assert len(numbers) == 4
    page = serving.get("sessions?offset=1&limit=2")
    assert page["total"] == 4
    assert [each["session"] for each in page["sessions"]] == numbers[1:3]
    for connection in made:
        connection.close()


# --- what is held, and what would leave -------------------------------------------------------------------------------


def test_leases_tell_what_requests_hold_and_what_is_pinned(serve: Serve, threads: ThreadPoolExecutor) -> None:
    serving = serve()
    assert serving.get("leases") == {"devices": {"fake": {"leases": [], "pinned": []}}}
    serving.post("models/gender/pin")
    asked, gate = serving.ask_held(threads, "age")
    told = serving.get("leases")["devices"]["fake"]
    assert told["pinned"] == [{"model": "gender", "version": "1", "bytes": GENDER}]
    (lease,) = told["leases"]
    assert 0 <= lease.pop("since_s") < LATE
    # The request, and what was loaded ahead of it.
    assert lease.pop("leases") >= 1
    assert lease == {"model": "age", "version": "1", "bytes": AGE, "streaming": False}
    gate.leave.set()
    asked.result(LATE)
    until(lambda: serving.get("leases?device=fake")["devices"]["fake"]["leases"] == [])
    assert serving.http.get("/admin/v1/leases?device=cuda:9").status_code == 400


def test_residency_tells_what_would_leave_next(serve: Serve) -> None:
    serving = serve(budget_bytes=1000)
    for name in ("age", "gender", "text"):
        serving.post(f"models/{name}/load")
    serving.post("models/text/pin")
    serving.post("models/gender/keep", priority=1)
    told = serving.get("residency")["devices"]["fake"]
    assert told["tiers"] == [{"tier": "device", "budget_bytes": 1000, "used_bytes": 110}]
    assert (told["hits"], told["misses"], told["missed_bytes"], told["pinned_bytes"]) == (2, 4, 110, 1)
    assert told["evictions"]["room"] == 0
    assert all(each.pop("idle_s") >= 0 for each in told["leaving"])
    # What is of the lower priority first; of the trunk, that of its dearest user counts.
    assert told["leaving"][0] == {"models": ["gender"], "model_count": 1, "weights": 1, "bytes": 6, "priority": 1}
    assert sorted(told["leaving"][1:], key=lambda each: each["bytes"]) == [
        {"models": ["age"], "model_count": 1, "weights": 1, "bytes": 3, "priority": 5},
        {"models": ["age", "gender"], "model_count": 2, "weights": 1, "bytes": 100, "priority": 5},
    ]
    assert told["leaving_bytes"] == 109
    assert len(serving.get("residency?limit=1")["devices"]["fake"]["leaving"]) == 1
    for bad in ("limit=1001", "limit=-1", "device=other"):
        assert serving.http.get(f"/admin/v1/residency?{bad}").status_code == 400


def test_room_is_made_by_what_is_worth_least(serve: Serve) -> None:
    serving = serve(budget_bytes=1000)
    for name in ("age", "gender", "text"):
        serving.post(f"models/{name}/load")
    serving.post("models/text/pin")
    serving.post("models/gender/keep", priority=1)
    # There is as much already.
    assert serving.post("evict", bytes=890)["devices"]["fake"] == {"freed_bytes": 0, "free_bytes": 890, "budget_bytes": 1000}
    first = serving.get("residency")["devices"]["fake"]["leaving"][0]
    assert serving.post("evict", bytes=891)["devices"]["fake"]["freed_bytes"] == first["bytes"] == 6
    assert serving.get("models/age")["state"] == "resident"
    # What is pinned stays.
    assert serving.post("evict", bytes=1000, device="fake")["devices"]["fake"] == {
        "freed_bytes": 103,
        "free_bytes": 999,
        "budget_bytes": 1000,
    }
    told = serving.get("residency")["devices"]["fake"]
    assert told["evicted_bytes"]["operator"] == 109
    assert told["leaving"] == []
    assert model("age")(X).shape == (1, 3)


def test_no_room_is_made_of_what_is_in_use(serve: Serve, threads: ThreadPoolExecutor) -> None:
    serving = serve(budget_bytes=1000)
    serving.post("models/gender/load")
    asked, gate = serving.ask_held(threads, "age")
    assert serving.post("evict", bytes=1000)["devices"]["fake"]["freed_bytes"] == 6
    gate.leave.set()
    assert asked.result(LATE) == [[1 + sum(b"t" * 100 + b"age")] * 3]


@pytest.mark.parametrize("bad", [0, -1, True, 1.5, "1", None, 2**51, 10**40])
def test_a_bad_number_of_bytes_frees_nothing(serve: Serve, bad: object) -> None:
    serving = serve()
    serving.post("models/age/load")
    refused = serving.http.post("/admin/v1/evict", json={"bytes": bad})
    assert refused.status_code == 400
    assert "from 1 to 1125899906842624" in refused.json["error"]["message"]
    if not isinstance(bad, int) or abs(bad) < 2**63:
        with pytest.raises(InvalidInput, match="from 1 to"):
            AdminConnection(serving.running.path, ADMIN_TOKEN).command("relieve", {"bytes": bad})
    for body in ({}, {"bytes": 1, "model": "age"}, {"bytes": 1, "device": 5}, {"bytes": 1, "device": "none"}):
        assert serving.http.post("/admin/v1/evict", json=body).status_code == 400
    assert serving.get("models/age")["state"] == "resident"


def test_several_devices_are_told_beside_each_other(serve: Serve) -> None:
    serving = serve("one", "other", budget_bytes=1000)
    for name, device in (("age", "one"), ("gender", "other")):
        serving.post(f"models/{name}/place", allow=[device])
        serving.post(f"models/{name}/load")
    assert list(serving.get("leases")["devices"]) == ["one", "other"]
    assert list(serving.get("leases?device=other")["devices"]) == ["other"]
    told = serving.get("residency")["devices"]
    assert [told[name]["tiers"][0]["used_bytes"] for name in ("one", "other")] == [AGE, GENDER]
    assert serving.post("evict", bytes=1000, device="other") == {
        "devices": {"other": {"freed_bytes": GENDER, "free_bytes": 1000, "budget_bytes": 1000}}
    }
    assert serving.get("models/age")["state"] == "resident"
    assert serving.post("evict", bytes=1000)["devices"]["one"]["freed_bytes"] == AGE
    assert serving.http.post("/admin/v1/evict", json={"bytes": 1, "device": "none"}).status_code == 400


# --- draining ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("fake",), ("one", "other")])
def test_a_drained_node_finishes_what_it_has_taken_and_takes_no_more(
    serve: Serve, threads: ThreadPoolExecutor, names: tuple[str, ...]
) -> None:
    serving = serve(*names)
    asked, gate = serving.ask_held(threads, "age")
    waited = serving.post("drain", timeout_s=0)
    assert (waited["draining"], waited["drained"]) == (True, False)
    drained = threads.submit(lambda: serving.post("drain", timeout_s=LATE))
    ready = serving.http.get("/readyz")
    assert ready.status_code == 503
    assert ready.headers["Retry-After"] == "1"
    assert serving.get("status")["engine"]["draining"] is True
    pool = Pool(endpoint=Endpoint(serving.running.path), credential=lambda: b"")
    with pytest.raises(Draining, match="an operator has the sidecar take no requests for a while"):
        Model("gender", pool).call({"x": X}, deadline_s=LATE)
    assert not drained.done()
    gate.leave.set()
    # It was taken before.
    assert asked.result(LATE) == [[1 + sum(b"t" * 100 + b"age")] * 3]
    assert drained.result(LATE) == {"draining": True, "drained": True, "waiting": 0, "running": 0}
    # What operators do goes on.
    assert serving.post("models/gender/load")["state"] == "resident"
    assert serving.post("resume") == {"draining": False, "drained": False, "waiting": 0, "running": 0}
    assert serving.http.get("/readyz").status_code == 200
    assert Model("gender", pool).call({"x": X}, deadline_s=LATE).shape == (1, 3)
    pool.close()


def test_whoever_waits_for_a_drain_is_told_that_another_has_resumed(serve: Serve, threads: ThreadPoolExecutor) -> None:
    serving = serve()
    asked, gate = serving.ask_held(threads, "age")
    drained = threads.submit(lambda: serving.post("drain", timeout_s=600))
    until(lambda: bool(serving.get("status")["engine"]["draining"]))
    serving.post("resume")
    assert drained.result(LATE)["draining"] is False
    gate.leave.set()
    asked.result(LATE)


def test_requests_that_came_just_before_a_drain_was_known_are_refused_by_the_engine(serve: Serve) -> None:
    serving = serve()
    serving.post("drain")
    engine = serving.running.engine
    # As if the server's thread had looked a moment earlier.
    engine.check_room = lambda tenant: None  # type: ignore[method-assign]
    pool = Pool(endpoint=Endpoint(serving.running.path), credential=lambda: b"")
    with pytest.raises(Draining, match="an operator"):
        Model("age", pool).call({"x": X}, deadline_s=LATE)
    pool.close()


@pytest.mark.parametrize("bad", [-1, 601, True, "1", None, [1], float("nan")])
def test_a_bad_time_to_drain_in_drains_nothing(serve: Serve, bad: object) -> None:
    serving = serve()
    assert serving.http.post("/admin/v1/drain", json={"timeout_s": bad}).status_code == 400
    assert serving.http.post("/admin/v1/drain", json={"timeout": 1}).status_code == 400
    assert serving.http.post("/admin/v1/resume", json={"x": 1}).status_code == 400
    assert serving.get("status")["engine"]["draining"] is False


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    before = logger.level
    logger.setLevel(logging.INFO)
    yield logger
    logger.setLevel(before)


def test_the_level_of_the_log_is_told_and_set(serve: Serve, root: logging.Logger) -> None:
    serving = serve()
    assert serving.get("log-level") == {"engine": "info", "http": "info"}
    assert serving.put("log-level", level="debug") == {"engine": "debug", "http": "debug"}
    assert root.level == logging.DEBUG
    for bad in ({}, {"level": "loud"}, {"level": 10}, {"level": ["info"]}, {"level": "info", "of": "engine"}):
        assert serving.http.put("/admin/v1/log-level", json=bad).status_code == 400
    with pytest.raises(InvalidInput, match="one of debug, info, warning, error"):
        AdminConnection(serving.running.path, ADMIN_TOKEN).command("log_level", {"level": "loud"})
    assert root.level == logging.DEBUG


def test_workers_take_up_what_one_of_them_was_told(root: logging.Logger) -> None:
    shared = loglevels.SharedLevel()
    told, done = os.pipe()
    pid = os.fork()
    if not pid:
        # Another worker, forked before anything was said.
        shared.set("error")
        os.write(done, b"1")
        os._exit(0)
    assert os.read(told, 1) == b"1"
    os.waitpid(pid, 0)
    os.close(told)
    os.close(done)
    assert root.level == logging.INFO
    shared.look()
    assert root.level == logging.ERROR
    # What is said here counts, too, until another says something else.
    shared.set("warning")
    shared.look()
    assert loglevels.current() == "warning"


def test_a_worker_looks_before_each_request(tmp_path: Path, root: logging.Logger, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[loglevels.SharedLevel] = []

    class Shared(loglevels.SharedLevel):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    monkeypatch.setattr(admin.loglevels, "SharedLevel", Shared)

    class Nobody:
        def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
            raise AssertionError("the engine is not asked")

    http = create_app(Nobody(), Store(tmp_path / "store")).test_client()
    made[0]._shared[0] = 1 + loglevels.LEVELS.index("error")
    assert root.level == logging.INFO
    assert http.get("/healthz").status_code == 200
    assert root.level == logging.ERROR


def test_sessions_leave_while_they_are_listed(serve: Serve) -> None:
    serving = serve()
    stop = threading.Event()

    def come_and_go() -> None:
        while not stop.is_set():
            Connection(serving.running.path, token=b"", request_bytes=1, reply_bytes=1, deadline=float("inf")).close()

    thread = threading.Thread(target=come_and_go)
    thread.start()
    for _ in range(50):
        found = serving.get("sessions")
        assert found["total"] >= 1
        assert all(each["pid"] == os.getpid() for each in found["sessions"])
    stop.set()
    thread.join(LATE)
