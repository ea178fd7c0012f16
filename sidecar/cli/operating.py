"""`trunkline evict`, `pin`, `unpin`, `drain`, `resume` and `log-level`: what changes a sidecar that runs."""

from __future__ import annotations

import sys

import click

from sidecar.cli.endpoint import client_of, endpoint_of
from sidecar.cli.exits import FAILED
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
@click.option("--bytes", "size_bytes", callback=_size, metavar="SIZE", help="Have so much free, e.g. 500MB.")
@click.option("--device", metavar="DEVICE", help="With --bytes: on this device alone.")
@as_json
@click.pass_context
def evict(ctx: click.Context, name: str | None, size_bytes: int | None, device: str | None, as_json: bool) -> None:
    """Drop a model from memory, or what is worth least. The next request loads it again."""
    if (name is None) == (size_bytes is None):
        raise click.UsageError("give the NAME of a model, or --bytes")
    if name is not None:
        if device is not None:
            raise click.UsageError("--device goes with --bytes; a model leaves all devices")
        print_acted(act_with_bar(endpoint_of(ctx), name, "evict"), as_json)
        return
    asked: dict[str, object] = {"bytes": size_bytes} | ({} if device is None else {"device": device})
    found = client_of(ctx).post("evict", asked)
    if as_json:
        print_json(found)
        return
    for on, told in found["devices"].items():
        console.print(f"{on}: {size(told['freed_bytes'])} freed, {size(told['free_bytes'])} of {size(told['budget_bytes'])} free")


@click.command()
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Wait so long for them; 30 unless said.",
)
@as_json
@click.pass_context
def drain(ctx: click.Context, timeout_s: float | None, as_json: bool) -> None:
    """Take no new requests, and finish those accepted. `trunkline resume` ends it.

    Fails when some of those accepted are not answered in time; none are taken all the same.
    """
    found = client_of(ctx).post("drain", {} if timeout_s is None else {"timeout_s": timeout_s})
    if as_json:
        print_json(found)
    elif found["drained"]:
        console.print("draining: no new requests are taken, and all accepted are answered")
    else:
        console.print(f"draining: no new requests are taken, {found['waiting']} wait and {found['running']} run still")
    if not found["drained"]:
        sys.exit(FAILED)


@click.command()
@as_json
@click.pass_context
def resume(ctx: click.Context, as_json: bool) -> None:
    """Take requests again after `trunkline drain`."""
    found = client_of(ctx).post("resume")
    if as_json:
        print_json(found)
    else:
        # One that is shutting down goes on to.
        console.print("draining" if found["draining"] else "serving")


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
        for process, logged in found.items():
            console.print(f"{process}: {logged}")
