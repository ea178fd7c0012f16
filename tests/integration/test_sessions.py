"""Models in sessions of ONNX Runtime: the answers of the models they are made of, from weights they are lent."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trunkline.errors import DeviceFault, DeviceOutOfMemory
from trunkline.protocol import TensorSpec

from sidecar import flat, sessions
from sidecar.blocked import Blocked, layout_of, over, pack_blocked
from sidecar.devices import TorchDevice, open_device
from sidecar.export import Source
from sidecar.ir import Argument, Graph
from sidecar.lowering import BLOCKED_CONV2D, BLOCKED_LINEAR, lower
from sidecar.sessions import SessionProgram
from sidecar.stretches import Unjoined
from tests import zoo
from tests.integration.test_packed import ACTIVATIONS, PLANS, Blobs, Maker, X, Y, assert_close, filler, load, resized
from tests.waiting import PATIENCE_S


@pytest.fixture
def device() -> TorchDevice:
    found = open_device("cpu")
    if not found.block:
        pytest.skip("ONNX Runtime is not here, or has no convolutions in blocks on this processor")
    return found


def blocked(make: Maker, device: TorchDevice, *results: Any) -> tuple[Any, Any, SessionProgram, Graph]:
    """Return two functions of inputs, the model as it is and in a session, the session's program, and the lowered graph."""
    specs = tuple(TensorSpec(name, "float32", ()) for name in "xy")
    outputs = tuple(TensorSpec(f"o{number}", "float32", ()) for number in range(len(results)))
    graph = Graph((), specs, outputs, tuple(make.weights), tuple(make.nodes), results)
    lowered = lower(graph, device.packed_bytes, device.block)
    assert device.can_run_in_session(lowered.graph)
    base = [device.new_weight(weight, filler(make.blobs[weight.digest])) for weight in make.weights]
    handles = load(device, lowered, make.blobs)
    plain, program = device.prepare(graph), device.prepare_lowered(lowered.graph)
    assert isinstance(program, SessionProgram)
    unused = torch.zeros(1)
    return (
        lambda x, y=unused: device.run(plain, base, [x, y]),
        lambda x, y=unused: device.run(program, handles, [x, y]),
        program,
        lowered.graph,
    )


# --- whole models ---------------------------------------------------------------------------------------------------

LARGER = {
    "wide resnet": lambda: zoo.resnet(64, 64, 1000),
    "wide efficientnet": lambda: zoo.efficientnet_lite(),
    "wide densenet": lambda: zoo.densenet(16),
    "wide vgg": lambda: zoo.vgg(16, 224),
    "wide vit": lambda: zoo.vit(384, 4, 1),
}


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "densenet", "mlp", "vit", *LARGER])
def test_a_model_in_a_session_answers_as_the_model_does(device: TorchDevice, name: str) -> None:
    if name in LARGER:
        source: Source = LARGER[name]()
        made = zoo.packed(source)
        graph, blobs = made.bundle.graph, {digest: bytes(content) for digest, content in made.blobs}
    else:
        source, bundle, blobs = zoo.stored(name)
        graph = bundle.graph
    lowered = lower(graph, device.packed_bytes, device.block)
    assert device.can_run_in_session(lowered.graph)
    base = [device.new_weight(weight, filler(blobs[weight.digest])) for weight in graph.weights]
    before = device.memory()["weight_bytes"]
    handles = load(device, lowered, blobs)
    assert device.memory()["weight_bytes"] - before == sum(weight.size_bytes for weight in lowered.graph.weights)
    inputs = list(source.inputs.values()) if isinstance(source.inputs, dict) else list(source.inputs)
    plain, program = device.prepare(graph), device.prepare_lowered(lowered.graph)
    assert isinstance(program, SessionProgram)
    for batch in (1, 2, 5):
        given = resized(inputs, batch)
        kept = [tensor.clone() for tensor in given]
        answer = device.run(program, handles, given)
        assert_close(answer, device.run(plain, base, given))
        assert all(torch.equal(one, other) for one, other in zip(given, kept, strict=True))
        again = device.run(program, handles, given)
        assert all(torch.equal(one, other) for one, other in zip(answer, again, strict=True))
    assert program.fallback_count == 0


