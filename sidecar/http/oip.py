"""The Open Inference Protocol, v2 over REST: what tools that speak it ask of a sidecar.

Inference goes the way of any function's: with the caller's token, over the same socket, through the same arenas, so the
engine decides who may use which model, and no quota or deadline is passed by. Callers are known by ``Authorization: Bearer``;
without one they are who needs no token, if anybody. Only health is told to all. Must not import torch.
"""

from __future__ import annotations

import contextlib
import functools
import re
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from importlib.metadata import version as version_of
from typing import Any, Final, NamedTuple, Protocol

from flask import Blueprint, Flask, Response, jsonify, request
from trunkline.arguments import sendable
from trunkline.client import Model
from trunkline.errors import (
    BodyTooLarge,
    Draining,
    InvalidInput,
    ModelCorrupt,
    RequestError,
    SidecarFault,
    SidecarUnavailable,
    TransportError,
    UnknownModel,
)
from trunkline.oip import EXTENSION, HEADER_LENGTH, MAX_TIMEOUT_US
from trunkline.protocol import MAX_ARENA_BYTES, MAX_MODELS, MAX_NAME
from trunkline.signature import Signature

from sidecar import failures, openinference
from sidecar.errors import BundleError, Forbidden
from sidecar.http.access import TENANT, needs
from sidecar.http.access import tenant_token as _token
from sidecar.http.engineclient import EngineClient, check_ready
from sidecar.labels import LABEL, labelled, parted
from sidecar.openinference import MAX_JSON_BYTES, MOST_PARSED_BYTES
from sidecar.releases import RELEASED
from sidecar.strictjson import load_json, members
from sidecar.tenants import hash_of, matches, qualified, unqualified

_EXTENSIONS: Final = ("binary_tensor_data", "model_configuration", "model_repository", "statistics", EXTENSION)
_MAX_BODY_BYTES: Final = 64 << 10
# It reads files.
_version: Final = functools.cache(version_of)
_NAME: Final = re.compile(rf"[A-Za-z0-9._:+@-]{{1,{MAX_NAME}}}")
_DIGITS: Final = re.compile(r"[0-9]{1,15}")
# What a function tells when it greets, besides the models it stands for: bytes of tensors, microseconds.
_GREETING: Final = {"request_bytes": MAX_ARENA_BYTES, "reply_bytes": MAX_ARENA_BYTES, "timeout": MAX_TIMEOUT_US}
# Versions whose turn it was and that were gone when they were asked.
_MOST_DRAWN: Final = 5
_NO_SHARED_MEMORY: Final = (
    "clients cannot register shared memory with this server: it would let them name memory of others; send tensors in the "
    "body, or ask over the sidecar's Unix socket, where memory is shared"
)


class Models(Protocol):
    """Models as a caller asks for them: by what was known of them last, or asked for anew."""

    def model(self, name: str) -> Model: ...
    def fresh(self, name: str) -> Model: ...


class Callers(Protocol):
    """Sessions with the engine that are opened with a caller's own token."""

    def pool(self, token: bytes) -> AbstractContextManager[Models]: ...

    def greet(self, token: bytes, models: tuple[str, ...], request_bytes: int, reply_bytes: int, deadline: float) -> None: ...


class Part(Protocol):
    """What one request holds."""

    def take_more(self, size_bytes: int) -> None: ...


class Room(Protocol):
    """What requests may hold of this process at a time."""

    def taken(self, token: bytes, size_bytes: int) -> AbstractContextManager[Part]: ...


class Caller(NamedTuple):
    """Who asks: a tenant of the engine's, or its administrator."""

    name: str
    domain: str
    models: tuple[str, ...]
    is_administrator: bool

    def may_see(self, deployed: str) -> bool:
        """Say whether a model, by the engine's name, is one that this caller may use."""
        model, domain = unqualified(deployed)
        return self.is_administrator or (domain == self.domain and matches(model, self.models))

    def name_of(self, deployed: str) -> str:
        """Return what this caller calls a model that the engine knows by this name, whichever version of it that is."""
        stored, domain = unqualified(deployed)
        return qualified(parted(stored)[0], domain if self.is_administrator else "")


