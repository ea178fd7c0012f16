"""`trunkline model` and `push`: looking at models, and moving them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.markup import escape

from sidecar.cli.bars import bytes_done
from sidecar.cli.endpoint import client_of, endpoint_of
from sidecar.cli.groups import Ordered
from sidecar.cli.loading import act_with_bar
from sidecar.cli.names import deployed_argument, model_argument
from sidecar.cli.printing import as_json, console, print_json, print_rows, size
from sidecar.cli.versions import said
from sidecar.keeping import HIGHEST_PRIORITY, LONGEST_KEEP_ALIVE_S

# A keep-alive time without an end.
_FOREVER = "forever"


@click.group(cls=Ordered)
def model() -> None:
    """Look at models and move them."""


@model.command("ls")
@as_json
@click.pass_context
def model_ls(ctx: click.Context, as_json: bool) -> None:
    """List the models."""
    models = client_of(ctx).get("models")["models"]
    if as_json:
        print_json(models)
    else:
        print_models(models)


@model.command("show")
@deployed_argument
@as_json
@click.pass_context
def model_show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Show what one model takes, gives and costs."""
    found = client_of(ctx).get(f"models/{name}")
    if as_json:
        print_json(found)
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


def action(name: str, help_text: str) -> click.Command:
    """Return a command that has something done to one model, and prints what became of it."""

    @click.command(name, help=help_text)
    @deployed_argument
    @as_json
    @click.pass_context
    def act(ctx: click.Context, /, name: str, as_json: bool) -> None:
        print_acted(act_with_bar(endpoint_of(ctx), name, str(ctx.command.name)), as_json)

    return act


def print_acted(found: dict[str, Any], as_json: bool) -> None:
    """Print what became of a model."""
    if as_json:
        print_json(found)
        return
    freed = f", {size(found['freed_bytes'])} freed" if "freed_bytes" in found else ""
    console.print(f"{found['name']}: {found['state']}{', pinned' if found['pinned'] else ''}{freed}")


model.add_command(action("load", "Bring a model into memory."))
model.add_command(action("unload", "Drop a model from memory. The next request loads it again."))
model.add_command(action("evict", "Drop a model from memory. The next request loads it again."))
model.add_command(action("pin", "Load a model and keep it in memory."))
model.add_command(action("unpin", "Let a model be evicted again."))


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
@deployed_argument
@click.option("--priority", type=click.IntRange(0, HIGHEST_PRIORITY), help="What is lower leaves memory first; 5 unless said.")
@click.option("--keep-alive", callback=_keep_alive, metavar="SECONDS|forever", help="Drop it when idle for so long.")
@as_json
@click.pass_context
def model_keep(ctx: click.Context, name: str, priority: int | None, keep_alive: float | str | None, as_json: bool) -> None:
    """Say how dear a model is, and how long it is kept idle."""
    asked: dict[str, object] = {}
    if priority is not None:
        asked["priority"] = priority
    if keep_alive is not None:
        asked["keep_alive_s"] = None if keep_alive == _FOREVER else keep_alive
    if not asked:
        raise click.UsageError("give --priority, --keep-alive, or both")
    found = client_of(ctx).post(f"models/{name}/keep", asked)
    if as_json:
        print_json(found)
    else:
        console.print(f"{found['name']}: {_keeping(found)}")


@model.command("place")
@deployed_argument
@click.option("--pin", metavar="DEVICE", help="Only there, whatever is asked.")
@click.option("--allow", metavar="DEVICE", multiple=True, help="Only on this device and others allowed; may be repeated.")
@click.option("--forbid", metavar="DEVICE", multiple=True, help="Not on this device; may be repeated.")
@click.option("--anywhere", is_flag=True, help="Wherever it is answered soonest.")
@as_json
@click.pass_context
def model_place(
    ctx: click.Context, name: str, pin: str | None, allow: tuple[str, ...], forbid: tuple[str, ...], anywhere: bool, as_json: bool
) -> None:
    """Say on which of several devices a model may be. Forgets what was said before."""
    if [pin is not None, bool(allow or forbid), anywhere].count(True) != 1:
        raise click.UsageError("give --pin, --anywhere, or --allow and --forbid")
    asked: dict[str, object] = {"allow": [pin] if pin is not None else list(allow), "forbid": list(forbid)}
    found = client_of(ctx).post(f"models/{name}/place", asked)
    if as_json:
        print_json(found)
    else:
        console.print(f"{found['name']}: on {' and '.join(found['devices'])}")


@model.command("rm")
@model_argument
@as_json
@click.pass_context
def model_rm(ctx: click.Context, name: str, as_json: bool) -> None:
    """Remove a model with all its versions. `store gc` frees its disk space."""
    found = client_of(ctx).delete(f"models/{name}")
    if as_json:
        print_json(found)
    else:
        console.print(f"{name}: removed")


@click.command()
@click.argument("directories", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--version", metavar="LABEL", help="Push it as a version beside others; '': as the version its manifest says.")
@click.option("--default", is_flag=True, help="Have that version answer for the name from then on.")
@as_json
@click.pass_context
def push(ctx: click.Context, directories: tuple[Path, ...], version: str | None, default: bool, as_json: bool) -> None:
    """Send bundles; weights that are there are not sent again."""
    if default and version is None:
        raise click.UsageError("--default is for what is pushed with --version")
    client = client_of(ctx)
    done = []
    for directory in directories:
        with bytes_done(directory.name) as advance:
            pushed = client.push(directory, advance, version=version, default=default)
        done.append(asdict(pushed))
        if not as_json:
            console.print(
                f"{pushed.name}: sent {pushed.sent_count} of {pushed.blob_count} blobs, {size(pushed.sent_bytes)} of "
                f"{size(pushed.blob_bytes)}" + (f"; {said(pushed.release)}" if version is not None else ""),
                markup=False,
            )
    if as_json:
        print_json(done)


def print_models(models: list[dict[str, Any]]) -> None:
    """Print a table of models."""
    rows = []
    for entry in models:
        if entry["state"] == "corrupt":
            rows.append((entry["name"], "[red]corrupt[/]", "", "", "", "", escape(entry["error"]["message"])))
            continue
        rows.append(
            (
                entry["name"],
                entry["state"] + (", pinned" if entry["pinned"] else ""),
                size(entry["bytes"]),
                size(entry["unique_bytes"]),
                size(entry["shared_bytes"]),
                str(entry["requests"]),
                ", ".join(entry["shared_with"]) or "-",
            )
        )
    print_rows(("model", "state", "bytes", "own", "shared", "requests", "shared with"), rows, folded=("shared with",))
