"""A row of the threat table: every route of the admin endpoint by every method, with every kind of credential, over real WSGI."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import flask.testing
import pytest
from flask import Flask
from trunkline.errors import Unauthorized
from werkzeug.exceptions import HTTPException

from sidecar.http.access import OPEN, OPERATE, READ, TENANT, Gate, needs_of
from sidecar.http.admin import create_app
from sidecar.http.callers import Callers, Room
from sidecar.http.oip import add_open_inference
from sidecar.ratelimit import Bucket
from sidecar.store import Store
from sidecar.tenants import Quotas, Tenant, hash_of
from tests.fakes import ADMIN_TOKEN, FakeSource, bundle_of, running_server
from tests.fault.matrix import Row
from tests.integration.test_access import Engine, Known, bearing

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND")
ELSEWHERE = ("/", "/nowhere", "/admin", "/admin/v1/../v1/status", "/admin/v1/models/..%2f..%2fetc", "/v2/nowhere", "/static/x")

# The role of who may be told what is no secret: health, which routes of tenants there are, that there is no shared memory here.
TOLD = "told"
NO_SECRET = re.compile(r"/v2/(health/.*|(system|cuda)sharedmemory/.*)")
# Routes of tenants that are for the administrator of functions alone.
ADMINISTRATOR = "administrator"
ADMINISTRATORS = re.compile(r"/v2/(models/(m/(versions/m/)?)?stats|repository/models/m/(un)?load)")

# Who asks, by what they have; and what that is enough for.
STRANGERS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "a token that nobody has": {"headers": bearing("wrong")},
    "a token in the address": {"query_string": {"token": "changes", "access_token": "changes"}},
    "a token as a cookie": {"headers": {"Cookie": "token=changes; Authorization=Bearer changes"}},
    "a token in another scheme": {"headers": {"Authorization": "Basic Y2hhbmdlczpjaGFuZ2Vz"}},
    "two tokens": {"headers": bearing("changes, Bearer changes")},
    "what a proxy may add": {"headers": {"X-Forwarded-For": "127.0.0.1", "X-Remote-User": "bob", "Forwarded": "for=127.0.0.1"}},
}
KNOWN: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "looks": ({"headers": bearing("looks")}, (READ,)),
    "changes": ({"headers": bearing("changes")}, (READ, OPERATE)),
    "tenant": ({"headers": bearing("tenants")}, (TENANT,)),
    # Of functions, which is nobody to the operators' routes.
    "administrator": ({"headers": bearing(ADMIN_TOKEN.decode())}, (TENANT, ADMINISTRATOR)),
}
WHO = {name: (how, ()) for name, how in STRANGERS.items()} | KNOWN


class Tenants(Engine):
    """Knows one tenant and the administrator, and refuses everybody else as the real one does."""

    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        found = super().command(name, arguments)
        if name != "identify":
            return found
        token_hash = (arguments or {}).get("token_hash")
        if token_hash not in (hash_of(b"tenants"), hash_of(ADMIN_TOKEN)):
            raise Unauthorized("no such token")
        return found | {"administrator": token_hash == hash_of(ADMIN_TOKEN)}


@pytest.fixture
def engine() -> Tenants:
    return Tenants()


@pytest.fixture
def app(engine: Tenants, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row) -> Iterator[Flask]:
    """Return the application. Operators' commands are the stand-in's; what tenants ask goes to a real server."""
    gate = Gate(Known(), has_tenants=True)
    # Strangers are told what is wrong, each time, instead of being told to wait.
    monkeypatch.setattr(gate, "_attempts", Bucket(1 << 30, 1.0))
    source = FakeSource()
    source.put(bundle_of("m", [b"m"]), [b"m"])
    known = Tenant(name="t", domain="t", token_hashes=(hash_of(b"tenants"),), models=("*",))
    with running_server(tmp_path, source, quotas=Quotas({known.name: known})) as running:
        callers = Callers(running.relay)
        made = create_app(engine, Store(tmp_path / "store"), gate=gate)
        add_open_inference(made, engine, callers, Room(4, 1 << 20), body_limit_bytes=1 << 20)
        yield made
        callers.close()


def paths(app: Flask) -> list[str]:
    """Return a path for every rule, and some that there are none for."""
    found = [re.sub(r"<any\((\w+).*?\):\w+>", r"\1", rule.rule) for rule in app.url_map.iter_rules()]
    found = [re.sub(r"<[^>]*digest>", "0" * 64, path) for path in found]
    return sorted({*(re.sub(r"<[^>]+>", "m", path) for path in found), *ELSEWHERE})


def role_of(app: Flask, path: str, method: str) -> str:
    """Return what a request needs: by its route, or, where there is none, what is needed to be told so.

    Below /v2 any token is enough for that: whose it is, only what asks the engine has to know.
    """
    try:
        endpoint, _ = app.url_map.bind("localhost").match(unquote(path), method=method)
    except HTTPException:
        return TOLD if path.startswith("/v2") else READ
    declared = needs_of(app, endpoint)
    assert declared is not None
    if declared.role == TENANT and (method == "OPTIONS" or NO_SECRET.fullmatch(path)):
        return TOLD
    return declared.role


@pytest.mark.row("T23")
@pytest.mark.parametrize("who", WHO)
def test_nobody_comes_further_than_their_credential(who: str, row: Row, app: Flask, engine: Tenants) -> None:
    how, enough_for = WHO[who]
    http: flask.testing.FlaskClient = app.test_client()
    for path in paths(app):
        for method in METHODS:
            row.attempts += 1
            engine.asked.clear()
            role = role_of(app, path, method)
            answer = http.open(path, method=method, **how)
            # Of a route that goes on for ever, the beginning is enough.
            answer.close()
            what = f"{method} {path} with {who}: {answer.status_code}, it needs {role}"
            if ADMINISTRATORS.fullmatch(path) and role == TENANT and enough_for == (TENANT,):
                assert answer.status_code == 403, what
                continue
            if role == OPEN or role in enough_for:
                row.wrong += answer.status_code in (401, 403)
                assert answer.status_code not in (401, 403), what
                continue
            denied = 403 if role == OPERATE and READ in enough_for else 401
            is_denied = role == TOLD or answer.status_code == denied
            is_quiet = set(engine.asked) <= ({"identify", "intake"} if path == "/v2/health/ready" else {"identify"})
            row.wrong += not (is_denied and is_quiet)
            assert is_denied, what
            assert is_quiet, f"{what}; the engine was asked for {engine.asked}"
            assert role != TOLD or "Bearer" in str(how) or answer.status_code == 401, what
