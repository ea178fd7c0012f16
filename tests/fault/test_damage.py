"""Rows of the matrix: bundles that were damaged on their way, and weights that the disk has altered since."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trunkline.client import Model
from trunkline.errors import ModelCorrupt

from sidecar.bundle import blob_path, read_bundle, write_bundle
from sidecar.export import convert
from tests.fault.matrix import Neighbour, Row, pool_at
from tests.fault.test_bundles import Pushing
from tests.sidecar_process import SidecarProcess

DAMAGES = 500
FLIPS = 100
STEP_BYTES = 1024


class Layers(nn.Module):
    """Two weights, 32 kB each, that its answer shows every bit of."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.one, self.other = (nn.Parameter(torch.randn(8, 1024, generator=generator)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x * self.one, x * self.other], 1)


def layers(folder: Path, seed: int) -> Path:
    made = convert(Layers(seed), (torch.ones(8, 1024),), name="layers", batch=None)
    write_bundle(folder, made.bundle, made.blobs)
    return folder


def right(seed: int) -> np.ndarray:
    with torch.no_grad():
        return Layers(seed)(torch.ones(8, 1024)).numpy()


@pytest.mark.row("F18")
def test_a_damaged_bundle_is_refused_and_the_old_version_serves(row: Row, steady: SidecarProcess, tmp_path: Path) -> None:
    """Bits flipped at every kilobyte, files cut off, one in the place of another; sent past our own client's checks."""
    steady.admin.push(layers(tmp_path / "old", 1))
    folder = layers(tmp_path / "new", 2)
    bundle, draw, sent = read_bundle(folder), random.Random(5), Pushing(steady)
    manifest, graph = ((folder / name).read_bytes() for name in ("manifest.json", "graph.json"))
    blobs = {weight.digest: blob_path(folder, weight.digest).read_bytes() for weight in bundle.graph.weights}
    pool = pool_at(steady.socket)
    served, expected = Model("layers", pool), right(1)

    def flipped(content: bytes, offset: int) -> bytes:
        return content[:offset] + bytes([content[offset] ^ 1 << draw.randrange(8)]) + content[offset + 1 :]

    def model(manifest: bytes, graph: bytes) -> int:
        body = b'{"manifest":' + manifest + b',"graph":' + graph + b"}"
        return sent.raw("models/layers", body).status_code

    def blob(digest: str, content: bytes) -> int:
        return sent.raw(f"blobs/{digest}", content, "application/octet-stream").status_code

    damages: list[Callable[[], int]] = []
    for digest, content in blobs.items():
        others = [each for each in blobs if each != digest]
        for offset in range(0, len(content), STEP_BYTES):
            damages.append(lambda d=digest, c=content, o=offset: blob(d, flipped(c, o)))
            damages.append(lambda d=digest, c=content, o=offset: blob(d, c[:o]))
            damages.append(lambda d=digest, c=content, o=offset: blob(d, c + c[: o + 1]))
        damages.append(lambda other=others[0], c=content: blob(other, c))
    while len(damages) < row.count(DAMAGES):
        spot = draw.randrange(len(graph))
        damages.append(lambda o=spot: model(manifest, flipped(graph, o)))
        damages.append(lambda o=spot: model(manifest, graph[:o]))
        spot = draw.randrange(len(manifest))
        damages.append(lambda o=spot: model(flipped(manifest, o), graph))
    # The weights of the new one never came whole: it is refused for that, at the latest.
    damages.append(lambda: model(manifest, graph))
    with Neighbour(row, steady.socket):
        for number, damage in enumerate(damages):
            row.attempts += 1
            assert damage() in (400, 409, 422)
            if number % 10 == 0:
                row.answered += 1
                row.wrong += not np.array_equal(served(np.ones((8, 1024), np.float32)), expected)
        # Whole, it is taken.
        steady.admin.push(folder)
        assert np.array_equal(served(np.ones((8, 1024), np.float32)), right(2))
    pool.close()
    sent.close()
    steady.admin.delete("models/layers")


@pytest.mark.row("F19")
def test_a_weight_that_the_disk_has_altered_is_never_computed_with(row: Row, mortal: SidecarProcess, tmp_path: Path) -> None:
    """Whatever is flipped on disk of a model that is not in memory, its caller gets the right answer or an error."""
    folder, expected, x = layers(tmp_path / "bundle", 3), right(3), np.ones((8, 1024), np.float32)
    mortal.admin.push(folder)
    draw, pool = random.Random(6), pool_at(mortal.socket)
    model = Model("layers", pool)
    outcomes = {"answered": 0, "corrupt": 0}
    with Neighbour(row, mortal.socket):
        for number in range(row.count(FLIPS)):
            mortal.admin.post("models/layers/evict")
            digests = [weight.digest for weight in read_bundle(folder).graph.weights]
            files = [mortal.store_dir / "blobs" / digest[:2] / digest for digest in digests]
            files = [path for path in files if path.exists()]
            if number % 2:
                files = list((mortal.store_dir / "blocks").glob("*.block")) or files
            path = draw.choice(files)
            flip(path, draw.randrange(path.stat().st_size), draw.randrange(8))
            row.attempts += 1
            try:
                answer: Any = model.call({"x": x}, deadline_s=30.0)
            except ModelCorrupt:
                outcomes["corrupt"] += 1
                # That is how it is healed.
                mortal.admin.push(folder)
                continue
            outcomes["answered"] += 1
            row.answered += 1
            row.wrong += not np.array_equal(answer, expected)
    pool.close()
    assert all(outcomes.values()), outcomes
    assert list((mortal.store_dir / "quarantine").rglob("?" * 64))


def flip(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (found,) = file.read(1)
        file.seek(offset)
        file.write(bytes([found ^ 1 << bit]))
