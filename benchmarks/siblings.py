"""Models that begin alike, and their bundles: one conversion for each architecture, other weights put into it.

Every weight is random and different from every other, the constants of norms included, so that what the sidecar shares is
what siblings really have in common.
"""

from __future__ import annotations

import copy
import hashlib
import math
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sidecar.bundle import graph_digest, write_bundle
from sidecar.export import convert
from sidecar.ir import Graph, Weight


def reseed(module: nn.Module, seed: int) -> nn.Module:
    """Overwrite every float of a module with seeded random values that keep activations in scale; return it in eval mode."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            continue
        values = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            fan_in = tensor[0].numel()
            tensor.copy_(values / math.sqrt(fan_in))
        elif name.endswith(("bias", "running_mean")):
            tensor.copy_(0.1 * values)
        else:
            tensor.copy_(1 + 0.1 * values.clamp(-3, 3))
    return module.eval()


class Family:
    """An architecture that was converted once, and models of it with other weights.

    ``bounds`` are those of integer inputs, by name. The larger ``max_batch``, the longer the comparison with the original takes.
    """

    def __init__(
        self,
        base: nn.Module,
        example: Tensor,
        seed: int,
        bounds: Mapping[str, tuple[int, int]] | None = None,
        max_batch: int = 16,
    ) -> None:
        self.base = reseed(base, seed)
        self.example = example
        self._packed = convert(self.base, (example,), name="base", max_batch=max_batch, input_bounds=bounds)
        self._keys = {_digest(tensor): key for key, tensor in self.base.state_dict().items()}
        unknown = [weight for weight in self._packed.bundle.graph.weights if weight.digest not in self._keys]
        assert not unknown, f"conversion made {len(unknown)} weights that are none of the model's"

    def with_head(self, seed: int) -> nn.Module:
        """Return a model on the same trunk with a head of its own."""
        return self.tuned(0, seed)

    def tuned(self, last_count: int, seed: int) -> nn.Module:
        """Return a model whose last ``last_count`` units, and head, are not the base's."""
        model = copy.deepcopy(self.base)
        for number, unit in enumerate([model.head, *reversed(model.units)][: last_count + 1]):
            reseed(unit, 100 * seed + number)
        return model

    @property
    def graph(self) -> Graph:
        """The graph of the base model; those of the others differ in digests of weights only."""
        return self._packed.bundle.graph

    def weights(self, model: nn.Module) -> list[tuple[Weight, Tensor]]:
        """Return the weights of a model in the order of the graph."""
        state, original = model.state_dict(), self.base.state_dict()
        found = []
        for weight in self.graph.weights:
            tensor = state[self._keys[weight.digest]]
            if not torch.equal(tensor, original[self._keys[weight.digest]]):
                content = content_of(tensor)
                weight = replace(weight, digest=hashlib.sha256(content).hexdigest(), crc32=zlib.crc32(content))
            found.append((weight, tensor))
        return found

    def write(self, folder: Path, name: str, model: nn.Module) -> None:
        """Write the bundle of a model of this architecture."""
        weights = self.weights(model)
        graph = replace(self.graph, weights=tuple(weight for weight, _ in weights))
        bundle = replace(self._packed.bundle, name=name, graph=graph, graph_digest=graph_digest(graph))
        write_bundle(folder, bundle, ((weight.digest, content_of(tensor)) for weight, tensor in weights))


def content_of(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor."""
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(content_of(tensor)).hexdigest()
