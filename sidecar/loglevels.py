"""How much the processes of a running sidecar log, which an operator may change until they end."""

from __future__ import annotations

import logging
import mmap
from typing import Final

from trunkline.errors import InvalidInput

LEVELS: Final = ("debug", "info", "warning", "error")


def current() -> str:
    """Return the level of this process's log."""
    return logging.getLevelName(logging.getLogger().level).lower()


def use(level: str) -> None:
    """Log what is of this level and above from now on. Raises InvalidInput."""
    if level not in LEVELS:
        raise InvalidInput(f"level must be one of {', '.join(LEVELS)}")
    logging.getLogger().setLevel(level.upper())


class SharedLevel:
    """One level for all processes that are forked after this was made. Any thread.

    Each takes it up when it looks, which it does before what it does next.
    """

    def __init__(self) -> None:
        # One byte, which is written at once or not at all: 0 as long as nobody has said anything.
        self._shared = mmap.mmap(-1, 1)
        self._used = 0

    def set(self, level: str) -> None:
        """Say what all are to use, and use it. Raises InvalidInput."""
        use(level)
        self._shared[0] = self._used = 1 + LEVELS.index(level)

    def look(self) -> None:
        """Use what another process has said."""
        said = self._shared[0]
        if said != self._used:
            self._used = said
            use(LEVELS[said - 1])
