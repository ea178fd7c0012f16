"""What the rows of the fault matrix and of the threat table have in common: a sidecar, a neighbour, what must not be left behind.

A row is a test marked ``@pytest.mark.row("F1", "T5")``. It gets a ``Row``, which says how often to try and keeps what was found;
after the test it must have found nothing wrong, nothing lost and nothing left behind. ``benchmarks/faults.py`` writes that down.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from trunkline import client, errors
from trunkline.endpoint import Endpoint
from trunkline.pool import Pool

from sidecar.bundle import write_bundle
from sidecar.export import convert
from sidecar.segment import SHARED_MEMORY, segment_name
from tests.rows import Size
from tests.sidecar_process import SidecarProcess
from tests.waiting import PATIENCE_S, until

log = logging.getLogger(__name__)

# How much larger the counts of a night are.
NIGHTLY: Final = 20
_MOST_REASONS: Final = 3
# Of a session with the engine: a socket, and what Python's mmap keeps of each arena.
DESCRIPTORS_EACH: Final = 3
_REST_S: Final = 0.002
_SETTLE_S: Final = 20.0
# Those that tests make by themselves (tests/segments.py) have the pid of the test in it.
_SEGMENT: Final = re.compile(r"trunkline-\d+-(\d+-)?[0-9a-f]{32}(-next)?")


class Scaled(torch.nn.Module):
    """y = x * weight, small enough that its answers can be checked by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.arange(8.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


EXPECTED: Final = np.arange(8, dtype=np.float32)


def write_model(folder: Path, name: str, module: torch.nn.Module, example: torch.Tensor, **options: Any) -> Path:
    """Write the bundle of a module; return its folder. ``options`` are those of conversion."""
    packed = convert(module.eval(), (example,), name=name, **options)
    write_bundle(folder / name, packed.bundle, packed.blobs)
    return folder / name


def write_scaled(folder: Path, name: str = "scaled") -> Path:
    """Write the bundle of ``Scaled``; return its folder."""
    return write_model(folder, name, Scaled(), torch.ones(2, 8))


def until_tried(box: SidecarProcess, name: str) -> None:
    """Wait until a model has been tried: from then on it is served in batches, if it can be."""
    until(lambda: bool(box.admin.get(f"models/{name}")["tried"]))


def deploy(box: SidecarProcess, folder: Path, name: str, module: torch.nn.Module, example: torch.Tensor) -> None:
    """Have a sidecar hold a module, loaded and tried."""
    box.admin.push(write_model(folder, name, module, example))
    box.admin.post(f"models/{name}/load")
    until_tried(box, name)


def pool_at(socket: Path, token: bytes = b"") -> Pool:
    """Return a function's sessions with the sidecar at ``socket``, whatever this process's environment says."""
    return Pool(endpoint=Endpoint(str(socket)), credential=lambda: token)


@dataclass
class Row:
    """What a row has found. ``longest_stall_s`` is the longest time in which a neighbour had no answer."""

    ids: tuple[str, ...]
    size: Size = "push"
    attempts: int = 0
    answered: int = 0
    wrong: int = 0
    lost: int = 0
    # What became of the first that were lost.
    reasons: list[str] = field(default_factory=list)
    leaked: dict[str, int] = field(default_factory=dict)
    longest_stall_s: float = 0.0
    seconds: float = 0.0
    # What else was measured, by name; not asserted.
    figures: dict[str, float] = field(default_factory=dict)

    def count(self, full: int, push: int | None = None) -> int:
        """Return how often to try. ``full`` is what the matrix asks for, ``push`` what has to do with a push; None: as much."""
        if self.size == "push" and push is not None:
            return push
        return full * NIGHTLY if self.size == "night" else full

    def lose(self, *errors: BaseException) -> None:
        """Count requests that were lost."""
        self.lost += len(errors)
        self.reasons += [repr(error) for error in errors[: _MOST_REASONS - len(self.reasons)]]

    def check(self) -> None:
        """Raise AssertionError for anything that must not be."""
        assert self.attempts, f"{self.ids}: nothing was tried"
        assert not self.wrong, f"{self.ids}: {self.wrong} wrong answers of {self.answered}"
        assert not self.lost, f"{self.ids}: {self.lost} requests lost of {self.answered + self.lost}: {self.reasons}"
        assert not any(self.leaked.values()), f"{self.ids}: left behind: {self.leaked}"

    def to_plain(self) -> dict[str, Any]:
        """Return what was found, as JSON has it."""
        return asdict(self)


class Neighbour:
    """A well-behaved function that asks all the time and checks every answer, bit for bit. Use as a context manager.

    What it found goes into the row: answers, wrong ones, lost requests, and the longest time without an answer.
    """

    def __init__(self, row: Row, socket: Path, *, threads: int = 1, model: str = "scaled", token: bytes = b"") -> None:
        self.errors: list[BaseException] = []
        self.answered = 0
        self._row = row
        self._socket = socket
        self._model = model
        self._token = token
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(threads)]

    def __enter__(self) -> Neighbour:
        for thread in self._threads:
            thread.start()
        self.await_answers(len(self._threads))
        return self

    def stop(self) -> None:
        """Ask no more; return when the last calls are over."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
            assert not thread.is_alive(), "a neighbour's call does not end"

    def __exit__(self, *raised: object) -> None:
        self.stop()
        self._row.answered += self.answered
        self._row.lose(*self.errors)

    def await_answers(self, more: int = 5) -> None:
        """Return when so many more calls were answered."""
        wanted, deadline = self.answered + more, time.monotonic() + 2 * PATIENCE_S
        while self.answered < wanted:
            assert time.monotonic() < deadline, f"a neighbour gets no answers: {self.errors[:3]}"
            time.sleep(_REST_S)

    def _ask(self, seed: int) -> None:
        pool = pool_at(self._socket, self._token)
        model = client.Model(self._model, pool)
        random = np.random.default_rng(seed)
        while not self._stopping.is_set():
            x = random.random((1 + seed % 4, 8)).astype(np.float32)
            began_s = time.monotonic()
            try:
                answer = model.call({"x": x}, deadline_s=PATIENCE_S)
            except errors.TrunklineError as error:
                self.errors.append(error)
                continue
            is_wrong = not np.array_equal(answer, x * EXPECTED)
            with self._lock:
                self.answered += 1
                self._row.wrong += is_wrong
                self._row.longest_stall_s = max(self._row.longest_stall_s, time.monotonic() - began_s)
            # So that it is a neighbour, not a flood.
            time.sleep(_REST_S)
        pool.close()


def settled(box: SidecarProcess, model: str = "scaled") -> None:
    """Ask for a model, and return when the sidecar has tried out how it is served best: what is there then, is there to stay."""
    pool = pool_at(box.socket)
    client.Model(model, pool).call({"x": np.ones((1, 8), np.float32)})
    pool.close()
    until_tried(box, model)
    # Its block file is written when nobody waits.
    until(lambda: all(tier["used_bytes"] for tier in tiers_of(box)))


def tiers_of(box: SidecarProcess) -> list[dict[str, Any]]:
    """Return all tiers of a sidecar's devices."""
    return [tier for device in box.admin.get("residency")["devices"].values() for tier in device["tiers"]]


