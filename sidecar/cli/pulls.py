"""`trunkline model pull` and `model publish`: models by way of an origin, named by the digest of their manifest."""

from __future__ import annotations

from pathlib import Path

import click
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn

from sidecar.cli.endpoint import client_of
from sidecar.cli.jobs import followed
from sidecar.cli.names import model_name
from sidecar.cli.printing import as_json, console, print_json, size
from sidecar.config import PREFIX, Settings


def _local_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else model_name(ctx, param, value)


@click.command("pull")
@click.argument("reference", metavar="ORIGIN/NAME@sha256:DIGEST")
@click.option("--name", callback=_local_name, help="Call the model so here; default: its own name.")
@as_json
@click.pass_context
def pull(ctx: click.Context, reference: str, name: str | None, as_json: bool) -> None:
    """Have the sidecar fetch a model from an origin that its operator has listed; weights it has already are not fetched."""
    client = client_of(ctx)
    asked: dict[str, object] = {"source": reference}
    if name is not None:
        asked["name"] = name
    job = client.post("pull", asked)
    found = followed(client, job, quiet=as_json)
    if as_json:
        print_json(found)
        return
    signed = f", signed by {found['signer']}" if found["signer"] else ""
    console.print(
        f"{found['name']} version {found['version']}{signed}: fetched {found['fetched_count']} of {found['blob_count']} weights, "
        f"{size(found['fetched_bytes'])} of {size(found['blob_bytes'])}",
        markup=False,
    )


@click.command("publish")
@click.argument("source", metavar="BUNDLE|NAME")
@click.argument("destination")
@click.option("--sign-key", type=click.Path(path_type=Path), help="Sign with this ssh-ed25519 key, which has no passphrase.")
@click.option(
    "--store-dir",
    type=click.Path(path_type=Path),
    envvar=f"{PREFIX}STORE_DIR",
    default=Settings.store_dir,
    show_default=True,
    help="The store that has a model given by NAME.",
)
def publish(source: str, destination: str, sign_key: Path | None, store_dir: Path) -> None:
    """Lay out a bundle's folder, or a model of this node's store, for pulls, and print its reference.

    DESTINATION is a folder, or a URL such as s3://bucket/models. Only what is not there is written.
    """
    # What it writes with takes half a second to be loaded.
    from sidecar.publishing import publish as write

    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console) as bar:
        task = bar.add_task(source, total=None)

        def advance(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        done = write(source, destination, store_dir=store_dir, sign_key=sign_key, progress=advance)
    console.print(
        f"wrote {done.sent_count} of {done.blob_count} weights, {size(done.sent_bytes)} of {size(done.blob_bytes)}", markup=False
    )
    click.echo(done.reference)
