"""Weights in memory that outlives the engine: whole or not there, under the budget, and gone from memory when they are let go."""

from __future__ import annotations

import errno
import os
import random
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from trunkline.arena import page_aligned

from sidecar import hosttier as module
from sidecar.errors import NoRoom
from sidecar.extents import Extents
from sidecar.hosttier import HostTier
from sidecar.segment import LEDGER_END, LEDGER_OFFSET, RECORD, RECORD_LIMIT, Segment, segment_bytes
from tests.segments import PAGE, Make, content, key, put, segments

BUDGET = 64 * PAGE


@pytest.fixture
def make(nothing_leaks: None, tmp_path: Path) -> Iterator[Make]:
    with segments(tmp_path) as made:
        yield made


@pytest.fixture
def segment(make: Make) -> Segment:
    return make(BUDGET)


@pytest.fixture
def tier(segment: Segment) -> Iterator[HostTier]:
    opened = HostTier(segment.descriptor)
    yield opened
    opened.check_invariants()
    opened.close()


def restarted(tier: HostTier) -> None:
    """Do to ``tier`` what the death of its engine and the start of the next would do."""
    descriptor = tier._descriptor
    tier.close()
    tier.__init__(descriptor)  # type: ignore[misc]
    tier.check_invariants()


@pytest.mark.parametrize("size_bytes", [0, 1, PAGE - 1, PAGE, PAGE + 1, 9 * PAGE])
def test_sealed_bytes_are_there_for_the_next_engine(tier: HostTier, size_bytes: int) -> None:
    put(tier, 1, size_bytes)
    restarted(tier)
    assert tier.keys() == {key(1): size_bytes}
    assert tier.view(key(1)) == content(1, size_bytes)
    assert tier.check(key(1))
    assert tier.allocated_bytes == tier.resident_bytes == page_aligned(size_bytes)


def test_bytes_that_were_not_sealed_are_gone_with_their_pages(tier: HostTier) -> None:
    put(tier, 1, PAGE)
    tier.allocate(key(2), 3 * PAGE)[:] = b"x" * 3 * PAGE
    assert tier.keys() == {key(1): PAGE}
    assert tier.resident_bytes == 4 * PAGE
    restarted(tier)
    assert tier.keys() == {key(1): PAGE}
    assert tier.resident_bytes == PAGE
    # No byte of another weight is ever seen.
    assert tier.allocate(key(2), 3 * PAGE) == bytes(3 * PAGE)


def test_a_view_is_the_memory_itself_and_has_the_asked_size(tier: HostTier) -> None:
    room = tier.allocate(key(1), 10)
    assert len(room) == 10
    assert not room.readonly
    tier.view(key(1))[3] = 7
    assert room[3] == 7
    room.release()


def test_freed_pages_serve_the_next_and_then_go_back_to_the_system(tier: HostTier) -> None:
    for number in range(3):
        put(tier, number, 10 * PAGE)
    tier.free(key(1))
    assert (tier.allocated_bytes, tier.spare_bytes, tier.resident_bytes) == (20 * PAGE, 10 * PAGE, 30 * PAGE)
    tier.check_invariants()
    put(tier, 4, 4 * PAGE)
    # No page is new.
    assert (tier.spare_bytes, tier.resident_bytes) == (6 * PAGE, 30 * PAGE)
    tier.free(key(4))
    tier.trim()
    assert tier.resident_bytes == tier.allocated_bytes == 20 * PAGE
    restarted(tier)
    assert sorted(tier.keys()) == [key(0), key(2)]
    # The hole and the place in the ledger are used again.
    put(tier, 3, 10 * PAGE)
    put(tier, 4, PAGE)
    tier.check_invariants()
    assert all(tier.check(name) for name in tier.keys())  # noqa: SIM118 - not a dict


def test_the_budget_is_enforced_before_anything_is_allocated(tier: HostTier) -> None:
    put(tier, 1, 60 * PAGE)
    with pytest.raises(NoRoom, match=f"{60 * PAGE} of the budget of {BUDGET} bytes are taken") as caught:
        tier.allocate(key(2), 4 * PAGE + 1)
    assert caught.value.details == {"needed_bytes": 5 * PAGE, "allocated_bytes": 60 * PAGE, "budget_bytes": BUDGET}
    assert tier.resident_bytes == 60 * PAGE
    put(tier, 2, 4 * PAGE)


