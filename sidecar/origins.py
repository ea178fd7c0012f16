"""Origins: where models may be pulled from, how one is named there, and which addresses a name may lead to.

An origin is a scheme, a host, a port and the beginning of a path, written in one way only. A reference is
``ORIGIN/NAME@sha256:DIGEST``, the digest being that of ``manifest.json``, which names graph and weights by theirs: it pins all.
Pure functions, callable from any thread. Must not import torch or anything that does I/O.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from trunkline.errors import InvalidInput

from sidecar.bundle import MODEL_NAME
from sidecar.errors import OriginRefused

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_WEB: Final = {"http": 80, "https": 443}
_BUCKETS: Final = ("s3", "gs", "oci")
SCHEMES: Final = (*_WEB, *_BUCKETS, "file")
# No user names, queries, fragments, escapes or backslashes: what is compared is what is asked for.
_URL: Final = re.compile(r"(?P<scheme>[A-Za-z0-9]+)://(?P<authority>[A-Za-z0-9._:\[\]@-]*)(?P<path>(/[A-Za-z0-9._~-]+)*)/?")
_AUTHORITY: Final = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+)(:(?P<port>[1-9]\d{0,4}))?")
_LABEL: Final = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
_NUMBER: Final = re.compile(r"\d+|0x[0-9a-f]*")
# Oracle's buckets are named with their namespace behind an @.
_BUCKET: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_OCI_BUCKET: Final = re.compile(_BUCKET.pattern + r"(@[A-Za-z0-9]{1,255})?")
_REFERENCE: Final = re.compile(r"(?P<origin>.+)/(?P<name>[^/@]+)@sha256:(?P<digest>[0-9a-f]{64})", re.DOTALL)
_LONGEST: Final = 2048
# IPv6 addresses that stand for an IPv4 address in their last 32 bits.
_NAT64: Final = ipaddress.IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")
# For protocols of the network itself, and where a cloud has its metadata; older Pythons take most of it for public.
_ASSIGNED: Final = ipaddress.IPv4Network("192.0.0.0/24")


@dataclass(frozen=True)
class Origin:
    """An origin as it is compared: ``host`` is a bucket for object stores and empty for folders, ``path`` empty or ``/a/b``."""

    scheme: str
    host: str
    port: int | None
    path: str

    @property
    def url(self) -> str:
        """Return the one way it is written."""
        port = "" if self.port is None or self.port == _WEB.get(self.scheme) else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.path}"

    def covers(self, other: Origin) -> bool:
        """Return whether ``other`` is this origin, or a folder below it."""
        same = (self.scheme, self.host, self.port) == (other.scheme, other.host, other.port)
        return same and (other.path == self.path or other.path.startswith(f"{self.path}/"))


@dataclass(frozen=True)
class Reference:
    """A model at an origin: ``digest`` is the sha256 of its manifest."""

    origin: Origin
    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.origin.url}/{self.name}@sha256:{self.digest}"


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What an operator allows: from where, to which addresses beyond public ones, signed by whom (None: need not be), how much.

    An origin that sends nothing for ``idle_s``, or is at one pull for ``timeout_s``, is not waited for.
    """

    origins: tuple[Origin, ...] = ()
    networks: tuple[Network, ...] = ()
    signers: Path | None = None
    blob_limit_bytes: int = 64 << 30
    timeout_s: float = 3600.0
    idle_s: float = 30.0

    def check(self, origin: Origin) -> None:
        """Raise OriginRefused unless ``origin`` is listed, or below one that is."""
        if not self.origins:
            raise OriginRefused("no origin is listed, so nothing can be pulled; start the sidecar with --pull-origin ORIGIN")
        if not any(listed.covers(origin) for listed in self.origins):
            raise OriginRefused(
                f"{origin.url} is none of the {len(self.origins)} origins that may be pulled from, nor below one; "
                "the operator lists it with --pull-origin",
                origin_count=len(self.origins),
            )