def add_open_inference(app: Flask, engine: EngineClient, callers: Callers, room: Room, *, body_limit_bytes: int) -> None:
    """Serve the protocol's routes under ``/v2``. An inference's body may have ``body_limit_bytes``, any other's 64 KiB."""
    routes = Blueprint("oip", __name__)
    routes.before_request(lambda: _check_body(body_limit_bytes))

    def caller() -> Caller:
        token = _token()
        with room.taken(token, 0):
            found = engine.command("identify", _known_by(token))
        return Caller(found["name"], found["domain"], tuple(found["models"]), found["administrator"])

    def described(name: str, version: str | None) -> tuple[str, Signature]:
        """Return what a model, or one of its versions, is asked by, and its signature."""
        with room.taken(token := _token(), 0), callers.pool(token) as pool:
            found = _of_version(name, version, pool)
            return found.name, found.signature

    def routed(name: str, **asked: str) -> dict[str, Any]:
        """Return what answers for a name, and its versions; with a ``call_id`` it is that request's turn."""
        found: dict[str, Any] = engine.command("route", {**_known_by(_token()), "model": name, **asked})
        return found

    @routes.get("/health/live")
    @needs(TENANT)
    def live() -> Response:
        """Say that the HTTP server is alive."""
        return jsonify(live=True)

    @routes.get("/health/ready")
    @needs(TENANT)
    def ready() -> tuple[Response, int]:
        """Say whether the engine answers and takes work."""
        try:
            check_ready(engine)
        except (SidecarUnavailable, Draining):
            return _readiness(False, live=True)
        return _readiness(True, live=True)

    @routes.get("")
    @needs(TENANT)
    def server() -> Response:
        """Tell the server's name, version and what of the protocol it has. A function tells what it is going to ask for."""
        if request.args:
            greet()
        else:
            caller()
        return jsonify(name="trunkline", version=_version("trunkline"), extensions=_EXTENSIONS)

    def greet() -> None:
        """Open a session with the engine as the function would, were it to have the socket: it is refused alike."""
        names = request.args.getlist("model")
        if len(names) > MAX_MODELS:
            raise InvalidInput(f"at most {MAX_MODELS} models are named, these are {len(names)}")
        wanted = {key: _number(key, limit) for key, limit in _GREETING.items()}
        deadline = time.monotonic() + wanted["timeout"] / 1_000_000
        with room.taken(token := _token(), 0):
            callers.greet(token, tuple(map(_name, names)), wanted["request_bytes"], wanted["reply_bytes"], deadline)

    @_versioned(routes, "")
    @needs(TENANT)
    def model(name: str, version: str | None = None) -> Response:
        """Tell a model's inputs and outputs."""
        called, signature = described(name, version)
        return jsonify(openinference.metadata(signature, name, routed(called)["versions"]))

    @_versioned(routes, "/config")
    @needs(TENANT)
    def config(name: str, version: str | None = None) -> Response:
        """Tell the same as Triton's configuration has it."""
        return jsonify(openinference.config(described(name, version)[1], name))

    @_versioned(routes, "/ready")
    @needs(TENANT)
    def model_ready(name: str, version: str | None = None) -> tuple[Response, int]:
        """Say whether a model may be asked; its weights are brought into memory when it is."""
        try:
            described(name, version)
        except SidecarFault as error:
            failures.log.info("%s is not ready: %s", name[:64], error.message)
            return _readiness(False, name=name)
        return _readiness(True, name=name)

    @_versioned(routes, "/stats")
    @needs(TENANT)
    def stats(name: str, version: str | None = None) -> Response:
        """Tell how often a model was asked, and when last."""
        who = caller()
        return jsonify(model_stats=[_stats_of(entry, who) for entry in counted(who, _name(name), version)])

    @routes.get("/models/stats")
    @needs(TENANT)
    def all_stats() -> Response:
        """Tell it of every model."""
        who = caller()
        return jsonify(model_stats=[_stats_of(entry, who) for entry in counted(who, None, None)])

    def counted(who: Caller, name: str | None, version: str | None) -> list[dict[str, Any]]:
        if not who.is_administrator and who.domain:
            # What others asked of a model that they share is not this tenant's to know.
            raise Forbidden("statistics need the administrator's token where there are tenants")
        found = [
            entry for entry in listed(who) if "error" not in entry and name in (None, entry["name"], who.name_of(entry["name"]))
        ]
        found = [entry for entry in found if version in (None, entry["version"])]
        if name is not None and not found:
            raise UnknownModel(f"there is no model {name[:64]} of this version that {who.name} may use")
        return found

    def listed(who: Caller) -> list[dict[str, Any]]:
        return [entry for entry in engine.command("models")["models"] if who.may_see(entry["name"])]

    @_versioned(routes, "/infer", "POST")
    @needs(TENANT)
    def infer(name: str, version: str | None = None) -> Response:
        """Run a model on the tensors in the body."""
        began_s = time.monotonic()
        token, body_bytes = _token(), request.content_length or 0
        json_bytes = openinference.json_length(request.headers.get(HEADER_LENGTH), body_bytes)
        with contextlib.ExitStack() as held, callers.pool(token) as pool:
            part = held.enter_context(room.taken(token, body_bytes + MOST_PARSED_BYTES * json_bytes))
            found = _current(name, version, pool)
            signature = found.signature
            # Who asks, and for what, is known before a byte of the body is read.
            body = _body(body_bytes)
            try:
                asked = openinference.decode(body, json_bytes, signature)
            except RequestError:
                # Perhaps there is a version by now that takes it.
                found = _of_version(name, version, pool)
                if found.signature == signature:
                    raise
                asked = openinference.decode(body, json_bytes, found.signature)
            deadline_s = None
            if asked.timeout_us is not None:
                deadline_s = asked.timeout_us / 1_000_000 - (time.monotonic() - began_s)
            call_id = request.headers.get("X-Call-Id") or asked.id or ""
            answered, signature = _called(
                found, lambda: pool.model(routed(name, call_id=sendable(call_id))["model"]), asked.inputs, deadline_s, call_id
            )
            if version not in (None, signature.version):
                raise _no_version(name, str(version))
            # A call that meets a new version goes on with it, which not everybody wants.
            found.signature.check_current(asked.signature_id, name)
            part.take_more(sum(array.nbytes for array in answered.values()))
            content, length = openinference.encode(signature, name, asked, answered)
            response = Response(content, mimetype="application/json" if length is None else "application/octet-stream")
            # Until it has been sent: whoever does not take it holds memory, and a thread.
            response.call_on_close(held.pop_all().close)
        if length is not None:
            response.headers[HEADER_LENGTH] = str(length)
        return response

    @routes.post("/repository/index")
    @needs(TENANT)
    def index() -> Response:
        """List the models that the caller may ask; ``ready`` leaves out those that cannot be."""
        who = caller()
        ready_only = _json_object(("ready",)).get("ready", False)
        if not isinstance(ready_only, bool):
            raise InvalidInput("ready must be true or false")
        found = [_indexed(entry, who) for entry in listed(who)]
        return jsonify([entry for entry in found if entry["state"] == "READY" or not ready_only])

    @routes.post("/repository/models/<name>/<any(load,unload):action>")
    @needs(TENANT, is_audited=True)
    def repository(name: str, action: str) -> Response:
        """Bring a model's weights into memory, or drop them from it; answered when it is done."""
        if not caller().is_administrator:
            raise Forbidden("loading and unloading need the administrator's token")
        parameters = _json_object(("parameters",)).get("parameters", {})
        _plain(lambda: members(parameters, "parameters", (), ("unload_dependents",) if action == "unload" else ()))
        for each in routed(_name(name))["models"]:
            engine.command(action, {"name": each})
        return jsonify({"name": name, action: True})

    @routes.get("/<any(systemsharedmemory,cudasharedmemory):kind>/status")
    @needs(TENANT)
    def shared_memory(kind: str) -> Response:
        """List the shared memory that clients have registered, which is none."""
        caller()
        return jsonify([])

    @routes.post("/<any(systemsharedmemory,cudasharedmemory):kind>/region/<region>/<any(register,unregister):action>")
    @routes.post("/<any(systemsharedmemory,cudasharedmemory):kind>/<any(unregister):action>")
    @needs(TENANT)
    def no_shared_memory(kind: str, action: str, region: str = "") -> Response:
        """Refuse to map what a client names."""
        caller()
        raise Forbidden(_NO_SHARED_MEMORY)

    app.register_blueprint(routes, url_prefix=failures.OPEN_INFERENCE)


