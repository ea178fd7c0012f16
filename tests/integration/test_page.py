"""The page and its events, without a browser: what is on it and what is not, who is sent what, what the engine is asked."""

from __future__ import annotations

import json
import re
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask.testing
import pytest
import requests
from flask import Flask
from trunkline.errors import QueueFull, SidecarUnavailable

from sidecar import modelrows, view
from sidecar.http import page
from sidecar.http.access import READ, Gate, Principal
from sidecar.http.admin import create_app
from sidecar.http.events import MOST_VIEWERS, Feed, Shown
from sidecar.http.page import ROLE_HEADER, add_page
from sidecar.http.watch import Look, Watcher
from sidecar.store import Store
from tests.integration.test_admin import FakeEngine
from tests.integration.test_admin_http import HttpServer
from tests.integration.test_metrics import device_document
from tests.waiting import PATIENCE_S, until

HOSTILE = '<img src=x onerror="alert(1)">\'&amp;'


def picture_of(*names: str, version: str = "life-1", **changes: Any) -> dict[str, Any]:
    """Return a trunk and a head for each model."""
    head = {"parent": 0, "blocks": 1, "nodes": 2, "bytes": 100, "packed": 0, "rest": False}
    runs = [{**head, "id": "trunk", "parent": None, "bytes": 900, "ends": []}]
    runs += [{**head, "id": f"head{number}", "ends": [name]} for number, name in enumerate(names)]
    return {
        "version": version,
        "block_count": len(runs),
        "runs": runs,
        "resident": [100, *[50] * len(names)],
        "host": [0] * len(runs),
        "moves": [{"id": 1, "ago_s": 1.5, "reason": "room", "models": list(names), "weights": 3, "bytes": 4000}],
        "last_move": 1,
        **changes,
    }


class Watched(FakeEngine):
    """An engine with a model, or several, on one device, or several."""

    def __init__(self, *names: str, devices: tuple[str, ...] = ("cpu",)) -> None:
        super().__init__()
        names = names or ("m",)
        document = device_document()
        document["models"] = {name: {**document["models"]["m"], "leases": int(not number)} for number, name in enumerate(names)}
        told = document["outcomes"]["models"].pop("m")
        document["outcomes"]["models"] = {name: dict(told) for name in names}
        self.documents = {device: json.loads(json.dumps(document)) for device in devices}
        self.answers["metrics"] = {"devices": self.documents}
        self.asked_by: dict[str, dict[str, int]] = {"sealed": {}, "http": {}}
        self.answers["connections"] = {
            "connections": 5,
            "connection_limit": 64,
            "tenants": {"anyone": {"connections": 3}},
            "asked": self.asked_by,
        }
        self.answers["picture"] = {"devices": {device: picture_of(*names) for device in devices}}

    @property
    def looks(self) -> int:
        return sum(1 for name, _ in self.asked if name == "picture")


@pytest.fixture
def engine() -> Watched:
    return Watched()


@pytest.fixture
def http(engine: Watched, tmp_path: Path) -> flask.testing.FlaskClient:
    return create_app(engine, Store(tmp_path / "store")).test_client()


def page_for(engine: Any, role: str) -> flask.testing.FlaskClient:
    app = Flask("trunkline", static_folder=None)
    add_page(app, Feed(Watcher(engine).look), lambda: role)
    return app.test_client()


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_first_paint_has_what_there_is(http: flask.testing.FlaskClient, engine: Watched) -> None:
    answer = http.get("/")
    assert answer.status_code == 200
    assert answer.mimetype == "text/html"
    assert answer.headers["Cache-Control"] == "no-store"
    for shown in (
        'data-key="m"',
        "in use, pinned",
        'class="run used pinned"',
        "block head0",
        "evicted",
        "3 weights, to make room",
    ):
        assert shown in answer.text, shown
    assert "engine 3, torch 2" in answer.text


