"""Long work over HTTP: routes that look at jobs and cancel them, `pull`, and ``?wait=false`` for others that take long.

Their state is in files (``sidecar.jobs``), so any worker answers for the jobs of all. Must not import torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from flask import Flask, Response, jsonify, request
from trunkline.errors import InvalidInput, UnknownModel

from sidecar.bundle import MODEL_NAME
from sidecar.http.access import OPERATE, READ, needs
from sidecar.http.audit import note
from sidecar.jobs import Jobs, Unwatched, Watch
from sidecar.origins import Policy, parse_reference
from sidecar.store import Store
from sidecar.versions import Vet

Body = Callable[..., dict[str, Any]]
Command = Callable[[str, dict[str, object]], Any]
Work = Callable[[Watch, Command], object]
Begun = tuple[Response, int, dict[str, str]]


class LongWork:
    """Work that whoever asks waits for, or does not: then it is a job, and the engine is waited for as long as it takes."""

    def __init__(self, jobs: Jobs, command: Command, patient: Command) -> None:
        """``command`` asks the engine while somebody waits, ``patient`` while nobody does."""
        self.jobs = jobs
        self._command = command
        self._patient = patient

    def answered(self, kind: str, subject: str, work: Work) -> Response | Begun:
        """Do ``work`` and return its result; with ``?wait=false`` begin it, and say where to look for what becomes of it."""
        wait = request.args.get("wait", "true")
        if wait not in ("true", "false"):
            raise InvalidInput("wait must be true or false")
        return jsonify(work(Unwatched(), self._command)) if wait == "true" else self.begun(kind, subject, work)

    def begun(self, kind: str, subject: str, work: Work) -> Begun:
        """Begin a job. Raises QueueFull."""
        job = self.jobs.begin(kind, subject, lambda watch: work(watch, self._patient))
        return jsonify(job), 202, {"Location": f"/admin/v1/jobs/{job['id']}"}


def add_jobs(app: Flask, long_work: LongWork, store: Store, policy: Policy, body: Body, vet: Vet | None = None) -> None:
    """Add the routes. ``body(required, optional)`` reads the JSON object that was sent; ``vet`` looks at bundles first."""
    jobs = long_work.jobs

    @app.get("/admin/v1/jobs")
    @needs(READ)
    def list_jobs() -> Response:
        """Return the jobs that run, and those that ended within a day, the latest first."""
        return jsonify(jobs=jobs.all())

    @app.get("/admin/v1/jobs/<job_id>")
    @needs(READ)
    def show_job(job_id: str) -> Response:
        """Return one job."""
        return jsonify(jobs.get(job_id))

    @app.delete("/admin/v1/jobs/<job_id>")
    @needs(OPERATE)
    def cancel_job(job_id: str) -> Response:
        """Ask a job to stop; answered at once."""
        body()
        return jsonify(jobs.cancel(job_id))

    @app.post("/admin/v1/pull")
    @needs(OPERATE)
    def begin_pull() -> Begun:
        """Fetch a model from a listed origin; always a job."""
        asked = body(required=("source",), optional=("name",))
        source, name = asked["source"], asked.get("name")
        if not isinstance(source, str):
            raise InvalidInput("source must be a text, ORIGIN/NAME@sha256:DIGEST")
        if name is not None and not (isinstance(name, str) and MODEL_NAME.fullmatch(name)):
            raise UnknownModel("name must be a model's: at most 128 of a-z, 0-9, '.', '_' and '-'")
        reference = parse_reference(source)
        note(source=str(reference), **({} if name is None else {"name": name}))
        # Told at once, not by the job.
        policy.check(reference.origin)

        def work(watch: Watch, command: Command) -> object:
            # Not before it is needed: what it fetches with takes half a second to be loaded.
            from sidecar.pulling import pull

            pulled = pull(reference, store, policy, watch, name=name, vet=vet)
            # Where the engine is away, the model is in the store nevertheless, and deployed when it starts.
            return {**dataclasses.asdict(pulled), "model": command("model_changed", {"name": pulled.name})}

        return long_work.begun("pull", str(reference), work)
