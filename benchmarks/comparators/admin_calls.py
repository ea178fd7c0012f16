"""Asks a sidecar's admin endpoint for what operators and Prometheus ask, again and again, in a process of its own.

Arguments: the path of ``admin.sock``, and the seconds it rests after each call. A line on standard input begins, and the next
one ends: calls made between are printed.
"""

from __future__ import annotations

import select
import sys
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import requests
import requests_unixsocket

ROUTES = ("/admin/v1/status", "/admin/v1/models", "/admin/v1/blocks", "/metrics")


def session_of(path: str | Path) -> Callable[[str], None]:
    """Return what asks for a route at the socket ``path``. Raises HTTPError when it is refused."""
    session: requests.Session = requests_unixsocket.Session()
    session.trust_env = False
    base = f"http+unix://{quote(str(path), safe='')}"
    return lambda route: session.get(base + route, timeout=600).raise_for_status()


def main() -> None:
    ask, rest_s = session_of(sys.argv[1]), float(sys.argv[2])
    while sys.stdin.readline():
        count = 0
        while not select.select([sys.stdin], [], [], rest_s)[0]:
            ask(ROUTES[count % len(ROUTES)])
            count += 1
        sys.stdin.readline()
        print(count, flush=True)


if __name__ == "__main__":
    main()
