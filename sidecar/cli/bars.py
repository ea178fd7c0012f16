"""Bars for long work, on standard error where that is a terminal: standard output stays what was asked for.

What draws them is imported only where they are drawn.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

# Told how much is done, and of how much; the other, what is done and what part of all is, None while nobody knows.
Advance = Callable[[float, float], None]
Step = Callable[[str, float | None], None]


def are_drawn() -> bool:
    """Say whether anybody sees a bar."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def bytes_done(name: str) -> Iterator[Advance]:
    """Draw how many bytes are done."""
    if not are_drawn():
        yield lambda done, total: None
        return
    with _bars(in_bytes=True) as drawn:
        task = drawn.add_task(name, total=None)
        yield lambda done, total: drawn.update(task, completed=done, total=total)


@contextlib.contextmanager
def steps(first: str) -> Iterator[Step]:
    """Draw which step is done, what part of all is, and for how long it has been; while that part is not known, only that."""
    if not are_drawn():
        yield lambda step, part: None
        return
    with _bars(in_bytes=False) as drawn:
        task = drawn.add_task(first, total=None)
        yield lambda step, part: drawn.update(task, description=step, completed=part, total=None if part is None else 1.0)


def _bars(*, in_bytes: bool) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn() if in_bytes else TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
        # What goes elsewhere than to this terminal is not drawn around.
        redirect_stdout=sys.stdout.isatty(),
    )
