"""The Open Inference Protocol over the real WSGI stack and a real socket: who may, what is refused; the device is a fake."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flask.testing
import numpy as np
import pytest
from trunkline import client, model, oip
from trunkline.admin import AdminConnection
from trunkline.client import Model
from trunkline.errors import InvalidInput, QueueFull, SidecarUnavailable, TrunklineError, Unauthorized
from trunkline.protocol import TensorSpec
from trunkline.signature import Signature
from werkzeug.test import Client

from sidecar.commands import LOOKS_ONLY
from sidecar.errors import BlobCorrupt
from sidecar.http.admin import create_app
from sidecar.http.callers import Callers, Room
from sidecar.http.oip import HEADER_LENGTH, add_open_inference
from sidecar.openinference import MOST_PARSED_BYTES
from sidecar.quotas import parse_quotas
from sidecar.store import Store
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, bundle_of, running_server
from tests.integration.test_session import offset_of
from tests.integration.test_tenancy import QUOTAS, text_of
from tests.waiting import PATIENCE_S

pytestmark = pytest.mark.usefixtures("nothing_leaks")

ROOT = Path(__file__).parents[2]
BODY_LIMIT_BYTES = 1 << 20
X = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
ADMINISTRATOR = {"Authorization": f"Bearer {ADMIN_TOKEN.decode()}"}
VISION = {"Authorization": "Bearer v1"}
SEARCH = {"Authorization": "Bearer s1"}


class Endpoint:
    """The routes before a running server. ``room`` bounds what may be under way."""

    def __init__(self, running: Running, folder: Path, room: Room | None = None) -> None:
        self.running = running
        self.callers = Callers(running.relay, kept_s=3600)
        self.admin = AdminConnection(running.path, ADMIN_TOKEN)
        self.app = create_app(self.admin, Store(folder / "store"))
        add_open_inference(self.app, self.admin, self.callers, room or Room(8, 1 << 30), body_limit_bytes=BODY_LIMIT_BYTES)
        self.unsent = self.app.wsgi_app
        self.app.wsgi_app = self._sent  # type: ignore[method-assign]
        self.http: flask.testing.FlaskClient = self.app.test_client()

    def _sent(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        """Take answers to their end, as a server does that sends them."""
        with contextlib.closing(self.unsent(environ, start_response)) as answer:  # type: ignore[type-var]
            return list(answer)

    def infer(self, name: str = "age", headers: dict[str, str] | None = None, **body: Any) -> Any:
        return self.http.post(f"/v2/models/{name}/infer", json={"inputs": [X]} | body, headers=headers)

    def close(self) -> None:
        self.callers.close()
        self.admin.close()


@contextlib.contextmanager
def endpoint(running: Running, folder: Path, room: Room | None = None) -> Iterator[Endpoint]:
    with contextlib.closing(Endpoint(running, folder, room)) as made:
        yield made


@pytest.fixture
def source(source: FakeSource) -> FakeSource:
    half = (TensorSpec("x", "float16", ("batch", 2)),)
    source.put(bundle_of("half", [b"\x01"], inputs=half, outputs=(TensorSpec("y", "float16", ("batch", 2)),)), [b"\x01"])
    source.broken["torn"] = BlobCorrupt("torn is torn at /var/secret")
    return source


@pytest.fixture
def open_one(tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """Of a sidecar without tenants."""
    with running_server(tmp_path, source) as running:
        monkeypatch.setenv("TRUNKLINE_SOCKET", running.path)
        with endpoint(running, tmp_path) as made:
            yield made
        client._pool.close()


@pytest.fixture
def tenanted(tmp_path: Path, source: FakeSource) -> Iterator[Endpoint]:
    """Of a sidecar that asks for tokens."""
    with (
        running_server(tmp_path, source, quotas=parse_quotas(text_of(QUOTAS), "quotas.toml")) as running,
        endpoint(running, tmp_path) as made,
    ):
        yield made


def refused(answer: Any, status: int, code: str, text: str = "") -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.mimetype == "application/json"
    told: dict[str, Any] = answer.json
    assert told["code"] == code
    assert isinstance(told["error"], str)
    assert re.search(text, told["error"]), told["error"]
    assert (answer.headers.get("Retry-After") is not None) is (status in (429, 503))
    assert "/var" not in answer.text
    assert "/tmp" not in answer.text
    return told


# --- what there is ----------------------------------------------------------------------------------------------------


def test_health_needs_no_token_and_tells_nothing(tenanted: Endpoint) -> None:
    assert tenanted.http.get("/v2/health/live").json == {"live": True}
    assert tenanted.http.get("/v2/health/ready").json == {"live": True, "ready": True}


def test_an_engine_that_drains_is_not_ready(tmp_path: Path) -> None:
    class Drains:
        def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
            assert name in LOOKS_ONLY
            return {"draining": True}

    app = create_app(Drains(), Store(tmp_path / "store"))
    add_open_inference(app, Drains(), Callers("none"), Room(1, 1), body_limit_bytes=1)
    answer = app.test_client().get("/v2/health/ready")
    assert (answer.status_code, answer.json) == (503, {"live": True, "ready": False})


def test_server_and_model_are_described(open_one: Endpoint) -> None:
    told = open_one.http.get("/v2").json
    assert told is not None
    assert told["name"] == "trunkline"
    assert "binary_tensor_data" in told["extensions"]
    for path in ("/v2/models/text", "/v2/models/text/versions/1"):
        told = open_one.http.get(path).json
        assert told is not None
        assert Signature.from_plain(oip.signature_of(told)) == model("text").signature
        assert told == {
            "parameters": told["parameters"],
            "name": "text",
            "versions": ["1"],
            "platform": "trunkline",
            "inputs": [{"name": "ids", "datatype": "INT64", "shape": [-1, -1]}],
            "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1, -1]}],
        }
        assert open_one.http.get(f"{path}/ready").json == {"name": "text", "ready": True}
        told = open_one.http.get(f"{path}/config").json
        assert told is not None
        assert told["input"] == [{"name": "ids", "data_type": "TYPE_INT64", "dims": [-1, -1]}]
    for rest in ("", "/ready", "/config", "/stats"):
        refused(open_one.http.get(f"/v2/models/text/versions/2{rest}"), 404, "unknown_model", "version")
        refused(open_one.http.get(f"/v2/models/none{rest}"), 404, "unknown_model")
    refused(open_one.http.get("/v2/models/UP"), 404, "unknown_model", "no model 'UP'")
    refused(open_one.http.get("/v2/models/a b"), 404, "unknown_model", "no model has such a name")


def test_a_model_that_is_damaged_is_not_ready(open_one: Endpoint) -> None:
    answer = open_one.http.get("/v2/models/torn/ready")
    assert (answer.status_code, answer.json) == (503, {"name": "torn", "ready": False})
    assert answer.headers["Retry-After"]
    found = {entry["name"]: entry for entry in open_one.http.post("/v2/repository/index").json or []}
    assert found["torn"]["state"] == "UNAVAILABLE"
    assert "/var" not in str(found)
    found = open_one.http.post("/v2/repository/index", json={"ready": True}).json
    assert [entry["name"] for entry in found or []] == ["age", "gender", "half", "pair", "text"]


def test_what_was_asked_is_counted(open_one: Endpoint) -> None:
    assert open_one.http.get("/v2/models/age/stats").json == {
        "model_stats": [{"name": "age", "version": "1", "last_inference": 0, "inference_count": 0}]
    }
    open_one.infer()
    told = open_one.http.get("/v2/models/age/versions/1/stats").json
    assert told is not None
    assert told["model_stats"][0]["inference_count"] == 1
    assert told["model_stats"][0]["last_inference"] > 1_600_000_000_000
    told = open_one.http.get("/v2/models/stats").json
    assert told is not None
    assert [entry["name"] for entry in told["model_stats"]] == ["age", "gender", "half", "pair", "text"]


def test_loading_is_the_administrators(open_one: Endpoint) -> None:
    for action in ("load", "unload"):
        path = f"/v2/repository/models/age/{action}"
        refused(open_one.http.post(path), 403, "forbidden", "administrator's token")
        assert open_one.http.post(path, headers=ADMINISTRATOR).json == {"name": "age", action: True}
        refused(open_one.http.post(path, json={"parameters": {"config": "x"}}, headers=ADMINISTRATOR), 400, "invalid_input")
        refused(open_one.http.post("/v2/repository/models/none/" + action, headers=ADMINISTRATOR), 404, "unknown_model")
    # What Triton's client sends.
    body = {"parameters": {"unload_dependents": False}}
    assert open_one.http.post("/v2/repository/models/age/unload", json=body, headers=ADMINISTRATOR).status_code == 200


def test_no_shared_memory_of_clients_is_mapped(open_one: Endpoint) -> None:
    for kind in ("systemsharedmemory", "cudasharedmemory"):
        assert open_one.http.get(f"/v2/{kind}/status").json == []
        for path in ("region/r/register", "region/r/unregister", "unregister"):
            refused(open_one.http.post(f"/v2/{kind}/{path}", json={}), 403, "forbidden", "cannot register shared memory")


# --- inference --------------------------------------------------------------------------------------------------------


def test_the_answer_is_the_sockets(open_one: Endpoint) -> None:
    x = np.array([[1.25, -2, 3]], np.float32)
    expected = model("pair")(x)
    assert isinstance(expected, dict)
    told = open_one.infer("pair", id="7", inputs=[X | {"data": x.tolist()}]).json
    assert told == {
        "model_name": "pair",
        "model_version": "1",
        "id": "7",
        "outputs": [
            {"name": name, "datatype": "FP32", "shape": [1, 3], "data": array.reshape(-1).tolist()}
            for name, array in expected.items()
        ],
    }
    told = open_one.infer("pair", outputs=[{"name": "z"}]).json
    assert [output["name"] for output in told["outputs"]] == ["z"]
    assert "id" not in told
    header = json.dumps(
        {
            "inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": 12}}],
            "outputs": [{"name": "z", "parameters": {"binary_data": True}}, {"name": "y"}],
        }
    ).encode()
    answer = open_one.http.post(
        "/v2/models/pair/versions/1/infer", data=header + x.tobytes(), headers={HEADER_LENGTH: str(len(header))}
    )
    assert answer.mimetype == "application/octet-stream"
    length = int(answer.headers[HEADER_LENGTH])
    assert answer.data[length:] == expected["z"].tobytes()
    told = json.loads(answer.data[:length])
    assert told["outputs"][0]["parameters"] == {"binary_data_size": 12}
    assert told["outputs"][1]["data"] == expected["y"].reshape(-1).tolist()


def test_one_output_and_fp16(open_one: Endpoint) -> None:
    assert open_one.infer().json["outputs"][0]["data"] == [1 + offset_of("age"), 2 + offset_of("age"), 3 + offset_of("age")]
    header = json.dumps(
        {
            "inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP16", "parameters": {"binary_data_size": 4}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    x = np.array([[1, 2]], np.float16)
    answer = open_one.http.post("/v2/models/half/infer", data=header + x.tobytes(), headers={HEADER_LENGTH: str(len(header))})
    assert answer.data[int(answer.headers[HEADER_LENGTH]) :] == (x + np.float16(1)).tobytes()


@pytest.mark.parametrize(
    ("body", "headers", "status", "code", "text"),
    [
        (b"{", {}, 400, "invalid_input", "the body: is not JSON"),
        (b"", {}, 400, "invalid_input", "the body: is not JSON"),
        (b"{}", {HEADER_LENGTH: "3"}, 400, "invalid_input", "from 1 to the body's 2 bytes"),
        (b"{}", {HEADER_LENGTH: "0"}, 400, "invalid_input", "from 1 to the body's 2 bytes"),
        (b"{} ", {HEADER_LENGTH: "2"}, 400, "invalid_input", "'inputs' is missing"),
        (json.dumps({"inputs": [X | {"datatype": "INT32"}]}).encode(), {}, 400, "signature_mismatch", "float32, got int32"),
        (json.dumps({"inputs": [X | {"datatype": "BYTES"}]}).encode(), {}, 400, "unsupported_tensor", "models here take numbers"),
        (json.dumps({"inputs": [X | {"shape": [1, 4]}]}).encode(), {}, 400, "signature_mismatch", "axis 1 must be 3"),
        (bytes(BODY_LIMIT_BYTES + 1), {}, 413, "body_too_large", "1048577 bytes, at most 1048576"),
        (b"{}", {"Content-Encoding": "gzip"}, 400, "invalid_input", "compressed"),
        (b"{}", {"Transfer-Encoding": "chunked"}, 400, "invalid_input", "chunks"),
        (b"{}", {"Origin": "http://evil"}, 400, "invalid_input", "web pages"),
        (b"{}", {"Authorization": "Basic eA=="}, 401, "unauthorized", "must be Bearer"),
        (b"{}", {"Authorization": "Bearer " + "x" * 65}, 401, "unauthorized", "at most 64"),
        (b"{}", {"Authorization": "Bearer x"}, 401, "unauthorized", "knows no such token"),
    ],
)
def test_bad_requests(open_one: Endpoint, body: bytes, headers: dict[str, str], status: int, code: str, text: str) -> None:
    answer = open_one.http.post("/v2/models/age/infer", data=body, headers=headers)
    refused(answer, status, code, text)
    assert (answer.headers.get("WWW-Authenticate") == "Bearer") is (status == 401)


def test_a_call_is_named_in_the_log(open_one: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, seen = open_one.running.engine.submit, list[str]()
    monkeypatch.setattr(open_one.running.engine, "submit", lambda work: (seen.append(work.call_id), submit(work)))
    for headers in ({}, {"X-Call-Id": "theirs"}):
        assert open_one.infer(id="mine", headers=headers).status_code == 200
    assert open_one.infer(id="\ud800").json["id"] == "\ud800"
    open_one.infer()
    assert seen == ["mine", "theirs", "?", ""]


def test_values_beyond_their_bounds(open_one: Endpoint) -> None:
    ids = {"name": "ids", "shape": [1, 1], "datatype": "INT64", "data": [100]}
    refused(open_one.infer("text", inputs=[ids]), 400, "value_out_of_bounds", "from 0 to 99")


def test_unknown_routes_and_methods(open_one: Endpoint) -> None:
    for path in ("/v2/", "/v2/nothing", "/v2/models/age/nothing", "/v2/models//ready", "/v2/models/a%2Fb/ready"):
        refused(open_one.http.get(path), 404, "not_found")
    answer = open_one.http.get("/v2/models/age/infer")
    refused(answer, 405, "method_not_allowed")
    assert answer.headers["Allow"] == "OPTIONS, POST"
    # Other paths keep their own shape.
    assert open_one.http.get("/v2x").json == {
        "error": {"code": "not_found", "message": "Not Found", "retryable": False, "details": {"status": 404}}
    }
    for path in ("/v2/repository/index", "/v2/repository/models/age/load"):
        refused(open_one.http.post(path, data=b"[]", headers=ADMINISTRATOR), 400, "invalid_input")
        refused(open_one.http.post(path, data=b"{" + b" " * 65536, headers=ADMINISTRATOR), 413, "body_too_large", "65537")
    refused(open_one.http.post("/v2/repository/index", json={"ready": 1}), 400, "invalid_input", "true or false")


def test_a_bug_shows_an_incident_and_no_trace(open_one: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("sidecar.openinference.encode", fail)
    told = refused(open_one.infer(), 500, "sidecar_fault", "incident")
    assert "secret" not in str(told)


class Stalls(io.BytesIO):
    """What is read of a client that says nothing for longer than is waited for."""

    def read(self, size: int | None = -1) -> bytes:
        raise BlockingIOError("the silence is over")


def test_a_body_that_ends_early_is_refused(open_one: Endpoint) -> None:
    for stream, told in ((io.BytesIO(b"{"), "ended after 1 of 100 bytes"), (Stalls(), "nothing came for long of a body of 100")):
        asked = {"CONTENT_LENGTH": "100", "wsgi.input": stream}
        answer = open_one.http.post("/v2/models/age/infer", environ_overrides=asked)
        refused(answer, 400, "invalid_input", told)


def test_a_deadline_travels(open_one: Endpoint) -> None:
    release = threading.Event()
    open_one.running.engine._post(lambda: release.wait(PATIENCE_S))  # type: ignore[arg-type, return-value]
    try:
        refused(open_one.infer(parameters={"timeout": 50_000}), 504, "deadline_exceeded")
        # So late that there was no time to ask.
        refused(open_one.infer(parameters={"timeout": 1}), 504, "deadline_exceeded")
    finally:
        release.set()


def test_an_engine_that_is_away(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as running:
        made = Endpoint(running, tmp_path)
    refused(made.infer(), 503, "sidecar_unavailable", "the engine does not answer")
    for path in ("/v2", "/v2/models/age", "/v2/models/age/ready", "/v2/models/stats", "/v2/systemsharedmemory/status"):
        refused(made.http.get(path), 503, "sidecar_unavailable")
    answer = made.http.get("/v2/health/ready")
    assert (answer.status_code, answer.json) == (503, {"live": True, "ready": False})
    assert answer.headers["Retry-After"] == "1"
    assert made.http.get("/v2/health/live").status_code == 200
    made.close()


# --- who may ----------------------------------------------------------------------------------------------------------


def test_without_a_token_nothing_but_health_is_told(tenanted: Endpoint) -> None:
    rules = [rule for rule in tenanted.app.url_map.iter_rules() if rule.rule.startswith("/v2") and "health" not in rule.rule]
    assert len(rules) > 15
    for rule in rules:
        path = re.sub(r"<any\((\w+)[^>]*>", r"\1", rule.rule).replace("<version>", "1")
        method = next(iter(rule.methods - {"HEAD", "OPTIONS"}))  # type: ignore[operator]
        for headers in ({}, {"Authorization": "Bearer wrong"}):
            answer = tenanted.http.open(re.sub(r"<\w+>", "age", path), method=method, headers=headers, data=b"{}")
            refused(answer, 401, "unauthorized")


def test_a_token_says_whose_the_request_is(tenanted: Endpoint) -> None:
    assert tenanted.infer(headers=VISION).json["outputs"][0]["data"][0] == 1 + offset_of("age")
    connections = {entry["name"]: entry["connections"] for entry in tenanted.admin.command("tenants")["tenants"]}
    assert connections == {"vision": 1, "search": 0}
    told = refused(tenanted.infer("text", headers=VISION), 404, "unknown_model", "that vision may use")
    assert told["error"] == refused(tenanted.infer("none", headers=VISION), 404, "unknown_model")["error"].replace(
        "none", "text", 1
    )
    names = {
        token: [entry["name"] for entry in tenanted.http.post("/v2/repository/index", headers=headers).json or []]
        for token, headers in (("v1", VISION), ("s1", SEARCH), ("admin", ADMINISTRATOR))
    }
    assert names["v1"] == ["age", "gender"]
    assert names["s1"] == ["age", "gender", "half", "pair", "text", "torn"]
    assert {"age@vision", "age@base"} < set(names["admin"])
    for headers in (VISION, SEARCH):
        refused(tenanted.http.get("/v2/models/stats", headers=headers), 403, "forbidden")
        refused(tenanted.http.post("/v2/repository/models/age/load", headers=headers), 403, "forbidden")
        refused(tenanted.http.get("/v2/models/age@base", headers=headers), 404, "unknown_model")


def test_the_administrator_names_the_domain(tenanted: Endpoint) -> None:
    assert tenanted.http.get("/v2/models/age@base", headers=ADMINISTRATOR).json["name"] == "age@base"  # type: ignore[index]
    assert tenanted.infer("age@base", headers=ADMINISTRATOR).json["outputs"][0]["data"][0] == 1 + offset_of("age")
    told = tenanted.http.get("/v2/models/age@base/stats", headers=ADMINISTRATOR).json
    assert told is not None
    assert told["model_stats"][0]["inference_count"] == 1
    load = "/v2/repository/models/age@base/load"
    assert tenanted.http.post(load, headers=ADMINISTRATOR).json == {"name": "age@base", "load": True}
    refused(tenanted.infer("age", headers=ADMINISTRATOR), 404, "unknown_model")


def test_what_a_caller_has_open_counts_as_its_tenants(tenanted: Endpoint) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            connection = stack.enter_context(tenanted.callers.pool(b"v1")).take(0, 0, float("inf"))
            stack.callback(connection.close)
        told = refused(tenanted.infer(headers=VISION), 429, "quota_exceeded", "its quota is 2")
        assert told["details"]["limit_count"] == 2


def test_a_token_that_does_not_count_any_more_is_forgotten(tenanted: Endpoint) -> None:
    assert tenanted.infer(headers=VISION).status_code == 200
    assert list(tenanted.callers._pools) == [b"v1"]
    done = threading.Event()
    tenanted.running.server.use_quotas(parse_quotas(text_of(QUOTAS.replace("TOKEN(v1), ", "")), "quotas.toml"), done.set)
    assert done.wait(PATIENCE_S)
    refused(tenanted.infer(headers=VISION), 401, "unauthorized")
    assert not tenanted.callers._pools


# --- sessions and room ------------------------------------------------------------------------------------------------


def greeting(**changed: object) -> dict[str, object]:
    return {"request_bytes": 12, "reply_bytes": 12, "timeout": 20_000_000} | changed


def test_a_greeting_opens_the_session_that_the_next_request_takes(tenanted: Endpoint) -> None:
    told = tenanted.http.get("/v2", query_string=greeting(model=["age", "text"]), headers=VISION).json
    assert told is not None
    assert oip.EXTENSION in told["extensions"]
    ((pool, _),) = tenanted.callers._pools.values()
    assert pool.connect_count == 1
    assert tenanted.infer(headers=VISION).status_code == 200
    assert pool.connect_count == 1


@pytest.mark.parametrize(
    ("changed", "status", "code"),
    [
        ({"timeout": ""}, 400, "invalid_input"),
        ({"request_bytes": "1e3"}, 400, "invalid_input"),
        ({"reply_bytes": -1}, 400, "invalid_input"),
        ({"reply_bytes": 2**41}, 400, "invalid_input"),
        ({"request_bytes": "9" * 5000}, 400, "invalid_input"),
        ({"model": ["age"] * 9}, 400, "invalid_input"),
        ({"model": ["../age"]}, 404, "unknown_model"),
        ({"request_bytes": 2**40}, 413, "arena_full"),
        ({"timeout": 0}, 504, "deadline_exceeded"),
    ],
)
def test_a_greeting_that_is_none_is_refused(tenanted: Endpoint, changed: dict[str, object], status: int, code: str) -> None:
    refused(tenanted.http.get("/v2", query_string=greeting(**changed), headers=VISION), status, code)
    assert not tenanted.callers._pools


def test_a_greeting_needs_a_token_and_room(tenanted: Endpoint, tmp_path: Path) -> None:
    refused(tenanted.http.get("/v2", query_string=greeting()), 401, "unauthorized")
    with endpoint(tenanted.running, tmp_path, Room(0, 1)) as full:
        refused(full.http.get("/v2", query_string=greeting(), headers=VISION), 503, "queue_full")


def test_several_models_are_asked_at_once(open_one: Endpoint) -> None:
    told = open_one.http.get("/v2/models/age+gender").json
    assert told is not None
    assert [output["name"] for output in told["outputs"]] == ["age/y", "gender/y"]
    answer = open_one.infer("age+gender").json
    assert [output["name"] for output in answer["outputs"]] == ["age/y", "gender/y"]
    refused(open_one.infer("age+none"), 404, "unknown_model")


def test_it_is_told_how_requests_came(open_one: Endpoint) -> None:
    model("age")(np.zeros((1, 3), np.float32))
    for name in ("age", "age+gender"):
        assert open_one.infer(name).status_code == 200
    asked = open_one.admin.command("connections")["asked"]
    assert asked == {"sealed": {"age": 1}, "http": {"age": 2, "gender": 1}}
    transports = [session["transport"] for session in open_one.admin.command("sessions")["sessions"]]
    # The function's, the one that the endpoint asks others' requests in, and its own as administrator.
    assert transports == ["sealed", "http", "sealed"]


def test_a_tenant_that_is_bound_to_the_uid_of_the_endpoint_is_not_let_in_either(tenanted: Endpoint) -> None:
    assert tenanted.infer(headers=VISION).status_code == 200
    bound = QUOTAS.replace("[tenants.vision]\n", f"[tenants.vision]\nuid = {os.getuid()}\n")
    assert bound != QUOTAS
    done = threading.Event()
    tenanted.running.server.use_quotas(parse_quotas(text_of(bound), "quotas.toml"), done.set)
    assert done.wait(PATIENCE_S)
    refused(tenanted.infer(headers=VISION), 401, "unauthorized")
    for path in ("/v2/models/age", "/v2/models/age/config", "/v2/models/age/ready"):
        refused(tenanted.http.get(path, headers=VISION), 401, "unauthorized")
    refused(tenanted.http.get("/v2", query_string=greeting(), headers=VISION), 401, "unauthorized")
    assert tenanted.infer(headers=SEARCH).status_code == 200


def test_who_goes_by_another_version_is_refused(open_one: Endpoint) -> None:
    for id in ("", model("age").signature.id):
        assert open_one.infer(parameters={oip.SIGNATURE_ID: id}).status_code == 200
    told = refused(open_one.infer(parameters={oip.SIGNATURE_ID: "other"}), 400, "signature_mismatch", "age is version 1 now")
    assert told["details"] == {"version": "1"}
    for odd in (7, "x" * 129):
        refused(open_one.infer(parameters={oip.SIGNATURE_ID: odd}), 400, "invalid_input", "must be a text")


def test_a_version_that_comes_in_the_middle_does_not_answer_who_goes_by_another(
    open_one: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, before = open_one.running, model("age").signature.id
    call = Model.call

    def replaced_meanwhile(asked: Model, *arguments: Any, **named: Any) -> Any:
        running.source.put(bundle_of("age", [b"other"], version="2"), [b"other"])
        open_one.admin.command("model_changed", {"name": "age"})
        return call(asked, *arguments, **named)

    monkeypatch.setattr(Model, "call", replaced_meanwhile)
    refused(open_one.infer(parameters={oip.SIGNATURE_ID: before}), 400, "signature_mismatch", "age is version 2 now")
    assert open_one.infer().status_code == 200


def test_what_a_model_takes_is_asked_for_once_and_again_when_it_may_be_otherwise(
    open_one: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    described: list[str] = []
    describe = Model._describe

    def counted(asked: Model, deadline: float) -> Signature:
        described.append(asked.name)
        return describe(asked, deadline)

    monkeypatch.setattr(Model, "_describe", counted)
    for _ in range(3):
        assert open_one.infer().status_code == 200
    assert described == ["age"]
    wide = (TensorSpec("x", "float32", ("batch", 4)),)
    open_one.running.source.put(bundle_of("age", [b"other"], inputs=wide, outputs=wide, version="2"), [b"other"])
    open_one.admin.command("model_changed", {"name": "age"})
    four = {**X, "shape": [1, 4], "data": [1, 2, 3, 4]}
    assert open_one.infer(inputs=[four]).status_code == 200
    refused(open_one.infer(), 400, "signature_mismatch")
    assert open_one.infer(inputs=[four]).status_code == 200
    # By its name alone it is asked for again where it might take what it did not; with a version each time.
    assert described == ["age"] * 3
    assert open_one.http.post("/v2/models/age/versions/2/infer", json={"inputs": [four]}).status_code == 200
    assert described == ["age"] * 4


def test_names_that_are_asked_for_take_no_memory_without_end(open_one: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.http.callers._MOST_MODELS", 3)
    for number in range(5):
        refused(open_one.infer(f"none{number}"), 404, "unknown_model")
    with open_one.callers.pool(b"") as pool:
        assert len(pool._found) <= 3


def test_sessions_of_few_tokens_are_kept(tenanted: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.http.callers._MOST_TOKENS", 2)
    for headers in (VISION, SEARCH, ADMINISTRATOR, {"Authorization": "Bearer wrong"}):
        tenanted.http.get("/v2/models/age", headers=headers)
    assert list(tenanted.callers._pools) == [b"s1", ADMIN_TOKEN]
    tenanted.http.get("/v2/models/age", headers=SEARCH)
    assert list(tenanted.callers._pools) == [ADMIN_TOKEN, b"s1"]


def test_sessions_that_nobody_uses_are_soon_another_workers(tenanted: Endpoint) -> None:
    path = tenanted.callers._path
    # As two workers: what the one keeps counts as the tenant's, and the other is refused until it is given up.
    callers = Callers(path, kept_s=0.01)
    with callers.pool(b"v1") as pool:
        pool.give(connection := pool.take(0, 0, float("inf")))
    while not connection.closed:
        time.sleep(0.001)
    assert not callers._pools
    # And again, by another thread.
    with callers.pool(b"v1") as pool:
        pool.give(connection := pool.take(0, 0, float("inf")))
    while not connection.closed:
        time.sleep(0.001)


def test_two_threads_of_one_token_keep_one_pool(tenanted: Endpoint) -> None:
    callers = tenanted.callers
    with callers.pool(b"v1") as first, callers.pool(b"v1") as second:
        assert first is not second
        for pool in (first, second):
            pool.give(pool.take(0, 0, float("inf")))
    assert [pool for pool, _ in callers._pools.values()] == [second]
    assert (first.address is None, second.address is None) == (True, False)
    with pytest.raises(Unauthorized), callers.pool(b"v1"):
        raise Unauthorized("not any more")
    assert second.address is None
    with callers.pool(b"v1"):
        pass
    assert not callers._pools


def test_room_is_shared_by_tokens() -> None:
    room = Room(4, 1000)
    full: Callable[[], Any] = lambda: pytest.raises(QueueFull, match="too many requests")  # noqa: E731
    with room.taken(b"a", 2000):
        with full() as caught, room.taken(b"a", 0):
            pass
        assert caught.value.details == {"limit_count": 2, "limit_bytes": 500}
        with full(), room.taken(b"b", 0):
            pass
    with room.taken(b"a", 400), room.taken(b"a", 100), room.taken(b"b", 100):
        with full(), room.taken(b"a", 0):
            pass
        with room.taken(b"c", 400), full(), room.taken(b"d", 0):
            pass
        with full(), room.taken(b"c", 401):
            pass
    assert not room._taken
    with pytest.raises(InvalidInput), room.taken(b"a", 1):
        raise InvalidInput("x")
    assert not room._taken


def test_a_request_beyond_the_room_is_told_to_come_again(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as running, endpoint(running, tmp_path, room := Room(2, 1 << 30)) as made:
        with room.taken(b"", 0):
            refused(made.infer(), 503, "queue_full", "1 may be")
            refused(made.http.get("/v2/models/age"), 503, "queue_full")
            assert made.http.get("/v2/health/ready").status_code == 200
        assert made.infer().status_code == 200


def test_an_answer_that_is_not_taken_has_its_part_of_the_room(tmp_path: Path, source: FakeSource) -> None:
    with running_server(tmp_path, source) as running, endpoint(running, tmp_path, room := Room(4, 1 << 30)) as made:
        waiting = [Client(made.unsent).post("/v2/models/age/infer", json={"inputs": [X]}) for _ in range(2)]
        assert [answer.status_code for answer in waiting] == [200, 200]
        refused(made.infer(), 503, "queue_full", "2 may be")
        body_bytes = len(json.dumps({"inputs": [X]}))
        assert {part.size_bytes - body_bytes * (1 + MOST_PARSED_BYTES) for part in room._taken} == {12}
        for answer in waiting:
            answer.close()
        assert made.infer().status_code == 200
        assert not room._taken


def test_answers_are_counted_with_their_requests() -> None:
    room = Room(4, 1000)
    with room.taken(b"a", 10) as part:
        part.take_more(480)
        with pytest.raises(QueueFull), room.taken(b"a", 11):
            pass
        with room.taken(b"a", 10):
            pass
    assert not room._taken


def test_every_route_is_documented(open_one: Endpoint) -> None:
    rules = {
        (method, re.sub(r"<(?:[^:>]+:)?(\w+)>", r"{\1}", rule.rule).replace("/versions/{version}", "[/versions/{version}]"))
        for rule in open_one.app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
        if rule.rule.startswith("/v2")
    }
    short = {(method, path.replace("[/versions/{version}]", "")) for method, path in rules if "[" in path}
    page = (ROOT / "docs" / "oip.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE)) == rules - short


def test_a_sidecar_that_is_not_there_is_told_without_its_address(tmp_path: Path) -> None:
    callers = Callers(str(tmp_path / "none.sock"))
    with pytest.raises(SidecarUnavailable), callers.pool(b"") as pool:
        pool.take(0, 0, float("inf"))
    assert not callers._pools
    assert issubclass(SidecarUnavailable, TrunklineError)
