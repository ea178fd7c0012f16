"""The sidecar's HTTP port in the place of its socket: what a ``Connection`` does, with the Open Inference Protocol's bytes.

One TCP connection, kept between requests, at most one request under way. Nothing is taken from the environment, no redirect is
followed, and no more of an answer is read than it may have. Imports requests, so it is imported only where it is needed.
"""

from __future__ import annotations

import http.client
import mmap
import os
import re
import socket
import time
from collections.abc import Iterator
from typing import Any, Final
from urllib.parse import quote, urlencode

import urllib3
from numpy.typing import NDArray
from requests import PreparedRequest, RequestException, Response
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidURL
from urllib3.connection import HTTPConnection
from urllib3.exceptions import HTTPError, LocationValueError, NewConnectionError

from trunkline import oip, protocol
from trunkline.arena import page_aligned
from trunkline.connection import view
from trunkline.errors import (
    ArenaFull,
    ConnectionLost,
    InvalidInput,
    MalformedFrame,
    ProtocolError,
    SidecarUnavailable,
    TrunklineError,
    Unauthorized,
    UnknownModel,
    VersionMismatch,
)
from trunkline.protocol import HTTP, Placement
from trunkline.transport import LONGEST_WAIT_S, late, remaining_s

# Memory is taken as it is written, so that most functions never need a larger one.
_SMALLEST_BYTES: Final = 1 << 20
# However much a server wants to send: a function is small.
_MOST_REPLY_BYTES: Final = 1 << 30
# A description, or what went wrong.
_MOST_JSON_BYTES: Final = 1 << 20
_DIGITS: Final = re.compile(r"[0-9]{1,18}")


