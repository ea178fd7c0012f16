"""`trunkline tenant`: changes the quota file, and has it read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

import click
from rich.markup import escape
from trunkline.errors import TransportError, TrunklineError

from sidecar.cli.endpoint import client_of
from sidecar.cli.groups import Ordered
from sidecar.cli.handout import handed_out, show_token, token_file
from sidecar.cli.names import tenant_argument
from sidecar.cli.printing import as_json, print_json, print_rows, size
from sidecar.config import PREFIX

_HEADINGS: Final = (
    *("tenant", "domain", "models", "tokens", "weight", "priority", "in flight", "queued", "connections", "arenas", "resident"),
)


@click.group(cls=Ordered)
def tenant() -> None:
    """Say who may use the sidecar, and how much. Changes the quota file, and has it read again."""


quota_file = click.option(
    "--quotas",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar=f"{PREFIX}QUOTA_FILE",
    required=True,
    help=f"The quota file; default: {PREFIX}QUOTA_FILE.",
)


def _change_quotas(
    ctx: click.Context,
    path: Path,
    name: str,
    done: str,
    change: Callable[[str, str], str],
    as_json: bool,
    *,
    token: str = "",
    token_file: Path | None = None,
    create: bool = False,
) -> None:
    """Change the quota file, hand out the token, and have a sidecar that runs read the file again."""
    from sidecar.quotaedit import edit

    with handed_out(token, token_file):
        edit(path, change, create=create)
        refused = _reloaded(ctx)
    shown = token if token_file is None else ""
    if as_json:
        told = {"name": name, "action": ctx.command.name, "reloaded": refused is None}
        print_json(told | ({"token": shown} if shown else {}))
    else:
        click.echo(f"{name}: {done}", err=True)
        if shown:
            show_token(shown)
    # That no sidecar runs is no failure.
    if isinstance(refused, TransportError):
        click.echo(f"not reloaded: {refused.message}; a sidecar reads {path} when it starts", err=True)
    elif refused is not None:
        raise refused


def _reloaded(ctx: click.Context) -> TrunklineError | None:
    """Have the sidecar read the file again; return why it did not."""
    try:
        client_of(ctx).post("quotas/reload")
    except TrunklineError as error:
        return error
    return None


@tenant.command("add")
@tenant_argument
@click.option("--models", required=True, metavar="NAMES", help="What it may use: names or patterns, with commas between them.")
@click.option("--domain", help="Whose weights and computation it shares; default: nobody's.")
@click.option("--weight", type=float, help="Its part of the device's time, relative to others'; 1 unless said.")
@click.option("--priority", type=int, help="Who goes first, 0 to 9; 5 unless said.")
@click.option("--compute-once/--no-compute-once", default=None, help="Whether equal inputs of its domain are computed as one.")
@click.option("--in-flight", type=int, help="Requests that may wait or run at a time.")
@click.option("--queued", metavar="SIZE", help="Bytes of their inputs.")
@click.option("--connections", type=int, help="Connections that may be open.")
@click.option("--arena", metavar="SIZE", help="Shared memory of its connections.")
@click.option("--resident", metavar="SIZE", help="Weights of models it uses that may be in memory.")
@click.option("--uid", type=int, help="The uid that its functions run as; any unless said.")
@click.option("--gid", type=int, help="Their gid.")
@click.option("--socket", is_flag=True, default=None, help="It has a socket of its own, RUN_DIR/tenants/NAME, and uses no other.")
@click.option("--socket-gid", type=int, help="The group that may use that; everybody who can reach it unless said.")
@quota_file
@token_file
@as_json
@click.pass_context
def tenant_add(
    ctx: click.Context,
    /,
    name: str,
    models: str,
    path: Path,
    token_file: Path | None,
    as_json: bool,
    **said: str | float | bool | None,
) -> None:
    """Add a tenant and print its token, once."""
    from sidecar.quotaedit import new_token, with_tenant

    values: dict[str, object] = {"models": [each.strip() for each in models.split(",")]}
    values |= {key: value for key, value in said.items() if value is not None}
    token = new_token()

    def change(text: str, file: str) -> str:
        return with_tenant(text, file, name, token, values)

    _change_quotas(ctx, path, name, "added", change, as_json, token=token, token_file=token_file, create=True)


@tenant.command("rotate")
@tenant_argument
@click.option("--end", is_flag=True, help="Let only the newer of two tokens count.")
@quota_file
@token_file
@as_json
@click.pass_context
def tenant_rotate(ctx: click.Context, name: str, end: bool, path: Path, token_file: Path | None, as_json: bool) -> None:
    """Make a second token, valid beside the first. When all functions have it, end the first with --end."""
    from sidecar.quotaedit import new_token, with_token, without_older_token

    if end:
        if token_file is not None:
            raise click.UsageError("--end makes no token to write to a file")

        def ended(text: str, file: str) -> str:
            return without_older_token(text, file, name)

        _change_quotas(ctx, path, name, "only the newer token counts", ended, as_json)
        return
    token = new_token()

    def change(text: str, file: str) -> str:
        return with_token(text, file, name, token)

    _change_quotas(ctx, path, name, "a second token counts, too", change, as_json, token=token, token_file=token_file)


@tenant.command("rm")
@tenant_argument
@quota_file
@as_json
@click.pass_context
def tenant_rm(ctx: click.Context, name: str, path: Path, as_json: bool) -> None:
    """Remove a tenant; its connections are closed."""
    from sidecar.quotaedit import without_tenant

    _change_quotas(ctx, path, name, "removed", lambda text, file: without_tenant(text, file, name), as_json)


@tenant.command("ls")
@as_json
@click.pass_context
def tenant_ls(ctx: click.Context, as_json: bool) -> None:
    """List the tenants, with limits and what they have."""
    found = client_of(ctx).get("tenants")["tenants"]
    if as_json:
        print_json(found)
        return
    rows = [
        (
            entry["name"],
            entry["domain"] or "-",
            escape(", ".join(entry["models"])) or "-",
            str(entry["token_count"]),
            f"{entry['weight']:g}",
            str(entry["priority"]),
            _limit(entry["in_flight_limit"]),
            _limit(entry["queued_limit_bytes"], size),
            f"{entry['connections']} of {_limit(entry['connection_limit'])}",
            f"{size(entry['arena_bytes'])} of {_limit(entry['arena_limit_bytes'], size)}",
            _limit(entry["resident_limit_bytes"], size),
        )
        for entry in found
    ]
    print_rows(_HEADINGS, rows, folded=("models",))


def _limit(limit: int | None, shown: Callable[[float], str] = str) -> str:
    return "any" if limit is None else shown(limit)
