"""Where the parts of the picture lie: the fused DAG as a Sankey diagram, from left to right. Pure.

Each model has a lane; what several models run through spans their lanes, and fans out where they part. A run's width is the
square root of its bytes, so that a small one beside a large one is still to be seen. All is laid out in a space 1000 wide, which
whoever draws it stretches; heights are pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from sidecar.units import size

WIDTH: Final = 1000.0
# Heights of a lane, by how many there are at most.
_ROWS: Final = ((14, 34), (40, 22), (120, 14), (10**9, 6))
# Of a path from left to right: what the smallest run takes of it, and a fork.
_SMALLEST: Final = 0.006
_FORK: Final = 0.045
# What is left at the right, where lanes lead to the names.
_TAIL: Final = 26.0
# How much of a lane a run of one model fills.
_FILL: Final = 0.56


def laid_out(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return lanes, runs and bands of runs as ``sidecar.picture`` tells them: each after the one it follows, its ``parent``.

    A run spans lanes from ``first``, ``lanes`` of them. Bands are paths of SVG, from one run to the next or to its lane's name.
    """
    counts, firsts = _lanes(runs)
    lane_count = max(sum(count for run, count in zip(runs, counts, strict=True) if run["parent"] is None), 0)
    row = next(height for most, height in _ROWS if lane_count <= most)
    lefts, rights = _columns(runs, counts)
    heights = [_thickness(count) * row for count in counts]
    tops = [(first + count / 2) * row - height / 2 for first, count, height in zip(firsts, counts, heights, strict=True)]
    names = [""] * lane_count
    models = [1] * lane_count
    bands: list[str] = []
    for place, run in enumerate(runs):
        parent = run["parent"]
        if parent is not None and lefts[place] > rights[parent]:
            start = tops[parent] + heights[parent] * (firsts[place] - firsts[parent]) / counts[parent]
            end = start + heights[parent] * counts[place] / counts[parent]
            bands.append(_band(rights[parent], start, end, lefts[place], tops[place], tops[place] + heights[place]))
        for number, ended in enumerate(_ended(run)):
            lane = firsts[place] + number
            names[lane], models[lane] = ended
            middle = (lane + 0.5) * row
            start = tops[place] + heights[place] * number / counts[place]
            end = start + heights[place] / counts[place]
            turn = min(rights[place] + (_FORK * WIDTH if counts[place] > 1 else 0), WIDTH)
            bands.append(_band(rights[place], start, end, turn, middle - 0.75, middle + 0.75, WIDTH))
    return {
        "height": lane_count * row,
        "row": row,
        "lanes": [{"name": name, "models": count} for name, count in zip(names, models, strict=True)],
        "bands": bands,
        "runs": [
            {
                "id": run["id"],
                "parent": run["parent"],
                "x": round(lefts[place], 1),
                "y": round(tops[place], 1),
                "w": round(rights[place] - lefts[place], 1),
                "h": round(heights[place], 1),
                "first": firsts[place],
                "lanes": counts[place],
                "about": _about(run),
            }
            for place, run in enumerate(runs)
        ],
    }


def _ended(run: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the names in the lanes that end with a run, and how many models each stands for."""
    ends = run["ends"]
    return [(f"{len(ends)} more models", len(ends))] if run["rest"] else [(name, 1) for name in ends]


def _lanes(runs: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[int]]:
    """Return how many lanes each run spans, and the first of them."""
    counts = [len(_ended(run)) for run in runs]
    own = list(counts)
    for place in range(len(runs) - 1, -1, -1):
        parent = runs[place]["parent"]
        if parent is not None:
            counts[parent] += counts[place]
    firsts = [0] * len(runs)
    # The next free lane of each run, for what follows it.
    free = [0] * len(runs)
    top = 0
    for place, run in enumerate(runs):
        parent = run["parent"]
        if parent is None:
            firsts[place], top = top, top + counts[place]
        else:
            firsts[place] = free[parent]
            free[parent] += counts[place]
        free[place] = firsts[place] + own[place]
    return counts, firsts


def _columns(runs: Sequence[Mapping[str, Any]], counts: Sequence[int]) -> tuple[list[float], list[float]]:
    """Return where each run begins and ends, from left to right."""
    roots = [math.sqrt(run["bytes"]) for run in runs]
    paths: list[float] = []
    for run, root in zip(runs, roots, strict=True):
        paths.append(root + (0.0 if run["parent"] is None else paths[run["parent"]]))
    unit = max(paths, default=0.0) or 1.0
    lefts: list[float] = []
    rights: list[float] = []
    for place, run in enumerate(runs):
        parent = run["parent"]
        gap = 0.0
        if parent is not None:
            gap = rights[parent] + (_FORK * unit if counts[parent] != counts[place] else 0.0)
        lefts.append(gap)
        rights.append(gap + max(roots[place], _SMALLEST * unit))
    scale = (WIDTH - _TAIL) / max(rights, default=1.0)
    return [left * scale for left in lefts], [right * scale for right in rights]


def _thickness(lanes: int) -> float:
    """Return how many lanes' height a run of so many has: more for more models, and never all of it, so that they fan out."""
    return min(_FILL * (1 + 0.9 * math.log2(lanes)), 0.86 * lanes) if lanes > 1 else _FILL


def _band(x1: float, top1: float, end1: float, x2: float, top2: float, end2: float, to: float | None = None) -> str:
    """Return a band between two edges as a path, and on to ``to`` as it is there."""
    middle = (x1 + x2) / 2
    on = "" if to is None else f"H{to:.1f}V{end2:.1f}H{x2:.1f}"
    curves = (
        f"M{x1:.1f} {top1:.1f}C{middle:.1f} {top1:.1f} {middle:.1f} {top2:.1f} {x2:.1f} {top2:.1f}",
        on or f"V{end2:.1f}",
        f"C{middle:.1f} {end2:.1f} {middle:.1f} {end1:.1f} {x1:.1f} {end1:.1f}Z",
    )
    return "".join(curves)


def _about(run: Mapping[str, Any]) -> str:
    """Return what a run is, for people."""
    blocks, packed = run["blocks"], run["packed"]
    form = "packed" if packed == blocks else "plain" if not packed else f"{packed} packed"
    what = f"block {run['id']}" if blocks == 1 else f"{blocks} blocks from {run['id']}"
    return f"{what} · {run['nodes']} operators · {size(run['bytes'])} · {form}"
