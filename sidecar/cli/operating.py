"""`trunkline evict`, `pin`, `unpin`, `drain`, `resume` and `log-level`: what changes a sidecar that runs."""

from __future__ import annotations

from typing import Any

import click

from sidecar.cli.endpoint import client_of, endpoint_of
from sidecar.cli.loading import act_with_bar
from sidecar.cli.models import action, print_acted
from sidecar.cli.names import deployed_name, models_beginning
from sidecar.cli.printing import as_json, console, print_json, size
from sidecar.config import parse_size

_LEVELS = ("debug", "info", "warning", "error")

pin = action("pin", "Load a model and keep it in memory.")
unpin = action("unpin", "Let a model be evicted again.")


def _size(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    if value is None:
        return None
    try:
        size_bytes = parse_size(value)
    except ValueError as error:
        raise click.BadParameter(f"{value[:80]!r} is not {error}") from error
    if size_bytes < 1:
        raise click.BadParameter("at least one byte is to be freed")
    return size_bytes


def _deployed_name(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    return None if value is None else deployed_name(ctx, param, value)


@click.command()
@click.argument("name", required=False, callback=_deployed_name, shell_complete=models_beginning)
@click.option(
    "--bytes", "size_bytes", callback=_size, metavar="SIZE", help="Free so much, e.g. 500MB: what is worth least goes first."
)
@as_json
@click.pass_context
def evict(ctx: click.Context, name: str | None, size_bytes: int | None, as_json: bool) -> None:
    """Drop a model from memory, or what is worth least. The next request loads it again."""
    if (name is None) == (size_bytes is None):
        raise click.UsageError("give the NAME of a model, or --bytes")
    if name is not None:
        print_acted(act_with_bar(endpoint_of(ctx), name, "evict"), as_json)
        return
    found = client_of(ctx).post("evict", {"bytes": size_bytes})
    if as_json:
        print_json(found)
    else:
        console.print(f"{size(found['freed_bytes'])} freed")


@click.command()
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=0), metavar="SECONDS", help="Wait so long for accepted requests."
)
@as_json
@click.pass_context
def drain(ctx: click.Context, timeout_s: float | None, as_json: bool) -> None:
    """Take no new requests, and finish those accepted. `trunkline resume` ends it."""
    found = client_of(ctx).post("drain", {} if timeout_s is None else {"timeout_s": timeout_s})
    _print_draining(found, as_json)


@click.command()
@as_json
@click.pass_context
def resume(ctx: click.Context, as_json: bool) -> None:
    """Take requests again after `trunkline drain`."""
    _print_draining(client_of(ctx).post("resume"), as_json)


def _print_draining(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(found)
    else:
        console.print("draining: no new requests are taken" if found["draining"] else "serving")


@click.command("log-level")
@click.argument("level", required=False, type=click.Choice(_LEVELS))
@as_json
@click.pass_context
def log_level(ctx: click.Context, level: str | None, as_json: bool) -> None:
    """Show what the sidecar logs, or change it. A change lasts until the sidecar ends."""
    client = client_of(ctx)
    found = client.get("log-level") if level is None else client.put("log-level", {"level": level})
    if as_json:
        print_json(found)
    else:
        console.print(found["level"])
