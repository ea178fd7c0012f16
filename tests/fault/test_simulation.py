"""A row of the matrix: random lives of a whole sidecar in one thread, in which things fail; and a broken one is found out.

Two thousand lives at each push would take eight minutes: one of 500 events takes about 0.25 s of processor time, most of it
in the engine itself. So 200 are lived with each push, and 4,000 in a night.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sidecar.catalog import Catalog
from sidecar.residency import Residency
from sidecar.scheduler import Scheduler
from sidecar.server import Server, Session
from sidecar.underway import UnderWay
from tests.fakes import FakeDevice
from tests.fault.matrix import Row
from tests.fault.simulation import EVENTS, SEAMS, life

LIVES, PUSH_LIVES = 2000, 200
BLOCKS = 10
# So many lives a broken sidecar may have before it is found out.
MUTANT_LIVES = 12


def live(seed: int, folder: Path) -> tuple[Counter[str], Counter[str], list[object]]:
    """Live a life; return what was told, what failed, and what happened when."""
    try:
        with life(seed, folder) as world:
            world.live(EVENTS)
    except Exception as error:
        raise AssertionError(f"seed {seed}: `python -m tests.fault.simulation {seed}` lives it again: {error}") from error
    return world.outcomes, world.injected, world.trace


@pytest.mark.row("F31")
@pytest.mark.parametrize("block", range(BLOCKS))
def test_random_lives(block: int, row: Row, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()
    injected: Counter[str] = Counter()
    each = row.count(LIVES, push=PUSH_LIVES) // BLOCKS
    for seed in range(block * each, (block + 1) * each):
        told, failed, _ = live(seed, tmp_path)
        row.attempts += EVENTS
        row.answered += told["answered"]
        outcomes += told
        injected += failed
    # A simulation in which nothing goes wrong would prove nothing.
    expected = (
        "answered",
        "told",
        "left",
        "ended",
        "deadline_exceeded",
        "budget_exceeded",
        "device_fault",
        "sidecar_fault",
        "stages for several",
    )
    assert min(outcomes[name] for name in expected) > 0, outcomes
    assert min(injected[seam] for seam in SEAMS) > 5, injected


def test_a_seed_is_a_life(tmp_path: Path) -> None:
    assert live(7, tmp_path) == live(7, tmp_path)
    assert live(7, tmp_path)[2] != live(8, tmp_path)[2]


# What is broken, where, and by what: the last is given what was there, and returns what is put in its place.
MUTANTS: dict[str, tuple[type, str, Callable[[Any], Any]]] = {
    "leases are not returned": (Residency, "release", lambda real: lambda *_: None),
    "more is lent than there is": (Residency, "__init__", lambda real: lambda self, size, *rest: real(self, 2 * size, *rest)),
    "what is evicted stays bound": (Catalog, "unbind", lambda real: lambda *_: None),
    "another version is not taken up": (Catalog, "deploy", lambda real: lambda *_: ()),
    "requests of those who left are kept": (Scheduler, "drop", lambda real: lambda *_: 0),
    "nobody is told of a failure": (UnderWay, "fail", lambda real: lambda *_: None),
    "an answer has another's number": (Session, "answer", lambda real: lambda self, number, *rest: real(self, number + 1, *rest)),
    "an answer comes twice": (Session, "answer", lambda real: lambda *given: (real(*given), real(*given))),
    "arenas are not given back": (Server, "arenas_closed", lambda real: lambda *_: None),
    "rows of a batch are mixed up": (FakeDevice, "join", lambda real: lambda self, rows, axis: real(self, rows[::-1], axis)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_sidecar_is_found_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, broken = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, broken(getattr(owner, attribute)))
    with pytest.raises(AssertionError, match=r"seed \d+"):
        for seed in range(MUTANT_LIVES):
            live(seed, tmp_path)
