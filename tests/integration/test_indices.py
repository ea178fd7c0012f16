"""Operators that take indices: whatever the index, on a device that refuses it and on one that must not meet it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from trunkline.errors import DeviceFault, ValueOutOfBounds
from trunkline.protocol import TensorSpec

from sidecar import indices, operators
from sidecar.devices import TorchDevice
from sidecar.ir import Argument, Enum, Graph, Node, Value
from sidecar.stacked import StackedProgram, stack
from tests.fakes import weight_of
from tests.forms import prefer
from tests.integration.test_sharing import counted, deploy, network_of, serving
from tests.integration.test_shortage import asked_at_once
from tests.networks import agrees

CPU = torch.device("cpu")
SELF, INDEX, THIRD = Value("input", 0), Value("input", 1), Value("input", 2)
ROWS, COLUMNS = 5, 4
FAR = (-(1 << 63), -(1 << 31), 1 << 31, (1 << 63) - 1)
# The same that torch has for all that these take.
TABLE = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
ONES = torch.ones(2, COLUMNS)

# Arguments, the shape of the index, the first index and the end, what else is given.
Case = tuple[tuple[Argument, ...], tuple[int, ...], int, int, tuple[torch.Tensor, ...]]
CASES: dict[str, Case] = {
    "aten.embedding.default": ((SELF, INDEX), (2,), 0, ROWS, ()),
    "aten.index_select.default": ((SELF, 1, INDEX), (2,), 0, COLUMNS, ()),
    "aten.gather.default": ((SELF, -1, INDEX), (1, 2), 0, COLUMNS, ()),
    "aten.take_along_dim.default": ((SELF, INDEX, 0), (2, 1), -ROWS, ROWS, ()),
    "aten.one_hot.default": ((INDEX, 7), (2,), 0, 7, ()),
    "aten.index.Tensor": ((SELF, (INDEX,)), (2,), -ROWS, ROWS, ()),
    "aten.index_put.default": ((SELF, (None, INDEX), THIRD), (2,), -COLUMNS, COLUMNS, (torch.ones(2),)),
    "aten.index_fill.int_Scalar": ((SELF, 0, INDEX, 2.5), (2,), -ROWS, ROWS, ()),
    "aten.index_fill.int_Tensor": ((SELF, 0, INDEX, THIRD), (2,), -ROWS, ROWS, (torch.tensor(2.5),)),
    "aten.index_add.default": ((SELF, 0, INDEX, THIRD), (2,), 0, ROWS, (ONES,)),
    "aten.index_copy.default": ((SELF, 0, INDEX, THIRD), (2,), 0, ROWS, (ONES,)),
    "aten.scatter.src": ((SELF, 0, INDEX, THIRD), (1, 2), 0, ROWS, (ONES,)),
    "aten.scatter.value": ((SELF, 1, INDEX, 9.0), (2, 1), 0, COLUMNS, ()),
    "aten.scatter_add.default": ((SELF, 0, INDEX, THIRD), (1, 2), 0, ROWS, (ONES,)),
    "aten.scatter_reduce.two": ((SELF, 0, INDEX, THIRD, Enum("amax")), (1, 2), 0, ROWS, (ONES,)),
}


def graph(node: Node, input_count: int) -> Graph:
    inputs = tuple(TensorSpec(f"x{number}", "float32", ()) for number in range(input_count))
    return Graph((), inputs, (TensorSpec("y", "float32", ()),), (), (node,), (Value("node", 0),))


@pytest.fixture(params=[None, True], ids=["refused by torch", "guarded"])
def device(request: pytest.FixtureRequest) -> TorchDevice:
    """Return a device as it is, and one that looks at indices as those must that torch lets down."""
    return TorchDevice(CPU, guarded=request.param)


def asked(device: TorchDevice, op: str, args: tuple[Argument, ...], *inputs: torch.Tensor, **kwargs: Argument) -> torch.Tensor:
    program = device.prepare(graph(Node(op, args, tuple(sorted(kwargs.items()))), len(inputs)))
    (given,) = device.run(program, (), inputs)
    return given


def plain(value: Argument, inputs: tuple[torch.Tensor, ...]) -> Any:
    """Return an argument as torch takes it."""
    if isinstance(value, Value):
        return inputs[value.index]
    if isinstance(value, tuple):
        return [plain(each, inputs) for each in value]
    return value.word if isinstance(value, Enum) else value


def by_torch(op: str, args: tuple[Argument, ...], inputs: tuple[torch.Tensor, ...]) -> Any:
    _, base, overload = op.split(".")
    return getattr(getattr(torch.ops.aten, base), overload)(*(plain(each, inputs) for each in args))


def test_every_operator_that_takes_indices_is_among_those_tried_here() -> None:
    others = {"aten.masked_scatter.default", "aten.searchsorted.Tensor"}
    assert CASES.keys() | others == operators.INDEXING
    # Of the latter torch refuses a bad index on every device, before a kernel meets it.
    assert operators.INDEXING - {"aten.searchsorted.Tensor"} == indices.GUARDED


@pytest.mark.parametrize("op", CASES)
def test_an_index_in_range_gives_what_torch_gives(device: TorchDevice, op: str) -> None:
    args, shape, first, end, others = CASES[op]
    for good in (first, 0, end - 1):
        inputs = (TABLE, torch.tensor([0, good]).reshape(shape), *others)
        assert torch.equal(asked(device, op, args, *inputs), by_torch(op, args, inputs))


@pytest.mark.parametrize("op", CASES)
def test_an_index_out_of_range_is_an_error_that_says_so(device: TorchDevice, op: str) -> None:
    args, shape, first, end, others = CASES[op]
    for bad in (first - 1, end, *FAR):
        with pytest.raises(ValueOutOfBounds, match=rf"an index is out of range in {op} \(node 0") as raised:
            asked(device, op, args, TABLE, torch.tensor([0, bad]).reshape(shape), *others)
        assert raised.value.details == {"node": 0, "operator": op}


def laid_out(random: np.random.Generator, tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in another order in memory: kernels differ in that, and in how they tell of an index."""
    if random.random() < 0.5 and tensor.ndim > 1:
        order = random.permutation(tensor.ndim).tolist()
        return tensor.permute(order).contiguous().permute(np.argsort(order).tolist())
    return tensor.repeat_interleave(2, -1)[..., ::2] if random.random() < 0.3 and tensor.ndim else tensor


