"""Sockets of tenants: each in a folder of its own, which a function mounts instead of ``public``; that says whose it is.

The engine opens and closes them as the quota file says, since it reads it, and hands each to the supervisor. That keeps them for
the next engine: who connects while there is none waits in the backlog. What an engine has handed over is there when it has died
the moment after, since descriptors on their way are held by the kernel.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from sidecar.errors import ConfigError
from sidecar.tenants import Quotas, Tenant

log = logging.getLogger("trunkline.supervisor")

# With this an engine says that it has handed something over.
HANDED_OVER: Final = signal.SIGUSR1
_BACKLOG: Final = 1024
# asm-generic/socket.h. Python does not know it yet, Linux does from 6.16 on.
_SO_PASSRIGHTS: Final = 83
_NAME: Final = "trunkline.sock"
_NAME_LIMIT_BYTES: Final = 64


def listen_at(path: Path, mode: int, group: int | None = None) -> socket.socket:
    """Return a socket that listens at a path, in place of what was there. Raises ConfigError."""
    # Bound aside and renamed into place: whoever finds the name finds a socket that listens.
    temporary = path.with_suffix(".new")
    listener = _bound(temporary, mode, group)
    try:
        temporary.rename(path)
    except OSError as error:
        listener.close()
        raise _cannot_be_made(path, error) from error
    return listener


def aside(path: Path) -> Path:
    """Return where a socket listens that is to take the place of the one at a path."""
    return path.with_suffix(".next")


def listen_aside(path: Path, mode: int, group: int | None = None) -> socket.socket:
    """Return a socket that listens, and may be renamed to a path where another sidecar still does. Raises ConfigError."""
    return _bound(aside(path), mode, group)


def _bound(path: Path, mode: int, group: int | None) -> socket.socket:
    """Return a socket that listens at a path. Raises ConfigError.

    Where the kernel can, no connection to it takes descriptors: who sends some is told EPERM. Where it cannot, they are thrown
    away, because nothing receives them.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    # Connections have it from their listener, from their first moment on.
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        if group is not None:
            os.chown(path, -1, group)
        path.chmod(mode)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise _cannot_be_made(path, error) from error
    return listener


def _cannot_be_made(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"the socket {path} cannot be made ({error}); a socket's path has at most 107 characters, this one {len(str(path))}"
    )


class Listeners(NamedTuple):
    """The sockets for all: the functions', and that of the sidecar's own HTTP server, which asks for others."""

    functions: socket.socket
    relay: socket.socket

    def close(self) -> None:
        for listener in self:
            listener.close()


class Keeper:
    """What the supervisor keeps for engines: ``listeners`` by tenant. Engines hand theirs over through ``channel``."""

    def __init__(self) -> None:
        self.listeners: dict[str, socket.socket] = {}
        self._inside, self.channel = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._inside.setblocking(False)
        self.channel.setblocking(False)
        self._pid = os.getpid()

    def take(self) -> None:
        """Take what engines have handed over. For the supervisor."""
        while True:
            try:
                name, descriptors, _, _ = socket.recv_fds(self._inside, _NAME_LIMIT_BYTES, 1)
            except BlockingIOError:
                return
            self._close(name.decode())
            if descriptors:
                self.listeners[name.decode()] = socket.socket(fileno=descriptors[0])

    def hand_over(self, name: str, listener: socket.socket | None) -> None:
        """Have a tenant's socket kept from now on, or none any more. For engines."""
        try:
            socket.send_fds(self.channel, [name.encode()], [] if listener is None else [listener.fileno()])
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            log.warning("the socket of %s is not kept for the next engine (%s), which will make another", name, reason)
        # Not whoever took in its orphans.
        if os.getppid() == self._pid:
            os.kill(self._pid, HANDED_OVER)

    def _close(self, name: str) -> None:
        if (listener := self.listeners.pop(name, None)) is not None:
            listener.close()

    def forget(self) -> None:
        """Close all sockets: the next engine makes others."""
        for name in list(self.listeners):
            self._close(name)

    def close(self) -> None:
        """Close all of it."""
        self.forget()
        self._inside.close()
        self.channel.close()


class TenantSockets:
    """The sockets in ``folder``, as an engine has them that was left those of ``keeper``. Not for two threads at a time."""

    def __init__(self, folder: Path, keeper: Keeper) -> None:
        self._folder = folder
        self._keeper = keeper
        self._listeners = dict(keeper.listeners)

    def follow(self, quotas: Quotas) -> Mapping[str, socket.socket]:
        """Return the sockets of the tenants that are to have one, by name. Who has the others closes them."""
        wanted = {tenant.name: tenant for tenant in quotas.tenants.values() if tenant.socket}
        if wanted:
            self._folder.mkdir(exist_ok=True)
            # Whoever knows a name may go in; who there is cannot be listed.
            self._folder.chmod(0o711)
        for name in [name for name in self._listeners if name not in wanted or not self._is_as_said(wanted[name])]:
            del self._listeners[name]
            self._keeper.hand_over(name, None)
        for path in self._folder.iterdir() if self._folder.exists() else ():
            if path.name not in wanted:
                remove(path)
        for name in sorted(wanted.keys() - self._listeners.keys()):
            try:
                self._listeners[name] = listener = self._open(wanted[name])
            except (ConfigError, OSError) as error:
                # The others have theirs. This one has none: nobody is let in who should not be.
                log.error("%s has no socket of its own: %s", name, error)
            else:
                self._keeper.hand_over(name, listener)
        return dict(self._listeners)

    def open_aside(self, quotas: Quotas) -> dict[Path, str]:
        """Have sockets kept that may take the place of those of another sidecar; return the tenant of each, by that place.

        Where there is none to be replaced, ``follow`` makes one.
        """
        found = {}
        for tenant in quotas.tenants.values():
            if tenant.socket and self._is_as_said(tenant):
                path = self._folder / tenant.name / _NAME
                self._keeper.listeners[tenant.name] = listen_aside(path, _mode(tenant), tenant.socket_gid)
                found[path] = tenant.name
        return found

    def _open(self, tenant: Tenant) -> socket.socket:
        folder = self._folder / tenant.name
        folder.mkdir(exist_ok=True)
        if tenant.socket_gid is not None:
            os.chown(folder, -1, tenant.socket_gid)
        folder.chmod(0o755 if tenant.socket_gid is None else 0o750)
        return listen_at(folder / _NAME, _mode(tenant), tenant.socket_gid)

    def _is_as_said(self, tenant: Tenant) -> bool:
        try:
            found = (self._folder / tenant.name / _NAME).stat()
        except OSError:
            return False
        is_group = tenant.socket_gid is None or found.st_gid == tenant.socket_gid
        return stat.S_ISSOCK(found.st_mode) and stat.S_IMODE(found.st_mode) == _mode(tenant) and is_group


def _mode(tenant: Tenant) -> int:
    return 0o666 if tenant.socket_gid is None else 0o660


def remove(folder: Path) -> None:
    """Remove the socket in a tenant's folder, and the folder; what somebody else has put there stays."""
    for path in (folder / _NAME, (folder / _NAME).with_suffix(".new"), aside(folder / _NAME)):
        with contextlib.suppress(OSError):
            path.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()


def silence(folder: Path) -> None:
    """Remove the sockets of all tenants, and leave their folders: functions have mounted them, and find the next ones there."""
    for path in folder.glob(f"*/{_NAME}"):
        path.unlink(missing_ok=True)
