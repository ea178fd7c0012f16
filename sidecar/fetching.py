"""Files at an origin, through fsspec: small ones whole, blobs from any byte on; nothing else is asked, and no redirect followed.

Over HTTP a name is resolved by ``CheckedResolver``, and what it allowed is what is connected to; the environment's proxies and
passwords are not used, and nothing is uncompressed. Other stores are reached by the libraries that fsspec has for them, as their
own configuration says. A ``Files`` belongs to the thread that made it. Must not import torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import posixpath
import re
import socket
import time
from collections.abc import Callable, Coroutine, Generator, Iterator
from typing import Any, Final, Protocol, TypeVar

import aiohttp
import fsspec
from aiohttp.abc import AbstractResolver, ResolveResult
from fsspec.implementations.http import HTTPFileSystem

from sidecar.errors import BlobCorrupt, ConfigError, NotAtOrigin, OriginFailed, OriginRefused
from sidecar.origins import Network, Origin, may_lead_to

T = TypeVar("T")

_CHUNK_BYTES: Final = 1 << 20
_BLOCK_BYTES: Final = 8 << 20
# How often it is looked whether to go on, while an origin says nothing.
_LOOK_S: Final = 0.2
_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


class Files(Protocol):
    """What can be read at an origin. Every method raises NotAtOrigin, OriginRefused, OriginFailed."""

    def read(self, path: str, limit_bytes: int) -> bytes:
        """Return a small file. Raises BlobCorrupt when it is longer than ``limit_bytes``."""

    def chunks(self, path: str, start: int, size_bytes: int) -> Generator[bytes, None, None]:
        """Yield a file of ``size_bytes`` from ``start`` on. Raises BlobCorrupt when it is said to have another size.

        To be closed before the files are.
        """

    def close(self) -> None:
        """Let go of connections."""


@contextlib.contextmanager
def opened(
    origin: Origin, *, networks: tuple[Network, ...], idle_s: float, timeout_s: float, checkpoint: Callable[[], None]
) -> Iterator[Files]:
    """Give the files at an origin while the block runs.

    An origin that sends nothing for ``idle_s``, or is at it for ``timeout_s`` in all, is not waited for. ``checkpoint`` is called
    again and again; what it raises ends the work. Raises ConfigError where a library is missing.
    """
    deadline_s = time.monotonic() + timeout_s

    def check() -> None:
        checkpoint()
        if time.monotonic() > deadline_s:
            raise OriginFailed(
                f"the pull is not done after {timeout_s:g} s; another goes on from where it came to, or raise --pull-timeout",
                timeout_s=timeout_s,
            )

    files: Files
    if origin.scheme in ("http", "https"):
        files = WebFiles(origin.url, networks, idle_s, check)
    else:
        try:
            # Its own, not one that others have open in this process.
            system = fsspec.filesystem(origin.scheme, skip_instance_cache=True)
        except ImportError as error:
            raise ConfigError(
                f"{origin.scheme}: needs a library that is not installed; install trunkline[{origin.scheme}] beside the sidecar"
            ) from error
        files = StoredFiles(system, origin.host + origin.path, origin.url, check)
    try:
        yield files
    finally:
        files.close()


class CheckedResolver(AbstractResolver):
    """Resolves the names of origins, and refuses those that lead where none may. What it gives is what is connected to."""

    def __init__(self, networks: tuple[Network, ...]) -> None:
        self._networks = networks

    async def resolve(self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC) -> list[ResolveResult]:
        """Return the addresses of ``host``. Raises OriginRefused when one of them is not allowed, OSError without any."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, family=family)
        results: list[ResolveResult] = []
        for kind, _, proto, _, address in found:
            # One is enough to refuse all: it would be the next one that is tried.
            if not may_lead_to(host, str(address[0]), self._networks):
                raise OriginRefused(
                    f"{host} is at {address[0]}, which is not a public address; if that is meant, the operator names its network "
                    "with --pull-network",
                    host=host,
                )
            results.append(
                ResolveResult(
                    hostname=host, host=str(address[0]), port=port, family=kind, proto=proto, flags=int(socket.AI_NUMERICHOST)
                )
            )
        return results

    async def close(self) -> None:
        """Nothing is held."""


