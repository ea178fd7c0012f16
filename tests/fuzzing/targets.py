"""What strangers' bytes are first read by, as functions of bytes: each takes anything, and raises what must not be.

They are given what is in ``tests/corpus``, and mutants of it, by ``tests/fault/test_fuzzing.py``; and, guided by which lines have
been reached, by ``python -m tests.fuzzing``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgpack
from trunkline import protocol
from trunkline.errors import FrameTooLarge, InvalidInput, MalformedFrame, SignatureMismatch, UnsupportedTensor
from trunkline.protocol import Coder, TensorSpec
from trunkline.signature import Signature

from sidecar import openinference
from sidecar.bundle import FORMAT, MAX_MANIFEST_BYTES, parse_bundle, parse_manifest
from sidecar.errors import BundleError
from sidecar.graphfile import DIGEST, graph_digest, parse_graph
from sidecar.strictjson import encode_json, load_json

CORPUS: Final = Path(__file__).resolve().parents[1] / "corpus"

# What a connection has carried before: its end is remembered. Mutants are made of these, too, and many end alike.
_BEFORE: Final = [(CORPUS / "frames" / name).read_bytes() for name in ("infer", "traced-infer", "result")]
_SIGNATURE: Final = Signature(
    model="embed",
    version="1",
    inputs=(TensorSpec("ids", "int64", ("batch", "tokens"), 0, 99), TensorSpec("mask", "float32", ("batch", 4))),
    outputs=(TensorSpec("y", "float32", ("batch", 8)),),
    symbols={"batch": (1, 8), "tokens": (1, 16)},
)


def frames(data: bytes) -> None:
    """A message of the wire: refused, or read alike by every decoder there is; and what was read can be sent again."""
    try:
        message = protocol.decode(data)
    except (FrameTooLarge, MalformedFrame) as error:
        expected = repr(type(error))
    else:
        expected = repr(message)
        try:
            again = protocol.encode(message)
        except FrameTooLarge:
            again = data
        # Numbers that are none are not equal to themselves.
        assert repr(protocol.decode(again)) == expected
        assert len(msgpack.unpackb(again)) == len(msgpack.unpackb(data)), "a field was passed over"
    for before in _BEFORE:
        coder = Coder()
        coder.decode(before)
        # Twice: the second time it may go by what it has kept of the first.
        for _ in range(2):
            try:
                found = repr(coder.decode(data))
            except (FrameTooLarge, MalformedFrame) as error:
                found = repr(type(error))
            assert found == expected
        assert coder.decode(before) == protocol.decode(before)


def texts(data: bytes) -> None:
    """JSON: refused, or what the standard library reads; what it takes for equal keys or for numbers, it may take alone."""
    try:
        plain = load_json(data, "a text", MAX_MANIFEST_BYTES)
    except BundleError as error:
        _one_line(error)
        return
    assert repr(plain) == repr(json.loads(data))
    assert repr(json.loads(encode_json(plain))) == repr(json.loads(json.dumps(plain, sort_keys=True)))


def manifests(data: bytes) -> None:
    """``manifest.json``: refused, or names that lead nowhere."""
    try:
        manifest = parse_manifest(data)
    except BundleError as error:
        _one_line(error)
        return
    for name in (manifest.name, manifest.version):
        assert "/" not in name
        assert ".." not in name or name is manifest.version
        assert name.isascii()
        assert name.isprintable()
    assert len(manifest.graph_digest) == 64
    assert 0 <= manifest.tolerance <= 1


def graphs(data: bytes) -> None:
    """``graph.json``: refused, or a graph that refers to nothing but what it has, in a bundle of its own."""
    try:
        graph = parse_graph(data)
    except BundleError as error:
        _one_line(error)
        return
    for weight in graph.weights:
        assert DIGEST.fullmatch(weight.digest)
        assert 0 <= weight.size_bytes == math.prod(weight.shape) * protocol.ITEM_BYTES.get(weight.dtype, 2)
    digest = graph_digest(graph)
    fields = {"format": FORMAT, "name": "m", "version": "1", "batch": None, "tolerance": 0, "created": {}}
    manifest = encode_json(fields | {"graph": digest})
    try:
        bundle = parse_bundle(manifest, data)
    except BundleError as error:
        # Another text of the same graph.
        assert error.message.startswith(("manifest.json: graph", "graph.json")), error.message
    else:
        assert bundle.graph_digest == digest


def inferences(data: bytes) -> None:
    """The body of a request over HTTP, here with a line feed between JSON and raw bytes: refused, or what the model takes."""
    text, _, raw = data.partition(b"\n")
    try:
        length = openinference.json_length(str(len(text)), len(text) + len(raw))
        inference = openinference.decode(text + raw, length, _SIGNATURE)
    except (InvalidInput, SignatureMismatch, UnsupportedTensor) as error:
        _one_line(error)
        return
    sizes = {len(array) for array in inference.inputs.values()}
    assert inference.inputs.keys() == {"ids", "mask"}
    assert len(sizes) == 1
    assert 1 <= sizes.pop() <= 8


def _one_line(error: BundleError | InvalidInput | SignatureMismatch | UnsupportedTensor) -> None:
    """Whatever a stranger wrote, what is said of it is short."""
    assert error.message
    assert len(error.message) < 1000


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    target.__name__: target for target in (frames, texts, manifests, graphs, inferences)
}


def corpus(name: str) -> list[bytes]:
    """Return what there is to begin with, in an order that is always the same."""
    return [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