@pytest.mark.parametrize("op", [op for op in CASES if "index_put" not in op and "one_hot" not in op])
def test_whatever_the_shape_a_bad_index_never_reaches_memory(device: TorchDevice, op: str) -> None:
    """Torch has several kernels for each operator, and chooses by shape, order and size."""
    for seed in range(60):
        random = np.random.default_rng(seed)
        shape = random.integers(1, 7, random.integers(1, 4)).tolist()
        if seed % 10 == 0:
            # Many threads, wide rows.
            shape = [int(random.integers(2, 40)), 1, 1500][: len(shape)]
        dim = 0 if "embedding" in op or op == "aten.index.Tensor" else int(random.integers(len(shape)))
        if "embedding" in op:
            shape = [*shape[:1], 3]
        dtype = (torch.float32, torch.float64, torch.int64, torch.bfloat16)[seed % 4]
        table = laid_out(random, torch.zeros(shape, dtype=dtype))
        whole = "gather" in op or "scatter" in op or "take_along" in op
        count = int(random.integers(1, 4))
        bad = (-shape[dim] - 1, shape[dim], *FAR)[seed % 6]
        index = torch.zeros([*shape[:dim], count, *shape[dim + 1 :]] if whole else [count], dtype=torch.int64)
        if whole and seed % 3 == 0:
            # One number for a whole row, which has kernels of its own.
            index = torch.zeros([count if axis == dim else 1 for axis in range(len(shape))], dtype=torch.int64)
            index[(0,) * len(shape)] = bad
            index = index.expand([count if axis == dim else size for axis, size in enumerate(shape)])
        else:
            index.view(-1)[int(random.integers(index.numel()))] = bad
        third = torch.ones([*shape[:dim], count, *shape[dim + 1 :]], dtype=dtype)
        if "index_fill" in op:
            third = torch.ones((), dtype=dtype)
        args = {
            "aten.embedding.default": (SELF, INDEX),
            "aten.index.Tensor": (SELF, (INDEX,)),
            "aten.take_along_dim.default": (SELF, INDEX, dim),
            "aten.index_select.default": (SELF, dim, INDEX),
            "aten.gather.default": (SELF, dim, INDEX),
            "aten.index_fill.int_Scalar": (SELF, dim, INDEX, 1),
            "aten.scatter.value": (SELF, dim, INDEX, 1),
            "aten.scatter_reduce.two": (SELF, dim, INDEX, THIRD, Enum("sum")),
        }.get(op, (SELF, dim, INDEX, THIRD))
        with pytest.raises(ValueOutOfBounds):
            asked(device, op, args, table, index, third)
            pytest.fail(f"seed {seed}: {op} of {shape} along {dim} took {bad}")


