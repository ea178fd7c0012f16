"""``python -m sidecar.probe``: exit 0 when the sidecar is ready, with ``--live`` when it is there at all. For health checks.

It imports nothing but the standard library: ``trunkline status`` would spend half a second of CPU on imports each time.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_TIMEOUT_S = 4.0
_REQUEST = "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n"


def is_well(admin_socket: Path, path: str = "/readyz") -> bool:
    """Ask the admin endpoint whether the engine answers and takes work; with ``/healthz`` whether it answers itself."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(str(admin_socket))
            sock.sendall((_REQUEST % path).encode())
            return b" 200 " in sock.recv(64)
        except OSError:
            return False


if __name__ == "__main__":
    asked = "/healthz" if sys.argv[1:] == ["--live"] else "/readyz"
    sys.exit(not is_well(Path(os.environ.get("TRUNKLINE_RUN_DIR", "/run/trunkline")) / "admin.sock", asked))
