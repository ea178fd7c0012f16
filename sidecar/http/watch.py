"""Watching an engine: one look at it, and what the page shows of that. Belongs to one thread at a time.

The engine is told what is known already, so that it says again what changes and nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from sidecar.http.engineclient import EngineClient
from sidecar.rates import History, totals_of
from sidecar.sankey import laid_out
from sidecar.view import Seen, state_of

# Moves that are shown.
_MOST_MOVES: Final = 40


class Look(NamedTuple):
    """What was seen: the picture as it is laid out, which stays until models change, and all that changes every second."""

    drawing: dict[str, Any]
    state: dict[str, Any]


class Watcher:
    """Looks at one engine, again and again, whichever it is."""

    def __init__(
        self, engine: EngineClient, clock: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time
    ) -> None:
        self._engine = engine
        self._clock = clock
        self._wall = wall
        self._history = History()
        # By device: the version of its runs that is known, and its latest move.
        self._known: dict[str, dict[str, object]] = {}
        self._moves: dict[str, dict[str, Any]] = {}
        self._drawing: dict[str, Any] = {}

    def look(self) -> Look:
        """Ask the engine. Raises TrunklineError."""
        metrics = self._engine.command("metrics")["devices"]
        connections = self._engine.command("connections")
        pictures = self._engine.command("picture", {"of": self._known})["devices"]
        self._history.note(totals_of(metrics, connections, self._clock()))
        for number, (device, picture) in enumerate(pictures.items()):
            if not number and "runs" in picture:
                # Models are the same on all devices.
                self._draw(picture)
            self._note_moves(device, picture)
        seen = Seen(metrics, pictures, connections, list(self._moves.values()))
        return Look(self._drawing, state_of(seen, self._drawing, self._history))

    def _draw(self, picture: Mapping[str, Any]) -> None:
        runs = picture["runs"]
        note = ""
        if (drawn := len(runs)) < picture["block_count"]:
            note = f"{picture['block_count']} blocks, drawn as {drawn}: those that follow one another in the same models are one."
        self._drawing = {"version": picture["version"], "note": note, **laid_out(runs)}

    def _note_moves(self, device: str, picture: Mapping[str, Any]) -> None:
        life = picture["version"].partition("-")[0]
        before = self._known.get(device, {}).get("version")
        is_new = before is not None and str(before).partition("-")[0] != life
        # Those of an engine that was not known are asked for from the first, next time.
        self._known[device] = {"version": picture["version"], "since": 0 if is_new else picture["last_move"]}
        for move in [] if is_new else picture["moves"]:
            key = f"{life}-{move['id']}"
            at = time.strftime("%H:%M:%S", time.localtime(self._wall() - move["ago_s"]))
            # One that grew stays where it is, and keeps the time that it was seen first.
            self._moves[key] = {**move, "at": self._moves.get(key, {"at": at})["at"], "id": key}
        for oldest in list(self._moves)[: max(0, len(self._moves) - _MOST_MOVES)]:
            del self._moves[oldest]
