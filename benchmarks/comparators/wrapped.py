"""Comparator C: several models wrapped into one traced torch graph, as FusedInf does it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Wrapped(nn.Module):
    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(model(x) for model in self.models)


def wrapped(models: Sequence[nn.Module], example: Tensor, frozen: bool) -> Any:
    """Return one traced graph that gives every model's output for one input.

    ``frozen`` has torch fold what it can: norms into convolutions, weights into constants.
    """
    with torch.inference_mode():
        traced = torch.jit.trace(_Wrapped(models).eval(), (example,), check_trace=False)
        graph = torch.jit.freeze(traced) if frozen else traced
        for _ in range(3):
            graph(example)  # torch looks at the first runs and optimises
        return graph
