"""The command line. Commands parse and print; the work is done by the modules they import, when they are called.

Must not import torch, nor what imports it, before `serve` or `pack` is called: looking and pushing have to be quick.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from trunkline.errors import TransportError, TrunklineError

from sidecar import drawing
from sidecar.admin_client import AdminClient
from sidecar.bundle import MODEL_NAME
from sidecar.config import PREFIX, load_settings
from sidecar.keeping import HIGHEST_PRIORITY, LONGEST_KEEP_ALIVE_S
from sidecar.logs import log_to_stderr
from sidecar.tenants import DEPLOYED_NAME
from sidecar.tenants import NAME as TENANT_NAME

# Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no sidecar reached.
FAILED, UNREACHABLE = 1, 3
DEFAULT_ADMIN_SOCKET = "/run/trunkline/admin.sock"
DEFAULT_ADMIN_URL = "http://127.0.0.1:9470"
# A keep-alive time without an end.
_FOREVER = "forever"

# Lines are never folded: what reads them may be a program. Nor are tables, where no terminal limits them.
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)


class Commands(click.Group):
    """Prints a TrunklineError as one line and turns it into an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TransportError as error:
            click.echo(f"error: {error.code}: {error.message}", err=True)
            sys.exit(UNREACHABLE)
        except TrunklineError as error:
            click.echo(f"error: {error.code}: {error.message}", err=True)
            sys.exit(FAILED)
        except OSError as error:
            # click ends quietly when the reader of the output is gone.
            if error.errno == errno.EPIPE:
                raise
            click.echo(f"error: store_error: {error.filename or 'a file'}: {os.strerror(error.errno or 0)}", err=True)
            sys.exit(FAILED)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--admin", metavar="ADDRESS", help="Admin endpoint: unix:/path or http://127.0.0.1:PORT.")
@click.version_option(package_name="trunkline")
@click.pass_context
def main(ctx: click.Context, admin: str | None) -> None:
    """Thin serverless functions, one node-local sidecar that holds every model once."""
    ctx.obj = admin


def _client(ctx: click.Context) -> AdminClient:
    address = ctx.find_root().obj or os.environ.get("TRUNKLINE_ADMIN")
    if not address and os.environ.get("TRUNKLINE_RUN_DIR"):
        address = f"unix:{os.environ['TRUNKLINE_RUN_DIR']}/admin.sock"
    if not address:
        address = f"unix:{DEFAULT_ADMIN_SOCKET}" if os.path.exists(DEFAULT_ADMIN_SOCKET) else DEFAULT_ADMIN_URL
    client = AdminClient(address)
    ctx.call_on_close(client.close)
    return client


def _model_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    # Checked here, too: the name becomes part of a path that is asked for.
    if not MODEL_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a model: at most 128 of a-z, 0-9, '.', '_' and '-'")
    return value


def _deployed_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not DEPLOYED_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a deployed model: NAME, or NAME@DOMAIN where there are domains")
    return value


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")


def _print_json(plain: object) -> None:
    click.echo(json.dumps(plain, indent=2))


