"""The run directory: where a running sidecar can be found, and whose it is. One sidecar runs in it at most, one may take over."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.disk import opened
from sidecar.errors import ConfigError

log = logging.getLogger("trunkline.supervisor")

# The folder of what belongs to another device than the first.
_DEVICE: Final = re.compile(r"device-\d+")
_LOOK_S: Final = 0.02
# struct flock: kind, whence, start, length, pid.
_FLOCK: Final = struct.Struct("@hhqqi")


@dataclass(frozen=True)
class RunDirectory:
    """Where a running sidecar can be found. Functions mount ``public`` and nothing else."""

    root: Path

    @property
    def public(self) -> Path:
        return self.root / "public"

    @property
    def socket(self) -> Path:
        return self.public / "trunkline.sock"

    @property
    def relay(self) -> Path:
        """Return the socket at which the sidecar's own HTTP server asks in the stead of those who ask it."""
        return self.root / "relay.sock"

    @property
    def tenants(self) -> Path:
        """Return where tenants have folders with sockets of their own; a function mounts its tenant's instead of ``public``."""
        return self.root / "tenants"

    @property
    def admin_socket(self) -> Path:
        return self.root / "admin.sock"

    @property
    def token(self) -> Path:
        return self.root / "admin.token"

    @property
    def constraints(self) -> Path:
        return self.root / "constraints.json"

    @property
    def places(self) -> Path:
        return self.root / "places.json"

    def pins(self, number: int) -> Path:
        """Return where it is kept which models an operator pinned on a device."""
        return self.device_folder(number) / "pins.json"

    def device_folder(self, number: int) -> Path:
        """Return the folder of what belongs to one device; all there is lies in it where there is but one."""
        return self.root / f"device-{number}" if number else self.root

    def device_folders(self, count: int) -> list[Path]:
        """Return the folders there are of devices beyond so many."""
        own = {self.device_folder(number) for number in range(count)}
        return [folder for folder in sorted(self.root.glob("device-*")) if folder not in own and _DEVICE.fullmatch(folder.name)]

    @property
    def pull_list(self) -> Path:
        """Return where it stands what has come of the list of models to pull."""
        return self.root / "pull-list.json"

    @property
    def pull_list_lock(self) -> Path:
        return self.root / "pull-list.lock"

    @property
    def quotas(self) -> Path:
        return self.root / "quotas.toml"

    @property
    def admin_tokens(self) -> Path:
        return self.root / "admin-tokens.toml"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def successor_lock(self) -> Path:
        """Return what a sidecar holds that is about to take over from the one that runs."""
        return self.root / "successor.lock"

    def create(self) -> None:
        """Make the directories. ``public`` is open to any uid, since functions run as all sorts of them."""
        self.root.mkdir(parents=True, exist_ok=True)
        self.public.mkdir(exist_ok=True)
        self.public.chmod(0o755)

    @contextlib.contextmanager
    def owned(self, patience_s: float) -> Iterator[None]:
        """Have the directory for as long as the block runs. Children that are forked meanwhile have it with their parent.

        Raises ConfigError at once when another sidecar runs in it, and after ``patience_s`` when what a killed one has left,
        which has been told to end, still does.
        """
        with self.ownership() as ownership:
            ownership.take(patience_s)
            yield

    @contextlib.contextmanager
    def ownership(self) -> Iterator[Ownership]:
        """Give the means to have the directory, which ends with the block."""
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            yield Ownership(self, descriptor)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def succession(self) -> Iterator[None]:
        """Be the one that is about to take the directory over, while the block runs. Raises ConfigError beside another."""
        with opened(self.successor_lock, os.O_RDWR | os.O_CREAT) as descriptor:
            try:
                # This process's alone, as is the first of those of an owner.
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise self._refusal("another sidecar is about to take over") from error
            yield

    def has_successor(self) -> bool:
        """Say whether a sidecar lives that is about to take over. Not for that itself."""
        return _is_locked(self.successor_lock)

    def has_owner(self) -> bool:
        """Say whether a sidecar lives that has the directory. Not for that itself, which would lose it."""
        return _is_locked(self.lock)

    def _refusal(self, problem: str) -> ConfigError:
        return ConfigError(f"{problem} in {self.root}; wait until it has, or choose another --run-dir", run_dir=str(self.root))


class Ownership:
    """The locks of a run directory, as one process has them with its children.

    Locks of the file system, not a pid file: they are free the moment their holder is gone, however it went. Of the two on one
    file a record lock is this process's alone, the other also its children's.
    """

    def __init__(self, run: RunDirectory, descriptor: int) -> None:
        self._run = run
        self._descriptor = descriptor

    def take(self, patience_s: float) -> None:
        """Take the directory. Raises ConfigError as ``RunDirectory.owned`` does."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"a sidecar is running in {self._run.root} already; stop it, have this one take over (--take-over), or choose "
                "another --run-dir",
                run_dir=str(self._run.root),
            ) from error
        if self._run.has_successor():
            # From one that has died since.
            raise self._run._refusal("another sidecar is about to take over")
        self._await_children_of_the_last(patience_s)

    def take_if_free(self) -> bool:
        """Take the directory, if no other sidecar runs in it and nothing of one is left; return whether it is this one's now."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def _await_children_of_the_last(self, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        waiting = False
        while not self.take_if_free():
            root = self._run.root
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"what a sidecar that was killed has left in {root} has not ended within {patience_s:g} s; end "
                    f"these processes (fuser {self._run.lock} shows them), or choose another --run-dir",
                    run_dir=str(root),
                )
            if not waiting:
                log.warning("a sidecar that was killed has left processes in %s; they are waited for", root)
            waiting = True
            time.sleep(_LOOK_S)


def _is_locked(path: Path) -> bool:
    """Say whether another process has the record lock of a file."""
    try:
        with opened(path, os.O_RDWR) as descriptor:
            # Not by taking the lock, which would be in the way of whoever is about to.
            asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, *_ = _FLOCK.unpack(fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    except FileNotFoundError:
        return False
    return bool(kind != fcntl.F_UNLCK)


def write_token(path: Path, token: bytes = b"") -> bytes:
    """Write an administrator's token, a new one unless it is given, readable by this user alone; return it."""
    token = token or secrets.token_hex(32).encode()
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(token)
    temporary.rename(path)
    return token
