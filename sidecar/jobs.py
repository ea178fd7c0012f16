"""Long work that outlasts the request that asked for it, as small files that any process of the admin endpoint can read.

A job is done by a thread of the process that took the request. What it has come to stands in ``<id>.json``, which that thread
alone replaces. For as long as it works it holds a lock on ``<id>.lock``, which the kernel frees however the process ends: a
job that says it runs, and whose lock is free, is lost. ``<id>.cancel`` asks it to stop. Any thread of any process may call
anything; one file's lock is held while jobs are counted and begun. Must not import torch.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from trunkline.errors import QueueFull

from sidecar import failures
from sidecar.disk import opened
from sidecar.errors import JobLost, UnknownJob
from sidecar.jsonfile import read_json, replace_json

log = logging.getLogger("trunkline.admin")

ACTIVE: Final = ("queued", "running")
_ID: Final = re.compile(r"[0-9a-f]{16}")
# How often what a job has come to is written down, at most.
_WRITE_S: Final = 0.2


class Cancelled(Exception):
    """The job was asked to stop, and has stopped."""


class Watch(Protocol):
    """What long work tells of itself while it goes on."""

    def advance(self, done: int, total: int, unit: str, step: str = "") -> None:
        """Say how much is done. Raises Cancelled."""

    def checkpoint(self) -> None:
        """Go on, or be stopped. Raises Cancelled."""


class Unwatched:
    """For work that somebody waits for: nobody looks, and nothing stops it."""

    def advance(self, done: int, total: int, unit: str, step: str = "") -> None:
        pass

    def checkpoint(self) -> None:
        pass


Work = Callable[[Watch], object]


class Jobs:
    """The jobs in one folder, which is made when it is needed."""

    def __init__(self, folder: Path, *, limit_count: int = 4, kept_count: int = 100, kept_s: float = 86400.0) -> None:
        """At most ``limit_count`` run at a time. What has ended is kept for ``kept_s``, and at most ``kept_count`` of it."""
        self._folder = folder
        self._limit_count = limit_count
        self._kept_count = kept_count
        self._kept_s = kept_s

    def begin(self, kind: str, subject: str, work: Work) -> dict[str, Any]:
        """Have a thread do ``work``, whose result must be plain values; return the job. Raises QueueFull."""
        with self._alone():
            self._prune()
            active_count = sum(job["state"] in ACTIVE for job in self._all())
            if active_count >= self._limit_count:
                raise QueueFull(
                    f"{active_count} jobs are under way, the limit is {self._limit_count}; try again when one has ended, "
                    "or cancel one (`trunkline job ls`)",
                    active_count=active_count,
                    limit_count=self._limit_count,
                )
            job = _Job(self._folder, kind, subject)
        # A daemon: a process that is told to end does not wait for it.
        threading.Thread(target=job.run, args=(work,), name=f"job {job.id}", daemon=True).start()
        return self.get(job.id)

    def all(self) -> list[dict[str, Any]]:
        """Return all jobs that are known, the latest first."""
        with self._alone():
            self._prune()
        return self._all()

    def get(self, job_id: str) -> dict[str, Any]:
        """Return one job. Raises UnknownJob."""
        found = self._read(job_id) if _ID.fullmatch(job_id) else None
        if found is None:
            raise UnknownJob(f"there is no job {job_id[:32]!r}; `trunkline job ls` lists them, for a day those that ended")
        return found

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask a job to stop, which it does at its next step; return it. One that has ended stays as it is. Raises UnknownJob."""
        if self.get(job_id)["state"] in ACTIVE:
            self._path(job_id, "cancel").touch()
        return self.get(job_id)

    def _path(self, job_id: str, kind: str) -> Path:
        return self._folder / f"{job_id}.{kind}"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        with opened(self._folder / "lock", os.O_RDWR | os.O_CREAT) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield

    def _all(self) -> list[dict[str, Any]]:
        found = [self._read(path.stem) for path in self._folder.glob("*.json")]
        return sorted((job for job in found if job), key=lambda job: (job["created_s"], job["id"]), reverse=True)

    def _read(self, job_id: str) -> dict[str, Any] | None:
        """Return what is known of a job; of one whose process is no more, that it is lost."""
        path = self._path(job_id, "json")
        job: dict[str, Any] | None = read_json(path, None)
        if job is None or job["state"] not in ACTIVE:
            return job
        with contextlib.suppress(BlockingIOError), _locked(self._path(job_id, "lock")):
            # It may have ended between the two looks, and nobody else writes now.
            job = read_json(path, None)
            if job is not None and job["state"] in ACTIVE:
                error = JobLost("the process that worked on it has ended; ask for it again")
                job |= {"state": "lost", "error": error.to_dict(), "ended_s": time.time()}
                replace_json(path, job)
            self._path(job_id, "lock").unlink(missing_ok=True)
        return job

    def _prune(self) -> None:
        """Forget what ended long ago or is too much, and what was never begun."""
        ended = [job for job in self._all() if job["state"] not in ACTIVE]
        newest_s = time.time() - self._kept_s
        leaving = {job["id"] for job in ended[self._kept_count :]} | {job["id"] for job in ended if job["ended_s"] < newest_s}
        known = {path.stem for path in self._folder.glob("*.json")} - leaving
        for path in self._folder.glob("*.*"):
            if path.stem not in known:
                path.unlink(missing_ok=True)