@pytest.mark.parametrize("name", ["unet", "minilm", "pair"])
def test_a_model_with_other_operators_has_no_session(device: TorchDevice, name: str) -> None:
    _, bundle, _ = zoo.stored(name)
    assert not device.can_run_in_session(lower(bundle.graph, device.packed_bytes, device.block).graph)


def test_one_session_serves_all_batches_and_all_weights(device: TorchDevice) -> None:
    source, bundle, blobs = zoo.stored("resnet")
    lowered = lower(bundle.graph, device.packed_bytes, device.block)
    program = device.prepare_lowered(lowered.graph)
    assert isinstance(program, SessionProgram)
    handles = load(device, lowered, blobs)
    altered = load(device, lowered, {digest: (np.frombuffer(blob, np.float32) * 0.5).tobytes() for digest, blob in blobs.items()})
    (x,) = source.inputs.values() if isinstance(source.inputs, dict) else source.inputs
    alone = device.run(program, handles, [x])
    other = device.run(program, altered, [x])
    assert not torch.equal(alone[0], other[0])
    for batch in (2, 3, 7):
        device.run(program, handles, resized([x], batch))
    assert torch.equal(device.run(program, handles, [x])[0], alone[0])
    assert len(program._sessions) == 1
    assert program.fallback_count == 0


# --- single layers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [*PLANS, (32, 32, (3, 3), (1, 1), (1, 1), (1, 1), 2)])
@pytest.mark.parametrize("absent", [(), (0, 1), None], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_with_and_without_norm(device: TorchDevice, plan: Any, absent: tuple[int, ...] | None, bias: bool) -> None:
    inside, outside, kernel, stride, padding, dilation, groups = plan
    make = Maker()
    weight = make.weight(torch.randn(outside, inside // groups, *kernel))
    held = make.weight(torch.randn(outside)) if bias else None
    out = make.add("conv2d.default", X, weight, held, stride, padding, dilation, groups)
    out = make.add("relu.default", out if absent is None else make.norm(out, outside, absent))
    plain, session, program, graph = blocked(make, device, out)
    assert [node.op for node in graph.nodes] == [BLOCKED_CONV2D]
    for shape in ((1, inside, 9, 12), (3, inside, 16, 11)):
        x = torch.randn(shape)
        assert_close(session(x), plain(x))
        last = x.contiguous(memory_format=torch.channels_last)
        assert_close(session(last), plain(x))
    assert program.fallback_count == 0
    if absent is None:
        # One picture without a batch: torch takes that.
        x = torch.randn(inside, 9, 12)
        assert_close(session(x), plain(x))
        assert program.fallback_count == 1


@pytest.mark.parametrize("normed", [True, False])
def test_a_convolution_whose_channels_fill_no_blocks_stands_as_it_is(device: TorchDevice, normed: bool) -> None:
    make = Maker()
    out = make.add("conv2d.default", X, make.weight(torch.randn(17, 4, 3, 3)), make.weight(torch.randn(17)), (2, 2), (1, 1))
    out = make.add("relu.default", make.norm(out, 17) if normed else out)
    out = make.add("conv2d.default", make.add("cat.default", (out, out), 1), make.weight(torch.randn(16, 34, 1, 1)))
    out = make.add("conv2d.default", out, make.weight(torch.randn(16, 16, 1, 1)))
    plain, session, program, graph = blocked(make, device, out)
    assert {"aten.conv2d.default", BLOCKED_CONV2D} <= {node.op for node in graph.nodes}
    x = torch.randn(2, 4, 9, 12)
    assert_close(session(x), plain(x))
    assert program.fallback_count == 0


@pytest.mark.parametrize(("name", "args"), ACTIVATIONS)
@pytest.mark.parametrize("kind", ["conv2d", "linear", "conv2d with a residual", "linear with a residual", "alone"])
def test_activations_agree(device: TorchDevice, kind: str, name: str, args: tuple[Argument, ...]) -> None:
    make = Maker()
    if kind.startswith("conv2d"):
        out, shape = (
            make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3) * 0.05), None, (1, 1), (1, 1)),
            (2, 16, 8, 8),
        )
    else:
        out, shape = make.add("linear.default", X, make.weight(torch.randn(64, 64) * 0.05)), (2, 3, 64)
    if kind.endswith("residual"):
        out = make.add("add.Tensor", out, X)
    elif kind == "alone":
        out = make.add("mul.Tensor", out, out)
    plain, session, program, _ = blocked(make, device, make.add(f"{name}.default", out, *args))
    for scale in (0.01, 1.0, 10.0):
        x = torch.randn(shape) * scale
        assert_close(session(x), plain(x))
    assert program.fallback_count == 0


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", [(2, 16, 6, 6), (1, 16, 6, 6), (16, 1, 1), (2, 16, 1, 1), (2, 1, 6, 6), (1,)], ids=str)
def test_a_residual_of_any_shape_is_added(device: TorchDevice, shape: tuple[int, ...], relu: bool) -> None:
    """What is spread over the others is never added in blocks, where it would be spread otherwise."""
    make = Maker()
    out = make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3)), None, (1, 1), (1, 1))
    out = make.add("add.Tensor", out, Y)
    plain, session, _, _ = blocked(make, device, make.add("relu.default", out) if relu else out)
    x, y = torch.randn(2, 16, 6, 6), torch.randn(shape)
    for given in (y, y.double(), y.contiguous(memory_format=torch.channels_last) if y.dim() == 4 else y):
        kept = given.clone()
        assert_close(session(x, given), plain(x, given))
        assert torch.equal(given, kept)


