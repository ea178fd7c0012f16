"""What systemd is told of this process: that it is ready, alive, stopping (sd_notify, ``Type=notify`` and ``WatchdogSec=``).

Datagrams to the Unix socket that NOTIFY_SOCKET names; nothing where there is none. For the main process: the variables are taken
out of the environment, so that its children, gunicorn among them, do not speak for it.
"""

from __future__ import annotations

import contextlib
import os
import socket


class Notifier:
    """The way to whoever supervises this process. Telling never fails: a supervisor that is gone is nobody's loss."""

    def __init__(self, address: str, *, is_watched: bool = False) -> None:
        """``address`` is a path, or a name in the abstract namespace with ``@`` before it; empty: nobody is told."""
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._is_watched = is_watched

    @classmethod
    def from_environment(cls) -> Notifier:
        """Take the address from NOTIFY_SOCKET, and whether signs of life are waited for from WATCHDOG_USEC."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        interval, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
        return cls(address, is_watched=bool(interval) and pid in ("", str(os.getpid())))

    def ready(self) -> None:
        """Say that the sockets listen."""
        self._tell("READY=1")

    def alive(self) -> None:
        """Give a sign of life, where one is waited for. Call it more than twice in the interval that was asked for."""
        if self._is_watched:
            self._tell("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that nothing more is taken."""
        self._tell("STOPPING=1")

    def _tell(self, state: str) -> None:
        if not self._address:
            return
        # Never waited for: a full queue of a supervisor that hangs must not hold up this one.
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        # Nor does it end for want of a descriptor.
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sock:
            sock.sendto(state.encode(), self._address)
