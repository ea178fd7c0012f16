"""Stages as one graph: which of them, and that it computes what they compute."""

from __future__ import annotations

import pytest
import torch

from sidecar.devices import open_device
from sidecar.graph import FusedGraph
from sidecar.stretches import JOINED, LONGEST_S, joined, ranges
from tests import zoo
from tests.integration.test_packed import filler

# Of stages by themselves.
S = LONGEST_S / JOINED


@pytest.mark.parametrize(
    ("run_s", "may_join", "expected"),
    [
        ((), (), []),
        ((S / 10,), (True,), []),
        ((S / 10, S / 10), (True, True), [(0, 2)]),
        ((S / 10, S / 10), (True, False), []),
        # One that may not be joined parts the others.
        ((S / 10,) * 5, (True, True, False, True, True), [(0, 2), (3, 5)]),
        ((S / 10,) * 5, (False, True, True, True, False), [(1, 4)]),
        # As long as may be, and no longer.
        ((S * 0.4,) * 5, (True,) * 5, [(0, 2), (2, 4)]),
        # One that takes longer by itself stays by itself.
        ((S / 10, S * 2, S / 10, S / 10), (True,) * 4, [(2, 4)]),
        ((S * 2, S / 10, S / 10), (True,) * 3, [(1, 3)]),
    ],
)
def test_stages_are_joined_up_to_a_length(run_s: tuple[float, ...], may_join: tuple[bool, ...], expected: list[object]) -> None:
    assert [(each.start, each.stop) for each in ranges(run_s, may_join)] == expected


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
    for start in range(len(stages) - 1):
        stretch = joined(stages[start:])
        assert stretch.count == len(stages) - start
        assert set(stretch.gives) <= stages[-1].alive
        bound = [weight for each in weights[start:] for weight in each]
        given = device.run(device.prepare(stretch.graph), bound, [values[key] for key in stretch.takes])
        for key, tensor in zip(stretch.gives, given, strict=True):
            assert torch.equal(tensor, values[key])
    # What the first ones give and others take is given, and nothing else.
    first = joined(stages[:2])
    assert set(first.gives) == {*stages[0].gives, *stages[1].gives} & stages[1].alive
