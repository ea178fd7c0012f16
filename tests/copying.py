"""A device that copies weights to memory of its own, on the CPU, as late as a device may; and a node that has one."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sidecar.devices import TorchDevice
from sidecar.memories import memory_of
from sidecar.segment import Segment
from sidecar.span import Mark, PromptLane, Span
from sidecar.swapmemory import SwapMemory
from sidecar.verdicts import Verdicts
from tests.fakes import FakeSource, Running, running_server

SLOT_BYTES = 4096


class LateLane:
    """Does nothing before somebody waits for it. ``turn`` is held while any lane of a device does something."""

    def __init__(self, turn: Any) -> None:
        self._turn = turn
        self._jobs: deque[Callable[[], object]] = deque()
        self._given_count = 0
        self._done_count = 0
        self.copied_bytes = 0
        # Raised by the next copy.
        self.error: Exception | None = None

    def give(self, job: Callable[[], object]) -> None:
        with self._turn:
            self._jobs.append(job)
            self._given_count += 1

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        assert target.nbytes == source.nbytes
        if self.error is not None:
            error, self.error = self.error, None
            raise error
        self.copied_bytes += target.nbytes
        self.give(lambda: target.copy_(source))

    def mark(self) -> Mark:
        return LateMark(self, self._given_count)

    def wait(self, mark: Mark) -> None:
        self.give(mark.synchronize)

    def run(self, until: int | None = None) -> None:
        """Do what was given, or the first ``until`` of all that ever was."""
        with self._turn:
            while self._jobs and (until is None or self._done_count < until):
                self._jobs.popleft()()
                self._done_count += 1


class LateMark:
    def __init__(self, lane: LateLane, count: int) -> None:
        self._lane = lane
        self._count = count

    def synchronize(self) -> None:
        self._lane.run(self._count)


class CopyingDevice(TorchDevice):
    """A CPU that copies as a CUDA device does. Where it is ``late``, so are its lanes; a program runs behind all in ``work``."""

    def __init__(self, late: bool = True, slot_bytes: int = SLOT_BYTES) -> None:
        super().__init__(torch.device("cpu"))
        self._late = late
        self._slot_bytes = slot_bytes
        turn = threading.RLock()
        self.work, self.arrivals = LateLane(turn), LateLane(turn)
        self.room = torch.empty(0, dtype=torch.uint8)

    @property
    def copies(self) -> bool:
        return True

    @property
    def can_pack(self) -> bool:
        return False

    def open_span(self, size_bytes: int) -> Span:
        made = super().open_span(size_bytes)
        self.room = made._room.fill_(0xFF)
        # Smaller, so that most weights take several.
        slots = [slot[: self._slot_bytes] for slot in made._slots]
        lanes = (self.work, self.arrivals) if self._late else (PromptLane(), PromptLane())
        return Span(self.room, made._scratch[: self._slot_bytes], slots, *lanes)

    def settle(self) -> None:
        """Have all done that was given."""
        self.arrivals.run()
        self.work.run()

    def run(self, program: Any, weights: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
        self.work.run()
        return super().run(program, weights, inputs)

    def stack(self, handles: Sequence[Sequence[Any]]) -> Any:
        self.work.run()
        return super().stack(handles)


class CopyingNode:
    """A node with a device that copies, such as this one; see ``tests.nodes.Node``."""

    def __init__(
        self, folder: Path, budget_bytes: int, host_budget_bytes: int, opened: Callable[[], Any] = CopyingDevice
    ) -> None:
        self.folder = folder
        self.source = FakeSource()
        self.budget_bytes = budget_bytes
        self.opened = opened
        self.segment = Segment.create_or_adopt(folder, host_budget_bytes)
        self.device = opened()

    def memory(self) -> SwapMemory:
        """Return the memory of a new engine, on a device that was opened anew: nothing is on it."""
        self.device = self.opened()
        made = memory_of(self.device, self.source, self.segment.descriptor, self.folder / "blocks", self.budget_bytes)
        assert isinstance(made, SwapMemory)
        return made

    def serve(self, memory: SwapMemory | None = None, **settings: Any) -> Any:
        memory = memory or self.memory()
        return running_server(
            self.folder,
            self.source,
            device=self.device,
            budget_bytes=self.budget_bytes,
            verdicts=Verdicts(self.folder / "verdicts", "copying"),
            memory=memory,
            **settings,
        )

    def resize(self, budget_bytes: int, host_budget_bytes: int) -> None:
        """Begin anew with other budgets; nothing is in memory then."""
        self.close()
        self.budget_bytes = budget_bytes
        self.segment = Segment.create_or_adopt(self.folder, host_budget_bytes)

    def close(self) -> None:
        self.segment.unlink()
        self.segment.close()


def until_on_disk(running: Running, name: str) -> Callable[[], bool]:
    """Return what says whether the weights of a model are in block files."""
    wanted = running.engine._catalog.deployed[name].weights.keys()
    files = running.engine._memory._host._files  # type: ignore[attr-defined]
    return lambda: all(files.find(digest) for digest in wanted)
