"""The converter: from a PyTorch model to a bundle whose answers were compared with the model's own.

Runs where the publisher runs, never in the engine. torch captures the model and makes it functional, keeping composite
operators whole, because attention and convolution are to choose their kernel on the device that serves them. The graph
is translated, read back by the strict reader, run as the engine would run it, and compared with the original.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from sidecar.bundle import MODEL_NAME, VERSION, Bundle, canonical_graph, graph_digest, manifest_bytes, parse_bundle
from sidecar.calls import example_call, output_names_of
from sidecar.capture import FAILURES, capture, describe
from sidecar.errors import BundleError, ExportError, UnsupportedModel
from sidecar.ir import INTEGER_DTYPES, Graph
from sidecar.numerics import Report, compare, default_tolerance
from sidecar.sources import DynamicAxes, Source, load_source
from sidecar.translate import translate, weight_bytes

__all__ = ["PackedModel", "Report", "Source", "convert", "load_source"]

# Told the name of a stage and the fraction of the whole work that is done.
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class PackedModel:
    """A converted model: what ``write_bundle`` takes, and what the comparison with the original found."""

    bundle: Bundle
    report: Report
    tensors: Mapping[str, torch.Tensor]

    @property
    def blobs(self) -> Iterator[tuple[str, memoryview]]:
        """Yield (digest, bytes) of every weight, each digest once and without a copy."""
        for digest, tensor in self.tensors.items():
            yield digest, weight_bytes(tensor)


def convert(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    name: str,
    version: str = "1",
    batch: bool = True,
    dynamic_axes: DynamicAxes | None = None,
    max_batch: int = 64,
    output_names: Iterable[str] | None = None,
    input_bounds: Mapping[str, tuple[int, int]] | None = None,
    tolerance: float | None = None,
    progress: Progress | None = None,
) -> PackedModel:
    """Convert a model, which is put into eval mode, and compare the result with it.

    ``example_inputs`` are tensors on the CPU, positional or by name. With ``batch`` axis 0 of every input becomes the
    symbol ``batch`` (1..``max_batch``); ``dynamic_axes`` maps input to axis to (symbol, smallest, largest).
    ``input_bounds`` gives the smallest and largest value of integer inputs; they are checked on every call.
    ``tolerance`` is the largest accepted difference relative to the largest magnitude of an output; None: 1e-4, or 2e-2
    for models with 16-bit floats. ``progress`` is told a stage's name and the fraction done.

    Raises UnsupportedOperator and UnsupportedModel, naming operator, module and source line where torch knows them,
    NumericsMismatch when the converted graph computes something else, ExportError for arguments that make no sense.
    """
    tell = progress or (lambda stage, fraction: None)
    for text, pattern, what in ((name, MODEL_NAME, "name"), (version, VERSION, "version")):
        if not pattern.fullmatch(text):
            raise ExportError(f"{text[:80]!r} is no {what} of a model; it must match {pattern.pattern}")
    tell("trying the model on its example inputs", 0.0)
    with contextlib.suppress(NotImplementedError):  # an exported program has the mode it was exported in
        module.eval()
    call = example_call(
        module,
        example_inputs,
        batch=batch,
        dynamic_axes=dynamic_axes or {},
        max_batch=max_batch,
        bounds=input_bounds or {},
    )
    try:
        names = output_names_of(call.original(tensor.clone() for tensor in call.examples), output_names)
    except FAILURES as error:
        raise UnsupportedModel(f"the model itself fails on its example inputs: {describe(error, call)}") from error
    tell("capturing the graph", 0.1)
    program = capture(call)
    tell("translating the graph", 0.4)
    translated = translate(program, call, names)
    accepted = default_tolerance(translated.tensors) if tolerance is None else tolerance
    bundle = Bundle(
        name=name,
        version=version,
        graph=translated.graph,
        graph_digest=graph_digest(translated.graph),
        batch=call.batch,
        tolerance=accepted,
        created={"torch": torch.__version__},
    )
    _check_readable(bundle)
    tell("comparing with the original", 0.6)
    report = compare(
        call,
        bundle.graph,
        translated.tensors,
        accepted,
        lambda done: tell("comparing with the original", 0.6 + 0.4 * done),
    )
    difference = f"{report.max_abs:.3g} absolute, {report.max_rel:.3g} of the output's scale"
    created = bundle.created | {"difference": difference}
    report = replace(report, notes=tuple(_unbounded(bundle.graph)))
    return PackedModel(replace(bundle, created=created), report, translated.tensors)


def _unbounded(graph: Graph) -> Iterator[str]:
    for spec in graph.inputs:
        if spec.dtype in INTEGER_DTYPES and spec.minimum is None and spec.maximum is None:
            yield (
                f"integer input {spec.name!r} has no bounds; if it is used as an index, a value out of range fails late, "
                "and on CUDA it ends the engine"
            )


def _check_readable(bundle: Bundle) -> None:
    """Read the bundle back as a node will, so that what a node would refuse is refused here."""
    try:
        again = parse_bundle(manifest_bytes(bundle), canonical_graph(bundle.graph))
    except BundleError as error:
        raise ExportError(f"the model has no form in a bundle: {error.message}") from error
    assert again.graph == bundle.graph, "a graph reads back as it was written"
