"""Who may ask what of the admin endpoint: the one place that every request passes before anything else is done about it.

Each view declares its role with ``needs``, and one that declares none is refused. ``admin.sock`` is the operator's by its mode in
the file system. Over TCP whoever is on this machine may do the same, as long as there is no token file; with one, each request
needs a token that its role is enough for. What is wrong with a token is told before what is wrong with a route, so that
a stranger does not learn which there are. Must not import torch.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from flask import Flask, current_app, g, request
from trunkline.errors import BodyTooLarge, InvalidInput, Unauthorized
from trunkline.protocol import MAX_TOKEN_BYTES

from sidecar import failures
from sidecar.admintokens import OPERATE as OPERATE
from sidecar.admintokens import READ as READ
from sidecar.admintokens import ROLES
from sidecar.errors import Forbidden, TooManyAttempts
from sidecar.ratelimit import Bucket

# What a route needs, if not a role of the token file: nothing; a tenant's token, which the view and the engine look at.
OPEN: Final = "open"
TENANT: Final = "tenant"
MAX_BODY_BYTES: Final = 64 << 10
LOOKING: Final = ("GET", "HEAD", "OPTIONS")
_LOCAL_HOST: Final = re.compile(r"(localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?")
_BEARER: Final = re.compile(r"[Bb]earer +([\x21-\x7e]+)")
# Failed logins of all strangers together, in one worker: so many at once, and then so many a second.
_ATTEMPTS: Final = 20
_ATTEMPTS_PER_S: Final = 1.0

View = TypeVar("View", bound=Callable[..., Any])


class Needs(NamedTuple):
    """What a view needs: a role, a body of at most so many bytes and of this type, and a line in the audit log."""

    role: str
    limit_bytes: int = MAX_BODY_BYTES
    mimetype: str = "application/json"
    is_audited: bool = True


class Principal(NamedTuple):
    """Who asks: the name of a token, or how they came here."""

    name: str
    role: str


class Tokens(Protocol):
    """Whose tokens count."""

    def holder(self, token: bytes) -> Principal | None: ...


def needs(
    role: str, *, limit_bytes: int = MAX_BODY_BYTES, mimetype: str = "application/json", is_audited: bool | None = None
) -> Callable[[View], View]:
    """Declare what a view needs; written below its route.

    A request that changes something must have a body of ``mimetype``, of at most ``limit_bytes``; views of tenants
    look at their bodies themselves. What operators change is audited unless said otherwise.
    """
    declared = Needs(role, limit_bytes, mimetype, role == OPERATE if is_audited is None else is_audited)

    def declare(view: View) -> View:
        view.needs = declared  # type: ignore[attr-defined]
        return view

    return declare


def needs_of(app: Flask, endpoint: str) -> Needs | None:
    """Return what the view of an endpoint has declared; None where it has not."""
    return getattr(app.view_functions.get(endpoint), "needs", None)


def principal() -> Principal | None:
    """Return who asks, in a request; None where nobody was let in yet, or nobody is asked."""
    found: Principal | None = g.get("principal")
    return found


def came_by_socket() -> bool:
    """Say whether this request came over ``admin.sock``."""
    connection = request.environ.get("gunicorn.socket")
    if connection is not None:
        return bool(connection.family == socket.AF_UNIX)
    return request.environ.get("REMOTE_ADDR") == ""


def bearer() -> bytes:
    """Return the token that this request has, empty where it has none. Raises Unauthorized for what is no token."""
    given = request.headers.get("Authorization")
    if given is None:
        return b""
    match = _BEARER.fullmatch(given)
    if not match or len(match[1]) > MAX_TOKEN_BYTES:
        raise Unauthorized(f"the Authorization must be Bearer and a token of at most {MAX_TOKEN_BYTES} characters")
    return match[1].encode()


def tenant_token() -> bytes:
    """Return the token that the engine is to know the caller by. Raises Unauthorized.

    Empty where there is none, or where it was of the token file: the engine does not know those.
    """
    return b"" if g.get("is_token_taken") else bearer()


class Gate:
    """The check of every request. ``tokens`` is None where no token file is.

    ``is_exposed`` says that the endpoint can be reached from other machines, by whatever name; tokens must count then.
    ``has_tenants`` says that the engine knows tenants by tokens of their own.
    """

    def __init__(self, tokens: Tokens | None = None, *, is_exposed: bool = False, has_tenants: bool = False) -> None:
        assert tokens is not None or not is_exposed, "beyond this machine, tokens must count"
        self._tokens = tokens
        self._is_exposed = is_exposed
        self._has_tenants = has_tenants
        self._attempts = Bucket(_ATTEMPTS, _ATTEMPTS_PER_S)

    def role(self) -> str:
        """Return what whoever asks may do, on a route that is open to all, too; empty: nothing that is known of."""
        found = principal()
        if found is not None:
            return found.role
        return OPERATE if self._tokens is None else ""

    def check(self) -> None:
        """Refuse a request that may not be made, before its route, or that there is none, matters."""
        request.max_content_length = MAX_BODY_BYTES
        declared = self._declared()
        self._admit(declared.role)
        if request.method not in LOOKING:
            _check_change(declared)

    def _declared(self) -> Needs:
        if request.endpoint is None:
            # There is no such route, which is for those to know who may look.
            return Needs(TENANT if failures.is_open_inference(request.path) else READ)
        declared = needs_of(current_app, request.endpoint)
        if declared is None:
            failures.log.error("%s has declared no role and is refused", request.url_rule)
            raise Forbidden("this route is closed")
        return declared

    def _admit(self, role: str) -> None:
        if came_by_socket():
            g.principal = Principal("socket", OPERATE)
            return
        if not self._is_exposed and not _LOCAL_HOST.fullmatch(request.host):
            raise InvalidInput("this endpoint answers to the name localhost only")
        if role == OPEN:
            return
        if self._tokens is None:
            g.principal = Principal("loopback", OPERATE)
            return
        try:
            found = self._known(role, self._tokens)
        except Unauthorized:
            if wait_s := self._attempts.take():
                raise TooManyAttempts(
                    "too many requests without a token that counts; try again later", retry_after_s=wait_s
                ) from None
            raise
        g.principal = found
        if role in ROLES and found.role in ROLES[: ROLES.index(role)]:
            raise Forbidden(f"this needs the role {role}; the token has {found.role}", role=role)

    def _known(self, role: str, tokens: Tokens) -> Principal:
        token = bearer()
        if token and role == TENANT and self._has_tenants:
            # Whose it is, the engine finds out.
            return Principal("tenant", TENANT)
        found = tokens.holder(token) if token else None
        if found is None:
            raise Unauthorized("this needs a token that counts: Authorization: Bearer TOKEN")
        g.is_token_taken = True
        return found


def _check_change(declared: Needs) -> None:
    """Refuse what a browser could be tricked into sending, and bodies beyond their limit."""
    if "Transfer-Encoding" in request.headers:
        raise InvalidInput("a body in chunks is not taken; announce its length in Content-Length")
    origin = request.headers.get("Origin")
    if origin is not None and (origin != f"{request.scheme}://{request.host}" or not _may_be_own_page()):
        raise InvalidInput("requests from web pages of others are not taken")
    if declared.role == TENANT:
        return
    request.max_content_length = declared.limit_bytes
    if request.mimetype != declared.mimetype and request.endpoint is not None:
        raise InvalidInput(f"the Content-Type must be {declared.mimetype}")
    if (request.content_length or 0) > declared.limit_bytes:
        raise BodyTooLarge(
            f"the body has {request.content_length} bytes, at most {declared.limit_bytes} are taken",
            limit_bytes=declared.limit_bytes,
        )


def _may_be_own_page() -> bool:
    # Over TCP the name was looked at before; over the socket none was needed until a web page came into it.
    return not came_by_socket() or bool(_LOCAL_HOST.fullmatch(request.host))
