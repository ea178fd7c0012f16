"""Small bundles made by hand, without torch: y = x + weight."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from trunkline.protocol import TensorSpec

from sidecar.bundle import Bundle, Graph, Node, Symbol, Value, Weight, graph_digest, write_bundle


def adding_bundle(
    name: str,
    values: Sequence[float],
    version: str = "1",
    *,
    dtype: str = "float32",
    bounds: tuple[int | None, int | None] = (None, None),
) -> tuple[Bundle, dict[str, bytes]]:
    """Return a bundle that adds ``values`` to its input, whose values have ``bounds``, and its blobs by digest."""
    content = np.asarray(values, dtype).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    width = len(values)
    graph = Graph(
        symbols=(Symbol("batch", 1, 8),),
        inputs=(TensorSpec("x", dtype, ("batch", width), *bounds),),
        outputs=(TensorSpec("y", dtype, ("batch", width)),),
        weights=(Weight(digest, dtype, (width,), len(content), zlib.crc32(content)),),
        nodes=(Node("aten.add.Tensor", (Value("input", 0), Value("weight", 0))),),
        results=(Value("node", 0),),
    )
    return Bundle(name, version, graph, graph_digest(graph), "batch", 1e-4, {}), {digest: content}


def write_adding_bundle(folder: Path, name: str, values: Sequence[float], **more: Any) -> Bundle:
    """Write such a bundle to a folder."""
    bundle, blobs = adding_bundle(name, values, **more)
    write_bundle(folder, bundle, blobs.items())
    return bundle
