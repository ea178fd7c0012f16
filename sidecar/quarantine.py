"""Quarantine: which requests engines died of, and what becomes of the next ones like them. Pure: the clock is passed in.

What is told apart is a tenant's requests for one model. When an engine dies, all that its devices were computing at that
moment (``sidecar.journal``) is *suspect*: the next request of each is run alone, with nothing beside it on its device. If it is
over and the engine lives, nothing is held against it any more. If the engine dies again while it was all there was, these
requests are *refused* for a second, twice as long the next time, five minutes at most; then one is let through, alone again.

So whatever ends engines does so twice before it is refused, and who was beside it is run alone once. Where another device was at
something, too, or the engine looks as if it was killed by hand, nobody knows whose fault it was: it takes one death more, and the
refusal says that it is not *certain*. A function's client waits out the first second of that.

The supervisor has the books (``Quarantine``); an engine is forked with what they say (``Suspects``) and marks in its journal who
is cleared. They end with the supervisor. An operator may look at them, and have what is held against somebody forgotten.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from trunkline.errors import Quarantined
from trunkline.protocol import JOINT

from sidecar.errors import NotQuarantined
from sidecar.journal import MOST_MARKS, Asked, Entry
from sidecar.tenants import as_asked

FIRST_S: Final = 1.0
LONGEST_S: Final = 300.0


class Kind(NamedTuple):
    """What is suspected or refused: requests of a tenant for a model, by the name that the engine knows it by."""

    tenant: str
    model: str

    @property
    def id(self) -> str:
        """What operators call it by: the same for all engines, and 16 hexadecimal digits."""
        return hashlib.sha256(f"{self.tenant}\n{self.model}".encode()).hexdigest()[:16]


def kinds_of(tenant: str, models: str) -> list[Kind]:
    """Return of which kinds a call is: one for each model that it asks."""
    return [Kind(tenant, model) for model in models.split(JOINT)]


@dataclass(slots=True)
class _Record:
    """What is known of a kind: how often it was refused, for how long, and whether that is still to begin."""

    is_suspect: bool = True
    # Engines that died while it was run as a suspect, and not for certain of it.
    doubts: int = 0
    times: int = 0
    is_certain: bool = False
    wait_s: float = 0.0
    is_new: bool = False
    until_s: float = -math.inf


class Judged(NamedTuple):
    """A kind that an engine's death has made suspect, or that is refused for ``refused_s``; with one of its calls."""

    kind: Kind
    call: Asked
    refused_s: float = 0.0


class Quarantine:
    """The books. Owned by the supervisor."""

    def __init__(self) -> None:
        # How often something was refused.
        self.count = 0
        self._records: dict[Kind, _Record] = {}

    def engine_died(self, entries: Sequence[Entry], marked: Iterable[int], now: float, *, by_hand: bool = False) -> list[Judged]:
        """Note what an engine was computing when it died, and which of its suspects it had cleared; return who is concerned.

        ``by_hand`` says that it may well have been killed by somebody.
        """
        self._clear(marked, now)
        calls = [call for entry in entries for call in entry.calls]
        is_certain = not by_hand and sum(entry.running.call_count for entry in entries) == 1
        concerned = {kind: call for call in reversed(calls) for kind in kinds_of(call.tenant, call.model)}
        return [self._judge(kind, call, is_certain) for kind, call in reversed(concerned.items())]

    def engine_starts(self, now: float) -> None:
        """Begin to count the time for which kinds are refused: while there was no engine, nobody was."""
        for record in self._records.values():
            if record.is_new:
                record.is_new, record.until_s = False, now + record.wait_s

    def lift(self, numbers: Iterable[int]) -> None:
        """Forget what an operator has lifted, by its number in the engine that has died. Call before ``engine_died``.

        Marks of that engine go by the same numbers, so what is forgotten keeps its place as if it was cleared.
        """
        records = list(self._records)
        for number in numbers:
            if number < len(records):
                self._records[records[number]] = _Record(is_suspect=False)

    def suspects(
        self, mark: Callable[[int], None], clock: Callable[[], float], lift: Callable[[int], None] = lambda number: None
    ) -> Suspects:
        """Return what an engine has to know; it calls ``mark`` with the number of a suspect that it has cleared, and ``lift``
        with that of one that an operator wants nothing to be held against.
        """
        numbers = {kind: number for number, (kind, record) in enumerate(self._records.items()) if record.is_suspect}
        refused = {kind: (record.until_s, record.is_certain) for kind, record in self._records.items()}
        return Suspects(numbers, refused, mark, clock, lift)

    def _clear(self, marked: Iterable[int], now: float) -> None:
        records = list(self._records.values())
        for record in [records[number] for number in marked if number < len(records)]:
            record.is_suspect, record.doubts = False, 0
        # Who was refused of late is not a stranger yet.
        self._records = {
            kind: record for kind, record in self._records.items() if record.is_suspect or now < record.until_s + LONGEST_S
        }

    def _judge(self, kind: Kind, call: Asked, is_certain: bool) -> Judged:
        record = self._records.get(kind)
        if record is None or not record.is_suspect:
            if record is None:
                self._make_room()
                record = self._records[kind] = _Record()
            record.is_suspect = True
            return Judged(kind, call)
        record.doubts += 1
        if not is_certain and record.doubts == 1:
            return Judged(kind, call)
        self.count += 1
        record.is_certain = is_certain
        record.wait_s = min(FIRST_S * 2.0**record.times, LONGEST_S)
        record.times, record.doubts, record.is_new = record.times + 1, 0, True
        return Judged(kind, call, record.wait_s)

    def _make_room(self) -> None:
        if len(self._records) >= MOST_MARKS:
            del self._records[next(iter(self._records))]


