"""`trunkline job`: long work that goes on by itself, and following it until it ends."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click
from rich.box import SIMPLE
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from trunkline.errors import SidecarUnavailable, from_wire

from sidecar.admin_client import AdminClient
from sidecar.cli.endpoint import client_of
from sidecar.cli.exits import FAILED
from sidecar.cli.printing import as_json, console, print_json, size

ACTIVE = ("queued", "running")
# How soon and how often a job is asked for, and for how long an endpoint that is started again is waited for.
_FIRST_LOOK_S = 0.02
_LOOK_S = 0.2
PATIENCE_S = 15.0


def _job_id(ctx: click.Context, param: click.Parameter, value: str) -> str:
    # It becomes part of a path that is asked for.
    if not value.isalnum() or not value.isascii():
        raise click.BadParameter(f"{value[:80]!r} is no id of a job; `trunkline job ls` lists them")
    return value


@click.group()
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
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("job", "kind", "state", "progress", "begun"):
        table.add_column(heading, no_wrap=True)
    table.add_column("of")
    for entry in jobs:
        begun = datetime.fromtimestamp(entry["created_s"]).astimezone().isoformat(" ", "seconds")
        table.add_row(entry["id"], entry["kind"], entry["state"], _progress(entry), begun, entry["subject"])
    console.print(table)


@job.command("show")
@click.argument("job_id", metavar="ID", callback=_job_id)
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
@click.argument("job_id", metavar="ID", callback=_job_id)
@click.pass_context
def job_cancel(ctx: click.Context, job_id: str) -> None:
    """Ask a job to stop. What cannot be stopped halfway, such as loading a model, is finished."""
    found = client_of(ctx).delete(f"jobs/{job_id}")
    console.print(f"{found['id']}: {'asked to stop' if found['state'] in ACTIVE else found['state']}")


def _progress(job: dict[str, Any]) -> str:
    found = job["progress"]
    step = found["step"] if job["state"] in ACTIVE else ""
    shown: Callable[[int], str] = size if found["unit"] == "bytes" else str
    counted = f"{shown(found['done'])} of {shown(found['total'])}" if found["total"] else ""
    if counted and found["unit"] != "bytes":
        counted += f" {found['unit']}"
    return ", ".join(part for part in (counted, step) if part) or "-"


def followed(client: AdminClient, begun: dict[str, Any], *, quiet: bool) -> Any:
    """Show a job's bar until it ends, and return its result. Raises the error that it ended with; Ctrl-C cancels it.

    The endpoint may be away for ``PATIENCE_S`` meanwhile: what was being done there is lost then, and says so itself.
    """
    path = f"jobs/{begun['id']}"
    found, pause_s = begun, _FIRST_LOOK_S
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[told]}"), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, disable=quiet) as bar:
            task = bar.add_task(begun["kind"], total=None, told="")
            while found["state"] in ACTIVE:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LOOK_S)
                found = _asked(client, path)
                told = found["progress"]
                bar.update(task, completed=told["done"], total=told["total"] or None, told=_progress(found))
    except KeyboardInterrupt:
        client.delete(path)
        click.echo(f"job {begun['id']} is asked to stop", err=True)
        sys.exit(FAILED)
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
