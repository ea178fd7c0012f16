"""Models as stages: run one after the other they compute what the whole computes, and equal beginnings are equal stages."""

from __future__ import annotations

import pytest
import torch

from sidecar.blocks import block_id, cut
from sidecar.devices import open_device
from sidecar.ir import Graph
from sidecar.merkle import Tokens
from sidecar.stages import Key, Staged, split
from tests import zoo


def staged(graph: Graph) -> Staged:
    identities = Tokens().identify(graph)
    named, parent = {}, ""
    for block in cut(graph):
        parent = block_id(block, identities, parent)
        named[parent] = block
    return split(graph, identities, named)


@pytest.mark.parametrize("kind", zoo.ALL)
def test_stages_compute_bit_for_bit_what_the_whole_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 64)  # many small stages
    source, bundle, contents = zoo.stored(kind)
    graph = bundle.graph
    device = open_device("cpu")

    def weights(part: Graph) -> list[torch.Tensor]:
        return [
            device.new_weight(each, lambda target, each=each: target.__setitem__(slice(None), contents[each.digest]))
            for each in part.weights
        ]

    inputs = list(source.inputs.values()) if isinstance(source.inputs, dict) else list(source.inputs)
    whole = device.run(device.prepare(graph), weights(graph), inputs)
    found = staged(graph)
    env: dict[Key, torch.Tensor] = dict(zip(found.inputs, inputs, strict=True))
    for stage in found.stages:
        outputs = device.run(device.prepare(stage.graph), weights(stage.graph), [env[key] for key in stage.takes])
        env |= zip(stage.gives, outputs, strict=True)
        # Nothing else is needed from here on.
        env = {key: env[key] for key in stage.alive}
    assert all(torch.equal(env[key], output) for key, output in zip(found.results, whole, strict=True))
    if len(graph.nodes) > 60:
        assert len(found.stages) > 2
