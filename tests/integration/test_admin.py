"""The admin endpoint and the command line: every route, every refusal, over the real WSGI stack."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from click.testing import CliRunner
from trunkline.errors import (
    ConnectionLost,
    DeadlineExceeded,
    MalformedFrame,
    SidecarUnavailable,
    TrunklineError,
    Unauthorized,
    UnknownModel,
)

from sidecar.admin_client import AdminClient
from sidecar.bundle import canonical_graph, manifest_bytes
from sidecar.cli.main import main
from sidecar.cli.printing import size
from sidecar.commands import LOOKS_ONLY
from sidecar.errors import ConfigError
from sidecar.http.access import MAX_BODY_BYTES
from sidecar.http.admin import admin_token, create_app
from sidecar.store import Store
from tests.bundles import adding_bundle, write_adding_bundle
from tests.sidecar_process import SidecarProcess, sidecar_process

CONTENT = b"x" * 3333
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class FakeEngine:
    """Records commands; answers with what a test put there."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, object]]] = []
        self.answers: dict[str, Any] = {"intake": {"draining": False}}

    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        self.asked.append((name, arguments or {}))
        answer = self.answers.get(name, {"name": (arguments or {}).get("name")})
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def http(engine: FakeEngine, store: Store) -> flask.testing.FlaskClient:
    return create_app(engine, store).test_client()


def put_blob(http: flask.testing.FlaskClient, digest: str, content: bytes, **headers: str) -> Any:
    return http.put(f"/admin/v1/blobs/{digest}", data=content, content_type="application/octet-stream", headers=headers)


def body_of(name: str = "m") -> tuple[dict[str, Any], dict[str, bytes]]:
    bundle, blobs = adding_bundle(name, [1.0, 2.0])
    return {"manifest": json.loads(manifest_bytes(bundle)), "graph": json.loads(canonical_graph(bundle.graph))}, blobs


