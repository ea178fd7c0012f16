"""Comparators D, E and F: models that swap in plain torch, each under one budget of bytes, and the same models resident.

**D** ``two_blocks``, as SwapNet: a model runs block by block while a thread reads the next one; two blocks are in memory, put
together by reference, and nothing is kept between runs. **E** ``pipelined``, as PipeSwitch: one model in memory, read unit by
unit while it runs. **F** ``whole_lru``, as ShmFaas: as many whole models as fit, each read before it runs, evicted whole.
Blocks are the units of the model. Files are read as the sidecar reads its own, without checksums. D and E have memory that was
made and touched before; F makes it anew for each model.

Arguments: folder of what ``store`` wrote, with the inputs beside it as ``TASK.npy``; ``full`` or ``quick``; threads; name of the
way of reading. A line of standard input is ``budget BYTES``, which empties all, or ``KIND TASK``, answered by a line of JSON:
bytes read and first values of the answer, null when the model cannot be served in the budget.
"""

from __future__ import annotations

import json
import mmap
import os
import queue
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from trunkline.arena import page_aligned

from benchmarks.swap_tasks import FULL, QUICK, Task, units_of
from sidecar.disk import fill
from sidecar.tiermemory import SOURCES

KINDS = ("two_blocks", "pipelined", "whole_lru", "resident")
SHOWN = 16
_ALIGNMENT = 64
_NOTHING = torch.empty(0)


def _tensors(unit: nn.Module) -> list[Tensor]:
    """Return what a unit computes with."""
    return [tensor for tensor in (*unit.parameters(), *unit.buffers()) if tensor.is_floating_point()]


def _place(unit: nn.Module) -> tuple[list[int], int]:
    """Return where each tensor of a unit lies, and the whole pages they take."""
    offsets, end = [], 0
    for tensor in _tensors(unit):
        offsets.append(end)
        end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    return offsets, page_aligned(end) if end else 0


def store(model: nn.Module, path: Path) -> None:
    """Write the weights of a model, each unit on pages of its own, one after another."""
    with path.open("wb") as file:
        for unit in units_of(model):
            offsets, size_bytes = _place(unit)
            content = bytearray(size_bytes)
            for tensor, offset in zip(_tensors(unit), offsets, strict=True):
                content[offset : offset + tensor.nbytes] = tensor.detach().contiguous().numpy().tobytes()
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@dataclass(frozen=True)
class Unit:
    """A part of a model: its place in the file, and its tensors with their places and shapes."""

    module: nn.Module
    offset: int
    size_bytes: int
    tensors: list[tuple[Tensor, int, torch.Size]]

    def bind(self, memory: mmap.mmap, start: int) -> None:
        """Have the tensors lie in ``memory`` from ``start`` on."""
        for tensor, offset, shape in self.tensors:
            tensor.data = torch.frombuffer(memory, dtype=torch.float32, count=shape.numel(), offset=start + offset).view(shape)

    def unbind(self) -> None:
        for tensor, _, _ in self.tensors:
            tensor.data = _NOTHING


class Stored:
    """A model whose weights are in a file. Those units that have none run with the one before."""

    def __init__(self, task: Task, path: Path, source: str) -> None:
        with torch.device("meta"):
            model = task.build().eval()
        self.units: list[Unit] = []
        self.size_bytes = 0
        for module in units_of(model):
            offsets, size_bytes = _place(module)
            shapes = [tensor.shape for tensor in _tensors(module)]
            module.to_empty(device="cpu")
            unit = Unit(module, self.size_bytes, size_bytes, [*zip(_tensors(module), offsets, shapes, strict=True)])
            unit.unbind()
            self.units.append(unit)
            self.size_bytes += size_bytes
        self.example = torch.from_numpy(np.load(path.with_suffix(".npy")))
        self.source = SOURCES[source]
        self.descriptor = os.open(path, os.O_RDONLY | self.source.flags | os.O_CLOEXEC)

    def read(self, unit: Unit, memory: mmap.mmap, start: int) -> int:
        """Read a unit into ``memory`` from ``start`` on; return its bytes."""
        target = memoryview(memory)[start : start + unit.size_bytes]
        return fill(self.descriptor, self.source, unit.offset, [target])

    def read_all(self, memory: mmap.mmap) -> int:
        return fill(self.descriptor, self.source, 0, [memoryview(memory)[: self.size_bytes]])

    def bind(self, memory: mmap.mmap) -> None:
        for unit in self.units:
            unit.bind(memory, unit.offset)

    def unbind(self) -> None:
        for unit in self.units:
            unit.unbind()

    def run(self, before: Callable[[int], object] = id, after: Callable[[int], object] = id) -> Tensor:
        """Run the units in turn; ``before`` and ``after`` are called with the number of each."""
        value = self.example
        with torch.inference_mode():
            for number, unit in enumerate(self.units):
                before(number)
                value = unit.module(value)
                after(number)
        return value


def _memory(size_bytes: int, *, touched: bool = True) -> mmap.mmap:
    memory = mmap.mmap(-1, max(size_bytes, mmap.PAGESIZE))
    if touched:
        for start in range(0, size_bytes, mmap.PAGESIZE):
            memory[start] = 0
    return memory


