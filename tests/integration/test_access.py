"""Who may ask what of the admin endpoint: every rule of the gate, on the real WSGI stack."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from flask import Flask, jsonify

from sidecar.admintokens import INFER
from sidecar.http.access import (
    _ATTEMPTS,
    LOOKING,
    MAX_BODY_BYTES,
    OPEN,
    OPERATE,
    READ,
    TENANT,
    Gate,
    Principal,
    needs,
    needs_of,
    principal,
)
from sidecar.http.admin import create_app
from sidecar.http.callers import Callers, Room
from sidecar.http.oip import add_open_inference
from sidecar.ratelimit import Bucket
from sidecar.store import Store

UNIX = {"REMOTE_ADDR": ""}
DOCS = Path(__file__).parents[2] / "docs"


class Engine:
    """Answers every command with the same document, and counts them."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        self.asked.append(name)
        if name == "identify":
            return {"name": "t", "domain": "t", "models": ["*"], "administrator": False}
        return {"engine": {}, "draining": False, "models": []}


class Known:
    """Tokens of a function and of two people."""

    def holder(self, token: bytes) -> Principal | None:
        known = {b"asks": Principal("resize", INFER), b"looks": Principal("ann", READ), b"changes": Principal("bob", OPERATE)}
        return known.get(token)


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def serve(engine: Engine, tmp_path: Path) -> Callable[..., flask.testing.FlaskClient]:
    def made(gate: Gate | None = None) -> flask.testing.FlaskClient:
        app = create_app(engine, Store(tmp_path / "store"), gate=gate)
        add_open_inference(app, engine, Callers(str(tmp_path / "none")), Room(4, 1 << 20), body_limit_bytes=1 << 20)

        @app.get("/me")
        @needs(READ)
        def me() -> Any:
            found = principal()
            return jsonify(found and list(found))

        return app.test_client()

    return made