def parse_origin(text: str) -> Origin:
    """Return an origin from its text. Raises ValueError that says what it must be."""
    match = _URL.fullmatch(text) if len(text) <= _LONGEST else None
    if not match:
        raise ValueError("SCHEME://HOST/PATH of plain characters, without a user's name, query, escape or empty part")
    scheme, authority, path = match["scheme"].lower(), match["authority"], match["path"]
    if any(part in (".", "..") for part in path.split("/")):
        raise ValueError("free of the parts '.' and '..'")
    if scheme == "file":
        if authority or not path:
            raise ValueError("an absolute folder, file:///PATH")
        return Origin(scheme, "", None, path)
    if scheme in _BUCKETS:
        if not (_OCI_BUCKET if scheme == "oci" else _BUCKET).fullmatch(authority):
            raise ValueError(f"a bucket, {scheme}://BUCKET/PATH")
        return Origin(scheme, authority, None, path)
    if scheme not in _WEB:
        raise ValueError(f"one of {', '.join(SCHEMES)}")
    found = _AUTHORITY.fullmatch(authority)
    port = int(found["port"] or _WEB[scheme]) if found else 0
    if not found or not 0 < port < 65536:
        raise ValueError(f"{scheme}://HOST or {scheme}://HOST:PORT, without a user's name")
    return Origin(scheme, _host(found["host"].lower()), port, path)


def _host(text: str) -> str:
    """Return a host in the one way it is written. Numbers that only some readers take for an address are none."""
    if text.startswith("["):
        try:
            address = ipaddress.IPv6Address(text[1:-1])
        except ValueError as error:
            raise ValueError("an IPv6 address in its brackets") from error
        if address.ipv4_mapped:
            raise ValueError("an IPv4 address where one is meant")
        return f"[{address.compressed}]"
    labels = text.split(".")
    if _NUMBER.fullmatch(labels[-1]):
        try:
            return str(ipaddress.IPv4Address(text))
        except ValueError as error:
            raise ValueError("an IPv4 address as four decimal numbers") from error
    if len(text) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError("a host's name without a dot at its end, or an address")
    return text


def parse_reference(text: str) -> Reference:
    """Return a reference from its text. Raises InvalidInput."""
    match = _REFERENCE.fullmatch(text) if len(text) <= _LONGEST else None
    if not match or not MODEL_NAME.fullmatch(match["name"]):
        raise InvalidInput("a model to pull is named ORIGIN/NAME@sha256:DIGEST, as `trunkline model publish` prints it")
    try:
        return Reference(parse_origin(match["origin"]), match["name"], match["digest"])
    except ValueError as error:
        raise InvalidInput(f"the origin {match['origin'][:80]!r} must be {error}") from error


# --- files ------------------------------------------------------------------------------------------------------------


def manifest_file(digest: str) -> str:
    """Return where below an origin a manifest lies."""
    return f"manifests/{digest}"


def signature_file(digest: str) -> str:
    """Return where the signature of a manifest lies."""
    return f"signatures/{digest}"


def graph_file(digest: str) -> str:
    """Return where a graph lies."""
    return f"graphs/{digest[:2]}/{digest}"


def blob_file(digest: str) -> str:
    """Return where the bytes of a weight lie."""
    return f"blobs/{digest[:2]}/{digest}"


# --- addresses --------------------------------------------------------------------------------------------------------


def may_lead_to(host: str, address: str, networks: Iterable[Network]) -> bool:
    """Return whether the name ``host`` of a listed origin may be resolved to ``address``.

    To public addresses always; to others only within ``networks``, which the operator has named; ``localhost`` to this machine.
    """
    found = ipaddress.ip_address(address)
    if host == "localhost" and found.is_loopback:
        return True
    if any(found in network for network in networks):
        return True
    return all(_is_public(each) for each in (found, *_embedded(found)))


def _is_public(address: Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address) and address not in _GLOBAL_UNICAST and address not in _NAT64:
        return False
    return address.is_global and not address.is_multicast and address not in _ASSIGNED


def _embedded(address: Address) -> list[Address]:
    """Return the IPv4 addresses that an IPv6 address stands for."""
    if isinstance(address, ipaddress.IPv4Address):
        return []
    found: list[Address | None] = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if address in _NAT64:
        found.append(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]
