"""Devices: where weights lie and programs run. One ``TorchDevice`` per torch device.

Nothing here chooses what to load or when: the engine decides, a device obeys. ``new_weight`` may be called from a mover
thread, and ``view`` from any, while programs are run by the engine's thread or by lanes; so may what writes into a span
(``sidecar.span``). Everything else belongs to the engine's thread.

On CUDA a lane has a stream of its own. What the engine's thread has begun before it hands over a run is waited for by an event
(``mark``, ``begin_after``); a lane's own work is complete when it has settled, and so may be used on any stream, and its inputs
freed. What the engine's thread begins with memory of a lane's is not waited for, so that memory is marked as used by it.
"""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from trunkline.errors import DeviceFault
from trunkline.protocol import ITEM_BYTES

from sidecar import blocked, flat, packed, sessions
from sidecar.dryrun import DryRun
from sidecar.errors import ConfigError
from sidecar.ir import Graph, Weight
from sidecar.libc import LIBC
from sidecar.lowering import BLOCKED, Recipe
from sidecar.prepare import prepare
from sidecar.programs import FAILURES, Program, failure
from sidecar.span import Placed, Span, open_span, read_as
from sidecar.stacked import Stack, StackedProgram, stack, stackable

Handle = packed.Packed | blocked.Blocked
# The dtypes that travel between a function and a model.
_DTYPE_NAMES = {getattr(torch, name): name for name in ITEM_BYTES}
_FIRST_BYTES = 4096
_CUDA = re.compile(r"cuda(?::(\d{1,3}))?")
_CORES = re.compile(r"cpu:(\d{1,4})(?:-(\d{1,4}))?")
# Held by who sets the process's number of threads for a moment.
_thread_count_lock = threading.Lock()


def open_device(name: str = "auto", threads: int | None = None) -> TorchDevice:
    """Return the device called ``auto``, ``cpu``, ``cpu:N``, ``cpu:N-M``, ``cuda`` or ``cuda:N``.

    ``auto`` is CUDA where there is one; with numbers, a CPU device has these of the cores. ``threads`` is how many CPU threads
    one operator may use, None for torch's choice. It holds for the process. Raises ConfigError when there is no such device.
    """
    if threads is not None:
        if threads < 1:
            raise ConfigError(f"threads must be at least 1, not {threads}", threads=threads)
        torch.set_num_threads(threads)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if count else "cpu"
    if name == "cpu":
        return TorchDevice(torch.device("cpu"))
    if cores := _CORES.fullmatch(name):
        return TorchDevice(torch.device("cpu"), _usable_cores(name, int(cores[1]), int(cores[2] or cores[1])))
    cuda = _CUDA.fullmatch(name)
    if not cuda:
        raise ConfigError(f"device {name[:40]!r} is none of auto, cpu, cpu:N, cpu:N-M, cuda, cuda:N", device=name[:40])
    number = int(cuda[1] or 0)
    if number >= count:
        raise ConfigError(f"there is no device {name}: torch finds {count} CUDA devices", device=name, found=count)
    # Bundles promise a tolerance for float32; TF32 convolutions would miss it.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return TorchDevice(torch.device("cuda", number))


def _usable_cores(name: str, first: int, last: int) -> list[int]:
    wanted, usable = range(first, last + 1), os.sched_getaffinity(0)
    if not wanted or not usable.issuperset(wanted):
        found = ", ".join(map(str, sorted(usable)))
        raise ConfigError(f"there is no device {name}: the cores that this process may use are {found}", device=name)
    return list(wanted)


