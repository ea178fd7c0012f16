"""Stacked programs against the same models one by one: on one input, and on inputs of their own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from sidecar.devices import open_device
from sidecar.export import convert
from sidecar.ir import Graph
from sidecar.programs import Program
from sidecar.stacked import StackedProgram, stack, stackable


class Pooled(nn.Module):
    """What comes before the first weight is computed for each input, what comes after is [heads, ...]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3, bias=False), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.relu(x).mean(dim=1))


class Forked(nn.Module):
    """Two layers on one input, two results."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.one(x), torch.tanh(self.other(x))


def prepared(module: nn.Module, example: torch.Tensor) -> tuple[Graph, Program, StackedProgram]:
    graph = convert(module.eval(), (example,), name="head").bundle.graph
    assert stackable(graph)
    program = open_device("cpu").prepare(graph)
    return graph, program, StackedProgram(graph, program)


@pytest.mark.parametrize("made", [Pooled, Forked])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("own", [False, True])
def test_each_model_gets_what_it_gives_alone(made: Callable[[], nn.Module], rows: int, own: bool) -> None:
    torch.manual_seed(0)
    graph, program, stacked = prepared(made(), torch.randn(2, 4, 6))
    weights = [[torch.randn(weight.shape) for weight in graph.weights] for _ in range(5)]
    inputs = [[torch.randn(rows, 4, 6)] for _ in range(5 if own else 1)]
    given = stacked.run(stack(weights), inputs)
    assert len(given) == 5
    for number, outputs in enumerate(given):
        alone = program.run(weights[number], inputs[number if own else 0])
        assert len(outputs) == len(alone)
        for output, wanted in zip(outputs, alone, strict=True):
            torch.testing.assert_close(output, wanted)


def test_what_is_no_number_stays_with_its_own_head() -> None:
    graph, program, stacked = prepared(Pooled(), torch.randn(2, 4, 6))
    weights = [[torch.randn(weight.shape) for weight in graph.weights] for _ in range(3)]
    inputs = [[torch.randn(1, 4, 6)] for _ in range(3)]
    inputs[1][0].fill_(torch.inf)
    weights[1][0].fill_(torch.nan)
    given = stacked.run(stack(weights), inputs)
    assert given[1][0].isnan().all()
    for number in (0, 2):
        torch.testing.assert_close(given[number], program.run(weights[number], inputs[number]))
