"""Small bundles made by hand, without torch: y = x + weight."""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

import numpy as np
from trunkline.protocol import TensorSpec

from sidecar.bundle import Bundle, Graph, Node, Symbol, Value, Weight, graph_digest, write_bundle


def adding_bundle(name: str, values: list[float], version: str = "1") -> tuple[Bundle, dict[str, bytes]]:
    """Return a bundle that adds ``values`` to its input, and its blobs by digest."""
    content = np.asarray(values, np.float32).tobytes()
    digest = hashlib.sha256(content).hexdigest()
    width = len(values)
    graph = Graph(
        symbols=(Symbol("batch", 1, 8),),
        inputs=(TensorSpec("x", "float32", ("batch", width)),),
        outputs=(TensorSpec("y", "float32", ("batch", width)),),
        weights=(Weight(digest, "float32", (width,), len(content), zlib.crc32(content)),),
        nodes=(Node("aten.add.Tensor", (Value("input", 0), Value("weight", 0))),),
        results=(Value("node", 0),),
    )
    return Bundle(name, version, graph, graph_digest(graph), "batch", 1e-4, {}), {digest: content}


def write_adding_bundle(folder: Path, name: str, values: list[float]) -> Bundle:
    """Write such a bundle to a folder."""
    bundle, blobs = adding_bundle(name, values)
    write_bundle(folder, bundle, blobs.items())
    return bundle
