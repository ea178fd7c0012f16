"""Commands to one model that may take long: with a bar of what of it is in memory.

The endpoint does not wait for the engine without end, and then says `deadline_exceeded`. A model that is not in memory by then
is loaded by a job, which is waited for as long as it takes.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any, Final

from trunkline.errors import DeadlineExceeded, TrunklineError

from sidecar.cli import bars
from sidecar.cli.endpoint import Endpoint
from sidecar.cli.jobs import awaited

_LOOK_S: Final = 0.25
# What fetches a model.
_LOADING: Final = ("load", "pin")


def act_with_bar(endpoint: Endpoint, name: str, action: str) -> dict[str, Any]:
    """Have ``action`` done to a model and return what became of it. Raises TrunklineError."""
    path = f"models/{name}/{action}"
    with endpoint.client() as client, _watched(endpoint, name) if bars.are_drawn() else contextlib.nullcontext():
        found: dict[str, Any]
        try:
            found = client.post(path)
        except DeadlineExceeded:
            if action not in _LOADING:
                raise
            found = awaited(client, client.post(f"models/{name}/load?wait=false"))
            # What is there is pinned at once.
            if action != "load":
                found = client.post(path)
        return found


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
