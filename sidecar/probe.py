"""``python -m sidecar.probe``: exit 0 when the sidecar is ready, with ``--live`` when it is there at all. For health checks.

With ``--own`` only a sidecar counts that this process can see: not that of another container which has the same run directory.

It imports nothing but the standard library: ``trunkline status`` would spend half a second of CPU on imports each time.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from pathlib import Path

_TIMEOUT_S = 4.0
_REQUEST = "GET %s HTTP/1.0\r\nHost: localhost\r\n\r\n"
# struct ucred: pid, uid, gid.
_PEER = struct.Struct("3i")


def is_well(admin_socket: Path, path: str = "/readyz", *, own: bool = False) -> bool:
    """Ask the admin endpoint whether the engine answers and takes work; with ``/healthz`` whether it answers itself.

    With ``own``, an endpoint in another pid namespace is none.
    """
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(_TIMEOUT_S)
        try:
            sock.connect(str(admin_socket))
            # Who listens has no pid here if it is in no namespace below this one.
            if own and not _PEER.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))[0]:
                return False
            sock.sendall((_REQUEST % path).encode())
            return b" 200 " in sock.recv(64)
        except OSError:
            return False


if __name__ == "__main__":
    asked = "/healthz" if "--live" in sys.argv[1:] else "/readyz"
    folder = Path(os.environ.get("TRUNKLINE_RUN_DIR", "/run/trunkline"))
    sys.exit(not is_well(folder / "admin.sock", asked, own="--own" in sys.argv[1:]))
