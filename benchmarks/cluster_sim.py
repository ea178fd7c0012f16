"""What it costs a cluster to start functions where their models are not: starts placed with and without labels of nodes.

A simulation, in simulated time. Bursts of one function each come at random, functions by Zipf's law, and each burst doubles its
pods until it has as many as it wants. A pod is placed as kube-scheduler does it: of the first nodes that have room, of a sample
in large clusters, the one with the best sum of free room, distance from its like, and node affinity. What affinity says is the
product's own rule (``sidecar.kubernetes.affinity``), over labels that lag by some seconds. A node pulls what it lacks from the
origin, keeps what has room on its disk and in its memory, and lets go what was used longest ago. Before models are pulled for
pods that are about to come (``prepull``), nobody knows where these will be.
"""

from __future__ import annotations

import argparse
import heapq
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from benchmarks.report import Report, summary
from sidecar.kubernetes.affinity import RESIDENT, STORED, labels_of, preferred_terms, score

SIZES = ((100, 400), (1_000, 1_000), (10_000, 2_000))
QUICK_SIZES = ((100, 400), (1_000, 1_000))
# Nodes and what they have: pods of functions, bytes of memory for weights, bytes of disk, bytes a second from origin and disk.
SLOTS = 10
MEMORY_BYTES = 8 << 30
DISK_BYTES = 40 << 30
ORIGIN_BYTES_PER_S = 125e6
DISK_BYTES_PER_S = 1e9
# Of models, a median and a spread of sizes; of bursts, the pods they want and how long those live; how full the cluster is.
_MEDIAN_BYTES, _SIGMA = 400e6, 0.9
_MEAN_PODS, _MOST_PODS = 8.0, 64
_MEAN_LIFE_S = 300.0
_USED = 0.4
_STEP_S = 2.0
# Weights that kube-scheduler gives to its plugins unless it is told otherwise.
_AFFINITY, _SPREAD, _ROOM = 2.0, 2.0, 1.0
# Caches fill in the beginning, which is not counted.
_UNCOUNTED = 1 / 3
_ABSENT, _STORED, _RESIDENT = 0, 1, 2


@dataclass(frozen=True)
class Variant:
    """How pods are placed: by labels that are so old, or (None) without; and whether models are pulled ahead."""

    stale_s: float | None
    prepull: bool

    @property
    def name(self) -> str:
        placed = "spread" if self.stale_s is None else f"affinity_{self.stale_s:g}s"
        return f"{placed}_prepull" if self.prepull else placed


# A node looks at its models every 5 s, and tells changes at most every 30 s.
VARIANTS = (
    Variant(None, False),
    Variant(0, False),
    Variant(35, False),
    Variant(300, False),
    Variant(None, True),
    Variant(35, True),
)


@dataclass(frozen=True)
class Load:
    """Bursts in order of time: (seconds, model, the lives in seconds of the pods that it wants)."""

    sizes: NDArray[np.int64]
    bursts: list[tuple[float, int, NDArray[np.float64]]]
    end_s: float


def load_of(seed: int, node_count: int, model_count: int, pods_per_node: float) -> Load:
    """Return what is asked of a cluster, the same for all variants."""
    draw = np.random.default_rng([seed, node_count])
    sizes = np.clip(draw.lognormal(np.log(_MEDIAN_BYTES), _SIGMA, model_count), 20e6, MEMORY_BYTES / 2).astype(np.int64)
    popularity = 1 / np.arange(1, model_count + 1)
    popularity /= popularity.sum()
    end_s = pods_per_node * _MEAN_LIFE_S / (_USED * SLOTS)
    bursts = []
    pods = 0
    while pods < pods_per_node * node_count:
        count = min(int(draw.geometric(1 / _MEAN_PODS)), _MOST_PODS)
        pods += count
        bursts.append(
            (float(draw.uniform(0, end_s)), int(draw.choice(model_count, p=popularity)), draw.exponential(_MEAN_LIFE_S, count))
        )
    return Load(sizes, sorted(bursts, key=lambda burst: burst[:2]), end_s)


@dataclass
class Counts:
    """What came of the starts after the first third."""

    starts: int = 0
    pulled_bytes: int = 0
    pulls: int = 0
    from_origin: int = 0
    from_disk: int = 0
    no_room: int = 0
    waits_s: list[float] = field(default_factory=list)


