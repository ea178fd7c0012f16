"""Where weights lie on a device: every one keeps its bytes wherever it is moved to, and what fits finds room."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from trunkline.errors import DeviceFault

from sidecar.devicetier import ALIGN_BYTES, DeviceTier, aligned
from sidecar.errors import NoRoom
from sidecar.ir import Weight

UNITS = 16


class Bytes:
    """A span that is a bytearray; handles are copies of what is there when they are made."""

    def __init__(self, size_bytes: int = UNITS * ALIGN_BYTES) -> None:
        self.room = bytearray(size_bytes)
        self.fails = False

    @property
    def size_bytes(self) -> int:
        return len(self.room)

    def write(self, offset: int, content: memoryview) -> None:
        self.room[offset : offset + len(content)] = content

    def mark(self) -> None:
        pass

    def handle(self, offset: int, weight: Weight, mark: object) -> tuple[int, bytes]:
        return offset, bytes(self.room[offset : offset + weight.size_bytes])

    def let_go(self) -> None:
        pass

    def move(self, source: int, target: int, size_bytes: int) -> None:
        if self.fails:
            raise DeviceFault("the device is gone")
        self.room[target : target + size_bytes] = self.room[source : source + size_bytes]


def content_of(name: str, size_bytes: int) -> bytes:
    return random.Random(name).randbytes(size_bytes)


def weight(name: str, units: int = 1, less: int = 0) -> Weight:
    """Return a weight that takes ``units`` of a span, and has ``less`` bytes than those."""
    size_bytes = units * ALIGN_BYTES - less
    return Weight(hashlib.sha256(name.encode()).hexdigest(), "uint8", (size_bytes,), size_bytes, 0)


def bring(tier: DeviceTier, each: Weight) -> object:
    assert tier.allocate(each)
    tier._span.write(tier.offset(each.digest), memoryview(content_of(each.digest, each.size_bytes)))
    tier.seal(each.digest, None)
    return tier.handle(each.digest)


@pytest.mark.parametrize(("size_bytes", "taken"), [(0, 256), (1, 256), (256, 256), (257, 512)])
def test_weights_take_whole_ranges(size_bytes: int, taken: int) -> None:
    assert aligned(size_bytes) == taken


def test_more_than_the_budget_is_refused_with_the_numbers() -> None:
    # A span of odd size is used as far as its last whole range.
    tier = DeviceTier(Bytes(3 * ALIGN_BYTES + 7))
    assert tier.budget_bytes == 3 * ALIGN_BYTES
    bring(tier, weight("a", 2))
    with pytest.raises(NoRoom, match="takes 512 bytes of the device: 512 of the budget of 768 bytes are taken") as caught:
        tier.allocate(weight("b", 2))
    assert caught.value.details == {"needed_bytes": 512, "allocated_bytes": 512, "budget_bytes": 768}
    bring(tier, weight("b", 1))
    assert tier.allocated_bytes == 768


def test_what_was_let_go_of_is_had_back_until_something_is_written_there() -> None:
    tier = DeviceTier(Bytes())
    a, b = weight("a", 2), weight("b", 1)
    handle = bring(tier, a)
    tier.free(a.digest)
    assert not tier.holds(a.digest)
    assert tier.handle(a.digest) is None
    assert tier.take_back(a.digest)
    assert tier.handle(a.digest) is handle
    assert not tier.take_back(a.digest)
    tier.free(a.digest)
    bring(tier, b)
    assert not tier.take_back(a.digest)
    tier.check_invariants()


def test_what_never_was_there_cannot_be_had_back() -> None:
    tier = DeviceTier(Bytes())
    assert tier.allocate(weight("a"))
    assert tier.handle(weight("a").digest) is None
    tier.free(weight("a").digest)
    assert not tier.take_back(weight("a").digest)


def scattered() -> tuple[DeviceTier, Bytes]:
    """Return a tier in which every second unit is taken."""
    span = Bytes()
    tier = DeviceTier(span)
    for number in range(UNITS):
        bring(tier, weight(str(number), 1, less=3))
    for number in range(0, UNITS, 2):
        tier.free(weight(str(number)).digest)
    return tier, span


def test_what_is_free_in_pieces_is_made_one() -> None:
    tier, _ = scattered()
    large = weight("large", UNITS // 2)
    assert not tier.allocate(large)
    moved = tier.compact(large.size_bytes)
    # All but the last, behind which nothing is free.
    assert len(moved) == UNITS // 2 - 1
    assert tier.compactions == 1
    assert tier.compacted_bytes == len(moved) * ALIGN_BYTES
    for digest, handle in moved.items():
        assert handle == (tier.offset(digest), content_of(digest, ALIGN_BYTES - 3))
    # Nothing of what was let go of is believed any more.
    assert not tier.take_back(weight("0").digest)
    bring(tier, large)
    tier.check_invariants()


def test_what_is_not_there_yet_is_moved_without_its_bytes() -> None:
    span = Bytes()
    tier = DeviceTier(span)
    for name in "abc":
        assert tier.allocate(weight(name, 5))
    tier.free(weight("a", 5).digest)
    span.fails = True
    assert tier.compact(6 * ALIGN_BYTES) == {}
    assert tier.compacted_bytes == 0
    assert tier.allocate(weight("d", 6))
    tier.check_invariants()


def test_what_could_not_be_moved_is_lost_and_nothing_else() -> None:
    tier, span = scattered()
    span.fails = True
    moved = tier.compact(3 * ALIGN_BYTES)
    assert moved
    assert all(isinstance(error, DeviceFault) for error in moved.values())
    assert not any(tier.holds(digest) for digest in moved)
    assert tier.allocated_bytes == (UNITS // 2 - len(moved)) * ALIGN_BYTES
    tier.check_invariants()


class Random(RuleBasedStateMachine):
    """Weights come and go; those that are there have their bytes, and what fits into the budget finds room."""

    def __init__(self) -> None:
        super().__init__()
        self.span = Bytes()
        self.tier = DeviceTier(self.span)
        self.weights = {f"{number}": weight(str(number), 1 + number % 5, less=number) for number in range(12)}
        self.there: set[str] = set()

    @rule(name=st.sampled_from([str(number) for number in range(12)]))
    def bring(self, name: str) -> None:
        each = self.weights[name]
        if name in self.there:
            self.tier.free(each.digest)
            self.there.discard(name)
            return
        if not self.tier.take_back(each.digest):
            if self.tier.allocated_bytes + aligned(each.size_bytes) > self.tier.budget_bytes:
                return
            if not self.tier.allocate(each):
                self.tier.compact(aligned(each.size_bytes))
                assert self.tier.allocate(each), "there is room, in one piece"
            offset = self.tier.offset(each.digest)
            self.span.write(offset, memoryview(content_of(each.digest, each.size_bytes)))
            self.tier.seal(each.digest, None)
        self.there.add(name)

    @invariant()
    def all_are_there(self) -> None:
        self.tier.check_invariants()
        for name in self.there:
            each = self.weights[name]
            offset = self.tier.offset(each.digest)
            assert self.span.room[offset : offset + each.size_bytes] == content_of(each.digest, each.size_bytes)


TestRandom = Random.TestCase
TestRandom.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)


def test_books_that_do_not_balance_are_told() -> None:
    tier, _ = scattered()
    tier.allocated_bytes += 1
    with pytest.raises(AssertionError, match="allocated_bytes disagrees"):
        tier.check_invariants()