def test_nothing_on_it_comes_from_elsewhere_or_is_written_into_it(http: flask.testing.FlaskClient) -> None:
    answer = http.get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert not re.search(r"<script(?![^>]*src=\"/page/)|\sstyle=|<style|\son\w+=|https?://|//\w", answer.text)


def test_its_files_are_served_and_no_others(http: flask.testing.FlaskClient) -> None:
    folder = Path(page.__file__).parent / "page"
    types = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in folder.iterdir():
        answer = http.get(f"/page/{path.name}")
        if path.suffix == ".html":
            assert answer.status_code == 404
            continue
        assert answer.status_code == 200
        assert answer.data == path.read_bytes()
        assert answer.mimetype == types[path.suffix]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        again = http.get(f"/page/{path.name}", headers={"If-None-Match": answer.headers["ETag"]})
        assert again.status_code == 304
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", answer.text), "it is to work where there is no network"
    assert http.get("/page/../page.py").status_code == 404
    assert http.get("/page/events.py").status_code == 404


def test_names_of_strangers_are_texts(tmp_path: Path) -> None:
    engine = Watched(HOSTILE, "m")
    engine.documents["cpu"]["engine"]["torch"] = HOSTILE
    engine.documents["cpu"]["corrupt"] = [HOSTILE + "2"]
    answer = create_app(engine, Store(tmp_path / "store")).test_client().get("/")
    assert answer.text.count("&lt;img src=x") >= 5
    assert "<img src=x" not in answer.text


def test_without_an_engine_it_says_so(http: flask.testing.FlaskClient, engine: Watched) -> None:
    engine.answers["metrics"] = SidecarUnavailable("no sidecar listens at /tmp/secret")
    answer = http.get("/")
    assert answer.status_code == 200
    assert "The engine does not answer" in answer.text
    assert "/tmp" not in answer.text
    assert 'class="away blank"' in answer.text


def test_whoever_may_not_look_is_shown_nothing(engine: Watched) -> None:
    answer = page_for(engine, "").get("/")
    assert answer.status_code == 200
    assert 'class="locked blank"' in answer.text
    assert 'data-key="m"' not in answer.text
    assert not engine.asked


def test_the_page_tells_only_those_who_may_look(engine: Watched, tmp_path: Path) -> None:
    class Known:
        def holder(self, token: bytes) -> Principal | None:
            return Principal("ann", READ) if token == b"looks" else None

    store = Store(tmp_path / "store")
    # Whoever is on this machine, as long as there is no token file; and over the socket always.
    assert 'data-key="m"' in create_app(engine, store).test_client().get("/").text
    http = create_app(engine, store, gate=Gate(Known())).test_client()
    assert 'data-key="m"' in http.get("/", environ_overrides={"REMOTE_ADDR": ""}).text
    shell = http.get("/")
    assert (shell.status_code, 'data-key="m"' in shell.text) == (200, False)
    assert http.get("/page/page.js").status_code == 200
    assert http.get("/admin/v1/events").status_code == 401
    answer = http.get("/admin/v1/events", headers={"Authorization": "Bearer looks"})
    assert answer.headers[ROLE_HEADER] == READ
    assert b'"key":"m"' in next(iter(answer.response))
    answer.close()


def test_a_node_without_models_is_not_an_empty_page(tmp_path: Path) -> None:
    engine = Watched()
    for document in engine.documents.values():
        document.update(models={}, corrupt=[], waiting={}, device_s={})
        document["outcomes"]["models"] = {}
    engine.answers["picture"] = {"devices": {"cpu": {**picture_of(), "runs": [], "resident": [], "host": [], "block_count": 0}}}
    answer = create_app(engine, Store(tmp_path / "store")).test_client().get("/")
    assert answer.status_code == 200
    assert 'class="empty"' in answer.text
    assert "No models yet" in answer.text


# --- what is on it ----------------------------------------------------------------------------------------------------


