"""What tests of served networks need: inputs for a graph, siblings of a model, the original's answer, and the comparison."""

from __future__ import annotations

import copy
import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from sidecar.bundle import Bundle, graph_digest
from sidecar.export import Source
from sidecar.ir import Graph, Value, node_values
from sidecar.translate import weight_bytes
from tests import zoo
from tests.fakes import FakeSource

# Whether a request of one row, asked by itself, is answered bit for bit as the original computes it. To be changed here, and
# nowhere else, for devices that compute in another order.
EXACT = True
RELATIVE, OF_SCALE = 1e-4, 1e-5

Arrays = dict[str, NDArray[np.generic]]


def agrees(answer: object, eager: Mapping[str, NDArray[np.generic]], exact: bool) -> bool:
    """Say whether a client's answer, by output where there are several, is what ``eager`` has: all bits of it, or nearly."""
    given = answer if isinstance(answer, dict) else {next(iter(eager)): answer}
    if given.keys() != eager.keys():
        return False
    for name, wanted in eager.items():
        got = np.asarray(given[name])
        if got.shape != wanted.shape or got.dtype != wanted.dtype:
            return False
        if exact or wanted.dtype.kind != "f":
            if not np.array_equal(got, wanted):
                return False
            continue
        scale = np.abs(wanted).max(initial=0.0)
        if not np.allclose(got.astype(np.float64), wanted.astype(np.float64), rtol=RELATIVE, atol=OF_SCALE * float(scale)):
            return False
    return True


def far_apart(one: Mapping[str, NDArray[np.generic]], other: Mapping[str, NDArray[np.generic]]) -> bool:
    """Say whether two answers could never be taken for each other: they differ by a hundred times what is tolerated."""
    pairs = [(one[name].astype(np.float64), other[name].astype(np.float64)) for name in one]
    return any(np.abs(a - b).max() > 100 * (OF_SCALE + RELATIVE) * max(np.abs(a).max(), np.abs(b).max()) for a, b in pairs)


@dataclass(frozen=True)
class Network:
    """A model as it is deployed, and the module it was made of."""

    bundle: Bundle
    blobs: dict[str, bytes]
    source: Source

    @property
    def name(self) -> str:
        return self.bundle.name

    def put(self, source: FakeSource) -> None:
        """Make it the model of its name in a source."""
        source.put(self.bundle, list(self.blobs.values()))

    def inputs(self, batch: int, seed: int = 3, scale: float = 1.0) -> Arrays:
        """Return random inputs the model takes. ``scale`` multiplies those that are floats."""
        graph, generator = self.bundle.graph, torch.Generator().manual_seed(seed)
        sizes = {each.name: max(each.minimum, min(each.maximum, 5)) for each in graph.symbols} | {"batch": batch}
        made: Arrays = {}
        for spec in graph.inputs:
            shape = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape]
            if spec.dtype == "int64":
                low, high = spec.minimum or 0, spec.maximum or 1
                made[spec.name] = torch.randint(low, high + 1, shape, generator=generator).numpy()
            else:
                made[spec.name] = (torch.randn(shape, generator=generator) * scale).numpy()
        if "attention_mask" in made:
            made["attention_mask"][:, 0] = 1
        return made

    def eager(self, inputs: Arrays) -> Arrays:
        """Return what the module itself answers."""
        tensors = {name: torch.from_numpy(array.copy()) for name, array in inputs.items()}
        with torch.no_grad():
            if isinstance(self.source.inputs, Mapping) and not isinstance(self.source.module, nn.Sequential):
                answer = self.source.module(**tensors)
            else:
                answer = self.source.module(*tensors.values())
        leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]
        return {spec.name: leaf.detach().numpy() for spec, leaf in zip(self.bundle.graph.outputs, leaves, strict=True)}

    def tuned(self, name: str, seed: int) -> Network:
        """Return a sibling: the same model but for the weights of its last layer."""
        graph, module = self.bundle.graph, copy.deepcopy(self.source.module)
        generator = torch.Generator().manual_seed(seed)
        weights, blobs = list(graph.weights), dict(self.blobs)
        changed = last_layer(graph)
        for tensor in (*module.parameters(), *module.buffers()):
            digest = hashlib.sha256(bytes(weight_bytes(tensor.detach()))).hexdigest()
            for index in changed:
                if graph.weights[index].digest != digest:
                    continue
                with torch.no_grad():
                    tensor.add_(torch.randn(tensor.shape, generator=generator) * 3 * tensor.abs().mean())
                content = bytes(weight_bytes(tensor.detach()))
                new = hashlib.sha256(content).hexdigest()
                weights[index] = replace(graph.weights[index], digest=new, crc32=zlib.crc32(content))
                blobs[new] = content
        assert all(weights[index] != graph.weights[index] for index in changed), "the last layer is not in the module"
        other = replace(graph, weights=tuple(weights))
        used = {weight.digest for weight in weights}
        bundle = replace(self.bundle, name=name, graph=other, graph_digest=graph_digest(other))
        kept = {digest: content for digest, content in blobs.items() if digest in used}
        return Network(bundle, kept, replace(self.source, module=module))

    def called(self, name: str) -> Network:
        """Return the same under another name."""
        return replace(self, bundle=replace(self.bundle, name=name))


def last_layer(graph: Graph) -> list[int]:
    """Return the weights of the last node that has some which no other node uses."""
    users: dict[int, list[int]] = {}
    for number, node in enumerate(graph.nodes):
        for value in node_values(node):
            if value.kind == "weight":
                users.setdefault(value.index, []).append(number)
    own = {index: found[0] for index, found in users.items() if len(found) == 1 and Value("weight", index) not in graph.results}
    return [index for index, number in own.items() if number == max(own.values())]


def network(kind: str) -> Network:
    """Return a network of the zoo, converted."""
    source, bundle, blobs = zoo.stored(kind)
    return Network(bundle, dict(blobs), source)
