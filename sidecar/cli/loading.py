"""Commands to one model that may take long: with a bar of what of it is in memory, and repeated while that grows.

The engine is not waited for without end by the endpoint, which then says `deadline_exceeded`. What was fetched until then stays
in memory, so asking again goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from trunkline.errors import DeadlineExceeded, TrunklineError

from sidecar.cli import bars
from sidecar.cli.endpoint import Endpoint

if TYPE_CHECKING:
    from sidecar.admin_client import AdminClient

_LOOK_S: Final = 0.25


def act_with_bar(endpoint: Endpoint, name: str, action: str) -> dict[str, Any]:
    """Have ``action`` done to a model and return what became of it. Raises TrunklineError."""
    with endpoint.client() as client, _watched(endpoint, name) if bars.are_drawn() else contextlib.nullcontext():
        there_bytes = -1
        while True:
            try:
                found: dict[str, Any] = client.post(f"models/{name}/{action}")
                return found
            except DeadlineExceeded:
                before_bytes, there_bytes = there_bytes, _resident_bytes(client, name)
                if there_bytes <= before_bytes:
                    raise


def _resident_bytes(client: AdminClient, name: str) -> int:
    return int(client.get(f"models/{name}").get("resident_bytes", -1))


@contextlib.contextmanager
def _watched(endpoint: Endpoint, name: str) -> Iterator[None]:
    """Draw, while the block runs, what of a model is in memory."""
    ended = threading.Event()

    def look() -> None:
        with bars.bytes_done(name) as advance, endpoint.client() as client:
            while not ended.wait(_LOOK_S):
                try:
                    found = client.get(f"models/{name}")
                except TrunklineError:
                    # Whoever asked for the work is told why it failed; this one only looks.
                    return
                if "resident_bytes" in found:
                    advance(found["resident_bytes"], found["memory_bytes"])

    # It ends with the command, whatever it waits for.
    watching = threading.Thread(target=look, daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join(2 * _LOOK_S)
