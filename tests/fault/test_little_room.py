"""Rows of the matrix: a sidecar whose shared memory, or whose disk, has 16 MiB, and who else writes there fills it."""

from __future__ import annotations

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline.client import Model
from trunkline.errors import DeviceFault

from sidecar.errors import StoreFull
from sidecar.jobs import ACTIVE
from sidecar.publishing import publish
from sidecar.segment import SHARED_MEMORY
from tests.bundles import write_adding_bundle
from tests.fault import circumstances
from tests.fault.launching import through
from tests.fault.matrix import Neighbour, Row, left, pool_at, settled
from tests.fault.matrix import held as held_of
from tests.origin_server import Handler, origin_server, write_chained_bundle
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, until

WIDTH = 1 << 18
# What somebody else writes.
FILLER = "of somebody else"


@contextlib.contextmanager
def in_little_room(folder: Path, monkeypatch: pytest.MonkeyPatch, room: Path, *flags: str) -> Iterator[SidecarProcess]:
    """Run a sidecar that has 16 MiB of file system in ``room``."""
    monkeypatch.setenv(circumstances.LITTLE, str(room))
    with sidecar_process(folder, *flags, through=through(circumstances.little_room)) as box:
        yield box


def as_seen_by(box: SidecarProcess, folder: Path) -> Path:
    """Return a folder as a sidecar sees it."""
    return Path(f"/proc/{box.process.pid}/root{folder}")


@contextlib.contextmanager
def filled(folder: Path) -> Iterator[None]:
    """Have no byte free where ``folder`` is."""
    path = folder / FILLER
    with path.open("wb") as file:
        # Somebody may write at the same time.
        while (room := os.statvfs(folder)).f_bavail:
            with contextlib.suppress(OSError):
                os.posix_fallocate(file.fileno(), path.stat().st_size, room.f_bavail * room.f_bsize)
    try:
        yield
    finally:
        path.unlink()


def pulled(box: SidecarProcess, source: str) -> dict[str, Any]:
    """Have a sidecar pull a model, and return the job when it has ended."""
    job = box.admin.post("pull", {"source": source})
    until(lambda: box.admin.get(f"jobs/{job['id']}")["state"] not in ACTIVE)
    return dict(box.admin.get(f"jobs/{job['id']}"))


def asks(model: Model, first: float) -> bool:
    """Say whether a model is served, and how it must be."""
    return bool((model(np.zeros((1, WIDTH), np.float32)) == first).all())


@pytest.mark.row("F15")
def test_shared_memory_that_somebody_else_fills_refuses_what_is_not_in_it(
    row: Row, tmp_path: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, first in (("one", 1.0), ("other", 2.0)):
        write_adding_bundle(tmp_path / name, name, [first] * WIDTH)
    # Room in the budget for either of the two, beside what the neighbour asks for.
    flags = ("--memory-budget", str(4 * WIDTH + 100_000))
    with in_little_room(tmp_path, monkeypatch, SHARED_MEMORY, *flags) as box:
        for path in (scaled, tmp_path / "one", tmp_path / "other"):
            box.admin.push(path)
        # Whoever is not asked for a while leaves for the other two, and cannot come back where somebody else has filled the rest.
        box.admin.post("models/scaled/pin")
        settled(box)
        before, engine = held_of(box), box.await_engine()
        memory = as_seen_by(box, SHARED_MEMORY)
        assert list(memory.iterdir()), "the sidecar has no segment here"
        refused = 0
        with contextlib.closing(pool_at(box.socket)) as pool, Neighbour(row, box.socket) as neighbour:
            models = {"one": (Model("one", pool), 1.0), "other": (Model("other", pool), 2.0)}
            draws = random.Random(15)
            for _ in range(row.count(100)):
                row.attempts += 1
                # Its pages go back to who fills the rest, or stay, as it happens.
                box.admin.post(f"models/{draws.choice(list(models))}/evict")
                with filled(memory):
                    model, first = models[draws.choice(list(models))]
                    try:
                        row.wrong += not asks(model, first)
                    except DeviceFault as error:
                        assert f"no {4 * WIDTH} bytes of shared memory left" in error.message
                        refused += 1
                row.wrong += not all(asks(model, first) for model, first in models.values())
            neighbour.await_answers()
            for name in models:
                box.admin.post(f"models/{name}/evict")
        row.figures["refused"] = refused
        assert refused
        row.leaked |= left(box, before)
        assert box.await_engine() == engine


@pytest.mark.row("F15")
def test_shared_memory_smaller_than_the_budget_is_not_used(
    row: Row, tmp_path: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_adding_bundle(tmp_path / "large", "large", [3.0] * (8 * WIDTH))
    write_adding_bundle(tmp_path / "larger", "larger", [4.0] * (16 * WIDTH))
    with in_little_room(tmp_path, monkeypatch, SHARED_MEMORY, "--memory-budget", "64MiB") as box:
        # Before there are others to be tried, which takes seconds for what is that large.
        box.admin.push(scaled)
        settled(box)
        for name in ("large", "larger"):
            box.admin.push(tmp_path / name)
        with Neighbour(row, box.socket) as neighbour, filled(as_seen_by(box, SHARED_MEMORY)):
            for name in ("large", "larger"):
                row.attempts += 1
                assert box.admin.post(f"models/{name}/load")["state"] == "resident"
            neighbour.await_answers()


@pytest.mark.row("F20")
def test_a_disk_that_is_full_in_the_middle_of_a_pull_keeps_nothing_of_it(
    row: Row, tmp_path: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, room, ended = tmp_path / "origin", tmp_path / "store", threading.Event()
    root.mkdir(), room.mkdir()
    write_chained_bundle(tmp_path / "m", "m", [0.5] * 2 * WIDTH)
    reference = publish(str(tmp_path / "m"), str(root), store_dir=tmp_path / "none").reference

    def filling(handler: Handler, content: bytes) -> None:
        """Send a half, and the other when the disk is full."""
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[: len(content) // 2])
        with filled(disk), contextlib.suppress(OSError):
            handler.wfile.write(content[len(content) // 2 :])
            handler.wfile.flush()
            assert ended.wait(PATIENCE_S)

    with (
        origin_server(root) as server,
        in_little_room(tmp_path, monkeypatch, room, "--pull-origin", server.url) as box,
    ):
        box.admin.push(scaled)
        settled(box)
        before, engine, disk = held_of(box), box.await_engine(), as_seen_by(box, room)
        held, free_pages = files(disk), os.statvfs(disk).f_bavail
        server.misbehave["/blobs"] = filling
        with Neighbour(row, box.socket) as neighbour:
            for _ in range(row.count(20)):
                row.attempts += 1
                ended.clear()
                job = pulled(box, f"{server.url}/{reference}")
                ended.set()
                assert job["state"] == "failed", job
                assert job["error"]["code"] == StoreFull.code, job["error"]
                # What came of it is gone when who filled the rest is, but for what an engine notes of others.
                until(lambda: free_pages - os.statvfs(disk).f_bavail < 16)
                assert files(disk) == held
            neighbour.await_answers()
            # When there is room, it is there as if nothing had been.
            server.misbehave.clear()
            assert pulled(box, f"{server.url}/{reference}")["state"] == "done"
        assert box.admin.get("models/m")["state"] == "stored"
        box.admin.delete("models/m")
        row.leaked |= left(box, before)
        assert box.await_engine() == engine


def files(folder: Path) -> set[Path]:
    """Return what of a store is models, or parts of them."""
    return {path for kind in ("models", "graphs", "blobs", "partial") for path in (folder / kind).rglob("*") if path.is_file()}
