"""The commands of ``trunkline token``: who may look at a sidecar over TCP, and who may operate it."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import click

from sidecar.admintokens import KIND, NEW_FILE, ROLES, parse_tokens, with_token, without_token
from sidecar.config import PREFIX
from sidecar.quotaedit import edit, new_token, replaced
from sidecar.quotas import read_text
from sidecar.tenants import NAME

token_file = click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar=f"{PREFIX}ADMIN_TOKENS",
    required=True,
    help=f"The token file, as --admin-tokens names it; default: {PREFIX}ADMIN_TOKENS.",
)


def _name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a token: at most 63 of a-z, 0-9 and '-'")
    return value


token_name = click.argument("name", callback=_name)


@click.group("token")
def token() -> None:
    """Say who may look at the sidecar over TCP, and who may operate it: changes the token file, which is read by itself."""


@token.command("add")
@token_name
@click.option("--role", type=click.Choice(ROLES), required=True, help="read: look; operate: change, too.")
@token_file
@click.option(
    "--token-file",
    "target",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the token here, for this user alone, instead of printing it.",
)
def add(name: str, role: str, path: Path, target: Path | None) -> None:
    """Add a token and print it, once; the file has its hash alone."""
    made = new_token()
    # A file that the token cannot be written to is found out before anything has changed, and filled when all has.
    with replaced(target, 0o600) if target else contextlib.nullcontext() as descriptor:
        edit(path, lambda text, file: with_token(text, file, name, role, made), create=True, new=NEW_FILE, kind=KIND)
        if descriptor is not None:
            os.write(descriptor, f"{made}\n".encode())
    click.echo(f"{name}: may {role}", err=True)
    if target is None:
        click.echo("its token, which is not shown again:", err=True)
        click.echo(made)


@token.command("ls")
@token_file
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")
def ls(path: Path, as_json: bool) -> None:
    """List the names of the tokens and their roles."""
    found = parse_tokens(read_text(path, KIND), path.name)
    if as_json:
        click.echo(json.dumps([{"name": each.name, "role": each.role} for each in found], indent=2))
        return
    for each in found:
        click.echo(f"{each.name}  {each.role}")


@token.command("rm")
@token_name
@token_file
def rm(name: str, path: Path) -> None:
    """Remove a token; it does not count any more from the next request on."""
    edit(path, lambda text, file: without_token(text, file, name), kind=KIND)
    click.echo(f"{name}: removed", err=True)