class Reader:
    """A thread that reads what it is told, one after another."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._jobs.get()()

    def follow(self, model: Stored, read: Callable[[Unit, int], object]) -> list[threading.Event]:
        """Read all units of a model; return for each what is set when it is there."""
        ready = [threading.Event() for _ in model.units]

        def work() -> None:
            for number, unit in enumerate(model.units):
                read(unit, number)
                ready[number].set()

        self._jobs.put(work)
        return ready


class Swapper:
    """``models`` belong to this kind alone. ``run`` returns bytes read and the answer, None where there is no room."""

    def __init__(self, models: dict[str, Stored]) -> None:
        self.models = models

    def resize(self, budget_bytes: int) -> None:
        """Forget everything, and begin with another budget."""

    def run(self, name: str) -> tuple[int, Tensor] | None:
        raise NotImplementedError


class TwoBlocks(Swapper):
    """Comparator D."""

    def __init__(self, models: dict[str, Stored], reader: Reader) -> None:
        super().__init__(models)
        self._reader = reader
        self._slots: dict[str, tuple[mmap.mmap, mmap.mmap]] = {}

    def resize(self, budget_bytes: int) -> None:
        for model in self.models.values():
            model.unbind()
        self._slots.clear()
        for name, model in self.models.items():
            largest_bytes = [max((unit.size_bytes for unit in model.units[parity::2]), default=0) for parity in (0, 1)]
            if sum(largest_bytes) <= budget_bytes:
                self._slots[name] = (_memory(largest_bytes[0], touched=False), _memory(largest_bytes[1], touched=False))
                for number, unit in enumerate(model.units):
                    unit.bind(self._slots[name][number % 2], 0)

    def run(self, name: str) -> tuple[int, Tensor] | None:
        if name not in self._slots:
            return None
        model, slots = self.models[name], self._slots[name]
        for slot in slots:
            # Nothing is kept between runs, which costs as much here as new memory does.
            slot.madvise(mmap.MADV_DONTNEED)
        free = (threading.Semaphore(), threading.Semaphore())

        def read(unit: Unit, number: int) -> None:
            free[number % 2].acquire()
            model.read(unit, slots[number % 2], 0)

        ready = self._reader.follow(model, read)
        answer = model.run(lambda number: ready[number].wait(), lambda number: free[number % 2].release())
        for slot in slots:
            slot.madvise(mmap.MADV_DONTNEED)
        return model.size_bytes, answer


class Pipelined(Swapper):
    """Comparator E."""

    def __init__(self, models: dict[str, Stored], reader: Reader) -> None:
        super().__init__(models)
        self._reader = reader
        self._arena = _memory(0)
        self._arena_bytes = 0
        self._present = ""

    def resize(self, budget_bytes: int) -> None:
        for model in self.models.values():
            model.unbind()
        fitting = [model for model in self.models.values() if model.size_bytes <= budget_bytes]
        self._arena_bytes = max((model.size_bytes for model in fitting), default=0)
        self._arena = _memory(self._arena_bytes)
        for model in fitting:
            model.bind(self._arena)
        self._present = ""

    def run(self, name: str) -> tuple[int, Tensor] | None:
        model = self.models[name]
        if model.size_bytes > self._arena_bytes:
            return None
        if self._present == name:
            return 0, model.run()
        self._present = name
        ready = self._reader.follow(model, lambda unit, number: model.read(unit, self._arena, unit.offset))
        return model.size_bytes, model.run(lambda number: ready[number].wait())


class WholeLru(Swapper):
    """Comparator F."""

    def __init__(self, models: dict[str, Stored]) -> None:
        super().__init__(models)
        self._budget_bytes = 0
        # The one used last is last.
        self._present: OrderedDict[str, mmap.mmap] = OrderedDict()

    def resize(self, budget_bytes: int) -> None:
        while self._present:
            self._evict()
        self._budget_bytes = budget_bytes

    def _evict(self) -> None:
        name, memory = self._present.popitem(last=False)
        self.models[name].unbind()
        memory.close()

    def run(self, name: str) -> tuple[int, Tensor] | None:
        model = self.models[name]
        if model.size_bytes > self._budget_bytes:
            return None
        read_bytes = 0
        if name not in self._present:
            while sum(self.models[each].size_bytes for each in self._present) + model.size_bytes > self._budget_bytes:
                self._evict()
            memory = self._present[name] = _memory(model.size_bytes, touched=False)
            read_bytes = model.read_all(memory)
            model.bind(memory)
        self._present.move_to_end(name)
        return read_bytes, model.run()


class Resident(Swapper):
    """Everything in memory: what the others' latencies are compared with."""

    def __init__(self, models: dict[str, Stored]) -> None:
        super().__init__(models)
        for model in models.values():
            memory = _memory(model.size_bytes, touched=False)
            model.read_all(memory)
            model.bind(memory)

    def run(self, name: str) -> tuple[int, Tensor] | None:
        return 0, self.models[name].run()


def main(arguments: Sequence[str]) -> None:
    folder, scale, threads, source = arguments
    torch.set_num_threads(int(threads))
    tasks = FULL if scale == "full" else QUICK

    def models() -> dict[str, Stored]:
        return {name: Stored(task, Path(folder) / name, source) for name, task in tasks.items()}

    reader = Reader()
    swappers = dict(
        zip(
            KINDS, (TwoBlocks(models(), reader), Pipelined(models(), reader), WholeLru(models()), Resident(models())), strict=True
        )
    )
    for line in sys.stdin:
        kind, argument = line.split()
        if kind == "budget":
            for swapper in swappers.values():
                swapper.resize(int(argument))
            reply: object = {}
        else:
            found = swappers[kind].run(argument)
            reply = None if found is None else {"bytes": found[0], "answer": found[1].flatten()[:SHOWN].tolist()}
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
