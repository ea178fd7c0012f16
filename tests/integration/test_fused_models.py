"""Real models, fused: bit for bit what they answer alone, with their common part in the graph once."""

from __future__ import annotations

import pytest
import torch

from sidecar.bundle import Bundle
from sidecar.devices import open_device
from sidecar.export import convert
from sidecar.fuse import fuse
from sidecar.ir import Graph
from tests import zoo


class Headed(torch.nn.Module):
    """A head of its own on a trunk that others have, too."""

    def __init__(self, trunk: torch.nn.Module, classes: int, seed: int) -> None:
        super().__init__()
        self.trunk = trunk
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(classes, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(image))


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_real_models_answer_bit_for_bit_as_they_do_alone(kind: str) -> None:
    name = next(name for name in zoo.ALL if kind in name)
    source = zoo.ALL[name]()
    inputs = tuple(source.inputs.values()) if isinstance(source.inputs, dict) else tuple(source.inputs)
    classes = source.module(*inputs).shape[-1]
    packed: dict[str, Bundle] = {}
    blobs: dict[str, bytes] = {}
    for seed, called in enumerate(("a", "b", "c")):
        made = convert(Headed(source.module, classes, seed).eval(), inputs, name=called)
        packed[called] = made.bundle
        blobs |= {digest: bytes(content) for digest, content in made.blobs}
    device = open_device("cpu")

    def run(graph: Graph) -> list[torch.Tensor]:
        weights = []
        for weight in graph.weights:
            content = blobs[weight.digest]
            weights.append(device.new_weight(weight, lambda target, content=content: target.__setitem__(slice(None), content)))
        return device.run(device.prepare(graph), weights, inputs)

    fused = fuse({called: bundle.graph for called, bundle in packed.items()})
    alone = [run(bundle.graph)[0] for bundle in packed.values()]
    together = run(fused)
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))
    # Two more heads are all that is computed more.
    assert len(fused.nodes) == len(packed["a"].graph.nodes) + 2
