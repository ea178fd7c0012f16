"""A model that fails for some of its rows: it looks up what it computes of its inputs, in a table that ends."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

TABLE = 40
# Of the table that ``Looked`` has: half of it, because it looks up twice what it is given.
BAD = (-1, TABLE // 2, 1 << 31, (1 << 62) - 1, (1 << 63) - 1)


class Looked(nn.Module):
    """Looks up twice what it is given; 2^63-1 twice is -2, which is no row either."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding.from_pretrained(torch.arange(TABLE * 3.0).reshape(TABLE, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table(ids * 2).sum(1)


def right(ids: np.ndarray) -> np.ndarray:
    return np.arange(TABLE * 3, dtype=np.float32).reshape(TABLE, 3)[ids * 2].sum(1)
