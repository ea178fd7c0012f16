"""Who is at the other end of a Unix socket."""

from __future__ import annotations

import socket
import struct
from typing import Final, NamedTuple

# struct ucred: pid, uid and gid.
_CREDENTIALS: Final = struct.Struct("=iII")


class Peer(NamedTuple):
    """What the kernel says of the process that made a connection, of when it did. Between containers its pid is 0."""

    pid: int
    uid: int
    gid: int


def peer_of(sock: socket.socket) -> Peer:
    """Return who has connected to a Unix socket."""
    return Peer(*_CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)))
