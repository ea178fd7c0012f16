"""The other side of the admin endpoint: what the command line uses to reach a sidecar, over a Unix socket or loopback.

A client belongs to the thread that made it. Must not import torch: looking and pushing have to be quick.
"""

from __future__ import annotations

import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import requests
import requests_unixsocket
from trunkline.errors import MalformedFrame, SidecarUnavailable, TrunklineError, from_wire

from sidecar.bundle import blob_path, canonical_graph, manifest_bytes, read_bundle
from sidecar.errors import BundleError, ConfigError
from sidecar.strictjson import load_json

# Of the environment: what to show over TCP, and whom to believe there.
TOKEN_FILE: Final = "TRUNKLINE_ADMIN_TOKEN_FILE"  # noqa: S105 - a name
CERTIFICATES: Final = "TRUNKLINE_ADMIN_CA"
_TIMEOUT_S: Final = (5.0, 600.0)
_CHUNK_BYTES: Final = 1 << 20
_ADDRESS: Final = re.compile(r"unix:.+|https?://[^/]+/?")
# What fits into one body of the endpoint; a model may have a hundred thousand weights.
_DIGESTS_AT_ONCE: Final = 500


@dataclass(frozen=True)
class Pushed:
    """What a push sent, of what the bundle has."""

    name: str
    sent_count: int
    blob_count: int
    sent_bytes: int
    blob_bytes: int


class AdminClient:
    """Requests to one admin endpoint. ``address`` is ``unix:/path/of/admin.sock`` or ``http://127.0.0.1:9470``.

    Over TCP it has the token of the file that TRUNKLINE_ADMIN_TOKEN_FILE names, and believes certificates that
    TRUNKLINE_ADMIN_CA, a PEM file, vouches for.
    """

    def __init__(self, address: str) -> None:
        """Raises ConfigError for an address that is neither, and for a token that cannot be read."""
        self.address = address
        if not _ADDRESS.fullmatch(address):
            raise ConfigError(f"the admin address is {address[:80]!r}; it must be unix:PATH/admin.sock or http://127.0.0.1:PORT")
        self._session: requests.Session = requests_unixsocket.Session()  # type: ignore[no-untyped-call]
        # No proxy between this machine and itself.
        self._session.trust_env = False
        if address.startswith("unix:"):
            self._base = "http+unix://" + urllib.parse.quote(address.removeprefix("unix:"), safe="")
        else:
            self._base = address.rstrip("/")
            if path := os.environ.get(TOKEN_FILE):
                self._session.headers["Authorization"] = f"Bearer {_read_token(path)}"
            self._session.verify = os.environ.get(CERTIFICATES) or True

    def close(self) -> None:
        """Close the connections that are kept alive."""
        self._session.close()

    def get(self, path: str) -> Any:
        """GET a route below /admin/v1. Raises the TrunklineError it answers with, SidecarUnavailable without an answer."""
        return self._ask("GET", path)

    def post(self, path: str, body: dict[str, object] | None = None) -> Any:
        """POST JSON to a route below /admin/v1."""
        return self._ask("POST", path, json=body or {})

    def delete(self, path: str) -> Any:
        """DELETE a route below /admin/v1."""
        return self._ask("DELETE", path, headers={"Content-Type": "application/json"})

    def _ask(self, method: str, path: str, **arguments: Any) -> Any:
        try:
            response = self._session.request(
                method, f"{self._base}/admin/v1/{path}", timeout=_TIMEOUT_S, allow_redirects=False, **arguments
            )
        except requests.exceptions.SSLError as error:
            raise SidecarUnavailable(
                f"{self.address} does not prove who it is; name a file with its certificate, or that of who vouches for it, in "
                f"{CERTIFICATES}",
                address=self.address,
            ) from error
        except requests.RequestException as error:
            raise SidecarUnavailable(
                f"no sidecar answers at {self.address}; start one with `trunkline serve`, or name it with --admin",
                address=self.address,
            ) from error
        try:
            body = response.json()
        except ValueError as error:
            raise MalformedFrame(f"{self.address} answered {response.status_code} without JSON") from error
        if response.status_code >= 400:
            # What was refused may not have been read to its end; the server then closes, and a next request would meet that.
            self._session.close()
            raise _error_of(body, response.status_code)
        return body

    def push(self, directory: Path, progress: Callable[[int, int], None] = lambda done, total: None) -> Pushed:
        """Send a bundle folder: only the weights that the sidecar lacks, then the model itself.

        ``progress`` is told the bytes done and to do. Raises BundleError for a bad folder and what the sidecar answers.
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
        self._ask("PUT", f"models/{bundle.name}", json=model)
        return Pushed(bundle.name, len(missing), len(sizes), total_bytes, sum(sizes.values()))


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


def _read_token(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = os.strerror(error.errno or 0) if isinstance(error, OSError) else "it is no token"
        raise ConfigError(f"the token in {path}, which {TOKEN_FILE} names, cannot be read ({reason})", key=TOKEN_FILE) from error


def _error_of(body: Any, status: int) -> TrunklineError:
    try:
        error = body["error"]
        return from_wire(str(error["code"]), str(error["message"]), dict(error["details"]))
    except (KeyError, TypeError, ValueError):
        return MalformedFrame(f"the sidecar answered {status} without saying why")
