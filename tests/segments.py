"""Segments for tests: real ones, of which nothing is left afterwards."""

from __future__ import annotations

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

from sidecar import segment as module
from sidecar.hosttier import HostTier
from sidecar.segment import SHARED_MEMORY, Segment, segment_name

PAGE = 4096
Make = Callable[..., Segment]
# Of this process and those it forks: other tests may run at the same time.
_PREFIX = f"{module._prefix()}{os.getpid()}-"


def names() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob(f"{_PREFIX}*")}


@contextlib.contextmanager
def segments(run_dir: Path) -> Iterator[Make]:
    """Yield what makes or adopts the segment of ``run_dir``, as a supervisor would; in the end, no name may be new."""
    with mock.patch.object(module, "_prefix", return_value=_PREFIX):
        yield from _segments(run_dir)


def _segments(run_dir: Path) -> Iterator[Make]:
    before = names()
    open_segments: list[Segment] = []

    def make(budget_bytes: int = 64 * PAGE) -> Segment:
        segment = Segment.create_or_adopt(run_dir, budget_bytes)
        open_segments.append(segment)
        return segment

    try:
        yield make
        (SHARED_MEMORY / segment_name(run_dir.resolve())[1:]).unlink(missing_ok=True)
        assert names() <= before, "a segment was left behind"
    finally:
        for segment in open_segments:
            segment.unlink()
            segment.close()


def key(number: int) -> str:
    return f"{number:064x}"


def content(number: int, size_bytes: int) -> bytes:
    return (number.to_bytes(2, "little") * (size_bytes // 2 + 1))[:size_bytes]


def put(tier: HostTier, number: int, size_bytes: int) -> None:
    """Load and seal a weight whose bytes follow from its number."""
    wanted = content(number, size_bytes)
    tier.allocate(key(number), size_bytes)[:] = wanted
    tier.seal(key(number), zlib.crc32(wanted))
