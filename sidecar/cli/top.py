"""`trunkline top`: what is asked of the sidecar now, drawn anew every few seconds."""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

import click
from trunkline.errors import SidecarUnavailable, TrunklineError

from sidecar.cli.endpoint import client_of
from sidecar.cli.printing import bar, console, is_fitting, size

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text

    from sidecar.admin_client import AdminClient
    from sidecar.cli.measures import Scrape

# Percentiles of a moment would jump: rates and times are those of so many seconds, or of one interval if that is longer.
_WINDOW_S: Final = 10.0
_ORDERS: Final[dict[str, Callable[[dict[str, Any]], Any]]] = {
    "rate": lambda model: -model["rate"],
    "p99": lambda model: -(model["p99_s"] or 0.0),
    "share": lambda model: -model["device_share"],
    "bytes": lambda model: -model["bytes"],
    "name": lambda model: model["name"],
}


@click.command()
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(0.1, 3600),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--count", type=click.IntRange(min=0), help="Look so many times; 0: until q or Ctrl-C, as on a terminal unless said; else 1."
)
@click.option(
    "--sort", "order", type=click.Choice(list(_ORDERS)), default="rate", show_default=True, help="Which models come first."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line and nothing else.")
@click.pass_context
def top(ctx: click.Context, interval_s: float, count: int | None, order: str, as_json: bool) -> None:
    """Watch what is asked, how long it takes, what is in memory.

    The first look shows rates and times since the engine's start, later ones those of the last ten seconds.
    """
    is_drawn = sys.stdout.isatty() and not as_json
    if count is None:
        count = 0 if sys.stdout.isatty() else 1
    looks = _looks(client_of(ctx), order)
    # Whoever ends it has seen what there was to see: that is no failure.
    with contextlib.suppress(KeyboardInterrupt):
        found = _draw(looks, interval_s, count) if is_drawn else _print(looks, interval_s, count, as_json)
        if found["state"] == "away":
            raise SidecarUnavailable(found["message"])


def _looks(client: AdminClient, order: str) -> Iterator[dict[str, Any]]:
    """Yield what there is to show, each time it is asked for: a frame, or why there is none."""
    from sidecar.cli.measures import Scrape, frame

    kept: deque[Scrape] = deque()
    while True:
        try:
            now = Scrape(client.metrics())
        except TrunklineError as error:
            if not isinstance(error, SidecarUnavailable):
                raise
            yield {"state": "away", "message": error.message}
            continue
        if not now.answers:
            yield {"state": "away", "message": "the engine does not answer; it may be starting, and its log tells when it cannot"}
            continue
        _forget(kept, now)
        found = frame(now, kept[0] if kept else None)
        kept.append(now)
        found["models"].sort(key=lambda model: (_ORDERS[order](model), model["name"]))
        yield found


def _forget(kept: deque[Scrape], now: Scrape) -> None:
    """Drop what another engine told, and what is older than the window but for the latest."""
    if kept and (kept[-1].generation != now.generation or kept[-1].uptime_s > now.uptime_s):
        kept.clear()
    while len(kept) > 1 and now.uptime_s - kept[0].uptime_s > _WINDOW_S:
        kept.popleft()


def _print(looks: Iterator[dict[str, Any]], interval_s: float, count: int, as_json: bool) -> dict[str, Any]:
    done = 0
    while True:
        found = next(looks)
        done += 1
        if as_json:
            click.echo(json.dumps(found))
        elif found["state"] != "away":
            console.print(drawn(found))
        elif done != count:
            click.echo(_away(found), err=True)
        if done == count:
            return found
        sys.stdout.flush()
        time.sleep(interval_s)


def _draw(looks: Iterator[dict[str, Any]], interval_s: float, count: int) -> dict[str, Any]:
    from rich.console import Console
    from rich.live import Live

    # Cut to the terminal, unlike what is printed.
    screen = Console(highlight=False, emoji=False)
    last: dict[str, Any] | None = None
    done = 0
    with _quitting() as is_over, Live(console=screen, screen=True, auto_refresh=False) as live:
        while True:
            found = next(looks)
            done += 1
            # What was there last stays to be read while nothing comes.
            last = last if found["state"] == "away" else found
            live.update(drawn(found, last, screen), refresh=True)
            if done == count or is_over(interval_s):
                return found


@contextlib.contextmanager
def _quitting() -> Iterator[Callable[[float], bool]]:
    """Give a function that waits so many seconds and says whether q was pressed; keys come at once, unseen, in the block."""
    if not sys.stdin.isatty():

        def slept(seconds: float) -> bool:
            time.sleep(seconds)
            return False

        yield slept
        return
    import termios
    import tty

    descriptor = sys.stdin.fileno()

    def pressed(seconds: float) -> bool:
        ready, _, _ = select.select([descriptor], [], [], seconds)
        keys = os.read(descriptor, 64) if ready else b" "
        # A terminal that is gone gives nothing, at once and for ever.
        return not keys or b"q" in keys.lower()

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    try:
        yield pressed
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


def _away(found: dict[str, Any]) -> str:
    return f"away: {found['message']}; trying again"


def drawn(found: dict[str, Any], last: dict[str, Any] | None = None, screen: Console | None = None) -> Group:
    """Return a look for people, as much of it as fits on ``screen``; ``last`` is the last one that was no failure."""
    from rich.console import Group

    shown = last if found["state"] == "away" else found
    lines: list[Any] = [_line(_away(found), "bold red")] if found["state"] == "away" else []
    if shown is None:
        return Group(*lines)
    if found["state"] != "away":
        lines.append(_line(f"{shown['state']} on {', '.join(shown['devices'])}, {_since(shown)}", "bold"))
    lines.append(
        _line(
            f"{shown['rate']:.1f} requests/s, {shown['failed_rate']:.1f} failed/s, {shown['waiting']} waiting, "
            f"{shown['running']} running, {shown['connections']} connections, {size(shown['saved_bytes'])} saved by sharing"
        )
    )
    width = _BAR if screen is None or screen.width >= _NARROW else _BAR // 3
    lines += [_line(_memory_line(memory, len(shown["devices"]) > 1, width)) for memory in shown["memory"]]
    # Where there are tenants, the busiest of them; the one that all are without a quota file tells nothing.
    tenants = sorted(shown["tenants"], key=lambda tenant: -tenant["device_share"])[:_MOST_TENANTS]
    lines += [_line(_tenant_line(tenant)) for tenant in tenants if len(shown["tenants"]) > 1]
    models = shown["models"]
    # The heading takes four lines, what is left out one.
    room = len(models) if screen is None else max(1, screen.height - len(lines) - 5)
    lines.append(_models(models[:room], screen or console))
    if len(models) > room:
        lines.append(_line(f"and {len(models) - room} more models"))
    return Group(*lines)


def _line(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _since(shown: dict[str, Any]) -> str:
    interval = "since then" if shown["interval_s"] >= shown["uptime_s"] else f"of the last {shown['interval_s']:.0f} s"
    return f"engine {shown['generation']} up {shown['uptime_s']:.0f} s; rates and times {interval}"


def _memory_line(memory: dict[str, Any], is_one_of_several: bool, width: int) -> str:
    name = f"{memory['device']} {memory['tier']}" if is_one_of_several else memory["tier"]
    pinned = f", {size(memory['pinned_bytes'])} pinned" if memory["pinned_bytes"] else ""
    taken = bar(memory["resident_bytes"], memory["budget_bytes"], width)
    return f"{name:>8} {taken} {size(memory['resident_bytes'])} of {size(memory['budget_bytes'])}{pinned}"


def _tenant_line(tenant: dict[str, Any]) -> str:
    share = 100 * tenant["device_share"]
    return f"tenant {tenant['name']}: {share:.0f} % of the device, {tenant['waiting']} waiting, {tenant['running']} running"


def _models(models: list[dict[str, Any]], shown_on: Console) -> Table:
    from rich.box import SIMPLE
    from rich.table import Table

    columns = list(_COLUMNS)
    while True:
        table = Table(box=SIMPLE, pad_edge=False)
        for heading in columns:
            table.add_column(heading, no_wrap=True, overflow="ellipsis", justify="left" if heading in _WORDS else "right")
        for model in models:
            table.add_row(*(_COLUMNS[heading](model) for heading in columns))
        dispensable = next((heading for heading in _DISPENSABLE if heading in columns), None)
        if dispensable is None or is_fitting(table, shown_on):
            return table
        columns.remove(dispensable)


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.1f} ms"


_COLUMNS: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "model": lambda model: model["name"],
    "state": lambda model: model["state"] + (", pinned" if model["pinned"] else ""),
    "requests/s": lambda model: f"{model['rate']:.1f}",
    "p50": lambda model: _milliseconds(model["p50_s"]),
    "p99": lambda model: _milliseconds(model["p99_s"]),
    "failed/s": lambda model: f"{model['failed_rate']:.1f}",
    "waiting": lambda model: str(model["waiting"]),
    "device": lambda model: f"{100 * model['device_share']:.0f} %",
    "bytes": lambda model: size(model["bytes"]),
    "shared": lambda model: size(model["shared_bytes"]),
}
_WORDS: Final = ("model", "state")
# What is left out where a terminal is narrow, in this order.
_DISPENSABLE: Final = ("shared", "failed/s", "bytes", "waiting", "p50", "device", "state")
_MOST_TENANTS: Final = 5
# Characters of a bar; of a terminal that has room for one.
_BAR, _NARROW = 30, 80
