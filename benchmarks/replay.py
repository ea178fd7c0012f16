"""What each eviction policy would have fetched: traces replayed over the sidecar's own residency, without torch or time.

Compared with: the whole-model LRU, which does not know of shared weights and lets whole models go (F); the same with shared
weights held once; and a bound that no policy can be below, even if it knew the future: the furthest next use leaves first, and
of a weight only as many bytes as are needed. Budgets are parts of the bytes of all models, each weight once.
"""

from __future__ import annotations

import argparse
import heapq
import statistics
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import Report
from benchmarks.traces import Trace, generated, recorded
from sidecar.policies import POLICIES, Either, LeastRecentlyUsed, WholeModelLeastRecentlyUsed
from sidecar.rivals import open_residency

BUDGET_PARTS = (1 / 1.5, 1 / 2.32, 1 / 4, 1 / 5.81)
_UNSHARED = "F"
_BOUND = "bound"
_COMPARED = (*POLICIES, Either.name)
_REFERENCES = (_UNSHARED, WholeModelLeastRecentlyUsed.name, LeastRecentlyUsed.name, _BOUND)


@dataclass(frozen=True)
class Replayed:
    """What one policy did on one trace."""

    fetched_bytes: int
    missed_requests: int
    evicted_weights: int


def replay(trace: Trace, budget_bytes: int, policy: str) -> Replayed:
    """Run a trace through a residency; each request ends before the next begins."""
    now_s = 0.0
    residency = open_residency(budget_bytes, policy, lambda: now_s)
    for model, weights in trace.models.items():
        residency.add_plan(model, weights)
    missed = 0
    for models in trace.asked:
        now_s += 1
        grant = residency.lease(*models)
        assert grant is not None, "nothing is leased, so there is room"
        missed += bool(grant.fetch)
        for digest in grant.fetch:
            residency.arrived(digest)
        for model in models:
            residency.release(model)
    counts = residency.counts
    return Replayed(counts.missed_bytes, missed, counts.evictions.total())


def fetched_at_least(trace: Trace, budget_bytes: int) -> int:
    """Return a bound below the bytes that any policy fetches: Belady's rule with every byte an object of its own.

    Objects of one size and one cost, fetched on demand: to let go what is needed latest is optimal (Belady 1966), and whoever
    moves whole weights is free to do no better. Weights that the same requests need are treated as one.
    """
    users: defaultdict[str, list[str]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for model, weights in trace.models.items():
        sizes |= weights
        for digest in weights:
            users[digest].append(model)
    bytes_of: defaultdict[tuple[str, ...], int] = defaultdict(int)
    for digest, models in users.items():
        bytes_of[tuple(models)] += sizes[digest]
    groups_of: defaultdict[str, list[tuple[str, ...]]] = defaultdict(list)
    for group in bytes_of:
        for model in group:
            groups_of[model].append(group)
    needs = [dict.fromkeys(group for model in models for group in groups_of[model]) for models in trace.asked]
    uses: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for number in range(len(needs) - 1, -1, -1):
        for group in needs[number]:
            uses[group].append(number)
    present: defaultdict[tuple[str, ...], int] = defaultdict(int)
    # The latest next use first; an entry whose number is not that of the group's next use is out of date.
    latest: list[tuple[int, tuple[str, ...]]] = []
    fetched = used = 0
    for needed in needs:
        missing = sum(bytes_of[group] - present[group] for group in needed)
        shortfall = used + missing - budget_bytes
        while shortfall > 0:
            negative, group = latest[0]
            upcoming = uses[group][-1] if uses[group] else len(needs)
            if -negative != upcoming or group in needed or not present[group]:
                heapq.heappop(latest)
                continue
            gone = min(shortfall, present[group])
            present[group] -= gone
            used -= gone
            shortfall -= gone
        for group in needed:
            present[group] = bytes_of[group]
            uses[group].pop()
            heapq.heappush(latest, (-(uses[group][-1] if uses[group] else len(needs)), group))
        used += missing
        fetched += missing
    return fetched


def measure(report: Report, traces: list[Trace], parts: tuple[float, ...]) -> None:
    """Replay every trace with every policy and budget."""
    rows: dict[str, dict[str, object]] = {}
    ratios: defaultdict[str, list[float]] = defaultdict(list)
    for trace in traces:
        for part in parts:
            budget_bytes = max(int(part * trace.unique_bytes), trace.largest_bytes)
            row = {policy: replay(trace, budget_bytes, policy) for policy in _COMPARED}
            # Without sharing its largest request may need more than the budget; it is given that much.
            alone = trace.unshared()
            row[_UNSHARED] = replay(alone, max(budget_bytes, alone.largest_bytes), WholeModelLeastRecentlyUsed.name)
            fetched = {name: each.fetched_bytes for name, each in row.items()}
            fetched[_BOUND] = fetched_at_least(trace, budget_bytes)
            rows[f"{trace.name}_{1 / part:.2f}"] = {
                "budget_bytes": budget_bytes,
                "fetched_bytes": fetched,
                "missed_requests": {name: each.missed_requests for name, each in row.items()},
                "evicted_weights": {name: each.evicted_weights for name, each in row.items()},
            }
            shares = trace.unique_bytes < alone.unique_bytes
            for policy in _COMPARED:
                for other in fetched:
                    if other in _REFERENCES and policy != other and (shares or other != _UNSHARED):
                        ratios[f"{policy}_over_{other}"].append(fetched[policy] / max(fetched[other], 1))
    report.raw["rows"] = rows
    for name, values in ratios.items():
        report.figures[f"{name}_mean"] = statistics.geometric_mean(values)
        report.figures[f"{name}_worst"] = max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter traces of fewer models; ends within 60 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="replay what `trunkline trace` has written, and nothing else")
    parser.add_argument("--json", metavar="PATH", help="write the figures there; '-': to standard output, and nothing else")
    chosen = parser.parse_args()
    report = Report("replay", chosen.quick)
    if chosen.trace:
        traces = [recorded(chosen.trace)]
    else:
        traces = list(generated(chosen.seed, *((24, 1000) if chosen.quick else (40, 3000))))
    measure(report, traces, BUDGET_PARTS[1::2] if chosen.quick else BUDGET_PARTS)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
