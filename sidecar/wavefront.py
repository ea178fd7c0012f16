"""The wavefront: requests that are being computed, each standing before some stage of its model, and which stage runs next.

Requests that stand before the same stage are run through it as one *group*: of different functions, as far as their models are
the same, and one after the other where their models part. A group has *rows*, one per different input; a row has the *tickets*
of all who asked about that input. So a stage is run once for those who ask the same, and as a batch for those who ask something
else:

- A call about several models is one row with several tickets.
- A request whose input is, byte for byte, that of a row under way joins that row, if its model has run through the same stages.
- Other requests join as further rows, where measurements say that a batch pays, and never wait while the device is idle. A group
  that has just begun lets later ones catch up with it, once: the work they do meanwhile has to be done anyway.

Where the device is divided into several lanes (``sidecar.lanes``), a group whose stage is *running* is left as it is until that
has ended, but for tickets that join its rows or leave them. The rows that can go on are shared out among the lanes that are idle,
and nobody waits to be caught up with: a batch is no reason for a lane to have nothing to do.

Which rows may stand beside each other is not known here: a ticket comes with the layouts of its model's tensors if rows were seen
not to touch each other, and without any otherwise; then it is alone in its group. Continuous batching by iteration is Orca's
(Yu et al., 2022), here by stage. Pure: tensors are only handed to ``Arrays``. Owned by the engine thread.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar

from trunkline.errors import DeviceFault

from sidecar.costs import BatchCosts
from sidecar.stages import Key


class Padding(NamedTuple):
    """How a call's inputs may be made longer without changing what it is answered: with zeros, also in the mask it takes.

    ``axes`` has the axis of each input that is concerned, ``cuts`` that of each result, None where there is none; ``size`` is how
    long the call is.
    """

    axes: Mapping[Key, int]
    cuts: tuple[int | None, ...]
    size: int


# The axis along which the rows of a batch lie in a tensor, each with as many places as the others; None for a tensor that is the
# same for every row.
Layouts = Mapping[Key, int | None]
# Calls whose lengths differ by less are made equally long. Shorter than that, a row costs a transformer what its weights cost.
_BUCKET: Final = 16
INPUT: Final = 0


class Step(Protocol):
    """A stage as the wavefront sees it. Equal keys: the same computation after the same computations."""

    @property
    def key(self) -> str: ...
    @property
    def takes(self) -> tuple[Key, ...]: ...
    @property
    def gives(self) -> tuple[Key, ...]: ...
    @property
    def alive(self) -> frozenset[Key]: ...


class Arrays(Protocol):
    """What is done with tensors between stages."""

    def join(self, tensors: Sequence[Any], axis: int) -> Any: ...
    def pad(self, tensor: Any, axis: int, size: int) -> Any: ...
    def part(self, tensor: Any, axis: int, start: int, length: int) -> Any: ...
    def same(self, one: Any, other: Any) -> bool: ...
    def copy(self, tensor: Any) -> Any: ...


C = TypeVar("C")


@dataclass(slots=True, eq=False)
class Ticket(Generic[C]):
    """One model's answer to one call. ``inputs`` are the call's, by name, ``extent`` their size along the batch axis.

    ``most`` is the largest size that the model takes along that axis. ``shares`` says whether it may be computed together with
    the same input of somebody else.
    """

    call: C
    steps: Sequence[Step]
    results: tuple[Key, ...]
    inputs: Mapping[Key, Any]
    extent: int
    layouts: Layouts | None
    most: int = 64
    shares: bool = True
    padding: Padding | None = None
    order: int = 0
    # What, beside the number of rows, tells how much there is to compute.
    scale: tuple[object, ...] = field(init=False)

    def __post_init__(self) -> None:
        if self.padding is not None:
            self.scale = (-(-self.padding.size // _BUCKET),)
        else:
            self.scale = tuple(tuple(value.shape[1:]) for value in self.inputs.values())


@dataclass(slots=True, eq=False)
class _Row(Generic[C]):
    tickets: list[Ticket[C]]
    extent: int


@dataclass(slots=True, eq=False)
class Group(Generic[C]):
    """Rows that stand before the same stage, number ``index`` of each of their models; ``values`` are the tensors they have."""

    index: int
    rows: list[_Row[C]]
    values: dict[Key, Any]
    # Of a group that failed, which was split into its rows.
    apart: bool = False
    # Something was let go of, so that there is room for its stage.
    relieved: bool = False
    # It lets others catch up with it, or has done so; ``awaited`` is one of their tickets.
    waited: bool = False
    awaited: Ticket[C] | None = None
    # A lane is at its stage.
    running: bool = False
    order: int = field(init=False)

    def __post_init__(self) -> None:
        self.order = min((ticket.order for ticket in self.tickets()), default=0)

    def tickets(self) -> Iterator[Ticket[C]]:
        """Yield all tickets, row by row."""
        for row in self.rows:
            yield from row.tickets

    @property
    def first(self) -> Ticket[C]:
        """Return a ticket of the group; before this stage it has what all of them have."""
        for row in self.rows:
            if row.tickets:
                return row.tickets[0]
        raise AssertionError("nobody waits for this group")

    @property
    def step(self) -> Step:
        return self.first.steps[self.index]

    @property
    def extent(self) -> int:
        """Return how many rows of the batch axis the group has."""
        return sum(row.extent for row in self.rows)

    def takes(self) -> list[Any]:
        """Return the tensors that the stage is run on."""
        return [self.values[key] for key in self.step.takes]

    @property
    def is_divisible(self) -> bool:
        """Return whether its rows were seen not to touch each other, so that they may be computed in parts."""
        return all(ticket.layouts is not None for ticket in self.tickets())

    def axis(self, key: Key) -> int | None:
        """Return the axis of a tensor along which the group's rows lie."""
        for ticket in self.tickets():
            if ticket.layouts is not None and key in ticket.layouts:
                return ticket.layouts[key]
        return INPUT

    def places(self, key: Key) -> tuple[int, int] | None:
        """Return the axis of a tensor along which the rows lie, and the places that each has; None where all have all of it.

        Raises DeviceFault where places do not go to the rows in equal parts.
        """
        if (axis := self.axis(key)) is None:
            return None
        size = self.values[key].shape[axis]
        per_row, rest = divmod(size, self.extent)
        if rest:
            raise DeviceFault(f"{size} places of a tensor do not go to {self.extent} rows in equal parts")
        return axis, per_row

    def place(self) -> tuple[object, ...]:
        """Return what groups must have in common to be run as one."""
        if self.apart or not self.is_divisible:
            return (id(self),)
        padded = self.index == 0 and all(ticket.padding is not None for ticket in self.tickets())
        shapes: list[object] = [self.first.scale] if padded else []
        for key in sorted(self.values):
            shape, axis = list(self.values[key].shape), self.axis(key)
            if padded and self.first.padding is not None and key in self.first.padding.axes:
                shape[self.first.padding.axes[key]] = -1
            if axis is not None:
                # Places of one row: its length may be folded into them.
                shape[axis] //= self.extent
            shapes.append((key, *shape))
        return (self.step.key, *shapes)

    def frozen(self) -> Group[C]:
        """Return the group as it is now, for a lane to look at while tickets come and go."""
        return Group(self.index, [_Row([*row.tickets], row.extent) for row in self.rows], dict(self.values), self.apart)

    def cost_key(self, step: Step) -> tuple[object, ...]:
        """Return the name under which the cost of a stage of this group is known."""
        return (step.key, self.first.scale)