def _versioned(routes: Blueprint, rest: str, method: str = "GET") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Route ``/models/{name}`` with and without the version that may stand behind it."""

    def route(view: Callable[..., Any]) -> Callable[..., Any]:
        for rule in (f"/models/<name>{rest}", f"/models/<name>/versions/<version>{rest}"):
            routes.add_url_rule(rule, view_func=view, methods=[method])
        return view

    return route


def _check_body(limit_bytes: int) -> None:
    """Refuse a body beyond its limit before any of it is read."""
    if request.endpoint != "oip.infer":
        limit_bytes = _MAX_BODY_BYTES
    request.max_content_length = limit_bytes
    if (request.content_length or 0) > limit_bytes:
        raise BodyTooLarge(
            f"the body has {request.content_length} bytes, at most {limit_bytes} are taken",
            size_bytes=request.content_length or 0,
            limit_bytes=limit_bytes,
        )
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidInput("a compressed body is not taken; send it as it is")


def _known_by(token: bytes) -> dict[str, object]:
    """Return how the engine is told whose token it is, for commands that are asked in its holder's stead."""
    return {"token_hash": hash_of(token) if token else ""}


def _name(name: str) -> str:
    """Return the name of a model, or of several asked together. Whether there is one, the engine says."""
    if not _NAME.fullmatch(name):
        raise UnknownModel(f"no model has such a name: a-z, 0-9, '.', '_' and '-', at most {MAX_NAME} of them")
    return name


def _number(key: str, limit: int) -> int:
    text = request.args.get(key, "")
    if not _DIGITS.fullmatch(text) or int(text) > limit:
        raise InvalidInput(f"{key} must be a number from 0 to {limit}")
    return int(text)


