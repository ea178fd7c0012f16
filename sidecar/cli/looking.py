"""`trunkline status`, `graph`, `trace` and `placement`: what the sidecar tells of itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import click

from sidecar.cli.endpoint import client_of
from sidecar.cli.models import print_models
from sidecar.cli.printing import as_json, bar, console, print_entries, print_json, print_rows, size


@click.command()
@as_json
@click.pass_context
def status(ctx: click.Context, as_json: bool) -> None:
    """Show the engine, its memory and what the models share."""
    found = client_of(ctx).get("status")
    if as_json:
        print_json(found)
        return
    engine, memory, counts = found["engine"], found["memory"], found["requests"]
    state = "draining" if engine["draining"] else "serving"
    console.print(
        f"[bold]{state}[/] on {engine['device']}, pid {engine['pid']}, engine {engine['generation']}, "
        f"up {engine['uptime_s']:.0f} s, {found['sessions']} sessions"
    )
    console.print(
        f"memory {bar(memory['resident_bytes'], memory['budget_bytes'])} {size(memory['resident_bytes'])} of "
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
    print_models(found["models"])


@click.command()
@click.option("--dot", type=click.Path(path_type=Path), help="Write the graph in Graphviz's language to this file.")
@click.option("--svg", type=click.Path(path_type=Path), help="Write a picture of it to this file.")
@as_json
@click.pass_context
def graph(ctx: click.Context, dot: Path | None, svg: Path | None, as_json: bool) -> None:
    """Show which blocks models have in common. Draws the fused graph, and tells what it saves."""
    from sidecar import drawing

    found = client_of(ctx).get("graph")
    for path, drawn in ((dot, drawing.as_dot), (svg, drawing.as_svg)):
        if path is not None:
            path.write_text(drawn(found, size), encoding="utf-8")
    if as_json:
        print_json(found)
    elif dot is None and svg is None:
        console.print(drawing.as_text(found, size))


@click.command()
@click.option("--limit", type=click.IntRange(1, 10_000), default=10_000, show_default=True, help="At most so many leases.")
@click.option("-o", "--output", type=click.File("w", encoding="utf-8"), default="-", help="A file; default: standard output.")
@click.option("--json", "as_json", is_flag=True, help="Write one JSON document, as the endpoint tells it, instead of lines.")
@click.pass_context
def trace(ctx: click.Context, limit: int, output: IO[str], as_json: bool) -> None:
    """Record which models were asked for lately. With what was fetched and evicted for it.

    Prints JSON lines: first the models and the sizes of their weights, then one line for each lease, oldest first.
    `python -m benchmarks.replay --trace FILE` tells what other policies would have done.
    """
    found = client_of(ctx).get(f"trace?limit={limit}")
    if as_json:
        click.echo(json.dumps(found, indent=2), file=output)
        return
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


@click.command()
@as_json
@click.pass_context
def placement(ctx: click.Context, as_json: bool) -> None:
    """Show which device each model is asked on. For nodes with several, with how much is asked of each."""
    found = client_of(ctx).get("placement")
    if as_json:
        print_json(found)
        return
    for device, told in found["devices"].items():
        console.print(f"{device}: {100 * told['load']:.0f} % of its time is asked for, {told['under_way']} requests under way")
    rows = []
    for entry in found["models"]:
        limits = [f"only {', '.join(entry['allow'])}"] if entry["allow"] else []
        limits += [f"not {', '.join(entry['forbid'])}"] if entry["forbid"] else []
        rows.append(
            (
                entry["name"],
                ", ".join(entry["devices"]) + (f" > {', '.join(entry['moving_to'])}" if entry["moving_to"] else ""),
                f"{entry.get('rate', 0.0):.1f}",
                ", ".join(f"{device} {1000 * seconds:.1f}" for device, seconds in entry.get("seconds", {}).items()),
                "; ".join(limits) or "anywhere",
            )
        )
    print_rows(("model", "devices", "requests/s", "ms on each device", "may be"), rows)


@click.command()
@as_json
@click.pass_context
def sessions(ctx: click.Context, as_json: bool) -> None:
    """List open connections, whose they are, what they have."""
    found = client_of(ctx).get("sessions?limit=1000")
    if as_json:
        print_json(found)
        return
    print_entries(found["sessions"], "sessions")
    if (total := found["total"]) > len(found["sessions"]):
        console.print(f"and {total - len(found['sessions'])} more")


@click.command()
@as_json
@click.pass_context
def leases(ctx: click.Context, as_json: bool) -> None:
    """List the models that requests or pins keep in memory."""
    found = client_of(ctx).get("leases")
    if as_json:
        print_json(found)
        return
    for device, told in found["devices"].items():
        console.print(f"[bold]{device}[/]")
        print_entries(told["leases"], "leases")
        console.print(f"pinned: {', '.join(entry['model'] for entry in told['pinned']) or 'nothing'}", markup=False)


@click.command()
@click.option("--limit", type=click.IntRange(0, 1000), default=20, show_default=True, help="At most so many of what leaves next.")
@as_json
@click.pass_context
def residency(ctx: click.Context, limit: int, as_json: bool) -> None:
    """Show each tier of memory, and what would leave it next."""
    found = client_of(ctx).get(f"residency?limit={limit}")
    if as_json:
        print_json(found)
        return
    for device, told in found["devices"].items():
        console.print(f"[bold]{device}[/], {size(told['pinned_bytes'])} pinned, {size(told['leaving_bytes'])} may leave")
        for tier in told["tiers"]:
            taken = bar(tier["used_bytes"], tier["budget_bytes"])
            console.print(f"{tier['tier']:>12} {taken} {size(tier['used_bytes'])} of {size(tier['budget_bytes'])}", markup=False)
        if told["leaving"]:
            console.print("what would leave, the first first:")
            print_entries(told["leaving"], "weights")
