"""New tokens: printed once, or written to a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import click

token_file = click.option(
    "--token-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the token here, for this user alone, instead of printing it.",
)


@contextlib.contextmanager
def handed_out(token: str, path: Path | None) -> Iterator[None]:
    """Write a token to a file, if one is named, when the block that has it count has ended well. Raises OSError.

    A file that it cannot be written to is found out before anything has changed.
    """
    # Not before it is needed: looking has to be quick.
    from sidecar.quotaedit import replaced

    with replaced(path, 0o600) if path else contextlib.nullcontext() as descriptor:
        yield
        if descriptor is not None:
            os.write(descriptor, f"{token}\n".encode())


def show_token(token: str) -> None:
    """Print a token for people; for programs, it is all that stands on standard output."""
    click.echo("its token, which is not shown again:", err=True)
    click.echo(token)
