"""Stages run in parts: what the parts give is put together as it would have come from the whole, wherever rows lie in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from trunkline.errors import DeviceOutOfMemory

from sidecar.residency import Residency
from sidecar.shortage import Shortage, Splits
from sidecar.wavefront import INPUT, Layouts, Ticket, Wavefront
from tests.unit.test_wavefront import Arrays, Step, X, front, rows

# Rows lie along different axes, with two places each in one of the tensors; one tensor they have in common.
FOLDED, COMMON, Y = b"folded", b"common", b"y"
LAYOUTS: Layouts = {X: INPUT, FOLDED: 1, COMMON: None, Y: INPUT}
STEPS = (
    Step("/a", 1, (X,), (FOLDED, COMMON), frozenset((FOLDED, COMMON))),
    Step("/a/b", 1, (FOLDED, COMMON), (Y, COMMON), frozenset((Y, COMMON))),
)


class Device(Arrays):
    """Has room for ``most`` rows."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        self.ran: list[int] = []

    def run(self, program: Step, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        count = len(inputs[0]) if program is STEPS[0] else inputs[0].shape[1] // 2
        self.ran.append(count)
        if count > self.most:
            raise DeviceOutOfMemory(f"{count} of {self.most}", rows=count)
        if program is STEPS[0]:
            return [inputs[0].reshape(1, -1), np.arange(2)]
        return [inputs[0].reshape(-1, 2) + inputs[1], inputs[1]]


def through(device: Device, wavefront: Wavefront[object]) -> dict[object, list[Any]]:
    unused: Any = None
    shortage, answers = Shortage(device, unused, unused, unused, unused), {}  # type: ignore[arg-type]
    while (group := wavefront.choose()) is not None:
        for done, results in wavefront.advance(group, shortage.run(group, group.step, [], Splits())):
            answers[done.call] = results
    return answers


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_parts_are_put_together_whatever_axis_rows_lie_along(most: int) -> None:
    device = Device(most)
    wavefront = front(device)
    calls = {number: rows(*range(10 * number, 10 * number + number)) for number in range(1, 4)}
    for number, x in calls.items():
        wavefront.add([Ticket(number, STEPS, (Y, COMMON), {X: x}, len(x), LAYOUTS)])
    answers = through(device, wavefront)
    for number, x in calls.items():
        assert answers[number][0].tolist() == (x + np.arange(2)).tolist()
        assert answers[number][1].tolist() == [0, 1]
    # Six rows, in halves until they have room.
    expected = {1: [6, 3, 1, 2, 1, 1, 3, 1, 2, 1, 1], 2: [6, 3, 1, 2, 3, 1, 2], 3: [6, 3, 3], 8: [6]}
    assert device.ran == 2 * expected[most]


@pytest.mark.parametrize("layouts", [LAYOUTS, None])
def test_what_cannot_be_divided_is_told_without_a_trace_of_what_was_computed(layouts: Layouts | None) -> None:
    device = Device(0)
    x = rows(1) if layouts is not None else rows(1, 2)
    wavefront = front(device)
    wavefront.add([Ticket("call", STEPS, (Y,), {X: x}, len(x), layouts)])
    group = wavefront.choose()
    assert group is not None
    unused: Any = None
    shortage = Shortage(device, unused, unused, unused, unused)  # type: ignore[arg-type]
    splits = Splits()
    with pytest.raises(DeviceOutOfMemory) as caught:
        shortage.run(group, group.step, [], splits)
    assert (caught.value.__cause__, caught.value.__context__) == (None, None)
    assert caught.value.details == {"rows": len(x)}
    assert splits.count == 0


@pytest.mark.parametrize(("asked_bytes", "evicts"), [(101, False), (100, True), (None, True)])
def test_for_what_takes_more_than_there_is_nothing_leaves(asked_bytes: int | None, evicts: bool) -> None:
    device = Device(0)
    device.memory = lambda: {"total_bytes": 100}  # type: ignore[attr-defined]
    wavefront = front(device)
    wavefront.add([Ticket("call", STEPS, (Y,), {X: rows(1)}, 1, LAYOUTS)])
    group = wavefront.choose()
    assert group is not None
    residency = Residency(32)
    residency.add_plan("idle", {"weight": 8})
    assert residency.lease("idle") is not None
    residency.release("idle")
    unused: Any = MagicMock()
    device.trim = unused  # type: ignore[attr-defined]
    device.name = "small"  # type: ignore[attr-defined]
    shortage = Shortage(device, residency, unused, unused, unused)  # type: ignore[arg-type]
    details: dict[str, Any] = {} if asked_bytes is None else {"asked_bytes": asked_bytes}
    assert shortage.relieve(group, DeviceOutOfMemory("no room", **details)) is evicts
    assert residency.committed_bytes == (0 if evicts else 8)
