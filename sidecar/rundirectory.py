"""The run directory: where a running sidecar can be found, and whose it is. At most one sidecar runs in it."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.errors import ConfigError

log = logging.getLogger("trunkline.supervisor")

# The folder of what belongs to another device than the first.
_DEVICE: Final = re.compile(r"device-\d+")
_LOOK_S: Final = 0.02


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
    def quotas(self) -> Path:
        return self.root / "quotas.toml"

    @property
    def admin_tokens(self) -> Path:
        return self.root / "admin-tokens.toml"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

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
        # Locks of the file system, not a pid file: they are free the moment their holder is gone, however it went. Of the two on
        # this file a record lock is this process's alone, the other also its children's.
        descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"a sidecar is running in {self.root} already; stop it or choose another --run-dir",
                    run_dir=str(self.root),
                ) from error
            self._await_children_of_the_last(descriptor, patience_s)
            yield
        finally:
            os.close(descriptor)

    def _await_children_of_the_last(self, descriptor: int, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        waiting = False
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"what a sidecar that was killed has left in {self.root} has not ended within {patience_s:g} s; end "
                        f"these processes (fuser {self.lock} shows them), or choose another --run-dir",
                        run_dir=str(self.root),
                    ) from error
                if not waiting:
                    log.warning("a sidecar that was killed has left processes in %s; they are waited for", self.root)
                waiting = True
                time.sleep(_LOOK_S)
            else:
                return


def write_token(path: Path) -> bytes:
    """Write a new administrator's token, readable by this user alone, and return it."""
    token = secrets.token_hex(32).encode()
    temporary = path.with_suffix(".new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(token)
    temporary.rename(path)
    return token