def test_arguments_may_be_given_by_name(device: TorchDevice) -> None:
    good, bad = torch.tensor([[0, 3]]), torch.tensor([[0, 5]])
    assert asked(device, "aten.gather.default", (SELF,), TABLE, good, dim=0, index=INDEX).tolist() == [[0.0, 13.0]]
    with pytest.raises(ValueOutOfBounds):
        asked(device, "aten.gather.default", (SELF,), TABLE, bad, dim=0, index=INDEX)


def test_indices_of_four_bytes_are_brought_into_range_as_well(device: TorchDevice) -> None:
    op, args = "aten.embedding.default", (SELF, INDEX)
    assert asked(device, op, args, TABLE, torch.tensor([4], dtype=torch.int32)).tolist() == [[16.0, 17.0, 18.0, 19.0]]
    # A table that is longer than such an index can say.
    long = torch.zeros(1).expand(1 << 40, 1)
    assert asked(device, op, args, long, torch.tensor([(1 << 31) - 1], dtype=torch.int32)).tolist() == [[0.0]]
    for bad in (-1, 5, (1 << 31) - 1):
        with pytest.raises(ValueOutOfBounds):
            asked(device, op, args, TABLE, torch.tensor([bad], dtype=torch.int32))


def test_all_of_a_tensor_may_be_indexed_as_if_it_had_one_axis(device: TorchDevice) -> None:
    op, args = "aten.take_along_dim.default", (SELF, INDEX)
    assert asked(device, op, args, TABLE, torch.tensor([19])).tolist() == [19.0]
    for bad in (-1, 20):
        with pytest.raises(ValueOutOfBounds):
            asked(device, op, args, TABLE, torch.tensor([bad]))


def test_masks_stand_for_the_axes_they_have(device: TorchDevice) -> None:
    op, cube = "aten.index.Tensor", torch.arange(24.0).reshape(2, 3, 4)
    mask = torch.tensor([[True, False, False], [False, True, True]])
    inputs = (cube, mask, torch.tensor([3, -4, 0]))
    args = (SELF, (INDEX, THIRD))
    assert torch.equal(asked(device, op, args, *inputs), cube[mask, inputs[2]])
    with pytest.raises(ValueOutOfBounds):
        asked(device, op, args, cube, mask, torch.tensor([3, 4, 0]))


def test_nothing_can_be_had_of_nothing(device: TorchDevice) -> None:
    for op, args, shape in (("aten.embedding.default", (SELF, INDEX), (1,)), ("aten.gather.default", (SELF, 0, INDEX), (1, 1))):
        empty = torch.zeros(0, COLUMNS)
        # A model whose own table is empty is refused by torch in its own words.
        with pytest.raises((ValueOutOfBounds, DeviceFault)):
            asked(device, op, args, empty, torch.zeros(shape, dtype=torch.int64))
        assert not asked(device, op, args, empty, torch.zeros([0, *shape[1:]], dtype=torch.int64)).numel()


@pytest.mark.parametrize("source", [0, 5, 6, 40])
def test_a_mask_has_no_more_places_than_there_are_numbers(device: TorchDevice, source: int) -> None:
    op, args = "aten.masked_scatter.default", (SELF, INDEX, THIRD)
    inputs = (TABLE, TABLE[:, :1] >= 8, torch.arange(source, dtype=torch.float32))
    # It has twelve.
    if source < 12:
        with pytest.raises(ValueOutOfBounds):
            asked(device, op, args, *inputs)
    else:
        assert torch.equal(asked(device, op, args, *inputs), by_torch(op, args, inputs))


@pytest.mark.parametrize("bad", [-1, 5, *FAR])
def test_an_order_that_is_none_is_an_index_out_of_range(device: TorchDevice, bad: int) -> None:
    with pytest.raises(ValueOutOfBounds):
        asked(
            device,
            "aten.searchsorted.Tensor",
            (SELF, THIRD),
            torch.arange(5.0),
            torch.tensor([0, 1, 2, 3, bad]),
            torch.ones(2),
            sorter=INDEX,
        )


