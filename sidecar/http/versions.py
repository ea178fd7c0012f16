"""The admin endpoint's part for versions of models: what there is, which answer, and that one is removed.

The store is changed first and the engine told then, as when a model is pushed; whatever dies in between, an engine that is
started reads the store. Must not import torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from flask import Flask, Response, jsonify, request
from trunkline.errors import InvalidInput, UnknownModel

from sidecar.http.access import OPERATE, READ, needs
from sidecar.http.audit import note
from sidecar.http.engineclient import EngineClient
from sidecar.releases import Release, as_asked
from sidecar.tenants import unqualified
from sidecar.versions import Versions


class Body(Protocol):
    """Reads the body of a request as an object with these fields."""

    def __call__(self, required: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> dict[str, Any]: ...


def version_asked() -> tuple[str | None, bool]:
    """Return the version that a model is pushed as, None for none, and whether it is to answer. Raises InvalidInput."""
    # A misspelt one must not be taken for one that was left out.
    if unknown := request.args.keys() - {"version", "default"}:
        raise InvalidInput(f"{min(unknown)[:64]!r} says nothing of a model; what can be said is its version, and default")
    label, default = request.args.get("version"), request.args.get("default", "false")
    if default not in ("true", "false") or (label is None and default == "true"):
        raise InvalidInput("default must be true or false, and is for what is pushed as a version")
    return label, default == "true"


class Releasing:
    """Changes which versions answer, in the store and then in the engine."""

    def __init__(self, engine: EngineClient, versions: Versions) -> None:
        self._engine = engine
        self._versions = versions

    def pushed(self, name: str, label: str, is_default: bool) -> dict[str, object]:
        """Have a version answer that was pushed, if it is to, or nothing does yet; return which do."""
        if is_default or self._versions.is_unanswered(name):
            self.release(name, {"default": label}, load=is_default)
        return {"release": _plain(self._versions.release(name))}

    def release(self, name: str, asked: Mapping[str, Any], *, load: bool) -> None:
        """Have other versions answer for a name; with ``load``, once they are in memory. Raises TrunklineError."""
        stored = self._versions.checked(name, asked)
        deployed = self.deployed(stored)
        for each in set(stored) - {unqualified(known)[0] for known in deployed}:
            # Whoever pushed it was interrupted before the engine was told.
            self._engine.command("model_changed", {"name": each})
        for each in self.deployed(stored) if load else ():
            self._engine.command("load", {"name": each})
        self._versions.put_release(name, asked)
        self._engine.command("release", {"name": name})

    def deployed(self, stored: list[str]) -> dict[str, Any]:
        """Return what the engine tells of models of the store, by the names they are deployed under."""
        entries = self._engine.command("models")["models"]
        return {entry["name"]: entry for entry in entries if unqualified(entry["name"])[0] in stored}

    def check_unused(self, name: str, stored: str) -> None:
        """Raise InvalidInput while requests for a version wait or run."""
        told = self._engine.command("metrics")["devices"].values()
        counts = [
            device["waiting"].get(each, 0) + device["models"].get(each, {"leases": 0})["leases"]
            for each in self.deployed([stored])
            for device in told
        ]
        if count := sum(counts):
            raise InvalidInput(f"{stored} is in use by {count} requests; try again", requests=count)

    def removed(self, name: str, stored: list[str]) -> dict[str, Any]:
        """Tell the engine that a model is gone, with all it was stored as; return what is told of that."""
        self._engine.command("release", {"name": name})
        for each in stored:
            self._engine.command("model_removed", {"name": each})
        # Somebody may have pushed it meanwhile, and have told the engine before it was told this.
        for each in set(stored).intersection(self._versions.labels(name).values()):
            with contextlib.suppress(UnknownModel):
                self._engine.command("model_changed", {"name": each})
        return {"name": name}


def add_versions(app: Flask, releasing: Releasing, versions: Versions, checked: Callable[[str], str], body: Body) -> None:
    """Add the routes. ``checked`` returns the name of a model, or raises; ``body`` reads what is sent."""

    @app.get("/admin/v1/models/<name>/versions")
    @needs(READ)
    def list_versions(name: str) -> Response:
        """Return every version of a model, what it is deployed as, and which of them answer for its name."""
        labels, release = versions.labels(checked(name)), versions.release(name)
        if not labels:
            raise UnknownModel(f"the store holds no model {name!r}", model=name)
        deployed = releasing.deployed(list(labels.values()))
        weights = {} if release is None else release.weights
        listed = [
            {
                "version": label,
                "name": stored,
                "weight": weights.get(label, 0),
                "deployed": [entry for each, entry in deployed.items() if unqualified(each)[0] == stored],
            }
            for label, stored in labels.items()
        ]
        return jsonify(name=name, release=_plain(release), versions=listed)

    @app.put("/admin/v1/models/<name>/release")
    @needs(OPERATE)
    def release(name: str) -> Response:
        """Have one version answer for a name, or several by weight, at one stroke; answered when requests go by it."""
        asked = body(optional=("default", "split", "sticky", "load"))
        load = asked.pop("load", True)
        if not isinstance(load, bool):
            raise InvalidInput("load must be true or false")
        note(**as_asked(asked).to_plain())
        releasing.release(checked(name), asked, load=load)
        return jsonify(name=name, release=_plain(versions.release(name)))

    @app.delete("/admin/v1/models/<name>/versions/<version>")
    @needs(OPERATE)
    def delete_version(name: str, version: str) -> Response:
        """Remove a version that does not answer for its name and that no request uses."""
        body()
        stored = versions.stored_as(checked(name), version)
        releasing.check_unused(name, stored)
        versions.remove_version(name, version)
        releasing.removed(name, [stored])
        return jsonify(name=name, version=version)


def _plain(release: Release | None) -> dict[str, object] | None:
    return None if release is None else release.to_plain()
