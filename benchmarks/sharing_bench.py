"""What `benchmarks.sharing` measures on: the models its rows have in common, and how much one run does."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.harness import interleaved
from benchmarks.models import encoder, resnet
from benchmarks.report import Report, summary
from benchmarks.siblings import Family
from benchmarks.variants import AT_ONCE, Call, VariantBench


@dataclass(frozen=True)
class Scale:
    """How much one run does. ``rounds`` are repetitions of what takes as long as eight models, ``count`` of single calls."""

    side: int
    unrelated_widths: tuple[int, ...]
    heads: tuple[int, ...]
    tuned_units: tuple[int, ...]
    rounds: int
    count: int


QUICK = Scale(side=64, unrelated_widths=(20,), heads=(8, 16), tuned_units=(0, 2), rounds=3, count=20)
FULL = Scale(
    side=224,
    unrelated_widths=(16, 24, 32, 20, 40, 28, 48),
    heads=(4, 8, 16, 64),
    tuned_units=(0, 1, 2, 4, 9),
    rounds=8,
    count=60,
)


class Sharing(VariantBench):
    """The rows of this benchmark, and the models they have in common."""

    def __init__(self, report: Report, seed: int) -> None:
        super().__init__(report, seed)
        self.scale = QUICK if report.quick else FULL
        image = torch.zeros(1, 3, self.scale.side, self.scale.side)
        self.architecture = "resnet10_narrow" if report.quick else "resnet18"
        self.images = Family(resnet(16, 1) if report.quick else resnet(), image, seed)
        layers, width = (2, 128) if report.quick else (6, 768)
        self.texts = self.encoder_family(width, width // 64, layers, 16)
        self.heads = {f"head{number}": self.images.with_head(seed + 1 + number) for number in range(max(self.scale.heads))}

    def encoder_family(self, width: int, heads: int, layers: int, tokens: int) -> Family:
        """Convert a transformer encoder."""
        model = encoder(width, heads, layers, tokens)
        return Family(model, torch.zeros(1, tokens, dtype=torch.int64), self.seed, {"x": (0, 8191)})

    def timed(self, section: str, variants: dict[str, Call], models: int = 1, rest_s: float = 0.0) -> dict[str, float]:
        """Time variants in turns, keep their summaries under ``section``, return their medians in microseconds.

        ``models`` are run by one call of each; the more they are, the fewer calls are made.
        """
        if models == 1:
            times = interleaved(variants, self.scale.count, block=5, rest_s=rest_s)
        else:
            times = interleaved(variants, max(3, round(min(2, AT_ONCE / models) * self.scale.rounds)), block=1, warm=1)
        summaries = {name: summary(samples) for name, samples in times.items()}
        self.report.raw.setdefault("us", {})[section] = summaries
        return {name: each["median"] for name, each in summaries.items()}

    def evict_all(self) -> None:
        """Empty the memory of the sidecar with everything on."""
        for model in self.on.admin.get("models")["models"]:
            self.on.admin.post(f"models/{model['name']}/evict")


def geometric_mean(ratios: Iterable[float]) -> float:
    """Return the geometric mean."""
    return math.exp(float(np.mean(np.log(list(ratios)))))