class HttpConnection:
    """A sidecar that was greeted. ``request`` is writable memory of this process, as long as announced.

    Belongs to one thread at a time, and to the process that opened it.
    """

    transport = HTTP

    def __init__(
        self,
        url: str,
        *,
        token: bytes = b"",
        models: tuple[str, ...] = (),
        request_bytes: int = 0,
        reply_bytes: int = 0,
        deadline: float,
    ) -> None:
        """Greet the sidecar at ``url``, which opens a session as for a ``Connection``; parameters and errors are as there."""
        self.endpoint = self.address = url
        self.closed = False
        self.request_bytes = page_aligned(max(request_bytes, _SMALLEST_BYTES))
        self.reply_bytes = page_aligned(max(reply_bytes, _SMALLEST_BYTES))
        if self.reply_bytes > _MOST_REPLY_BYTES:
            raise ArenaFull(
                f"the outputs take {reply_bytes} bytes, over HTTP a function takes {_MOST_REPLY_BYTES}; send a smaller batch, or "
                "mount the directory of the sidecar's socket",
                asked_bytes=reply_bytes,
                limit_bytes=_MOST_REPLY_BYTES,
            )
        self._pid = os.getpid()
        self._headers = {"Accept-Encoding": "identity", "User-Agent": "trunkline"} | _authorization(token)
        self._adapter = _Adapter(pool_connections=1, pool_maxsize=1)
        # Private: a process that is forked must not write into the memory of this one.
        self.request = mmap.mmap(-1, self.request_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._greet(models[: protocol.MAX_MODELS], request_bytes, reply_bytes, deadline)

    def _greet(self, models: tuple[str, ...], request_bytes: int, reply_bytes: int, deadline: float) -> None:
        asked = [("request_bytes", request_bytes), ("reply_bytes", reply_bytes), ("timeout", _timeout_us(deadline))]
        query = urlencode([*asked, *(("model", model) for model in models)])
        body, _ = self._exchange("GET", f"/v2?{query}", None, {}, _MOST_JSON_BYTES, deadline, is_first=True)
        found = oip.load(body).get("extensions")
        if not isinstance(found, list) or oip.EXTENSION not in found:
            self.close()
            raise VersionMismatch(
                f"what answers at {self.endpoint} speaks the Open Inference Protocol without the extension {oip.EXTENSION!r}: "
                "it is no sidecar, or one that is older than this function; correct TRUNKLINE_URL, or upgrade it"
            )

    def describe(self, model: str, deadline: float) -> Any:
        """Return the plain form of the signature of ``model``."""
        if model in (".", ".."):
            # A path would not keep them.
            raise UnknownModel(f"no model is called {model!r}", model=model)
        body, _ = self._exchange("GET", f"/v2/models/{_segment(model)}", None, {}, _MOST_JSON_BYTES, deadline)
        return oip.signature_of(oip.load(body))

    def infer(
        self,
        model: str,
        inputs: tuple[Placement, ...],
        deadline: float,
        call_id: str = "",
        signature: str = "",
        traceparent: str = "",
    ) -> tuple[tuple[str, NDArray[Any]], ...]:
        """Run ``model`` on tensors that lie in ``request``, as ``Connection.infer`` does. The outputs are read-only views."""
        asked, json_bytes = oip.encode(
            inputs, self.request, timeout_us=_timeout_us(deadline), call_id=call_id, signature_id=signature
        )
        headers = {"Content-Type": "application/octet-stream", oip.HEADER_LENGTH: str(json_bytes)}
        if traceparent:
            headers["traceparent"] = traceparent
        limit_bytes = oip.MAX_HEADER_BYTES + self.reply_bytes
        body, announced = self._exchange("POST", f"/v2/models/{_segment(model)}/infer", asked, headers, limit_bytes, deadline)
        return tuple((output.name, view(body, output)) for output in oip.decode(body, announced))

    def _exchange(
        self,
        method: str,
        path: str,
        sent: bytes | None,
        headers: dict[str, str],
        limit_bytes: int,
        deadline: float,
        *,
        is_first: bool = False,
    ) -> tuple[bytes, str | None]:
        """Return the body of an answer, and what it says of the length of its JSON. Raises what the sidecar tells."""
        if self.is_foreign:
            raise ConnectionLost("the connection belongs to the process that this one was forked from")
        if self.closed:
            raise ConnectionLost(f"the connection to {self.endpoint} is closed")
        left_s = min(remaining_s(deadline), LONGEST_WAIT_S)
        request = PreparedRequest()
        try:
            request.prepare(method=method, url=self.endpoint + path, headers=self._headers | headers, data=sent)
            response = self._adapter.send(request, stream=True, timeout=urllib3.Timeout(total=left_s))  # type: ignore[arg-type]
            try:
                body = self._read(response, limit_bytes)
            finally:
                # Closes the TCP connection, too, unless the answer has been read to its end.
                response.close()
            if response.status_code != 200:
                raise self._refusal(response, body, is_first)
        except (RequestException, HTTPError) as error:
            self.close()
            raise self._failure(error, left_s, is_first) from error
        return body, response.headers.get(oip.HEADER_LENGTH)

    def _read(self, response: Response, limit_bytes: int) -> bytes:
        """Return the body of an answer. Raises ArenaFull when it is longer, ProtocolError when it is compressed."""
        if response.status_code != 200:
            limit_bytes = min(limit_bytes, _MOST_JSON_BYTES)
        if response.headers.get("Content-Encoding", "identity") != "identity":
            raise ProtocolError(f"{self.endpoint} compresses its answers, which no sidecar does; correct TRUNKLINE_URL")
        announced = _number(response, "Content-Length")
        if announced is not None and announced > limit_bytes:
            raise ArenaFull(
                f"the answer takes {announced} bytes, at most {limit_bytes} are read",
                needed_reply_bytes=announced,
                limit_bytes=limit_bytes,
            )
        body: bytes = response.raw.read(limit_bytes + 1, decode_content=False)
        if len(body) > limit_bytes:
            raise ArenaFull(f"the answer takes more than the {limit_bytes} bytes that are read of it", limit_bytes=limit_bytes)
        if announced != len(body) and "Transfer-Encoding" not in response.headers:
            # One without a length is one whose headers broke off: a sidecar says how long its answers are.
            raise ConnectionLost(f"the connection to {self.endpoint} broke in the middle of an answer")
        return body

    def _refusal(self, response: Response, body: bytes, is_first: bool) -> TrunklineError:
        """Return what an answer that is none means."""
        try:
            told = oip.error_of(body)
        except MalformedFrame:
            status, wait_s = response.status_code, _number(response, "Retry-After")
            if status not in (502, 503, 504):
                return ProtocolError(
                    f"{self.endpoint} answers with status {status}, not as a sidecar does; correct TRUNKLINE_URL",
                    status=status,
                )
            # What stands in between says that there is nobody behind it.
            kind = SidecarUnavailable if is_first else ConnectionLost
            lost = kind(f"nobody answers behind {self.endpoint} (status {status})", status=status)
            if wait_s is not None:
                lost.details["retry_after_s"] = wait_s
            return lost
        if isinstance(told, SidecarUnavailable) or (isinstance(told, Unauthorized) and not is_first):
            # Over a socket the engine would have left the connection: it is being started, or this token does not count any more.
            lost = ConnectionLost(told.message)
            lost.details.update(told.details)
            return lost
        return told

    def _failure(self, error: Exception, left_s: float, is_first: bool) -> TrunklineError:
        """Return what it means that no answer came, or not all of it."""
        if isinstance(error, (InvalidURL, LocationValueError)):
            return InvalidInput(
                f"TRUNKLINE_URL is {self.endpoint[:80]!r}, which is no address; it must be like http://127.0.0.1:9470"
            )
        causes = list(_causes(error))
        if any(isinstance(each, NewConnectionError) for each in causes):
            numbers = [each.errno for each in causes if isinstance(each, OSError) and each.errno]
            reason = os.strerror(numbers[0]) if numbers and numbers[0] > 0 else "no such host"
            if is_first:
                return SidecarUnavailable(
                    f"no sidecar answers at {self.endpoint} ({reason}); start one with `trunkline serve`, or correct "
                    "TRUNKLINE_URL",
                    url=self.endpoint,
                )
            return ConnectionLost(f"{self.endpoint} takes no connections any more ({reason})")
        if any(isinstance(each, (TimeoutError, urllib3.exceptions.TimeoutError)) for each in causes):
            return late("answer", left_s)
        if any(isinstance(each, http.client.HTTPException) and not isinstance(each, _LOST) for each in causes):
            return ProtocolError(f"what answers at {self.endpoint} does not speak HTTP; correct TRUNKLINE_URL")
        return ConnectionLost(f"the connection to {self.endpoint} broke")

    @property
    def is_foreign(self) -> bool:
        """Whether another process opened this connection, and this one was forked from it."""
        return self._pid != os.getpid()

    def close(self) -> None:
        """Close the connection; closing twice is safe. The memory lives on while views of it do."""
        self.closed = True
        self._adapter.close()


# The other side left in the middle of an answer, or before one.
_LOST: Final = (http.client.RemoteDisconnected, http.client.IncompleteRead)


class _Socket(socket.socket):
    """One whose timeout is for all that follows, not for each piece: who sends byte by byte is not waited for without end."""

    _until_s = 0.0

    def settimeout(self, value: float | None) -> None:
        self._until_s = time.monotonic() + (LONGEST_WAIT_S if value is None else value)
        super().settimeout(value)

    def recv_into(self, *arguments: Any) -> int:
        self._use_what_is_left()
        return super().recv_into(*arguments)

    def sendall(self, *arguments: Any) -> None:
        self._use_what_is_left()
        super().sendall(*arguments)

    def _use_what_is_left(self) -> None:
        left_s = self._until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the time is up")
        super().settimeout(left_s)


class _Line(HTTPConnection):
    def connect(self) -> None:
        began_s = time.monotonic()
        super().connect()
        timeout_s = self.sock.gettimeout()
        self.sock = _Socket(fileno=self.sock.detach())
        self.sock.settimeout(None if timeout_s is None else max(timeout_s - (time.monotonic() - began_s), 0.001))


class _Lines(urllib3.HTTPConnectionPool):
    ConnectionCls = _Line


class _Adapter(HTTPAdapter):
    """What requests sends with: without its sessions, and so without redirects, cookies, proxies and netrc."""

    def init_poolmanager(self, *arguments: Any, **options: Any) -> None:
        super().init_poolmanager(*arguments, **options)
        self.poolmanager.pool_classes_by_scheme = {"http": _Lines}


def _authorization(token: bytes) -> dict[str, str]:
    if not token:
        return {}
    if not all(0x21 <= byte <= 0x7E for byte in token):
        raise Unauthorized("the token has characters that cannot be sent over HTTP; make another with `trunkline tenant rotate`")
    return {"Authorization": f"Bearer {token.decode('ascii')}"}


def _number(response: Response, header: str) -> int | None:
    """Return the number in a header; None where there is none, or one that nobody means."""
    text = response.headers.get(header, "")
    return int(text) if _DIGITS.fullmatch(text) else None


def _segment(model: str) -> str:
    # Several models asked together stand side by side in a path, too.
    return quote(model, safe=protocol.JOINT)


def _timeout_us(deadline: float) -> int:
    # A deadline that has passed is found before anything is sent; the message just needs a valid number.
    return int(min(max((deadline - time.monotonic()) * 1_000_000, 1), oip.MAX_TIMEOUT_US))


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
