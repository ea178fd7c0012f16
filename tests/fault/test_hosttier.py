"""Processes that are killed between any two instructions of what keeps weights in memory: a weight is whole or not there."""

from __future__ import annotations

import dis
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from trunkline.arena import page_aligned

from sidecar import extents, glued, hosttier, ledger, segment
from sidecar.hosttier import HostTier
from sidecar.segment import SHARED_MEMORY, Segment, segment_name
from tests.fault.matrix import Row
from tests.segments import PAGE, Make, content, key, names, put, segments

pytestmark = pytest.mark.usefixtures("nothing_leaks")

BUDGET = 64 * PAGE
# Instructions that can change something outside of the process; all points between two of them are one.
EFFECTS = {dis.opmap[name] for name in ("CALL", "CALL_FUNCTION_EX", "STORE_SUBSCR")}
TRACED = {module.__file__ for module in (extents, glued, hosttier, ledger, segment)}


def survives(step: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a child that is killed before its ``step``-th instruction of ``EFFECTS`` in the modules of this test.

    Return whether it came to its end, because it has fewer of them.
    """
    pid = os.fork()
    if not pid:
        status = 1
        try:
            # Before any trace is set: Python 3.12 asks then whether anyone wants to see instructions.
            sys._getframe().f_trace_opcodes = True
            sys.settrace(_killer(step))
            work()
            sys.settrace(None)
            status = 0
        except Exception:  # noqa: BLE001 - the child must not go on as a test
            traceback.print_exc()
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"the child ended with {code}"
    return code == 0


def _killer(step: int) -> Callable[[FrameType, str, Any], Any]:
    count = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal count
        if frame.f_code.co_filename not in TRACED:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and frame.f_code.co_code[frame.f_lasti] in EFFECTS:
            count += 1
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


# What an engine does, and which weights are there after it: sizes by number. Before it come 0, 1 and 2.
SIZES = {0: 3 * PAGE, 1: 2 * PAGE + 5, 2: PAGE, 3: PAGE + 1, 4: 4 * PAGE, 5: PAGE, 6: 5 * PAGE - 3}


def free(number: int) -> Callable[[HostTier], None]:
    return lambda tier: tier.free(key(number))


def load(number: int) -> Callable[[HostTier], None]:
    return lambda tier: put(tier, number, SIZES[number])


def load_and_give_up(tier: HostTier) -> None:
    tier.allocate(key(5), SIZES[5])[:] = b"x" * SIZES[5]
    tier.free(key(5))


def find_altered(tier: HostTier) -> None:
    tier.view(key(2))[17] ^= 1
    assert not tier.check(key(2))


def load_in_pieces(tier: HostTier) -> None:
    put(tier, 6, SIZES[6])
    assert len(tier._held[key(6)].extents) == 2


STEPS: list[tuple[Callable[[HostTier], None], set[int]]] = [
    (lambda tier: None, {0, 1, 2}),
    (load(3), {0, 1, 2, 3}),
    (free(1), {0, 2, 3}),
    (load(4), {0, 2, 3, 4}),
    (load_and_give_up, {0, 2, 3, 4}),
    (find_altered, {0, 3, 4}),
    (load(1), {0, 1, 3, 4}),
    (free(3), {0, 1, 4}),
    (free(0), {1, 4}),
    # What is free lies apart now.
    (load_in_pieces, {1, 4, 6}),
    (free(6), {1, 4}),
]


@pytest.fixture
def make(nothing_leaks: None, tmp_path: Path) -> Iterator[Make]:
    with segments(tmp_path) as made:
        yield made


def left_by_an_engine(segment: Segment) -> None:
    """Put three weights into a segment, and one that is not whole, as an engine leaves it that is killed."""
    tier = HostTier(segment.descriptor)
    for number in (0, 1, 2):
        put(tier, number, SIZES[number])
    tier.allocate(key(9), 5 * PAGE)[:] = b"x" * 5 * PAGE
    tier.close()


@pytest.mark.row("F22")
def test_an_engine_killed_anywhere_leaves_whole_weights_and_nothing_else(row: Row, make: Make) -> None:
    made = make(BUDGET)
    # How many steps were begun, in memory that the child shares.
    begun = mmap.mmap(-1, PAGE)

    def engine() -> None:
        begun[0] = 0
        tier = HostTier(made.descriptor)
        for number, (step, _) in enumerate(STEPS):
            begun[0] = number
            step(tier)

    seen: set[frozenset[int]] = set()
    instruction = 0
    done = False
    while not done:
        instruction += 1
        row.attempts += 1
        left_by_an_engine(made)
        done = survives(instruction, engine)

        tier = HostTier(made.descriptor)
        tier.check_invariants()
        altered = {number for number in SIZES if key(number) in tier.keys() and not tier.check(key(number))}  # noqa: SIM118
        # Only what the test itself altered may be found so.
        assert altered <= {2}
        there = {int(name, 16) for name in tier.keys()}  # noqa: SIM118
        before = STEPS[max(0, begun[0] - 1)][1]
        after = STEPS[begun[0]][1]
        assert there | altered in (before, after), f"killed before instruction {instruction}, in step {begun[0]}"
        assert tier.keys() == {key(number): SIZES[number] for number in there}
        for number in there:
            assert tier.view(key(number)) == content(number, SIZES[number])
        # What was found altered was let go of.
        tier.trim()
        pages_bytes = sum(page_aligned(SIZES[number]) for number in there)
        assert tier.resident_bytes == pages_bytes
        seen.add(frozenset(there))

        for name in tier.keys():  # noqa: SIM118
            tier.free(name)
        tier.trim()
        assert tier.resident_bytes == 0
        tier.close()
    begun.close()
    assert {frozenset(keys) for _, keys in STEPS} <= seen
    assert instruction > 100


@pytest.mark.parametrize("kept", [False, True], ids=["made", "adopted"])
def test_a_supervisor_killed_anywhere_leaves_what_the_next_one_can_use(make: Make, tmp_path: Path, kept: bool) -> None:
    def supervisor() -> None:
        Segment.create_or_adopt(tmp_path, BUDGET)

    before = names()
    path = SHARED_MEMORY / segment_name(tmp_path.resolve())[1:]
    instruction = 0
    done = False
    while not done:
        instruction += 1
        if kept:
            made = make(BUDGET)
            left_by_an_engine(made)
            made.close()
        done = survives(instruction, supervisor)

        made = make(BUDGET)
        assert names() == before | {path.name}
        assert made.name == f"/{path.name}"
        tier = HostTier(made.descriptor)
        tier.check_invariants()
        assert tier.keys() == ({key(number): SIZES[number] for number in (0, 1, 2)} if kept else {})
        tier.close()
        made.unlink()
        made.close()
    assert instruction > 20