def test_what_is_multiplied_with_one_number_of_each_channel(device: TorchDevice) -> None:
    """As squeeze and excitation do: the same channels, and another picture."""
    make = Maker()
    wide = make.add("conv2d.default", X, make.weight(torch.randn(32, 16, 3, 3)))
    few = make.add("adaptive_avg_pool2d.default", wide, (1, 1))
    gate = make.add("sigmoid.default", make.add("conv2d.default", few, make.weight(torch.randn(32, 32, 1, 1))))
    plain, session, program, _ = blocked(make, device, make.add("mul.Tensor", wide, gate))
    for size in (9, 3):  # of a picture of 3, one number of each channel is left
        x = torch.randn(2, 16, size, size)
        assert_close(session(x), plain(x))
    assert program.fallback_count in (0, 1)


@pytest.mark.parametrize("shape", [(2, 5, 64), (7, 64)], ids=str)
def test_linear_layers_one_after_the_other(device: TorchDevice, shape: tuple[int, ...]) -> None:
    make = Maker()
    out = make.add("linear.default", X, make.weight(torch.randn(128, 64)), make.weight(torch.randn(128)))
    out = make.add("linear.default", make.add("gelu.default", out), make.weight(torch.randn(64, 128)))
    out = make.add("add.Tensor", out, X)
    out = make.add("layer_norm.default", out, (64,), make.weight(torch.randn(64)), make.weight(torch.randn(64)), 1e-5, False)
    plain, session, program, graph = blocked(make, device, out)
    assert [node.op for node in graph.nodes].count(BLOCKED_LINEAR) == 2
    x = torch.randn(shape)
    assert_close(session(x), plain(x))
    assert program.fallback_count == 0
    # Without rows, and with more axes than a session takes, torch answers.
    for given in (torch.randn(64), torch.randn(0, 64), torch.randn(2, 3, 5, 64)):
        assert_close(session(given), plain(given))
    assert program.fallback_count == 3


def test_what_fills_up_a_block_becomes_no_part_of_an_answer(device: TorchDevice) -> None:
    """Of 24 channels in blocks of 8 or 16, the last have nothing but zeros; divided by each other they would be NaN for good."""
    make = Maker()
    one, other = (make.add("conv2d.default", X, make.weight(torch.randn(24, 16, 3, 3))) for _ in range(2))
    out = make.add("div.Tensor", one, make.add("add.Tensor", make.add("mul.Tensor", other, other), other))
    plain, session, program, _ = blocked(make, device, make.add("conv2d.default", out, make.weight(torch.randn(16, 24, 1, 1))))
    x = torch.randn(2, 16, 8, 8)
    expected = plain(x)
    assert torch.isfinite(session(x)[0]).all()
    torch.testing.assert_close(session(x)[0], expected[0], rtol=1e-2, atol=1e-3 * float(expected[0].abs().max()))
    assert program.fallback_count == 0