def _of_version(name: str, version: str | None, pool: Models) -> Model:
    """Return a model, or one of its versions. Raises UnknownModel."""
    found = pool.fresh(_name(name))
    if version is None:
        return found
    try:
        # What was pushed without a version is what its bundle says.
        if found.signature.version == version and not _is_released(found.signature):
            return found
    except (UnknownModel, ModelCorrupt):
        # A version may be there although nothing answers for the name.
        pass
    stored, domain = unqualified(name)
    if not LABEL.fullmatch(version) or parted(stored)[1]:
        raise _no_version(name, version)
    return pool.fresh(qualified(labelled(stored, version), domain))


def _current(name: str, version: str | None, pool: Models) -> Model:
    """Return a model to be called. Its signature may be older where the call itself finds out, and goes on with the new one.

    Calls of a release do not: they are of a version, and know nothing of the name. Raises UnknownModel.
    """
    if version is None and not _is_released((found := pool.model(_name(name))).signature):
        return found
    return _of_version(name, version, pool)


def _no_version(name: str, version: str) -> UnknownModel:
    return UnknownModel(f"there is no version {version[:64]} of {name[:64]} here")


def _is_released(signature: Signature) -> bool:
    """Say whether it is of a name that several versions may answer for: which did is known of those alone."""
    return signature.id.startswith(RELEASED)


def _called(
    found: Model, drawn: Callable[[], Model], inputs: Mapping[str, Any], deadline_s: float | None, call_id: str
) -> tuple[dict[str, Any], Signature]:
    """Return what a model answers, and the signature of the version that computed it.

    ``drawn`` is the version whose turn it is. Between that and the call it may have been removed, or the name been released: then
    another is asked, whose answer is as good.
    """
    until_s = None if deadline_s is None else time.monotonic() + deadline_s
    for _ in range(_MOST_DRAWN):
        left_s = None if until_s is None else until_s - time.monotonic()
        target = drawn() if _is_released(found.signature) else found
        try:
            answered = target.call(inputs, deadline_s=left_s, call_id=call_id)
        except UnknownModel:
            if target is found:
                raise
            continue
        if not _is_released(target.signature):
            outputs = target.signature.outputs
            return answered if isinstance(answered, dict) else {outputs[0].name: answered}, target.signature
    raise UnknownModel(f"{found.name} is being released and removed again and again; try again", model=found.name)


def _readiness(is_ready: bool, **told: object) -> tuple[Response, int]:
    response = jsonify(**told, ready=is_ready)
    if not is_ready:
        response.headers["Retry-After"] = "1"
    return response, 200 if is_ready else TransportError.http_status


def _body(announced_bytes: int) -> bytes:
    """Return the body. Raises InvalidInput when the client left in the middle of it, or says nothing more."""
    if not announced_bytes:
        # There is none, or it comes in chunks: then its length is not known before it is read, and it is refused.
        body = request.get_data(cache=False)
    else:
        try:
            # Of gunicorn itself, and in one piece: werkzeug asks for pieces of 64 KiB, and copies them once more.
            body = request.environ["wsgi.input"].read(announced_bytes)
        except OSError as error:
            raise InvalidInput(
                f"nothing came for long of a body of {announced_bytes} bytes; send all that Content-Length says, without a pause"
            ) from error
    if len(body) != announced_bytes:
        raise InvalidInput(f"the body ended after {len(body)} of {announced_bytes} bytes; send all that Content-Length says")
    return body


def _json_object(known: tuple[str, ...]) -> dict[str, object]:
    data = request.get_data(cache=False) or b"{}"
    return _plain(lambda: members(load_json(data, "the body", MAX_JSON_BYTES), "the body", (), known))


def _plain(checked: Callable[[], dict[str, object]]) -> dict[str, object]:
    """Return what a check returns. Raises InvalidInput where it speaks of bundles."""
    try:
        return checked()
    except BundleError as error:
        raise InvalidInput(error.message) from error


def _indexed(entry: dict[str, Any], who: Caller) -> dict[str, object]:
    is_broken = "error" in entry
    return {
        "name": who.name_of(entry["name"]),
        "version": entry.get("version", parted(unqualified(entry["name"])[0])[1]),
        "state": "UNAVAILABLE" if is_broken else "READY",
        "reason": entry["error"]["code"] if is_broken else "",
    }


def _stats_of(entry: dict[str, Any], who: Caller) -> dict[str, object]:
    idle_s = entry["last_used_s"]
    return {
        "name": who.name_of(entry["name"]),
        "version": entry["version"],
        "last_inference": 0 if idle_s is None else round((time.time() - idle_s) * 1000),
        "inference_count": entry["requests"],
    }
