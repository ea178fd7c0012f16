"""The watchdog: which run takes longer than it can need. Pure: the clock is passed in. Part of the supervisor.

Graphs have no loops, so every run ends; but it may be long, and one that a device is at cannot be called back: only the engine's
death ends it. A run may take *limit_s*, or ten times what it was measured or reckoned to take, whichever is more. What nobody has
measured may be anything, a first run on a slow machine: it is taken to need ``limit_s`` itself.

Time counts only as far as it was seen to pass. A machine that was asleep, or a container that was frozen, computes nothing
meanwhile, but its clock goes on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final, NamedTuple

from sidecar.journal import Running

TIMES: Final = 10
_LONGEST_LOOK_S: Final = 1.0
# Between two looks, as a multiple of what is meant to be between them.
_MOST_LOOKS: Final = 2.0


class Overdue(NamedTuple):
    """A run, how long it has been seen to take, and how long it might."""

    running: Running
    took_s: float
    allowed_s: float


class Watchdog:
    """Looks at what one engine runs, every ``look_s`` or so. Without a limit (0) nothing is ever overdue."""

    def __init__(self, limit_s: float) -> None:
        self.look_s = min(_LONGEST_LOOK_S, limit_s / 2) if limit_s else math.inf
        self._limit_s = limit_s
        self._looked_s = -math.inf
        # For how long each run was seen, by place and sequence number.
        self._seen_s: dict[tuple[int, int], float] = {}

    def is_due(self, now: float) -> bool:
        """Say whether it is time to look."""
        return now >= self._looked_s + self.look_s

    def due_s(self, now: float) -> float:
        """Return in how many seconds it is; infinity without a limit."""
        return max(0.0, self._looked_s + self.look_s - now) if self._limit_s else math.inf

    def begin(self, now: float) -> None:
        """Forget what was seen: another engine is started."""
        self._looked_s = now
        self._seen_s.clear()

    def look(self, running: Iterable[Running], now: float) -> Overdue | None:
        """Note what runs now; return the run that is longest overdue, if any is."""
        passed_s = min(now - self._looked_s, _MOST_LOOKS * self.look_s)
        self._looked_s = now
        seen_s, found = {}, []
        for each in running:
            name = each.place, each.sequence
            known_s = self._seen_s.get(name)
            took_s = min(max(0.0, now - each.began_s), passed_s) if known_s is None else known_s + passed_s
            seen_s[name] = took_s
            allowed_s = max(self._limit_s, TIMES * (each.expected_s or self._limit_s))
            if known_s is not None and took_s > allowed_s:
                found.append(Overdue(each, took_s, allowed_s))
        self._seen_s = seen_s
        return max(found, key=lambda each: each.took_s - each.allowed_s, default=None)