@pytest.mark.parametrize("kind", ["max", "average", "whole", "mean", "joined", "joined with a part of a block"])
def test_what_stands_between_convolutions(device: TorchDevice, kind: str) -> None:
    make = Maker()
    channels = 24 if kind.endswith("block") else 32
    first = make.add("conv2d.default", X, make.weight(torch.randn(channels, 16, 3, 3)), None, (1, 1), (1, 1))
    if kind == "max":
        out = make.add("max_pool2d.default", first, (3, 3), (2, 2), (1, 1))
    elif kind == "average":
        out = make.add("avg_pool2d.default", first, (2, 2))
    elif kind == "whole":
        out = make.add("adaptive_avg_pool2d.default", first, (1, 1))
    elif kind == "mean":
        out = make.add("mean.dim", first, (2, 3), True)
    else:
        second = make.add("conv2d.default", X, make.weight(torch.randn(channels, 16, 1, 1)))
        out, channels = make.add("cat.default", (first, second), 1), 2 * channels
    out = make.add("conv2d.default", out, make.weight(torch.randn(16, channels, 1, 1)))
    plain, session, program, _ = blocked(make, device, out)
    for size in (8, 11):
        x = torch.randn(2, 16, size, size)
        assert_close(session(x), plain(x))
    assert program.fallback_count == 0


@pytest.mark.parametrize(
    "wrong",
    [torch.randn(1, 8, 6, 6), torch.randn(1, 16, 2, 2), torch.randn(1, 16, 6, 6).double(), torch.randn(4, 4)],
    ids=lambda tensor: f"{tensor.dtype} {list(tensor.shape)}",
)
def test_an_input_that_does_not_fit_is_a_fault_with_its_place(device: TorchDevice, wrong: torch.Tensor) -> None:
    make = Maker()
    _, session, _, _ = blocked(make, device, make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3))))
    with pytest.raises(DeviceFault, match=r"blocked.conv2d \(node 0, model.py:0\) failed"):
        session(wrong)
    assert session(torch.randn(1, 16, 6, 6))[0].shape == (1, 16, 4, 4)


# --- runs -----------------------------------------------------------------------------------------------------------


def one(device: TorchDevice) -> tuple[Any, SessionProgram]:
    make = Maker()
    _, session, program, _ = blocked(make, device, make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3))))
    return session, program


@pytest.mark.parametrize("error", [*sessions._ERRORS[:3], RuntimeError])
def test_what_a_session_fails_at_torch_does(device: TorchDevice, error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    session, program = one(device)
    x = torch.randn(1, 16, 6, 6)
    expected = session(x)

    def fails(*arguments: object) -> Any:
        raise error("something else")

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "_run", fails)
        assert_close(session(x), expected)
    assert program.fallback_count == 1
    with monkeypatch.context() as patch:
        patch.setattr(sessions, "_open", fails)
        other, made = one(device)
        assert other(x)[0].shape == (1, 16, 4, 4)
        assert made.fallback_count == 1


