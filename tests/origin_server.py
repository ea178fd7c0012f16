"""An origin over HTTP that serves a folder, and misbehaves where a test says so; and bundles to be pulled from it."""

from __future__ import annotations

import contextlib
import hashlib
import ipaddress
import re
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from trunkline.protocol import TensorSpec

from sidecar.bundle import Bundle, Graph, Node, Symbol, Value, Weight, graph_digest, write_bundle
from tests.waiting import PATIENCE_S


class OriginServer:
    """A server of static files. ``misbehave`` has what it does instead for paths that begin so."""

    def __init__(self, root: Path, certificate: Path | None = None) -> None:
        self.root = root
        self.asked: list[tuple[str, str | None]] = []
        self.headers: list[dict[str, str]] = []
        self.misbehave: dict[str, Callable[[Handler, bytes], None]] = {}
        self.knows_ranges = True
        # Set when a client waits for what does not come; those who keep silent do so until they are released.
        self.waited_for = threading.Event()
        self.release = threading.Event()
        origin = self

        class Bound(Handler):
            served = origin

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        # A client that does not like the certificate, or hangs up on what it is told, is no news.
        self._server.handle_error = lambda request, client_address: None  # type: ignore[method-assign]
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self.url = f"http{'s' if certificate else ''}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.release.set()
        self._server.shutdown()
        self._thread.join(PATIENCE_S)
        self._server.server_close()

    def ranges(self) -> list[str]:
        """Return the ranges that were asked for."""
        return [wanted for _, wanted in self.asked if wanted]

    def paths(self) -> list[str]:
        """Return the kinds of files that were asked for, in order."""
        return [path.split("/")[1] for path, _ in self.asked]


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD as a server of static files does, which is nearly as an object store does."""

    served: OriginServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.served.asked.append((self.path, wanted))
        self.served.headers.append(dict(self.headers))
        path = self.served.root / self.path.lstrip("/")
        content = path.read_bytes() if path.is_file() else b""
        for beginning, act in self.served.misbehave.items():
            if self.path.startswith(beginning):
                act(self, content)
                return
        if not path.is_file():
            self.answer(404, b"")
            return
        found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
        if found and self.served.knows_ranges:
            start, end = int(found[1]), min(int(found[2] or len(content)), len(content) - 1)
            self.answer(206, content[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(content)}"})
        else:
            self.answer(200, content)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        """Send ``content``, announcing ``length`` bytes where that is another number; the connection ends then."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        self.wfile.write(content)
        self.close_connection = length is not None

    def do_HEAD(self) -> None:
        path = self.served.root / self.path.lstrip("/")
        self.send_response(200 if path.is_file() else 404)
        self.send_header("Content-Length", str(path.stat().st_size) if path.is_file() else "0")
        self.send_header("Last-Modified", "Mon, 01 Jan 2024 00:00:00 GMT")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def origin_server(root: Path, certificate: Path | None = None) -> Iterator[OriginServer]:
    """Serve a folder while the block runs, by TLS where there is a certificate."""
    made = OriginServer(root, certificate)
    try:
        yield made
    finally:
        made.close()


def write_certificate(path: Path) -> Path:
    """Write a certificate for 127.0.0.1 that vouches for itself, and its key, to one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    today = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(today - timedelta(days=1))
        .not_valid_after(today + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(secret + certificate.public_bytes(Encoding.PEM))
    return path


# --- what it may do instead -------------------------------------------------------------------------------------------


def status(number: int, **headers: str) -> Callable[[Handler, bytes], None]:
    return lambda handler, content: handler.answer(number, b"elsewhere", headers)


def altered(handler: Handler, content: bytes) -> None:
    handler.answer(200, bytes([content[0] ^ 1]) + content[1:])


def truncated(handler: Handler, content: bytes) -> None:
    handler.answer(200, content[: len(content) // 2], length=len(content))


def truncated_without_a_length(handler: Handler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def announcing_another_length(handler: Handler, content: bytes) -> None:
    handler.answer(200, content + b"more")


def without_end(handler: Handler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    with contextlib.suppress(OSError):
        while not handler.served.release.is_set():
            handler.wfile.write(bytes(65536))


def another_range(handler: Handler, content: bytes) -> None:
    handler.answer(206, content, {"Content-Range": f"bytes 0-{len(content) - 1}/{len(content)}"})


def silent_in_the_middle(handler: Handler, content: bytes) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    silent(handler, content)


def silent(handler: Handler, content: bytes) -> None:
    handler.wfile.flush()
    handler.served.waited_for.set()
    handler.served.release.wait(PATIENCE_S)
    handler.close_connection = True


# --- what may be pulled -----------------------------------------------------------------------------------------------


def chained_bundle(name: str, *weights: list[float]) -> tuple[Bundle, dict[str, bytes]]:
    """Return a bundle that adds all ``weights``, which have the same number of values, one after the other."""
    contents = [np.asarray(values, np.float32).tobytes() for values in weights]
    digests = [hashlib.sha256(content).hexdigest() for content in contents]
    width = len(weights[0])
    graph = Graph(
        symbols=(Symbol("batch", 1, 8),),
        inputs=(TensorSpec("x", "float32", ("batch", width)),),
        outputs=(TensorSpec("y", "float32", ("batch", width)),),
        weights=tuple(
            Weight(digest, "float32", (width,), len(content), zlib.crc32(content))
            for digest, content in zip(digests, contents, strict=True)
        ),
        nodes=tuple(
            Node("aten.add.Tensor", (Value("node", number - 1) if number else Value("input", 0), Value("weight", number)))
            for number in range(len(weights))
        ),
        results=(Value("node", len(weights) - 1),),
    )
    return Bundle(name, "1", graph, graph_digest(graph), "batch", 1e-4, {}), dict(zip(digests, contents, strict=True))


def write_chained_bundle(folder: Path, name: str, *weights: list[float]) -> Bundle:
    """Write such a bundle to a folder."""
    bundle, blobs = chained_bundle(name, *weights)
    write_bundle(folder, bundle, blobs.items())
    return bundle
