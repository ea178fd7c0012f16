"""The span of a device: bytes get there in pieces of slots, in lanes that do their work as late as they may."""

from __future__ import annotations

import random
import threading
import zlib
from collections.abc import Callable
from hashlib import sha256

import pytest
import torch
from trunkline.errors import DeviceFault, DeviceOutOfMemory

from sidecar import span as spans
from sidecar.devices import TorchDevice, open_device
from sidecar.errors import ConfigError
from sidecar.ir import Weight
from sidecar.span import Placed, PromptLane, Span, open_span
from tests.copying import CopyingDevice, LateLane

SLOT = 64
ROOM = 2048


def weight_of(content: bytes) -> Weight:
    return Weight(sha256(content).hexdigest(), "uint8", (len(content),), len(content), zlib.crc32(content))


class Bench:
    """A span of bytes, with lanes that do nothing before somebody waits for them."""

    def __init__(self, slot_count: int = 2) -> None:
        turn = threading.RLock()
        self.work, self.copies = LateLane(turn), LateLane(turn)
        self.room = torch.full((ROOM,), 0xFF, dtype=torch.uint8)
        slots = [torch.empty(SLOT, dtype=torch.uint8) for _ in range(slot_count)]
        self.span = Span(self.room, torch.empty(SLOT, dtype=torch.uint8), slots, self.work, self.copies)

    def at(self, offset: int, size_bytes: int) -> bytes:
        return bytes(self.room[offset : offset + size_bytes].tolist())

    def put(self, offset: int, content: bytes) -> Placed:
        taken = bytearray(content)
        self.span.write(offset, memoryview(taken))
        # They were taken.
        taken[:] = bytes(len(taken))
        return self.span.handle(offset, weight_of(content), self.span.mark())

    def reads(self, handle: Placed) -> Callable[[], bytes]:
        """Give the device a program that reads a weight; return what says what it saw, once it was run."""
        tensor, seen = handle.use(), list[bytes]()
        self.work.give(lambda: seen.append(bytes(tensor.tolist())))

        def run() -> bytes:
            self.work.run()
            return seen[0]

        return run


@pytest.mark.parametrize("slot_count", [2, 3])
@pytest.mark.parametrize("size_bytes", [0, 1, SLOT - 1, SLOT, SLOT + 1, 5 * SLOT, 5 * SLOT + 7])
def test_bytes_go_through_slots_whatever_their_number(size_bytes: int, slot_count: int) -> None:
    bench, content = Bench(slot_count), random.Random(size_bytes).randbytes(size_bytes)
    handle = bench.put(256, content)
    assert bench.reads(handle)() == content
    assert bench.at(256 + size_bytes, 8) == b"\xff" * 8


def test_small_weights_share_a_slot_and_none_is_written_over_before_it_was_copied() -> None:
    bench, draw = Bench(), random.Random(0)
    contents = [draw.randbytes(draw.randrange(1, 40)) for _ in range(40)]
    handles = [bench.put(48 * number, content) for number, content in enumerate(contents)]
    # The device is as far behind as the slots allow.
    assert bench.copies._done_count < bench.copies._given_count
    for handle, content in zip(handles, contents, strict=True):
        assert bench.reads(handle)() == content


def test_nothing_is_waited_for_before_a_slot_is_needed_again() -> None:
    bench = Bench()
    bench.put(0, bytes(SLOT))
    bench.put(SLOT, bytes(SLOT))
    assert bench.copies._done_count == 0
    bench.put(2 * SLOT, bytes(1))
    assert bench.copies._done_count > 0
    assert bench.work._given_count == 0


def test_a_program_waits_for_the_bytes_of_its_weights_once() -> None:
    bench = Bench()
    handle = bench.put(0, b"weight")
    assert bench.at(0, 6) == b"\xff" * 6
    assert bench.reads(handle)() == b"weight"
    given_count = bench.work._given_count
    handle.use()
    assert bench.work._given_count == given_count


def test_what_is_written_later_waits_for_programs_that_read_what_was_there() -> None:
    bench = Bench()
    handle = bench.put(0, b"before")
    read = bench.reads(handle)
    bench.span.let_go()
    bench.put(0, b"after!")
    # The device copies before it computes, where nobody says otherwise.
    bench.copies.run()
    assert bench.at(0, 6) == b"after!"
    assert read() == b"before"