def bearing(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def error_of(answer: Any) -> dict[str, Any]:
    found: dict[str, Any] = answer.json["error"]
    return found


def test_every_route_declares_what_it_needs(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    app = serve().application
    rules = list(app.url_map.iter_rules())
    declared = {rule.endpoint: needs_of(app, rule.endpoint) for rule in rules}
    assert [endpoint for endpoint, found in declared.items() if found is None] == []
    roles = [(rule, found.role) for rule in rules if (found := declared[rule.endpoint]) is not None]
    assert {rule.rule for rule, role in roles if role == OPEN} == {
        *("/healthz", "/readyz", "/"),
        *(rule.rule for rule in rules if rule.rule.startswith("/page/")),
    }
    assert {rule.rule for rule, role in roles if role == TENANT} == {rule.rule for rule in rules if rule.rule.startswith("/v2")}
    for rule, role in roles:
        if role not in (OPEN, TENANT):
            changes = not (rule.methods or set()) <= set(LOOKING)
            assert role == (OPERATE if changes else READ), rule


def documented(page: str, role_of: Callable[[str, str], str]) -> set[tuple[str, str, str]]:
    """Return method, path and role of the routes in a page's table; a part in brackets may be there or not."""
    found = set()
    for method, path, told in re.findall(r"^\| `([A-Z]+)` \| `([^`]+)` \| (.*) \|$", (DOCS / page).read_text(), re.MULTILINE):
        for each in {path.replace("[", "").replace("]", ""), re.sub(r"\[.*?\]", "", path)}:
            found.add((method, each, role_of(method, told)))
    return found


def test_every_route_is_documented_with_its_role_and_no_other_is(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    def role_of(method: str, told: str) -> str:
        """Return the role by the rule that the page gives, or the one that a row names."""
        said = re.match(r"Role `(\w+)`", told)
        return said[1] if said else READ if method == "GET" else OPERATE

    app = serve().application
    routes = {
        (method, re.sub(r"<(?:[^:>]+:)?(\w+)>", r"{\1}", rule.rule), found.role)
        for rule in app.url_map.iter_rules()
        if rule.rule != "/me" and (found := needs_of(app, rule.endpoint)) is not None
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert documented("admin.md", role_of) | documented("oip.md", lambda method, told: TENANT) == routes


@pytest.mark.parametrize("over", [{}, UNIX])
def test_a_route_without_a_role_is_closed(engine: Engine, tmp_path: Path, over: dict[str, str]) -> None:
    app = create_app(engine, Store(tmp_path / "store"))

    @app.get("/forgotten")
    def forgotten() -> str:
        raise AssertionError("nobody may come here")

    answer = app.test_client().get("/forgotten", environ_overrides=over)
    assert answer.status_code == 403
    assert error_of(answer)["code"] == "forbidden"


def test_the_socket_is_the_operators_whatever_else_counts(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    for gate in (Gate(), Gate(Known()), Gate(Known(), is_exposed=True)):
        http = serve(gate)
        assert http.get("/me", environ_overrides=UNIX, headers={"Host": "whatever"}).json == ["socket", OPERATE]
        assert http.post("/admin/v1/models/m/load", json={}, environ_overrides=UNIX).status_code == 200


def test_without_a_token_file_this_machine_may_do_all(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    http = serve()
    for host in ("localhost", "127.0.0.1:9470", "[::1]:9470"):
        assert http.get("/me", headers={"Host": host}).json == ["loopback", OPERATE]


@pytest.mark.row("T23")
@pytest.mark.parametrize("gate", [Gate(), Gate(Known())])
@pytest.mark.parametrize("path", ["/healthz", "/admin/v1/status", "/v2/health/live", "/nowhere"])
def test_a_name_that_was_rebound_to_this_machine_is_refused(
    serve: Callable[..., flask.testing.FlaskClient], gate: Gate, path: str
) -> None:
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", "10.0.0.1"):
        answer = serve(gate).get(path, headers={"Host": host, **bearing("changes")})
        assert answer.status_code == 400


def test_beyond_this_machine_any_name_will_do_with_a_token(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    http = serve(Gate(Known(), is_exposed=True))
    assert http.get("/me", headers={"Host": "node-7.example:9470", **bearing("looks")}).json == ["ann", READ]
    assert http.get("/healthz", headers={"Host": "node-7.example:9470"}).status_code == 200
    assert http.get("/me", headers={"Host": "node-7.example:9470"}).status_code == 401


def test_beyond_this_machine_tokens_must_count() -> None:
    with pytest.raises(AssertionError, match="tokens must count"):
        Gate(None, is_exposed=True)


@pytest.mark.parametrize(
    "headers", [{}, bearing("wrong"), {"Authorization": "Bearer"}, {"Authorization": "Basic bG9va3M6"}, bearing("x" * 65)]
)
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/admin/v1/status"),
        ("POST", "/admin/v1/models/m/load"),
        ("GET", "/metrics"),
        ("OPTIONS", "/admin/v1/status"),
        # What is wrong with a token is told first.
        ("GET", "/nowhere"),
        ("GET", "/admin/v1/store/gc"),
        ("POST", "/healthz"),
        ("GET", "/v2"),
        ("GET", "/v2/nowhere"),
        ("POST", "/v2/models/m/infer"),
    ],
)
def test_with_a_token_file_a_token_is_needed(
    serve: Callable[..., flask.testing.FlaskClient], engine: Engine, method: str, path: str, headers: dict[str, str]
) -> None:
    answer = serve(Gate(Known())).open(path, method=method, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json is not None
    assert "tmp" not in answer.text
    assert engine.asked == []


def test_health_is_told_without_one(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    http = serve(Gate(Known()))
    assert http.get("/healthz").json == {"status": "ok"}
    assert http.get("/readyz", headers=bearing("wrong")).json == {"status": "ok"}


def test_a_role_is_enough_or_not(serve: Callable[..., flask.testing.FlaskClient], engine: Engine) -> None:
    http = serve(Gate(Known()))
    for token, name in (("looks", ["ann", READ]), ("changes", ["bob", OPERATE])):
        assert http.get("/me", headers=bearing(token)).json == name
        assert http.get("/nowhere", headers=bearing(token)).status_code == 404
        assert http.get("/admin/v1/store/gc", headers=bearing(token)).status_code == 405
    for method, path in (
        ("POST", "/admin/v1/models/m/load"),
        ("DELETE", "/admin/v1/models/m"),
        ("PUT", f"/admin/v1/blobs/{'0' * 64}"),
    ):
        # Before anything of the body is looked at.
        answer = http.open(path, method=method, headers=bearing("looks"), data=b"{", content_type="text/plain")
        assert answer.status_code == 403
        assert error_of(answer)["details"] == {"role": "operate"}
    assert engine.asked == []
    assert http.post("/admin/v1/models/m/load", json={}, headers=bearing("changes")).status_code == 200
    assert engine.asked == ["load"]


def test_whoever_may_infer_may_nothing_else(serve: Callable[..., flask.testing.FlaskClient], engine: Engine) -> None:
    http = serve(Gate(Known()))
    assert http.get("/v2", headers=bearing("asks")).status_code == 200
    assert http.get("/healthz", headers=bearing("asks")).status_code == 200
    assert engine.asked == ["identify"]
    for path in ("/me", "/metrics", "/admin/v1/status", "/openapi.json", "/nowhere"):
        answer = http.get(path, headers=bearing("asks"))
        assert answer.status_code == 403
        assert error_of(answer)["details"] == {"role": "read"}
    answer = http.post("/admin/v1/models/m/load", json={}, headers=bearing("asks"))
    assert error_of(answer)["details"] == {"role": "operate"}
    assert "the token has infer" in error_of(answer)["message"]
    # Nothing of the page is for it: that is open to all, and empty to strangers.
    assert http.get("/", headers=bearing("asks")).data == http.get("/").data
    assert engine.asked == ["identify"]


def test_without_tenants_a_token_of_the_file_lets_infer(serve: Callable[..., flask.testing.FlaskClient], engine: Engine) -> None:
    http = serve(Gate(Known()))
    # The engine is not told of it: there, nobody needs a token.
    assert http.get("/v2", headers=bearing("looks")).json["name"] == "trunkline"
    assert engine.asked == ["identify"]
    assert http.get("/v2/health/live", headers=bearing("changes")).json == {"live": True}


def test_with_tenants_their_tokens_are_the_engines_to_know(
    serve: Callable[..., flask.testing.FlaskClient], engine: Engine
) -> None:
    http = serve(Gate(Known(), has_tenants=True))
    assert http.get("/v2", headers=bearing("a-tenants")).status_code == 200
    assert engine.asked == ["identify"]
    assert http.get("/v2").status_code == 401
    for path in ("/admin/v1/status", "/metrics", "/nowhere"):
        assert http.get(path, headers=bearing("a-tenants")).status_code == 401


@pytest.mark.row("T23")
def test_those_who_try_on_and_on_are_told_to_wait(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    http = serve(Gate(Known()))
    answers = [http.get("/me", headers=bearing(f"guess-{number}")) for number in range(2 * _ATTEMPTS)]
    assert {answer.status_code for answer in answers[:_ATTEMPTS]} == {401}
    assert answers[-1].status_code == 429
    assert int(answers[-1].headers["Retry-After"]) >= 1
    assert error_of(answers[-1])["retryable"] is True
    # Who has a token does not notice.
    assert http.get("/me", headers=bearing("looks")).status_code == 200
    assert http.get("/me", environ_overrides=UNIX).status_code == 200


def test_a_bucket_fills_again() -> None:
    now = [0.0]
    bucket = Bucket(2, 4.0, lambda: now[0])
    assert [bucket.take() for _ in range(3)] == [0, 0, 0.25]
    now[0] = 0.125
    assert bucket.take() == 0.125
    now[0] = 0.25
    assert [bucket.take(), bucket.take()] == [0, 0.25]
    now[0] = 100.0
    assert [bucket.take() for _ in range(3)] == [0, 0, 0.25]


PAGE = "http://localhost:9470"


@pytest.mark.row("T23")
@pytest.mark.parametrize(
    ("origin", "host", "over", "status"),
    [
        (PAGE, "localhost:9470", {}, 200),
        (PAGE, "localhost:9470", UNIX, 200),
        ("http://[::1]:9470", "[::1]:9470", {}, 200),
        # A port that need not be said is left out of both.
        ("http://localhost", "localhost", {}, 200),
        ("http://evil.example", "localhost:9470", {}, 400),
        ("http://localhost:9471", "localhost:9470", {}, 400),
        ("http://127.0.0.1:9470", "localhost:9470", {}, 400),
        ("https://localhost:9470", "localhost:9470", {}, 400),
        ("HTTP://LOCALHOST:9470", "localhost:9470", {}, 400),
        (f"{PAGE}/", "localhost:9470", {}, 400),
        ("null", "localhost:9470", {}, 400),
        ("", "localhost:9470", {}, 400),
        # A name that was rebound, over TCP and through whatever speaks to the socket.
        ("http://evil.example", "evil.example", {}, 400),
        ("http://evil.example", "evil.example", UNIX, 400),
    ],
)
def test_only_the_endpoints_own_page_may_change_something(
    serve: Callable[..., flask.testing.FlaskClient], engine: Engine, origin: str, host: str, over: dict[str, str], status: int
) -> None:
    answer = serve().post("/admin/v1/models/m/load", json={}, headers={"Origin": origin, "Host": host}, environ_overrides=over)
    assert answer.status_code == status
    assert engine.asked == (["load"] if status == 200 else [])


def test_beyond_this_machine_the_page_has_the_name_it_was_asked_by(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    http = serve(Gate(Known(), is_exposed=True))
    own = {"Host": "node-7.example:9470", "Origin": "http://node-7.example:9470"}
    assert http.post("/admin/v1/models/m/load", json={}, headers=own | bearing("changes")).status_code == 200
    assert http.post("/admin/v1/models/m/load", json={}, headers=own).status_code == 401
    others = own | bearing("changes") | {"Origin": "http://evil.example"}
    assert http.post("/admin/v1/models/m/load", json={}, headers=others).status_code == 400


def test_a_page_cannot_be_made_to_send_a_form(serve: Callable[..., flask.testing.FlaskClient], engine: Engine) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", None):
        answer = serve().post("/admin/v1/models/m/load", data=b"{}", content_type=kind, headers={"Origin": PAGE})
        assert answer.status_code == 400
    assert engine.asked == []


def test_a_view_of_ones_own_says_how_long_a_body_may_be(engine: Engine, tmp_path: Path) -> None:
    app = create_app(engine, Store(tmp_path / "store"))

    @app.post("/long")
    @needs(OPERATE, limit_bytes=2 * MAX_BODY_BYTES, mimetype="text/plain")
    def long() -> str:
        return str(len(flask.request.get_data()))

    http = app.test_client()
    for length, status in ((2 * MAX_BODY_BYTES, 200), (2 * MAX_BODY_BYTES + 1, 413)):
        assert http.post("/long", data=b"x" * length, content_type="text/plain").status_code == status
    assert http.post("/long", json={}).status_code == 400


def test_nothing_is_said_of_an_application_to_strangers(serve: Callable[..., flask.testing.FlaskClient], tmp_path: Path) -> None:
    http = serve(Gate(Known(), is_exposed=True))
    for answer in (http.get("/admin/v1/status"), http.get("/x"), http.post("/v2/models/m/infer", data=b"x")):
        assert answer.status_code == 401
        told = answer.text.lower()
        assert not any(word in told for word in ("trunkline", "flask", "gunicorn", str(tmp_path), "traceback", "ann", "bob"))


def test_the_gate_stands_before_any_application(serve: Callable[..., flask.testing.FlaskClient]) -> None:
    app: Flask = serve(Gate(Known())).application
    assert [each.__name__ for each in app.before_request_funcs[None]] == ["look", "check"]
