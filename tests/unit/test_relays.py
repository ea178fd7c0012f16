"""Between a connection's session and several engines."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trunkline.errors import ArenaFull, InvalidInput, TrunklineError

from sidecar.relays import Line, Relay


class Told:
    """A session that notes what it is told; ``too_long`` makes documents too long for its arena."""

    def __init__(self, too_long: bool = False) -> None:
        self.events: list[Any] = []
        self.too_long = too_long

    def answer(self, request_id: int, specs: Any, outputs: Sequence[Any], read: Any) -> None:
        self.events.append(("answer", outputs))

    def document(self, request_id: int, plain: object) -> None:
        if self.too_long:
            raise ArenaFull("too long")
        self.events.append(plain)

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self.events.append(error.code)

    def released(self) -> None:
        self.events.append("released")


def relay_of(session: Told, ended: list[tuple[str, str]] | None = None) -> Relay:
    over = [] if ended is None else ended
    return Relay(session, ["one", "other"], lambda device, model: over.append((device, model)))


def test_an_answer_is_passed_on_when_the_request_is_counted_out() -> None:
    session, ended = Told(), []  # type: ignore[var-annotated]
    relay = relay_of(session, ended)
    line = relay.begin("one", "m")
    line.answer(1, (), ["y"], lambda tensor, target: None)
    assert (ended, session.events) == ([("one", "m")], [("answer", ["y"])])
    # Should the session not take it, it is told why, and nothing is counted twice.
    line.fail(1, InvalidInput("no"))
    assert ended == [("one", "m")]


def test_documents_are_made_one_in_the_order_of_the_devices() -> None:
    session = Told()
    relay = relay_of(session)
    relay.gather(["one", "other"], list)
    relay.lines["other"].document(1, "b")
    assert session.events == []
    relay.lines["one"].document(1, "a")
    assert session.events == [["one", "other"]]


def test_the_first_devices_error_is_told_once_all_have_answered() -> None:
    session = Told()
    relay = relay_of(session)
    relay.gather(["one", "other"], list)
    relay.lines["other"].fail(1, ArenaFull("second"))
    relay.lines["one"].fail(1, InvalidInput("first"))
    assert session.events == ["invalid_input"]


def test_a_document_that_is_too_long_is_an_error() -> None:
    session = Told(too_long=True)
    relay = relay_of(session)
    relay.gather(["one"], list)
    relay.lines["one"].document(1, "a")
    assert session.events == ["arena_full"]


def test_a_session_is_released_when_nobody_has_anything_of_it() -> None:
    session, ended = Told(), []  # type: ignore[var-annotated]
    relay = relay_of(session, ended)
    relay.begin("other", "m")
    held: list[Line] = [relay.hold()]
    held[0].conclude(1, "told")
    # The next is asked the moment the first is told.
    held += [relay.hold(), relay.hold()]
    held[1].conclude(1, "again")
    relay.released("one")
    assert ended == []
    relay.released("other")
    # What was under way there is over, and was told nobody.
    assert ended == [("other", "m")]
    assert session.events == ["told", "again"]
    held[2].conclude(1, "last")
    assert session.events == ["told", "again", "last", "released"]
