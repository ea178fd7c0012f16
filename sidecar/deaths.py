"""Deaths: how engines end, and what the next one is told of that. Part of the supervisor; an engine is forked with a copy.

Joins the journal of the engine there is, the watchdog that looks at it, and the quarantine of what engines have died of.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Final

from sidecar.journal import Journal, Page, Running
from sidecar.quarantine import Quarantine, Suspects
from sidecar.watchdog import TIMES, Watchdog

log = logging.getLogger("trunkline.supervisor")

# What people and their tools end processes with, and what ends one that drains for too long; faults come as other signals.
_BY_HAND: Final = {signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGALRM}
_STATISTICS: Final = Path("/proc/vmstat")


class Deaths:
    """For engines with so many devices; ``watchdog_s`` is what one run may take, 0 for any time."""

    def __init__(self, device_count: int, watchdog_s: float) -> None:
        self._device_count = device_count
        self._journal = Journal(device_count)
        self._watchdog = Watchdog(watchdog_s)
        self._quarantine = Quarantine()
        self._kill_count = 0
        # The run that the engine there is was killed for.
        self._overdue: Running | None = None
        self._out_of_memory_count = 0

    # --- the engine --------------------------------------------------------------------------------------------------

    def page(self, device: int) -> Page:
        """Return where it is to be noted what one of the devices is at."""
        return self._journal.page(device)

    def suspects(self, clock: Callable[[], float]) -> Suspects:
        """Return whose requests are to be run alone, or refused."""
        return self._quarantine.suspects(self._journal.mark, clock, self._journal.mark_lifted)

    def facts(self) -> dict[str, object]:
        """Return how often what has happened, in this sidecar's life."""
        return {"watchdog_kills": self._kill_count, "quarantines": self._quarantine.count}

    # --- the supervisor ----------------------------------------------------------------------------------------------

    def engine_starts(self, now: float) -> None:
        """Call right before an engine is forked."""
        self._out_of_memory_count = _killed_for_memory()
        self._quarantine.engine_starts(now)
        self._watchdog.begin(now)

    def due_s(self, now: float) -> float:
        """Return in how many seconds to ``watch`` again; infinity for never."""
        return self._watchdog.due_s(now)

    def watch(self, pid: int, now: float) -> bool:
        """Look at what the engine is at, if it is time to; say whether it has to be killed, which is said once, and why."""
        if not self._watchdog.is_due(now):
            return False
        overdue = self._watchdog.look(self._journal.running(), now)
        if overdue is None or self._overdue is not None:
            return False
        running, took_s, allowed_s = overdue
        self._overdue = running
        self._kill_count += 1
        log.error(
            "engine %d is killed: it has been at one stage, for %d requests, for %.1f s; %.1f s are allowed, %s. If that is what "
            "it takes here, start the sidecar with a larger --watchdog (0: any time)",
            *(pid, running.call_count, took_s, allowed_s),
            f"as the watchdog is set, or {TIMES} times the {running.expected_s:.6f} s that were expected"
            if running.expected_s
            else f"{TIMES} times as the watchdog is set, since nobody has measured what such a stage takes",
        )
        return True

    def engine_died(self, pid: int, status: int, now: float) -> bool:
        """Read what an engine left behind, tell whom it concerns, and have a new journal for the next one.

        ``status`` is how it ended, as ``os.wait`` has it. Return whether it has computed anything for anybody.
        """
        entries = self._journal.entries()
        # What else it was at had nothing to do with it.
        guilty = [entry for entry in entries if entry.running == self._overdue]
        # The kernel, which is out of memory, kills with the same signal as people do.
        by_hand = (
            os.WIFSIGNALED(status)
            and os.WTERMSIG(status) in _BY_HAND
            and self._overdue is None
            and _killed_for_memory() == self._out_of_memory_count
        )
        self._quarantine.lift(self._journal.lifted())
        marked = self._journal.marked()
        for kind, call, refused_s in self._quarantine.engine_died(guilty or entries, marked, now, by_hand=by_hand):
            told = pid, kind.model, kind.tenant, call.call_id or "-"
            if refused_s:
                log.error(
                    "engine %d ended while it computed %s for %s (call %s), as one before it did, and this time nothing else; "
                    "such requests are refused for %.0f s, then one is tried: look at what that function sends",
                    *(*told, refused_s),
                )
            else:
                log.warning("engine %d ended while it computed %s for %s (call %s); the next such request is run alone", *told)
        self._overdue = None
        has_served = self._journal.was_used()
        self.close()
        self._journal = Journal(self._device_count)
        return has_served

    def close(self) -> None:
        """Let go of the journal, in a process that has nothing to do with it."""
        self._journal.close()


def _killed_for_memory() -> int:
    """Return how many processes the kernel has killed for want of memory, on all of this machine; 0 where it does not tell."""
    try:
        lines = _STATISTICS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)
