"""Tenants: who asks, and what the operator allows them. Pure data; an operator writes it in a quota file.

A *tenant* is the identity of one or several functions: what it is charged, what it is allowed and what bounds it. Nothing that
a function sends makes it one tenant or another but its token.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Final

from trunkline.protocol import JOINT

from sidecar.keeping import DEFAULT_PRIORITY
from sidecar.labels import STORED_NAME, parted
from sidecar.peers import Peer

# A token that is valid, and one that is about to be.
MOST_TOKENS: Final = 2
# Of tenants and domains: what can also stand in a model's full name, and in the name of a secret.
NAME: Final = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
# Between the name of a model and that of a domain; no name of either has it.
_IN: Final = "@"
# The name of a model that is deployed: as it was published, perhaps with its version, and in which domain it is.
DEPLOYED_NAME: Final = re.compile(f"{STORED_NAME.pattern}({_IN}{NAME.pattern})?")


def qualified(models: str, domain: str) -> str:
    """Return the name under which the engine knows a model, or several asked together, in a domain: ``embed@vision``.

    Whoever asks may name a domain as well; that is nobody's name then, in the domain without a name, too.
    """
    return JOINT.join(f"{model}{_IN}{domain}" if domain or _IN in model else model for model in models.split(JOINT))


def as_asked(name: str) -> str:
    """Return what a function called the model, or models, that the engine knows by ``name``."""
    return JOINT.join(unqualified(each)[0] for each in name.split(JOINT))


def unqualified(name: str) -> tuple[str, str]:
    """Return the name of one model, with its version if it has one, and the domain it is known in."""
    model, qualifies, domain = name.rpartition(_IN)
    return (model, domain) if qualifies else (domain, "")


def as_known_to(domain: str, text: str) -> str:
    """Return a text with the names of models, where they are the engine's, as those of ``domain`` know them."""
    # Not of a domain whose name only begins like this one's, nor what somebody took for a domain in the name of a model.
    return re.sub(f"{_IN}{re.escape(domain)}(?!-*[a-z0-9]|{_IN})", "", text) if domain else text


def matches(model: str, patterns: Iterable[str]) -> bool:
    """Say whether one of the patterns an operator named models by is of this model, whichever version of it is named."""
    name, _ = parted(model)
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def hash_of(token: bytes) -> str:
    """Return what is kept of a token."""
    return hashlib.sha256(token).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One tenant. Limits are of what it may have at a time; infinity where the operator named none.

    ``token_hashes`` are sha256 digests in hexadecimal, two at most, so that a token can be changed without a gap. ``models`` are
    patterns as of a shell. Tenants of one ``domain`` share weights and computation, and can tell so by the time it takes;
    those of different domains share neither, but for the weights of public models. ``weight`` is the part of device time it gets
    when all want some, relative to the others' of its ``priority``; those of a higher priority go first.
    """

    name: str
    domain: str
    token_hashes: tuple[str, ...] = ()
    models: tuple[str, ...] = ()
    weight: float = 1.0
    priority: int = DEFAULT_PRIORITY
    # Whether what it asks may be computed together with the same input of another of its domain.
    compute_once: bool = True
    # Requests that wait or run, and the bytes of their inputs.
    in_flight_limit: float = math.inf
    queued_limit_bytes: float = math.inf
    connection_limit: float = math.inf
    arena_limit_bytes: float = math.inf
    # Of the weights that models it uses have in memory.
    resident_limit_bytes: float = math.inf
    # Of the processes that its connections must be of; whichever where there is none.
    uid: int | None = None
    gid: int | None = None
    # Whether it has a socket of its own, and uses no other; and the group that may use that, everybody where there is none.
    socket: bool = False
    socket_gid: int | None = None

    def allows(self, model: str) -> bool:
        """Say whether the operator lets this tenant use a model."""
        return matches(model, self.models)

    def is_bound_to_others(self, peer: Peer | None) -> bool:
        """Say whether it is bound to other processes than this one; None for one that nobody can see."""
        bounds = ((self.uid, None if peer is None else peer.uid), (self.gid, None if peer is None else peer.gid))
        return any(bound is not None and bound != found for bound, found in bounds)

    def to_plain(self) -> dict[str, object]:
        """Return what an operator may see, as JSON has it: of tokens how many are valid, and None where there is no limit."""
        limits = {
            "in_flight_limit": self.in_flight_limit,
            "queued_limit_bytes": self.queued_limit_bytes,
            "connection_limit": self.connection_limit,
            "arena_limit_bytes": self.arena_limit_bytes,
            "resident_limit_bytes": self.resident_limit_bytes,
        }
        return {
            "name": self.name,
            "domain": self.domain,
            "models": list(self.models),
            "token_count": len(self.token_hashes),
            "weight": self.weight,
            "priority": self.priority,
            "compute_once": self.compute_once,
            "uid": self.uid,
            "gid": self.gid,
            "socket": self.socket,
            "socket_gid": self.socket_gid,
            **{key: None if limit == math.inf else limit for key, limit in limits.items()},
        }


# Everybody, where there is no quota file: one tenant without limits, in the domain without a name.
ANYONE: Final = Tenant(name="anyone", domain="", models=("*",))


@dataclass(frozen=True)
class Quotas:
    """All tenants by name, as one quota file has them. Without a file there is but ``ANYONE``, who needs no token.

    ``public`` are patterns of the models whose weights anybody may know: all domains have them in memory once.
    """

    tenants: Mapping[str, Tenant] = field(default_factory=lambda: {ANYONE.name: ANYONE})
    public: tuple[str, ...] = ()

    def holder(self, token_hash: str, through: str = "") -> Tenant | None:
        """Return whose token it is that has this hash, or, for the empty text, who needs none.

        What came ``through`` a tenant's own socket is that tenant or nobody: with its token, or with none where it has none. What
        came through the one for all is nobody who has a socket. Every hash there is gets compared, and each in constant time: how
        long it takes says nothing about any of them.
        """
        found = None if token_hash else self.tenants.get(ANYONE.name)
        for tenant in self.tenants.values():
            for known in tenant.token_hashes:
                if hmac.compare_digest(known, token_hash):
                    found = tenant
        own = self.tenants.get(through)
        if not through:
            return None if found is not None and found.socket else found
        if own is None or not own.socket:
            return None
        is_own = found is own if token_hash else not own.token_hashes
        return own if is_own else None

    def domains(self) -> Mapping[str, tuple[str, ...]]:
        """Return for each domain the patterns of the models that somebody in it may use."""
        found: dict[str, tuple[str, ...]] = {}
        for tenant in self.tenants.values():
            found[tenant.domain] = tuple(dict.fromkeys((*found.get(tenant.domain, ()), *tenant.models)))
        return found


OPEN: Final = Quotas()
