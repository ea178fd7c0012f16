"""Stages as one graph: which of them, and that it computes what they compute."""

from __future__ import annotations

import pytest
import torch

from sidecar.devices import open_device
from sidecar.graph import FusedGraph
from sidecar.stretches import LONGEST_S, ranges, stretched
from tests import zoo
from tests.integration.test_packed import filler

S = LONGEST_S


@pytest.mark.parametrize(
    ("run_s", "expected"),
    [
        ((), []),
        ((S / 10,), []),
        ((S / 10, S / 10), [(0, 2)]),
        # As long as may be, and no longer.
        ((S * 0.4,) * 5, [(0, 2), (2, 4)]),
        # One that takes longer by itself stays by itself.
        ((S / 10, S * 2, S / 10, S / 10), [(2, 4)]),
        ((S * 2, S / 10, S / 10), [(1, 3)]),
    ],
)
def test_stages_are_run_as_one_up_to_a_length(run_s: tuple[float, ...], expected: list[object]) -> None:
    assert [(each.start, each.stop) for each in ranges(run_s)] == expected


@pytest.mark.parametrize("name", ["resnet", "unet", "vit", "densenet"])
def test_stages_that_are_joined_compute_what_they_compute_one_by_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    device, fused = open_device("cpu"), FusedGraph()
    source, bundle, blobs = zoo.stored(name)
    fused.add(bundle)
    staged = fused.staged(bundle.name)
    stages = staged.stages
    assert len(stages) > 1
    weights = [[device.new_weight(weight, filler(blobs[weight.digest])) for weight in stage.graph.weights] for stage in stages]
    values = dict(zip(staged.inputs, source.inputs, strict=True))
    for stage, bound in zip(stages, weights, strict=True):
        given = device.run(device.prepare(stage.graph), bound, [values[key] for key in stage.takes])
        values.update(zip(stage.gives, given, strict=True))
    count = len(stages)
    for start in range(count - 1):
        for in_session in ([True] * count, [False] * count, [number % 3 > 0 for number in range(count)]):
            stretch = stretched(stages[start:], in_session[start:])
            assert stretch.count == sum(piece.count for piece in stretch.pieces) == count - start
            assert set(stretch.gives) <= stages[-1].alive
            for piece in stretch.pieces:
                piece.program = device.prepare(piece.graph)
            given = stretch.run(device.run, weights[start:], [values[key] for key in stretch.takes])
            for key, tensor in zip(stretch.gives, given, strict=True):
                assert torch.equal(tensor, values[key])
    # Neighbours in sessions are one graph.
    assert [piece.count for piece in stretched(stages, [True] * count).pieces] == [count]
    assert [piece.count for piece in stretched(stages, [False] * count).pieces] == [1] * count
    # What the first ones give and others take is given, and nothing else.
    for joins in (True, False):
        first = stretched(stages[:2], [joins] * 2)
        assert set(first.gives) == {*stages[0].gives, *stages[1].gives} & stages[1].alive
