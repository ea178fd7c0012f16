"""Integers divided by integers, in a process of its own: where the processor cannot, it ends the process."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from trunkline.errors import DeviceFault

from sidecar.devices import TorchDevice
from sidecar.errors import BundleError
from sidecar.ir import Argument, Enum, Graph, Node, Value
from tests.integration.test_indices import graph

DTYPES = (torch.int8, torch.int16, torch.int32, torch.int64)
FIRST, SECOND = Value("input", 0), Value("input", 1)
TRUNC = (("rounding_mode", Enum("trunc")),)


def outcome(made: Graph, *inputs: torch.Tensor) -> int:
    """Return how a process ends that runs a graph: 0 if it does not."""
    pid = os.fork()
    if not pid:
        device = TorchDevice(torch.device("cpu"))
        try:
            device.run(device.prepare(made), (), inputs)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.row("T8")
@pytest.mark.parametrize("op", ["div.Tensor_mode", "div.Scalar_mode", "floor_divide.default", "remainder.Tensor", "fmod.Tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_integer_by_minus_one_ends_nothing(op: str, dtype: torch.dtype) -> None:
    smallest = torch.full((70,), torch.iinfo(dtype).min, dtype=dtype)
    by: Argument = -1 if op.endswith("Scalar_mode") else SECOND
    kwargs = TRUNC if "div." in op else ()
    inputs = (smallest,) if by == -1 else (smallest, torch.full((70,), -1, dtype=dtype))
    assert outcome(graph(Node(f"aten.{op}", (FIRST, by), kwargs), len(inputs)), *inputs) == 0


@pytest.mark.row("T8")
@pytest.mark.parametrize("by", [(1 << 63) - 1, (1 << 32) - 1, -1])
def test_what_is_minus_one_in_fewer_bits_ends_nothing(by: int) -> None:
    smallest = torch.full((70,), -(1 << 31), dtype=torch.int32)
    assert outcome(graph(Node("aten.div.Scalar_mode", (FIRST, by), TRUNC), 1), smallest) == 0
    assert outcome(graph(Node("aten.div.Tensor_mode", (FIRST, SECOND), TRUNC), 2), smallest, torch.tensor(by)) == 0
    assert outcome(graph(Node("aten.div.Tensor_mode", (FIRST, by), TRUNC), 1), smallest) == 0


@pytest.mark.row("T8")
@pytest.mark.parametrize("window", [(1 << 63) - 1, 1 << 62, -(1 << 63), 1 << 31])
def test_a_window_beyond_all_measure_ends_nothing(window: int) -> None:
    device, x = TorchDevice(torch.device("cpu")), torch.randn(4, 1, 1)
    with pytest.raises(BundleError, match="argument kernel_size is beyond 2147483647"):
        device.prepare(graph(Node("aten.max_pool1d.default", (FIRST, window)), 1))
    # As a size that only a run knows.
    for argument in (Value("node", 0), (Value("node", 0),)):
        made = replace(
            graph(Node("aten.relu.default", (FIRST,)), 1),
            nodes=(Node("sym.add", (window, 0)), Node("aten.max_pool1d.default", (FIRST, argument))),
            results=(Value("node", 1),),
        )
        assert outcome(made, x) == 0
        if isinstance(argument, tuple):
            with pytest.raises(DeviceFault, match="OverflowError"):
                device.run(device.prepare(made), (), (x,))
    assert outcome(graph(Node("aten.max_pool1d.default", (FIRST, ((1 << 31) - 1,), (1,), (0,), ((1 << 31) - 1,))), 1), x) == 0


@pytest.mark.parametrize("dtype", [*DTYPES, torch.uint8, torch.float32])
@pytest.mark.parametrize("divisor", [-2, -1, 1, 3])
@pytest.mark.parametrize("as_tensor", [True, False])
def test_quotients_are_what_torch_has(dtype: torch.dtype, divisor: int, as_tensor: bool) -> None:
    if dtype is torch.uint8 and divisor < 0:
        return
    device, dividend = TorchDevice(torch.device("cpu")), torch.arange(0, 60, dtype=dtype).reshape(6, 10)
    for mode in ("trunc", "floor"):
        inputs = (dividend, torch.tensor([divisor], dtype=dtype)) if as_tensor else (dividend,)
        op, by = ("div.Tensor_mode", SECOND) if as_tensor else ("div.Scalar_mode", divisor)
        made = graph(Node(f"aten.{op}", (FIRST, by), (("rounding_mode", Enum(mode)),)), len(inputs))  # type: ignore[arg-type]
        (given,) = device.run(device.prepare(made), (), inputs)
        wanted = torch.div(*inputs, rounding_mode=mode) if as_tensor else torch.div(dividend, divisor, rounding_mode=mode)
        assert given.dtype == wanted.dtype
        assert torch.equal(given, wanted)


def test_dtypes_are_mixed_as_torch_mixes_them() -> None:
    device, dividend = TorchDevice(torch.device("cpu")), torch.tensor([-7, 7, 9], dtype=torch.int16)
    for divisor in (torch.tensor([-1, 2, -1]), torch.tensor([2.0, -1.0, 3.0]), torch.tensor([-1], dtype=torch.int8)):
        (given,) = device.run(
            device.prepare(graph(Node("aten.div.Tensor_mode", (FIRST, SECOND), TRUNC), 2)), (), (dividend, divisor)
        )
        wanted = torch.div(dividend, divisor, rounding_mode="trunc")
        assert given.dtype == wanted.dtype
        assert torch.equal(given, wanted)
    # Without rounding, and by something that is no tensor.
    (given,) = device.run(device.prepare(graph(Node("aten.div.Scalar_mode", (FIRST, 2.5), TRUNC), 1)), (), (dividend,))
    assert given.tolist() == [-2.0, 2.0, 3.0]


@pytest.mark.row("T8")
@pytest.mark.parametrize(
    "bounds", [(0, -(1 << 63), -1), (0, -(1 << 63), 1), ((1 << 63) - 1, -(1 << 63), -1), (-(1 << 63), 0, -1)]
)
def test_a_range_that_ends_too_far_out_ends_nothing(bounds: tuple[int, int, int]) -> None:
    assert outcome(graph(Node("aten.arange.start_step", bounds), 0)) == 0
    device = TorchDevice(torch.device("cpu"))
    with pytest.raises(DeviceFault, match="OverflowError"):
        device.run(device.prepare(graph(Node("aten.arange.start_step", bounds), 0)), (), ())
    given = device.run(device.prepare(graph(Node("aten.arange.start_step", (-3, (1 << 62) - 1, 1 << 61)), 0)), (), ())
    assert given[0].tolist() == [-3, (1 << 61) - 3, (1 << 62) - 3]