@pytest.mark.parametrize("distance", [1, SLOT - 1, SLOT, SLOT + 5, 3 * SLOT, 600])
def test_bytes_move_down_behind_what_is_copied_and_before_what_comes(distance: int) -> None:
    bench, content = Bench(), random.Random(distance).randbytes(300)
    bench.put(distance, content)
    bench.span.move(distance, 0, len(content))
    # Copied to where it was, and not before it was read from there.
    bench.put(distance + 300 - min(distance, 300), bytes(min(distance, 300)))
    bench.copies.run()
    assert bench.reads(bench.span.handle(0, weight_of(content), None))() == content


@pytest.mark.parametrize(
    ("error", "kind"),
    [(RuntimeError("CUDA error: an illegal one"), DeviceFault), (torch.OutOfMemoryError("no"), DeviceOutOfMemory)],
)
def test_a_device_that_does_not_copy_says_how_much(error: Exception, kind: type[DeviceFault]) -> None:
    bench = Bench()
    bench.copies.error = error
    with pytest.raises(kind, match="copying 6 bytes to the device failed") as caught:
        bench.put(0, b"weight")
    assert type(caught.value) is kind
    bench.work.error = error
    with pytest.raises(kind, match="moving 300 bytes on the device failed"):
        bench.span.move(600, 0, 300)
    # The next is none the worse for it.
    assert bench.reads(bench.put(0, b"weight"))() == b"weight"


def test_on_a_cpu_all_is_done_at_once() -> None:
    made = open_span(torch.device("cpu"), 1024, SLOT)
    assert made.size_bytes == 1024
    content = random.Random(1).randbytes(500)
    made.write(256, memoryview(content))
    made.let_go()
    made.move(256, 0, 500)
    assert bytes(made.handle(0, weight_of(content), made.mark()).use().tolist()) == content
    lane = PromptLane()
    lane.wait(lane.mark())
    lane.mark().synchronize()


def test_a_span_that_the_device_has_no_room_for_is_refused_with_the_numbers() -> None:
    device = open_device("cpu")
    total_bytes = device.memory()["total_bytes"]
    with pytest.raises(ConfigError, match=f"cpu cannot set {1 << 47} bytes aside for weights, with {total_bytes} of") as caught:
        device.open_span(1 << 47)
    assert "lower the memory budget" in caught.value.message
    assert caught.value.details["size_bytes"] == 1 << 47
    assert "span_bytes" not in device.memory()


def test_a_span_counts_once_and_weights_in_it_do_not() -> None:
    device = CopyingDevice(late=False)
    made = device.open_span(4096)
    made.write(0, memoryview(b"weight"))
    handle = made.handle(0, weight_of(b"weight"), made.mark())
    assert device.memory()["span_bytes"] == 4096
    assert device.memory()["weight_bytes"] == 0
    assert device.copies
    assert not open_device("cpu").copies
    # Another shape of the same bytes is a view of them.
    view = device.as_weight(handle, Weight("0" * 64, "uint8", (2, 3), 6, 0))
    assert view.shape == (2, 3)
    assert view.data_ptr() == handle.use().data_ptr()


def test_bytes_on_disk_do_not_depend_on_the_device_that_they_are_copied_to() -> None:
    assert CopyingDevice().layout_facts() == ("plain",)
    assert open_device("cpu").layout_facts()[0] == "cpu"


# --- on a GPU ---------------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MB = 1 << 20


@pytest.fixture
def cuda() -> TorchDevice:
    return open_device("cuda")


def on_host(handle: Placed) -> torch.Tensor:
    return handle.use().cpu()