def test_health_and_readiness(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    assert http.get("/healthz").json == {"status": "ok"}
    assert http.get("/readyz").status_code == 200
    for state in (
        {"draining": True},
        SidecarUnavailable("no sidecar listens at /tmp/secret"),
        DeadlineExceeded("too late"),
        Unauthorized("another sidecar's token"),
    ):
        engine.answers["intake"] = state
        answer = http.get("/readyz")
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert answer.json is not None
        assert answer.json["error"]["retryable"]
        assert "secret" not in answer.text
    assert http.get("/healthz").status_code == 200
    # A probe, which anybody may send, has nothing deployed, and no list of models made.
    assert {name for name, _ in engine.asked} <= LOOKS_ONLY


@pytest.mark.parametrize("kind", [SidecarUnavailable, ConnectionLost])
def test_an_engine_that_is_away_is_told_without_its_address(
    http: flask.testing.FlaskClient, engine: FakeEngine, kind: type[TrunklineError]
) -> None:
    engine.answers["memory"] = kind("no sidecar listens at /tmp/secret")
    answer = http.get("/admin/v1/memory")
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert "/tmp" not in answer.text


@pytest.mark.parametrize("route", ["status", "memory", "models", "queues"])
def test_reading_asks_the_engine(http: flask.testing.FlaskClient, engine: FakeEngine, route: str) -> None:
    assert http.get(f"/admin/v1/{route}").status_code == 200
    assert engine.asked[-1][0] == route


def test_blocks_come_in_pages(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    http.get("/admin/v1/graph")
    assert engine.asked[-1][0] == "graph"
    http.get("/admin/v1/blocks?offset=5&limit=99999")
    assert engine.asked[-1] == ("blocks", {"offset": 5, "limit": 1000})
    for bad in ("offset=-1", "limit=x", "limit=99999999999"):
        assert http.get(f"/admin/v1/blocks?{bad}").status_code == 400


def test_tenants_are_the_engines_business(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    engine.answers |= {"tenants": {"tenants": []}, "quotas_reload": {"tenant_count": 3}}
    assert http.get("/admin/v1/tenants").json == {"tenants": []}
    assert http.post("/admin/v1/quotas/reload", json={}).json == {"tenant_count": 3}
    engine.answers["quotas_reload"] = ConfigError("quotas.toml, line 3: tenants.a.wieght is no key", line=3, key="wieght")
    refused = http.post("/admin/v1/quotas/reload", json={})
    assert refused.status_code == 400
    assert refused.json is not None
    assert refused.json["error"]["details"] == {"line": 3, "key": "wieght"}
    assert http.post("/admin/v1/quotas/reload", json={"path": "/etc"}).status_code == 400


def test_a_trace_is_as_long_as_asked(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    http.get("/admin/v1/trace")
    assert engine.asked[-1] == ("trace", {"limit": 10_000})
    http.get("/admin/v1/trace?limit=3")
    assert engine.asked[-1] == ("trace", {"limit": 3})
    assert http.get("/admin/v1/trace?limit=10001").status_code == 400


@pytest.mark.parametrize("action", ["load", "unload", "evict", "pin", "unpin"])
def test_acting_asks_the_engine(http: flask.testing.FlaskClient, engine: FakeEngine, action: str) -> None:
    assert http.post(f"/admin/v1/models/m/{action}", json={}).json == {"name": "m"}
    assert engine.asked[-1] == (action, {"name": "m"})


def test_a_deployed_model_is_named_with_its_domain(http: flask.testing.FlaskClient, engine: FakeEngine, store: Store) -> None:
    for made in (
        http.get("/admin/v1/models/m@vision"),
        http.post("/admin/v1/models/m@vision/load", json={}),
        http.post("/admin/v1/models/m@vision/keep", json={"priority": 9}),
    ):
        assert made.json == {"name": "m@vision"}
    asked = len(engine.asked)
    for name in ("m@", "@vision", "m@a@b", "m@A"):
        refused = http.get(f"/admin/v1/models/{name}").json
        assert refused is not None
        assert refused["error"]["code"] == "unknown_model"
        assert "MODEL@DOMAIN" in refused["error"]["message"]
    # What is published is published for all.
    body, _ = body_of("m@vision")
    assert http.put("/admin/v1/models/m@vision", json=body).status_code == 404
    assert http.delete("/admin/v1/models/m@vision", json={}).status_code == 404
    assert len(engine.asked) == asked
    assert store.models() == []


def test_how_a_model_is_kept_is_told_to_the_engine(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    for body in ({"priority": 9}, {"keep_alive_s": None}, {"priority": 0, "keep_alive_s": 2.5}):
        assert http.post("/admin/v1/models/m/keep", json=body).json == {"name": "m"}
        assert engine.asked[-1] == ("keep", {"name": "m", **body})


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("{}", "priority and keep_alive_s: one of them, or both"),
        ('{"priority": 10}', "from 0 to 9"),
        ('{"priority": true}', "from 0 to 9"),
        ('{"keep_alive_s": -1}', "from 0 to 31536000"),
        ('{"keep_alive_s": 1%s}' % ("0" * 40), "from 0 to 31536000"),
        ('{"keep_alive_s": NaN}', "NaN is not allowed"),
        ('{"name": "other"}', "unknown field 'name'"),
    ],
)
def test_a_bad_way_to_keep_a_model_does_not_reach_the_engine(
    http: flask.testing.FlaskClient, engine: FakeEngine, body: str, problem: str
) -> None:
    answer = http.post("/admin/v1/models/m/keep", data=body, content_type="application/json")
    assert answer.status_code == 400
    assert answer.json is not None
    assert problem in answer.json["error"]["message"]
    assert engine.asked == []


def test_where_a_model_may_be_is_told_to_the_engine(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    for body in ({"allow": ["cpu:0"]}, {"forbid": []}, {"allow": [], "forbid": ["cuda:0"]}):
        assert http.post("/admin/v1/models/m/place", json=body).json == {"name": "m"}
        assert engine.asked[-1] == ("place", {"name": "m", **body})
    engine.answers["placement"] = {"devices": {}, "models": []}
    assert http.get("/admin/v1/placement").json == {"devices": {}, "models": []}


@pytest.mark.parametrize("body", ["{}", '{"allow": "cpu:0"}', '{"forbid": [1%s]}' % ("0" * 40), '{"name": "other"}', "[]"])
def test_a_bad_place_does_not_reach_the_engine(http: flask.testing.FlaskClient, engine: FakeEngine, body: str) -> None:
    assert http.post("/admin/v1/models/m/place", data=body, content_type="application/json").status_code == 400
    assert engine.asked == []


@pytest.mark.parametrize("name", ["blocks", "graph", "trace"])
def test_one_device_can_be_asked(http: flask.testing.FlaskClient, engine: FakeEngine, name: str) -> None:
    http.get(f"/admin/v1/{name}?device=cpu:1")
    assert engine.asked[-1][1]["device"] == "cpu:1"
    http.get(f"/admin/v1/{name}")
    assert "device" not in engine.asked[-1][1]


def test_a_model_is_pushed_and_removed(http: flask.testing.FlaskClient, engine: FakeEngine, store: Store) -> None:
    body, blobs = body_of()
    (digest,) = blobs
    assert http.put("/admin/v1/models/m", json=body).json["error"]["code"] == "blob_missing"
    assert http.post("/admin/v1/blobs/missing", json={"digests": [digest]}).json == {"missing": [digest]}
    assert put_blob(http, digest, blobs[digest]).status_code == 201
    assert put_blob(http, digest, blobs[digest]).json["stored"] is False
    assert http.post("/admin/v1/blobs/missing", json={"digests": [digest]}).json == {"missing": []}
    assert http.put("/admin/v1/models/m", json=body).status_code == 201
    assert engine.asked[-1] == ("model_changed", {"name": "m"})
    assert store.models() == ["m"]
    assert http.get("/admin/v1/models/m").status_code == 200
    assert http.delete("/admin/v1/models/m", json={}).status_code == 200
    assert engine.asked[-1] == ("model_removed", {"name": "m"})
    assert http.delete("/admin/v1/models/m", json={}).status_code == 404


def test_upkeep_of_the_store(http: flask.testing.FlaskClient) -> None:
    put_blob(http, DIGEST, CONTENT)
    assert http.post("/admin/v1/store/verify", json={}).json["blob_count"] == 1
    assert http.post("/admin/v1/store/gc", json={"dry_run": True}).json["count"] == 0
    assert http.post("/admin/v1/store/gc", json={"dry_run": 1}).status_code == 400


@pytest.mark.parametrize(
    ("method", "path", "arguments", "status", "code"),
    [
        ("GET", "/nowhere", {}, 404, "not_found"),
        ("GET", "/admin/v1/store/gc", {}, 405, "method_not_allowed"),
        ("GET", "/admin/v1//status", {}, 404, "not_found"),
        ("GET", "/admin/v1/status/", {}, 404, "not_found"),
        ("GET", "/static/x", {}, 404, "not_found"),
        ("POST", "/admin/v1/models/m/reboot", {"json": {}}, 404, "not_found"),
        ("POST", "/admin/v1/models/m/load", {"json": {"force": True}}, 400, "invalid_input"),
        ("POST", "/admin/v1/models/m/load", {"data": "{", "content_type": "application/json"}, 400, "invalid_input"),
        ("DELETE", "/admin/v1/models/m", {"json": {"gc": True}}, 400, "invalid_input"),
        ("POST", "/admin/v1/store/gc", {"json": {"dryrun": True}}, 400, "invalid_input"),
        ("POST", "/admin/v1/store/verify", {"json": {"x": 1}}, 400, "invalid_input"),
        ("POST", "/admin/v1/evict", {"json": {"bytes": 1, "device": "\ud800"}}, 400, "invalid_input"),
        ("POST", "/admin/v1/blobs/missing", {"json": {"digests": [], "x": 1}}, 400, "invalid_input"),
        ("GET", "/admin/v1/models/..%2f..%2fetc", {}, 404, "not_found"),
        ("GET", "/admin/v1/models/A..b", {}, 404, "unknown_model"),
        ("POST", "/admin/v1/models/m/load", {}, 400, "invalid_input"),
        ("POST", "/admin/v1/models/m/load", {"data": "x=1", "content_type": "text/plain"}, 400, "invalid_input"),
        ("POST", "/admin/v1/models/m/load", {"json": {}, "headers": {"Origin": "http://evil"}}, 400, "invalid_input"),
        ("DELETE", "/admin/v1/models/m", {}, 400, "invalid_input"),
        ("GET", "/healthz", {"headers": {"Host": "evil.example"}}, 400, "invalid_input"),
        ("PUT", "/admin/v1/models/m", {"data": "{", "content_type": "application/json"}, 400, "invalid_input"),
        ("PUT", "/admin/v1/models/m", {"data": "[" * 9999, "content_type": "application/json"}, 400, "invalid_input"),
        ("PUT", "/admin/v1/models/m", {"json": []}, 400, "invalid_input"),
        ("PUT", "/admin/v1/models/m", {"json": {"manifest": {}}}, 400, "invalid_input"),
        ("PUT", "/admin/v1/models/m", {"json": {"manifest": {"name": "other"}, "graph": {}}}, 422, "bundle_error"),
        ("PUT", "/admin/v1/models/m", {"json": {"manifest": {"name": "m"}, "graph": {}}}, 422, "bundle_error"),
        ("POST", "/admin/v1/blobs/missing", {"json": {"digests": ["../x"]}}, 400, "invalid_input"),
        ("POST", "/admin/v1/blobs/missing", {"json": {"digests": "x" * MAX_BODY_BYTES}}, 413, "body_too_large"),
        ("PUT", "/admin/v1/blobs/xyz", {"content_type": "application/octet-stream"}, 400, "invalid_input"),
        (
            "PUT",
            f"/admin/v1/blobs/{DIGEST}",
            {"content_type": "application/octet-stream", "data": b"no"},
            422,
            "blob_corrupt",
        ),
    ],
)
def test_refusals_have_one_shape(
    http: flask.testing.FlaskClient, method: str, path: str, arguments: dict[str, Any], status: int, code: str
) -> None:
    answer = http.open(path, method=method, **arguments)
    assert answer.status_code == status
    assert answer.json is not None
    error = answer.json["error"]
    assert error["code"] == code
    assert sorted(error) == ["code", "details", "message", "retryable"]
    assert "/tmp" not in answer.text


def test_the_page_that_is_served_here_may_ask(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    path = "/admin/v1/models/m/load"
    for base in ("http://localhost:9470", "https://localhost"):
        assert http.post(path, json={}, base_url=base, headers={"Origin": base}).status_code == 200
        for other in ("http://localhost", "http://localhost:9471", "null", "http://localhost:9470.evil"):
            engine.asked.clear()
            answer = http.post(path, json={}, base_url=base, headers={"Origin": other})
            assert answer.status_code == 400
            assert not engine.asked


def test_a_wrong_method_is_told_the_right_ones(http: flask.testing.FlaskClient) -> None:
    assert http.get("/admin/v1/store/gc").headers["Allow"] == "OPTIONS, POST"


def test_a_blob_beyond_the_limit_is_refused_before_it_is_read(engine: FakeEngine, store: Store) -> None:
    class Unread:
        def read(self, size: int = -1) -> bytes:
            raise AssertionError("nothing should be read")

    http = create_app(engine, store, blob_limit_bytes=len(CONTENT) - 1).test_client()
    answer = http.put(
        f"/admin/v1/blobs/{DIGEST}",
        content_type="application/octet-stream",
        environ_overrides={"wsgi.input": Unread(), "CONTENT_LENGTH": str(len(CONTENT))},
    )
    assert answer.status_code == 413
    assert answer.json is not None
    assert answer.json["error"]["details"] == {"limit_bytes": len(CONTENT) - 1}


def test_a_blob_of_unknown_length_is_refused(http: flask.testing.FlaskClient) -> None:
    answer = http.put(
        f"/admin/v1/blobs/{DIGEST}",
        content_type="application/octet-stream",
        headers={"Transfer-Encoding": "chunked"},
        environ_overrides={"wsgi.input_terminated": True},
    )
    assert answer.status_code in (400, 422)


def test_a_bug_shows_an_incident_and_no_trace(http: flask.testing.FlaskClient, engine: FakeEngine) -> None:
    engine.answers["status"] = ZeroDivisionError("secret")
    answer = http.get("/admin/v1/status")
    assert answer.status_code == 500
    assert "incident" in answer.text
    assert "secret" not in answer.text


def test_a_missing_token_is_told(tmp_path: Path) -> None:
    with pytest.raises(TrunklineError, match="token cannot be read"):
        admin_token(str(tmp_path / "none"))


# --- the command line against a real sidecar --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    with sidecar_process(tmp_path_factory.mktemp("sidecar")) as running:
        yield running


def cli(sidecar: SidecarProcess, *words: str) -> Any:
    return CliRunner().invoke(main, ["--admin", sidecar.admin.address, *words])


def test_the_life_of_a_model(sidecar: SidecarProcess, tmp_path: Path) -> None:
    write_adding_bundle(tmp_path / "adder", "adder", [1.0] * 1000)
    first = cli(sidecar, "push", str(tmp_path / "adder"))
    assert first.exit_code == 0, first.output
    assert "adder: sent 1 of 1 blobs, 4.0 kB of 4.0 kB" in first.output
    assert "adder: sent 0 of 1 blobs" in cli(sidecar, "push", str(tmp_path / "adder")).output
    assert json.loads(cli(sidecar, "model", "ls", "--json").output)[0]["state"] == "stored"
    assert "adder: resident" in cli(sidecar, "model", "load", "adder").output
    assert "resident" in cli(sidecar, "model", "ls").output
    assert "input x: float32 [batch, 1000]" in cli(sidecar, "model", "show", "adder").output
    assert json.loads(cli(sidecar, "model", "show", "adder", "--json").output)["weight_count"] == 1
    assert "runs in 1 stages, " in cli(sidecar, "model", "show", "adder").output
    assert "pinned" in cli(sidecar, "model", "pin", "adder").output
    assert cli(sidecar, "model", "evict", "adder").exit_code == 1
    assert cli(sidecar, "model", "unpin", "adder").exit_code == 0
    kept = cli(sidecar, "model", "keep", "adder", "--priority", "7", "--keep-alive", "3600")
    assert kept.output == "adder: priority 7, kept for 3600 s without a request\n"
    assert cli(sidecar, "model", "keep", "adder", "--keep-alive", "forever").exit_code == 0
    assert "priority 7, kept as long as there is room" in cli(sidecar, "model", "show", "adder").output
    assert "stored" in cli(sidecar, "model", "unload", "adder").output
    status = cli(sidecar, "status")
    assert status.exit_code == 0, status.output
    assert "serving on cpu" in status.output
    assert json.loads(cli(sidecar, "status", "--json").output)["engine"]["draining"] is False
    assert "0 corrupt" in cli(sidecar, "store", "verify").output
    assert "removed" in cli(sidecar, "model", "rm", "adder").output
    assert "to remove" in cli(sidecar, "store", "gc", "--dry-run").output
    gone = cli(sidecar, "model", "show", "adder")
    assert gone.exit_code == 1
    assert gone.stderr.startswith("error: unknown_model: ")


def test_a_flipped_bit_on_disk_fails_verification(sidecar: SidecarProcess, tmp_path: Path) -> None:
    bundle = write_adding_bundle(tmp_path / "rotten", "rotten", [2.0] * 1000)
    cli(sidecar, "push", str(tmp_path / "rotten"))
    digest = bundle.graph.weights[0].digest
    path = sidecar.store_dir / "blobs" / digest[:2] / digest
    path.write_bytes(b"!" + path.read_bytes()[1:])
    assert cli(sidecar, "store", "verify").exit_code == 1
    loaded = cli(sidecar, "model", "load", "rotten")
    assert loaded.exit_code == 1
    assert "model_corrupt" in loaded.stderr
    assert cli(sidecar, "model", "rm", "rotten").exit_code == 0


def test_a_damaged_folder_is_not_pushed(sidecar: SidecarProcess, tmp_path: Path) -> None:
    folder = tmp_path / "bad"
    bundle = write_adding_bundle(folder, "bad", [3.0])
    (folder / "blobs" / bundle.graph.weights[0].digest).write_bytes(b"short")
    refused = cli(sidecar, "push", str(folder))
    assert refused.exit_code == 1
    assert "bundle_error" in refused.stderr


def test_no_sidecar_has_an_exit_code_of_its_own(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--admin", f"unix:{tmp_path}/none.sock", "status"])
    assert result.exit_code == 3
    assert "trunkline serve" in result.stderr


def test_the_address_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key, value, expected in (
        ("TRUNKLINE_ADMIN", "http://127.0.0.1:1", "http://127.0.0.1:1"),
        ("TRUNKLINE_RUN_DIR", str(tmp_path), f"unix:{tmp_path}/admin.sock"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(key, value)
            assert expected in CliRunner().invoke(main, ["status"]).stderr
    assert CliRunner().invoke(main, ["status"]).exit_code == 3


def test_bad_settings_end_serve_with_the_reason() -> None:
    result = CliRunner().invoke(main, ["serve", "--queue-limit", "none"])
    assert result.exit_code == 1
    assert "--queue-limit is 'none'; it must be an integer from 1" in result.stderr


def test_an_answer_that_is_not_the_sidecars_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Strange:
        status_code = 500
        body: Any = None

        def json(self) -> Any:
            if self.body is None:
                raise ValueError
            return self.body

    strange = Strange()
    client = AdminClient("http://127.0.0.1:1")
    monkeypatch.setattr(client._session, "request", lambda *a, **k: strange)
    with pytest.raises(MalformedFrame, match="without JSON"):
        client.get("status")
    strange.body = {"unexpected": 1}
    with pytest.raises(MalformedFrame, match="without saying why"):
        client.get("status")
    strange.body = {"error": {"code": "unknown_model", "message": "x", "details": {}}}
    with pytest.raises(UnknownModel):
        client.get("status")


def test_sizes_are_shown_as_people_read_them() -> None:
    assert [size(value) for value in (0, 999, 1500, 2_500_000, 3e9, 5e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "3.0 GB",
        "5000.0 GB",
    ]
