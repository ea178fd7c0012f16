"""Models asked together: what several of them take and give in one call.

The call takes each input once and gives the outputs of all. What they compute alike is found when they run, by stages
(``sidecar.wavefront``); here only inputs and outputs are joined. Pure; must not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from trunkline.errors import InvalidInput
from trunkline.protocol import JOINT_OUTPUT, MAX_NAME, MAX_TENSORS, TensorSpec

from sidecar.ir import Graph, Symbol
from sidecar.merkle import input_values


@dataclass(frozen=True)
class Interface:
    """What models take and give together; ``values`` names each input as ``sidecar.stages`` does."""

    symbols: tuple[Symbol, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    values: tuple[bytes, ...]


def join(graphs: Mapping[str, Graph]) -> Interface:
    """Return the interface of all ``graphs``, its outputs called ``model/output`` in the order of the mapping.

    Inputs of two graphs are one when they have the same dtype, the same shape and the same place among their likes; the
    first graph names them. Where names say otherwise, nothing is guessed. Values must suit every graph that takes them.
    Raises InvalidInput when the graphs cannot be asked about the same inputs.
    """
    count = sum(len(graph.outputs) for graph in graphs.values())
    if count > MAX_TENSORS:
        raise InvalidInput(f"{', '.join(graphs)} have {count} outputs together, one call has at most {MAX_TENSORS}")
    joint = _Joint()
    for name, graph in graphs.items():
        joint.add(name, graph)
    if (count := len(joint.inputs)) > MAX_TENSORS:
        raise InvalidInput(f"{', '.join(graphs)} have {count} inputs together, one call has at most {MAX_TENSORS}")
    return Interface(tuple(joint.symbols.values()), tuple(joint.inputs.values()), tuple(joint.outputs), tuple(joint.inputs))


@dataclass
class _Joint:
    """What was joined so far: inputs by their Merkle value, in order."""

    symbols: dict[str, Symbol] = field(default_factory=dict)
    inputs: dict[bytes, TensorSpec] = field(default_factory=dict)
    outputs: list[TensorSpec] = field(default_factory=list)

    def add(self, name: str, graph: Graph) -> None:
        symbols = self._add_inputs(name, graph)
        for spec in graph.outputs:
            called = f"{name}{JOINT_OUTPUT}{spec.name}"
            if len(called) > MAX_NAME:
                raise InvalidInput(
                    f"the output {called[:40]}... would have a name of {len(called)} characters, at most {MAX_NAME}"
                )
            self.outputs.append(replace(spec, name=called, shape=_renamed(spec.shape, symbols)))

    def _add_inputs(self, name: str, graph: Graph) -> dict[str, str]:
        """Add or find the inputs of a graph; return what its symbols are called here."""
        bounds = {symbol.name: symbol for symbol in graph.symbols}
        symbols: dict[str, str] = {}
        before, own = {spec.name for spec in self.inputs.values()}, {spec.name for spec in graph.inputs}
        pairs = list(zip(graph.inputs, input_values(graph), strict=True))
        # First those that are there already: they say which of its symbols are whose.
        for spec, value in pairs:
            known = self.inputs.get(value)
            if known is None:
                continue
            if spec.name != known.name and (spec.name in before or known.name in own):
                raise InvalidInput(f"{name} means another input by {spec.name} than the others; ask them one by one")
            for axis, other in zip(spec.shape, known.shape, strict=True):
                if isinstance(axis, str) and isinstance(other, str):
                    if symbols.setdefault(axis, other) != other:
                        raise InvalidInput(f"{name} ties the sizes of its inputs otherwise than the others; ask them one by one")
                    self._narrow_symbol(name, other, bounds[axis])
            self.inputs[value] = _narrowed(name, known, spec)
        for spec, value in pairs:
            if value in self.inputs:
                continue
            if spec.name in before:
                raise InvalidInput(f"{name} means another input by {spec.name} than the others; ask them one by one")
            for axis in spec.shape:
                if isinstance(axis, str) and axis not in symbols:
                    symbols[axis] = self._new_symbol(bounds[axis])
            self.inputs[value] = replace(spec, shape=_renamed(spec.shape, symbols))
        return symbols

    def _new_symbol(self, symbol: Symbol) -> str:
        name, number = symbol.name, 1
        while name in self.symbols:
            number += 1
            name = f"{symbol.name}_{number}"
        self.symbols[name] = replace(symbol, name=name)
        return name

    def _narrow_symbol(self, model: str, name: str, other: Symbol) -> None:
        known = self.symbols[name]
        minimum, maximum = max(known.minimum, other.minimum), min(known.maximum, other.maximum)
        if minimum > maximum:
            raise InvalidInput(
                f"{model} takes {name} from {other.minimum} to {other.maximum}, "
                f"the others from {known.minimum} to {known.maximum}"
            )
        self.symbols[name] = Symbol(name, minimum, maximum)


def _narrowed(model: str, known: TensorSpec, other: TensorSpec) -> TensorSpec:
    minimum = max((bound for bound in (known.minimum, other.minimum) if bound is not None), default=None)
    maximum = min((bound for bound in (known.maximum, other.maximum) if bound is not None), default=None)
    if minimum is not None and maximum is not None and minimum > maximum:
        raise InvalidInput(f"no value of {known.name} suits both {model} and the others: from {minimum} to {maximum}")
    return replace(known, minimum=minimum, maximum=maximum)


def _renamed(shape: Sequence[int | str], symbols: Mapping[str, str]) -> tuple[int | str, ...]:
    # An axis that no input has, such as one whose size only the run can tell, stays as it is.
    return tuple(axis if isinstance(axis, int) else symbols.get(axis, axis) for axis in shape)
