"""What commands print: JSON for programs on standard output; tables, lines and bars for people."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

import click
from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from sidecar.units import size as size

# Lines are never folded: what reads them may be a program. Nor are tables, where no terminal limits them. What stands between
# colons, as versions do behind their models, is no emoji.
console = Console(soft_wrap=True, highlight=False, emoji=False, width=None if sys.stdout.isatty() else 200)

_ANY_WIDTH: Final = 10_000
# What is broken into narrower lines than this cannot be read.
_FOLDED_WIDTH: Final = 12

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")


def print_json(plain: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(plain, indent=2))


def print_rows(headings: Sequence[str], rows: Iterable[Sequence[str | Text]], *, folded: Collection[str] = ()) -> None:
    """Print a table of cells with markup; on a terminal too narrow for it, each row as lines of its own.

    ``folded`` are the columns whose cells may be broken into several lines.
    """
    table = Table(box=SIMPLE, pad_edge=False)
    for heading in headings:
        is_folded = heading in folded
        table.add_column(heading, no_wrap=not is_folded, overflow="fold", min_width=_FOLDED_WIDTH if is_folded else None)
    rows = list(rows)
    for row in rows:
        table.add_row(*row)
    if is_fitting(table, console, folded=bool(folded)):
        console.print(table)
        return
    for row in rows:
        for heading, cell in zip(headings, row, strict=True):
            console.print(Text.assemble(f"{heading}: ", cell if isinstance(cell, Text) else Text.from_markup(cell, emoji=False)))
        console.print()


def is_fitting(table: Table, on: Console, *, folded: bool = False) -> bool:
    """Say whether all of a table can be seen, where ``folded`` with the cells broken that may be."""
    needed = Measurement.get(on, on.options.update_width(_ANY_WIDTH), table)
    return (needed.minimum if folded else needed.maximum) <= on.width


def print_entries(entries: Sequence[Mapping[str, Any]], kind: str) -> None:
    """Print a list of the sidecar's as it is, fields named ``…bytes`` as sizes; entries may differ in their fields."""
    if not entries:
        console.print(f"no {kind}")
        return
    headings = list(dict.fromkeys(key for entry in entries for key in entry))
    rows = [[escape(_shown(key, entry.get(key))) for key in headings] for entry in entries]
    print_rows([heading.removesuffix("_bytes").replace("_", " ") for heading in headings], rows)


def _shown(key: str, value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)) and key.endswith("bytes"):
        return size(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_shown(key, each) for each in value)
    if isinstance(value, dict):
        return ", ".join(f"{name} {_shown(name, each)}" for name, each in value.items())
    return str(value)


def bar(part: float, whole: float, width: int = 30) -> str:
    """Return how much of ``whole`` is taken, as text of ``width`` characters between brackets."""
    filled = round(width * min(part / whole, 1)) if whole else 0
    return f"[{'#' * filled}{'.' * (width - filled)}]"
