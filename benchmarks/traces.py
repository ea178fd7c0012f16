"""Traces: which models were asked for, in which order, and which weights they have. Generated from a seed, or recorded.

A generated trace is one of a *workload* (who is asked when) over a *fleet* (who shares what with whom). Sizes are those of common
networks, in units of 64 kB, so that a simulated run takes seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_UNIT_BYTES = 64 << 10

Models = dict[str, dict[str, int]]
Asked = list[tuple[str, ...]]


@dataclass(frozen=True)
class Trace:
    """Requests in order, each for one or several models; sizes in bytes by weight, in order of use, for each model."""

    name: str
    models: Models
    asked: Asked

    @property
    def unique_bytes(self) -> int:
        """Bytes of all models, each weight once."""
        return sum({digest: size for weights in self.models.values() for digest, size in weights.items()}.values())

    @property
    def largest_bytes(self) -> int:
        """Bytes that the largest request needs at once."""
        return max(
            sum({digest: size for model in models for digest, size in self.models[model].items()}.values())
            for models in set(self.asked)
        )

    def unshared(self) -> Trace:
        """Return the same requests for models that have no weight in common, as whoever holds whole models sees them."""
        models = {
            model: {f"{model}/{digest}": size for digest, size in weights.items()} for model, weights in self.models.items()
        }
        return Trace(self.name, models, self.asked)


# --- fleets: who shares what ------------------------------------------------------------------------------------------


def _layers(draw: np.random.Generator, name: str, count: int, size_bytes: float) -> dict[str, int]:
    """Return weights as networks have them: large ones, each followed by a small one (a bias, a norm)."""
    shares = draw.dirichlet(np.full(count, 4.0))
    weights = {}
    for number, share in enumerate(shares):
        weights[f"{name}.{number}.weight"] = max(_UNIT_BYTES, int(share * size_bytes))
        weights[f"{name}.{number}.bias"] = 4096
    return weights


def private_fleet(draw: np.random.Generator, count: int) -> Models:
    """Models of 20 to 400 MB that have nothing in common."""
    return {
        f"private{number:03}": _layers(draw, f"private{number}", int(draw.integers(10, 40)), float(draw.uniform(20e6, 400e6)))
        for number in range(count)
    }


def sibling_fleet(draw: np.random.Generator, count: int, siblings: int = 8) -> Models:
    """Families on one trunk of 100 to 400 MB; each member has a head, 2 % of it, and half of them tuned last layers, 20 %."""
    models: Models = {}
    for number in range(count):
        family = number // siblings
        if number % siblings == 0:
            trunk_bytes = float(draw.uniform(100e6, 400e6))
            trunk = _layers(draw, f"trunk{family}", 24, trunk_bytes)
        kept = dict(list(trunk.items())[: len(trunk) if number % 2 else int(0.8 * len(trunk))])
        own = {key: size for key, size in trunk.items() if key not in kept}
        tuned = {f"tuned{number}.{key}": size for key, size in own.items()}
        models[f"sibling{number:03}"] = kept | tuned | _layers(draw, f"head{number}", 2, 0.02 * trunk_bytes)
    return models


def mixed_fleet(draw: np.random.Generator, count: int) -> Models:
    """Half siblings, half private."""
    return sibling_fleet(draw, count // 2) | private_fleet(draw, count - count // 2)


# --- workloads: who is asked when -------------------------------------------------------------------------------------


def zipf(draw: np.random.Generator, names: list[str], length: int) -> Asked:
    """Independent requests, popularity as 1 / rank^1.1."""
    popularity = _popularity(len(names), 1.1)
    order = draw.permutation(names)
    return [(str(order[index]),) for index in draw.choice(len(names), length, p=popularity)]


def drift(draw: np.random.Generator, names: list[str], length: int) -> Asked:
    """Zipf whose ranks are drawn anew eight times: what was popular is not any more."""
    return [asked for _ in range(8) for asked in zipf(draw, names, length // 8)]


def burst(draw: np.random.Generator, names: list[str], length: int) -> Asked:
    """Runs of 5 to 50 requests among three models, then three others; functions that wake up, work, and sleep."""
    asked: Asked = []
    while len(asked) < length:
        awake = draw.choice(names, 3, replace=False)
        asked += [(str(name),) for name in draw.choice(awake, int(draw.integers(5, 50)))]
    return asked[:length]


def fan_out(draw: np.random.Generator, names: list[str], length: int) -> Asked:
    """Requests that touch two to four neighbours at once; which ones, by zipf."""
    starts = draw.choice(len(names), length, p=_popularity(len(names), 1.0))
    counts = draw.integers(2, 5, length)
    return [
        tuple(sorted({names[(start + each) % len(names)] for each in range(count)}))
        for start, count in zip(starts.tolist(), counts.tolist(), strict=True)
    ]


def scan(draw: np.random.Generator, names: list[str], length: int) -> Asked:
    """All models in turn, again and again."""
    return [(names[number % len(names)],) for number in range(length)]


def zipf_and_scan(draw: np.random.Generator, names: list[str], length: int) -> Asked:
    """Zipf, and after every 200 requests one pass over all models, as of a nightly job."""
    asked: Asked = []
    for piece in range(0, length, 200):
        asked += zipf(np.random.default_rng(7), names, length)[piece : piece + 200]
        asked += [(name,) for name in names]
    return asked[:length]


def _popularity(count: int, exponent: float) -> np.ndarray:
    weights = 1.0 / np.arange(1, count + 1) ** exponent
    return weights / weights.sum()


FLEETS: dict[str, Callable[[np.random.Generator, int], Models]] = {
    "private": private_fleet,
    "siblings": sibling_fleet,
    "mixed": mixed_fleet,
}
WORKLOADS: dict[str, Callable[[np.random.Generator, list[str], int], Asked]] = {
    "zipf": zipf,
    "drift": drift,
    "burst": burst,
    "fan_out": fan_out,
    "scan": scan,
    "zipf_and_scan": zipf_and_scan,
}


def generated(seed: int, model_count: int, length: int) -> Iterator[Trace]:
    """Yield every workload over every fleet."""
    for fleet, models_of in FLEETS.items():
        for workload, asked_of in WORKLOADS.items():
            draw = np.random.default_rng([seed, sorted(FLEETS).index(fleet), sorted(WORKLOADS).index(workload)])
            models = models_of(draw, model_count)
            yield Trace(f"{workload}_{fleet}", models, asked_of(draw, list(models), length))


def recorded(path: Path) -> Trace:
    """Return what ``trunkline trace`` has written."""
    with path.open(encoding="utf-8") as file:
        header = json.loads(next(file))
        asked = [tuple(json.loads(line)["models"]) for line in file]
    sizes = header["weights"]
    models = {model: {str(number): sizes[number] for number in numbers} for model, numbers in header["models"].items()}
    return Trace(path.stem, models, asked)
