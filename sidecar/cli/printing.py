"""What commands print: JSON for programs, tables and lines for people."""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console

# Lines are never folded: what reads them may be a program. Nor are tables, where no terminal limits them.
console = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else 200)

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else.")


def print_json(plain: object) -> None:
    click.echo(json.dumps(plain, indent=2))


def size(size_bytes: float) -> str:
    """Return bytes as people read them."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000 or unit == "GB":
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    raise AssertionError("unreachable")
