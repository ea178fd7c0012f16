"""The converter: from a PyTorch model to a bundle whose answers were compared with the model's own.

Runs where the publisher runs, never in the engine. torch captures the model and makes it functional, keeping composite
operators whole, because attention and convolution are to choose their kernel on the device that serves them. The graph
is translated, read back by the strict reader, run as the engine would run it, and compared with the original.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from sidecar.bundle import Bundle, canonical_graph, graph_digest, manifest_bytes, parse_bundle
from sidecar.calls import Call, example_call, output_names_of
from sidecar.errors import BundleError, ExportError, UnsupportedModel
from sidecar.ir import Symbol
from sidecar.numerics import Report, compare
from sidecar.sources import DynamicAxes, Source, load_source
from sidecar.translate import Translated, translate, weight_bytes

__all__ = ["PackedModel", "Report", "Source", "convert", "load_source"]

Progress = Callable[[str, float], None]

# What capturing a model can raise: torch's own errors derive from RuntimeError, the rest comes from the model's code.
_CAPTURE_FAILURES = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, NotImplementedError)


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
    module.eval()
    tell("trying the model on its example inputs", 0.0)
    call = example_call(module, example_inputs, batch=batch, dynamic_axes=dynamic_axes or {}, max_batch=max_batch)
    names = output_names_of(call, output_names)
    tell("capturing the graph", 0.1)
    program = _capture(module, call)
    tell("translating the graph", 0.4)
    translated = translate(program, call.names, names, call.symbols, call.axes, dict(input_bounds or {}))
    tell("comparing with the original", 0.6)
    bundle = _bundle(translated, name, version, call, tolerance)
    report = compare(call, bundle, translated.tensors, lambda done: tell("comparing with the original", 0.6 + 0.4 * done))
    created = bundle.created | {"difference": f"{report.max_rel:.3g} of the output's scale, {report.max_abs:.3g} absolute"}
    tell("done", 1.0)
    return PackedModel(_replaced(bundle, created), report, translated.tensors)