def looked(engine: Watched, times: int = 1, step_s: float = 5.0, between: Callable[[], None] = lambda: None) -> Look:
    now_s = 0.0
    watch = Watcher(engine, clock=lambda: now_s, wall=lambda: 1e9)
    look = watch.look()
    for _ in range(times - 1):
        between()
        now_s += step_s
        look = watch.look()
    return look


def row_of(look: Look, key: str, table: str = "models") -> dict[str, str]:
    columns = {"models": modelrows.MODEL_COLUMNS, "tenants": view.TENANT_COLUMNS}[table]
    row = next(row for row in look.state[table] if row["key"] == key)
    assert len(row["cells"]) == len(row["sort"]) == len(columns)
    return {name: cell for (name, _), cell in zip(columns, row["cells"], strict=True)}


def test_rates_are_of_what_was_counted_meanwhile() -> None:
    engine = Watched(devices=("a", "b"))

    def more() -> None:
        for document in engine.documents.values():
            document["outcomes"]["models"]["m"]["counts"][0] += 10
            document["outcomes"]["models"]["m"]["failed"]["deadline_exceeded"] += 5
            document["queues"]["tenants"]["anyone"]["device_s"] += 2.5
            document["requests"]["fetched_bytes"] += 5000
            document["memory"]["residency"]["hits"] += 3
            document["memory"]["residency"]["misses"] += 1

    first = row_of(looked(engine), "m")
    assert first["rate"] == modelrows.NONE
    # All since the start: of 12 requests on two devices, 6 took at most 0.1 s, 10 at most 1 s.
    assert first["p50"] == "100 ms"
    look = looked(engine, 3, between=more)
    found = row_of(look, "m")
    assert found["rate"] == "4.0/s, 2.0/s failed"
    assert found["p50"] == "50 ms"
    assert found["share"] == "4.0 %"
    assert found["waiting"] == "4"
    assert row_of(look, "anyone", "tenants") == {
        "name": "anyone",
        "waiting": "2",
        "running": "4",
        "wait": "500 ms",
        "share": "100 %",
        "connections": "3",
    }
    texts = look.state["texts"]
    assert (texts["rate"], texts["moved"], texts["found"]) == ("4.0/s", "2.0 kB/s", "75 %")
    assert found["state"] == "in use on a, b, pinned"


def test_how_requests_came_is_of_the_last_minute_where_any_did() -> None:
    engine = Watched()
    shown = lambda times, **growing: row_of(looked(engine, times, between=lambda: ask(**growing)), "m")["transport"]  # noqa: E731

    def ask(**growing: int) -> None:
        for transport, count in growing.items():
            engine.asked_by.setdefault(transport, {})["m"] = engine.asked_by.get(transport, {}).get("m", 0) + count

    # A first look has nothing to compare with.
    assert shown(1) == shown(2) == modelrows.NONE
    ask(sealed=10)
    assert shown(2) == "shared memory"
    assert shown(2, http=5) == "HTTP"
    assert shown(2) == "shared memory 67 %, HTTP 33 %"
    assert shown(3, copy=1, http=3) == "HTTP 75 %, shared memory, copied 25 %"


def test_bars_stand_for_bytes_and_have_a_budget() -> None:
    engine = Watched()
    engine.documents["cpu"]["memory"].update(
        budget_bytes=1000, resident_bytes=600, pinned_bytes=200, spare_bytes=100, host_budget_bytes=10, host_weight_bytes=20
    )
    device, host, disk = looked(engine).state["tiers"]
    assert device["cells"] == ["Device memory", "600 B of 1.0 kB · 200 B pinned · 100 B kept for the next"]
    scale = device["budget"] / 1000
    assert [(kind, round(width / scale, -1)) for kind, width in device["parts"]] == [
        ("pinned", 200),
        ("resident", 400),
        ("spare", 100),
    ]
    # What is beyond its budget is seen to be.
    assert host["parts"][0][1] > host["budget"]
    assert disk["cells"][0] == "Block files on disk"
    for tier in (device, host, disk):
        assert sum(width for _, width in tier["parts"]) <= 1000