def test_what_has_no_room_is_told_so(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    session, program = one(device)

    def full(*arguments: object) -> Any:
        raise sessions._ERRORS[0]("Failed to allocate memory for requested buffer of size 602112")

    monkeypatch.setattr(sessions, "_run", full)
    with pytest.raises(DeviceOutOfMemory):
        session(torch.randn(1, 16, 6, 6))
    assert program.fallback_count == 0


def test_a_session_that_had_no_room_is_opened_later(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    session, program = one(device)
    x = torch.randn(1, 16, 6, 6)

    def full(*arguments: object, **named: object) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(sessions, "_open", full)
        with pytest.raises(DeviceOutOfMemory, match="opening a session"):
            session(x)
    session(x)
    assert program.fallback_count == 0


def test_sessions_are_not_made_for_inputs_of_ever_other_forms(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MOST_SESSIONS", 2)
    monkeypatch.setattr(sessions, "_RUNS_EACH", 4)
    make = Maker()
    out = make.add("linear.default", X, make.weight(torch.randn(64, 64)))
    plain, session, program, _ = blocked(make, device, out, make.add("relu.default", Y))
    for length in range(20):
        x, y = torch.randn(2, 64), torch.randn(5, 3 + length)
        assert_close(session(x, y), plain(x, y))
    assert 2 < program._made_count <= 2 + 20 // 4
    assert program.fallback_count > 0


def test_several_stages_are_not_run_by_torch_as_one(device: TorchDevice) -> None:
    make = Maker()
    _, session, program, graph = blocked(make, device, make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3))))
    x = torch.randn(2, 16, 6, 6)
    session(x)
    program._program = device.prepare_lowered(graph, is_long=True)._program
    session(x)
    with pytest.raises(Unjoined, match="ONNX Runtime does not run them as one: there is no session for it"):
        session(x.double())


def test_only_the_last_sessions_are_kept(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "_MOST_SESSIONS", 2)
    make = Maker()
    out = make.add("linear.default", X, make.weight(torch.randn(64, 64)))
    plain, session, program, _ = blocked(make, device, make.add("reshape.default", out, (-1, 8, 64)))
    for length in (8, 16, 24, 32):
        x = torch.randn(length, 64)
        assert_close(session(x), plain(x))
        assert len(program._sessions) <= 2


