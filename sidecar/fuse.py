"""Fusing: several graphs made one, in which everything equal stands once.

The fused graph takes each input once, computes each node once, and gives the outputs of all. What is equal is told by Merkle
values, as in global value numbering: nobody has to say that models have a trunk in common, and a node that
two of them compute at different places is found as well. Pure; must not import torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from trunkline.errors import InvalidInput
from trunkline.protocol import JOINT_OUTPUT, MAX_NAME, MAX_TENSORS, TensorSpec

from sidecar.ir import Argument, Graph, Node, Symbol, Value, Weight
from sidecar.merkle import Identities, Tokens


def fuse(graphs: Mapping[str, Graph]) -> Graph:
    """Return one graph for all of ``graphs``, its outputs called ``model/output`` in the order of the mapping.

    Inputs of two graphs are one when they have the same dtype, the same shape and the same place among their likes; the
    first graph names them. Where names say otherwise, nothing is guessed. Values must suit every graph that takes them.
    Raises InvalidInput when the graphs cannot be asked about the same inputs.
    """
    count = sum(len(graph.outputs) for graph in graphs.values())
    if count > MAX_TENSORS:
        raise InvalidInput(f"{', '.join(graphs)} have {count} outputs together, one call has at most {MAX_TENSORS}")
    fusion = _Fusion()
    for name, graph in graphs.items():
        fusion.add(name, graph)
    if (count := len(fusion.inputs)) > MAX_TENSORS:
        raise InvalidInput(f"{', '.join(graphs)} have {count} inputs together, one call has at most {MAX_TENSORS}")
    return Graph(
        symbols=tuple(fusion.symbols.values()),
        inputs=tuple(fusion.inputs.values()),
        outputs=tuple(fusion.outputs),
        weights=tuple(fusion.weights),
        nodes=tuple(fusion.nodes.values()),
        results=tuple(fusion.results),
    )


@dataclass
class _Fusion:
    """What was fused so far. Inputs and nodes by their Merkle value, in order; weights and symbols by what they are."""

    tokens: Tokens = field(default_factory=Tokens)
    symbols: dict[str, Symbol] = field(default_factory=dict)
    inputs: dict[bytes, TensorSpec] = field(default_factory=dict)
    outputs: list[TensorSpec] = field(default_factory=list)
    weights: dict[Weight, int] = field(default_factory=dict)
    nodes: dict[bytes, Node] = field(default_factory=dict)
    node_numbers: dict[bytes, int] = field(default_factory=dict)
    results: list[Value] = field(default_factory=list)

    def add(self, name: str, graph: Graph) -> None:
        identities = self.tokens.identify(graph)
        symbols = self._add_inputs(name, graph, identities)
        for weight in graph.weights:
            self.weights.setdefault(weight, len(self.weights))
        input_numbers = {value: number for number, value in enumerate(self.inputs)}

        def moved(value: Value) -> Value:
            if value.kind == "weight":
                return replace(value, index=self.weights[graph.weights[value.index]])
            numbers = input_numbers if value.kind == "input" else self.node_numbers
            return replace(value, index=numbers[identities.of(value).value])

        for node, identity in zip(graph.nodes, identities.nodes, strict=True):
            if identity.value not in self.nodes:
                self.node_numbers[identity.value] = len(self.nodes)
                arguments = tuple(_moved(argument, moved) for argument in node.args)
                keywords = tuple((key, _moved(argument, moved)) for key, argument in node.kwargs)
                self.nodes[identity.value] = replace(node, args=arguments, kwargs=keywords)
        for spec, result in zip(graph.outputs, graph.results, strict=True):
            called = f"{name}{JOINT_OUTPUT}{spec.name}"
            if len(called) > MAX_NAME:
                raise InvalidInput(
                    f"the output {called[:40]}... would have a name of {len(called)} characters, at most {MAX_NAME}"
                )
            self.outputs.append(replace(spec, name=called, shape=_renamed(spec.shape, symbols)))
            self.results.append(moved(result))

    def _add_inputs(self, name: str, graph: Graph, identities: Identities) -> dict[str, str]:
        """Add or find the inputs of a graph; return what its symbols are called here."""
        bounds = {symbol.name: symbol for symbol in graph.symbols}
        symbols: dict[str, str] = {}
        before, own = {spec.name for spec in self.inputs.values()}, {spec.name for spec in graph.inputs}
        pairs = list(zip(graph.inputs, identities.inputs, strict=True))
        # First those that are there already: they say which of its symbols are whose.
        for spec, identity in pairs:
            known = self.inputs.get(identity.value)
            if known is None:
                continue
            if spec.name != known.name and (spec.name in before or known.name in own):
                raise InvalidInput(f"{name} means another input by {spec.name} than the others; ask them one by one")
            for axis, other in zip(spec.shape, known.shape, strict=True):
                if isinstance(axis, str) and isinstance(other, str):
                    if symbols.setdefault(axis, other) != other:
                        raise InvalidInput(f"{name} ties the sizes of its inputs otherwise than the others; ask them one by one")
                    self._narrow_symbol(name, other, bounds[axis])
            self.inputs[identity.value] = _narrowed(name, known, spec)
        for spec, identity in pairs:
            if identity.value in self.inputs:
                continue
            if spec.name in before:
                raise InvalidInput(f"{name} means another input by {spec.name} than the others; ask them one by one")
            for axis in spec.shape:
                if isinstance(axis, str) and axis not in symbols:
                    symbols[axis] = self._new_symbol(bounds[axis])
            self.inputs[identity.value] = replace(spec, shape=_renamed(spec.shape, symbols))
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


def _moved(argument: Argument, moved: Callable[[Value], Value]) -> Argument:
    if isinstance(argument, Value):
        return moved(argument)
    if isinstance(argument, tuple):
        return tuple(_moved(member, moved) for member in argument)
    return argument
