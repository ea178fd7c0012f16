"""Row of the matrix: the first, second, third ... call to the system fails, once and from then on; SQLite's method.

The sidecar is one of this process, with a real store, real shared memory and block files, so that its calls can be made to fail;
those of the functions that ask it are left alone.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline.client import Model
from trunkline.errors import TrunklineError

from sidecar.devices import open_device
from sidecar.memories import memory_of
from sidecar.segment import Segment
from sidecar.store import Store
from sidecar.verdicts import Verdicts
from tests.fakes import Running, running_server
from tests.fault.matrix import EXPECTED, Row, pool_at
from tests.integration.test_sharing import ask
from tests.waiting import until

X = np.ones((1, 8), np.float32)
BUDGET_BYTES = 4 << 20
# After so many calls without a failure something else is wrong.
MOST = 400
_SYSTEM = {
    os: ("open", "read", "write", "preadv", "pwrite", "fsync", "rename", "memfd_create", "posix_fallocate", "fstat", "ftruncate"),
    mmap: ("mmap",),
    socket.socket: ("send", "sendmsg", "recv_into"),
}


class Seam:
    """Lets calls to the system fail that others than the test's own thread make, from the n-th on that is counted."""

    def __init__(self) -> None:
        self._mine = threading.current_thread()
        self._lock = threading.Lock()
        self._left = 0
        self._lasts = False
        self.failed: list[str] = []

    def arm(self, number: int, lasts: bool) -> None:
        with self._lock:
            self._left, self._lasts, self.failed = number, lasts, []

    def disarm(self) -> None:
        with self._lock:
            self._left = 0

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if self._left and threading.current_thread() is not self._mine and self._is_to_fail(name):
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **named)

        return call

    def _is_to_fail(self, name: str) -> bool:
        with self._lock:
            if not self._left:
                return False
            # Once it has come to the last, it is that call that fails on and on, and no other.
            if self.failed:
                return self._lasts and name == self.failed[0]
            self._left -= 1
            if self._left:
                return False
            self._left = 1 if self._lasts else 0
            self.failed.append(name)
            return True


@pytest.fixture
def seam(monkeypatch: pytest.MonkeyPatch) -> Seam:
    made = Seam()
    for place, names in _SYSTEM.items():
        for name in names:
            monkeypatch.setattr(place, name, made.wrap(name, getattr(place, name)))
    return made


@contextlib.contextmanager
def served(folder: Path, bundle: Path) -> Iterator[Running]:
    """Serve one model of a real store, whose weights lie in shared memory."""
    from sidecar.bundle import blob_path, canonical_graph, manifest_bytes, read_bundle

    store, made = Store(folder / "store"), read_bundle(bundle)
    for weight in made.graph.weights:
        store.put_blob(weight.digest, [blob_path(bundle, weight.digest).read_bytes()], weight.size_bytes)
    store.put_model(manifest_bytes(made), canonical_graph(made.graph))
    segment, device = Segment.create_or_adopt(folder, BUDGET_BYTES), open_device("cpu")
    try:
        memory = memory_of(device, store, segment.descriptor, folder / "store" / "blocks", BUDGET_BYTES)
        with running_server(
            folder,
            store,
            device=device,
            budget_bytes=BUDGET_BYTES,
            memory=memory,
            verdicts=Verdicts(folder / "verdicts", "test"),
        ) as running:
            yield running
    finally:
        segment.unlink()
        segment.close()


def checked(running: Running) -> None:
    """Have the books looked through where they are kept."""
    found: list[BaseException | None] = []

    def attempt(check: Callable[[], None], found: list[BaseException | None]) -> None:
        try:
            check()
        except AssertionError as error:
            found.append(error)
        else:
            found.append(None)

    def look() -> None:
        attempt(running.engine.check_invariants, found)

    running.engine._post(look)
    until(lambda: len(found) == 1)
    memory: Any = running.engine._memory
    # Once the mover has done what it was told.
    running.engine._mover._tell(lambda: attempt(memory._tier.check_invariants, found))
    until(lambda: len(found) == 2)
    assert found == [None, None]


def asked(running: Running) -> None:
    pool = pool_at(Path(running.path))
    try:
        answer = Model("scaled", pool).call({"x": X}, deadline_s=2.0)
        assert np.array_equal(answer, X * EXPECTED)
    finally:
        pool.close()


OPERATIONS: dict[str, Callable[[Running], object]] = {
    "load": lambda running: ask(running, "load", name="scaled"),
    "evict": lambda running: ask(running, "evict", name="scaled"),
    "attach": lambda running: asked(running),
    "infer": lambda running: asked(running),
}


@pytest.mark.row("F16")
@pytest.mark.parametrize("lasts", [False, True], ids=["once", "from then on"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_whichever_call_to_the_system_fails_nothing_is_lost(
    row: Row, operation: str, lasts: bool, seam: Seam, scaled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with served(tmp_path, scaled) as running:
        asked(running)
        until(lambda: ask(running, "model", name="scaled")["unbatched_because"] != "it was not tried yet")
        for number in range(1, MOST):
            # What is to be done is to have something to do.
            ask(running, "load" if operation == "evict" else "evict", name="scaled")
            if operation == "infer":
                asked(running)
            seam.arm(number, lasts)
            try:
                OPERATIONS[operation](running)
            except (TrunklineError, OSError):
                pass
            seam.disarm()
            failed = seam.failed
            row.attempts += 1
            # All is well again as soon as the system is.
            asked(running)
            row.answered += 1
            checked(running)
            memory = ask(running, "memory")
            assert memory["resident_bytes"] <= BUDGET_BYTES
            assert memory["weight_bytes"] == memory["resident_bytes"], failed
            if not failed:
                break
        else:
            pytest.fail("there is no end of calls")
        assert number > 2
    # Errors that were logged know the frames they came through, and those the memory.
    caplog.clear()