def test_a_damaged_model_is_listed() -> None:
    found = row_of(looked(Watched()), "bad")
    assert found["state"] == "damaged: push it again"
    assert found["p99"] == modelrows.NONE


def test_blocks_are_as_much_in_memory_as_on_the_device_that_has_most() -> None:
    engine = Watched("m", "n", devices=("a", "b"))
    pictures = engine.answers["picture"]["devices"]
    pictures["a"].update(resident=[None, 10, 0], host=[0, 0, 40])
    pictures["b"].update(resident=[None, 30, 0])
    look = looked(engine)
    assert look.state["runs"] == {"version": "life-1", "resident": [None, 30, 0], "host": [0, 0, 40], "flags": [3, 3, 2]}
    # One that draws something else is left out until both know.
    pictures["b"].update(resident=[1], host=[1])
    assert looked(engine).state["runs"]["resident"] == [None, 10, 0]


def test_what_others_have_in_memory_of_a_model_is_seen() -> None:
    engine = Watched("m", "n")
    engine.documents["cpu"]["models"]["n"]["state"] = "stored"
    assert row_of(looked(engine), "n")["state"] == "in part, pinned"
    engine.answers["picture"]["devices"]["cpu"]["resident"] = [0, 100, 0]
    assert row_of(looked(engine), "n")["state"] == "on disk, pinned"


def test_the_engine_is_told_what_is_known_and_a_new_one_asked_anew() -> None:
    engine = Watched()
    now_s = 0.0
    watch = Watcher(engine, clock=lambda: now_s)
    first = watch.look()
    known = dict(engine.asked)["picture"]["of"]
    assert known == {"cpu": {"version": "life-1", "since": 1}}
    picture = engine.answers["picture"]["devices"]["cpu"]
    del picture["runs"]
    # It grew.
    picture.update(moves=[{**picture["moves"][0], "weights": 9, "ago_s": 0.0}], last_move=2)
    second = watch.look()
    assert second.drawing is first.drawing
    assert [move["cells"][3] for move in second.state["moves"]] == ["9 weights, to make room"]
    assert second.state["moves"][0]["cells"][0] == first.state["moves"][0]["cells"][0]
    engine.answers["picture"]["devices"]["cpu"] = picture_of("m", version="other-1", last_move=7)
    third = watch.look()
    assert third.drawing is not first.drawing
    assert len(third.state["moves"]) == 1
    # What the new one did before is asked for, now that it is known to be one.
    assert known == {"cpu": {"version": "other-1", "since": 0}}
    assert len(watch.look().state["moves"]) == 2


def test_of_very_many_models_the_busiest_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelrows, "MOST_MODELS", 5)
    engine = Watched(*(f"m{number}" for number in range(20)))

    def more() -> None:
        for number in range(10, 14):
            engine.documents["cpu"]["outcomes"]["models"][f"m{number}"]["counts"][0] += 10

    look = looked(engine, 2, between=more)
    assert [row["key"] for row in look.state["models"]] == ["m10", "m11", "m12", "m13", "bad"]
    assert look.state["texts"]["models_note"] == "The 5 busiest of 21 models are listed."


def test_two_hundred_models_are_a_short_message() -> None:
    names = [f"a-model-with-a-name-of-some-length-{number}" for number in range(200)]
    engine = Watched(*names)
    feed = Feed(looked_once := Watcher(engine).look, period_s=0.0)
    shown = feed.latest()
    assert len(shown.state) < 100_000
    assert len(shown.drawing) < 100_000
    assert looked_once().state["texts"]["models_count"] == "201"


# --- events -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def events_of(content: bytes) -> list[tuple[str, Any]]:
    """Return the events in a piece of a stream."""
    found = []
    for part in content.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in part.splitlines() if line and not line.startswith(":"))
        # Of two events told together, each has its own part.
        if "data" in fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


