"""Relays: between the session of a connection and the engines of several devices, each of which has a *line* for a session.

A connection has one request or command at a time, and so has its relay. A request goes to one engine; a command may go to
several, and what they tell is made one document. Lines are told what engines have to say, in their threads; all else belongs to
the server's.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trunkline.errors import TrunklineError

from sidecar.ports import OutputSpecs, Session

# Makes one document of those that engines gave, by the names of their devices.
Merge = Callable[[Mapping[str, Any]], Any]


class Relay:
    """``lines`` are in the order of ``devices``. ``ended`` is told that a request is over, with its device and model, before its
    session is.
    """

    def __init__(self, session: Session, devices: Sequence[str], ended: Callable[[str, str], None]) -> None:
        self.lines = {device: Line(self, device) for device in devices}
        self._session = session
        self._ended = ended
        # The request under way: its device and model.
        self._under_way: tuple[str, str] | None = None
        self._lock = threading.Lock()
        # Devices whose engines still have something of the session.
        self._holders = set(devices)
        self._hold_count = 0
        # What was told of a command, and by whom something is still to be told.
        self._merge: Merge | None = None
        self._awaited: list[str] = []
        self._told: dict[str, Any] = {}

    def begin(self, device: str, model: str) -> Line:
        """Note where a request goes; return the session for that engine."""
        self._under_way = device, model
        return self.lines[device]

    def hold(self) -> Line:
        """Return a line for somebody else than an engine, who concludes what is asked now."""
        with self._lock:
            # Each has a name of its own: the next may hold before the last has let go.
            self._hold_count += 1
            holder = f"#{self._hold_count}"
            self._holders.add(holder)
        return Line(self, holder)

    def gather(self, devices: Sequence[str], merge: Merge) -> None:
        """Have what these devices' engines tell next made one document; if any of them fails, that is the answer."""
        self._merge, self._awaited, self._told = merge, list(devices), {}

    def end(self) -> None:
        """Note that a request is over; for lines."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            self._ended(*under_way)

    def tell(self, device: str, request_id: int, found: Any) -> None:
        """Note what an engine told, a document or an error; tell the session when it was the last. For lines."""
        with self._lock:
            if self._merge is None:
                outcome = found
            else:
                self._told[device] = found
                if len(self._told) < len(self._awaited):
                    return
                told = [self._told[name] for name in self._awaited]
                errors = [each for each in told if isinstance(each, TrunklineError)]
                # In one order, whichever engine was first.
                outcome = errors[0] if errors else self._merge({name: self._told[name] for name in self._awaited})
                self._merge = None
        if isinstance(outcome, TrunklineError):
            self._session.fail(request_id, outcome)
            return
        try:
            self._session.document(request_id, outcome)
        except TrunklineError as error:
            # It is too long for the session's arena, say.
            self._session.fail(request_id, error)

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        """Pass an answer on; for lines."""
        # Before the session is told: its function's next request may be here the moment it is.
        self.end()
        self._session.answer(request_id, specs, outputs, read)

    def released(self, device: str) -> None:
        """Note that an engine has nothing of the session any more; when none has, the session is told. For lines."""
        with self._lock:
            before, self._holders = self._holders, self._holders - {device}
            over = bool(before) and not self._holders
        under_way = self._under_way
        if under_way is not None and under_way[0] == device:
            # One that was under way when its connection ended was told nobody.
            self.end()
        if over:
            self._session.released()


class Line:
    """What one engine takes for the session."""

    def __init__(self, relay: Relay, device: str) -> None:
        self._relay = relay
        self._device = device

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        self._relay.answer(request_id, specs, outputs, read)

    def document(self, request_id: int, plain: object) -> None:
        self._relay.tell(self._device, request_id, plain)

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self._relay.end()
        self._relay.tell(self._device, request_id, error)

    def released(self) -> None:
        self._relay.released(self._device)

    def conclude(self, request_id: int, found: object) -> None:
        """Tell a document or an error, and let go of the session: for whoever holds it beside engines."""
        self._relay.tell(self._device, request_id, found)
        self._relay.released(self._device)