class Cluster:
    """Nodes with their models, and the scheduler's view of them."""

    def __init__(self, node_count: int, sizes: NDArray[np.int64], variant: Variant, seed: int) -> None:
        self._sizes: list[int] = sizes.tolist()
        self._variant = variant
        self._draw = np.random.default_rng(seed)
        self._free = np.full(node_count, SLOTS, np.int64)
        shape = (len(sizes), node_count)
        self._state = np.zeros(shape, np.uint8)
        # What labels say, and what they will say, when: (seconds, order, model, node, state).
        self._labelled = np.zeros(shape, np.uint8)
        self._changes: list[tuple[float, int, int, int, int]] = []
        self._told_s: dict[tuple[int, int], float] = {}
        self._order = itertools.count()
        self._pods = np.zeros(shape, np.int16)
        # What nodes have, least recently used first; and when what is on its way will be there.
        self._memory: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(node_count)]
        self._disk: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(node_count)]
        self._memory_bytes = [0] * node_count
        self._disk_bytes = [0] * node_count
        self._ready_s: dict[tuple[int, int], float] = {}
        self._next = 0
        self._sampled = _sampled(node_count)
        # What the scheduler adds up for a pod of each model on a node in each state: by the product's rule, not by ours.
        self._worth = np.array([_worth(f"model-{number}") for number in range(len(sizes))])
        self.counts = Counts()

    def place(self, now_s: float, model: int, counted: bool) -> int | None:
        """Start a pod; return its node, None where there is no room."""
        nodes = self._with_room()
        if not len(nodes):
            self.counts.no_room += counted
            return None
        same = self._pods[model, nodes]
        points = _ROOM * 100 * self._free[nodes] / SLOTS
        if (most := same.max()) > 0:
            points += _SPREAD * 100 * (most + same.min() - same) / most
        if self._variant.stale_s is not None:
            worth = self._worth[model, self._labels(now_s, model)[nodes]]
            if (most := worth.max()) > 0:
                points += _AFFINITY * 100 * worth / most
        # Of equals the scheduler takes any.
        node = int(nodes[int(np.argmax(points + self._draw.random(len(nodes)) * 1e-3))])
        self._free[node] -= 1
        self._pods[model, node] += 1
        self._bring(now_s, model, node, counted)
        return node

    def end(self, model: int, node: int) -> None:
        """End a pod."""
        self._free[node] += 1
        self._pods[model, node] -= 1

    def prepull(self, now_s: float, model: int, count: int, counted: bool) -> None:
        """Have a model pulled on some nodes that lack it and have room for pods."""
        nodes = np.flatnonzero((self._free > 0) & (self._state[model] == _ABSENT))
        for node in self._draw.choice(nodes, min(count, len(nodes)), replace=False):
            self._pull(now_s, model, int(node), counted)

    def _with_room(self) -> NDArray[np.int64]:
        """Return the first nodes that have room, as many as are looked at, from where the last search ended."""
        count = len(self._free)
        order = (self._next + np.arange(count if self._sampled == count else min(count, 3 * self._sampled))) % count
        found = order[self._free[order] > 0]
        if len(found) < self._sampled and len(order) < count:
            order = (self._next + np.arange(count)) % count
            found = order[self._free[order] > 0]
        found = found[: self._sampled]
        if len(found):
            self._next = (int(found[-1]) + 1) % count
        return found

    def _labels(self, now_s: float, model: int) -> NDArray[np.uint8]:
        """Return what nodes are labelled with for a model, after all that has been told by now."""
        while self._changes and self._changes[0][0] <= now_s:
            _, _, changed, node, state = heapq.heappop(self._changes)
            self._labelled[changed, node] = state
        return self._labelled[model]

    def _become(self, at_s: float, model: int, node: int, state: int) -> None:
        """Have a model in a state, of which labels tell when it is there, and not before what was true earlier."""
        self._state[model, node] = state
        if self._variant.stale_s is not None:
            told_s = max(at_s + self._variant.stale_s, self._told_s.get((model, node), 0.0))
            self._told_s[model, node] = told_s
            heapq.heappush(self._changes, (told_s, next(self._order), model, node, state))

    def _bring(self, now_s: float, model: int, node: int, counted: bool) -> None:
        """Have a model in the memory of a node, and count what its pod waits for."""
        ready_s = self._ready_s.get((model, node), 0.0)
        if self._state[model, node] == _ABSENT:
            ready_s = self._pull(now_s, model, node, counted)
        is_pulled = ready_s > now_s
        wait_s = max(0.0, ready_s - now_s)
        is_read = bool(self._state[model, node] == _STORED)
        if is_read:
            size = self._sizes[model]
            wait_s += size / DISK_BYTES_PER_S
            self._memory_bytes[node] += size
            self._memory[node][model] = None
            self._become(now_s + wait_s, model, node, _RESIDENT)
            for victim in self._leaving(self._memory[node], self._memory_bytes, node, MEMORY_BYTES, model):
                self._become(now_s, victim, node, _STORED)
        self._memory[node].move_to_end(model)
        self._disk[node].move_to_end(model)
        if counted:
            self.counts.starts += 1
            self.counts.from_origin += is_pulled
            self.counts.from_disk += is_read and not is_pulled
            self.counts.waits_s.append(wait_s)

    def _pull(self, now_s: float, model: int, node: int, counted: bool) -> float:
        """Have a model pulled to the disk of a node; return when it is there."""
        size = self._sizes[model]
        self.counts.pulls += counted
        self.counts.pulled_bytes += size * counted
        self._disk_bytes[node] += size
        self._disk[node][model] = None
        self._ready_s[model, node] = ready_s = now_s + size / ORIGIN_BYTES_PER_S
        self._become(ready_s, model, node, _STORED)
        for victim in self._leaving(self._disk[node], self._disk_bytes, node, DISK_BYTES, model):
            if victim in self._memory[node]:
                del self._memory[node][victim]
                self._memory_bytes[node] -= self._sizes[victim]
            self._become(now_s, victim, node, _ABSENT)
        return ready_s

    def _leaving(self, held: OrderedDict[int, None], used: list[int], node: int, limit_bytes: int, wanted: int) -> Iterator[int]:
        """Let go until there is room: what was used longest ago, and of that first what no pod here asks for."""
        while used[node] > limit_bytes:
            others = [model for model in held if model != wanted]
            victim = next((model for model in others if not self._pods[model, node]), others[0])
            del held[victim]
            used[node] -= self._sizes[victim]
            yield victim


