"""`trunkline quarantine`: whose requests are refused because engines died of such, and having that forgotten."""

from __future__ import annotations

import click

from sidecar.cli.endpoint import client_of
from sidecar.cli.groups import Ordered
from sidecar.cli.names import kind_argument
from sidecar.cli.printing import as_json, console, print_entries, print_json


@click.group(cls=Ordered)
def quarantine() -> None:
    """Look at requests that engines died of."""


@quarantine.command("ls")
@as_json
@click.pass_context
def quarantine_ls(ctx: click.Context, as_json: bool) -> None:
    """List whose requests are refused, or run alone. By tenant and model: what was sent is not kept."""
    found = client_of(ctx).get("quarantine")["quarantine"]
    if as_json:
        print_json(found)
    else:
        print_entries(found, "requests in quarantine")


@quarantine.command("lift")
@kind_argument
@click.option("--all", "is_all", is_flag=True, help="Of all of them.")
@as_json
@click.pass_context
def quarantine_lift(ctx: click.Context, kind_id: str | None, is_all: bool, as_json: bool) -> None:
    """Forget what is held against requests. The next one is served as a stranger's."""
    if (kind_id is None) != is_all:
        raise click.UsageError("give the ID that `trunkline quarantine ls` lists, or --all")
    found = client_of(ctx).delete("quarantine" if kind_id is None else f"quarantine/{kind_id}")
    if as_json:
        print_json(found)
        return
    for entry in found["lifted"]:
        console.print(f"{entry['id']}: {entry['model']} of {entry['tenant']} is served again", markup=False)
    if not found["lifted"]:
        console.print("nothing was held against anybody")
