"""Bars for long work, on standard error where that is a terminal: standard output stays what was asked for."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn

# Told how much is done, and of how much.
Advance = Callable[[float, float], None]


@contextlib.contextmanager
def bytes_sent(name: str) -> Iterator[Advance]:
    """Draw how many bytes are there."""
    with _bar(name, DownloadColumn()) as advance:
        yield advance


@contextlib.contextmanager
def under_way(name: str) -> Iterator[None]:
    """Draw that something is done that takes nobody knows how long, and for how long it has been."""
    with _bar(name, TimeElapsedColumn()):
        yield


@contextlib.contextmanager
def steps() -> Iterator[Callable[[str, float], None]]:
    """Draw the step that is done, and what part of all is."""
    with _progress(TimeElapsedColumn()) as progress:
        task = progress.add_task("loading", total=None)

        def advance(step: str, fraction: float) -> None:
            progress.update(task, description=step, completed=fraction, total=1.0)

        yield advance


def are_drawn() -> bool:
    """Say whether anybody sees a bar."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def _bar(name: str, column: ProgressColumn) -> Iterator[Advance]:
    with _progress(column) as progress:
        task = progress.add_task(name, total=None)

        def advance(done: float, total: float) -> None:
            progress.update(task, completed=done, total=total)

        yield advance


def _progress(column: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        column,
        console=Console(stderr=True),
        disable=not are_drawn(),
        transient=True,
        # What goes elsewhere than to this terminal is not drawn around.
        redirect_stdout=sys.stdout.isatty(),
    )
