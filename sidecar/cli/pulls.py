"""`trunkline model pull` and `model publish`: models by way of an origin, named by the digest of their manifest."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from sidecar.cli.bars import bytes_done
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
    """Have the sidecar fetch a model from an origin.

    Its operator has listed that. Weights that the sidecar has already are not fetched.
    """
    client = client_of(ctx)
    asked: dict[str, object] = {"source": reference}
    if name is not None:
        asked["name"] = name
    found = followed(client, client.post("pull", asked))
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
@as_json
def publish(source: str, destination: str, sign_key: Path | None, store_dir: Path, as_json: bool) -> None:
    """Write a model where sidecars can pull it from.

    BUNDLE is a folder, NAME a model of this node's store. DESTINATION is a folder, or a URL such as s3://bucket/models; only
    what is not there is written. Prints the reference to pull it by.
    """
    # What it writes with takes half a second to be loaded.
    from sidecar.publishing import publish as write

    with bytes_done(source) as advance:
        done = write(source, destination, store_dir=store_dir, sign_key=sign_key, progress=advance)
    if as_json:
        print_json(asdict(done))
        return
    console.print(
        f"wrote {done.sent_count} of {done.blob_count} weights, {size(done.sent_bytes)} of {size(done.blob_bytes)}", markup=False
    )
    click.echo(done.reference)