def noise(size_bytes: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (size_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def spin(device: TorchDevice, rounds: int = 40) -> torch.Tensor:
    """Give a device work that takes it a while, and return what comes of it."""
    square = torch.full((2048, 2048), 1 / 2048, device=device.name)
    for _ in range(rounds):
        square = square @ square
    return square


@pytest.mark.gpu
@needs_cuda
def test_cuda_memory_has_the_span_in_it_once(cuda: TorchDevice) -> None:
    before = cuda.memory()
    made = cuda.open_span(64 * MB)
    after = cuda.memory()
    assert after["span_bytes"] == made.size_bytes == 64 * MB
    # And the scratch that moves go through. torch rounds up.
    assert 0 <= after["allocated_bytes"] - before["allocated_bytes"] - 64 * MB - spans.SLOT_BYTES <= 4 * MB
    content = noise(MB, 0)
    made.write(0, memoryview(content.numpy()))  # type: ignore[arg-type]
    handle = made.handle(0, Weight("0" * 64, "uint8", (MB,), MB, 0), made.mark())
    assert torch.equal(on_host(handle), content)
    assert cuda.memory()["allocated_bytes"] == after["allocated_bytes"]


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_span_that_has_no_room_is_refused(cuda: TorchDevice) -> None:
    total_bytes = cuda.memory()["total_bytes"]
    with pytest.raises(ConfigError, match=f"cannot set {2 * total_bytes} bytes aside") as caught:
        cuda.open_span(2 * total_bytes)
    assert 0 < int(str(caught.value.details["free_bytes"])) <= total_bytes


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("size_bytes", [1, 4 * MB + 3, 3 * spans.SLOT_BYTES + 5, 9 * spans.SLOT_BYTES])
def test_bytes_arrive_on_cuda_through_pinned_slots(cuda: TorchDevice, size_bytes: int) -> None:
    made = cuda.open_span(10 * spans.SLOT_BYTES)
    assert all(slot.is_pinned() for slot in made._slots)
    content = noise(size_bytes, 1)
    taken = content.clone()
    made.write(256, memoryview(taken.numpy()))  # type: ignore[arg-type]
    taken.zero_()
    assert torch.equal(on_host(made.handle(256, Weight("0" * 64, "uint8", (size_bytes,), size_bytes, 0), made.mark())), content)


@pytest.mark.gpu
@needs_cuda
def test_many_small_weights_arrive_on_cuda_while_it_computes(cuda: TorchDevice) -> None:
    made, count, each_bytes = cuda.open_span(64 * MB), 2000, 30_000
    contents = noise(count * each_bytes, 2).view(count, each_bytes)
    busy = spin(cuda)
    handles = []
    for number in range(count):
        made.write(number * 30_208, memoryview(contents[number].numpy()))  # type: ignore[arg-type]
        handles.append(made.handle(number * 30_208, Weight("0" * 64, "uint8", (each_bytes,), each_bytes, 0), made.mark()))
    found = torch.stack([handle.use() for handle in handles]).cpu()
    assert torch.equal(found, contents)
    assert busy.isfinite().all()


@pytest.mark.gpu
@needs_cuda
def test_writing_waits_for_what_cuda_still_computes_with(cuda: TorchDevice) -> None:
    made, size_bytes = cuda.open_span(16 * MB), 8 * MB
    weight = Weight("0" * 64, "uint8", (size_bytes,), size_bytes, 0)
    for seed in range(8):
        first, second = noise(size_bytes, seed), noise(size_bytes, 100 + seed)
        made.write(0, memoryview(first.numpy()))  # type: ignore[arg-type]
        handle = made.handle(0, weight, made.mark())
        busy = spin(cuda)
        # Read after all of that, long after the next line was run here.
        seen = handle.use().clone()
        made.let_go()
        made.write(0, memoryview(second.numpy()))  # type: ignore[arg-type]
        assert torch.equal(on_host(made.handle(0, weight, made.mark())), second)
        assert torch.equal(seen.cpu(), first)
        assert busy.isfinite().all()
        made.let_go()


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("distance", [256, spans.SLOT_BYTES - 256, spans.SLOT_BYTES, 3 * spans.SLOT_BYTES])
def test_weights_move_on_cuda_between_what_is_copied_and_what_is_computed(cuda: TorchDevice, distance: int) -> None:
    size_bytes = 2 * spans.SLOT_BYTES + 512
    made = cuda.open_span(distance + size_bytes)
    weight = Weight("0" * 64, "uint8", (size_bytes,), size_bytes, 0)
    content = noise(size_bytes, 3)
    made.write(distance, memoryview(content.numpy()))  # type: ignore[arg-type]
    before = made.handle(distance, weight, made.mark())
    busy = spin(cuda)
    seen = before.use().clone()
    made.move(distance, 0, size_bytes)
    gap = min(distance, size_bytes)
    made.write(distance + size_bytes - gap, memoryview(bytearray(gap)))
    assert torch.equal(on_host(made.handle(0, weight, None)), content)
    assert torch.equal(seen.cpu(), content)
    assert busy.isfinite().all()
