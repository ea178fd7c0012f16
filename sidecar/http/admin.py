"""The admin endpoint: what operators and the command line ask of a sidecar, as JSON over HTTP.

A client of the engine like any other: it runs in processes of its own and may die without a function noticing. Weights are
pushed straight into the store, which is safe for several processes; the engine is told when a model is whole. Every
request passes ``sidecar.http.access`` first, and every failure leaves through ``failures.answered``: no path, no trace. Keeps no
state between requests, so any thread may serve one. Must not import torch.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from flask import Flask, Response, jsonify, request
from trunkline.errors import (
    InvalidInput,
    TrunklineError,
    UnknownModel,
)

from sidecar import failures, loglevels
from sidecar.bundle import MODEL_NAME
from sidecar.constraints import check as check_constraint
from sidecar.errors import BundleError, NotQuarantined
from sidecar.http.access import OPEN, OPERATE, READ, Gate, needs
from sidecar.http.audit import Audit, note
from sidecar.http.engineclient import EngineClient, check_ready
from sidecar.http.events import Feed
from sidecar.http.jobs import Command, LongWork, add_jobs
from sidecar.http.metrics import CONTENT_TYPE, Listed, SpanCounts, exposition
from sidecar.http.openapi import add_openapi
from sidecar.http.page import add_page
from sidecar.http.versions import Releasing, add_versions, version_asked
from sidecar.http.watch import Watcher
from sidecar.jobs import Jobs, Watch
from sidecar.keeping import Keep
from sidecar.origins import Policy
from sidecar.store import DIGEST, Store
from sidecar.strictjson import encode_json, load_json, members
from sidecar.tenants import DEPLOYED_NAME
from sidecar.versions import Versions, Vet

log = logging.getLogger("trunkline.admin")

MAX_MODEL_BYTES = 80 << 20
MAX_BLOB_BYTES = 64 << 30
MOST_FREE_BYTES = 2**50
_CHUNK_BYTES = 1 << 20
# While it waits for the engine to have answered all, it looks so often; and no longer than that.
_DRAIN_LOOK_S = 0.05
_LONGEST_DRAIN_S = 600
_KIND_ID = re.compile("[0-9a-f]{16}")


def create_app(
    engine: EngineClient,
    store: Store,
    *,
    blob_limit_bytes: int = MAX_BLOB_BYTES,
    scraped: EngineClient | None = None,
    patient: EngineClient | None = None,
    gate: Gate | None = None,
    jobs: Jobs | None = None,
    policy: Policy | None = None,
    spans: SpanCounts | None = None,
    vet: Vet | None = None,
    listed: Listed | None = None,
) -> Flask:
    """Return the endpoint's WSGI application. Blobs longer than ``blob_limit_bytes`` are refused before they are read.

    ``scraped`` is the engine as metrics and the page ask it, by a client that gives up before whoever looks does; ``patient`` as
    jobs do, by one that does not. ``gate`` lets requests in; by default, those from this machine. ``jobs`` are kept in the folder
    of the store unless it says where. ``policy`` says from where models may be pulled: from nowhere, unless it does. ``spans``
    counts those of this process, where requests are traced. ``vet`` looks at the files of bundles before anybody else does.
    ``listed`` returns what has come of models that are pulled ahead, where some are.
    """
    app = Flask("trunkline", static_folder=None)
    app.json.sort_keys = False  # type: ignore[attr-defined]
    # A path with an empty part is no other path's, and nothing here redirects.
    app.url_map.merge_slashes = False
    # Made before workers are forked, which have it in common.
    level = loglevels.SharedLevel()
    app.before_request(level.look)
    gate = gate or Gate()
    app.before_request(gate.check)
    app.after_request(Audit().record)
    app.register_error_handler(Exception, failures.answered)
    add_openapi(app)
    long_work = LongWork(jobs or Jobs(store.root / "jobs"), engine.command, (patient or engine).command)
    add_jobs(app, long_work, store, policy or Policy(), _json_object, vet)
    versions = Versions(store) if vet is None else Versions(store, vet)
    releasing = Releasing(engine, versions)
    add_versions(app, releasing, versions, _name, _json_object)

    @app.get("/healthz")
    @needs(OPEN)
    def healthz() -> Response:
        """Say that the HTTP server is alive."""
        return jsonify(status="ok")

    @app.get("/readyz")
    @needs(OPEN)
    def readyz() -> Response:
        """Say whether the engine answers and takes work."""
        check_ready(engine)
        return jsonify(status="ok")

    scrape = exposition((scraped or engine).command, spans, listed)

    @app.get("/metrics")
    @needs(READ)
    def metrics() -> Response:
        """Return all that is counted, as Prometheus reads it; that the engine is away is told there, too."""
        return Response(scrape(), content_type=CONTENT_TYPE)

    @app.get("/admin/v1/status")
    @needs(READ)
    def status() -> Response:
        """Return engine, memory, models and counters."""
        return jsonify(engine.command("status"))

    @app.get("/admin/v1/memory")
    @needs(READ)
    def memory() -> Response:
        """Return the budget and what of it is used, shared and pinned."""
        return jsonify(engine.command("memory"))

    @app.get("/admin/v1/blocks")
    @needs(READ)
    def blocks() -> Response:
        """Return the units of sharing, ``offset`` and ``limit`` (at most 1000) of them."""
        return jsonify(engine.command("blocks", _page() | _device()))

    @app.get("/admin/v1/queues")
    @needs(READ)
    def queues() -> Response:
        """Return for each tenant how many requests wait and run, and how long one more would wait: what to scale on."""
        return jsonify(engine.command("queues"))

    @app.get("/admin/v1/trace")
    @needs(READ)
    def trace() -> Response:
        """Return the latest leases, at most ``limit`` (10,000), and the models in them: who was asked for when, and its cost."""
        return jsonify(engine.command("trace", {"limit": _number("limit", 10_000, 10_000)} | _device()))

    @app.get("/admin/v1/graph")
    @needs(READ)
    def graph() -> Response:
        """Return the fused DAG: every block once, the block it follows, and the models that run through it."""
        return jsonify(engine.command("graph", _device()))

    @app.get("/admin/v1/models")
    @needs(READ)
    def models() -> Response:
        """Return every model with its state and bytes."""
        return jsonify(engine.command("models"))

    @app.get("/admin/v1/models/<name>")
    @needs(READ)
    def model(name: str) -> Response:
        """Return one model with its signature."""
        return jsonify(engine.command("model", {"name": _deployed_name(name)}))

    @app.put("/admin/v1/models/<name>")
    @needs(OPERATE, limit_bytes=MAX_MODEL_BYTES)
    def put_model(name: str) -> tuple[Response, int]:
        """Publish a model from its manifest and graph; its weights must be in the store. A ``version`` stands beside others."""
        body = _json_object(required=("manifest", "graph"))
        manifest, graph = (encode_json(body[key]) for key in ("manifest", "graph"))
        if not isinstance(body["manifest"], dict) or body["manifest"].get("name") != _name(name):
            raise BundleError(f"the manifest does not name {name}", model=name)
        label, is_default = version_asked()
        if label is not None:
            note(version=label[:64], default=is_default)
        bundle = versions.put(manifest, graph, label)
        deployed = engine.command("model_changed", {"name": bundle.name})
        if label is not None:
            deployed |= releasing.pushed(name, bundle.version, is_default)
        return jsonify(deployed), 201

    @app.delete("/admin/v1/models/<name>")
    @needs(OPERATE)
    def delete_model(name: str) -> Response:
        """Remove a model with all its versions; its weights stay in the store until they are collected."""
        _json_object()
        return jsonify(releasing.removed(_name(name), versions.remove(name)))

    @app.post("/admin/v1/models/<name>/load")
    @needs(OPERATE)
    def load(name: str) -> Any:
        """Bring a model into memory; answered when it is there, or with a job."""
        _json_object()
        asked: dict[str, object] = {"name": _deployed_name(name)}

        def work(watch: Watch, command: Command) -> object:
            # It cannot be stopped halfway: what was begun is loaded.
            return command("load", asked)

        return long_work.answered("load", name, work)

    @app.post("/admin/v1/models/<name>/<any(unload,evict,pin,unpin):action>")
    @needs(OPERATE)
    def act(name: str, action: str) -> Response:
        """Unload, evict, pin or unpin a model; answered when it is done."""
        _json_object()
        return jsonify(engine.command(action, {"name": _deployed_name(name)}))

    @app.post("/admin/v1/models/<name>/keep")
    @needs(OPERATE)
    def keep(name: str) -> Response:
        """Say how dear a model is, and for how long it is kept in memory without a request; answered when it is done."""
        body = _json_object(optional=("priority", "keep_alive_s"))
        # Looked at here, too: not every number of JSON can be sent on.
        Keep().changed(body)
        note(**body)
        return jsonify(engine.command("keep", {"name": _deployed_name(name), **body}))

    @app.get("/admin/v1/placement")
    @needs(READ)
    def placement() -> Response:
        """Return where models are asked, on a node with several devices, and what that was decided by."""
        return jsonify(engine.command("placement"))

    @app.post("/admin/v1/models/<name>/place")
    @needs(OPERATE)
    def place(name: str) -> Response:
        """Say on which devices a model may be; answered when it is there. A pin is to ``allow`` one."""
        body = _json_object(optional=("allow", "forbid"))
        # Looked at here, too, as above.
        check_constraint(body)
        note(**body)
        return jsonify(engine.command("place", {"name": _deployed_name(name), **body}))

    @app.get("/admin/v1/sessions")
    @needs(READ)
    def sessions() -> Response:
        """Return who is connected, ``offset`` and ``limit`` (at most 1000) of them."""
        return jsonify(engine.command("sessions", _page()))

    @app.get("/admin/v1/leases")
    @needs(READ)
    def leases() -> Response:
        """Return which models requests hold in memory, since when, and which are pinned."""
        return jsonify(engine.command("leases", _device()))

    @app.get("/admin/v1/residency")
    @needs(READ)
    def residency() -> Response:
        """Return tiers and budgets, what was found, fetched and evicted, and ``limit`` (at most 1000) of what leaves next."""
        return jsonify(engine.command("residency", {"limit": _number("limit", 100, 1000)} | _device()))

    @app.post("/admin/v1/evict")
    @needs(OPERATE)
    def make_room() -> Response:
        """Have the weights leave that are worth least, until so many ``bytes`` are free; on one ``device``, or on each."""
        body = _json_object(required=("bytes",), optional=("device",))
        # Looked at here, too: not every number of JSON can be sent on.
        size_bytes, device = body["bytes"], body.get("device", "")
        if isinstance(size_bytes, bool) or not isinstance(size_bytes, int) or not 0 < size_bytes <= MOST_FREE_BYTES:
            raise InvalidInput(f"bytes must be an integer from 1 to {MOST_FREE_BYTES}: how many are to be free")
        if not isinstance(device, str):
            raise InvalidInput("device must be the name of a device")
        note(bytes=size_bytes, device=device[:64])
        return jsonify(engine.command("relieve", {"bytes": size_bytes} | ({"device": device[:64]} if device else {})))

    @app.post("/admin/v1/drain")
    @needs(OPERATE)
    def drain() -> Response:
        """Take no more requests; answered when those that were taken are answered, or after ``timeout_s``."""
        timeout_s = _json_object(optional=("timeout_s",)).get("timeout_s", 30)
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 <= timeout_s <= _LONGEST_DRAIN_S:
            raise InvalidInput(f"timeout_s must be a number from 0 to {_LONGEST_DRAIN_S}")
        until_s = time.monotonic() + timeout_s
        found = engine.command("drain")
        # Somebody else may resume meanwhile, and an engine that is started again takes requests.
        while found["draining"] and not found["drained"] and time.monotonic() < until_s:
            time.sleep(_DRAIN_LOOK_S)
            found = engine.command("intake")
        return jsonify(found)

    @app.post("/admin/v1/resume")
    @needs(OPERATE)
    def resume() -> Response:
        """Take requests again."""
        _json_object()
        return jsonify(engine.command("resume"))

    @app.get("/admin/v1/quarantine")
    @needs(READ)
    def quarantine() -> Response:
        """Return whose requests are refused or run alone because engines died of such: tenant and model, not what was sent."""
        return jsonify(engine.command("quarantine"))

    @app.delete("/admin/v1/quarantine")
    @needs(OPERATE)
    def lift_all() -> Response:
        """Forget what is held against anybody's requests."""
        _json_object()
        return jsonify(engine.command("quarantine_lift"))

    @app.delete("/admin/v1/quarantine/<kind_id>")
    @needs(OPERATE)
    def lift(kind_id: str) -> Response:
        """Forget what is held against the requests of a tenant for a model."""
        _json_object()
        if not _KIND_ID.fullmatch(kind_id):
            raise NotQuarantined("an id has 16 hexadecimal digits; `trunkline quarantine ls` lists them")
        return jsonify(engine.command("quarantine_lift", {"id": kind_id}))

    @app.get("/admin/v1/log-level")
    @needs(READ)
    def log_level() -> Response:
        """Return how much the engine and this endpoint log."""
        return jsonify(engine=engine.command("log_level")["level"], http=loglevels.current())

    @app.put("/admin/v1/log-level")
    @needs(OPERATE)
    def set_log_level() -> Response:
        """Have both log what is of ``level`` and above, until they end."""
        wanted = _json_object(required=("level",))["level"]
        if wanted not in loglevels.LEVELS:
            raise InvalidInput(f"level must be one of {', '.join(loglevels.LEVELS)}")
        note(level=wanted)
        # First this endpoint's: it matters most while the engine is away.
        level.set(wanted)
        return jsonify(engine=engine.command("log_level", {"level": wanted})["level"], http=wanted)

    @app.get("/admin/v1/tenants")
    @needs(READ)
    def tenants() -> Response:
        """Return the tenants in force: domains, models, limits, and what they have of connections and arenas."""
        return jsonify(engine.command("tenants"))

    @app.post("/admin/v1/quotas/reload")
    @needs(OPERATE)
    def reload_quotas() -> Response:
        """Have the quota file read; answered when all is deployed by it. One with a mistake is refused, and changes nothing."""
        _json_object()
        return jsonify(engine.command("quotas_reload"))

    @app.post("/admin/v1/blobs/missing")
    @needs(OPERATE, is_audited=False)
    def missing() -> Response:
        """Return which of ``digests`` the store lacks."""
        digests = _json_object(required=("digests",))["digests"]
        if not isinstance(digests, list) or not all(isinstance(d, str) and DIGEST.fullmatch(d) for d in digests):
            raise InvalidInput("digests must be a list of sha256 digests in lower-case hexadecimal")
        return jsonify(missing=store.missing(digests))

    @app.put("/admin/v1/blobs/<digest>")
    @needs(OPERATE, limit_bytes=blob_limit_bytes, mimetype="application/octet-stream")
    def put_blob(digest: str) -> tuple[Response, int]:
        """Store the body under its sha256 digest; its length must be announced."""
        if not DIGEST.fullmatch(digest):
            raise InvalidInput("a blob is named by its sha256 digest in lower-case hexadecimal")
        size_bytes = request.content_length
        if size_bytes is None:
            raise InvalidInput("the length of a blob must be announced in Content-Length")
        is_new = store.put_blob(digest, _chunks(), size_bytes)
        return jsonify(digest=digest, stored=is_new), 201 if is_new else 200

    @app.post("/admin/v1/store/verify")
    @needs(OPERATE)
    def verify() -> Any:
        """Read every stored byte against its digest, and set aside what is altered; slow."""
        _json_object()

        def work(watch: Watch, command: Command) -> object:
            return dataclasses.asdict(store.verify(lambda done, total: watch.advance(done, total, "blobs")))

        return long_work.answered("verify", "store", work)

    @app.post("/admin/v1/store/gc")
    @needs(OPERATE)
    def gc() -> Any:
        """Remove what no model uses and is older than an hour; ``dry_run`` only counts."""
        dry_run = _json_object(optional=("dry_run",)).get("dry_run", False)
        if not isinstance(dry_run, bool):
            raise InvalidInput("dry_run must be true or false")

        def work(watch: Watch, command: Command) -> object:
            count, size_bytes = store.gc(dry_run=dry_run, advance=lambda done, total: watch.advance(done, total, "files"))
            return {"count": count, "size_bytes": size_bytes, "dry_run": dry_run}

        return long_work.answered("gc", "store", work)

    add_page(app, Feed(Watcher(scraped or engine).look), gate.role)
    return app


