"""`trunkline job`: long work that goes on by itself, and following it until it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final

import click
from rich.markup import escape
from trunkline.errors import SidecarUnavailable, from_wire

from sidecar.cli import bars
from sidecar.cli.endpoint import client_of
from sidecar.cli.exits import FAILED
from sidecar.cli.groups import Ordered
from sidecar.cli.names import job_argument
from sidecar.cli.printing import as_json, console, print_json, print_rows, size

if TYPE_CHECKING:
    from sidecar.admin_client import AdminClient

ACTIVE: Final = ("queued", "running")
# How soon and how often a job is asked for, and for how long an endpoint that is started again is waited for.
_FIRST_LOOK_S: Final = 0.02
_LOOK_S: Final = 0.2
PATIENCE_S = 15.0


@click.group(cls=Ordered)
def job() -> None:
    """Look at long work that goes on by itself."""


@job.command("ls")
@as_json
@click.pass_context
def job_ls(ctx: click.Context, as_json: bool) -> None:
    """List the jobs that run, and those that ended within a day."""
    jobs = client_of(ctx).get("jobs")["jobs"]
    if as_json:
        print_json(jobs)
        return
    rows = []
    for entry in jobs:
        begun = datetime.fromtimestamp(entry["created_s"]).astimezone().isoformat(" ", "seconds")
        rows.append((entry["id"], entry["kind"], entry["state"], escape(_progress(entry)), begun, escape(entry["subject"])))
    print_rows(("job", "kind", "state", "progress", "begun", "of"), rows, folded=("of",))


@job.command("show")
@job_argument
@as_json
@click.pass_context
def job_show(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Show what one job has come to."""
    found = client_of(ctx).get(f"jobs/{job_id}")
    if as_json:
        print_json(found)
        return
    console.print(f"{found['kind']} of {found['subject']}: {found['state']}, {_progress(found)}", markup=False)
    if found["error"]:
        console.print(f"{found['error']['code']}: {found['error']['message']}", markup=False)
    for key, value in (found["result"] or {}).items():
        console.print(f"  {key}: {value}", markup=False)


@job.command("cancel")
@job_argument
@as_json
@click.pass_context
def job_cancel(ctx: click.Context, job_id: str, as_json: bool) -> None:
    """Ask a job to stop. What cannot be stopped halfway, such as loading a model, is finished."""
    found = client_of(ctx).delete(f"jobs/{job_id}")
    if as_json:
        print_json(found)
    else:
        console.print(f"{found['id']}: {'asked to stop' if found['state'] in ACTIVE else found['state']}")


def _progress(job: dict[str, Any]) -> str:
    found = job["progress"]
    step = found["step"] if job["state"] in ACTIVE else ""
    shown: Callable[[int], str] = size if found["unit"] == "bytes" else str
    counted = f"{shown(found['done'])} of {shown(found['total'])}" if found["total"] else ""
    if counted and found["unit"] != "bytes":
        counted += f" {found['unit']}"
    return ", ".join(part for part in (counted, step) if part) or "-"


def followed(client: AdminClient, begun: dict[str, Any]) -> Any:
    """Draw how far a job is until it ends, and return its result. Raises as ``awaited``."""
    with bars.steps(begun["kind"]) as step:

        def look(found: dict[str, Any]) -> None:
            told = found["progress"]
            step(f"{found['kind']}: {_progress(found)}", told["done"] / told["total"] if told["total"] else None)

        return awaited(client, begun, look)


def awaited(client: AdminClient, begun: dict[str, Any], look: Callable[[dict[str, Any]], None] = lambda job: None) -> Any:
    """Return a job's result when it has ended; ``look`` is told it now and then. Raises the error that it ended with.

    Ctrl-C asks the job to stop. The endpoint may be away for ``PATIENCE_S`` meanwhile: what was being done there is lost then,
    and says so itself.
    """
    path = f"jobs/{begun['id']}"
    found, pause_s = begun, _FIRST_LOOK_S
    try:
        while found["state"] in ACTIVE:
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LOOK_S)
            found = _asked(client, path)
            look(found)
    except KeyboardInterrupt:
        client.delete(path)
        click.echo(f"job {begun['id']} is asked to stop", err=True)
        raise
    if found["error"]:
        error = found["error"]
        raise from_wire(error["code"], error["message"], error["details"])
    if found["state"] != "done":
        click.echo(f"error: {found['state']}: job {begun['id']}", err=True)
        sys.exit(FAILED)
    return found["result"]


def _asked(client: AdminClient, path: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.get(path)
        except SidecarUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOOK_S)
