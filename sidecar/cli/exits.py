"""How a command ends: errors as one line on standard error, and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click
from trunkline.errors import TransportError, TrunklineError, Unauthorized

from sidecar.cli.groups import Ordered

# Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no sidecar reached, 130 interrupted. docs/cli.md has them, too.
FAILED, UNREACHABLE, INTERRUPTED = 1, 3, 130


class Commands(Ordered):
    """The outermost group: prints a TrunklineError as one line and turns it into an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TransportError as error:
            told(error)
            sys.exit(UNREACHABLE)
        except TrunklineError as error:
            told(error)
            sys.exit(FAILED)
        except OSError as error:
            # click ends quietly when the reader of the output is gone.
            if error.errno == errno.EPIPE:
                raise
            click.echo(f"error: store_error: {error.filename or 'a file'}: {os.strerror(error.errno or 0)}", err=True)
            sys.exit(FAILED)
        except KeyboardInterrupt:
            # What was asked of the sidecar goes on there, but a job that was followed; nothing of ours is half done.
            click.echo("interrupted", err=True)
            sys.exit(INTERRUPTED)


def told(error: TrunklineError) -> None:
    """Print an error, and what to do where the sidecar cannot know that."""
    click.echo(f"error: {error.code}: {error.message}", err=True)
    if isinstance(error, Unauthorized):
        click.echo("name a file with a valid token: trunkline --token-file FILE, or TRUNKLINE_ADMIN_TOKEN_FILE", err=True)