def test_a_full_ledger_refuses(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RECORD_LIMIT", module._MOST_PIECES + 1)
    put(tier, 1, 1)
    put(tier, 2, 1)
    with pytest.raises(NoRoom, match="2 of 65 records are taken, and it may need 64"):
        tier.allocate(key(3), 1)
    tier.free(key(1))
    put(tier, 3, 1)


def test_without_a_record_nothing_is_taken_back(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        put(tier, number, 1)
    tier.free(key(1))
    monkeypatch.setattr(module, "RECORD_LIMIT", 1)
    assert not tier.take_back(key(1))


def test_a_segment_without_a_hole_that_is_large_enough_refuses(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Extents, "take", lambda self, size_bytes: None)
    with pytest.raises(NoRoom, match=f"the largest hole between others has {segment_bytes(BUDGET) - LEDGER_END}"):
        tier.allocate(key(1), 1)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.ENOMEM, errno.EDQUOT])
def test_full_shared_memory_is_an_error_and_no_signal(tier: HostTier, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    original = os.posix_fallocate

    def half(descriptor: int, offset: int, size_bytes: int) -> None:
        original(descriptor, offset, size_bytes // 2)
        raise OSError(number, os.strerror(number))

    put(tier, 1, PAGE)
    monkeypatch.setattr(os, "posix_fallocate", half)
    with pytest.raises(NoRoom, match=rf"no {8 * PAGE} bytes .* for weight {key(2)[:12]} .*enlarge /dev/shm") as caught:
        tier.allocate(key(2), 8 * PAGE)
    assert caught.value.details == {"needed_bytes": 8 * PAGE}
    assert tier.resident_bytes == tier.allocated_bytes == PAGE
    tier.check_invariants()
    monkeypatch.undo()
    put(tier, 2, 8 * PAGE)


def test_spare_pages_go_where_the_system_has_no_others(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    original = os.posix_fallocate
    put(tier, 1, 4 * PAGE)
    put(tier, 2, PAGE)
    tier.free(key(1))

    def is_full(descriptor: int, offset: int, size_bytes: int) -> None:
        if tier.resident_bytes + size_bytes > 7 * PAGE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor, offset, size_bytes)

    monkeypatch.setattr(os, "posix_fallocate", is_full)
    put(tier, 3, 6 * PAGE)
    assert tier.resident_bytes == tier.allocated_bytes == 7 * PAGE
    assert not tier.take_back(key(1))
    tier.free(key(3))
    with pytest.raises(NoRoom, match="shared memory left"):
        tier.allocate(key(4), 7 * PAGE)
    assert tier.resident_bytes == tier.allocated_bytes == PAGE


def test_another_refusal_of_the_system_is_not_taken_for_want_of_room(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, offset: int, size_bytes: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(OSError, match="Input/output") as caught:
        tier.allocate(key(1), 1)
    assert caught.value.errno == errno.EIO
    assert tier.allocated_bytes == tier.resident_bytes == 0


def test_altered_bytes_are_found_and_dropped(tier: HostTier, caplog: pytest.LogCaptureFixture) -> None:
    put(tier, 1, 5 * PAGE)
    put(tier, 2, PAGE)
    restarted(tier)
    tier.view(key(1))[4 * PAGE] ^= 1
    assert not tier.check(key(1))
    assert f"weight {key(1)} was altered in memory" in caplog.text
    assert tier.keys() == {key(2): PAGE}
    tier.trim()
    assert tier.resident_bytes == PAGE
    put(tier, 1, 5 * PAGE)
    assert tier.check(key(1))


def test_misuse_is_refused(tier: HostTier) -> None:
    put(tier, 1, 1)
    tier.allocate(key(2), 1)
    with pytest.raises(AssertionError, match="allocated once"):
        tier.allocate(key(1), 1)
    with pytest.raises(AssertionError, match="sealed once"):
        tier.seal(key(1), 0)
    with pytest.raises(AssertionError, match="only sealed bytes"):
        tier.check(key(2))
    for bad in ("AB" * 32, "ab" * 31, "ab" * 33):
        with pytest.raises(AssertionError, match="a key"):
            tier.allocate(bad, 1)
    for forget in (tier.free, tier.view, tier.check):
        with pytest.raises(KeyError):
            forget(key(9))


def test_what_is_no_segment_is_not_mapped() -> None:
    descriptor = os.memfd_create("other")
    try:
        os.ftruncate(descriptor, PAGE)
        with pytest.raises(AssertionError, match="no segment"):
            HostTier(descriptor)
    finally:
        os.close(descriptor)


def test_a_segment_is_not_unmapped_under_a_view(segment: Segment) -> None:
    tier = HostTier(segment.descriptor)
    room = tier.allocate(key(1), 1)
    with pytest.raises(BufferError):
        tier.close()
    room.release()


# --- a ledger that makes no sense -----------------------------------------------------------------------------------------


def record(number: int, offset: int, size_bytes: int = PAGE, piece: int = 0, piece_count: int = 1) -> bytes:
    body = RECORD.pack(bytes.fromhex(key(number)), offset, size_bytes, 0, piece, piece_count, 0)[:-4]
    return body + zlib.crc32(body).to_bytes(4, "little")


def test_the_records_of_these_tests_are_those_of_the_ledger(segment: Segment) -> None:
    os.pwrite(segment.descriptor, record(5, LEDGER_END), LEDGER_OFFSET + 9 * RECORD.size)
    os.posix_fallocate(segment.descriptor, LEDGER_END, PAGE)
    tier = HostTier(segment.descriptor)
    assert tier.keys() == {key(5): PAGE}
    tier.check_invariants()
    tier.close()


def test_weights_whose_pages_somebody_took_are_dropped(
    tier: HostTier, segment: Segment, caplog: pytest.LogCaptureFixture
) -> None:
    put(tier, 1, 2 * PAGE)
    put(tier, 2, PAGE)
    os.truncate(segment.descriptor, LEDGER_END + PAGE)
    os.truncate(segment.descriptor, segment_bytes(BUDGET))
    restarted(tier)
    assert f"of {3 * PAGE} bytes of weights kept in memory {2 * PAGE} are missing" in caplog.text
    assert tier.keys() == {}
    assert tier.resident_bytes == 0


@pytest.mark.parametrize(
    "wrong",
    [
        record(5, LEDGER_END + PAGE + 1),
        record(5, LEDGER_END - PAGE),
        record(5, 0),
        record(5, LEDGER_END + PAGE, 2 * PAGE),
        record(5, LEDGER_END),
        record(5, segment_bytes(BUDGET)),
        record(5, segment_bytes(BUDGET) - PAGE, 2 * PAGE),
        record(5, LEDGER_END + 8 * PAGE, BUDGET),
        record(5, LEDGER_END + 8 * PAGE, 2**64 - 1),
        record(5, 2**64 - PAGE),
        record(1, LEDGER_END + 8 * PAGE),
        record(5, LEDGER_END + 8 * PAGE)[:-1] + b"\xff",
        record(5, LEDGER_END + 8 * PAGE, piece=1),
        record(5, LEDGER_END + 8 * PAGE, PAGE + 1, piece_count=2),
        record(1, LEDGER_END + 8 * PAGE, piece=1, piece_count=2),
        b"\xff" * RECORD.size,
    ],
    ids=[
        *("unaligned", "ledger", "header", "overlapping its end", "overlapping", "outside", "across the end", "over budget"),
        *("immense", "far away", "duplicate", "wrong seal", "no such piece", "broken piece", "piece of another", "noise"),
    ],
)
@pytest.mark.parametrize("slot", [2, RECORD_LIMIT - 1])
def test_records_that_make_no_sense_are_dropped(
    tier: HostTier, segment: Segment, caplog: pytest.LogCaptureFixture, wrong: bytes, slot: int
) -> None:
    put(tier, 1, 2 * PAGE)
    put(tier, 2, PAGE)
    os.pwrite(segment.descriptor, wrong, LEDGER_OFFSET + slot * RECORD.size)
    os.pwrite(segment.descriptor, b"x", LEDGER_END + 8 * PAGE)
    restarted(tier)
    assert "1 records of the weights kept in memory make no sense" in caplog.text
    assert tier.keys() == {key(1): 2 * PAGE, key(2): PAGE}
    assert tier.check(key(1))
    assert tier.check(key(2))
    assert tier.resident_bytes == 3 * PAGE
    caplog.clear()
    restarted(tier)
    assert "make no sense" not in caplog.text


@pytest.mark.parametrize("pieces", [[0], [1], [0, 2], [1, 2]])
def test_a_weight_of_which_a_piece_is_missing_is_not_there(tier: HostTier, segment: Segment, pieces: list[int]) -> None:
    put(tier, 1, PAGE)
    os.posix_fallocate(segment.descriptor, LEDGER_END, 32 * PAGE)
    for piece in pieces:
        wrong = record(5, LEDGER_END + (8 + 2 * piece) * PAGE, PAGE, piece, 3)
        os.pwrite(segment.descriptor, wrong, LEDGER_OFFSET + (7 + piece) * RECORD.size)
    restarted(tier)
    assert tier.keys() == {key(1): PAGE}
    assert tier.resident_bytes == PAGE
    # Their slots and pages serve others.
    put(tier, 2, 60 * PAGE)


# --- at random ------------------------------------------------------------------------------------------------------------


class Random(RuleBasedStateMachine):
    """Compared with a dict, through restarts."""

    def __init__(self) -> None:
        super().__init__()
        self.run_dir = Path(f"/nowhere/{os.getpid()}")
        self.kept = segments(self.run_dir)
        self.segment = self.kept.__enter__()(16 * PAGE)
        self.tier = HostTier(self.segment.descriptor)
        self.sealed: dict[str, int] = {}
        self.unsealed: dict[str, int] = {}

    def teardown(self) -> None:
        self.tier.close()
        self.kept.__exit__(None, None, None)

    @rule(number=st.integers(0, 9), size_bytes=st.integers(0, 7 * PAGE))
    def allocate(self, number: int, size_bytes: int) -> None:
        name = key(number)
        if name in self.sealed or name in self.unsealed:
            return
        held_bytes = sum(map(page_aligned, [*self.sealed.values(), *self.unsealed.values()]))
        try:
            self.tier.allocate(name, size_bytes)[:] = content(number, size_bytes)
        except NoRoom:
            assert held_bytes + page_aligned(size_bytes) > 16 * PAGE
        else:
            assert held_bytes + page_aligned(size_bytes) <= 16 * PAGE
            self.unsealed[name] = size_bytes

    @precondition(lambda self: self.unsealed)
    @rule(data=st.data())
    def seal(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.unsealed)))
        self.tier.seal(name, zlib.crc32(content(int(name, 16), self.unsealed[name])))
        self.sealed[name] = self.unsealed.pop(name)

    @precondition(lambda self: self.sealed or self.unsealed)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.sealed | self.unsealed)))
        self.tier.free(name)
        self.sealed.pop(name, None)
        self.unsealed.pop(name, None)

    @rule(number=st.integers(0, 9))
    def take_back(self, number: int) -> None:
        name = key(number)
        if name not in self.sealed and name not in self.unsealed and self.tier.take_back(name):
            assert self.tier.check(name)
            self.sealed[name] = self.tier.keys()[name]

    @rule()
    def trim(self) -> None:
        self.tier.trim()
        assert self.tier.spare_bytes == 0

    @rule()
    def restart(self) -> None:
        restarted(self.tier)
        self.unsealed.clear()
        for name in self.sealed:
            assert self.tier.check(name)

    @invariant()
    def the_books_balance(self) -> None:
        self.tier.check_invariants()
        assert self.tier.keys() == self.sealed
        for name, size_bytes in (self.sealed | self.unsealed).items():
            assert self.tier.view(name) == content(int(name, 16), size_bytes)


