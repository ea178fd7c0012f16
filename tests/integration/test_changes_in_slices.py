"""Models that are pushed while others are asked: large ones keep nobody waiting, and nobody sees one that is half there."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline import errors, model
from trunkline.admin import AdminConnection

from sidecar.slices import ITEMS, Slices
from sidecar.tenants import Quotas, Tenant
from tests.fakes import ADMIN_TOKEN, FakeSource, Running, bundle_of, running_server
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.usefixtures("nothing_leaks")

X = np.ones((1, 3), np.float32)
LARGE = [b"%d" % number for number in range(40 * ITEMS)]


class Gate:
    """Keeps the engine's slices from going on, once the first is done, until released; what else it has to do it does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.opened, self.count = threading.Event(), threading.Event(), 0
        real = Slices.go_on

        def go_on(slices: Slices) -> None:
            if self.count and not self.opened.is_set():
                self.begun.set()
                return
            self.count += 1
            real(slices)

        monkeypatch.setattr(Slices, "go_on", go_on)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    source = FakeSource()
    source.put(bundle_of("small", [b"\x05"]), [b"\x05"])
    with running_server(tmp_path, source) as made:
        monkeypatch.setenv("TRUNKLINE_SOCKET", made.path)
        yield made


class Told:
    """A command that is given in a thread of its own, and what came of it."""

    def __init__(self, running: Running, name: str, changed: str) -> None:
        self.answer: Any = None
        self.connection = AdminConnection(running.path, ADMIN_TOKEN)
        self.thread = threading.Thread(target=self._ask, args=(name, changed))
        self.thread.start()

    def _ask(self, name: str, changed: str) -> None:
        try:
            self.answer = self.connection.command(name, {"name": changed})
        except errors.TrunklineError as error:
            self.answer = error

    def wait(self) -> Any:
        self.thread.join(PATIENCE_S)
        self.connection.close()
        return self.answer


def push(running: Running, name: str, contents: list[bytes], version: str = "1") -> Told:
    running.source.put(bundle_of(name, contents, version=version), contents)
    return Told(running, "model_changed", name)


def test_others_are_answered_while_a_large_model_is_deployed(running: Running, gate: Gate) -> None:
    told = push(running, "large", LARGE)
    assert gate.begun.wait(PATIENCE_S)
    # A slice of it is done, and the rest waits: whoever asks does not.
    assert (model("small")(X) == 6).all()
    assert told.answer is None
    with pytest.raises(errors.UnknownModel):
        model("large")(X)
    gate.opened.set()
    assert told.wait()["name"] == "large"
    assert gate.count > len(LARGE) / ITEMS
    assert (model("large")(X) == 1 + sum(map(sum, LARGE))).all()


def test_the_version_before_serves_until_the_next_is_there_whole(running: Running, gate: Gate) -> None:
    gate.opened.set()
    assert push(running, "large", LARGE).wait()["version"] == "1"
    gate.opened.clear(), gate.begun.clear()
    gate.count = 0
    told = push(running, "large", LARGE[1:], version="2")
    assert gate.begun.wait(PATIENCE_S)
    assert (model("large")(X) == 1 + sum(map(sum, LARGE))).all()
    gate.opened.set()
    assert told.wait()["version"] == "2"
    assert (model("large")(X) == 1 + sum(map(sum, LARGE[1:]))).all()


def test_what_is_removed_meanwhile_is_gone_in_the_end(running: Running, gate: Gate) -> None:
    told = push(running, "large", LARGE)
    assert gate.begun.wait(PATIENCE_S)
    del running.source.bundles["large"]
    removed = Told(running, "model_removed", "large")
    gate.opened.set()
    assert told.wait()["name"] == "large"
    assert removed.wait() == {"name": "large"}
    with pytest.raises(errors.UnknownModel):
        model("large")(X)


def test_whoever_leaves_meanwhile_is_not_told_and_the_model_is_deployed(running: Running, gate: Gate) -> None:
    running.source.put(bundle_of("large", LARGE), LARGE)
    told = Told(running, "model_changed", "large")
    assert gate.begun.wait(PATIENCE_S)
    assert told.connection._connection is not None
    told.connection._connection._channel._socket.shutdown(socket.SHUT_RDWR)
    until(lambda: running.engine._sliced[0].session.__class__.__name__ == "_Awaited")
    gate.opened.set()
    told.wait()
    with contextlib.closing(AdminConnection(running.path, ADMIN_TOKEN)) as other:
        until(lambda: "large" in [each["name"] for each in other.command("models", {})["models"]])
    assert (model("small")(X) == 6).all()


def test_domains_that_change_meanwhile_are_those_it_is_deployed_in(running: Running, gate: Gate) -> None:
    told = push(running, "large", LARGE)
    assert gate.begun.wait(PATIENCE_S)
    tenants = {name: Tenant(name=name, domain=name, models=("*",)) for name in ("a", "b")}
    changed = threading.Event()
    running.server.use_quotas(Quotas(tenants=tenants), changed.set)
    assert changed.wait(PATIENCE_S)
    gate.opened.set()
    assert sorted(each["name"] for each in told.wait()["deployed"]) == ["large@a", "large@b"]
    until(lambda: sorted(running.engine.names()) == ["large@a", "large@b", "small@a", "small@b"])
    running.engine._post(running.engine.check_invariants)


def test_an_engine_that_drains_finishes_what_it_began(running: Running, gate: Gate) -> None:
    told = push(running, "large", LARGE)
    assert gate.begun.wait(PATIENCE_S)
    running.server.drain()
    running.engine.drain(running.server.stop)
    until(lambda: running.engine._draining)
    # It would say so if it were done.
    assert told.answer is None
    gate.opened.set()
    assert told.wait()["name"] == "large"