def size(size_bytes: float) -> str:
    """Return bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")


# --- running ----------------------------------------------------------------------------------------------------------


@main.command()
@click.option("--config", type=click.Path(path_type=Path), help="TOML file with settings.")
@click.option("--run-dir", help="Where the sockets are made.")
@click.option("--store-dir", help="Where models are stored.")
@click.option("--quotas", "quota_file", help="TOML file with tenants and their limits; without one nobody needs a token.")
@click.option("--device", help="auto, cpu, cpu:N-M or cuda:N; several with commas.")
@click.option("--threads", help="CPU threads one operator may use.")
@click.option("--memory-budget", "memory_budget_bytes", help="Memory for weights, e.g. 2GiB.")
@click.option("--host-budget", "host_budget_bytes", help="Memory of the host for weights that are not on the GPU, e.g. 8GiB.")
@click.option("--activation-budget", "activation_budget_bytes", help="Memory for what calls compute on the way, e.g. 500MB.")
@click.option("--block-files-limit", "block_files_limit_bytes", help="Disk for weights as they are needed in memory; 0: none.")
@click.option("--eviction-policy", help="lru, gdsf or adaptive: which weights leave first when there is no room.")
@click.option("--admin-host", help="Loopback address of the admin endpoint.")
@click.option("--admin-port", help="Its port; 0: only the Unix socket.")
@click.option("--blob-limit", "blob_limit_bytes", help="The largest weight that may be pushed.")
@click.option("--queue-limit", help="Requests that may wait.")
@click.option("--batch-limit", help="Rows of different requests that are run as one batch; 1: none are.")
@click.option("--batch-window", "batch_window_s", help="Seconds that a request waits for others on an idle device.")
@click.option("--compute-once", help="on or off: whether requests with equal inputs are computed as one.")
@click.option("--packing", help="on or off: whether weights are packed for the processor where that is faster.")
@click.option("--stacking", help="on or off: whether heads of one structure are run as one where that pays.")
@click.option("--lanes", help="auto or a number: how many stages of different requests run at the same time.")
@click.option("--arena-limit", "arena_limit_bytes", help="Shared memory of one connection and direction.")
@click.option("--arena-total", "arena_total_bytes", help="Shared memory of all connections.")
@click.option("--connection-limit", help="Connections that may be open.")
@click.option("--drain-timeout", "drain_timeout_s", help="Seconds to finish accepted requests on SIGTERM.")
@click.option("--log-level", help="debug, info, warning or error.")
def serve(config: Path | None, **flags: str | None) -> None:
    """Run the sidecar until SIGTERM, then drain."""
    from sidecar.wiring import serve as run

    path = config or (Path(found) if (found := os.environ.get("TRUNKLINE_CONFIG")) else None)
    settings = load_settings(flags, os.environ, path)
    log_to_stderr(settings.log_level)
    sys.exit(run(settings))


@main.command()
@click.argument("stack", type=click.Path(path_type=Path), default=Path("stack.yml"))
@click.option("--function", "functions", multiple=True, help="Only this function; may be repeated.")
@click.option("--gateway-port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="Port of the local gateway.")
def up(stack: Path, functions: tuple[str, ...], gateway_port: int) -> None:
    """Run a stack.yml without containers: sidecar, functions and a small gateway on this machine."""
    from sidecar.local import up as run

    sys.exit(run(stack, functions=list(functions) or None, gateway_port=gateway_port))


# --- looking ----------------------------------------------------------------------------------------------------------


@main.command()
@as_json
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show the engine, its memory and what the models share."""
    found = _client(ctx).get("status")
    if as_json:
        _print_json(found)
        return
    engine, memory, counts = found["engine"], found["memory"], found["requests"]
    state = "draining" if engine["draining"] else "serving"
    console.print(
        f"[bold]{state}[/] on {engine['device']}, pid {engine['pid']}, engine {engine['generation']}, "
        f"up {engine['uptime_s']:.0f} s, {found['sessions']} sessions"
    )
    share = memory["resident_bytes"] / memory["budget_bytes"]
    filled = round(30 * min(share, 1))
    console.print(
        f"memory [{'#' * filled}{'.' * (30 - filled)}] {size(memory['resident_bytes'])} of "
        f"{size(memory['budget_bytes'])}, {size(memory['pinned_bytes'])} pinned",
        markup=False,
    )
    console.print(
        f"sharing: {size(memory['logical_bytes'])} of models take {size(memory['resident_bytes'])}, "
        f"[bold]{size(memory['saved_bytes'])} saved[/]"
    )
    shared = found["sharing"]
    console.print(f"computation: {shared['stage_requests']} stages of requests took {shared['stages']} runs")
    console.print(
        f"requests: {counts['answered']} answered, {counts['failed']} failed, {counts['expired']} expired, "
        f"{counts['waiting']} waiting"
    )
    _print_models(found["models"])


@main.command()
@click.option("--dot", type=click.Path(path_type=Path), help="Write the graph in Graphviz's language to this file.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write a picture of it to this file.")
@as_json
@click.pass_context
def graph(ctx: click.Context, dot: Path | None, svg: Path | None, as_json: bool) -> None:
    """Show the fused graph: which blocks models have in common, and what that saves."""
    found = _client(ctx).get("graph")
    for path, drawn in ((dot, drawing.as_dot), (svg, drawing.as_svg)):
        if path is not None:
            path.write_text(drawn(found, size), encoding="utf-8")
    if as_json:
        _print_json(found)
    elif dot is None and svg is None:
        console.print(drawing.as_text(found, size))


