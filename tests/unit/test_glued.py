"""Pieces of a file side by side: the same bytes, in the order that was asked for, for as long as anyone looks."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from sidecar import glued as module
from sidecar.extents import Extent
from sidecar.glued import glue, most_mappings

PAGE = mmap.PAGESIZE
PIECES = (Extent(4 * PAGE, 2 * PAGE), Extent(0, PAGE), Extent(7 * PAGE, PAGE))


@pytest.fixture
def descriptor() -> Iterator[int]:
    made = os.memfd_create("glued")
    os.posix_fallocate(made, 0, 8 * PAGE)
    for number in range(8):
        os.pwrite(made, bytes([number]) * PAGE, number * PAGE)
    yield made
    os.close(made)


def mapping_count() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:glued")


def test_pieces_are_one_span_in_the_order_that_was_asked_for(descriptor: int) -> None:
    made = glue(descriptor, PIECES)
    assert len(made) == 4 * PAGE
    assert [made[number * PAGE] for number in range(4)] == [4, 5, 0, 7]
    made[2 * PAGE - 1 : 2 * PAGE + 1] = b"xy"
    assert os.pread(descriptor, 1, 6 * PAGE - 1) == b"x"
    assert os.pread(descriptor, 1, 0) == b"y"
    # What lies between them is not touched.
    assert os.pread(descriptor, PAGE, PAGE) == b"\1" * PAGE


def test_a_span_goes_with_the_last_that_looks_at_it(descriptor: int) -> None:
    view = memoryview(glue(descriptor, PIECES))
    part = view[PAGE : 2 * PAGE]
    assert mapping_count() == 3
    del view
    assert part[0] == 5
    assert mapping_count() == 3
    del part
    assert mapping_count() == 0


def test_what_the_system_refuses_is_an_error_and_leaves_nothing(descriptor: int) -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
        glue(descriptor, (Extent(0, PAGE), Extent(PAGE + 1, PAGE)))
    assert mapping_count() == 0


def test_there_are_as_many_mappings_as_linux_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "max_map_count"
    monkeypatch.setattr(module, "_LIMIT", told)
    assert most_mappings() == 65530
    told.write_text("nothing of the kind")
    assert most_mappings() == 65530
    told.write_text("262144\n")
    assert most_mappings() == 262144