def descendants(pid: int) -> list[int]:
    """Return the pids of what a process has started, and of what that has started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found: list[int] = []
    for child in [pid]:
        found += [each for each, parent in parents.items() if parent == child]
    for each in list(found):
        found += descendants(each)
    return found


def held_by(pid: int) -> tuple[int, int]:
    """Return how many descriptors and threads a process has."""
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))


def names_of(box: SidecarProcess) -> set[str]:
    """Return our names in shared memory, but for the segments of other sidecars that run beside this one."""
    own = segment_name(box.run_dir.resolve())[1:]
    names = {each.name for each in SHARED_MEMORY.iterdir() if each.name.startswith("trunkline")}
    return {name for name in names if name == own or not _SEGMENT.fullmatch(name)}


def held(box: SidecarProcess) -> dict[str, int]:
    """Return what a sidecar has of all that a test may have left with it: by its own books, and by the system's."""
    engine = box.await_engine()
    told = box.admin.get("sessions")
    administrators = [each for each in told["sessions"] if each["administrator"]]
    counted = box.admin.metrics()
    leases = [each for device in box.admin.get("leases")["devices"].values() for each in device["leases"]]
    descriptors, threads = held_by(engine)
    return {
        # But for those of the admin endpoint, of whose workers each connects when it is first asked.
        "engine descriptors": descriptors - DESCRIPTORS_EACH * len(administrators),
        "engine threads": threads,
        "processes": len(descendants(box.process.pid)),
        "names in /dev/shm": len(names_of(box)),
        "connections": _total(counted, "trunkline_clients") - len(administrators),
        "arena bytes": _total(counted, "trunkline_arena_bytes") - sum(each["arena_bytes"] for each in administrators),
        "leases": sum(each["leases"] for each in leases),
        "bytes in tiers": sum(tier["used_bytes"] for tier in tiers_of(box)),
    }


def _total(counted: str, name: str) -> int:
    return sum(int(float(value)) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", counted, re.MULTILINE))


def left(box: SidecarProcess, before: dict[str, int], settle_s: float = _SETTLE_S) -> dict[str, int]:
    """Return by how much a sidecar has more than ``before`` when all had time to go, which is nothing if all is well."""
    deadline = time.monotonic() + settle_s
    while True:
        more = {what: count - before[what] for what, count in held(box).items() if count > before[what]}
        if not more or time.monotonic() > deadline:
            if "names in /dev/shm" in more:
                log.error("of all that is in /dev/shm, %s count", sorted(names_of(box)))
            return more
        time.sleep(0.05)