def look_of(number: int, drawing: dict[str, Any]) -> Look:
    return Look(drawing, {"number": number})


class Scripted:
    """Looks that a test puts there; counts how often somebody looked."""

    def __init__(self) -> None:
        self.count = 0
        self.drawing: dict[str, Any] = {"version": 1}
        self.now: Look | Exception = look_of(0, self.drawing)

    def __call__(self) -> Look:
        self.count += 1
        if isinstance(self.now, Exception):
            raise self.now
        return self.now


@pytest.fixture
def script() -> Scripted:
    return Scripted()


def next_event(stream: Iterator[bytes], name: str) -> Any:
    """Return the next event of a name; what stands before it is passed over."""
    for _ in range(200):
        for found, data in events_of(next(stream)):
            if found == name:
                return data
    raise AssertionError(f"no {name}")


def test_the_engine_is_asked_once_in_a_period_for_all(script: Scripted) -> None:
    clock = Clock()
    feed = Feed(script, period_s=1.0, clock=clock)
    for _ in range(10):
        feed.latest()
    streams = [feed.open() for _ in range(3)]
    for stream in streams:
        assert [name for name, _ in events_of(next(stream))] == ["drawing", "state"]
    assert script.count == 1
    clock.now_s = 1.0
    script.now = look_of(1, script.drawing)
    # The thread asks, all are told, and what is drawn already is not sent again.
    for stream in streams:
        assert next_event(stream, "state") == {"number": 1}
    assert script.count == 2
    for stream in streams:
        stream.close()
        stream.close()
    assert feed.viewer_count == 0
    until(lambda: feed._thread is None)
    assert script.count == 2


def test_nobody_is_asked_while_nobody_looks(script: Scripted) -> None:
    feed = Feed(script, period_s=0.001)
    assert script.count == 0
    stream = feed.open()
    until(lambda: script.count > 3)
    stream.close()
    until(lambda: feed._thread is None)
    count = script.count
    # Somebody who comes later finds what there is then.
    script.now = look_of(2, {"version": 2})
    late = feed.open()
    assert next_event(late, "state") == {"number": 2}
    assert script.count > count
    late.close()


def test_what_does_not_change_is_not_sent_again(script: Scripted) -> None:
    feed = Feed(script, period_s=0.001, beat_s=0.05)
    stream = feed.open()
    first = next(stream)
    assert next(stream) == b": still here\n\n"
    script.now = look_of(0, {"version": 2})
    assert [name for name, _ in events_of(next(stream))] == ["drawing", "state"]
    stream.close()
    last_id = re.search(rb"id: (\S+)", first)
    assert last_id is not None
    until(lambda: feed._thread is None)
    # Whoever comes back with the latest is told what comes next; with an older one, all.
    old = feed.open(last_id[1].decode())
    content = next(old)
    assert [name for name, _ in events_of(content)] == ["drawing", "state"]
    old.close()
    latest = re.search(rb"id: (\S+)", content)
    assert latest is not None
    again = feed.open(latest[1].decode())
    assert next(again) == b": still here\n\n"
    again.close()


