"""Processes that are killed while they pull a model, or while models take each other's place: the store is whole afterwards."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import client

from sidecar.disk import TEMPORARY
from sidecar.jobs import Unwatched
from sidecar.origins import Policy, parse_origin, parse_reference
from sidecar.publishing import publish
from sidecar.pulling import pull
from sidecar.store import Store
from tests.bundles import write_adding_bundle
from tests.fault.matrix import Row, pool_at
from tests.origin_server import write_chained_bundle
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, until

# With those between any two instructions of what keeps weights in memory (test_hosttier), far more than fifty.
PULL_KILLS, SWAP_KILLS = 40, 10
# Some chunks each.
WEIGHTS = [[number + 0.5] * 600_001 for number in range(4)]
# What of the system is called that changes the store.
EFFECTS = ("open", "write", "fsync", "ftruncate", "mkdir", "rename", "replace", "remove", "unlink", "utime")
# Of models of which two have room at a time.
WIDTH, NAMES = 1 << 18, ("one", "two", "three", "four")
SEED = 22


def pull_in_child(reference: str, root: Path, store: Path, reached: mmap.mmap, last: int = 0) -> int:
    """Pull in a process of its own, which is killed before the ``last`` call of ``EFFECTS``; return how it ended.

    In ``reached`` is how many it came to.
    """
    reached[:2] = bytes(2)
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        for name in EFFECTS:
            setattr(os, name, counted(getattr(os, name), reached, last))
        pull(parse_reference(reference), Store(store), Policy(origins=(parse_origin(f"file://{root}"),)), Unwatched())
        status = 0
    finally:
        os._exit(status)


def counted(effect: Callable[..., Any], reached: mmap.mmap, last: int) -> Callable[..., Any]:
    def call(*args: Any, **named: Any) -> Any:
        count = int.from_bytes(reached[:2], "little") + 1
        reached[:2] = count.to_bytes(2, "little")
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return effect(*args, **named)

    return call


def leftovers(store: Path) -> list[str]:
    return [path.name for path in store.rglob(f"*{TEMPORARY}*")]


@pytest.mark.row("F22")
def test_a_pull_that_is_killed_anywhere_leaves_the_store_whole(row: Row, tmp_path: Path) -> None:
    root, reached = tmp_path / "origin", mmap.mmap(-1, mmap.PAGESIZE)
    root.mkdir()
    write_chained_bundle(tmp_path / "m", "m", *WEIGHTS)
    reference = f"file://{root}/{publish(str(tmp_path / 'm'), str(root), store_dir=tmp_path / 'none').reference}"
    assert pull_in_child(reference, root, tmp_path / "whole", reached) == 0
    steps = int.from_bytes(reached[:2], "little")
    assert steps > PULL_KILLS
    folder = tmp_path / "store"
    for last in sorted(random.Random(SEED).sample(range(1, steps + 1), min(steps, row.count(PULL_KILLS)))):
        row.attempts += 1
        shutil.rmtree(folder, ignore_errors=True)
        assert pull_in_child(reference, root, folder, reached, last) == -signal.SIGKILL
        store = Store(folder)
        assert leftovers(folder) == []
        found = store.verify()
        assert (found.corrupt, found.broken) == ([], {})
        # Whoever asks again has it, and need not be sent again what came.
        if row.attempts % 4 == 0:
            assert pull_in_child(reference, root, folder, reached) == 0
            assert store.models() == ["m"]
            assert store.verify().blob_count == len(WEIGHTS)
            assert list((folder / "partial").iterdir()) == []
    reached.close()


@pytest.fixture
def crowded(tmp_path: Path, row: Row) -> Iterator[SidecarProcess]:
    """Give a sidecar that has room for half of its models."""
    with sidecar_process(tmp_path, "--memory-budget", str(5 * WIDTH * 4 // 2)) as box:
        for number, name in enumerate(NAMES):
            write_adding_bundle(tmp_path / name, name, [float(number)] * WIDTH)
            box.admin.push(tmp_path / name)
        yield box


@pytest.mark.row("F22")
def test_an_engine_that_is_killed_while_models_come_and_go_leaves_the_store_whole(row: Row, crowded: SidecarProcess) -> None:
    pool, chosen = pool_at(crowded.socket), random.Random(SEED)
    models = [client.Model(name, pool) for name in NAMES]
    x = np.ones((1, WIDTH), np.float32)

    def ask() -> None:
        for number, model in enumerate(models):
            answer = model.call({"x": x}, deadline_s=PATIENCE_S)
            row.answered += 1
            row.wrong += not np.array_equal(answer, x + number)

    ask()
    for _ in range(row.count(SWAP_KILLS)):
        row.attempts += 1
        engine = crowded.await_engine()
        late_s = chosen.uniform(0, 0.05)
        killer = os.fork()
        if not killer:
            time.sleep(late_s)
            os.kill(engine, signal.SIGKILL)
            os._exit(0)
        ask()
        os.waitpid(killer, 0)
        until(lambda engine=engine: crowded.await_engine() != engine)  # type: ignore[misc]
        ask()
    evicted_bytes = crowded.admin.get("status")["requests"]["evicted_bytes"]
    assert evicted_bytes > 0, "all had room"
    pool.close()
    # Swept by the next one.
    crowded.process.kill()
    crowded.process.wait()
    crowded.start()
    # But for what it is writing itself: it measures its disk.
    until(lambda: leftovers(crowded.store_dir) == [])
    found = crowded.admin.post("store/verify")
    assert (found["corrupt"], found["broken"]) == ([], {})