def _page() -> dict[str, object]:
    """Return the arguments of a command that lists something in pages."""
    return {"offset": _number("offset", 0, 10**9), "limit": min(_number("limit", 100, 10**9), 1000)}


def _device() -> dict[str, object]:
    """Return the argument of a command that is for one device, where one is named."""
    device = request.args.get("device")
    return {} if device is None else {"device": device[:64]}


def _name(name: str, rest: str = "") -> str:
    if not MODEL_NAME.fullmatch(name):
        raise UnknownModel(
            "a model's name has at most 128 of the characters a-z, 0-9, '.', '_' and '-', and starts and ends with a letter "
            f"or digit{rest}"
        )
    return name


def _deployed_name(name: str) -> str:
    return name if DEPLOYED_NAME.fullmatch(name) else _name(name, "; with the domain it is deployed in, it is MODEL@DOMAIN")


def _number(key: str, default: int, maximum: int) -> int:
    text = request.args.get(key, str(default))
    if not re.fullmatch(r"\d{1,10}", text) or int(text) > maximum:
        raise InvalidInput(f"{key} must be an integer from 0 to {maximum}")
    return int(text)


def _json_object(required: Iterable[str] = (), optional: Iterable[str] = ()) -> dict[str, Any]:
    """Return the body; an empty one is an empty object. A misspelt field must not be taken for one that was left out."""
    data = request.get_data(cache=False) or b"{}"
    try:
        body = members(load_json(data, "the body", MAX_MODEL_BYTES), "the body", required, optional)
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(body, ensure_ascii=False).encode()
    except BundleError as error:
        raise InvalidInput(error.message) from error
    except UnicodeEncodeError as error:
        raise InvalidInput("the body: a text in it has half of a surrogate pair, which cannot be sent on; correct it") from error
    return body


def _chunks() -> Iterator[bytes]:
    while chunk := request.stream.read(_CHUNK_BYTES):
        yield chunk


def admin_token(path: str) -> bytes:
    """Return the administrator's token as the supervisor wrote it. Raises TrunklineError when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read().strip()
    except OSError as error:
        raise TrunklineError(f"the administrator's token cannot be read ({os.strerror(error.errno or 0)})") from error