def test_an_engine_that_is_away_is_told_and_so_is_the_next(script: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    feed = Feed(script, period_s=0.001)
    stream = feed.open()
    next(stream)
    script.now = SidecarUnavailable("no sidecar listens at /tmp/secret")
    assert "does not answer" in next_event(stream, "away")["message"]
    count = script.count
    until(lambda: script.count > count + 3)
    script.now = look_of(5, script.drawing)
    assert next_event(stream, "state") == {"number": 5}
    stream.close()
    # Once, however often it was tried.
    assert [record.message for record in caplog.records].count(
        "the page has nothing to show: sidecar_unavailable: no sidecar listens at /tmp/secret"
    ) == 1


def test_a_mistake_is_logged_and_does_not_end_it(script: Scripted, caplog: pytest.LogCaptureFixture) -> None:
    feed = Feed(script, period_s=0.001)
    stream = feed.open()
    next(stream)
    script.now = KeyError("secret")
    assert "secret" not in next_event(stream, "away")["message"]
    script.now = look_of(5, script.drawing)
    assert next_event(stream, "state") == {"number": 5}
    stream.close()
    assert "what the engine tells cannot be shown" in caplog.text


def test_there_are_only_so_many_viewers(script: Scripted) -> None:
    feed = Feed(script, most_viewers=2, period_s=0.001)
    streams = [feed.open(), feed.open()]
    with pytest.raises(QueueFull, match="2 pages are open here, the limit is 2"):
        feed.open()
    streams[0].close()
    feed.open().close()
    streams[1].close()


def test_all_streams_end_with_the_process(script: Scripted) -> None:
    feed = Feed(script, beat_s=PATIENCE_S)
    stream = feed.open()
    next(stream)
    threading.Timer(0.05, feed.close).start()
    assert list(stream) == []
    stream.close()
    until(lambda: feed._thread is None)


def test_the_route_streams_and_tells_the_role(engine: Watched) -> None:
    http = page_for(engine, "read")
    answer = http.get("/admin/v1/events")
    assert answer.status_code == 200
    assert answer.mimetype == "text/event-stream"
    assert answer.headers[ROLE_HEADER] == "read"
    assert answer.headers["Cache-Control"] == "no-store"
    feed = http.application.extensions["feed"]
    content = next(iter(answer.response))
    assert [name for name, _ in events_of(content)] == ["drawing", "state"]
    assert feed.viewer_count == 1
    answer.close()
    assert feed.viewer_count == 0


def test_a_look_at_the_headers_is_no_viewer(http: flask.testing.FlaskClient) -> None:
    assert http.head("/admin/v1/events").status_code == 200
    assert http.application.extensions["feed"].viewer_count == 0


def test_one_viewer_too_many_is_told_when_to_come_back(http: flask.testing.FlaskClient) -> None:
    feed = http.application.extensions["feed"]
    feed._most_viewers = 0
    answer = http.get("/admin/v1/events")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "10"
    assert answer.json is not None
    assert answer.json["error"]["code"] == "queue_full"
    assert feed._shown == Shown()


# --- gunicorn ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[HttpServer]:
    # Not pytest's own folder: the path of a socket has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="trunkline-") as folder:
        running = HttpServer(Path(folder))
        yield running
        running.stop()


def test_streams_end_when_the_server_does(server: HttpServer) -> None:
    with requests.get(f"{server.url}/admin/v1/events", stream=True, timeout=PATIENCE_S) as answer:
        lines = answer.iter_lines()
        # There is no engine here.
        assert next(lines).startswith(b"id: ")
        assert next(lines) == b"event: away"
        server.process.send_signal(signal.SIGTERM)
        # To its proper end: nothing is raised.
        assert not [line for line in lines if line.startswith(b"event:")]
    assert server.process.wait(PATIENCE_S) == 0
    assert "Traceback" not in server.log.read_text()


def test_viewers_that_left_make_room(server: HttpServer) -> None:
    def opened() -> requests.Response:
        return requests.get(f"{server.url}/admin/v1/events", stream=True, timeout=PATIENCE_S)

    # As many in each worker.
    viewers = []
    while (refused := opened()).status_code == 200:
        viewers.append(refused)
        assert len(viewers) < 100
    assert len(viewers) >= MOST_VIEWERS
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "10")
    # All else is answered meanwhile.
    assert requests.get(f"{server.url}/healthz", timeout=PATIENCE_S).ok
    for viewer in viewers:
        viewer.close()

    def is_let_in() -> bool:
        with opened() as again:
            return again.status_code == 200

    # They are missed when they are next sent something.
    until(is_let_in)
    assert "Traceback" not in server.log.read_text()