class WebFiles:
    """Files below a URL. Any server of static files will do; one that knows ranges saves what was received already."""

    def __init__(self, url: str, networks: tuple[Network, ...], idle_s: float, check: Callable[[], None]) -> None:
        self._url = url
        self._check = check
        self._idle_s = idle_s
        self._runner = asyncio.Runner()
        self._session: aiohttp.ClientSession | None = None

        async def session(**_: object) -> aiohttp.ClientSession:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=CheckedResolver(networks)),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=aiohttp.ClientTimeout(total=None, connect=idle_s, sock_read=idle_s),
                auto_decompress=False,
                trust_env=False,
                read_bufsize=_CHUNK_BYTES,
            )
            return self._session

        self._system = HTTPFileSystem(asynchronous=True, skip_instance_cache=True, get_client=session)

    def read(self, path: str, limit_bytes: int) -> bytes:
        found = bytearray()
        with self._asked(path, {}) as (response, body):
            self._compare(path, response, 0, limit_bytes, is_limit=True)
            for chunk in body:
                found += chunk
                if len(found) > limit_bytes:
                    raise _longer(path, limit_bytes)
        return bytes(found)

    def chunks(self, path: str, start: int, size_bytes: int) -> Generator[bytes, None, None]:
        with self._asked(path, {"Range": f"bytes={start}-"} if start else {}) as (response, body):
            came = start
            if response.status == 206:
                found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
                if not found or int(found[1]) != start:
                    raise OriginFailed(f"{self._url} was asked for {path} from byte {start} on and sent another part of it")
            else:
                # It does not know ranges: what is there already comes once more.
                came = 0
            self._compare(path, response, came, size_bytes)
            for chunk in body:
                new = chunk[max(0, start - came) :]
                came += len(chunk)
                if new:
                    yield new
            if came < size_bytes:
                raise _broke_off(self._url, path)

    def close(self) -> None:
        if self._session is not None:
            self._runner.run(self._session.close())
        self._runner.close()

    def _compare(
        self, path: str, response: aiohttp.ClientResponse, came: int, size_bytes: int, *, is_limit: bool = False
    ) -> None:
        """Compare what a server announces with what must come, before any of it is kept."""
        announced = response.content_length
        if announced is None or announced + came == size_bytes or (is_limit and announced <= size_bytes):
            return
        if is_limit:
            raise _longer(path, size_bytes)
        raise BlobCorrupt(f"{path} has {announced + came} bytes at the origin instead of {size_bytes}")

    @contextlib.contextmanager
    def _asked(self, path: str, headers: dict[str, str]) -> Iterator[tuple[aiohttp.ClientResponse, Iterator[bytes]]]:
        """Ask for a file, once; give the answer and the bytes that come."""
        with self._translated(path):
            # A size that nobody looks at keeps fsspec from asking for it first.
            file = self._wait(self._system.open_async(f"{self._url}/{path}", size=0))
            # Not as arguments above: its constructor forgets them.
            file.kwargs = {"headers": {"Accept-Encoding": "identity", **headers}, "allow_redirects": False}
            try:
                first = self._wait(file.read(_CHUNK_BYTES))
                response = file.r
                if 300 <= response.status < 400:
                    raise OriginRefused(
                        f"{self._url} answers {response.status} and leads somewhere else; list the origin that has the files"
                    )
                if response.status not in (200, 206):
                    raise OriginFailed(f"{self._url} answered {response.status} to {path}", status=response.status)
                yield response, self._body(file, first)
            finally:
                self._runner.run(file.close())

    def _body(self, file: Any, first: bytes) -> Iterator[bytes]:
        chunk = first
        while chunk:
            yield chunk
            chunk = self._wait(file.read(_CHUNK_BYTES))

    @contextlib.contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotAtOrigin(f"{self._url} has no {path}") from error
        except aiohttp.ClientResponseError as error:
            raise OriginFailed(f"{self._url} answered {error.status} to {path}", status=error.status) from error
        except TimeoutError as error:
            raise OriginFailed(f"{self._url} sent nothing for {self._idle_s:g} s; try again") from error
        except aiohttp.ClientPayloadError as error:
            raise _broke_off(self._url, path) from error
        except (aiohttp.ClientError, OSError) as error:
            raise OriginFailed(f"{self._url} cannot be reached ({type(error).__name__}); try again") from error

    def _wait(self, what: Coroutine[Any, Any, T]) -> T:
        """Run a step, looking meanwhile whether to go on."""

        async def watched() -> T:
            task = asyncio.ensure_future(what)
            try:
                while not (await asyncio.wait({task}, timeout=_LOOK_S))[0]:
                    self._check()
            finally:
                if not task.done():
                    task.cancel()
            # However steadily it comes: not for ever.
            self._check()
            return task.result()

        return self._runner.run(watched())


class StoredFiles:
    """Files of a folder or a bucket, by a file system of fsspec. ``root`` is its path, ``url`` what it is called."""

    def __init__(self, system: fsspec.AbstractFileSystem, root: str, url: str, check: Callable[[], None]) -> None:
        self._system = system
        self._root = root
        self._url = url
        self._check = check

    def read(self, path: str, limit_bytes: int) -> bytes:
        size_bytes = self._size(path)
        if size_bytes > limit_bytes:
            raise _longer(path, limit_bytes)
        return b"".join(self._body(path, 0, size_bytes))

    def chunks(self, path: str, start: int, size_bytes: int) -> Generator[bytes, None, None]:
        found_bytes = self._size(path)
        if found_bytes != size_bytes:
            raise BlobCorrupt(f"{path} has {found_bytes} bytes at the origin instead of {size_bytes}")
        yield from self._body(path, start, size_bytes)

    def close(self) -> None:
        """Connections end with the file system's object."""

    def _size(self, path: str) -> int:
        self._check()
        with self._translated(path):
            found = self._system.info(posixpath.join(self._root, path))
        # A pipe would be waited for without end, and a link may lead anywhere.
        if found.get("type") != "file" or found.get("islink") or found.get("size") is None:
            raise OriginRefused(f"{path} at {self._url} is not a plain file")
        return int(found["size"])

    def _body(self, path: str, start: int, size_bytes: int) -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            with self._translated(path):
                file = stack.enter_context(self._system.open(posixpath.join(self._root, path), "rb", block_size=_BLOCK_BYTES))
                file.seek(start)
            while start < size_bytes:
                self._check()
                with self._translated(path):
                    chunk = file.read(min(_CHUNK_BYTES, size_bytes - start))
                if not chunk:
                    raise _broke_off(self._url, path)
                start += len(chunk)
                yield chunk

    @contextlib.contextmanager
    def _translated(self, path: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotAtOrigin(f"{self._url} has no {path}") from error
        except Exception as error:
            # The libraries of object stores pass on errors of their own, of all sorts.
            raise OriginFailed(f"{path} at {self._url} cannot be read ({type(error).__name__})") from error


def _longer(path: str, limit_bytes: int) -> BlobCorrupt:
    return BlobCorrupt(f"{path} at the origin is longer than the {limit_bytes} bytes that such a file may have")


def _broke_off(url: str, path: str) -> OriginFailed:
    return OriginFailed(f"{url} broke off in the middle of {path}; another pull goes on from there")