@main.command()
@click.option("--limit", type=click.IntRange(1, 10_000), default=10_000, show_default=True, help="At most so many leases.")
@click.option("-o", "--output", type=click.File("w", encoding="utf-8"), default="-", help="A file; default: standard output.")
@click.pass_context
def trace(ctx: click.Context, limit: int, output: IO[str]) -> None:
    """Record which models were asked for lately, and what was fetched and evicted for it.

    Prints JSON lines: first the models and the sizes of their weights, then one line for each lease, oldest first.
    `python -m benchmarks.replay --trace FILE` tells what other policies would have done.
    """
    found = _client(ctx).get(f"trace?limit={limit}")
    names = list(found["models"])
    click.echo(json.dumps({key: value for key, value in found.items() if key != "leases"}), file=output)
    for time_s, models, hit_bytes, missed_bytes, evicted_bytes in found["leases"]:
        line = {
            "time_s": time_s,
            "models": [names[number] for number in models],
            "hit_bytes": hit_bytes,
            "missed_bytes": missed_bytes,
            "evicted_bytes": evicted_bytes,
        }
        click.echo(json.dumps(line), file=output)


def _print_models(models: list[dict[str, Any]]) -> None:
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("model", "state", "bytes", "own", "shared", "requests"):
        table.add_column(heading, no_wrap=True)
    table.add_column("shared with")
    for entry in models:
        if entry["state"] == "corrupt":
            table.add_row(entry["name"], "[red]corrupt[/]", "", "", "", "", escape(entry["error"]["message"]))
            continue
        table.add_row(
            entry["name"],
            entry["state"] + (", pinned" if entry["pinned"] else ""),
            size(entry["bytes"]),
            size(entry["unique_bytes"]),
            size(entry["shared_bytes"]),
            str(entry["requests"]),
            ", ".join(entry["shared_with"]) or "-",
        )
    console.print(table)


@main.group()
def model() -> None:
    """Look at models and move them."""


@model.command("ls")
@as_json
@click.pass_context
def model_ls(ctx: click.Context, as_json: bool) -> None:
    """List the models."""
    models = _client(ctx).get("models")["models"]
    if as_json:
        _print_json(models)
    else:
        _print_models(models)


