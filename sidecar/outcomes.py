"""Outcomes: what became of requests, and how long those took that were answered, by model. Pure.

Counted once, where a request ends, in the engine thread; whoever wants to know is told the counts as they are. A request that
asks several models counts for each of them. Names that functions make up are kept by nobody: what is not deployed counts for "".
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from trunkline.protocol import JOINT

# Seconds; a request counts in the first of them that it does not exceed, or beyond the last.
BOUNDS_S: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
# Models that are told apart, while the engine lives; those that come later count for "".
_MOST: Final = 1024


@dataclass(slots=True)
class _Outcome:
    """Answered requests by how long they took, the sum of that, and the refused ones by the code of their error."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))
    seconds: float = 0.0
    failed: Counter[str] = field(default_factory=Counter)


class Outcomes:
    """Counts by model. ``is_known`` says whether there is a model of a name."""

    def __init__(self, is_known: Callable[[str], bool]) -> None:
        self._is_known = is_known
        self._by_model: dict[str, _Outcome] = {}

    def answered(self, model: str, seconds: float) -> None:
        """Count a request for one model that was answered after so many seconds."""
        found = self._by_model.get(model)
        if found is None:
            found = self._of(model)
        found.counts[bisect_left(BOUNDS_S, seconds)] += 1
        found.seconds += seconds

    def failed(self, models: str, code: str) -> None:
        """Count a request for a model, or several together, that was refused with the error of this code."""
        for model in models.split(JOINT):
            self._of(model).failed[code] += 1

    def _of(self, model: str) -> _Outcome:
        found = self._by_model.get(model)
        if found is None:
            if not self._is_known(model) or len(self._by_model) >= _MOST:
                model = ""
            found = self._by_model.setdefault(model, _Outcome())
        return found

    def to_plain(self) -> dict[str, object]:
        """Return the bounds, and for each model the counts between them, the sum of the seconds, and the failures."""
        return {
            "bounds_s": list(BOUNDS_S),
            "models": {
                model: {"counts": found.counts, "seconds": round(found.seconds, 6), "failed": dict(found.failed)}
                for model, found in self._by_model.items()
            },
        }
