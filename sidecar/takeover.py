"""Taking over: a new sidecar gets ready beside the one that runs in the same run directory, and then takes its place.

What it takes over, in this order. *Aside*: its sockets listen beside those of the one that runs, and its engine answers there.
*In place*: its sockets are renamed over the others, so that whoever connects from now on is its own; the other sees that, and
drains. *Alone*: the other has ended, and so the locks of the run directory are free; the segment gets its name, and the admin
endpoint is started. Until it is in place its death changes nothing; when it dies before it is alone, the other, if it still
lives, listens again (``sidecar.supervisor``). The two share the administrator's token, and so the admin endpoint of the one that
ends reaches the engine of the one that comes. For the supervisor's thread.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from trunkline.admin import AdminConnection
from trunkline.errors import TrunklineError

from sidecar.errors import ConfigError
from sidecar.rundirectory import Ownership, RunDirectory, write_token
from sidecar.tenants import Quotas
from sidecar.tenantsockets import Keeper, Listeners, TenantSockets, aside, listen_aside

log = logging.getLogger("trunkline.supervisor")

# An engine that serves answers at once.
_ANSWER_S: Final = 1.0
# How often one that has ended looks whether the other still lives, and how often in a row it must be missed: when the locks
# change hands, nobody has them for a moment.
_LOOK_S: Final = 0.5
_LOOKS: Final = 4


def outstay(run: RunDirectory) -> None:
    """Wait, as one that another has taken over from, until told to end; or until that other is gone.

    For what starts a sidecar anew however it has ended: it would take over in turn. With the locks of the run directory released,
    and SIGTERM and SIGINT blocked, which are waited for.
    """
    log.info("this sidecar waits to be told to end")
    looks = 0
    while looks < _LOOKS:
        if signal.sigtimedwait({signal.SIGTERM, signal.SIGINT}, _LOOK_S) is not None:
            return
        looks = 0 if run.has_owner() or run.has_successor() else looks + 1
    log.error("the sidecar that took over has ended; this one ends as well, so that it is started again")


class TakeOver:
    """What a sidecar does to take a run directory over, and how far it is."""

    def __init__(
        self,
        run: RunDirectory,
        ownership: Ownership,
        succession: contextlib.ExitStack,
        quotas: Quotas,
        *,
        state: Callable[[], Iterable[Path]],
        alone: Callable[[], None],
    ) -> None:
        """``succession`` is closed when there is no need any more to keep others from taking over, too.

        ``state`` returns the files in which what operators do is kept. ``alone`` is called when the other has ended.
        """
        self.is_in_place = False
        self._run = run
        self._ownership = ownership
        self._succession = succession
        self._quotas = quotas
        self._state = state
        self._alone = alone
        self._token = b""
        # By the place that each is going to take, the tenant of it, and its socket.
        self._tenants: dict[Path, tuple[str, object]] = {}
        self._state_before: object = None

    def listen(self, keeper: Keeper) -> tuple[Listeners, bytes]:
        """Return sockets beside those of the sidecar that runs, and the administrator's token of both. Raises ConfigError."""
        run = self._run
        try:
            self._token = run.token.read_bytes()
        except FileNotFoundError:
            # It has ended meanwhile.
            self._token = write_token(run.token)
        except OSError as error:
            raise ConfigError(
                f"{run.token} cannot be read ({os.strerror(error.errno or 0)}); to take over, be the user that runs the sidecar",
                run_dir=str(run.root),
            ) from error
        opened = TenantSockets(run.tenants, keeper).open_aside(self._quotas)
        self._tenants = {path: (name, keeper.listeners[name]) for path, name in opened.items()}
        # What an operator changes from here on, the engine may not learn.
        self._state_before = self._fingerprint()
        return Listeners(listen_aside(run.socket, 0o666), listen_aside(run.relay, 0o600)), self._token

    def is_ready(self) -> bool:
        """Say whether the engine answers, which it does when all is deployed."""
        asked = AdminConnection(str(aside(self._run.socket)), self._token, _ANSWER_S)
        try:
            asked.command("status")
        except TrunklineError:
            return False
        finally:
            asked.close()
        return True

    def put_in_place(self, keeper: Keeper) -> None:
        """Rename the sockets over those of the other, the one that it looks at last."""
        for path, (name, listener) in self._tenants.items():
            # The engine may have made another since.
            if keeper.listeners.get(name) is listener:
                aside(path).rename(path)
        for path in (self._run.relay, self._run.socket):
            aside(path).rename(path)
        self.is_in_place = True
        log.info("in place at %s; the sidecar that ran so far drains", self._run.socket)

    def is_alone(self) -> bool:
        """Say whether the other, and all that it has started, has ended; if so, the run directory is this one's from now on."""
        return self._ownership.take_if_free()

    def finish(self) -> bool:
        """Have what the other had until its end; return whether operators have changed something that the engine may not know."""
        # It is gone, if the other was told to end before it saw that its place is taken.
        write_token(self._run.token, self._token)
        self._alone()
        self._succession.close()
        log.info("the sidecar that ran so far has ended; this one is alone in %s", self._run.root)
        return bool(self._fingerprint() != self._state_before)

    def give_up(self) -> None:
        """Remove what was made aside."""
        for path in (self._run.socket, self._run.relay, *self._tenants):
            aside(path).unlink(missing_ok=True)

    def _fingerprint(self) -> object:
        found = {}
        for path in self._state():
            with contextlib.suppress(FileNotFoundError):
                read = path.stat()
                # They are replaced, not written to.
                found[path] = read.st_ino, read.st_mtime_ns, read.st_size
        return found
