"""`trunkline store`: looking after the stored bundles."""

from __future__ import annotations

import sys

import click

from sidecar.cli.endpoint import client_of
from sidecar.cli.exits import FAILED
from sidecar.cli.groups import Ordered
from sidecar.cli.jobs import followed
from sidecar.cli.printing import as_json, console, print_json, size


@click.group(cls=Ordered)
def store() -> None:
    """Look after the stored bundles."""


@store.command("verify")
@as_json
@click.pass_context
def store_verify(ctx: click.Context, as_json: bool) -> None:
    """Read every stored byte against its digest. What is altered is set aside, so that a push can replace it."""
    client = client_of(ctx)
    report = followed(client, client.post("store/verify?wait=false"))
    if as_json:
        print_json(report)
    else:
        console.print(f"{report['blob_count']} blobs, {size(report['size_bytes'])}, {len(report['corrupt'])} corrupt")
        for name, problem in report["broken"].items():
            console.print(f"{name}: {problem}", markup=False)
    if report["corrupt"] or report["broken"]:
        sys.exit(FAILED)


@store.command("gc")
@click.option("--dry-run", is_flag=True, help="Only count.")
@as_json
@click.pass_context
def store_gc(ctx: click.Context, dry_run: bool, as_json: bool) -> None:
    """Remove stored bytes that no model uses."""
    client = client_of(ctx)
    found = followed(client, client.post("store/gc?wait=false", {"dry_run": dry_run}))
    if as_json:
        print_json(found)
        return
    console.print(f"{found['count']} blobs, {size(found['size_bytes'])} {'to remove' if dry_run else 'removed'}")
