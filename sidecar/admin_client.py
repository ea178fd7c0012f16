"""The other side of the admin endpoint: what the command line uses to reach a sidecar, over a Unix socket or TCP.

A client belongs to the thread that made it. Must not import torch: looking and pushing have to be quick.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

import requests
from trunkline.errors import MalformedFrame, SidecarUnavailable, TrunklineError, VersionMismatch, from_wire

from sidecar.bundle import blob_path, canonical_graph, manifest_bytes, read_bundle
from sidecar.errors import BundleError, ConfigError
from sidecar.strictjson import load_json
from sidecar.unixhttp import SCHEME, mount_unix

_CONNECT_S: Final = 5.0
_ANSWER_S: Final = 600.0
_CHUNK_BYTES: Final = 1 << 20
_ADDRESS: Final = re.compile(r"unix:.+|https?://[^/]+/?")
# What the endpoint answers to a path or a method that it does not have.
_NO_SUCH_ROUTE: Final = ("not_found", "method_not_allowed")
# What fits into one body of the endpoint; a model may have a hundred thousand weights.
_DIGESTS_AT_ONCE: Final = 500


@dataclass(frozen=True)
class Pushed:
    """What a push sent, of what the bundle has; ``release`` is which versions answer, where a version was pushed."""

    name: str
    sent_count: int
    blob_count: int
    sent_bytes: int
    blob_bytes: int
    release: dict[str, Any] | None = None


class AdminClient:
    """Requests to one admin endpoint. ``address`` is ``unix:/path/of/admin.sock``, ``http://127.0.0.1:9470`` or ``https://…``.

    A context manager, which closes its connections at the end.
    """

    def __init__(self, address: str, *, token: str = "", ca_file: Path | None = None, timeout_s: float = _ANSWER_S) -> None:
        """Prepare to ask with ``token``, if any; certificates are checked against those of ``ca_file``, or the system's.

        An answer that takes longer than ``timeout_s`` is none. Raises ConfigError for an address that is of no such form.
        """
        self.address = address
        if not _ADDRESS.fullmatch(address):
            raise ConfigError(
                f"the admin address is {address[:80]!r}; it must be unix:PATH/admin.sock, http://127.0.0.1:PORT or https://HOST:PORT"
            )
        self._timeout_s = (min(_CONNECT_S, timeout_s), timeout_s)
        self._session = requests.Session()
        mount_unix(self._session)
        # No proxy between this machine and itself, and nobody else's credentials.
        self._session.trust_env = False
        if token:
            self._session.headers["Authorization"] = f"Bearer {token}"
        if ca_file is not None:
            self._session.verify = str(ca_file)
        if address.startswith("unix:"):
            self._base = SCHEME + urllib.parse.quote(address.removeprefix("unix:"), safe="")
        else:
            self._base = address.rstrip("/")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that are kept alive."""
        self._session.close()

    def get(self, path: str) -> Any:
        """GET a route below /admin/v1. Raises the TrunklineError it answers with, SidecarUnavailable without an answer."""
        return self._ask("GET", path)

    def post(self, path: str, body: dict[str, object] | None = None) -> Any:
        """POST JSON to a route below /admin/v1."""
        return self._ask("POST", path, json=body or {})

    def put(self, path: str, body: dict[str, object]) -> Any:
        """PUT JSON to a route below /admin/v1."""
        return self._ask("PUT", path, json=body)

    def delete(self, path: str) -> Any:
        """DELETE a route below /admin/v1."""
        return self._ask("DELETE", path, headers={"Content-Type": "application/json"})

    def metrics(self) -> str:
        """Return all that is counted, in the text format of Prometheus. Raises as ``get``."""
        response = self._send("GET", "/metrics")
        if response.status_code >= 400:
            raise self._refusal(response, "GET /metrics")
        return response.text

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        response = self._send(method, f"/admin/v1/{path}", **arguments)
        if response.status_code >= 400:
            raise self._refusal(response, f"{method} {path}")
        return self._json(response)

    def _send(self, method: str, path: str, **arguments: Any) -> requests.Response:
        try:
            return self._session.request(method, self._base + path, timeout=self._timeout_s, allow_redirects=False, **arguments)
        except requests.exceptions.SSLError as error:
            raise SidecarUnavailable(
                f"{self.address} has no certificate that is trusted here; name the file of its authority's with --ca-file, or "
                "TRUNKLINE_ADMIN_CA",
                address=self.address,
            ) from error
        except requests.RequestException as error:
            raise SidecarUnavailable(_unreached(self.address, error), address=self.address) from error

    def _json(self, response: requests.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise MalformedFrame(f"{self.address} answered {response.status_code} without JSON") from error

    def _refusal(self, response: requests.Response, asked: str) -> TrunklineError:
        body = self._json(response)
        # What was refused may not have been read to its end; the server then closes, and a next request would meet that.
        self._session.close()
        try:
            error = body["error"]
            code, message, details = str(error["code"]), str(error["message"]), dict(error["details"])
        except (KeyError, TypeError, ValueError):
            return MalformedFrame(f"the sidecar answered {response.status_code} without saying why")
        if code in _NO_SUCH_ROUTE:
            told = f"the sidecar at {self.address} does not know {asked}"
            return VersionMismatch(f"{told}: it is older than this command; upgrade it")
        return from_wire(code, message, details)

    def push(
        self,
        directory: Path,
        progress: Callable[[int, int], None] = lambda done, total: None,
        *,
        version: str | None = None,
        default: bool = False,
    ) -> Pushed:
        """Send a bundle folder: only the weights that the sidecar lacks, then the model itself.

        With a ``version`` it stands beside others, called so, or as its manifest says where that is empty; as ``default`` it
        answers from then on. ``progress`` is told the bytes done and to do. Raises BundleError for a bad folder and what the
        sidecar answers.
        """
        bundle = read_bundle(directory)
        sizes = {weight.digest: weight.size_bytes for weight in bundle.graph.weights}
        digests = list(sizes)
        missing: list[str] = []
        for start in range(0, len(digests), _DIGESTS_AT_ONCE):
            missing += self.post("blobs/missing", {"digests": digests[start : start + _DIGESTS_AT_ONCE]})["missing"]
        total_bytes = sum(sizes[digest] for digest in missing)
        done_bytes = 0

        def advance(count_bytes: int) -> None:
            nonlocal done_bytes
            done_bytes += count_bytes
            progress(done_bytes, total_bytes)

        advance(0)
        for digest in missing:
            try:
                file = blob_path(directory, digest).open("rb")
            except OSError as error:
                raise BundleError(f"blobs/{digest}: cannot be read: {os.strerror(error.errno or 0)}") from error
            with file:
                body = _Body(file, sizes[digest], advance)
                self._ask("PUT", f"blobs/{digest}", data=body, headers={"Content-Type": "application/octet-stream"})
        model = {
            "manifest": load_json(manifest_bytes(bundle), "manifest.json", 1 << 30),
            "graph": load_json(canonical_graph(bundle.graph), "graph.json", 1 << 30),
        }
        asked = {} if version is None else {"version": version, "default": str(default).lower()}
        found = self._ask("PUT", f"models/{bundle.name}", json=model, params=asked)
        return Pushed(bundle.name, len(missing), len(sizes), total_bytes, sum(sizes.values()), found.get("release"))


class _Body:
    """A file as the body of a request, its length announced; requests sends an empty file wrongly otherwise."""

    def __init__(self, file: BinaryIO, size_bytes: int, advance: Callable[[int], None]) -> None:
        self._file = file
        self._size_bytes = size_bytes
        self._advance = advance

    def __len__(self) -> int:
        return self._size_bytes

    def __iter__(self) -> Iterator[bytes]:
        while chunk := self._file.read(_CHUNK_BYTES):
            yield chunk
            self._advance(len(chunk))


def _unreached(address: str, error: BaseException) -> str:
    """Return why there was no answer, and what to do about it."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, PermissionError):
            return f"{address} may not be used by this user; ask as one of its group, or as the user that the sidecar runs as"
        cause = cause.__cause__ or cause.__context__
    return f"no sidecar answers at {address}; start one with `trunkline serve`, or name it with --admin"
