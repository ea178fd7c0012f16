"""The OpenAPI document of the endpoint: all routes, what they take and what they answer, for tools that read such documents."""

from __future__ import annotations

import functools
import importlib.resources
from typing import Any

import yaml
from flask import Flask, Response, jsonify

from sidecar.http.access import READ, needs


@functools.cache
def document() -> dict[str, Any]:
    """Return the document. Read when it is first asked for: reading takes a fifth of a second."""
    found: dict[str, Any] = yaml.safe_load((importlib.resources.files("sidecar.http") / "openapi.yaml").read_text("utf-8"))
    return found


def add_openapi(app: Flask) -> None:
    """Serve the document at ``/openapi.json``."""

    @app.get("/openapi.json")
    @needs(READ)
    def openapi() -> Response:
        """Return what this endpoint has, as OpenAPI."""
        return jsonify(document())