Random.TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestRandom = Random.TestCase


def test_pages_that_are_kept_give_way_within_the_budget(tier: HostTier) -> None:
    whole = tier.budget_bytes // PAGE
    put(tier, 1, (whole - 4) * PAGE)
    put(tier, 2, 4 * PAGE)
    tier.free(key(2))
    put(tier, 3, 2 * PAGE)
    # Of the two that are left, none is large enough; they go back before four new ones would be too many.
    tier.free(key(1))
    put(tier, 4, (whole - 2) * PAGE)
    assert tier.resident_bytes <= tier.budget_bytes
    tier.check_invariants()
    with pytest.raises(NoRoom):
        tier.allocate(key(5), PAGE)


def test_what_was_let_go_of_is_had_back_until_something_is_written_there(tier: HostTier) -> None:
    put(tier, 1, 4 * PAGE)
    put(tier, 2, 4 * PAGE)
    for number in (1, 2):
        tier.free(key(number))
    assert tier.take_back(key(2))
    assert tier.check(key(2))
    assert (tier.allocated_bytes, tier.spare_bytes) == (4 * PAGE, 4 * PAGE)
    tier.check_invariants()
    # One page of the other.
    put(tier, 3, PAGE)
    assert not tier.take_back(key(1))
    assert not tier.take_back(key(9))
    restarted(tier)
    assert sorted(tier.keys()) == [key(2), key(3)]


