"""The timeline of a model that does not fit: which of its stages stay in memory, and how long a run takes when the others stream.

Stages run in order while the next ones are read. What is read needs room, which stages that were run give back. The first stages
are kept from one run to the next, because nothing is computed yet behind which they could be read; how many depends on which is
slower. Where reading is, it must never pause: then fewer are kept, and there is room to read ahead while they run. Where
computing is, two stages at a time are enough, and all else is kept.

Two blocks at a time is SwapNet's scheme (Wang et al., 2024), a prediction by simulation FlashMem's; here the number that stay is
chosen by the same prediction. Pure; times in seconds, sizes in bytes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

# From the end of a stage until what takes its place is being read: two threads tell each other, beside others that compute.
_HANDOVER_S: Final = 1.5e-3


@dataclass(frozen=True, slots=True)
class Leg:
    """One stage: the bytes of its weights, the seconds it takes to read them, and those it takes to run."""

    size_bytes: int
    load_s: float
    run_s: float


@dataclass(frozen=True, slots=True)
class Timeline:
    """The first ``kept`` stages stay; ``predicted_s`` is how long a run takes then, ``floor_s`` what no schedule goes below.

    The floor is what is longer: to compute everything, or to read what does not fit.
    """

    kept: int
    predicted_s: float
    floor_s: float


def smallest_room(legs: Sequence[Leg]) -> int:
    """Return the bytes without which a model cannot stream: those of two neighbours, one being read while the other runs."""
    sizes = [leg.size_bytes for leg in legs]
    return max((one + other for one, other in itertools.pairwise(sizes)), default=sum(sizes))


def plan(legs: Sequence[Leg], room_bytes: int) -> Timeline | None:
    """Return the timeline that is predicted to be shortest in ``room_bytes``; None where two neighbours do not fit."""
    if smallest_room(legs) > room_bytes:
        return None
    best: tuple[float, int] | None = None
    kept_bytes = 0
    for kept in range(len(legs) + 1):
        kept_bytes += legs[kept - 1].size_bytes if kept else 0
        if kept_bytes + smallest_room(legs[kept:]) > room_bytes and kept:
            break
        seconds = predict(legs, kept, room_bytes)
        # Of what takes as long, what reads least: others may want the disk.
        if best is None or seconds <= best[0] * (1 + 1e-9):
            best = (seconds, kept)
    assert best is not None
    return Timeline(best[1], best[0], _floor_s(legs, room_bytes))


def predict(legs: Sequence[Leg], kept: int, room_bytes: int) -> float:
    """Return the seconds of a run that begins with the first ``kept`` stages in memory, and nothing else."""
    free_bytes = room_bytes - sum(leg.size_bytes for leg in legs[:kept])
    # When each of the streamed stages was run, and its bytes are free again.
    freed: list[tuple[float, int]] = []
    reader_s = runner_s = 0.0
    for number, leg in enumerate(legs):
        if number >= kept:
            while free_bytes < leg.size_bytes and freed:
                at_s, size_bytes = freed.pop(0)
                reader_s = max(reader_s, at_s + _HANDOVER_S)
                free_bytes += size_bytes
            free_bytes -= leg.size_bytes
            reader_s += leg.load_s
            runner_s = max(runner_s, reader_s)
        runner_s += leg.run_s
        if number >= kept:
            freed.append((runner_s, leg.size_bytes))
    return runner_s


def _floor_s(legs: Sequence[Leg], room_bytes: int) -> float:
    compute_s = sum(leg.run_s for leg in legs)
    size_bytes, load_s = sum(leg.size_bytes for leg in legs), sum(leg.load_s for leg in legs)
    missing = max(0, size_bytes - room_bytes) / size_bytes if size_bytes else 0.0
    return max(compute_s, missing * load_s)
