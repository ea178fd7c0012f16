"""The command `trunkline`, and the list of all that it can be told."""

from __future__ import annotations

import click

from sidecar.cli import (
    completion,
    jobs,
    kubernetes,
    looking,
    models,
    operating,
    pulls,
    quarantine,
    running,
    store,
    tenants,
    tokens,
    top,
    versions,
)
from sidecar.cli.endpoint import endpoint_options
from sidecar.cli.exits import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@endpoint_options
@click.version_option(package_name="trunkline")
def main(**endpoint: object) -> None:
    """Thin serverless functions, one node-local sidecar that holds every model once."""


# Every command and group of commands is registered here, and nowhere else: one line for each.
main.add_command(running.serve)
main.add_command(running.up)
main.add_command(looking.status)
main.add_command(top.top)
main.add_command(looking.graph)
main.add_command(looking.sessions)
main.add_command(looking.leases)
main.add_command(looking.residency)
main.add_command(looking.placement)
main.add_command(looking.trace)
main.add_command(running.pack)
main.add_command(models.push)
main.add_command(models.model)
models.model.add_command(versions.versions)
models.model.add_command(versions.release)
models.model.add_command(versions.remove_version)
models.model.add_command(pulls.pull)
models.model.add_command(pulls.publish)
main.add_command(operating.evict)
main.add_command(operating.pin)
main.add_command(operating.unpin)
main.add_command(operating.drain)
main.add_command(operating.resume)
main.add_command(operating.log_level)
main.add_command(quarantine.quarantine)
main.add_command(jobs.job)
main.add_command(store.store)
main.add_command(tenants.tenant)
main.add_command(tokens.token)
main.add_command(kubernetes.webhook)
main.add_command(kubernetes.device_plugin)
main.add_command(kubernetes.node_labels)
main.add_command(completion.completion)
