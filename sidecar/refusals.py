"""Refusals: what requests are told that are not answered, in the log, too, and how many they were. Part of the engine thread."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from trunkline.errors import DeadlineExceeded, SidecarFault, TrunklineError

from sidecar.logs import RateLimit
from sidecar.outcomes import Outcomes
from sidecar.ports import Work
from sidecar.scheduler import Scheduler

log = logging.getLogger("trunkline.engine")
# One line a refused request, as long as there are not too many of them.
refusals = logging.getLogger("trunkline.engine.refusals")
refusals.addFilter(RateLimit(20))


class Refusals:
    """Tells sessions that their requests have failed. Of these, ``expired_count`` came too late."""

    def __init__(self, scheduler: Scheduler[Work], outcomes: Outcomes, clock: Callable[[], float]) -> None:
        self.failed_count = 0
        self.expired_count = 0
        self._scheduler = scheduler
        self._outcomes = outcomes
        self._clock = clock

    def fail(self, work: Work, error: TrunklineError) -> None:
        """Tell the session of a request what was wrong."""
        self.failed_count += 1
        if work.inputs is not None:
            self._outcomes.failed(work.model, error.code)
        told = work.model, work.call_id or "-", error.code, error.message
        refusals.info("%s refused (call %s): %s: %s", *told, extra=_fields(work))
        work.session.fail(work.request_id, error)

    def turn_away(self, work: Work, error: TrunklineError) -> None:
        """Refuse a request that was taken from the queue and has no leases."""
        self._scheduler.leave(work)
        self.fail(work, error)

    def late(self, work: Work, doing: str) -> DeadlineExceeded:
        """Return what a request is told whose deadline has passed while it was ``doing`` something."""
        late_s = self._clock() - work.deadline
        # Of other tenants nobody is told anything.
        waiting_count = self._scheduler.waiting_count(work.tenant)
        return DeadlineExceeded(
            f"the deadline passed {late_s:.3f} s ago while the request was {doing}; {waiting_count} others of the same tenant "
            "wait",
            late_s=round(late_s, 3),
            waiting_count=waiting_count,
        )


def as_told(work: Work, error: Exception) -> TrunklineError:
    """Return what a request is told of an error on its way: what is no error of ours is an incident."""
    return error if isinstance(error, TrunklineError) else incident(f"{work.model} (call {work.call_id})", error, work)


def incident(what: str, error: Exception, work: Work | None = None) -> SidecarFault:
    """Log an error that nobody has foreseen, with its trace, of a request or not; return what others are told of it."""
    number = secrets.token_hex(4)
    log.error("incident %s: %s failed", number, what, exc_info=error, extra=None if work is None else _fields(work))
    return SidecarFault(f"the sidecar failed at {what}; its log has incident {number}", incident=number)


def _fields(work: Work) -> dict[str, str]:
    """Return what a log line for programs tells of a request."""
    known = {"call_id": work.call_id, "model": work.model, "tenant": work.tenant.name}
    return known if work.notes is None else known | {"trace_id": f"{work.notes.place.trace_id:032x}"}