@model.command("show")
@click.argument("name", callback=_deployed_name)
@as_json
@click.pass_context
def model_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show what one model takes, gives and costs."""
    found = _client(ctx).get(f"models/{name}")
    if as_json:
        _print_json(found)
        return
    console.print(f"[bold]{found['name']}[/] version {found['version']}, {found['state']}")
    console.print(
        f"{size(found['bytes'])} in {found['weight_count']} weights, {found['node_count']} operators "
        f"({found['shared_node_count']} of them computed by other models, too), "
        f"{size(found['shared_bytes'])} shared with {', '.join(found['shared_with']) or 'nobody'}"
    )
    batched = "in batches with others" if found["batched"] else f"one by one ({found['unbatched_because']})"
    console.print(
        f"runs in {found['stage_count']} stages, {found['packed_stage_count']} of them with packed weights; "
        f"requests are served {batched}",
        markup=False,
    )
    console.print(_keeping(found))
    signature = found["signature"]
    for kind in ("inputs", "outputs"):
        for spec in signature[kind]:
            shape = ", ".join(str(axis) for axis in spec["shape"])
            bounds = "" if spec["minimum"] is None else f" from {spec['minimum']} to {spec['maximum']}"
            console.print(f"  {kind[:-1]} {spec['name']}: {spec['dtype']} [{shape}]{bounds}", markup=False)
    for symbol, (low, high) in signature["symbols"].items():
        console.print(f"  {symbol}: {low} to {high}")


def _keeping(found: dict[str, Any]) -> str:
    seconds = found["keep_alive_s"]
    kept = "as long as there is room" if seconds is None else f"for {seconds:g} s without a request"
    return f"priority {found['priority']}, kept {kept}"


def _add_action(name: str, help_text: str) -> None:
    @model.command(name, help=help_text)
    @click.argument("model_name", metavar="NAME", callback=_deployed_name)
    @click.pass_context
    def act(ctx: click.Context, model_name: str) -> None:
        found = _client(ctx).post(f"models/{model_name}/{name}")
        console.print(f"{found['name']}: {found['state']}{', pinned' if found['pinned'] else ''}")


_add_action("load", "Bring a model into memory.")
_add_action("unload", "Drop a model from memory; the next request loads it again.")
_add_action("evict", "Drop a model from memory; the next request loads it again.")
_add_action("pin", "Load a model and keep it in memory.")
_add_action("unpin", "Let a model be evicted again.")


def _keep_alive(ctx: click.Context, param: click.Parameter, value: str | None) -> float | str | None:
    if value is None or value == _FOREVER:
        return value
    try:
        seconds = float(value)
    except ValueError as error:
        raise click.BadParameter(f"{value[:80]!r} is neither a number of seconds nor {_FOREVER}") from error
    # Not a number is within no bounds.
    if not 0 <= seconds <= LONGEST_KEEP_ALIVE_S:
        raise click.BadParameter(f"{value[:80]} is not in the range 0<=x<={LONGEST_KEEP_ALIVE_S}; for longer, say {_FOREVER}")
    return seconds


@model.command("keep")
@click.argument("name", callback=_deployed_name)
@click.option("--priority", type=click.IntRange(0, HIGHEST_PRIORITY), help="What is lower leaves memory first; 5 unless said.")
@click.option("--keep-alive", callback=_keep_alive, metavar="SECONDS|forever", help="Drop it when idle for so long.")
@click.pass_context
def model_keep(ctx: click.Context, name: str, priority: int | None, keep_alive: float | str | None) -> None:
    """Say how dear a model is, and for how long it stays in memory without a request."""
    asked: dict[str, object] = {}
    if priority is not None:
        asked["priority"] = priority
    if keep_alive is not None:
        asked["keep_alive_s"] = None if keep_alive == _FOREVER else keep_alive
    if not asked:
        raise click.UsageError("give --priority, --keep-alive, or both")
    found = _client(ctx).post(f"models/{name}/keep", asked)
    console.print(f"{found['name']}: {_keeping(found)}")


@model.command("place")
@click.argument("name", callback=_deployed_name)
@click.option("--pin", metavar="DEVICE", help="Only there, whatever is asked.")
@click.option("--allow", metavar="DEVICE", multiple=True, help="Only on this device and others allowed; may be repeated.")
@click.option("--forbid", metavar="DEVICE", multiple=True, help="Not on this device; may be repeated.")
@click.option("--anywhere", is_flag=True, help="Wherever it is answered soonest.")
@click.pass_context
def model_place(
    ctx: click.Context, name: str, pin: str | None, allow: tuple[str, ...], forbid: tuple[str, ...], anywhere: bool
) -> None:
    """Say on which of several devices a model may be. What was said before is forgotten."""
    if [pin is not None, bool(allow or forbid), anywhere].count(True) != 1:
        raise click.UsageError("give --pin, --anywhere, or --allow and --forbid")
    asked: dict[str, object] = {"allow": [pin] if pin is not None else list(allow), "forbid": list(forbid)}
    found = _client(ctx).post(f"models/{name}/place", asked)
    console.print(f"{found['name']}: on {' and '.join(found['devices'])}")


@main.command()
@as_json
@click.pass_context
def placement(ctx: click.Context, as_json: bool) -> None:
    """Show where models are asked on a node with several devices, and how much is asked of each."""
    found = _client(ctx).get("placement")
    if as_json:
        _print_json(found)
        return
    for device, told in found["devices"].items():
        console.print(f"{device}: {100 * told['load']:.0f} % of its time is asked for, {told['under_way']} requests under way")
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("model", "devices", "requests/s", "ms on each device", "may be"):
        table.add_column(heading, no_wrap=True)
    for entry in found["models"]:
        limits = [f"only {', '.join(entry['allow'])}"] if entry["allow"] else []
        limits += [f"not {', '.join(entry['forbid'])}"] if entry["forbid"] else []
        table.add_row(
            entry["name"],
            ", ".join(entry["devices"]) + (f" > {', '.join(entry['moving_to'])}" if entry["moving_to"] else ""),
            f"{entry.get('rate', 0.0):.1f}",
            ", ".join(f"{device} {1000 * seconds:.1f}" for device, seconds in entry.get("seconds", {}).items()),
            "; ".join(limits) or "anywhere",
        )
    console.print(table)


@model.command("rm")
@click.argument("name", callback=_model_name)
@click.pass_context
def model_rm(ctx: click.Context, name: str) -> None:
    """Remove a model; `trunkline store gc` frees its disk space."""
    _client(ctx).delete(f"models/{name}")
    console.print(f"{name}: removed")


# --- tenants ----------------------------------------------------------------------------------------------------------


@main.group()
def tenant() -> None:
    """Say who may use the sidecar, and how much: changes the quota file, and has it read again."""


def _tenant_name(ctx: click.Context, param: click.Parameter, value: str) -> str:
    if not TENANT_NAME.fullmatch(value):
        raise click.BadParameter(f"{value[:80]!r} is no name of a tenant: at most 63 of a-z, 0-9 and '-'")
    return value


tenant_name = click.argument("name", callback=_tenant_name)
quota_file = click.option(
    "--quotas",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    envvar=f"{PREFIX}QUOTA_FILE",
    required=True,
    help=f"The quota file; default: {PREFIX}QUOTA_FILE.",
)
token_file = click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the token here, for this user alone, instead of printing it.",
)


def _change_quotas(
    ctx: click.Context,
    path: Path,
    name: str,
    done: str,
    change: Callable[[str, str], str],
    *,
    token: str = "",
    token_file: Path | None = None,
    create: bool = False,
) -> None:
    """Change the quota file, hand out the token, and have a sidecar that runs read the file again."""
    from sidecar.quotaedit import edit, replaced

    # A file that the token cannot be written to is found out before anything has changed, and filled when all has.
    with replaced(token_file, 0o600) if token_file else contextlib.nullcontext() as descriptor:
        edit(path, change, create=create)
        refused = _reloaded(ctx, path)
        if descriptor is not None:
            os.write(descriptor, f"{token}\n".encode())
    click.echo(f"{name}: {done}", err=True)
    if token and token_file is None:
        click.echo("its token, which is not shown again:", err=True)
        click.echo(token)
    if refused is not None:
        raise refused


def _reloaded(ctx: click.Context, path: Path) -> TrunklineError | None:
    """Have the sidecar read the file again; return why it did not. That none runs is no failure, and told."""
    try:
        _client(ctx).post("quotas/reload")
    except TransportError as error:
        click.echo(f"not reloaded: {error.message}; a sidecar reads {path} when it starts", err=True)
    except TrunklineError as error:
        return error
    return None


@tenant.command("add")
@tenant_name
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
@quota_file
@token_file
@click.pass_context
def tenant_add(
    ctx: click.Context, /, name: str, models: str, path: Path, token_file: Path | None, **said: str | float | bool | None
) -> None:
    """Add a tenant and print its token, once."""
    from sidecar.quotaedit import new_token, with_tenant

    values: dict[str, object] = {"models": [each.strip() for each in models.split(",")]}
    values |= {key: value for key, value in said.items() if value is not None}
    token = new_token()

    def change(text: str, file: str) -> str:
        return with_tenant(text, file, name, token, values)

    _change_quotas(ctx, path, name, "added", change, token=token, token_file=token_file, create=True)


@tenant.command("rotate")
@tenant_name
@click.option("--end", is_flag=True, help="Let only the newer of two tokens count.")
@quota_file
@token_file
@click.pass_context
def tenant_rotate(ctx: click.Context, name: str, end: bool, path: Path, token_file: Path | None) -> None:
    """Make a second token, valid beside the first; when all functions have it, end the first with --end."""
    from sidecar.quotaedit import new_token, with_token, without_older_token

    if end:
        if token_file is not None:
            raise click.UsageError("--end makes no token to write to a file")
        _change_quotas(ctx, path, name, "only the newer token counts", lambda text, file: without_older_token(text, file, name))
        return
    token = new_token()

    def change(text: str, file: str) -> str:
        return with_token(text, file, name, token)

    _change_quotas(ctx, path, name, "a second token counts, too", change, token=token, token_file=token_file)


@tenant.command("rm")
@tenant_name
@quota_file
@click.pass_context
def tenant_rm(ctx: click.Context, name: str, path: Path) -> None:
    """Remove a tenant; its connections are closed."""
    from sidecar.quotaedit import without_tenant

    _change_quotas(ctx, path, name, "removed", lambda text, file: without_tenant(text, file, name))


@tenant.command("ls")
@as_json
@click.pass_context
def tenant_ls(ctx: click.Context, as_json: bool) -> None:
    """List the tenants that the sidecar knows, with their limits and what they have."""
    found = _client(ctx).get("tenants")["tenants"]
    if as_json:
        _print_json(found)
        return
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in ("tenant", "domain", "models", "tokens", "weight", "priority", "in flight", "queued", "connections", "arenas"):
        table.add_column(heading, no_wrap=heading != "models")
    table.add_column("resident", no_wrap=True)
    for entry in found:
        table.add_row(
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
    console.print(table)


def _limit(limit: int | None, shown: Callable[[float], str] = str) -> str:
    return "any" if limit is None else shown(limit)


# --- publishing -------------------------------------------------------------------------------------------------------


@main.command()
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder for the bundle.")
@click.option("--name", help="Name of the model; default: that of the output folder.")
@click.option("--version", default="1", show_default=True, help="Its version.")
@click.option("--batch/--no-batch", default=None, help="Whether axis 0 of every input may vary.")
@click.option("--max-batch", type=click.IntRange(min=1), help="The largest batch; default 64.")
@click.option("--dynamic", multiple=True, metavar="INPUT:AXIS=SYMBOL:MIN..MAX", help="A further axis that may vary.")
@click.option("--bounds", multiple=True, metavar="INPUT=LOW..HIGH", help="Bounds of an integer input.")
def pack(
    source: str,
    output: Path,
    name: str | None,
    version: str,
    batch: bool | None,
    max_batch: int | None,
    dynamic: tuple[str, ...],
    bounds: tuple[str, ...],
) -> None:
    """Convert a model to a bundle.

    SOURCE is module:callable, path/to/file.py:callable, a .pt2 file, or a local transformers directory. The callable
    returns the module and example inputs. The bundle is accepted only if it computes what the module computes.
    """
    from sidecar.packing import pack as convert

    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("loading", total=None)

        def advance(step: str, fraction: float) -> None:
            progress.update(task, description=step, completed=fraction, total=1.0)

        lines = convert(
            source,
            output,
            name=name or output.name,
            version=version,
            batch=batch,
            max_batch=max_batch,
            dynamic=dynamic,
            bounds=bounds,
            progress=advance,
        )
    for line in lines:
        console.print(line, markup=False)


@main.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.pass_context
def push(ctx: click.Context, directories: tuple[Path, ...]) -> None:
    """Send bundles to the sidecar; weights it has already are not sent again."""
    client = _client(ctx)
    with Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=console) as progress:
        for directory in directories:
            task = progress.add_task(directory.name, total=None)

            def advance(done: int, total: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=total)

            pushed = client.push(directory, advance)
            progress.console.print(
                f"{pushed.name}: sent {pushed.sent_count} of {pushed.blob_count} blobs, {size(pushed.sent_bytes)} of "
                f"{size(pushed.blob_bytes)}",
                markup=False,
            )


@main.group()
def store() -> None:
    """Look after the stored bundles."""


@store.command("verify")
@as_json
@click.pass_context
def store_verify(ctx: click.Context, as_json: bool) -> None:
    """Read every stored byte against its digest; what is altered is set aside, so that a push can replace it."""
    report = _client(ctx).post("store/verify")
    if as_json:
        _print_json(report)
    else:
        console.print(f"{report['blob_count']} blobs, {size(report['size_bytes'])}, {len(report['corrupt'])} corrupt")
        for name, problem in report["broken"].items():
            console.print(f"{name}: {problem}", markup=False)
    if report["corrupt"] or report["broken"]:
        sys.exit(FAILED)


@store.command("gc")
@click.option("--dry-run", is_flag=True, help="Only count.")
@click.pass_context
def store_gc(ctx: click.Context, dry_run: bool) -> None:
    """Remove stored bytes that no model uses."""
    found = _client(ctx).post("store/gc", {"dry_run": dry_run})
    console.print(f"{found['count']} blobs, {size(found['size_bytes'])} {'to remove' if dry_run else 'removed'}")


if __name__ == "__main__":
    main()
