"""`trunkline token`: who may look at a sidecar over TCP, and who may operate it. Changes the token file alone."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import click

from sidecar.admintokens import KIND, NEW_FILE, ROLES, parse_tokens, with_token, without_token
from sidecar.cli.groups import Ordered
from sidecar.cli.handout import handed_out, show_token, token_file
from sidecar.cli.printing import as_json, print_json, print_rows
from sidecar.config import PREFIX
from sidecar.quotaedit import edit, new_token
from sidecar.quotas import read_text
from sidecar.tenants import NAME

_HEADINGS: Final = ("token", "role")


def _name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a token: at most 63 of a-z, 0-9 and '-'")
    return value


name_argument = click.argument("name", callback=_name)
tokens_file = click.option(
    "--file",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar=f"{PREFIX}ADMIN_TOKENS",
    required=True,
    help=f"The token file, as --admin-tokens names it; default: {PREFIX}ADMIN_TOKENS.",
)


@click.group(cls=Ordered)
def token() -> None:
    """Say who may look at or operate the sidecar over TCP. Changes the token file, which is read by itself."""


@token.command("add")
@name_argument
@click.option("--role", type=click.Choice(ROLES), required=True, help="infer: ask models; read: look, too; operate: change, too.")
@tokens_file
@token_file
@as_json
def token_add(name: str, role: str, path: Path, token_file: Path | None, as_json: bool) -> None:
    """Add a token and print it, once. The file has its hash alone."""
    made = new_token()
    with handed_out(made, token_file):
        edit(path, lambda text, file: with_token(text, file, name, role, made), create=True, new=NEW_FILE, kind=KIND)
    if as_json:
        told = {"name": name, "action": "add", "role": role}
        print_json(told | ({"token": made} if token_file is None else {}))
        return
    click.echo(f"{name}: may {role}", err=True)
    if token_file is None:
        show_token(made)


@token.command("rm")
@name_argument
@tokens_file
@as_json
def token_rm(name: str, path: Path, as_json: bool) -> None:
    """Remove a token. It does not count any more from the next request on."""
    edit(path, lambda text, file: without_token(text, file, name), kind=KIND)
    if as_json:
        print_json({"name": name, "action": "rm"})
    else:
        click.echo(f"{name}: removed", err=True)


@token.command("ls")
@tokens_file
@as_json
def token_ls(path: Path, as_json: bool) -> None:
    """List the names of the tokens and their roles."""
    found = parse_tokens(read_text(path, KIND), path.name)
    if as_json:
        print_json([{"name": each.name, "role": each.role} for each in found])
    else:
        print_rows(_HEADINGS, [(each.name, each.role) for each in found])
