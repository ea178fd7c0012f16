"""Metrics: what a scrape tells is what the engine counted, each name is documented, and nobody's guess becomes a label."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib import metadata
from pathlib import Path
from typing import Any

import flask.testing
import numpy as np
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from trunkline import client, model, models
from trunkline.admin import AdminConnection
from trunkline.connection import Connection
from trunkline.errors import (
    ConnectionLost,
    DeadlineExceeded,
    Draining,
    SidecarUnavailable,
    TrunklineError,
    Unauthorized,
    UnknownModel,
    ValueOutOfBounds,
)
from trunkline.protocol import JOINT

from sidecar.config import load_settings
from sidecar.http import server
from sidecar.http.admin import create_app
from sidecar.http.metrics import CONTENT_TYPE, METRICS, exposition
from sidecar.prepull import STATES
from sidecar.store import Store
from sidecar.tenants import Quotas, Tenant, hash_of
from tests.asking import called, submitted
from tests.fakes import ADMIN_TOKEN, FakeDevice, FakeSource, Running, bundle_of, running_server
from tests.integration.test_admin import FakeEngine
from tests.integration.test_awaited import awaited, restarted
from tests.waiting import PATIENCE_S, soon, until

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "metrics.md"
DASHBOARD = ROOT / "deploy" / "grafana" / "trunkline.json"
X = np.ones((1, 3), np.float32)
SUFFIXES = re.compile(r"_(bucket|sum|count)$")

Values = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Scrape:
    """What was told, by name and labels."""

    def __init__(self, text: str) -> None:
        self.families = list(text_string_to_metric_families(text))
        self.values: Values = {
            (sample.name, frozenset(sample.labels.items())): sample.value for each in self.families for sample in each.samples
        }

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.values.get((f"trunkline_{name}", frozenset(labels.items())))

    def labels(self, label: str) -> set[str]:
        return {value for _, labels in self.values for key, value in labels if key == label}

    @property
    def names(self) -> set[str]:
        """Names as in the table: of a histogram, without what its series end in."""
        return {name if name in METRICS else SUFFIXES.sub("", name) for name, _ in self.values}


def scraped(running: Running) -> Scrape:
    with closing(AdminConnection(running.path, ADMIN_TOKEN)) as admin:
        return Scrape(exposition(admin.command)().decode())


def device_document() -> dict[str, Any]:
    """Return what an engine on a GPU tells, with every field that there may be."""
    load = {"waiting": 1, "running": 2, "input_bytes": 3, "wait_s": 0.5, "device_s": 4.0}
    measures = {
        "state": "resident",
        "bytes": 100,
        "shared_bytes": 60,
        "pinned": True,
        "priority": 5,
        "keep_alive_s": 60.0,
        "leases": 1,
        "last_used_s": 2.5,
    }
    memory = dict.fromkeys(
        (
            *("budget_bytes", "resident_bytes", "logical_bytes", "saved_bytes", "pinned_bytes", "weight_bytes", "spare_bytes"),
            *("total_bytes", "free_bytes", "allocated_bytes", "reserved_bytes", "span_bytes", "compactions", "compacted_bytes"),
            *("host_budget_bytes", "host_weight_bytes", "host_spare_bytes", "kept_bytes", "host_kept_bytes"),
            *("block_file_bytes", "store_bytes", "block_files_taken_bytes", "block_files_limit_bytes"),
            "block_files_left_out_bytes",
        ),
        7,
    )
    residency = {
        **dict.fromkeys(("hits", "hit_bytes", "misses", "missed_bytes"), 8),
        "policy": "adaptive",
        "evictions": {"room": 1, "ttl": 0},
        "evicted_bytes": {"room": 50, "ttl": 0},
        "lru_age_s": 12.5,
    }
    return {
        "engine": {
            "pid": 1,
            "uptime_s": 9.0,
            "draining": False,
            "generation": 3,
            "watchdog_kills": 2,
            "quarantines": 1,
            "device": "a",
            "torch": "2",
            "threads": 2,
        },
        "memory": {**memory, "residency": residency},
        "requests": dict.fromkeys(("answered", "failed", "expired", "waiting", "running", "fetched_bytes", "evicted_bytes"), 6),
        "streams": {"runs": 1, "predicted_s": 2.0, "actual_s": 3.0, "starved": 4},
        "lanes": {"count": 2, "chosen": 2, "running": 1, "measured_rates": {"1": 10.0, "2": 15.0}},
        "shortage": {"splits": 1, "reliefs": 2, "refused": 3},
        "sharing": {"stages": 10, "stage_rows": 20, "stage_requests": 30, "stacked": 1, "joined": 2, "programs": 4},
        "queues": {"forecast": {"predicted_p99_s": 0.1, "actual_p99_s": 0.2}, "tenants": {"anyone": load}},
        "models": {"m": measures, "idle": {**measures, "state": "stored", "keep_alive_s": None, "last_used_s": None}},
        "corrupt": ["bad"],
        "awaited_count": 1,
        "outcomes": {
            "bounds_s": [0.1, 1.0],
            "models": {"m": {"counts": [3, 2, 1], "seconds": 5.5, "failed": {"deadline_exceeded": 4}}},
        },
        "waiting": {"m": 2},
        "device_s": {"m": 0.01},
        "stalled_s": 1.5,
    }


class Told(FakeEngine):
    """An engine that tells all there is, on two devices."""

    def __init__(self) -> None:
        super().__init__()
        connections = {
            "connections": 5,
            "connection_limit": 64,
            "arena_bytes": 500,
            "arena_limit_bytes": 1000,
            "transport": "sealed",
            "tenants": {"anyone": {"connections": 3, "arena_bytes": 300}},
            "refused": {"value_out_of_bounds": 2},
            "turned_away": {"unauthorized": 1},
            "asked": {"sealed": {"m": 4, "n": 1}, "http": {}},
            "spans": {"exported": 12, "dropped": {"queue_full": 3, "export_failed": 0}},
        }
        placed = {"name": "m", "devices": ["a", "b"], "moving_to": ["b"], "rate": 2.0, "under_way": 0.5, "seconds": {"a": 0.01}}
        unplaced = {"name": "idle", "devices": ["a"], "moving_to": []}
        placement = {
            "devices": {name: {"load": 0.5, "budget_bytes": 1, "under_way": 1} for name in "ab"},
            "models": [placed, unplaced, {**placed, "name": "m,made-up"}],
        }
        self.answers |= {
            "metrics": {"devices": {"a": device_document(), "b": device_document()}},
            "connections": connections,
            "placement": placement,
        }


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def http(told: Told, tmp_path: Path) -> flask.testing.FlaskClient:
    listed = {"models": {"present": 2, "waiting": 0, "failed": 1}, "fetched_bytes": 700}
    return create_app(told, Store(tmp_path / "store"), listed=lambda: listed).test_client()


def read(http: flask.testing.FlaskClient) -> Scrape:
    answer = http.get("/metrics")
    assert answer.status_code == 200
    assert answer.content_type == CONTENT_TYPE
    return Scrape(answer.text)


# --- what is told -----------------------------------------------------------------------------------------------------


def test_every_metric_is_told_as_it_is_described(http: flask.testing.FlaskClient, told: Told) -> None:
    scrape = read(http)
    assert scrape.names == METRICS.keys()
    assert [name for name, _ in told.asked] == ["metrics", "connections", "placement"]
    for family in scrape.families:
        name = f"{family.name}_total" if family.type == "counter" else family.name
        kind = METRICS[name]
        assert (family.type, family.documentation) == (kind.type, kind.help)
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(kind.labels)


def test_names_follow_the_rules_of_prometheus() -> None:
    for name, kind in METRICS.items():
        assert re.fullmatch(r"trunkline_[a-z0-9_]+", name)
        assert name.endswith("_total") == (kind.type == "counter"), name
        assert not re.search(r"_(ms|milliseconds|kb|mb|percent)(_|$)", name), name
        assert kind.help, name
        assert set(kind.labels) <= {
            *(
                "process",
                "transport",
                "device",
                "model",
                "tenant",
                "tier",
                "reason",
                "outcome",
                "state",
                "lanes",
                "policy",
                "torch",
                "transport",
                "version",
                "python",
            )
        }


def test_values_are_those_of_the_snapshot(http: flask.testing.FlaskClient) -> None:
    scrape = read(http)
    assert scrape("up") == 1
    assert scrape("engine_generation") == 3
    assert scrape("watchdog_kills_total") == 2
    assert scrape("quarantines_total") == 1
    assert scrape("draining") == 0
    assert [scrape("listed_models", state=state) for state in STATES] == [2, 0, 1]
    assert scrape("listed_fetched_bytes_total") == 700
    assert scrape("device_info", device="a", policy="adaptive", torch="2") == 1
    for device in "ab":
        assert scrape("memory_budget_bytes", device=device, tier="host") == 7
        assert scrape("evicted_bytes_total", device=device, reason="room") == 50
        assert scrape("requests_total", device=device, model="m", outcome="answered") == 6
        assert scrape("requests_total", device=device, model="m", outcome="deadline_exceeded") == 4
    assert scrape("requests_total", device="", model="", outcome="value_out_of_bounds") == 2
    assert (scrape("requests_asked_total", transport="sealed"), scrape("requests_asked_total", transport="http")) == (5, 0)
    buckets = [scrape("request_duration_seconds_bucket", device="a", model="m", le=each) for each in ("0.1", "1.0", "+Inf")]
    assert buckets == [3, 5, 6]
    assert scrape("request_duration_seconds_sum", device="a", model="m") == 5.5
    assert scrape("models", device="a", state="resident") == 1
    assert scrape("models", device="a", state="stored") == 1
    assert scrape("models", device="a", state="loading") == 0
    assert scrape("models", device="a", state="corrupt") == 1
    assert scrape("model_requests_waiting", device="a", model="m") == 2
    assert scrape("model_requests_waiting", device="a", model="idle") == 0
    assert scrape("model_idle_seconds", device="a", model="idle") is None
    assert scrape("model_keep_alive_seconds", device="a", model="idle") is None
    # Who is no tenant has the rest.
    assert scrape("clients", tenant="anyone") == 3
    assert scrape("clients", tenant="") == 2
    assert scrape("arena_bytes", tenant="") == 200
    assert scrape("models_moving") == 1
    assert scrape("stages_joined_total", device="a") == 2
    assert scrape("spans_exported_total", process="engine") == 12
    assert scrape("spans_dropped_total", process="engine", reason="queue_full") == 3
    assert scrape.labels("model") == {"m", "idle", ""}


def test_with_one_device_nobody_asks_where_models_are(http: flask.testing.FlaskClient, told: Told) -> None:
    del told.answers["metrics"]["devices"]["b"]
    assert read(http)("model_placed", device="a", model="m") is None
    assert [name for name, _ in told.asked] == ["metrics", "connections"]


def test_what_an_engine_does_not_know_is_not_told(http: flask.testing.FlaskClient, told: Told) -> None:
    found = told.answers["metrics"]["devices"]["a"]
    del found["memory"]["host_budget_bytes"], found["engine"]["torch"], found["engine"]["threads"]
    found["memory"]["residency"]["lru_age_s"] = None
    scrape = read(http)
    assert scrape("memory_budget_bytes", device="a", tier="host") is None
    assert scrape("lru_age_seconds", device="a") is None
    assert scrape("device_threads", device="a") is None
    assert scrape("device_info", device="a", policy="adaptive", torch="") == 1


def test_odd_names_are_escaped(http: flask.testing.FlaskClient, told: Told) -> None:
    odd = 'te"am\\one\nnext{x="y"} 1'
    found = told.answers["metrics"]["devices"]["a"]
    found["queues"]["tenants"] = {odd: found["queues"]["tenants"]["anyone"]}
    found["models"] = {odd: found["models"]["m"]}
    found["outcomes"]["models"] = {odd: found["outcomes"]["models"]["m"]}
    scrape = read(http)
    assert scrape("queue_waiting", device="a", tenant=odd) == 1
    assert scrape("model_bytes", device="a", model=odd) == 100
    assert scrape("requests_total", device="a", model=odd, outcome="answered") == 6


def test_a_sidecar_that_runs_from_its_sources_has_no_version(
    http: flask.testing.FlaskClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", lambda name: "1.2.3")
    assert read(http).labels("version") == {"1.2.3"}
    monkeypatch.setattr(metadata, "version", unknown)
    assert read(http).labels("version") == {"unknown"}


# --- who is told ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        SidecarUnavailable("no sidecar listens at /tmp/secret"),
        ConnectionLost("the connection to /tmp/secret ended"),
        DeadlineExceeded("no answer from /tmp/secret"),
        Unauthorized("another sidecar's token"),
    ],
)
@pytest.mark.parametrize("command", ["metrics", "connections", "placement"])
def test_an_engine_that_is_away_does_not_lose_the_scrape(
    http: flask.testing.FlaskClient, told: Told, caplog: pytest.LogCaptureFixture, error: TrunklineError, command: str
) -> None:
    told.answers[command] = error
    answer = http.get("/metrics")
    assert "secret" not in answer.text
    scrape = read(http)
    assert scrape("up") == 0
    assert scrape.names == {"trunkline_up", "trunkline_build_info"}
    assert error.code in caplog.text


def test_an_engine_that_does_not_answer_does_not_lose_the_scrape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_SCRAPE_S", 0.05)
    settings = load_settings({"admin_port": 0, "run_dir": tmp_path, "store_dir": tmp_path / "store"}, {})
    (tmp_path / "admin.token").write_text("0" * 64)
    (tmp_path / "public").mkdir()
    # As while the supervisor holds the socket, and engine after engine fails to start.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, socket.socket() as unused:
        listener.bind(str(tmp_path / "public" / "trunkline.sock"))
        listener.listen(1)
        scrape = read(server.AdminServer(settings, [unused]).load().test_client())
    assert scrape("up") == 0


def test_a_scrape_goes_by_the_rules_of_all_routes(http: flask.testing.FlaskClient, told: Told) -> None:
    local = {"REMOTE_ADDR": "127.0.0.1"}
    rebound = http.get("/metrics", headers={"Host": "evil.example"}, environ_overrides=local)
    assert rebound.status_code == 400
    assert rebound.json is not None
    assert rebound.json["error"]["code"] == "invalid_input"
    assert http.get("/metrics", headers={"Host": "localhost:9470"}, environ_overrides=local).status_code == 200
    assert http.post("/metrics", json={}).status_code == 405
    assert http.post("/metrics", json={}, headers={"Origin": "https://evil.example"}).status_code == 400
    asked = len(told.asked)
    assert http.get("/metrics/").status_code == 404
    assert len(told.asked) == asked


# --- what is counted --------------------------------------------------------------------------------------------------


@pytest.fixture
def running(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    with running_server(tmp_path, source) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        yield made
        client._pool.close()


def test_requests_are_counted_once_each(running: Running) -> None:
    before = scraped(running)
    assert before("up") == 1
    assert before.labels("outcome") == set()
    for _ in range(3):
        model("age")(X)
    models("age", "gender")(X)
    with pytest.raises(ValueOutOfBounds):
        model("text")(np.full((1, 2), 1000))
    scrape = scraped(running)
    for name, count in (("age", 4), ("gender", 1)):
        assert scrape("requests_total", device="fake", model=name, outcome="answered") == count
        assert scrape("request_duration_seconds_count", device="fake", model=name) == count
        assert scrape("request_duration_seconds_bucket", device="fake", model=name, le="+Inf") == count
        assert scrape("model_resident", device="fake", model=name) == 1
        seconds = scrape("model_request_device_seconds", device="fake", model="age")
        assert seconds is not None
        assert seconds > 0
    assert scrape("requests_total", device="", model="", outcome="value_out_of_bounds") == 1
    assert scrape("requests_total", device="fake", model="text", outcome="answered") is None
    assert scrape("models", device="fake", state="resident") == 2
    assert scrape("models", device="fake", state="stored") == 2
    assert scrape("memory_resident_bytes", device="fake", tier="device") == 100 + 3 + 6
    assert scrape("dedup_saved_bytes", device="fake") == 100
    # Of four requests, the first fetched two weights; the last one found the trunk and fetched one.
    assert scrape("weight_misses_total", device="fake") == 3
    assert scrape("fetched_bytes_total", device="fake") == 109
    assert scrape("requests_waiting", device="fake") == 0
    assert scrape("queue_running", device="fake", tenant="anyone") == 0
    assert scrape("clients", tenant="anyone") == 1
    assert scrape.names <= METRICS.keys()


def test_nothing_that_a_function_makes_up_becomes_a_label(running: Running) -> None:
    for number in range(3):
        with pytest.raises(UnknownModel):
            model(f"guess-{number}")(X)
    models("age", "gender")(X)
    scrape = scraped(running)
    assert scrape.labels("model") <= {"", "age", "gender", "pair", "text"}
    assert scrape("requests_total", device="", model="", outcome="unknown_model") is None
    # A function that asks for a signature has asked for no answer yet; one that goes ahead has.
    with closing(Connection(running.path, deadline=soon())) as connection, pytest.raises(UnknownModel):
        connection.infer("guess", (), soon())
    assert scraped(running)("requests_total", device="", model="", outcome="unknown_model") == 1


def test_failures_are_counted_by_their_code(running: Running, source: FakeSource) -> None:
    source.blobs.clear()
    with pytest.raises(TrunklineError) as failed:
        model("age")(X)
    scrape = scraped(running)
    assert scrape("requests_total", device="fake", model="age", outcome=failed.value.code) == 1
    assert scrape("requests_total", device="fake", model="age", outcome="answered") == 0
    assert scrape("fetched_bytes_total", device="fake") == 0


def test_what_comes_while_the_sidecar_is_shutting_down_is_counted(running: Running) -> None:
    release = threading.Event()
    running.engine._post(lambda: release.wait(PATIENCE_S) and None)
    first = submitted(running, "age", {"x": X})
    running.engine.drain(running.server.stop)
    second = submitted(running, "gender", {"x": X})
    release.set()
    first.result()
    with pytest.raises(Draining):
        second.result()
    assert running.engine._outcomes._by_model["gender"].failed == {"draining": 1}


def test_models_asked_one_after_the_other_count_once_each(tmp_path: Path, source: FakeSource, monkeypatch: Any) -> None:
    for name in ("one", "two"):
        content = name.encode() * 30
        source.put(bundle_of(name, [content]), [content])
    with running_server(tmp_path, source, budget_bytes=110) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        models("one", "two")(X)
        client._pool.close()
        scrape = scraped(made)
        for name in ("one", "two"):
            assert scrape("request_duration_seconds_count", device="fake", model=name) == 1
            seconds = scrape("request_duration_seconds_sum", device="fake", model=name)
            # Since the call came, not since the clock began.
            assert seconds is not None
            assert seconds < 60
        assert scrape("evictions_total", device="fake", reason="room") == 1
        assert scrape("lru_age_seconds", device="fake") is not None


def test_connections_that_are_not_let_in_are_counted(tmp_path: Path, source: FakeSource) -> None:
    tenant = Tenant(name="vision", domain="", models=("*",), token_hashes=(hash_of(b"token"),))
    with running_server(tmp_path, source, quotas=Quotas({"vision": tenant})) as made:
        with pytest.raises(Unauthorized):
            Connection(made.path, token=b"guess", deadline=soon())
        with closing(Connection(made.path, token=b"token", deadline=soon())):
            scrape = scraped(made)
        assert scrape("connections_refused_total", reason="unauthorized") == 1
        assert scrape("clients", tenant="vision") == 1
        assert scrape("clients", tenant="") == 1
        held = scrape("arena_bytes", tenant="vision")
        assert held is not None
        assert held > 0
        assert scrape("queue_waiting", device="fake", tenant="vision") == 0


def test_time_is_lost_only_while_requests_wait_for_weights(running: Running, source: FakeSource) -> None:
    reading, go_on = threading.Event(), threading.Event()

    def hold(digest: str) -> None:
        reading.set()
        assert go_on.wait(PATIENCE_S)

    def is_waiting(with_inputs: bool) -> bool:
        return any((parked.work.inputs is not None) is with_inputs for parked in running.engine._loads.parked)

    source.before_read = hold
    with ThreadPoolExecutor() as threads, closing(AdminConnection(running.path, ADMIN_TOKEN)) as admin:
        # Whom an operator has it loaded for, nobody waits.
        loading = threads.submit(admin.command, "load", {"name": "age"})
        assert reading.wait(PATIENCE_S)
        until(lambda: is_waiting(with_inputs=False))
        assert scraped(running)("stalled_seconds_total", device="fake") == 0
        go_on.set()
        loading.result(PATIENCE_S)
    assert scraped(running)("stalled_seconds_total", device="fake") == 0
    reading.clear()
    go_on.clear()
    asked = submitted(running, "gender", {"x": X})
    assert reading.wait(PATIENCE_S)
    until(lambda: is_waiting(with_inputs=True))
    # A scrape has a session opened, a command run and a session closed: between them the engine waits.
    scraped(running)
    lost_s = scraped(running)("stalled_seconds_total", device="fake")
    assert lost_s is not None
    assert lost_s > 0
    go_on.set()
    asked.result()
    lost_s = scraped(running)("stalled_seconds_total", device="fake")
    called(running, "gender", {"x": X})
    assert scraped(running)("stalled_seconds_total", device="fake") == lost_s


def test_what_waits_is_counted_by_model(running: Running) -> None:
    release = threading.Event()
    told: list[Any] = []
    running.engine._post(lambda: told.append(release.wait(PATIENCE_S)))
    asked = [submitted(running, name, {"x": X}) for name in ("age", JOINT.join(("age", "gender")))]
    # Before anything is taken up: the engine looks at all that was posted first.
    running.engine._post(lambda: told.append(running.engine._counts()["waiting"]))
    release.set()
    for each in asked:
        each.result()
    assert told == [True, {"age": 2, "gender": 1}]
    assert scraped(running)("model_requests_waiting", device="fake", model="age") == 0


def test_a_scrape_has_nothing_deployed(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine._QUIET_S", 3600.0)
    with restarted(tmp_path, source) as made:
        scrape = scraped(made)
        assert len(awaited(made)) == 4
        assert scrape("models", device="fake", state="awaited") == 4
        assert scrape.labels("model") == set()


def test_each_device_has_its_label(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> None:
    with running_server(tmp_path, source, device=FakeDevice("one"), beside=[FakeDevice("other")]) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        with closing(AdminConnection(made.path, ADMIN_TOKEN)) as admin:
            for name, device in (("age", "one"), ("gender", "other"), ("pair", "other")):
                admin.command("place", {"name": name, "allow": [device]})
        model("age")(X)
        for _ in range(2):
            model("gender")(X)
        models("gender", "pair")(X)
        client._pool.close()
        scrape = scraped(made)
    assert scrape.labels("device") == {"one", "other"}
    assert scrape("requests_total", device="one", model="age", outcome="answered") == 1
    assert scrape("requests_total", device="other", model="gender", outcome="answered") == 3
    assert scrape("requests_total", device="one", model="gender", outcome="answered") is None
    for device in ("one", "other"):
        assert scrape("memory_budget_bytes", device=device, tier="device") == 1 << 20
        assert scrape("lanes", device=device) == 1
        assert scrape("placement_load", device=device) is not None
    assert scrape("model_placed", device="one", model="age") == 1
    assert scrape("model_placed", device="other", model="age") is None
    assert scrape.labels("model") == {"age", "gender", "pair", "text"}


# --- what is written about it -----------------------------------------------------------------------------------------


def test_the_table_has_every_metric() -> None:
    rows = re.findall(r"^\| `(trunkline_\w+)` \| (\w+) \|([^|]*)\| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    written = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}
    assert len(rows) == len(written)
    assert written == {name: (kind.type, kind.labels, kind.help) for name, kind in METRICS.items()}


def test_all_that_is_written_about_it_names_what_there_is() -> None:
    for page in (PAGE, DASHBOARD):
        found = set(re.findall(r"\btrunkline_\w+", page.read_text()))
        assert found
        assert {name if name in METRICS else SUFFIXES.sub("", name) for name in found} <= METRICS.keys(), page


def test_examples_can_be_read() -> None:
    examples = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)]
    assert [next(iter(each)) for each in examples] == ["scrape_configs", "scrape_configs", "apiVersion"]
    (trigger,) = examples[-1]["spec"]["triggers"]
    assert trigger["metadata"].keys() >= {"serverAddress", "query", "threshold"}


def test_every_panel_asks_for_labels_that_there_are() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    names = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            labels = {"le", "instance", "job"}
            for name in re.findall(r"\btrunkline_\w+", target["expr"]):
                known = name if name in METRICS else SUFFIXES.sub("", name)
                names.add(known)
                labels |= set(METRICS[known].labels)
            for group in re.findall(r"(?:by|on|without) ?\(([^)]*)\)", target["expr"]):
                assert set(re.split(r", ?", group)) <= labels, target["expr"]
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= labels
            assert set(re.findall(r"(\w+)=~?\"", target["expr"])) <= labels
    topics = ("requests_total", "request_duration_seconds", "queue_wait_seconds", "memory_budget_bytes", "evictions_total")
    assert {f"trunkline_{each}" for each in (*topics, "fetched_from_bytes_total", "stage_requests_total", "lanes")} <= names
