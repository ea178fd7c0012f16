"""Where this process asks, and how: at the sidecar's socket where there is one, else over HTTP at TRUNKLINE_URL.

Whoever asks over HTTP goes on looking for a socket, and uses it from when it is there.
"""

from __future__ import annotations

import os
import re
import time
from typing import TYPE_CHECKING, Any, Final

from trunkline.connection import Connection
from trunkline.errors import InvalidInput, SidecarUnavailable

if TYPE_CHECKING:
    from trunkline.httpconnection import HttpConnection

DEFAULT_SOCKETS = (
    "/run/trunkline/trunkline.sock",
    # Stock faasd and `faas-cli local-run` mount a "secret" that is a directory here.
    "/var/openfaas/secrets/trunkline/trunkline.sock",
)
# A look costs a microsecond or two; a call over the socket is answered in hundreds.
_LOOK_S: Final = 1.0
# A socket nobody listens at is left alone for so long. One that is put in its place is found when this has passed.
_REFUSED_S: Final = 1.0
_URL: Final = re.compile(r"http://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~-]+)*/?")


class Endpoint:
    """The places where a sidecar may be, in the order in which they are preferred. Any thread.

    They are TRUNKLINE_SOCKET, or else two well-known sockets; and then TRUNKLINE_URL.
    """

    def __init__(self, only: str = "") -> None:
        """``only`` is the path of a socket, or the URL, that is asked instead of all these."""
        self._only = only
        self._wanted: str | None = None
        self._look_at_s = 0.0
        # Sockets nobody listens at, and when each is worth another try.
        self._refused: dict[str, float] = {}

    def wanted(self) -> str | None:
        """Return where calls should go now, looked up once a second; None where any connection there is will do.

        Raises InvalidInput.
        """
        now = time.monotonic()
        if now >= self._look_at_s:
            self._look_at_s = now + _LOOK_S
            self._wanted = self.find() if os.environ.get("TRUNKLINE_URL") and not self._only else None
        return self._wanted

    def find(self) -> str:
        """Return the path of a socket, or a URL. Raises SidecarUnavailable, naming the places looked at, and InvalidInput."""
        if self._only:
            return self._only
        explicit, url = os.environ.get("TRUNKLINE_SOCKET"), os.environ.get("TRUNKLINE_URL")
        if explicit and not url:
            return explicit
        now = time.monotonic()
        for path in (explicit,) if explicit else DEFAULT_SOCKETS:
            if self._refused.get(path, now) <= now and os.path.exists(path):
                return path
        if url:
            return _checked(url)
        raise SidecarUnavailable(
            f"no sidecar: TRUNKLINE_SOCKET is not set and neither {' nor '.join(DEFAULT_SOCKETS)} exists; start "
            "`trunkline serve` on this node and mount the directory of its socket into the function, or set TRUNKLINE_URL"
        )

    def refused(self, where: str) -> bool:
        """Note that nobody answers at ``where``; return whether another place is to be tried at once."""
        self._look_at_s = 0.0
        if self._only or is_url(where) or not os.environ.get("TRUNKLINE_URL"):
            # All places have been tried: the next time begins with the first.
            self._refused.clear()
            return False
        self._refused[where] = time.monotonic() + _REFUSED_S
        return True

    def forget(self) -> None:
        """Look again before the next call."""
        self._look_at_s = 0.0


def is_url(where: str) -> bool:
    return where.startswith("http://")


def connect(where: str, **options: Any) -> Connection | HttpConnection:
    """Open a connection to ``where``, with the options of ``Connection``, which both kinds take."""
    if is_url(where):
        # Memory and a tenth of a second, which functions that have a socket are spared.
        from trunkline.httpconnection import HttpConnection

        return HttpConnection(where, **options)
    return Connection(where, **options)


def _checked(url: str) -> str:
    if not _URL.fullmatch(url):
        raise InvalidInput(f"TRUNKLINE_URL is {url[:80]!r}; it must be like http://127.0.0.1:9470, without a user or a query")
    return url.rstrip("/")
