"""Dry runs: how much memory a run takes for what it computes on the way, found without computing anything.

A graph is run on tensors that have shapes and no bytes (torch's ``meta`` device), and the bytes of all that is alive at the
same time are counted: inputs, results on the way, outputs; each storage once, however many views of it there are. Weights do not
count. Nor does scratch memory that operators take and give back: some convolutions unfold their input. CPU or CUDA
alike; callable from any thread. Must not import anything above layer 2.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from sidecar.errors import BundleError
from sidecar.ir import Graph
from sidecar.prepare import prepare
from sidecar.programs import Program

_META = torch.device("meta")


class DryRun:
    """A graph to be run on shapes. ``peak_bytes`` may be asked any number of times."""

    def __init__(self, graph: Graph) -> None:
        self._program: Program | None
        try:
            self._program = prepare(graph, _META)
        except BundleError:
            self._program = None
        self._weights = [torch.empty(weight.shape, dtype=getattr(torch, weight.dtype), device=_META) for weight in graph.weights]

    def peak_bytes(self, inputs: Sequence[tuple[str, tuple[int, ...]]]) -> int | None:
        """Return the most bytes alive at a time with inputs of these dtypes (numpy's names) and shapes.

        None where it cannot be found so: an operator may need the numbers themselves.
        """
        if self._program is None:
            return None
        given = [torch.empty(shape, dtype=getattr(torch, dtype), device=_META) for dtype, shape in inputs]
        try:
            with torch.inference_mode():
                return self._peak_bytes(self._program, given)
        except Exception:  # noqa: BLE001 - whatever an operator without numbers may raise; None says it
            return None

    def _peak_bytes(self, program: Program, inputs: Sequence[torch.Tensor]) -> int:
        values: list[Any] = [*self._weights, *inputs, *program.blank]
        # Of each storage, how many values lie in it; weights and constants are there anyway.
        users: dict[int, int] = {storage: 1 for value in (*self._weights, *program.blank) for storage, _ in _storages(value)}
        alive_bytes = peak_bytes = 0

        def hold(value: Any) -> int:
            held_bytes = 0
            for storage, size_bytes in _storages(value):
                if storage not in users:
                    held_bytes += size_bytes
                users[storage] = users.get(storage, 0) + 1
            return held_bytes

        def release(value: Any) -> int:
            freed_bytes = 0
            for storage, size_bytes in _storages(value):
                users[storage] -= 1
                if not users[storage]:
                    del users[storage]
                    freed_bytes += size_bytes
            return freed_bytes

        for value in inputs:
            alive_bytes += hold(value)
        for call, gather, target, released, _ in program.steps:
            values[target] = call(*gather(values))
            alive_bytes += hold(values[target])
            peak_bytes = max(peak_bytes, alive_bytes)
            for slot in released:
                alive_bytes -= release(values[slot])
                values[slot] = None
        return max(peak_bytes, alive_bytes)


def _storages(value: Any) -> Iterator[tuple[int, int]]:
    """Yield the storages a value lies in, and their bytes; sizes lie in none."""
    if isinstance(value, torch.Tensor):
        storage = value.untyped_storage()
        yield storage._cdata, storage.nbytes()
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _storages(each)
