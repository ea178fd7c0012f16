"""A row of the threat table: weights that are not what a model says of them, given to a real sidecar in every way there is.

A weight is one blob, known by its digest, with a size, a checksum, a dtype and a shape: there are no offsets, so none overlap.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline.client import Model
from trunkline.errors import ModelCorrupt, TrunklineError

from sidecar.bundle import read_bundle
from tests.fault.matrix import Neighbour, Row, pool_at
from tests.sidecar_process import SidecarProcess

Plain = dict[str, Any]
TIMES = 20
# A blob that no model has: as long as the weight of the model that serves.
OTHER = bytes(range(100, 132))
DIGEST = hashlib.sha256(OTHER).hexdigest()


def weight(**changes: object) -> Callable[[Plain], None]:
    """Return a change of the only weight."""
    return lambda graph: graph["weights"][0].update(changes)


def again(**changes: object) -> Callable[[Plain], None]:
    """Return a change that has the weight a second time, with a difference."""
    return lambda graph: graph["weights"].append(graph["weights"][0] | changes)


# What is said of weights, and the beginning of what is wrong with it.
SAID: dict[str, tuple[Callable[[Plain], None], str]] = {
    "a size that shape and dtype do not give": (weight(size_bytes=31), "size_bytes"),
    "a shape beyond the blob": (weight(shape=[16]), "size_bytes"),
    "a shape and a size beyond the blob": (weight(shape=[16], size_bytes=64), "its blob has 32"),
    "a shape and a size within the blob": (weight(shape=[4], size_bytes=16), "its blob has 32"),
    "nothing, of a blob that has something": (weight(shape=[0], size_bytes=0), "its blob has 32"),
    "a shape whose bytes overflow": (weight(shape=[1 << 31, 1 << 31, 4]), "shape"),
    "a shape below nothing": (weight(shape=[-8], size_bytes=-32), "shape"),
    "a dtype that holds objects": (weight(dtype="object"), "dtype"),
    "a digest that is a path": (weight(digest="../../../etc/passwd"), "digest"),
    "a digest in capitals": (weight(digest="A" * 64), "digest"),
    "a digest that nobody has sent": (weight(digest="0" * 64), "not in the store"),
    "an offset": (weight(offset=16), "unknown field"),
    "the same weight with another checksum": (again(crc32=1), "checksum differs"),
    "the same weight with another size": (again(shape=[4], size_bytes=16), "size or checksum differs"),
    "a checksum of more than 32 bits": (weight(crc32=1 << 32), "crc32"),
}

# What is sent as a blob, under which digest, and how the refusal is called.
SENT: dict[str, tuple[bytes, str]] = {
    "too few bytes": (OTHER[:-1], DIGEST),
    "bytes behind the end": (OTHER + b"!", DIGEST),
    "other bytes": (bytes([OTHER[0] ^ 1]) + OTHER[1:], DIGEST),
    "nothing": (b"", DIGEST),
    "a digest that is a path": (OTHER, "..%2f..%2fmodels%2fscaled"),
    "a digest in capitals": (OTHER, DIGEST.upper()),
    "a digest that is cut off": (OTHER, DIGEST[:-1]),
}


@pytest.fixture(scope="module")
def graph(scaled: Path) -> Plain:
    found: Plain = json.loads((scaled / "graph.json").read_bytes())
    return found


def push(box: SidecarProcess, scaled: Path, graph: Plain) -> None:
    """Push a model with this graph, whose manifest is right about its digest. Raises what it is refused with."""
    text = json.dumps(graph, sort_keys=True, separators=(",", ":")).encode()
    manifest = json.loads((scaled / "manifest.json").read_bytes())
    manifest |= {"name": "evil", "graph": hashlib.sha256(text).hexdigest()}
    box.admin.put("models/evil", {"manifest": manifest, "graph": graph})


def send(box: SidecarProcess, content: bytes, digest: str) -> None:
    box.admin._ask("PUT", f"blobs/{digest}", data=content, headers={"Content-Type": "application/octet-stream"})


def names(box: SidecarProcess) -> list[str]:
    return [each["name"] for each in box.admin.get("models")["models"]]


@pytest.mark.row("T11")
def test_what_is_said_of_a_weight_must_be_so(row: Row, steady: SidecarProcess, scaled: Path, graph: Plain) -> None:
    with Neighbour(row, steady.socket):
        for _ in range(row.count(TIMES)):
            for what, (change, problem) in SAID.items():
                row.attempts += 1
                changed = copy.deepcopy(graph)
                change(changed)
                with pytest.raises(TrunklineError) as refused:
                    push(steady, scaled, changed)
                assert problem in refused.value.message, f"{what}: {refused.value.message}"
                assert "evil" not in names(steady), what


@pytest.mark.row("T11")
def test_what_is_sent_must_be_what_it_is_called(row: Row, steady: SidecarProcess) -> None:
    with Neighbour(row, steady.socket):
        for _ in range(row.count(TIMES)):
            for what, (content, digest) in SENT.items():
                row.attempts += 1
                with pytest.raises(TrunklineError):
                    send(steady, content, digest)
                assert steady.admin.post("blobs/missing", {"digests": [DIGEST]})["missing"] == [DIGEST], what


@pytest.mark.row("T11")
def test_nothing_is_computed_with_what_the_model_says_is_something_else(
    row: Row, steady: SidecarProcess, scaled: Path, graph: Plain
) -> None:
    """The blob is what it is called, and the checksum that the model has for it is another: nobody can say who is right."""
    (known,) = read_bundle(scaled).graph.weights
    with Neighbour(row, steady.socket) as neighbour:
        for number in range(row.count(TIMES)):
            row.attempts += 1
            content = number.to_bytes(4, "little") * (known.size_bytes // 4)
            digest = hashlib.sha256(content).hexdigest()
            send(steady, content, digest)
            changed = copy.deepcopy(graph)
            weight(digest=digest, crc32=zlib.crc32(content) ^ 1)(changed)
            push(steady, scaled, changed)
            pool = pool_at(steady.socket)
            with pytest.raises(ModelCorrupt):
                Model("evil", pool).call({"x": np.ones((1, 8), np.float32)})
            pool.close()
            steady.admin.delete("models/evil")
        neighbour.await_answers()