def _sampled(node_count: int) -> int:
    """Return how many nodes with room kube-scheduler compares, by its own rule for clusters of each size."""
    percent = max(50 - node_count // 125, 5)
    return node_count if node_count < 100 else max(100, node_count * percent // 100)


def _worth(model: str) -> list[int]:
    """Return what nodes that lack a model, have it on disk and have it in memory are worth to a pod that asks for it."""
    terms = preferred_terms([model])
    return [score(terms, labels_of([(model, state)] if state else [], 1)) for state in ("", STORED, RESIDENT)]


def simulate(load: Load, node_count: int, variant: Variant, seed: int) -> Counts:
    """Run a load through a cluster."""
    cluster = Cluster(node_count, load.sizes, variant, seed)
    number = itertools.count()
    # (seconds, order, model, node of the pod that ends, or None and the lives of pods that are still to start, how many next)
    events: list[tuple[float, int, int, int | None, NDArray[np.float64] | None, int]] = [
        (at_s, next(number), model, None, lives, 1) for at_s, model, lives in load.bursts
    ]
    heapq.heapify(events)
    while events:
        now_s, _, model, node, lives, count = heapq.heappop(events)
        if node is not None:
            cluster.end(model, node)
            continue
        if now_s > load.end_s:
            break
        assert lives is not None
        counted = now_s > _UNCOUNTED * load.end_s
        for life_s in lives[:count]:
            placed = cluster.place(now_s, model, counted)
            if placed is not None:
                heapq.heappush(events, (now_s + float(life_s), next(number), model, placed, None, 0))
        rest = lives[count:]
        if len(rest):
            if variant.prepull:
                cluster.prepull(now_s, model, min(count, len(rest)), counted)
            heapq.heappush(events, (now_s + _STEP_S, next(number), model, None, rest, 2 * count))
    return cluster.counts


def measure(report: Report, sizes: tuple[tuple[int, int], ...], pods_per_node: float, seed: int) -> None:
    """Run each variant on clusters of each size."""
    for node_count, model_count in sizes:
        load = load_of(seed, node_count, model_count, pods_per_node)
        rows = {}
        for variant in VARIANTS:
            counts = simulate(load, node_count, variant, seed)
            waits = summary(counts.waits_s)
            rows[variant.name] = {
                "starts": counts.starts,
                "pulls": counts.pulls,
                "pulled_bytes": counts.pulled_bytes,
                "from_origin": counts.from_origin,
                "from_disk": counts.from_disk,
                "no_room": counts.no_room,
                "wait_s": waits | {"mean": float(np.mean(counts.waits_s))},
            }
            at = f"{node_count}_{variant.name}"
            report.figures[f"pulled_mb_per_start_{at}"] = counts.pulled_bytes / counts.starts / 1e6
            report.figures[f"from_origin_percent_{at}"] = 100 * counts.from_origin / counts.starts
            report.figures[f"from_disk_percent_{at}"] = 100 * counts.from_disk / counts.starts
            report.figures[f"wait_mean_s_{at}"] = float(np.mean(counts.waits_s))
        report.raw[str(node_count)] = {
            "models": model_count,
            "model_bytes": int(load.sizes.sum()),
            "node_memory_bytes": MEMORY_BYTES,
            "node_disk_bytes": DISK_BYTES,
            "simulated_s": load.end_s,
            "variants": rows,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller clusters for a shorter time; ends within 60 s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", metavar="PATH", help="write the figures there; '-': to standard output, and nothing else")
    chosen = parser.parse_args()
    report = Report("cluster_sim", chosen.quick)
    measure(report, *((QUICK_SIZES, 10.0) if chosen.quick else (SIZES, 40.0)), chosen.seed)
    report.finish(chosen.json)


if __name__ == "__main__":
    main()