class Wavefront(Generic[C]):
    """All groups under way. ``most_rows`` bounds the batch that is made of several requests; 1 for none.

    ``lanes`` says how many stages may be run at the same time.
    """

    def __init__(self, arrays: Arrays, costs: BatchCosts, most_rows: int) -> None:
        self.lanes = 1
        self._arrays = arrays
        self._costs = costs
        self.most_rows = most_rows
        self._groups: list[Group[C]] = []
        self._orders = itertools.count(1)

    def __len__(self) -> int:
        return sum(len(row.tickets) for group in self._groups for row in group.rows)

    def __bool__(self) -> bool:
        return bool(self._groups)

    @property
    def group_count(self) -> int:
        return len(self._groups)

    def __contains__(self, group: Group[C]) -> bool:
        return any(each is group for each in self._groups)

    def tickets(self) -> Iterator[Ticket[C]]:
        """Yield the tickets that are not finished."""
        for group in self._groups:
            yield from group.tickets()

    def standing(self, belongs: Callable[[Ticket[C]], bool]) -> frozenset[int]:
        """Return the numbers of the stages that those tickets stand before, or are run at, of which ``belongs`` says so."""
        return frozenset(group.index for group in self._groups if any(map(belongs, group.tickets())))

    @property
    def row_count(self) -> int:
        """Return how many rows are under way: requests, but for those that are computed once for several."""
        return sum(len(group.rows) for group in self._groups)

    def add(self, tickets: Sequence[Ticket[C]]) -> None:
        """Let the tickets of one call, which have the same inputs, stand before their first stages."""
        order = next(self._orders)
        starts: dict[str, list[Ticket[C]]] = {}
        for ticket in tickets:
            ticket.order = order
            if not self._join_row(ticket):
                starts.setdefault(ticket.steps[0].key, []).append(ticket)
        for members in starts.values():
            self._groups.append(Group(0, [_Row(members, members[0].extent)], dict(members[0].inputs)))

    def _join_row(self, ticket: Ticket[C]) -> bool:
        for group in self._groups if ticket.shares else ():
            if not _passes(ticket, group) or (ticket.layouts is None and len(group.rows) > 1):
                continue
            needed = ticket.steps[group.index - 1].alive if group.index else ticket.inputs.keys()
            if not needed <= group.values.keys():
                continue
            for row in group.rows:
                other = row.tickets[0] if row.tickets else None
                if other is not None and other.shares and ticket.extent == row.extent and self._same(ticket.inputs, other.inputs):
                    # What the row was made of belongs to the other, and is written to again when the other is answered.
                    try:
                        for key, value in group.values.items():
                            if value is other.inputs.get(key):
                                group.values[key] = self._arrays.copy(value)
                    except DeviceFault:
                        # No room for a copy: it goes by itself.
                        return False
                    row.tickets.append(ticket)
                    return True
        return False

    def _same(self, inputs: Mapping[Key, Any], others: Mapping[Key, Any]) -> bool:
        return inputs.keys() == others.keys() and all(self._arrays.same(value, others[key]) for key, value in inputs.items())

    def choose(
        self,
        is_ready: Callable[[Step], bool] = lambda step: True,
        idle: int = 1,
        first: Callable[[Sequence[Group[C]]], Group[C]] | None = None,
        equal: Callable[[Group[C], Group[C]], bool] = lambda one, other: True,
    ) -> Group[C] | None:
        """Return the group to run next, of those whose stage ``is_ready``; None when there is none.

        ``first`` says which of several goes first, the oldest unless it is given; ``equal`` whether the first of two groups may
        wait for the second one, or be made larger by it. ``idle`` lanes want a group.
        """
        self._groups = [group for group in map(self._alive, self._groups) if group is not None]
        ready = [group for group in self._groups if not group.running and is_ready(group.step)]
        if not ready:
            return None
        chosen = first(ready) if first is not None and len(ready) > 1 else min(ready, key=_order)
        # Its weights may be gone again, of a model that does not fit.
        if self.lanes == 1 and (behind := self._behind(chosen, equal)) is not None and is_ready(behind.step):
            chosen = behind
        if len(self._groups) == 1 or self.most_rows == 1:
            return chosen
        key = chosen.step.key
        mates = [group for group in self._groups if group is not chosen and not group.running and group.step.key == key]
        place = chosen.place() if mates else ()
        mates = [group for group in mates if group.place() == place and equal(chosen, group)]
        most = self.most_rows
        if idle > 1:
            most = min(most, -(-sum(group.extent for group in ready) // idle))
        try:
            for mate in sorted(mates, key=_order):
                if chosen.extent + mate.extent <= most and self._pays(chosen, mate):
                    chosen = self._merge(chosen, mate)
        except DeviceFault:
            # No room for a batch: what there is runs in smaller ones.
            chosen.apart = True
        return chosen

    def has_only(self, groups: Sequence[Group[C]], is_ready: Callable[[Step], bool]) -> bool:
        """Say whether no stage can be run but those of some groups."""
        return all(group in groups or group.running or not is_ready(group.step) for group in self._groups)

    def others(self, group: Group[C], alike: Callable[[Step, Step], bool]) -> list[Group[C]]:
        """Return the groups that are about to run stages that are ``alike``: many heads on one trunk may have one structure."""
        if len(self._groups) == 1:
            return []
        step = group.step
        return [other for other in self._groups if other is not group and not other.running and alike(step, other.step)]

    def beside(self, group: Group[C], others: Sequence[Group[C]]) -> list[Group[C]]:
        """Return those of some groups that are about to run on the very tensors that ``group`` runs on.

        A group that is served by itself has nobody beside.
        """
        takes = group.takes()
        if group.apart or not takes:
            return []
        # Mostly the first tells.
        return [
            other
            for other in others
            if not other.apart and other.values[other.step.takes[0]] is takes[0] and all(map(operator.is_, takes, other.takes()))
        ]

    def abreast(self, group: Group[C], others: Sequence[Group[C]], equal: Callable[[Group[C], Group[C]], bool]) -> list[Group[C]]:
        """Return those of some groups that are about to run on tensors of their own, of the shapes that ``group`` runs on.

        One for each stage, the oldest; those before one stage are a batch or should be none. ``equal`` says which of them may
        come with ``group``. A group that is served by itself has nobody abreast.
        """
        if group.apart or not group.is_divisible:
            return []
        shapes, found = _shapes(group), {group.step.key: group}
        for other in sorted(others, key=_order):
            if (
                other.step.key not in found
                and not other.apart
                and other.is_divisible
                and _shapes(other) == shapes
                and equal(group, other)
            ):
                found[other.step.key] = other
        return [other for other in found.values() if other is not group]

    def _behind(self, group: Group[C], equal: Callable[[Group[C], Group[C]], bool]) -> Group[C] | None:
        """Return a group that catches up with this one, if it should be waited for."""
        if group.awaited is None and not group.waited and 0 < 2 * group.index <= len(group.first.steps):
            for other in self._groups:
                if other.index < group.index and _together(other, group) and equal(group, other) and self._pays(group, other):
                    group.waited, group.awaited = True, other.first
                    break
        if group.awaited is not None:
            for other in self._groups:
                if other.index < group.index and group.awaited in list(other.tickets()) and _together(other, group):
                    return other
        group.awaited = None
        return None

    def _pays(self, one: Group[C], other: Group[C]) -> bool:
        together = one.extent + other.extent
        most = min(ticket.most for group in (one, other) for ticket in group.tickets())
        if together > min(most, self.most_rows):
            return False
        keys = [one.cost_key(step) for step in one.first.steps[one.index :]]
        return self._costs.pays(keys, max(one.extent, other.extent), together)

    def _merge(self, one: Group[C], other: Group[C]) -> Group[C]:
        values = {}
        for key, value in one.values.items():
            axis = one.axis(key)
            values[key] = value if axis is None else self._arrays.join(self._level(one, key, value, other.values[key]), axis)
        merged = Group(one.index, one.rows + other.rows, values, waited=one.waited or other.waited)
        self._groups = [group for group in self._groups if group not in (one, other)] + [merged]
        return merged

    def _level(self, group: Group[C], key: Key, one: Any, other: Any) -> list[Any]:
        """Return two tensors equally long along the axis that may be padded."""
        padding = group.first.padding
        if group.index or padding is None or key not in padding.axes:
            return [one, other]
        axis = padding.axes[key]
        size = max(one.shape[axis], other.shape[axis])
        return [each if each.shape[axis] == size else self._arrays.pad(each, axis, size) for each in (one, other)]

    def _alive(self, group: Group[C]) -> Group[C] | None:
        """Return the group without rows that nobody waits for any more; None when none is left."""
        rows = [row for row in group.rows if row.tickets]
        if group.running or len(rows) == len(group.rows):
            return group
        return self._pick(group, rows) if rows else None

    def advance(self, group: Group[C], outputs: Sequence[Any]) -> list[tuple[Ticket[C], list[Any]]]:
        """Note what a group's stage gave; return the tickets that are finished, with their results."""
        step = group.step
        group.values.update(zip(step.gives, outputs, strict=True))
        if len(group.rows) == 1 and len(group.rows[0].tickets) == 1 and group.index + 1 < len(group.first.steps):
            # The ordinary case, for which what follows comes to the same.
            group.values = {key: group.values[key] for key in step.alive}
            group.index += 1
            return []
        finished: list[tuple[Ticket[C], list[Any]]] = []
        onward: dict[str, list[tuple[_Row[C], Ticket[C]]]] = {}
        for row in group.rows:
            for ticket in row.tickets:
                if group.index + 1 == len(ticket.steps):
                    results = [self._slice(group, [row], key) for key in ticket.results]
                    finished.append((ticket, self._cut(ticket, results)))
                else:
                    onward.setdefault(ticket.steps[group.index + 1].key, []).append((row, ticket))
        moved = [self._onward(group, pairs) for pairs in onward.values()]
        # Nothing has changed so far: a failure on the way here is one of the whole group.
        self._groups.remove(group)
        self._groups += moved
        return finished

    def leap(self, group: Group[C], count: int, outputs: Mapping[Key, Any]) -> list[Any]:
        """Let a request that is alone in its group, and was run through ``count`` stages as one, stand at the last of them.

        ``outputs`` are the tensors that are needed later; returns those that the last stage gives.
        """
        group.values.update(outputs)
        group.index += count - 1
        return [outputs[key] for key in group.step.gives]

    def _cut(self, ticket: Ticket[C], results: list[Any]) -> list[Any]:
        """Return results as long as the call was, which may have been padded."""
        if ticket.padding is None:
            return results
        size = ticket.padding.size
        return [
            value if axis is None or value.shape[axis] == size else self._arrays.part(value, axis, 0, size)
            for value, axis in zip(results, ticket.padding.cuts, strict=True)
        ]

    def _onward(self, group: Group[C], pairs: Sequence[tuple[_Row[C], Ticket[C]]]) -> Group[C]:
        """Return those of a group that go on to the same stage."""
        alive = frozenset[Key]().union(*(ticket.steps[group.index].alive for _, ticket in pairs))
        tickets: dict[int, list[Ticket[C]]] = {}
        for row, ticket in pairs:
            tickets.setdefault(id(row), []).append(ticket)
        rows = [row for row in group.rows if id(row) in tickets]
        values = {key: self._slice(group, rows, key) for key in alive}
        own = [_Row(tickets[id(row)], row.extent) for row in rows]
        return Group(group.index + 1, own, values, group.apart, waited=group.waited, awaited=group.awaited)

    def _pick(self, group: Group[C], rows: list[_Row[C]]) -> Group[C]:
        """Return some rows of a group as a group."""
        values = {key: self._slice(group, rows, key) for key in group.values}
        return Group(group.index, rows, values, group.apart, waited=group.waited, awaited=group.awaited)

    def _slice(self, group: Group[C], rows: Sequence[_Row[C]], key: Key) -> Any:
        """Return the part of a tensor that belongs to some rows of a group."""
        value = group.values[key]
        if len(rows) == len(group.rows) or (places := group.places(key)) is None:
            return value
        axis, per_row = places
        parts: list[tuple[int, int]] = []
        start = 0
        for row in group.rows:
            if any(row is other for other in rows):
                if parts and sum(parts[-1]) == start:
                    parts[-1] = (parts[-1][0], parts[-1][1] + row.extent)
                else:
                    parts.append((start, row.extent))
            start += row.extent
        pieces = [self._arrays.part(value, axis, first * per_row, length * per_row) for first, length in parts]
        return pieces[0] if len(pieces) == 1 else self._arrays.join(pieces, axis)

    def fail(self, group: Group[C]) -> list[Ticket[C]]:
        """Note that a group's stage failed; return the tickets that fail with it.

        None do, where it had several rows: each of them is run once more by itself, so that only the guilty one fails.
        """
        self._groups.remove(group)
        try:
            alone = [self._pick(group, [row]) for row in group.rows]
        except DeviceFault:
            # Where there is no memory even for that, all of it fails.
            return list(group.tickets())
        if len(alone) == 1:
            return list(group.tickets())
        for each in alone:
            each.apart = True
        self._groups += alone
        return []

    def abandon(self) -> list[Ticket[C]]:
        """Forget the oldest group, of which the next stage cannot even be chosen; return its tickets."""
        oldest = min((group for group in self._groups if not group.running), key=_order)
        self._groups.remove(oldest)
        return list(oldest.tickets())

    def drop(self, belongs: Callable[[Ticket[C]], bool]) -> list[Ticket[C]]:
        """Forget the tickets of which ``belongs`` says so; return them. Rows that nobody else asked about are not run on."""
        dropped: list[Ticket[C]] = []
        for group in self._groups:
            for row in group.rows:
                dropped += [ticket for ticket in row.tickets if belongs(ticket)]
                row.tickets = [ticket for ticket in row.tickets if not belongs(ticket)]
        self._groups = [group for group in self._groups if any(row.tickets for row in group.rows)]
        return dropped


def _order(group: Group[Any]) -> int:
    return group.order


def _shapes(group: Group[Any]) -> list[tuple[object, ...]]:
    return [(value.dtype, *value.shape) for value in group.takes()]


def _passes(ticket: Ticket[Any], group: Group[Any]) -> bool:
    """Say whether a ticket would stand where the group stands, had it begun with it."""
    other = next(group.tickets(), None)
    index = group.index
    return other is not None and index < len(ticket.steps) and ticket.steps[index].key == other.steps[index].key


def _together(behind: Group[Any], ahead: Group[Any]) -> bool:
    if behind.apart or ahead.apart or behind.first.scale != ahead.first.scale:
        return False
    # Of padded calls, only those as long as the others are now would meet them.
    if behind.first.padding is not None and any(
        ticket.padding != behind.first.padding for group in (behind, ahead) for ticket in group.tickets()
    ):
        return False
    known = all(ticket.layouts is not None for group in (behind, ahead) for ticket in group.tickets())
    return known and all(_passes(ticket, ahead) for ticket in behind.tickets())