class Suspects:
    """What one engine goes by. Any thread of it."""

    def __init__(
        self,
        numbers: dict[Kind, int],
        refused: dict[Kind, tuple[float, bool]],
        mark: Callable[[int], None],
        clock: Callable[[], float],
        lift: Callable[[int], None] = lambda number: None,
    ) -> None:
        """``numbers`` are the marks of those to be run alone, ``refused`` says until when they are, and whether for certain."""
        self._numbers = numbers
        self._refused = refused
        self._mark = mark
        self._clock = clock
        self._lift = lift

    def __bool__(self) -> bool:
        return bool(self._numbers)

    def check(self, tenant: str, models: str) -> None:
        """Raise Quarantined while a tenant's requests for a model, or for one of several, are refused."""
        if not self._refused:
            return
        now = self._clock()
        for kind in kinds_of(tenant, models):
            until_s, is_certain = self._refused.get(kind, (-math.inf, False))
            left_s = until_s - now
            if left_s > 0:
                raise Quarantined(
                    f"the sidecar's engine ended while it computed {as_asked(kind.model)} for this tenant, and again when "
                    f"that was all it did; such requests are refused for {left_s:.1f} s, then one is tried: look at what is sent",
                    retry_after_s=round(left_s, 3),
                    certain=is_certain,
                )

    def has(self, tenant: str, models: str) -> bool:
        """Say whether a call has to be run alone."""
        return bool(self._numbers) and any(kind in self._numbers for kind in kinds_of(tenant, models))

    def clear(self, tenant: str, models: str) -> None:
        """Note that a call is over, and the engine lives."""
        if self._numbers:
            for kind in kinds_of(tenant, models):
                if (number := self._numbers.pop(kind, None)) is not None:
                    self._mark(number)

    def listed(self) -> list[dict[str, object]]:
        """Return whose requests are refused or run alone, as an operator sees it."""
        now = self._clock()
        return [self._to_plain(kind, now) for kind in list(self._numbers)]

    def lift(self, kind_id: str = "") -> list[dict[str, object]]:
        """Forget what is held against the kind of this id, or against all where none is given; return what that was.

        Raises NotQuarantined.
        """
        now = self._clock()
        wanted = [kind for kind in list(self._numbers) if kind_id in ("", kind.id)]
        if kind_id and not wanted:
            raise NotQuarantined(f"nothing is held against requests of id {kind_id[:32]!r}; `trunkline quarantine ls` lists them")
        lifted = []
        for kind in wanted:
            plain = self._to_plain(kind, now)
            # One of them may just have been answered.
            if (number := self._numbers.pop(kind, None)) is not None:
                self._refused.pop(kind, None)
                self._lift(number)
                lifted.append(plain)
        return lifted

    def _to_plain(self, kind: Kind, now: float) -> dict[str, object]:
        until_s, is_certain = self._refused.get(kind, (-math.inf, False))
        left_s = max(0.0, until_s - now)
        return {
            "id": kind.id,
            "tenant": kind.tenant,
            "model": kind.model,
            "state": "refused" if left_s else "alone",
            "refused_for_s": round(left_s, 3),
            "certain": is_certain,
        }


def nobody() -> Suspects:
    """Return what an engine goes by that nobody has told anything."""
    return Suspects({}, {}, lambda number: None, lambda: 0.0)