def test_threads_share_a_session_and_each_number_of_threads_has_one(device: TorchDevice) -> None:
    session, program = one(device)
    x = torch.randn(4, 16, 20, 20)
    expected = session(x)
    answers: list[Any] = []

    def ask(count: int) -> None:
        device._use_threads(count)
        for _ in range(10):
            answers.append(session(x))

    threads = [threading.Thread(target=ask, args=(count,)) for count in (1, 1, 2, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 40
    for answer in answers:
        assert_close(answer, expected)
    assert {threads for _, threads in program._sessions} <= {1, 2, torch.get_num_threads()}


def test_sessions_do_without_threads_where_there_are_no_more(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container may have so many; a thread that somebody else needs must not be missing because of them."""
    spare = sessions._Spare(2)
    monkeypatch.setattr(sessions, "_SPARE", spare)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x, left = torch.randn(1, 16, 6, 6), []
    kept = [one(device) for _ in range(4)]
    for session, _ in kept:
        session(x)
        left.append(spare.count)
    assert left == [1, 0, 0, 0]
    assert all(program.fallback_count == 0 for _, program in kept)
    del session
    kept.clear()
    gc.collect()
    assert spare.count == 2

    def fails(*arguments: object) -> Any:
        raise RuntimeError("no thread can be started")

    monkeypatch.setattr(sessions, "_opened", fails)
    session, program = one(device)
    session(x)
    assert (spare.count, program.fallback_count) == (2, 1)


def test_what_was_lent_is_let_go_of(device: TorchDevice) -> None:
    """A weight that leaves memory is read by no session any more, and an answer lives as long as somebody has it."""
    make = Maker()
    out = make.add("conv2d.default", X, make.weight(torch.randn(16, 16, 3, 3)))
    specs = (TensorSpec("x", "float32", ()),)
    graph = Graph((), specs, specs, tuple(make.weights), tuple(make.nodes), (out,))
    lowered = lower(graph, device.packed_bytes, device.block)
    (handle,) = load(device, lowered, make.blobs)
    program = device.prepare_lowered(lowered.graph)
    x = torch.randn(1, 16, 6, 6)
    (answer,) = device.run(program, [handle], [x])
    copy, gone = answer.clone(), weakref.ref(handle)
    del handle
    gc.collect()
    assert gone() is None
    assert device.memory()["weight_bytes"] == 0
    assert torch.equal(answer, copy)


# --- handles --------------------------------------------------------------------------------------------------------


def recipe_of(device: TorchDevice, outside: int = 16) -> tuple[Any, Blobs]:
    make = Maker()
    out = make.norm(make.add("conv2d.default", X, make.weight(torch.randn(outside, 16, 3, 3))), outside)
    specs = (TensorSpec("x", "float32", ()),)
    graph = Graph((), specs, specs, tuple(make.weights), tuple(make.nodes), (out,))
    (recipe,) = lower(graph, device.packed_bytes, device.block).recipes.values()
    return recipe, make.blobs


@pytest.mark.parametrize("outside", [16, 28])
def test_a_weight_in_blocks_is_bytes_and_back(device: TorchDevice, outside: int) -> None:
    recipe, blobs = recipe_of(device, outside)
    held = device.new_packed(recipe, [filler(blobs[source.digest]) for source in recipe.sources])
    assert isinstance(held, Blocked)
    made = device.flatten(held)
    assert made.size_bytes == held.size_bytes == device.packed_bytes(recipe)
    payload = memoryview(bytearray(made.size_bytes))
    made.copy_to(payload)
    again = device.packed_over(made.meta, payload)
    assert isinstance(again, Blocked)
    assert again.layout == held.layout == layout_of(recipe)
    assert torch.equal(again.weight, held.weight)
    assert torch.equal(again.bias, held.bias)
    assert again.weight.data_ptr() == torch.frombuffer(payload, dtype=torch.uint8).data_ptr(), "nothing is copied"
    with pytest.raises(ValueError, match=f"has {made.size_bytes} bytes, {made.size_bytes - 4} were read"):
        flat.unflatten(made.meta, payload[:-4])


@pytest.mark.parametrize(
    ("shape", "groups"), [((16, 3, 7, 7), 1), ((20, 20, 1, 1), 1), ((24, 1, 3, 3), 24), ((32, 16, 3, 3), 2)], ids=str
)
def test_blocks_have_all_numbers_once(device: TorchDevice, shape: tuple[int, ...], groups: int) -> None:
    make = Maker()
    weight, bias = torch.randn(shape), torch.randn(shape[0])
    specs = (TensorSpec("x", "float32", ()),)
    out = make.add("conv2d.default", X, make.weight(weight), make.weight(bias), 1, 1, 1, groups)
    lowered = lower(Graph((), specs, specs, tuple(make.weights), tuple(make.nodes), (out,)), lambda recipe: 0, device.block)
    (recipe,) = lowered.recipes.values()
    held = pack_blocked(recipe, [weight, bias])
    found, shift = held.dense()
    assert torch.equal(found, weight)
    assert torch.equal(shift, bias)
    assert held.weight.count_nonzero() == weight.count_nonzero(), "the rest is zeros"
    assert over(held.layout, memoryview(bytearray(held.size_bytes))).weight.shape == held.layout.padded_shape


# --- ONNX Runtime itself --------------------------------------------------------------------------------------------

LOOK = """
import os, sys
import numpy, torch
before = len(os.listdir("/proc/self/task"))
from sidecar import sessions
print(sessions.block(), sessions.version(), len(os.listdir("/proc/self/task")) - before)
"""


def looked(home: Path, code: str = LOOK) -> list[str]:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("XDG_CACHE_HOME", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE_S
    )
    return done.stdout.split()


def test_nothing_is_told_to_anybody(device: TorchDevice, tmp_path: Path) -> None:
    """From 1.29 on ONNX Runtime sends what it is used for over the network, unless told not to: a thread does, from a file."""
    block, version, thread_count = looked(tmp_path)
    assert (int(block), int(thread_count)) == (device.block, 0)
    assert version == sessions.version()
    assert not [*tmp_path.iterdir()]


def test_without_it_there_are_no_blocks(tmp_path: Path) -> None:
    block, version, _ = looked(tmp_path, f"import sys; sys.modules['onnxruntime'] = None\n{LOOK}")
    assert (block, version) == ("0", "none")


def test_a_processor_without_blocks_has_no_sessions(
    device: TorchDevice, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*arguments: object) -> Any:
        raise sessions._ERRORS[0]("no kernel for ReorderInput\nand more")

    monkeypatch.setattr(sessions, "_open", fails)
    with caplog.at_level("WARNING", "trunkline.engine"):
        assert sessions.block.__wrapped__() == 0
    assert "has no convolutions in blocks here (no kernel for ReorderInput)" in caplog.text