class TorchDevice:
    """One torch device. Handles it gives out are torch tensors; callers pass them back and look at nothing inside."""

    def __init__(self, device: torch.device, cores: Sequence[int] = (), *, guarded: bool | None = None) -> None:
        """``cores`` are those of a CPU that is one of several devices; without, it has what the process has.

        ``guarded``: indices are looked at before a kernel meets them, as they are on CUDA in any case; see ``prepare``.
        """
        self._device = device
        self._is_cpu = device.type == "cpu"
        self._guarded = guarded
        self._cores = cores
        # Bytes of the span, once there is one.
        self._span_bytes = 0
        self._process_threads = torch.get_num_threads()
        self._threads = min(self._process_threads, len(cores)) if cores else self._process_threads
        # Sizes of the weights alive. Entries go when handles do, in whichever thread that happens.
        self._sizes: dict[object, int] = {}

    @property
    def name(self) -> str:
        """Return ``cpu``, ``cpu:N``, ``cpu:N-M`` or ``cuda:N``."""
        if not self._cores:
            return str(self._device)
        first, last = self._cores[0], self._cores[-1]
        return f"cpu:{first}" if first == last else f"cpu:{first}-{last}"

    def facts(self) -> dict[str, object]:
        """Return what an operator wants to know of this device: threads per operator, the versions of torch and ONNX Runtime."""
        return {"threads": self._threads, "torch": torch.__version__, "onnxruntime": sessions.version()}

    # --- lanes: threads that run programs at the same time ------------------------------------------------------------

    def enter(self) -> None:
        """Have the calling thread compute on this device's cores, with as many threads; threads that it starts stay there."""
        if self._cores:
            os.sched_setaffinity(0, self._cores)
            self._use_threads(self._threads)

    @property
    def lane_counts(self) -> tuple[int, ...]:
        """Return into how many lanes it may be worth while to divide this device: 1, and each time with half the threads."""
        # Of CUDA nothing was measured yet.
        shares = [self._threads >> halvings for halvings in range(self._threads.bit_length())] if self._is_cpu else [1]
        return tuple(self._threads // share for share in shares) if self._is_cpu else (1,)

    @property
    def is_shared_by_lanes(self) -> bool:
        """Return whether a lane has but a part of the device, and a stage that is run by itself is done sooner outside of it."""
        return self._is_cpu

    def begin_lane(self, count: int) -> None:
        """Make the calling thread one of ``count`` lanes: it has its share of the threads, or a stream, from now on.

        Raises DeviceFault where there is no room for a stream, and where weights lie in a span: they move while others run.
        """
        if self._span_bytes:
            raise DeviceFault("weights in a span may be moved while a lane reads them")
        if not self._is_cpu:
            try:
                torch.cuda.set_device(self._device)
                torch.cuda.set_stream(torch.cuda.Stream(self._device))
            except FAILURES as error:
                raise failure(f"beginning a lane on {self.name}", error) from error
            return
        self._use_threads(max(1, self._threads // count))

    def _use_threads(self, count: int) -> None:
        """Have operators of the calling thread use so many threads."""
        with _thread_count_lock:
            # A thread takes over the process's number when it first needs it; what is set before that would be lost.
            torch.get_num_threads()
            torch.set_num_threads(count)
            # That was the process's number, too, for threads that are to come: put right by one that ends with that.
            other = threading.Thread(target=torch.set_num_threads, args=(self._process_threads,))
            other.start()
            other.join()

    def mark(self) -> object:
        """Return what stands for all that the calling thread has begun so far; for ``begin_after``."""
        return None if self._is_cpu else torch.cuda.current_stream(self._device).record_event()

    def begin_after(self, mark: Any) -> None:
        """Have the calling lane begin nothing before all that ``mark`` stands for is done."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)

    def settle(self) -> None:
        """Wait until all that the calling lane has begun is done. Raises DeviceFault when that went wrong."""
        if not self._is_cpu:
            try:
                torch.cuda.current_stream(self._device).synchronize()
            except FAILURES as error:
                raise failure(f"waiting for a lane of {self.name}", error) from error

    def _uses(self, tensors: Sequence[torch.Tensor]) -> None:
        """Say that the calling thread begins something with tensors: their memory is not given away before that is done."""
        if not self._is_cpu:
            stream = torch.cuda.current_stream(self._device)
            for tensor in tensors:
                if tensor.is_cuda:
                    tensor.record_stream(stream)

    # --- weights ----------------------------------------------------------------------------------------------------

    def new_weight(self, weight: Weight, fill: Callable[[memoryview], None]) -> torch.Tensor:
        """Allocate a weight and have ``fill`` write its bytes; return the handle, which owns the memory.

        ``fill`` gets a writable memoryview of exactly ``size_bytes`` bytes, on the CPU the weight's own memory. What it
        raises passes through and the memory is freed. Raises DeviceFault when there is no memory.
        """
        staging = self._allocate(weight.size_bytes, on_host=True)
        fill(memoryview(staging.numpy()) if weight.size_bytes else memoryview(bytearray()))  # type: ignore[arg-type]
        held = staging
        if not self._is_cpu:
            held = self._allocate(weight.size_bytes, on_host=False)
            held.copy_(staging)
        tensor = read_as(held, weight)
        self._count(tensor, weight.size_bytes)
        return tensor

    def over(self, memory: memoryview, weight: Weight) -> torch.Tensor:
        """Return the handle of a weight whose bytes are there already, in host memory that it shares. CPU only."""
        if not weight.size_bytes:
            return torch.empty(weight.shape, dtype=getattr(torch, weight.dtype))
        if hasattr(np, weight.dtype):
            # torch's views let other threads run in between, and then wait for their turn, longer than all this takes.
            return torch.from_numpy(np.frombuffer(memory, weight.dtype).reshape(weight.shape))
        return cast("torch.Tensor", read_as(torch.frombuffer(memory, dtype=torch.uint8), weight))

    def _count(self, handle: object, size_bytes: int) -> None:
        token = object()
        self._sizes[token] = size_bytes
        weakref.finalize(handle, self._sizes.pop, token)

    def _allocate(self, size_bytes: int, on_host: bool) -> torch.Tensor:
        try:
            if on_host:
                return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=not self._is_cpu)
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            raise self._no_room(size_bytes) from error

    def _no_room(self, size_bytes: int) -> DeviceFault:
        facts = {"size_bytes": size_bytes, **self.memory()}
        return DeviceFault(f"{self.name} has no room for a weight of {size_bytes} bytes", **facts)

    def as_weight(self, held: torch.Tensor | Handle | Placed, weight: Weight) -> torch.Tensor | Handle:
        """Return ``held`` read with the dtype and shape of ``weight``, which has the same bytes; a packed weight as it is.

        What is computed from now on waits for its bytes, if they are still on their way to the device.

        Two weights may have one digest and different shapes: a row of zeros and a square of zeros of the same size.
        Where dtype and shape agree already, this is ``held`` itself; otherwise a view that shares its memory.
        """
        if isinstance(held, packed.Packed | blocked.Blocked):
            return held
        if isinstance(held, Placed):
            held = held.use()
        if held.shape == weight.shape and held.dtype == getattr(torch, weight.dtype):
            return held
        view = read_as(held.reshape(-1).view(torch.uint8), weight)
        view._held = held  # the count of weight bytes follows the first handle
        return view

    @property
    def copies(self) -> bool:
        """Return whether weights are computed with in memory of the device's own, to which they are copied."""
        return not self._is_cpu

    def open_span(self, size_bytes: int) -> Span:
        """Allocate memory for weights in one piece. Once. Raises ConfigError when the device has not that much."""
        try:
            made = open_span(self._device, size_bytes)
        except FAILURES as error:
            found = self.memory()
            free_bytes, reason = found.get("free_bytes", found["total_bytes"]), str(error).partition("\n")[0][:200]
            raise ConfigError(
                f"{self.name} cannot set {size_bytes} bytes aside for weights, with {free_bytes} of {found['total_bytes']} free "
                f"({reason}); lower the memory budget",
                **(found | {"size_bytes": size_bytes}),
            ) from error
        self._span_bytes = made.size_bytes
        return made

    # --- packed weights ---------------------------------------------------------------------------------------------

    @property
    def can_pack(self) -> bool:
        """Return whether this device runs lowered graphs. Where it does not, nothing below may be called."""
        return self._is_cpu and packed.available()

    @property
    def block(self) -> int:
        """Return how many channels are in a block where lowered graphs with weights in blocks are run; 0 where they are not."""
        return sessions.block() if self.can_pack else 0

    def packed_bytes(self, recipe: Recipe) -> int:
        """Return the bytes of memory that the packed weight of ``recipe`` takes. The first of its kind is measured: slow."""
        return packed.packed_bytes(recipe) if recipe.block is None else blocked.layout_of(recipe).size_bytes

    def new_packed(self, recipe: Recipe, fills: Sequence[Callable[[memoryview], None]]) -> Handle:
        """Make a packed weight of sources that ``fills`` write, one per source of ``recipe``; return the handle, which owns it.

        For a moment this needs memory for the sources and as much again. Each fill gets what ``new_weight`` gives it, and
        what it raises passes through. Raises DeviceFault when there is no memory.
        """
        sources = []
        for weight, fill in zip(recipe.sources, fills, strict=True):
            scratch = self._allocate(weight.size_bytes, on_host=True)
            fill(memoryview(scratch.numpy()))  # type: ignore[arg-type]
            sources.append(read_as(scratch, weight))
        try:
            handle = packed.pack(recipe, sources) if recipe.block is None else blocked.pack_blocked(recipe, sources)
        except (RuntimeError, MemoryError) as error:
            raise self._no_room(sum(weight.size_bytes for weight in recipe.sources)) from error
        self._count(handle, handle.size_bytes)
        return handle

    @property
    def works_in_place(self) -> bool:
        """Return whether weights may lie in memory of the caller's, packed ones, if there are any, included."""
        return not self.copies and (flat.can_flatten() or not self.can_pack)

    def layout_facts(self) -> Sequence[str]:
        """Return what the bytes of weights depend on beside the weights."""
        # Bytes that are copied are the same on every device.
        return ("plain",) if self.copies else (self.name, *(flat.facts() if self.can_pack else ()))

    def flatten(self, handle: Handle) -> flat.Flat:
        """Return a packed weight as bytes, and what is needed to read them. Only where it ``works_in_place``."""
        return flat.flatten(handle)

    def packed_over(self, meta: bytes, memory: memoryview) -> Handle:
        """Return the handle of a packed weight whose bytes are there already, in host memory that it shares.

        Raises ValueError where they were laid out otherwise than this device needs them.
        """
        return flat.unflatten(meta, memory)

    def prepare_lowered(self, graph: Graph, is_long: bool = False) -> Program | sessions.SessionProgram:
        """Return the weightless program of a graph that ``lower`` made. Raises BundleError when this torch cannot run a node.

        One that ``is_long`` has several stages; beside it there is nothing to run. It raises Unjoined where they run one by one.
        Its packed weights are handles of ``new_packed``, the others of ``new_weight``. ONNX Runtime runs those with blocks.
        """
        is_blocked = any(node.op in BLOCKED for node in graph.nodes)
        if is_blocked and is_long:
            return sessions.SessionProgram(graph, None)
        program = prepare(graph, self._device, lowered=True, guarded=self._guarded)
        return sessions.SessionProgram(graph, program) if is_blocked else program

    def can_run_in_session(self, graph: Graph) -> bool:
        """Say whether ONNX Runtime has all operators of a lowered graph with weights in blocks."""
        return sessions.has_operators(graph)

    # --- programs ---------------------------------------------------------------------------------------------------

    def prepare(self, graph: Graph) -> Program:
        """Return the weightless program of a graph. Raises BundleError when this torch cannot run a node."""
        return prepare(graph, self._device, guarded=self._guarded)

    def dry_run(self, graph: Graph) -> DryRun:
        """Return a graph to be run on shapes alone; see there."""
        return DryRun(graph)

    def run(
        self, program: Program | sessions.SessionProgram, weights: Sequence[object], inputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Run a program on weights and inputs in the order of its graph; return its outputs in that order.

        Inputs are views in host memory, unchanged until the outputs were read. Outputs share no memory with weights or
        inputs. On CUDA the work may still be under way when this returns; ``read_output`` waits for it. Raises
        ValueOutOfBounds, DeviceFault, and of the latter DeviceOutOfMemory when there is no room.
        """
        if not self._is_cpu:
            inputs = [self._brought(tensor) for tensor in inputs]
        return program.run(weights, inputs)

    def _brought(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor on this device. Raises DeviceOutOfMemory, DeviceFault."""
        try:
            return tensor.to(self._device, non_blocking=True)
        except FAILURES as error:
            raise failure(f"bringing {tensor.nbytes} bytes to {self.name}", error) from error

    # --- between stages: they raise DeviceOutOfMemory when there is no room, DeviceFault when something else is wrong ----

    def join(self, tensors: Sequence[torch.Tensor], axis: int) -> torch.Tensor:
        """Return tensors one after the other along an axis."""
        try:
            with torch.inference_mode():
                self._uses(tensors)
                return torch.cat([tensor.to(self._device) for tensor in tensors], axis)
        except FAILURES as error:
            raise failure(f"joining {len(tensors)} tensors on {self.name}", error) from error

    def pad(self, tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
        """Return a tensor of ``size`` along an axis, zeros after what there is."""
        shape = list(tensor.shape)
        shape[axis] = size - shape[axis]
        try:
            zeros = torch.zeros(shape, dtype=tensor.dtype)
        except FAILURES as error:
            raise failure(f"padding a tensor to {size} places", error) from error
        return self.join([tensor, zeros], axis)

    def part(self, tensor: torch.Tensor, axis: int, start: int, length: int) -> torch.Tensor:
        """Return a part of a tensor along an axis; it shares memory with the whole."""
        try:
            with torch.inference_mode():
                return tensor.narrow(axis, start, length)
        except (RuntimeError, IndexError) as error:
            raise DeviceFault(
                f"a tensor of shape {list(tensor.shape)} has no {length} places from {start} on axis {axis}"
            ) from error

    def same(self, one: torch.Tensor, other: torch.Tensor) -> bool:
        """Say whether two inputs, contiguous in host memory, are alike in shape, dtype and every bit."""
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        # Bytes, because numbers that compare equal can differ: zeros have a sign.
        if one.data_ptr() == other.data_ptr():
            return True
        first, second = _bytes(one), _bytes(other)
        # Inputs that differ mostly do so soon.
        return torch.equal(first[:_FIRST_BYTES], second[:_FIRST_BYTES]) and torch.equal(first, second)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor."""
        try:
            with torch.inference_mode():
                self._uses([tensor])
                return tensor.clone()
        except FAILURES as error:
            raise failure(f"copying a tensor of {tensor.nbytes} bytes", error) from error

    def agree(self, one: torch.Tensor, other: torch.Tensor, tolerance: float | None) -> bool:
        """Say whether two results are the same: to the bit when ``tolerance`` is None, else relative to the largest number.

        On CUDA a kernel may be another for another batch, so that to the bit means to the last few there. Every
        not-a-number is like another.
        """
        if one.shape != other.shape or one.dtype != other.dtype:
            return False
        if not one.is_floating_point():
            return torch.equal(one, other)
        if tolerance is None:
            tolerance = 0.0 if self._is_cpu else 1e-5
        one, other = one.double(), other.double()
        finite = other[other.isfinite()].abs()
        largest = float(finite.max()) if finite.numel() else 0.0
        return torch.allclose(one, other, rtol=0.0, atol=tolerance * largest, equal_nan=True)

    def stacks(self, graph: Graph) -> bool:
        """Say whether stages of this structure, with weights of their own, can be run as one."""
        return stackable(graph)

    # --- several models as one --------------------------------------------------------------------------------------

    def stacked(self, graph: Graph, program: Program) -> StackedProgram | None:
        """Return the program that runs any number of models of this structure as one; None where there is none."""
        return StackedProgram(graph, program) if stackable(graph) else None

    def stack(self, handles: Sequence[Sequence[object]]) -> list[Stack]:
        """Return the weights of several models, each in the graph's order, as ``run_stacked`` takes them: copies.

        Raises DeviceOutOfMemory when there is no room, DeviceFault when something else is wrong.
        """
        try:
            return stack(handles)
        except FAILURES as error:
            raise failure(f"stacking the weights of {len(handles)} models", error) from error

    def run_stacked(
        self, program: StackedProgram, weights: Sequence[Stack], inputs: Sequence[Sequence[torch.Tensor]]
    ) -> list[list[torch.Tensor]]:
        """Run models as one, all on one list of ``inputs`` or each on one of its own; return the outputs of each.

        Raises ValueOutOfBounds when an index of any of them is out of range, DeviceOutOfMemory, DeviceFault.
        """
        if not self._is_cpu:
            inputs = [[self._brought(tensor) for tensor in each] for each in inputs]
        try:
            return program.run(weights, inputs)
        except FAILURES as error:
            raise failure("running several models as one", error) from error

    # --- inputs and outputs -----------------------------------------------------------------------------------------

    def view(self, buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Return writable C-contiguous bytes as a tensor in host memory that shares them. Any thread."""
        if not buffer.nbytes:
            return torch.empty(shape, dtype=getattr(torch, dtype))
        return torch.frombuffer(buffer, dtype=getattr(torch, dtype)).view(shape)

    def output_spec(self, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
        """Return dtype (numpy's name) and shape of an output. Raises DeviceFault for a dtype that cannot travel."""
        name = _DTYPE_NAMES.get(tensor.dtype)
        if name is None:
            raise DeviceFault(f"an output is {tensor.dtype}, which no function can read; pack the model with a float32 output")
        return name, tuple(tensor.shape)

    def read_output(self, tensor: torch.Tensor, target: torch.Tensor) -> None:
        """Write an output into ``target``, a view of its dtype and shape. Waits for the run that makes it.

        Raises DeviceOutOfMemory when there is no room on the way, DeviceFault when something else is wrong.
        """
        try:
            target.copy_(tensor)
        except FAILURES as error:
            raise failure(f"reading an output from {self.name}", error) from error

    def trim(self) -> None:
        """Return to the system what finished runs left behind in the host's allocator. Takes milliseconds."""
        # torch frees activations, but glibc keeps tens of megabytes of them for the next run.
        if hasattr(LIBC, "malloc_trim"):
            LIBC.malloc_trim(0)

    def is_lost(self) -> bool:
        """Say, after a fault, whether this process can compute on the device no more; waits for what is under way there.

        A failed assertion or a bad address in a kernel ends a process's use of a GPU: all that follows fails. A CPU has no such
        state.
        """
        if self._is_cpu:
            return False
        try:
            torch.cuda.synchronize(self._device)
        except FAILURES:
            return True
        return False

    def memory(self) -> dict[str, int]:
        """Return bytes: of weights held one by one, of the span if there is one, allocated by torch (CUDA), and in all.

        What torch has allocated has the span in it, once, whatever lies in it.
        """
        found = {"weight_bytes": sum(list(self._sizes.values()))}
        if self._span_bytes:
            found["span_bytes"] = self._span_bytes
        if self._is_cpu:
            found["total_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        else:
            free_bytes, found["total_bytes"] = torch.cuda.mem_get_info(self._device)
            found["free_bytes"] = free_bytes
            found["allocated_bytes"] = torch.cuda.memory_allocated(self._device)
            found["reserved_bytes"] = torch.cuda.memory_reserved(self._device)
        return found


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