@pytest.mark.parametrize(
    ("op", "args", "wanted"),
    [
        # torch takes numbers where it could have tensors of indices, and no others.
        ("aten.index.Tensor", (SELF, (9,)), DeviceFault),
        ("aten.gather.default", (SELF, 7, INDEX), DeviceFault),
        ("aten.gather.default", (SELF, 0, THIRD), DeviceFault),
        ("aten.take_along_dim.default", (SELF, INDEX, 7), DeviceFault),
    ],
)
def test_what_torch_does_not_take_is_the_model_s_fault(
    device: TorchDevice, op: str, args: tuple[Argument, ...], wanted: type[Exception]
) -> None:
    with pytest.raises((wanted, ValueOutOfBounds)) as raised:
        asked(device, op, args, TABLE, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1))
    assert op in raised.value.message


def test_of_several_the_first_that_was_given_a_bad_index_is_named() -> None:
    first, second = Node("aten.embedding.default", (SELF, INDEX)), Node("aten.index_select.default", (Value("node", 0), 0, THIRD))
    inputs = tuple(TensorSpec(f"x{number}", "float32", ()) for number in range(3))
    made = Graph((), inputs, (TensorSpec("y", "float32", ()),), (), (first, second), (Value("node", 1),))
    device = TorchDevice(CPU, guarded=True)
    program = device.prepare(made)
    good, bad = torch.tensor([1]), torch.tensor([5])
    for one, other, named in ((bad, bad, 0), (bad, torch.tensor([0]), 0), (good, bad, 1)):
        with pytest.raises(ValueOutOfBounds) as raised:
            device.run(program, (), (TABLE, one, other))
        assert raised.value.details["node"] == named
    assert device.run(program, (), (TABLE, good, torch.tensor([0])))[0].tolist() == [[4.0, 5.0, 6.0, 7.0]]


def test_of_models_that_run_as_one_the_error_is_of_all_and_typed(device: TorchDevice) -> None:
    weight = Value("weight", 0)
    nodes = (Node("aten.embedding.default", (SELF, INDEX)), Node("aten.linear.default", (Value("node", 0), weight)))
    inputs = tuple(TensorSpec(f"x{number}", "float32", ()) for number in range(2))
    made = Graph((), inputs, (TensorSpec("y", "float32", ()),), (weight_of(b"1"),), nodes, (Value("node", 1),))
    program = StackedProgram(made, device.prepare(made))
    weights = stack([[torch.ones(3, COLUMNS)], [torch.full((3, COLUMNS), 2.0)]])
    given = device.run_stacked(program, weights, [[TABLE, torch.tensor([0])], [TABLE, torch.tensor([1])]])
    assert [outputs[0].tolist() for outputs in given] == [[[6.0] * 3], [[44.0] * 3]]
    for bad in (-1, ROWS, *FAR):
        with pytest.raises(ValueOutOfBounds, match="aten.embedding.default"):
            device.run_stacked(program, weights, [[TABLE, torch.tensor([0])], [TABLE, torch.tensor([bad])]])


def test_a_result_is_let_go_of_as_soon_as_nobody_reads_it_any_more() -> None:
    program = TorchDevice(CPU, guarded=True).prepare(graph(Node("aten.embedding.default", (SELF, INDEX)), 2))
    released = {slot for step in program.steps for slot in step.released}
    made = {step.target for step in program.steps}
    kept = {*program.results, *(slot for slot, _ in program.flags)}
    assert made - released == kept


# --- a served model -----------------------------------------------------------------------------------------------------


class Looked(nn.Module):
    """Looks up twice what it is given, in a table of 50 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(50, 64), nn.Linear(64, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.table(ids * 2).sum(1))


@pytest.mark.parametrize("form", ["plain", "packed", "blocked"])
@pytest.mark.parametrize("bad", [-1, 25, 1 << 31, (1 << 62) - 1])
@pytest.mark.row("T12")
def test_a_bad_index_is_its_caller_s_error_and_nobody_else_s(
    device: TorchDevice, bad: int, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, form)
    made = network_of(Looked(), "looked", (torch.zeros(2, 4, dtype=torch.int64),))
    with serving(tmp_path, monkeypatch, device, packing=form != "plain") as running:
        deploy(running, made)
        inputs = [{"ids": np.full((1, 4), number, np.int64)} for number in range(6)]
        inputs[3]["ids"][0, 2] = bad
        with counted(running) as counts:
            answers = asked_at_once(running, *(("looked", given) for given in inputs))
        failed = answers.pop(3)
        assert isinstance(failed, ValueOutOfBounds)
        assert "an index is out of range in aten.embedding.default (node 1, " in failed.message
        del inputs[3]
        for given, answer in zip(inputs, answers, strict=True):
            assert agrees(answer, made.eager(given), exact=False)
        # They were a batch, and each was run once more by itself.
        assert counts["stage_requests"] == 5
