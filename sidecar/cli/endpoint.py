"""The sidecar that a command asks: its address, and the credential it is asked with.

The client is imported when there is something to ask: HTTP takes longer to import than all else of the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from sidecar.errors import ConfigError

if TYPE_CHECKING:
    from sidecar.admin_client import AdminClient

DEFAULT_ADMIN_SOCKET = "/run/trunkline/admin.sock"
DEFAULT_ADMIN_URL = "http://127.0.0.1:9470"
# What may be the value of a header; a file with anything else is the wrong file.
_TOKEN: Final = re.compile(r"[!-~]{1,1024}")


@dataclass(frozen=True)
class Endpoint:
    """Where a sidecar is asked, the file with the token it wants, and that with the authority of its certificate."""

    address: str
    token_file: Path | None = None
    ca_file: Path | None = None

    def client(self, **options: Any) -> AdminClient:
        """Return a client, to be closed by whoever asks for it. Raises ConfigError."""
        from sidecar.admin_client import AdminClient

        # Who may use the socket is said by its mode.
        is_tcp = not self.address.startswith("unix:")
        token = _token(self.token_file) if self.token_file and is_tcp else ""
        ca_file = self.ca_file if self.address.startswith("https:") else None
        if ca_file and not ca_file.is_file():
            raise ConfigError(f"the certificate in {ca_file} cannot be read (no such file); see --ca-file")
        return AdminClient(self.address, token=token, ca_file=ca_file, **options)


def endpoint_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that say which sidecar is asked; what they were given becomes the context's object."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


# Whether they are there matters when they are used: over the socket, and by what asks no sidecar, they are not.
_file = click.Path(path_type=Path, dir_okay=False)
_OPTIONS: Final = (
    click.option(
        "--admin",
        metavar="ADDRESS",
        help="Admin endpoint: unix:/path, http://127.0.0.1:PORT or https://HOST:PORT. [TRUNKLINE_ADMIN]",
    ),
    click.option(
        "--token-file",
        type=_file,
        envvar="TRUNKLINE_ADMIN_TOKEN_FILE",
        help="File with the token to ask with over TCP. [TRUNKLINE_ADMIN_TOKEN_FILE]",
    ),
    click.option(
        "--ca-file",
        type=_file,
        envvar="TRUNKLINE_ADMIN_CA",
        help="Certificate of the authority that https is trusted by. [TRUNKLINE_ADMIN_CA]",
    ),
)


def endpoint_of(ctx: click.Context) -> Endpoint:
    """Return the endpoint that options or the environment name, else the first of the two usual places."""
    given: Mapping[str, Any] = ctx.find_root().params
    address = given.get("admin") or os.environ.get("TRUNKLINE_ADMIN")
    if not address and os.environ.get("TRUNKLINE_RUN_DIR"):
        address = f"unix:{os.environ['TRUNKLINE_RUN_DIR']}/admin.sock"
    if not address:
        address = f"unix:{DEFAULT_ADMIN_SOCKET}" if os.path.exists(DEFAULT_ADMIN_SOCKET) else DEFAULT_ADMIN_URL
    return Endpoint(address, given.get("token_file"), given.get("ca_file"))


def client_of(ctx: click.Context) -> AdminClient:
    """Return a client of the sidecar that is asked, closed when the command ends."""
    client = endpoint_of(ctx).client()
    ctx.call_on_close(client.close)
    return client


def _token(path: Path) -> str:
    try:
        text = path.read_text("ascii").strip()
    except OSError as error:
        raise ConfigError(f"the token in {path} cannot be read ({os.strerror(error.errno or 0)}); see --token-file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} holds no token: there are other characters in it than ASCII's") from error
    if not _TOKEN.fullmatch(text):
        raise ConfigError(f"{path} holds no token: that is one word of at most 1024 characters")
    return text
