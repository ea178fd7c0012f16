"""The device: weights in its memory, graphs run node by node as torch would, errors by name and node."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from typing import Any

import pytest
import torch
from trunkline.errors import DeviceFault, DeviceOutOfMemory, ValueOutOfBounds
from trunkline.protocol import TensorSpec

from sidecar import operators
from sidecar.devices import TorchDevice, open_device
from sidecar.errors import BundleError, ConfigError
from sidecar.ir import ITEM_BYTES, Argument, Dtype, Enum, Graph, Node, Value, Weight
from sidecar.prepare import _BINDINGS
from sidecar.programs import failure
from tests.registered import registered_off_the_list

X = Value("input", 0)
Y = Value("input", 1)
W = Value("weight", 0)


def node(number: int, item: int | None = None) -> Value:
    return Value("node", number, item)


def graph(*nodes: Node, results: tuple[Value, ...] = (), inputs: int = 1, weights: tuple[Weight, ...] = ()) -> Graph:
    """Return a graph for ``prepare``, which looks at neither shapes nor dtypes of inputs and outputs."""
    results = results or (node(len(nodes) - 1),)
    return Graph(
        symbols=(),
        inputs=tuple(TensorSpec(f"x{number}", "float32", ()) for number in range(inputs)),
        outputs=tuple(TensorSpec(f"y{number}", "float32", ()) for number in range(len(results))),
        weights=weights,
        nodes=nodes,
        results=results,
    )


@pytest.fixture
def device() -> TorchDevice:
    return open_device("cpu")


def run(device: TorchDevice, made: Graph, *inputs: torch.Tensor, weights: tuple[Any, ...] = ()) -> list[torch.Tensor]:
    return device.run(device.prepare(made), weights, inputs)


def single(device: TorchDevice, op: str, *args: Argument, inputs: tuple[torch.Tensor, ...], **kwargs: Argument) -> Any:
    """Run one operator on inputs."""
    made = graph(Node(op, args, tuple(sorted(kwargs.items()))), inputs=len(inputs))
    return run(device, made, *inputs)[0]


# --- opening ------------------------------------------------------------------------------------------------------


def test_auto_is_a_device() -> None:
    assert open_device("auto").name == ("cuda:0" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cuda:", "cuda:-1", "cuda:9999", "CPU", "cpu:", "cpu:x", "cpu:0-", "meta"])
def test_a_device_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError):
        open_device(name)


def test_a_missing_cuda_device_is_refused_with_the_number_there_is() -> None:
    with pytest.raises(ConfigError, match=r"there is no device cuda:64: torch finds \d+ CUDA devices"):
        open_device("cuda:64")


def test_a_device_of_some_cores_computes_there_with_as_many_threads() -> None:
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    first = min(cores)
    made = open_device(f"cpu:{first}", threads=max(2, threads))
    assert made.name == f"cpu:{first}"
    assert made.facts()["threads"] == 1
    assert made.lane_counts == (1,)

    def entered() -> tuple[set[int], int, set[int]]:
        made.enter()
        with ThreadPoolExecutor(1) as pool:
            return os.sched_getaffinity(0), torch.get_num_threads(), pool.submit(os.sched_getaffinity, 0).result()

    try:
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(entered).result() == ({first}, 1, {first})
        with ThreadPoolExecutor(1) as pool:
            # Other threads are not concerned.
            assert pool.submit(torch.get_num_threads).result() == max(2, threads)
            assert pool.submit(os.sched_getaffinity, 0).result() == cores
    finally:
        torch.set_num_threads(threads)


def test_a_device_of_all_cores_changes_nothing() -> None:
    cores = os.sched_getaffinity(0)
    made = open_device("cpu")
    made.enter()
    assert os.sched_getaffinity(0) == cores


@pytest.mark.parametrize("name", ["cpu:9999", "cpu:0-9999", "cpu:1-0"])
def test_cores_that_are_not_there_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"there is no device {name}: the cores that this process may use are "):
        open_device(name)


def test_threads_are_set_and_checked() -> None:
    before = torch.get_num_threads()
    try:
        open_device("cpu", threads=1)
        assert torch.get_num_threads() == 1
        with pytest.raises(ConfigError, match="at least 1"):
            open_device("cpu", threads=0)
    finally:
        torch.set_num_threads(before)


# --- weights ------------------------------------------------------------------------------------------------------


def made_weight(tensor: torch.Tensor) -> tuple[Weight, bytes]:
    content = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    dtype = str(tensor.dtype).removeprefix("torch.")
    shape = tuple(tensor.shape)
    return Weight(sha256(content).hexdigest(), dtype, shape, len(content), zlib.crc32(content)), content


@pytest.mark.parametrize("dtype", sorted(ITEM_BYTES))
@pytest.mark.parametrize("shape", [(3, 4), (), (0, 3), (1,)], ids=str)
def test_a_weight_is_what_was_written_into_it(device: TorchDevice, dtype: str, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(math.prod(shape)).reshape(shape) * 3 - 5).to(getattr(torch, dtype))
    weight, content = made_weight(tensor)
    sizes: list[int] = []

    def fill(target: memoryview) -> None:
        assert not target.readonly
        sizes.append(target.nbytes)
        target[:] = content

    held = device.new_weight(weight, fill)
    assert sizes == [weight.size_bytes]
    assert torch.equal(held, tensor)


def test_an_output_is_written_where_it_is_wanted(device: TorchDevice) -> None:
    output = torch.arange(6, dtype=torch.int32).reshape(2, 3)
    assert device.output_spec(output) == ("int32", (2, 3))
    target = bytearray(24)
    device.read_output(output, device.view(memoryview(target), "int32", (2, 3)))
    assert bytes(target) == output.numpy().tobytes()


def test_an_output_of_a_dtype_that_cannot_travel_is_refused(device: TorchDevice) -> None:
    with pytest.raises(DeviceFault, match="bfloat16"):
        device.output_spec(torch.zeros(2, dtype=torch.bfloat16))


def test_weight_bytes_follow_the_handles(device: TorchDevice) -> None:
    weight, content = made_weight(torch.ones(256))
    held = device.new_weight(weight, lambda target: target.__setitem__(slice(None), content))
    other = device.as_weight(held, Weight(weight.digest, "float32", (16, 16), 1024, weight.crc32))
    assert device.memory()["weight_bytes"] == 1024
    assert other.shape == (16, 16)
    assert other.data_ptr() == held.data_ptr()
    del held
    gc.collect()
    assert device.memory()["weight_bytes"] == 1024, "the view keeps the memory alive"
    del other
    gc.collect()
    assert device.memory()["weight_bytes"] == 0
    assert device.memory()["total_bytes"] > 0


def test_a_weight_of_the_same_form_is_its_own_view(device: TorchDevice) -> None:
    weight, content = made_weight(torch.ones(4, 4))
    held = device.new_weight(weight, lambda target: target.__setitem__(slice(None), content))
    assert device.as_weight(held, weight) is held


def test_what_fill_raises_passes_and_nothing_stays(device: TorchDevice) -> None:
    weight, _ = made_weight(torch.ones(4))

    def fill(target: memoryview) -> None:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        device.new_weight(weight, fill)
    assert device.memory()["weight_bytes"] == 0


def test_a_weight_without_room_names_the_bytes(device: TorchDevice) -> None:
    size_bytes = 1 << 47
    weight = Weight("0" * 64, "uint8", (size_bytes,), size_bytes, 0)
    with pytest.raises(DeviceFault, match=f"no room for a weight of {size_bytes} bytes") as caught:
        device.new_weight(weight, lambda target: None)
    assert caught.value.details["size_bytes"] == size_bytes
    assert caught.value.details["total_bytes"]


# --- inputs and outputs -------------------------------------------------------------------------------------------


def test_an_input_is_a_view_of_its_buffer(device: TorchDevice) -> None:
    buffer = bytearray(torch.arange(6, dtype=torch.float32).numpy().tobytes())
    tensor = device.view(memoryview(buffer), "float32", (2, 3))
    assert torch.equal(tensor, torch.arange(6.0).reshape(2, 3))
    assert tensor.data_ptr() == ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def test_an_empty_or_single_input_is_taken(device: TorchDevice) -> None:
    assert device.view(memoryview(bytearray(8)), "int64", ()).item() == 0
    assert device.view(memoryview(b""), "bool", (0, 4)).shape == (0, 4)


def test_an_output_with_strides_is_written_in_order(device: TorchDevice) -> None:
    target = bytearray(24)
    device.read_output(torch.arange(6, dtype=torch.int32).reshape(2, 3).t(), device.view(memoryview(target), "int32", (3, 2)))
    assert torch.frombuffer(target, dtype=torch.int32).tolist() == [0, 3, 1, 4, 2, 5]


@pytest.mark.parametrize(
    ("made", "shares"),
    [
        (graph(results=(X,)), "an input"),
        (graph(Node("aten.reshape.default", (X, (4,))), Node("aten.unsqueeze.default", (node(0), 0))), "a view of one"),
        (graph(Node("aten.split.Tensor", (X, 1)), results=(node(0, 1),)), "a part of one"),
        (graph(Node("aten.type_as.default", (X, X))), "one that may be itself"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_outputs_never_share_memory_with_inputs(device: TorchDevice, made: Graph, shares: str) -> None:
    source = torch.ones(2, 2)
    (output,) = run(device, made, source)
    source.fill_(7)
    assert output.reshape(-1).tolist() == [1.0] * output.numel()


def test_outputs_never_share_memory_with_weights(device: TorchDevice) -> None:
    weight, _ = made_weight(torch.ones(4))
    held = torch.ones(4)
    (output,) = run(device, graph(Node("aten.reshape.default", (W, (2, 2))), weights=(weight,)), torch.ones(1), weights=(held,))
    assert output.data_ptr() != held.data_ptr()


def test_trimming_harms_nothing(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = torch.arange(1000)
    device.trim()
    monkeypatch.setattr("sidecar.devices.LIBC", object())  # a C library without malloc_trim
    device.trim()
    assert kept.sum() == 499500


# --- running ------------------------------------------------------------------------------------------------------


def test_every_result_is_released_once_after_its_last_use(device: TorchDevice) -> None:
    made = graph(
        Node("aten.max.dim", (X, 0)),
        Node("aten.relu.default", (X,)),
        Node("aten.add.Tensor", (node(1), node(0, 0))),
        Node("aten.relu.default", (node(1),)),
        Node("aten.cat.default", ((node(2), node(1)),)),
        results=(node(4), node(2)),
    )
    program = device.prepare(made)
    released = [slot for step in program.steps for slot in step.released]
    assert len(released) == len(set(released))
    made_slots = {step.target for step in program.steps}
    assert made_slots - set(released) == set(program.results)
    dead = next(step for step in program.steps if step.node == 3)
    assert dead.target in dead.released, "a result that nobody reads does not outlive its step"
    first, second = device.run(program, [], [torch.tensor([[1.0, -2.0], [3.0, 4.0]])])
    assert first.shape == (4, 2)
    assert second.tolist() == [[4.0, 4.0], [6.0, 8.0]]


def test_a_program_runs_again_on_other_weights(device: TorchDevice) -> None:
    weight, _ = made_weight(torch.ones(2))
    program = device.prepare(graph(Node("aten.mul.Tensor", (X, W)), weights=(weight,)))
    for factor in (2.0, 3.0):
        assert device.run(program, [torch.full((2,), factor)], [torch.ones(2)])[0].tolist() == [factor, factor]


def test_sizes_are_computed_from_the_inputs(device: TorchDevice) -> None:
    made = graph(
        Node("aten.sym_size.int", (X, 0)),
        Node("sym.mul", (node(0), 3)),
        Node("sym.floordiv", (node(1), 2)),
        Node("sym.max", (node(2), 1)),
        Node("aten.arange.default", (node(3),), (("dtype", Dtype("float32")),)),
        Node("aten.full.default", ((node(0), 2), 1.5)),
        Node("sym.neg", (node(0),)),
        Node("sym.add", (node(6), 10)),
        Node("aten.full_like.default", (X, node(7))),
        results=(node(4), node(5), node(8)),
    )
    rows, full, like = run(device, made, torch.ones(4, 1))
    assert rows.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert full.shape == (4, 2)
    assert like.flatten().tolist() == [6.0] * 4


def test_a_moving_keyword_argument_is_passed(device: TorchDevice) -> None:
    made = graph(
        Node("aten.sym_size.int", (X, 0)),
        Node("aten.add.Tensor", (X, X), (("alpha", node(0)),)),
    )
    assert run(device, made, torch.ones(3))[0].tolist() == [4.0, 4.0, 4.0]


A = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
PICTURE = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0))
KERNEL = torch.randn(3, 2, 3, 3, generator=torch.Generator().manual_seed(0))
ROW = torch.rand(4, generator=torch.Generator().manual_seed(0)) + 0.5
CHANNELS = torch.rand(2, generator=torch.Generator().manual_seed(0)) + 0.5
SAMPLES: dict[str, tuple[tuple[torch.Tensor, ...], tuple[Argument, ...], dict[str, Argument]]] = {
    "aten.add.Tensor": ((A, A), (X, Y), {"alpha": 2}),
    "aten.sub.Tensor": ((A,), (X, 1.5), {}),
    "aten.mul.Tensor": ((A, A), (X, Y), {}),
    "aten.div.Tensor": ((A,), (X, 3), {}),
    "aten.pow.Tensor_Scalar": ((A,), (X, 2), {}),
    "aten.rsqrt.default": ((A.abs() + 1,), (X,), {}),
    "aten.hardtanh.default": ((A,), (X, 0.0, 1.0), {}),
    "aten.gelu.default": ((A,), (X,), {"approximate": Enum("tanh")}),
    "aten.softmax.int": ((A,), (X, -1), {"dtype": Dtype("float64")}),
    "aten.linear.default": ((A, torch.ones(5, 4)), (X, Y, None), {}),
    "aten.matmul.default": ((A, torch.ones(4, 5)), (X, Y), {}),
    "aten.bmm.default": ((A, torch.ones(2, 4, 5)), (X, Y), {}),
    "aten.conv2d.default": ((PICTURE, KERNEL), (X, Y, None, (2, 2), (1, 1)), {}),
    "aten.batch_norm.default": (
        (PICTURE, CHANNELS),
        (X, Y, Y, Y, Y, False, 0.1, 1e-5, True),
        {},
    ),
    "aten.layer_norm.default": ((A, ROW), (X, (4,), Y, Y, 1e-5, False), {}),
    "aten.max_pool2d.default": ((PICTURE,), (X, (3, 3), (2, 2), (1, 1)), {}),
    "aten.avg_pool2d.default": ((PICTURE,), (X, (3, 3), (2, 2), (1, 1), True, False), {}),
    "aten.adaptive_avg_pool2d.default": ((PICTURE,), (X, (2, 2)), {}),
    "aten.scaled_dot_product_attention.default": ((A, A), (X, Y, X, None, 0.0, True), {"scale": 0.3}),
    "aten.embedding.default": ((ROW.reshape(2, 2), torch.tensor([1, 0])), (X, Y, 0), {}),
    "aten.mean.dim": ((A,), (X, (1,), True), {"dtype": Dtype("float64")}),
    "aten.sum.dim_IntList": ((A,), (X, (0, 2), False), {}),
    "aten.cat.default": ((A, A), ((X, Y), 1), {}),
    "aten.reshape.default": ((A,), (X, (4, -1)), {}),
    "aten.view.default": ((A,), (X, (4, -1)), {}),
    "aten.view_as.default": ((A, A.reshape(-1)), (X, Y), {}),
    "aten.permute.default": ((A,), (X, (2, 0, 1)), {}),
    "aten.transpose.int": ((A,), (X, 0, 2), {}),
    "aten.unsqueeze.default": ((A,), (X, -1), {}),
    "aten.squeeze.dim": ((A[:, :1],), (X, 1), {}),
    "aten.select.int": ((A,), (X, 1, 2), {}),
    "aten.expand.default": ((A[:1],), (X, (5, -1, -1)), {"implicit": False}),
    "aten.contiguous.default": ((A.transpose(0, 1),), (X,), {}),
    "aten.where.self": ((A > 0, A), (X, Y, Y), {}),
}


@pytest.mark.parametrize("op", sorted(_BINDINGS))
def test_a_binding_computes_what_its_operator_does(device: TorchDevice, op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, args, kwargs = SAMPLES.get(op, ((A,), (X,), {}))
    if op == "aten.sym_size.int":
        inputs, args = (A,), (X, 1)
    made = graph(
        Node(op, args, tuple(sorted(kwargs.items()))),
        *([Node("aten.full.default", ((1,), node(0)))] if op == "aten.sym_size.int" else []),
        inputs=len(inputs),
    )
    (fast,) = run(device, made, *inputs)
    monkeypatch.delitem(_BINDINGS, op)
    (plain,) = run(device, made, *inputs)
    assert fast.dtype == plain.dtype
    assert torch.equal(fast, plain)


@pytest.mark.parametrize("op", ["aten.mean.dim", "aten.sum.dim_IntList"])
def test_a_reduction_over_everything_is_taken(device: TorchDevice, op: str) -> None:
    assert single(device, op, X, None, inputs=(torch.ones(2, 3),)).dim() == 0


def test_one_number_stands_for_a_list_of_known_length(device: TorchDevice) -> None:
    assert single(device, "aten.avg_pool2d.default", X, 5, inputs=(torch.ones(1, 1, 5, 5),)).shape == (1, 1, 1, 1)


@pytest.mark.parametrize("biases", [True, False])
def test_a_recurrent_layer_runs_and_a_wrong_weight_never_reaches_it(device: TorchDevice, biases: bool) -> None:
    layer = torch.nn.LSTM(3, 4, 2, bias=biases, bidirectional=True, batch_first=True).eval()
    state = torch.zeros(4, 2, 4)
    weights = [parameter.detach() for parameter in layer.parameters()]
    references = tuple(Value("input", 2 + number) for number in range(len(weights)))
    call = Node("aten.lstm.input", (X, (Y, Y), references, biases, 2, 0.0, False, True, True))
    made = graph(call, results=(node(0, 0),), inputs=2 + len(weights))
    source = torch.randn(2, 5, 3)
    with torch.no_grad():
        assert torch.equal(run(device, made, source, state, *weights)[0], layer(source)[0])
    for number in range(len(weights)):
        broken = [*weights[:number], weights[number][:1], *weights[number + 1 :]]
        with pytest.raises(DeviceFault, match="aten.lstm.input"):
            run(device, made, source, state, *broken)
    with pytest.raises(DeviceFault, match="aten.lstm.input"):
        run(device, made, source, state[:1], *weights)


# --- what cannot be prepared or run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Node("aten.relu.default", ()), r"node 0 \(aten.relu.default\): argument self is missing"),
        (Node("aten.relu.default", (X, X)), "takes 1 positional arguments, has 2"),
        (Node("aten.relu.default", (X,), (("self", X),)), "argument self is given twice"),
        (Node("aten.relu.default", (X,), (("out", X),)), "has no argument out"),
        (Node("aten.relu.default", (None,)), "argument self: must be Tensor, not NoneType"),
        (Node("aten.relu.default", ((X,),)), "argument self: must be Tensor, not tuple"),
        (Node("aten.cat.default", (X,)), "argument tensors: must be a list"),
        (Node("aten.cat.default", ((X, None),)), "argument tensors: must be Tensor"),
        (Node("aten.transpose.int", (X, 0, 1.0)), "argument dim1: must be int, not float"),
        (Node("aten.transpose.int", (X, 0, True)), "argument dim1: must be int, not bool"),
        (Node("aten.transpose.int", (X, 0, X)), "argument dim1: must be int, not Tensor"),
        (Node("aten.reshape.default", (X, (X,))), "argument shape: must be int, not Tensor"),
        (Node("aten.gelu.default", (X,), (("approximate", 1),)), "argument approximate: must be str, not int"),
        (Node("aten._to_copy.default", (X,), (("device", 0),)), "argument device: must be Device"),
        (Node("aten._to_copy.default", (X,), (("dtype", 6),)), "argument dtype: must be ScalarType"),
        (Node("aten.contiguous.default", (X,), (("memory_format", 0),)), "argument memory_format"),
        (Node("aten.rand.default", ((2,),)), "not allowed"),
        (Node("aten.relu_.default", (X,)), "not allowed"),
    ],
)
def test_a_node_that_does_not_fit_its_schema_is_refused(device: TorchDevice, broken: Node, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        device.prepare(graph(broken))


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (Node("aten.relu.default", (node(0),)), "must be Tensor, not tuple:2"),
        (Node("aten.relu.default", (node(0, 2),)), "has no result number 2"),
        (Node("aten.relu.default", (node(1, 0),)), "has no result number 0"),
        (Node("sym.add", (node(0, 0), 1)), "must be int, not Tensor"),
    ],
)
def test_a_result_is_used_as_what_it_is(device: TorchDevice, user: Node, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        device.prepare(graph(Node("aten.max.dim", (X, 0)), Node("aten.relu.default", (X,)), user))


def test_a_size_is_no_output(device: TorchDevice) -> None:
    with pytest.raises(BundleError, match="result 0 is not a tensor"):
        device.prepare(graph(Node("aten.sym_size.int", (X, 0))))


@pytest.mark.row("T8")
def test_every_registered_operator_outside_the_list_is_refused(device: TorchDevice) -> None:
    refused = 0
    for op in registered_off_the_list():
        with pytest.raises(BundleError, match="is not allowed"):
            device.prepare(graph(Node(op, (X,))))
        refused += 1
    assert refused > 2000


def test_every_listed_operator_exists_and_writes_nothing() -> None:
    for op in operators.ALLOWED - operators.SYMBOLIC:
        _, base, overload = op.split(".")
        found = getattr(getattr(torch.ops.aten, base), overload)
        assert not found._schema.is_mutable, op
        if torch.Tag.nondeterministic_seeded in found.tags:
            assert op in operators.RECURRENT | {"aten.scaled_dot_product_attention.default"}, op


def test_an_operator_of_another_torch_is_refused_by_name(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "ALLOWED", operators.ALLOWED | {"aten.of_tomorrow.default"})
    with pytest.raises(BundleError, match=r"node 0 \(aten.of_tomorrow.default\): this torch has no such operator"):
        device.prepare(graph(Node("aten.of_tomorrow.default", (X,))))


def test_an_operator_that_writes_is_refused_even_if_it_were_listed(device: TorchDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "ALLOWED", operators.ALLOWED | {"aten.relu_.default"})
    with pytest.raises(BundleError, match="changes its arguments"):
        device.prepare(graph(Node("aten.relu_.default", (X,))))


def test_a_failing_operator_is_named_with_its_place(device: TorchDevice) -> None:
    made = graph(Node("aten.relu.default", (X,)), Node("aten.mm.default", (node(0), X), (), "model.py:7 self.head"))
    with pytest.raises(DeviceFault) as caught:
        run(device, made, torch.ones(2, 3))
    assert caught.value.message == "aten.mm.default (node 1, model.py:7 self.head) failed: RuntimeError"
    assert caught.value.details == {"node": 1, "operator": "aten.mm.default"}


@pytest.mark.parametrize("index", [4, -1, 1 << 40])
@pytest.mark.parametrize(
    ("op", "args"),
    [
        ("aten.embedding.default", (X, Y)),
        ("aten.index_select.default", (X, 0, Y)),
        ("aten.gather.default", (X, 0, Y)),
    ],
)
def test_an_index_out_of_range_is_the_callers_fault(device: TorchDevice, op: str, args: tuple[Argument, ...], index: int) -> None:
    table, wanted = torch.ones(4, 2), torch.tensor([index])
    if "gather" in op:
        wanted = wanted.reshape(1, 1)
    with pytest.raises(ValueOutOfBounds, match=f"an index is out of range in {op}"):
        single(device, op, *args, inputs=(table, wanted))


def test_a_tensor_without_room_is_out_of_memory(device: TorchDevice) -> None:
    with pytest.raises(DeviceOutOfMemory, match=r"aten.full.default \(node 0, .*\) failed: out of memory") as caught:
        single(device, "aten.full.default", (1 << 44,), 1.0, inputs=(torch.ones(1),))
    assert caught.value.details["asked_bytes"] == 1 << 46
    assert device.memory()["total_bytes"] < 1 << 46
    # An output that is a view of an input is copied.
    with pytest.raises(DeviceOutOfMemory, match="output 0 failed: out of memory"):
        single(device, "aten.expand.default", X, (1 << 46,), inputs=(torch.ones(1),))


HUGE = torch.ones(1).expand(1 << 46)


@pytest.mark.parametrize(
    "work",
    [
        lambda device: device.join([HUGE, HUGE], 0),
        lambda device: device.pad(torch.ones(1), 0, 1 << 46),
        lambda device: device.copy(HUGE),
        lambda device: device.stack([[HUGE], [HUGE]]),
    ],
)
def test_work_between_stages_says_that_it_has_no_room(device: TorchDevice, work: Callable[[TorchDevice], object]) -> None:
    with pytest.raises(DeviceOutOfMemory, match="out of memory"):
        work(device)


class Unready:
    """A tensor, a program, or whatever else does its work on being asked, and fails."""

    nbytes = 12

    def __init__(self, error: Exception) -> None:
        self.error = error

    def fail(self, *arguments: object, **named: object) -> Any:
        raise self.error

    run = to = copy_ = fail


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (torch.OutOfMemoryError("Tried to allocate 2.00 GiB."), DeviceOutOfMemory),
        (MemoryError(), DeviceOutOfMemory),
        (RuntimeError("std::bad_alloc"), DeviceOutOfMemory),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), DeviceOutOfMemory),
        (RuntimeError("CUDA error: out of memory"), DeviceOutOfMemory),
        (RuntimeError("CUDA error: device-side assert triggered"), DeviceFault),
        (ValueError("no"), DeviceFault),
    ],
)
def test_lack_of_memory_is_told_from_other_failures(device: TorchDevice, error: Exception, kind: type[DeviceFault]) -> None:
    unready: Any = Unready(error)
    works: list[Callable[[], object]] = [
        lambda: device._brought(unready),
        lambda: device.run_stacked(unready, [], [[], []]),
        lambda: device.read_output(torch.ones(1), unready),
    ]
    for work in works:
        with pytest.raises(DeviceFault) as caught:
            work()
        assert type(caught.value) is kind
        assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    ("text", "asked_bytes"),
    [
        ("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 139 GiB", 5 << 29),
        ("CUDA out of memory. Tried to allocate 512 bytes.", 512),
        ("std::bad_alloc", None),
    ],
)
def test_how_much_was_asked_for_is_told(text: str, asked_bytes: int | None) -> None:
    assert failure("it", RuntimeError(text), node=3).details.get("asked_bytes") == asked_bytes


def test_arithmetic_on_sizes_stays_within_64_bits(device: TorchDevice) -> None:
    nodes = [Node("aten.sym_size.int", (X, 0))]
    nodes += [Node("sym.mul", (node(number), node(number))) for number in range(40)]
    with pytest.raises(DeviceFault, match=r"sym.mul \(node \d+, no origin\) failed: OverflowError"):
        run(device, graph(*nodes, results=(X,)), torch.ones(3))
    for op in ("sym.floordiv", "sym.mod"):
        made = graph(Node("aten.sym_size.int", (X, 0)), Node(op, (1, node(0))), results=(X,))
        with pytest.raises(DeviceFault, match="ZeroDivisionError"):
            run(device, made, torch.ones(0))


def test_an_output_of_negative_size_is_a_fault(device: TorchDevice) -> None:
    with pytest.raises(DeviceFault, match="output 0"):
        single(device, "aten.expand.default", X, (0, -3, 4), inputs=(torch.ones(4),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_says_that_it_has_no_room() -> None:
    cuda = open_device("cuda")
    with pytest.raises(DeviceOutOfMemory, match="out of memory"):
        single(cuda, "aten.full.default", (1 << 44,), 1.0, inputs=(torch.ones(1),))
    with pytest.raises(DeviceOutOfMemory, match="out of memory"):
        cuda.join([HUGE, HUGE], 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_runs_what_the_cpu_runs(device: TorchDevice) -> None:
    cuda = open_device("cuda")
    weight, content = made_weight(torch.randn(4, 3))
    fill = lambda target: target.__setitem__(slice(None), content)  # noqa: E731
    made = graph(
        Node("aten.linear.default", (X, W)),
        Node("aten.sym_size.int", (X, 0)),
        Node("aten.arange.default", (node(1),)),
        Node("aten.unsqueeze.default", (node(2), 1)),
        Node("aten.add.Tensor", (node(0), node(3))),
        weights=(weight,),
    )
    source = bytearray(torch.randn(2, 3).numpy().tobytes())
    answers = []
    for one in (device, cuda):
        held = one.new_weight(weight, fill)
        output = one.run(one.prepare(made), [held], [one.view(memoryview(source), "float32", (2, 3))])[0]
        target = torch.empty(output.shape)
        one.read_output(output, target)
        answers.append(target)
    assert torch.allclose(*answers, atol=1e-5)
    assert cuda.memory()["weight_bytes"] == 0 or cuda.memory()["allocated_bytes"] > 0


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (0, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "bool"])
def test_bytes_that_are_there_are_read_in_place(dtype: str, shape: tuple[int, ...]) -> None:
    expected = torch.arange(6)[: math.prod(shape)].to(getattr(torch, dtype)).reshape(shape)
    memory = memoryview(bytearray(expected.reshape(-1).view(torch.uint8).numpy().tobytes()))
    weight = Weight("ab" * 32, dtype, shape, len(memory), 0)
    found = open_device("cpu").over(memory, weight)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    if len(memory):
        # Not a copy.
        memory[:] = bytes(len(memory))
        assert not found.any()
