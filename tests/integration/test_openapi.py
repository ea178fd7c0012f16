"""The OpenAPI document against the endpoint: it is valid, has all routes and no others, and holds for made-up requests."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import schemathesis
from flask import Flask
from hypothesis import HealthCheck, assume, given, settings
from openapi_spec_validator import validate
from schemathesis import GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.schemas import BaseSchema
from trunkline.protocol import MAX_ARENA_BYTES

from sidecar.http.openapi import document
from tests.fakes import FakeSource, bundle_of, running_server
from tests.integration.test_oip import endpoint

_EXAMPLES = 15
# It ends when its viewer leaves; what it sends is looked at elsewhere.
_ENDLESS = ("GET", "/admin/v1/events")
# What has a deadline may be told that it has passed.
_WITH_DEADLINE = {
    ("GET", "/v2"),
    ("POST", "/v2/models/{name}/infer"),
    ("POST", "/v2/models/{name}/versions/{version}/infer"),
}
# What no schema tells of a request: that a device, a blob or a model is the one it says.
_BY_MEANING = {
    ("GET", "/admin/v1/blocks"),
    ("GET", "/admin/v1/graph"),
    ("GET", "/admin/v1/placement"),
    ("GET", "/admin/v1/leases"),
    ("GET", "/admin/v1/residency"),
    ("GET", "/admin/v1/trace"),
    ("GET", "/v2"),
    ("POST", "/admin/v1/evict"),
    ("POST", "/admin/v1/pull"),
    ("PUT", "/admin/v1/models/{name}/release"),
    ("POST", "/admin/v1/models/{name}/keep"),
    ("POST", "/admin/v1/models/{name}/{action}"),
    ("POST", "/admin/v1/models/{name}/place"),
    ("POST", "/admin/v1/quotas/reload"),
    ("POST", "/v2/models/{name}/infer"),
    ("POST", "/v2/models/{name}/versions/{version}/infer"),
    ("PUT", "/admin/v1/blobs/{digest}"),
    ("PUT", "/admin/v1/models/{name}"),
}
_PARAMETER = re.compile(r"<(?:[^:<>]+(?:\(.*?\))?:)?(\w+)>")


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flask]:
    """The endpoint before a server and an engine whose device is a fake; there are two models."""
    folder = tmp_path_factory.mktemp("openapi")
    source = FakeSource()
    source.put(bundle_of("adder", [b"\x01"]), [b"\x01"])
    with running_server(folder, source) as running, endpoint(running, folder) as made:
        yield made.app


@pytest.fixture(scope="module")
def api(app: Flask) -> BaseSchema:
    return schemathesis.openapi.from_wsgi("/openapi.json", app)


def _operations(*, only_with_data: bool = False) -> set[tuple[str, str]]:
    """Return method and path of what the document has; only those that take something, if it is said so."""
    return {
        (method.upper(), path)
        for path, item in document()["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
        and (not only_with_data or item.get("parameters") or operation.keys() & {"parameters", "requestBody"})
    }


def test_the_document_is_valid() -> None:
    validate(document())


def test_it_has_all_routes_and_no_others(app: Flask) -> None:
    served = {
        (method, _PARAMETER.sub(r"{\1}", rule.rule))
        for rule in app.url_map.iter_rules()
        for method in (rule.methods or set()) - {"HEAD", "OPTIONS"}
    }
    assert _operations() == served


def test_sizes_have_the_limits_that_the_wire_has() -> None:
    for name in ("RequestBytes", "ReplyBytes"):
        assert document()["components"]["parameters"][name]["schema"]["maximum"] == MAX_ARENA_BYTES


@pytest.mark.parametrize(("method", "path"), sorted(_operations() - {_ENDLESS}))
def test_what_it_says_holds(method: str, path: str, api: BaseSchema) -> None:
    """Requests that keep to the document are answered as it says; nothing fails inside."""
    _ask(api, method, path, GenerationMode.POSITIVE, ["positive_data_acceptance"] if (method, path) in _BY_MEANING else [])


@pytest.mark.parametrize(("method", "path"), sorted(_operations(only_with_data=True) - {_ENDLESS}))
def test_what_breaks_it_is_refused(method: str, path: str, api: BaseSchema) -> None:
    """Requests that do not keep to it are refused as it says."""
    _ask(api, method, path, GenerationMode.NEGATIVE, [])


def _ask(api: BaseSchema, method: str, path: str, mode: GenerationMode, unchecked: list[str]) -> None:
    has_deadline = (method, path) in _WITH_DEADLINE
    excluded = [CHECKS.get_one(name) for name in (*unchecked, *(["not_a_server_error"] if has_deadline else []))]

    @settings(max_examples=_EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=api[path][method].as_strategy(generation_mode=mode))
    def asked(case: schemathesis.Case) -> None:
        # What is at /v2/models/stats is no model, and a route of its own.
        assume((case.path_parameters or {}).get("name") != "stats")
        response = case.call_and_validate(excluded_checks=excluded)
        assert response.status_code < 500 or (has_deadline and response.status_code == 504)

    asked()
