"""The span: memory of a device in one piece, and how bytes get there while it computes.

What a device does for us it does in *lanes*, one thing after the other in each, by itself: ``work`` is where programs run,
``copies`` where bytes come in. A *mark* is a point in a lane; another lane may be told to wait for it, and no processor does.
Three rules keep the two apart, and none of them waits for the device:

1. What is computed with a weight is told to wait for the mark behind its bytes, once, when it is first used.
2. What is written after weights were let go of waits for all that the device was given to compute until then.
3. Weights are moved in ``work``, behind all copies so far, and what is copied later waits for that.

Bytes go through a ring of *slots*, host memory that the device can reach by itself (pinned): filled by us, emptied by the
device. Only one who comes to a slot again waits for the mark behind its last bytes. On a CPU, where tests run it, a lane does
what it is told at once. Must not import anything above layer 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import torch

from sidecar.ir import Weight
from sidecar.programs import FAILURES, failure

SLOT_BYTES: Final = 16 << 20
SLOT_COUNT: Final = 4


class Mark(Protocol):
    """A point in a lane."""

    def synchronize(self) -> None:
        """Wait until the device has come there."""


class Lane(Protocol):
    """What a device does one after the other. Its methods return before it is done. Any thread."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Copy bytes; the two must not overlap."""

    def mark(self) -> Mark:
        """Return the point behind all that was given until now."""

    def wait(self, mark: Mark) -> None:
        """Do what is given from now on only when another lane has come to a mark of its own."""


class CudaLane:
    """A stream of a CUDA device."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def mark(self) -> Mark:
        # Who waits for it sleeps.
        event = torch.cuda.Event(blocking=True)
        event.record(self._stream)
        return event

    def wait(self, mark: Mark) -> None:
        self._stream.wait_event(mark)  # type: ignore[arg-type]


class PromptLane:
    """A lane that has done what it is given when it returns."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def mark(self) -> Mark:
        return self

    def wait(self, mark: Mark) -> None:
        """Do nothing: the other has come there."""

    def synchronize(self) -> None:
        """Do nothing, as before."""


class Placed:
    """The handle of a weight in a span."""

    __slots__ = ("_mark", "_tensor", "_work")

    def __init__(self, tensor: torch.Tensor, work: Lane, mark: Mark | None) -> None:
        self._tensor = tensor
        self._work = work
        self._mark = mark

    def use(self) -> torch.Tensor:
        """Return the weight; what the device is given to compute from now on waits for its bytes. The engine's thread."""
        if self._mark is not None:
            self._work.wait(self._mark)
            self._mark = None
        return self._tensor


class Span:
    """Room for weights. ``write``, ``mark`` and ``let_go`` are the mover's; ``move`` is the engine's, while that waits."""

    def __init__(
        self, room: torch.Tensor, scratch: torch.Tensor, slots: Sequence[torch.Tensor], work: Lane, copies: Lane
    ) -> None:
        """``room`` and ``scratch`` are bytes of the device, ``slots`` two or more of the host, all of one size."""
        self._room = room
        self._scratch = scratch
        self._slots = slots
        # Short calls into torch would keep the interpreter's lock.
        self._arrays = [slot.numpy() for slot in slots]
        self._work = work
        self._copies = copies
        # The slot that is being filled, and how far; and the marks behind what was last copied out of each.
        self._slot = 0
        self._filled_bytes = 0
        self._marks: list[Mark | None] = [None] * len(slots)

    @property
    def size_bytes(self) -> int:
        return self._room.nbytes

    def write(self, offset: int, content: memoryview) -> None:
        """Have bytes copied to an offset. They were taken when this returns, and are there at the next mark.

        Raises DeviceFault.
        """
        source = np.frombuffer(content, np.uint8) if content.nbytes else np.empty(0, np.uint8)
        written_bytes = 0
        try:
            while written_bytes < len(source):
                if self._filled_bytes == len(self._arrays[self._slot]):
                    self._next_slot()
                start = self._filled_bytes
                end = min(len(self._arrays[self._slot]), start + len(source) - written_bytes)
                np.copyto(self._arrays[self._slot][start:end], source[written_bytes : written_bytes + end - start])
                at = offset + written_bytes
                self._copies.copy(self._room[at : at + end - start], self._slots[self._slot][start:end])
                written_bytes += end - start
                self._filled_bytes = end
        except FAILURES as error:
            raise failure(f"copying {len(source)} bytes to the device", error) from error

    def _next_slot(self) -> None:
        self._marks[self._slot] = self._copies.mark()
        self._slot = (self._slot + 1) % len(self._slots)
        self._filled_bytes = 0
        if (mark := self._marks[self._slot]) is not None:
            mark.synchronize()

    def mark(self) -> Mark:
        """Return the point behind all that was written."""
        return self._copies.mark()

    def handle(self, offset: int, weight: Weight, mark: Mark | None) -> Placed:
        """Return the handle of a weight whose bytes are there when the device has come to ``mark``; None: by themselves."""
        return Placed(read_as(self._room[offset : offset + weight.size_bytes], weight), self._work, mark)

    def let_go(self) -> None:
        """Have what is written from now on wait for all that the device was given to compute: it may read what was there."""
        self._copies.wait(self._work.mark())

    def move(self, source: int, target: int, size_bytes: int) -> None:
        """Move bytes down, from ``source`` to ``target``; the two may overlap. Raises DeviceFault."""
        assert target < source, "bytes move down"
        try:
            self._work.wait(self._copies.mark())
            # Copies that overlap are undefined on CUDA. By way of a scratch, a piece is read before anything is written over it.
            is_apart = target + size_bytes <= source
            step_bytes = size_bytes if is_apart else self._scratch.nbytes
            for start in range(0, size_bytes, step_bytes):
                length = min(step_bytes, size_bytes - start)
                piece = self._room[source + start : source + start + length]
                if not is_apart:
                    self._work.copy(self._scratch[:length], piece)
                    piece = self._scratch[:length]
                self._work.copy(self._room[target + start : target + start + length], piece)
            self._copies.wait(self._work.mark())
        except FAILURES as error:
            raise failure(f"moving {size_bytes} bytes on the device", error) from error


def open_span(device: torch.device, size_bytes: int, slot_bytes: int = SLOT_BYTES) -> Span:
    """Allocate a span, and all that is needed to fill it. Raises what torch raises when there is no room for it."""
    is_cuda = device.type == "cuda"
    room, scratch = (torch.empty(size, dtype=torch.uint8, device=device) for size in (size_bytes, slot_bytes))
    slots = [torch.empty(slot_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(SLOT_COUNT)]
    if not is_cuda:
        return Span(room, scratch, slots, PromptLane(), PromptLane())
    # Programs run in the stream that is every thread's own unless it says otherwise.
    work, copies = torch.cuda.default_stream(device), torch.cuda.Stream(device)
    return Span(room, scratch, slots, CudaLane(work), CudaLane(copies))


def read_as(flat: torch.Tensor, weight: Weight) -> Any:
    """Return flat bytes as a tensor of the weight's dtype and shape, sharing memory."""
    return flat.view(getattr(torch, weight.dtype)).view(weight.shape)
