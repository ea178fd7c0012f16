"""How a command ends: errors as one line on standard error, and an exit code."""

from __future__ import annotations

import errno
import os
import sys
from typing import Any

import click
from trunkline.errors import TransportError, TrunklineError

# Exit codes: 0 done, 1 refused or failed, 2 wrong usage, 3 no sidecar reached.
FAILED, UNREACHABLE = 1, 3


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
