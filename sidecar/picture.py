"""The picture: the fused DAG as it is drawn live, what of it is in memory, and what moved lately. Part of the engine thread.

Drawn are *runs*: single blocks while there are few; else consecutive blocks of the same models as one; and where even those are
too many, the rest of a fork together. What a run consists of is told only to whoever does not know it yet; the rest is numbers,
cheap enough to be asked for every second.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from sidecar.catalog import Catalog
from sidecar.graph import FusedBlock

# Runs that are drawn one by one.
MOST_RUNS: Final = 400
_ID_LENGTH: Final = 12


@dataclass(slots=True)
class _Run:
    """Blocks that are drawn as one. ``parent`` is the place of the run it follows; ``digests`` are its weights as it is run."""

    id: str
    parent: int | None
    models: frozenset[str]
    digests: dict[str, int] = field(default_factory=dict)
    block_count: int = 0
    node_count: int = 0
    size_bytes: int = 0
    packed_count: int = 0
    # Blocks of several forks.
    rest: bool = False

    def add(self, other: _Run) -> None:
        self.digests |= other.digests
        self.block_count += other.block_count
        self.node_count += other.node_count
        self.size_bytes += other.size_bytes
        self.packed_count += other.packed_count


class Picture:
    """What is drawn of a catalog."""

    def __init__(self, catalog: Catalog, clock: Callable[[], float]) -> None:
        self._catalog = catalog
        self._clock = clock
        # No other engine's picture is taken for this one's.
        self._life = secrets.token_hex(4)
        self._drawn = -1
        self._runs: list[_Run] = []
        self._block_count = 0

    def to_plain(self, arguments: Mapping[str, Any]) -> dict[str, object]:
        """Return version, runs unless ``known`` is that version, how much of each is in memory, and moves after ``since``."""
        if self._drawn != self._catalog.changes:
            self._draw()
        version = f"{self._life}-{self._drawn}"
        resident = [self._resident_percent(run) for run in self._runs]
        return {
            "version": version,
            **({} if arguments.get("known") == version else {"block_count": self._block_count, "runs": self._described()}),
            "resident": resident,
            "host": [self._host_percent(run, percent) for run, percent in zip(self._runs, resident, strict=True)],
            "moves": self._moves(int(arguments.get("since", 0))),
            "last_move": self._catalog.residency.moves.last,
        }

    # --- what is drawn -----------------------------------------------------------------------------------------------

    def _draw(self) -> None:
        blocks = self._catalog.graph.blocks()
        self._block_count = len(blocks)
        self._drawn = self._catalog.changes
        runs = self._singles(blocks)
        if len(runs) > MOST_RUNS:
            runs = _chained(runs)
        self._runs = _largest(runs) if len(runs) > MOST_RUNS else runs

    def _singles(self, blocks: list[FusedBlock]) -> list[_Run]:
        places = {block.id: place for place, block in enumerate(blocks)}
        steps = {name: {step.block: step for step in deployed.steps} for name, deployed in self._catalog.deployed.items()}
        size_of = self._catalog.memory.size_bytes
        # A weight counts where it is first used, as in the graph.
        counted: set[str] = set()
        runs = []
        for block in blocks:
            run = _Run(block.id[:_ID_LENGTH], None if block.parent is None else places[block.parent], frozenset(block.models))
            # What lies in memory are the weights of the form that the block is run in.
            step = steps[block.models[0]][block.id]
            run.digests = {weight.digest: size_of(weight) for weight in step.graph.weights}
            run.block_count, run.node_count, run.packed_count = 1, block.node_count, int(bool(step.recipes))
            run.size_bytes = sum(size for digest, size in run.digests.items() if digest not in counted)
            counted.update(run.digests)
            runs.append(run)
        return runs

    def _described(self) -> list[dict[str, object]]:
        """Return the runs; a model is named where it ends, and runs through all that comes before."""
        going_on: list[set[str]] = [set() for _ in self._runs]
        for run in self._runs:
            if run.parent is not None:
                going_on[run.parent] |= run.models
        return [
            {
                "id": run.id,
                "parent": run.parent,
                "blocks": run.block_count,
                "nodes": run.node_count,
                "bytes": run.size_bytes,
                "packed": run.packed_count,
                "rest": run.rest,
                "ends": sorted(run.models - further),
            }
            for run, further in zip(self._runs, going_on, strict=True)
        ]

    # --- what changes ------------------------------------------------------------------------------------------------

    def _resident_percent(self, run: _Run) -> int | None:
        """Return how much of a run's bytes is in memory; None where it has no weights."""
        if not run.digests:
            return None
        deployed = self._catalog.deployed
        if not run.rest and any(deployed[name].loaded for name in run.models):
            return 100
        return _percent(run.digests, self._catalog.residency.is_resident)

    def _host_percent(self, run: _Run, resident_percent: int | None) -> int:
        """Return how much of a run's bytes is in host memory, below a device that does not have all of it."""
        return 0 if resident_percent in (None, 100) else _percent(run.digests, self._catalog.memory.is_in_host)

    def _moves(self, since: int) -> list[dict[str, object]]:
        now_s = self._clock()
        return [
            {
                "id": move.id,
                "ago_s": round(now_s - move.at_s, 3),
                "reason": move.reason,
                # A plan is named by its model and what that consists of.
                "models": [plan.rpartition("@")[0] for plan in move.plans],
                "weights": move.weight_count,
                "bytes": move.size_bytes,
            }
            for move in self._catalog.residency.moves.since(since)
        ]


def _percent(sizes: Mapping[str, int], is_there: Callable[[str], bool]) -> int:
    total = sum(sizes.values())
    there = sum(size for digest, size in sizes.items() if is_there(digest))
    # What is nearly all there is not all there.
    return 100 if there == total else 100 * there // total


def _chained(runs: list[_Run]) -> list[_Run]:
    """Return runs with those that follow one by the same models as one."""
    made: list[_Run] = []
    places: list[int] = []
    for run in runs:
        before = None if run.parent is None else places[run.parent]
        if before is not None and made[before].models == run.models:
            made[before].add(run)
            places.append(before)
            continue
        run.parent = before
        places.append(len(made))
        made.append(run)
    return made


def _largest(runs: list[_Run]) -> list[_Run]:
    """Return the runs that most models share, and of those the largest; what else follows one of them is one run together.

    For chained ones: each is shared by fewer models than the one it follows, so that all before one that stays does, too.
    """
    ranked = sorted(range(len(runs)), key=lambda place: (-len(runs[place].models), -runs[place].size_bytes))
    kept = set(ranked[:MOST_RUNS])
    made: list[_Run] = []
    places: dict[int | None, int | None] = {None: None}
    rests: dict[int | None, int] = {}
    for place, run in enumerate(runs):
        parent = places[run.parent]
        if place in kept:
            run.parent = parent
            places[place] = len(made)
            made.append(run)
            continue
        is_below_rest = parent is not None and made[parent].rest
        rest = parent if is_below_rest else rests.get(parent)
        if rest is None:
            rest = rests[parent] = len(made)
            made.append(_Run(run.id, parent, frozenset(), rest=True))
        made[rest].models |= run.models
        made[rest].add(run)
        places[place] = rest
    return made
