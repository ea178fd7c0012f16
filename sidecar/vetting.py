"""Vetting: a stranger's bundle is first looked at by a process that has nothing to lose.

It is forked for one bundle, gives up every descriptor but the way back, and may have so much memory and so many seconds. It can
open nothing, no file and no socket; the second wall (``wall``) stands around it. There the bundle is read, its graph prepared as
an engine would, and run on shapes alone. Only what survives that is read again by processes that others depend on. Forked from
one that has imported torch and touched no device. Must not import anything above layer 2.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import signal
import time
from collections.abc import Callable
from typing import Final, NoReturn

import torch

from sidecar import wall
from sidecar.bundle import parse_bundle
from sidecar.dryrun import DryRun
from sidecar.errors import BundleError
from sidecar.prepare import prepare
from sidecar.processes import die_with_parent

# A graph of 64 MiB, the largest, takes a few seconds and a gigabyte.
_CPU_S: Final = 30
_PATIENCE_S: Final = 60.0
_MEMORY_BYTES: Final = 4 << 30
# Of what is told of an error.
_MOST_TOLD_BYTES: Final = 1 << 16


def vet(manifest: bytes, graph: bytes) -> None:
    """Have both files of a bundle looked at. Any thread. Raises BundleError for what is wrong, and for what takes too much."""
    reader, writer = os.pipe()
    try:
        parent = os.getpid()
        try:
            pid = os.fork()
            if not pid:
                _child(parent, writer, lambda: _look(manifest, graph))
        finally:
            os.close(writer)
        try:
            told = _told(reader, time.monotonic() + _PATIENCE_S)
        finally:
            # It has ended, or is to.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    finally:
        os.close(reader)
    if told is None:
        raise BundleError(
            f"reading the bundle takes more than {_CPU_S} s or {_MEMORY_BYTES >> 20} MiB, or ends its reader; "
            "pack a smaller graph"
        )
    if told:
        plain = json.loads(told)
        raise BundleError(plain["message"], **plain["details"])


def _told(reader: int, deadline: float) -> bytes | None:
    """Return what a child says before it ends, empty where nothing is wrong; None where it ended without a word, or does not."""
    told = bytearray()
    while len(told) <= _MOST_TOLD_BYTES and select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        if not (chunk := os.read(reader, _MOST_TOLD_BYTES)):
            return bytes(told[1:]) if told else None
        told += chunk
    return None


def _child(parent: int, writer: int, look: Callable[[], None]) -> NoReturn:
    """Look, say what was found, and end."""
    try:
        die_with_parent(parent, signal.SIGKILL)
        os.dup2(writer, 3)
        # Listening sockets, sessions, the store: whatever the parent has.
        os.closerange(4, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        with open("/proc/self/statm", "rb") as file:
            used_bytes = int(file.read().split()[0]) * resource.getpagesize()
        limits = {
            resource.RLIMIT_CPU: _CPU_S,
            resource.RLIMIT_AS: used_bytes + _MEMORY_BYTES,
            # No more can be opened, but those that are open stay so.
            resource.RLIMIT_NOFILE: 0,
            resource.RLIMIT_FSIZE: 0,
        }
        for limit, most in limits.items():
            resource.setrlimit(limit, (most, most))
        wall.build()
        os.write(3, b"." + _problem(look))
    finally:
        os._exit(0)


def _problem(look: Callable[[], None]) -> bytes:
    """Return what is wrong, as JSON, empty if nothing is. Raises MemoryError."""
    try:
        look()
    except BundleError as error:
        plain = {"message": error.message, "details": error.details}
    except MemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - a bundle that its reader stumbles over is refused, whatever it is over
        plain = {"message": f"the bundle made its reader fail ({type(error).__name__})", "details": {}}
    else:
        return b""
    return json.dumps(plain).encode()[:_MOST_TOLD_BYTES]


def _look(manifest: bytes, graph: bytes) -> None:
    bundle = parse_bundle(manifest, graph)
    prepare(bundle.graph, torch.device("meta"))
    smallest = {symbol.name: symbol.minimum for symbol in bundle.graph.symbols}
    shapes = [
        (spec.dtype, tuple(axis if isinstance(axis, int) else smallest[axis] for axis in spec.shape))
        for spec in bundle.graph.inputs
    ]
    DryRun(bundle.graph).peak_bytes(shapes)
