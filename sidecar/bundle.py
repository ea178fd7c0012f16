"""The bundle: what a publisher makes and a node loads. Data only, read strictly.

A bundle is a folder with ``manifest.json`` (who and which), ``graph.json`` (what is computed) and ``blobs/<sha256>``
(raw little-endian contiguous bytes of one weight each). Nothing in it is evaluated, imported or unpickled.
Pure functions, and two that touch one given folder; callable from any thread. Must not import torch.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trunkline.protocol import TensorSpec

from sidecar.errors import BundleError
from sidecar.graphfile import (
    DIGEST,
    KEYWORD,
    MAX_ARGUMENT_COUNT,
    MAX_GRAPH_BYTES,
    SYMBOL,
    canonical_graph,
    graph_digest,
    parse_graph,
)
from sidecar.ir import Graph, Node, Symbol, Value, Weight, model_bytes
from sidecar.strictjson import choice, encode_json, load_json, members, printable, refuse, shown, text

__all__ = [
    "MODEL_NAME",
    "VERSION",
    "Bundle",
    "Graph",
    "Manifest",
    "Node",
    "Symbol",
    "TensorSpec",
    "Value",
    "Weight",
    "blob_path",
    "canonical_graph",
    "graph_digest",
    "manifest_bytes",
    "model_bytes",
    "parse_bundle",
    "parse_graph",
    "parse_manifest",
    "read_bundle",
    "write_bundle",
]

FORMAT = "trunkline-bundle-1"
MAX_MANIFEST_BYTES = 1 << 20

MODEL_NAME = re.compile(r"(?!.*\.\.)[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?")
VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")


@dataclass(frozen=True)
class Manifest:
    """``manifest.json``: the names around a graph. ``graph_digest`` ties it to one ``graph.json``."""

    name: str
    version: str
    graph_digest: str
    batch: str | None
    tolerance: float
    created: dict[str, str]


@dataclass(frozen=True)
class Bundle:
    """A model as it is stored and served.

    ``batch`` names the symbol that is axis 0 of every input, None where the batch size is fixed. ``tolerance`` is the
    largest difference from the original model, relative to the scale of the output, that conversion accepted.
    ``created`` holds versions and figures for people.
    """

    name: str
    version: str
    graph: Graph
    graph_digest: str
    batch: str | None
    tolerance: float
    created: dict[str, str]


def manifest_bytes(bundle: Bundle) -> bytes:
    """Return the text of ``manifest.json``."""
    return encode_json(
        {
            "format": FORMAT,
            "name": bundle.name,
            "version": bundle.version,
            "graph": bundle.graph_digest,
            "batch": bundle.batch,
            "tolerance": bundle.tolerance,
            "created": bundle.created,
        }
    )


def parse_manifest(data: bytes) -> Manifest:
    """Read the bytes of ``manifest.json``. Raises ``BundleError`` naming the place of the first thing that is wrong."""
    fields = members(
        load_json(data, "manifest.json", MAX_MANIFEST_BYTES),
        "manifest.json",
        ("format", "name", "version", "graph", "batch", "tolerance", "created"),
    )
    choice(fields["format"], "manifest.json: format", (FORMAT,))
    tolerance = fields["tolerance"]
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance <= 1:
        refuse("manifest.json: tolerance", f"must be a number between 0 and 1, not {shown(tolerance)}")
    created = fields["created"]
    if not isinstance(created, dict) or len(created) > MAX_ARGUMENT_COUNT:
        refuse("manifest.json: created", f"must be an object of at most {MAX_ARGUMENT_COUNT} strings")
    return Manifest(
        name=text(fields["name"], "manifest.json: name", MODEL_NAME),
        version=text(fields["version"], "manifest.json: version", VERSION),
        graph_digest=text(fields["graph"], "manifest.json: graph", DIGEST),
        batch=None if fields["batch"] is None else text(fields["batch"], "manifest.json: batch", SYMBOL),
        tolerance=float(tolerance),
        created={
            text(key, "manifest.json: created", KEYWORD): printable(value, f"manifest.json: created.{key}", 200)
            for key, value in created.items()
        },
    )


def parse_bundle(manifest_data: bytes, graph_data: bytes) -> Bundle:
    """Read both files and check that they belong together.

    ``graph_data`` must be the canonical text, so that equal graphs have equal digests. Raises ``BundleError``.
    """
    manifest = parse_manifest(manifest_data)
    graph = parse_graph(graph_data)
    actual = hashlib.sha256(graph_data).hexdigest()
    if actual != manifest.graph_digest:
        refuse("manifest.json: graph", f"names digest {manifest.graph_digest}, graph.json has {actual}")
    if canonical_graph(graph) != graph_data:
        refuse("graph.json", "is not in canonical form")
    if manifest.batch is not None:
        for spec in graph.inputs:
            if not spec.shape or spec.shape[0] != manifest.batch:
                refuse("manifest.json: batch", f"axis 0 of input {spec.name!r} is not {manifest.batch!r}")
    return Bundle(
        name=manifest.name,
        version=manifest.version,
        graph=graph,
        graph_digest=actual,
        batch=manifest.batch,
        tolerance=manifest.tolerance,
        created=manifest.created,
    )


def blob_path(directory: Path, digest: str) -> Path:
    """Return where a bundle folder keeps the bytes of one weight."""
    return directory / "blobs" / digest


def _read_capped(path: Path, limit_bytes: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(limit_bytes + 1)  # one more than allowed, so that the parser sees the excess
    except OSError as error:
        raise BundleError(f"{path.name}: cannot be read: {error.strerror}", place=path.name) from error


def read_bundle(directory: Path) -> Bundle:
    """Read a bundle folder. Raises ``BundleError`` when a file is missing, altered or of the wrong size.

    The contents of the blobs are not read here: whoever stores them checks their digests while streaming.
    """
    bundle = parse_bundle(
        _read_capped(directory / "manifest.json", MAX_MANIFEST_BYTES),
        _read_capped(directory / "graph.json", MAX_GRAPH_BYTES),
    )
    for weight in bundle.graph.weights:
        place = f"blobs/{weight.digest}"
        try:
            size_bytes = blob_path(directory, weight.digest).stat().st_size
        except OSError as error:
            raise BundleError(f"{place}: cannot be read: {error.strerror}", place=place) from error
        if size_bytes != weight.size_bytes:
            refuse(place, f"is {size_bytes} bytes long, its weight needs {weight.size_bytes}")
    return bundle


def write_bundle(directory: Path, bundle: Bundle, blobs: Iterable[tuple[str, bytes | bytearray | memoryview]]) -> None:
    """Write a bundle folder, replacing a bundle that is already there.

    ``blobs`` yields (digest, bytes) for every weight; a digest may come twice. The manifest is removed first and
    written last, so a folder whose writing was interrupted does not read as a bundle. Raises ``BundleError`` when bytes
    and digest disagree or a weight is missing, ``OSError`` when the disk refuses.
    """
    wanted = {weight.digest for weight in bundle.graph.weights}
    folder = directory / "blobs"
    folder.mkdir(parents=True, exist_ok=True)
    (directory / "manifest.json").unlink(missing_ok=True)
    for path in folder.iterdir():  # of the bundle that was here before
        if DIGEST.fullmatch(path.name) and path.name not in wanted:
            path.unlink()
    written: set[str] = set()
    for digest, content in blobs:
        if hashlib.sha256(content).hexdigest() != digest:
            refuse(f"blobs/{digest}", "bytes and digest disagree")
        if digest in wanted and digest not in written:
            _replace(blob_path(directory, digest), content)
            written.add(digest)
    if written != wanted:
        refuse("blobs", f"{len(wanted - written)} of {len(wanted)} weights are missing")
    _replace(directory / "graph.json", canonical_graph(bundle.graph))
    _replace(directory / "manifest.json", manifest_bytes(bundle))


def _replace(path: Path, content: bytes | bytearray | memoryview) -> None:
    temporary = path.with_name(f"{path.name}.part")
    temporary.write_bytes(content)
    os.replace(temporary, path)
