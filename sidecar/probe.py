"""``python -m sidecar.probe``: exit 0 when the sidecar is ready. For a container's health check, every few seconds.

It imports nothing but the standard library: ``trunkline status`` would spend half a second of CPU on imports each time.
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

_TIMEOUT_S = 4.0
_REQUEST = b"GET /readyz HTTP/1.0\r\nHost: localhost\r\n\r\n"


def is_ready(admin_socket: Path) -> bool:
    """Ask the admin endpoint whether the engine answers and takes work."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(str(admin_socket))
            sock.sendall(_REQUEST)
            return b" 200 " in sock.recv(64)
        except OSError:
            return False


if __name__ == "__main__":
    sys.exit(not is_ready(Path(os.environ.get("TRUNKLINE_RUN_DIR", "/run/trunkline")) / "admin.sock"))
