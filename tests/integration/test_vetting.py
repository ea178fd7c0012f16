"""Bundles are looked at by a process that has nothing to lose: what it may not, what it may not take, and what is told."""

from __future__ import annotations

import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar import vetting
from sidecar.bundle import canonical_graph, manifest_bytes
from sidecar.errors import BundleError
from tests import zoo

MIB = 1 << 20


def files(kind: str = "mlp") -> tuple[bytes, bytes]:
    _, bundle, _ = zoo.stored(kind)
    return manifest_bytes(bundle), canonical_graph(bundle.graph)


@pytest.mark.parametrize("kind", ["mlp", "vit", "bert", "unet"])
def test_what_is_good_is_let_by(kind: str) -> None:
    vetting.vet(*files(kind))


def test_what_is_wrong_is_told_with_its_place() -> None:
    manifest, graph = files()
    with pytest.raises(BundleError, match=r"graph.json: format") as raised:
        vetting.vet(manifest, graph.replace(b"trunkline-graph-1", b"trunkline-graph-9"))
    assert raised.value.details == {"place": "graph.json: format"}


def looks(monkeypatch: pytest.MonkeyPatch, work: Callable[[], object]) -> None:
    monkeypatch.setattr(vetting, "_look", lambda manifest, graph: work())


@pytest.mark.parametrize(
    ("work", "told"),
    [
        (lambda: socket.socket(), "OSError"),
        (lambda: socket.create_connection(("127.0.0.1", 1)), "OSError"),
        (lambda: Path("/etc/passwd").read_bytes(), "OSError"),
        (lambda: os.write(2, b""), None),
        (lambda: os.listdir("/proc/self/fd"), "OSError"),
        (lambda: os.fork(), "PermissionError"),
        (lambda: os.system("true"), "PermissionError"),
        (lambda: eval("1"), "PermissionError"),
        (lambda: 1 // 0, "ZeroDivisionError"),
    ],
)
def test_it_can_open_nothing_and_start_nothing(
    work: Callable[[], object], told: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks(monkeypatch, work)
    if told is None:
        vetting.vet(b"", b"")
        return
    with pytest.raises(BundleError, match=rf"the bundle made its reader fail \({told}\)"):
        vetting.vet(b"", b"")


def test_it_has_no_descriptor_of_its_parent_s(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as ours:
        descriptor = ours.fileno()
        assert descriptor > 3
        looks(monkeypatch, lambda: os.fstat(descriptor))
        with pytest.raises(BundleError, match="OSError"):
            vetting.vet(b"", b"")


def spin() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    "work",
    [
        spin,
        lambda: time.sleep(3600),
        lambda: bytearray(512 * MIB),
        # More than the parent may have to spare of what it was given once.
        lambda: [bytearray(MIB) for _ in range(8192)],
        lambda: os.kill(os.getpid(), signal.SIGSEGV),
        lambda: os._exit(0),
    ],
    ids=["spins", "sleeps", "takes much at once", "takes much bit by bit", "crashes", "ends"],
)
@pytest.mark.row("T9")
def test_what_takes_too_much_is_refused(work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vetting, "_CPU_S", 1)
    monkeypatch.setattr(vetting, "_PATIENCE_S", 3.0)
    monkeypatch.setattr(vetting, "_MEMORY_BYTES", 256 * MIB)
    looks(monkeypatch, work)
    with pytest.raises(BundleError, match="reading the bundle takes more than 1 s or 256 MiB, or ends its reader"):
        vetting.vet(b"", b"")


def children_of_this() -> list[str]:
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def test_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests may have processes of their own.
    descriptors, children = len(os.listdir("/proc/self/fd")), set(children_of_this())
    looks(monkeypatch, lambda: None)
    for _ in range(5):
        vetting.vet(b"", b"")
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert set(children_of_this()) <= children


def test_where_no_process_can_be_made_nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    descriptors = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("sidecar.vetting.os.fork", refuse)
    with pytest.raises(BlockingIOError):
        vetting.vet(b"", b"")
    assert len(os.listdir("/proc/self/fd")) == descriptors