def test_neither_trimmed_nor_unsealed_nor_altered_bytes_are_had_back(tier: HostTier) -> None:
    put(tier, 1, 4 * PAGE)
    tier.free(key(1))
    tier.trim()
    assert not tier.take_back(key(1))
    tier.allocate(key(2), PAGE)
    tier.free(key(2))
    assert not tier.take_back(key(2))
    put(tier, 3, PAGE)
    tier.view(key(3))[0] ^= 1
    assert not tier.check(key(3))
    assert not tier.take_back(key(3))
    # What is allocated anew is nobody's remains.
    put(tier, 4, PAGE)
    tier.free(key(4))
    tier.allocate(key(4), PAGE)
    tier.free(key(4))
    assert not tier.take_back(key(4))


def scattered(tier: HostTier) -> int:
    """Fill a tier with single pages and free every other one; return how many pages are free."""
    whole = BUDGET // PAGE
    for number in range(whole):
        put(tier, 100 + number, PAGE)
    for number in range(0, whole, 2):
        tier.free(key(100 + number))
    return whole // 2


@pytest.mark.parametrize("missing_bytes", [0, 5, PAGE, PAGE + 5])
def test_free_pages_that_lie_apart_serve_a_large_weight(tier: HostTier, missing_bytes: int) -> None:
    free = scattered(tier)
    put(tier, 1, free * PAGE - missing_bytes)
    tier.check_invariants()
    # No page is new, and none was given back for one.
    assert tier.resident_bytes == BUDGET
    assert tier.spare_bytes == missing_bytes // PAGE * PAGE
    assert len(tier.pages(key(1))) == (free - missing_bytes // PAGE) * PAGE
    restarted(tier)
    assert tier.view(key(1)) == content(1, free * PAGE - missing_bytes)
    assert tier.check(key(1))
    assert len(tier.keys()) == free + 1
    # What it does not take went back to the system.
    assert tier.resident_bytes == tier.allocated_bytes == BUDGET - missing_bytes // PAGE * PAGE
    tier.free(key(1))
    assert not tier.take_back(key(1))
    assert all(tier.check(name) for name in tier.keys())  # noqa: SIM118 - not a dict
    put(tier, 2, PAGE)


def test_more_pieces_than_one_weight_may_have_are_not_put_together(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST_PIECES", 4)
    scattered(tier)
    put(tier, 1, 4 * PAGE)
    assert tier.resident_bytes == BUDGET
    assert len(tier._held[key(1)].extents) == 4
    put(tier, 2, 5 * PAGE)
    assert len(tier._held[key(2)].extents) == 1
    assert tier.resident_bytes <= BUDGET


def test_pieces_leave_mappings_and_records_to_others(tier: HostTier, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "most_mappings", lambda: 1 << 30)
    restarted(tier)
    assert tier._most_glued == RECORD_LIMIT // 4
    monkeypatch.setattr(module, "most_mappings", lambda: 4 * 9)
    restarted(tier)
    scattered(tier)
    for number, pages in ((1, 6), (2, 4), (3, 3), (4, 2)):
        put(tier, number, pages * PAGE)
    # Of the fourth, two pieces would be one too many after six and three; the second would have been.
    assert [len(tier._held[key(number)].extents) for number in (1, 2, 3, 4)] == [6, 1, 3, 1]
    assert tier.resident_bytes <= BUDGET
    restarted(tier)
    tier.free(key(1))
    put(tier, 5, 6 * PAGE)
    assert len(tier._held[key(5)].extents) > 1
    # An engine that may have fewer takes over what there is.
    monkeypatch.setattr(module, "most_mappings", lambda: 4)
    restarted(tier)
    assert key(5) in tier.keys()  # noqa: SIM118 - not a dict
    tier.free(key(3))
    put(tier, 6, 3 * PAGE)
    assert len(tier._held[key(6)].extents) == 1


def test_pieces_that_the_system_will_not_map_as_one_are_left_apart(
    tier: HostTier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    scattered(tier)
    put(tier, 1, 8 * PAGE)

    def refuse(descriptor: int, pieces: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(module, "glue", refuse)
    put(tier, 2, 8 * PAGE)
    assert "8 pieces of memory cannot be used as one (Cannot allocate memory); new pages are" in caplog.text
    tier.check_invariants()
    restarted(tier)
    # It is read again: nothing of it is left, and nobody is told of pages that cannot be used.
    assert key(1) not in tier.keys()  # noqa: SIM118 - not a dict
    assert tier.check(key(2))


def test_scattered_weights_leave_room_for_large_ones(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes and their order: what fits into the budget finds a hole."""
    # Else it has far more addresses than for its budget.
    monkeypatch.setattr("sidecar.segment._ROUNDING_BYTES", PAGE)
    tier = HostTier(make(BUDGET).descriptor)
    chosen = random.Random(0)
    held: dict[int, int] = {}
    for number in range(4000):
        pages = chosen.choice((1, 1, 2, 3, 5, 9, 17, 30))
        while sum(held.values()) + pages > BUDGET // PAGE:
            gone = chosen.choice(list(held))
            del held[gone]
            tier.free(key(gone))
        tier.allocate(key(number), pages * PAGE)
        held[number] = pages
    tier.check_invariants()
    tier.close()
