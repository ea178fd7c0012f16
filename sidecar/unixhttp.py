"""HTTP over a Unix socket for requests: requests-unixsocket2, mended where it leaves sockets open.

The library forgets the socket of an attempt to connect that failed, and keeps connections for each path that was asked, not for
each socket. URLs are ``http+unix://`` and the percent-encoded path of the socket.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any, Final
from urllib.parse import unquote, urlsplit

from requests import Session
from requests_unixsocket.adapters import UnixAdapter, UnixHTTPConnection, UnixHTTPConnectionPool

SCHEME: Final = "http+unix://"


def mount_unix(session: Session) -> None:
    """Have a session speak to Unix sockets, too."""
    session.mount(SCHEME, _Adapter())  # type: ignore[no-untyped-call]


class _Connection(UnixHTTPConnection):
    def connect(self) -> None:
        with contextlib.ExitStack() as failing:
            made = failing.enter_context(socket.socket(socket.AF_UNIX))
            made.settimeout(self.timeout)
            made.connect(unquote(urlsplit(self.unix_socket_url).netloc))
            failing.pop_all()
        self.sock = made


class _Pool(UnixHTTPConnectionPool):
    def _new_conn(self) -> _Connection:
        return _Connection(self.socket_path, self.timeout)  # type: ignore[no-untyped-call]


class _Adapter(UnixAdapter):
    def get_connection(self, url: Any, proxies: Any = None) -> Any:
        url = SCHEME + urlsplit(url).netloc
        with self.pools.lock:
            if url not in self.pools:
                self.pools[url] = _Pool(url, self.timeout)  # type: ignore[no-untyped-call]
            return self.pools[url]
