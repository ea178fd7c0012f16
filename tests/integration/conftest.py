"""A server in this process, with four models, as the tests of client and server together need it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from trunkline import client
from trunkline.protocol import TensorSpec

from tests.fakes import FakeSource, Running, bundle_of, running_server
from tests.forms import prefer
from tests.nodes import Node

TRUNK = b"t" * 100


@pytest.fixture(autouse=True)
def nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the models that other tests have named in this process: they would be loaded ahead."""
    monkeypatch.setattr(client._pool, "_models", ())


@pytest.fixture
def source() -> FakeSource:
    made = FakeSource()
    for name in ("age", "gender"):
        contents = [TRUNK, name.encode()]
        made.put(bundle_of(name, contents), contents)
    bounded = (TensorSpec("ids", "int64", ("batch", "sequence"), 0, 99),)
    made.put(bundle_of("text", [b"x"], inputs=bounded, outputs=(TensorSpec("y", "int64", ("batch", "?")),)), [b"x"])
    pair = (TensorSpec("y", "float32", ("batch", 3)), TensorSpec("z", "float32", ("batch", 3)))
    made.put(bundle_of("pair", [b"p"], outputs=pair), [b"p"])
    return made


@pytest.fixture(params=["sealed", "copy"])
def running(
    request: pytest.FixtureRequest, tmp_path: Path, source: FakeSource, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    with running_server(tmp_path, source, transport=request.param) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        yield made
        client._pool.close()


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Node]:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    # What fits into a budget is not for a clock to decide.
    prefer(monkeypatch, "blocked", "packed")
    made = Node(tmp_path)
    yield made
    client._pool.close()
    made.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for sockets. Not pytest's own: the path of a socket has at most 107 characters."""
    made = Path(tempfile.mkdtemp(prefix="trunkline-"))
    yield made
    shutil.rmtree(made)
