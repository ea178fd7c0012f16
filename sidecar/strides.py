"""Strides: how far a group of requests goes in one run, a stage or a stretch of them.

A request beside which there is nothing goes as far as it can (``sidecar.stretches``): there is nobody to meet. Among others it
would pass those whom it might have met, and who are answered for less together. So there a stretch is run where it was measured
to cost a row less than the same stages with as many rows as there are about; and for a while no stretch at all, where requests
had the same input, since whoever asks the same and comes in time costs nothing. Part of the engine thread.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from sidecar.catalog import Deployed, Step
from sidecar.costs import BatchCosts
from sidecar.loads import Loads
from sidecar.streams import Streams
from sidecar.stretches import LONGEST_S, Stretch
from sidecar.turns import Turns
from sidecar.underway import Call
from sidecar.wavefront import Group, Ticket, Wavefront

# Whoever begins so soon after a stretch has waited for it; what was seen of who is about holds for a while.
_NEXT_S: Final = 0.0005
_HOLDS_S: Final = 1.0
_MOST_GIVEN_UP: Final = 1024


class Stride(NamedTuple):
    """Stages that are run as one, and the name under which their cost is known."""

    stretch: Stretch
    steps: Sequence[Step]
    key: tuple[object, ...]
    expected_s: float


class Strides:
    """What groups of the ``wavefront`` may be run through at once; ``cut`` returns so many stages of a model from one on."""

    def __init__(
        self,
        wavefront: Wavefront[Call],
        turns: Turns[Call],
        loads: Loads,
        streams: Streams,
        costs: BatchCosts,
        clock: Callable[[], float],
        *,
        cut: Callable[[Deployed, int, int], Stretch | None],
    ) -> None:
        self._wavefront = wavefront
        self._turns = turns
        self._loads = loads
        self._streams = streams
        self._costs = costs
        self._clock = clock
        self._cut = cut
        # The most rows of late that might have met, and when.
        self._about, self._about_s = 1, -math.inf
        # When requests were last about to be computed once for several.
        self._same_s = -math.inf
        # When the last stretch ended, and which call it was for, by identity: nothing of a call that is over is held here.
        self._ended: tuple[float, int] = (-math.inf, 0)
        # Stretches that cannot be run on inputs of some form.
        self._given_up: set[tuple[object, ...]] = set()

    def ended(self, call: Call) -> None:
        """Note that a stretch has ended, which was run for a call."""
        self._ended = self._clock(), id(call)

    def give_up(self, key: tuple[object, ...]) -> None:
        """Run a stretch stage by stage from now on, by the name under which its cost is known: as one it fails."""
        if len(self._given_up) >= _MOST_GIVEN_UP:
            self._given_up.clear()
        self._given_up.add(key)

    def expected_s(self, group: Group[Call], key: tuple[object, ...], count: int, lanes: int) -> float:
        """Return what a group's next ``count`` stages were measured to take, under the name ``key``, with so many lanes.

        Or what they are reckoned to take at most, by what the model was tried with; 0 where nobody knows.
        """
        known_s = self._costs.expected_s(key, group.extent, lanes)
        if known_s:
            return known_s
        each_s = [self._stage_s(group, index, lanes) for index in range(group.index, group.index + count)]
        return sum(each_s) if all(each_s) else 0.0

    def _stage_s(self, group: Group[Call], index: int, lanes: int) -> float:
        ticket = group.first
        known_s = self._costs.expected_s(group.cost_key(ticket.steps[index]), group.extent, lanes)
        if known_s:
            return known_s
        deployed = _asked(ticket)
        return 0.0 if deployed is None else lanes * deployed.reckoned_s(index, ticket.inputs, group.extent)

    def of(self, group: Group[Call]) -> Stride | None:
        """Return the stretch that a group is run through next, with nothing beside it; None where that is one stage."""
        about = self._look(group)
        if group.apart or about is None or self._streams.deployed is not None:
            return None
        ticket = group.first
        if (deployed := _asked(ticket)) is None:
            return None
        stretch = self._stretch(deployed, group.index, [*group.tickets()], is_among_others=about > 1)
        if stretch is None:
            return None
        steps = deployed.steps[group.index : group.index + stretch.count]
        if not all(map(self._loads.is_ready, steps)):
            return None
        # Models that begin alike may go on in other ways.
        key = ("stretch", steps[0].key, steps[-1].key, stretch.count, ticket.scale)
        if key in self._given_up:
            return None
        expected_s = self.expected_s(group, key, stretch.count, 1)
        # Many rows, or long ones, take a multiple of what was reckoned with: others would wait long, for little to be gained.
        if not 0 < expected_s <= 2 * LONGEST_S or (about > 1 and not self._pays(group, steps, key, about)):
            return None
        return Stride(stretch, steps, key, expected_s)

    def _look(self, group: Group[Call]) -> int | None:
        """Return how many rows a group might meet, itself included; None where it should not pass anybody in any case."""
        ticket, now = group.first, self._clock()
        meets = not all(each.call is ticket.call for each in self._wavefront.tickets())
        about = self._wavefront.row_count if meets else 1
        ended_s, before = self._ended
        if id(ticket.call) != before and now - ended_s < _NEXT_S:
            about = max(about, 2)
        if about >= self._about or now - self._about_s >= _HOLDS_S:
            self._about, self._about_s = about, now
        if any(each.call is not row.tickets[0].call for row in group.rows for each in row.tickets):
            self._same_s = now
        if self._about == 1:
            # Models that are asked together have parted, and what is alike in them may be stacked.
            return 1 if self._wavefront.group_count == 1 else None
        if now - self._same_s < _HOLDS_S or self._turns.contended or self._wavefront.lanes > 1:
            return None
        if not group.index and len(group.rows) < self._about:
            # Whoever is answered at the same time asks again at the same time, or nearly so: those who come now catch up.
            return None
        return self._about if meets or self._wavefront.group_count == 1 else None

    def _stretch(
        self, deployed: Deployed, index: int, tickets: Sequence[Ticket[Call]], *, is_among_others: bool
    ) -> Stretch | None:
        """Return the stretch of a model from a stage on, as far as all tickets of a group go through it together."""
        start, whole = deployed.stretch_at(index)
        if whole is None or (index > start and not is_among_others):
            return None
        count = most = start + whole.count - index
        if len(tickets) > 1:
            ways = zip(*(each.steps[index : index + most] for each in tickets), strict=False)
            count = sum(1 for _ in itertools.takewhile(lambda steps: len({step.key for step in steps}) == 1, ways))
            # What is needed afterwards is said by the models, each for itself.
            if count and len({each.steps[index + count - 1].alive for each in tickets}) > 1:
                return None
        if count < 2:
            return None
        return whole if count == whole.count else self._cut(deployed, index, count)

    def _pays(self, group: Group[Call], steps: Sequence[Step], key: tuple[object, ...], about: int) -> bool:
        """Say whether a stretch costs a row less than the same stages with all that are about."""
        rows = group.extent
        if group.is_divisible:
            rows = max(rows, min(about * rows // len(group.rows), self._wavefront.most_rows, group.first.most))
        return self._costs.joins([group.cost_key(step) for step in steps], rows, key, group.extent)


def _asked(ticket: Ticket[Call]) -> Deployed | None:
    """Return the model that a ticket is for."""
    return next((each for each in ticket.call.parts if each.steps is ticket.steps), None)
