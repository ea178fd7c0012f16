"""The sidecar that a command asks."""

from __future__ import annotations

import os

import click

from sidecar.admin_client import AdminClient

DEFAULT_ADMIN_SOCKET = "/run/trunkline/admin.sock"
DEFAULT_ADMIN_URL = "http://127.0.0.1:9470"


def client_of(ctx: click.Context) -> AdminClient:
    """Return a client of the sidecar that `--admin` or the environment names, closed when the command ends."""
    address = ctx.find_root().obj or os.environ.get("TRUNKLINE_ADMIN")
    if not address and os.environ.get("TRUNKLINE_RUN_DIR"):
        address = f"unix:{os.environ['TRUNKLINE_RUN_DIR']}/admin.sock"
    if not address:
        address = f"unix:{DEFAULT_ADMIN_SOCKET}" if os.path.exists(DEFAULT_ADMIN_SOCKET) else DEFAULT_ADMIN_URL
    client = AdminClient(address)
    ctx.call_on_close(client.close)
    return client
