"""The comparison that decides whether a converted graph is the model it came from.

Part of the converter. Must not import anything above layer 2.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from trunkline.errors import TrunklineError

from sidecar.calls import Call, tensors_in
from sidecar.capture import FAILURES, describe
from sidecar.devices import open_device
from sidecar.errors import NumericsMismatch, UnsupportedModel
from sidecar.ir import Graph, model_bytes
from sidecar.sources import BATCH

_BATCHES = (1, 2, 3)
_SEED = 20
_MAX_CASES = 12
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 2e-2}
_FLOAT_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One comparison. ``sizes`` of the symbols; the largest difference, absolute and relative to the output's scale."""

    sizes: tuple[tuple[str, int], ...]
    max_abs: float
    max_rel: float
    equal: bool


@dataclass(frozen=True)
class Report:
    """What conversion found: every comparison made, and notes for the publisher."""

    tolerance: float
    cases: tuple[Case, ...]
    node_count: int
    weight_count: int
    weight_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def max_abs(self) -> float:
        """The largest absolute difference of all cases."""
        return max(case.max_abs for case in self.cases)

    @property
    def max_rel(self) -> float:
        """The largest difference of all cases, relative to the largest magnitude of its output."""
        return max(case.max_rel for case in self.cases)

    @property
    def equal_at_batch_1(self) -> bool:
        """Whether every case of batch 1 (all cases, where the batch is fixed) was equal to the last bit."""
        return all(case.equal for case in self.cases if dict(case.sizes).get(BATCH, 1) == 1)


def default_tolerance(tensors: Mapping[str, torch.Tensor]) -> float:
    """Return the tolerance for a model with these weights: 1e-4, wider where 16-bit floats take part."""
    return max((_TOLERANCE.get(tensor.dtype, _FLOAT_TOLERANCE) for tensor in tensors.values()), default=_FLOAT_TOLERANCE)


def compare(
    call: Call,
    graph: Graph,
    tensors: Mapping[str, torch.Tensor],
    tolerance: float,
    tell: Callable[[float], None],
) -> Report:
    """Run graph and original on the same random inputs of several sizes, the smallest among them.

    ``tensors`` holds the graph's weights by digest; ``tell`` is told the fraction done. Raises NumericsMismatch with
    both figures when an output differs in dtype, shape or by more than ``tolerance`` times its scale, UnsupportedModel
    when the original itself fails at a size it was said to take.
    """
    device = open_device("cpu")
    program = device.prepare(graph)
    weights = [device.as_weight(tensors[weight.digest], weight) for weight in graph.weights]
    generator = torch.Generator().manual_seed(_SEED)
    cases: list[Case] = []
    plan = list(_sizes(call))
    for number, sizes in enumerate(plan):
        inputs = call.inputs(sizes, generator)
        try:
            expected = tensors_in(call.original(tuple(tensor.clone() for tensor in inputs)))
        except FAILURES as error:
            raise UnsupportedModel(f"the model itself fails at {_show(sizes)}: {describe(error, call)}") from error
        try:
            named = dict(zip(call.names, inputs, strict=True))
            found = program.run(weights, [named[spec.name] for spec in graph.inputs])
        except TrunklineError as error:
            raise NumericsMismatch(f"the converted graph fails at {_show(sizes)}: {error.message}") from error
        if len(expected) != len(found):
            raise NumericsMismatch(f"the model returns {len(expected)} tensors at {_show(sizes)}, not {len(found)}")
        figures = [
            _difference(spec.name, spec.shape, sizes, wanted, got)
            for spec, wanted, got in zip(graph.outputs, expected, found, strict=True)
        ]
        for spec, (max_abs, max_rel) in zip(graph.outputs, figures, strict=True):
            if not max_rel <= tolerance:
                raise NumericsMismatch(
                    f"output {spec.name!r} at {_show(sizes)} differs by {max_abs:.3g}, {max_rel:.3g} of its scale; the "
                    f"tolerance is {tolerance:.3g}",
                    output=spec.name,
                    max_abs=max_abs,
                    max_rel=max_rel,
                    tolerance=tolerance,
                )
        equal = all(max_abs == 0 for max_abs, _ in figures)
        cases.append(Case(tuple(sizes.items()), max(one for one, _ in figures), max(other for _, other in figures), equal))
        tell((number + 1) / len(plan))
    return Report(
        tolerance=tolerance,
        cases=tuple(cases),
        node_count=len(graph.nodes),
        weight_count=len(graph.weights),
        weight_bytes=model_bytes(graph),
    )


def _sizes(call: Call) -> Iterator[dict[str, int]]:
    """Yield the sizes to compare at: few batches, and for other symbols the smallest, the example's and another."""
    choices: list[list[int]] = []
    for name, size in call.sizes().items():
        symbol = call.symbols[name]
        another = size + 3 if size + 3 <= symbol.maximum else max(size - 3, symbol.minimum)
        wanted = _BATCHES if name == BATCH else (symbol.minimum, size, another)
        choices.append(sorted({size for size in wanted if symbol.minimum <= size <= symbol.maximum} or {size}))
    for sizes in itertools.islice(itertools.product(*choices), _MAX_CASES):
        yield dict(zip(call.sizes(), sizes, strict=True))


def _difference(
    name: str, shape: tuple[int | str, ...], sizes: Mapping[str, int], wanted: torch.Tensor, got: torch.Tensor
) -> tuple[float, float]:
    """Return the largest difference, absolute and relative to the largest finite magnitude that is wanted."""
    declared = [sizes.get(axis, None) if isinstance(axis, str) else axis for axis in shape]
    agrees = len(declared) == got.dim() and all(size in (None, actual) for size, actual in zip(declared, got.shape, strict=False))
    if wanted.dtype != got.dtype or wanted.shape != got.shape or not agrees:
        raise NumericsMismatch(
            f"output {name!r} at {_show(sizes)} is {got.dtype} {list(got.shape)}, declared as {list(shape)}; the "
            f"model's own is {wanted.dtype} {list(wanted.shape)}",
            output=name,
        )
    if torch.equal(wanted, got):
        return 0.0, 0.0
    if not wanted.dtype.is_floating_point:
        return float((wanted.double() - got.double()).abs().max()), float("inf")  # there is no almost equal integer
    first, second = wanted.double(), got.double()
    same = (first == second) | (first.isnan() & second.isnan())
    gap = torch.where(same, 0.0, (first - second).abs().nan_to_num(float("inf"), float("inf")))
    finite = first[first.isfinite()]
    scale = float(finite.abs().max()) if finite.numel() else 0.0
    max_abs = float(gap.max())
    return max_abs, (max_abs / scale if scale else max_abs)


def _show(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items()) or "the example's sizes"
