"""The quota file of a running sidecar, which is read anew whenever somebody says that it has changed.

It is read in a thread of its own, so that neither the engine nor a session waits for a disk. A file with a mistake changes
nothing: what was in force stays, for an engine that is started after it, too.
"""

from __future__ import annotations

import functools
import logging
import os
import queue
from collections.abc import Callable
from pathlib import Path

from sidecar.errors import ConfigError
from sidecar.quotaedit import keep_copy
from sidecar.quotas import parse_quotas, read_quotas, read_text
from sidecar.tenants import Quotas

log = logging.getLogger("trunkline.quotas")

Told = Callable[[Quotas | ConfigError], None]


class QuotaFile:
    """A quota file, and a copy of it from when it was last read without a mistake. ``run`` is a thread."""

    def __init__(self, path: Path, in_force: Path) -> None:
        """``in_force`` is where the copy is kept."""
        self._path = path
        self._in_force = in_force
        self._asked: queue.SimpleQueue[Told] = queue.SimpleQueue()

    def read(self) -> Quotas:
        """Return what the file says. Raises ConfigError."""
        text = read_text(self._path)
        quotas = parse_quotas(text, self._path.name)
        try:
            keep_copy(self._in_force, text)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            log.warning("the quotas in force cannot be kept (%s); an engine that is started again reads %s", reason, self._path)
        return quotas

    def read_or_keep(self) -> Quotas:
        """Return what the file says, or, when there is a mistake in it, what was in force. Raises ConfigError without either."""
        try:
            return self.read()
        except ConfigError as error:
            log.error("%s; the quotas that were in force stay", error.message)
            return read_quotas(self._in_force)

    def reload(self, told: Told = lambda outcome: None) -> None:
        """Have the file read; ``told`` is then called with what is wrong, or with the quotas when all is as they say.

        Any thread, and a signal's handler; ``told`` is called in another.
        """
        self._asked.put(told)

    def run(self, use: Callable[[Quotas, Callable[[], None]], None]) -> None:
        """Read the file each time that is asked for, and have its quotas used; without an end.

        ``use`` is given the quotas, and what to call when all is deployed that tenants may use by them.
        """
        while True:
            told = self._asked.get()
            try:
                quotas = self.read()
            except ConfigError as error:
                log.error("%s; the quotas in force stay", error.message)
                told(error)
            else:
                use(quotas, functools.partial(self._used, quotas, told))

    def _used(self, quotas: Quotas, told: Told) -> None:
        log.info("%d tenants are in force, as %s says, and what they may use is deployed", len(quotas.tenants), self._path)
        told(quotas)