class _Job:
    """A job as the thread that does it has it: its lock, and what is written down of it."""

    def __init__(self, folder: Path, kind: str, subject: str) -> None:
        self.id = secrets.token_hex(8)
        self._path = folder / f"{self.id}.json"
        self._lock = folder / f"{self.id}.lock"
        self._cancel = folder / f"{self.id}.cancel"
        self._written_s = 0.0
        self._is_behind = False
        self._plain: dict[str, Any] = {
            "id": self.id,
            "kind": kind,
            "subject": subject,
            "state": "queued",
            "progress": {"done": 0, "total": 0, "unit": "", "step": ""},
            "result": None,
            "error": None,
            "created_s": time.time(),
            "started_s": None,
            "ended_s": None,
        }
        self._descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        replace_json(self._path, self._plain)

    def run(self, work: Work) -> None:
        """Do the work and write down what became of it."""
        try:
            self._write(state="running", started_s=time.time())
            ended = self._result(work)
            if self._write(ended_s=time.time(), **ended):
                self._lock.unlink(missing_ok=True)
                self._cancel.unlink(missing_ok=True)
        finally:
            os.close(self._descriptor)

    def _result(self, work: Work) -> dict[str, Any]:
        try:
            return {"state": "done", "result": work(self)}
        except Cancelled:
            return {"state": "cancelled"}
        except Exception as error:  # noqa: BLE001 - the edge of the job: what nobody foresaw is logged as an incident
            return {"state": "failed", "error": failures.told(error, "").body["error"]}

    def advance(self, done: int, total: int, unit: str, step: str = "") -> None:
        before = self._plain["progress"]
        self._plain["progress"] = {"done": done, "total": total, "unit": unit, "step": step}
        self._is_behind = True
        if step != before["step"]:
            self._write()
        self.checkpoint()

    def checkpoint(self) -> None:
        # Here as well, so that what was told just before it came to a halt is not held back.
        if self._is_behind and time.monotonic() - self._written_s >= _WRITE_S:
            self._write()
        if self._cancel.exists():
            raise Cancelled

    def _write(self, **changes: object) -> bool:
        self._plain |= changes
        self._written_s, self._is_behind = time.monotonic(), False
        try:
            replace_json(self._path, self._plain)
        except OSError as error:
            # No reason to stop; whoever asks finds what was written last, and in the end that the job is lost.
            log.error("what became of job %s cannot be written down (%s)", self.id, os.strerror(error.errno or 0))
            return False
        return True


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a job that nobody works on any more. Raises BlockingIOError when somebody does."""
    with opened(path, os.O_RDWR | os.O_CREAT) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
