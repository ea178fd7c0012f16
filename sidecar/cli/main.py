"""The command `trunkline`, and the list of all that it can be told."""

from __future__ import annotations

import click

from sidecar.cli import looking, models, running, store, tenants, tokens
from sidecar.cli.exits import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--admin", metavar="ADDRESS", help="Admin endpoint: unix:/path or http://127.0.0.1:PORT.")
@click.version_option(package_name="trunkline")
@click.pass_context
def main(ctx: click.Context, admin: str | None) -> None:
    """Thin serverless functions, one node-local sidecar that holds every model once."""
    ctx.obj = admin


# Every command and group of commands is registered here, and nowhere else: one line for each.
main.add_command(running.serve)
main.add_command(running.up)
main.add_command(running.pack)
main.add_command(looking.status)
main.add_command(looking.graph)
main.add_command(looking.trace)
main.add_command(looking.placement)
main.add_command(models.model)
main.add_command(models.push)
main.add_command(tenants.tenant)
main.add_command(tokens.token)
main.add_command(store.store)
