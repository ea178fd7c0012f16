"""`trunkline pack`: from the words of a command line to a bundle folder. Runs in the publisher's environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sidecar.bundle import model_bytes, write_bundle
from sidecar.errors import ExportError
from sidecar.export import convert, load_source

_DYNAMIC: Final = re.compile(r"(?P<input>[^:=]+):(?P<axis>\d)=(?P<symbol>[a-z][a-z0-9_]*):(?P<low>\d+)\.\.(?P<high>\d+)")
_BOUNDS: Final = re.compile(r"(?P<input>[^=]+)=(?P<low>-?\d+)\.\.(?P<high>-?\d+)")


@dataclass(frozen=True)
class Summary:
    """What a bundle is that was written, and what the comparison with the original found."""

    name: str
    version: str
    output: str
    operator_count: int
    weight_count: int
    weight_bytes: int
    max_rel: float
    tolerance: float
    max_abs: float
    notes: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return it for people."""
        return [
            *self.notes,
            f"{self.name} version {self.version}: {self.operator_count} operators, {self.weight_count} weights, "
            f"{self.weight_bytes / 1e6:.1f} MB, written to {self.output}",
            f"largest difference from the original: {self.max_rel:.3g} of the output's scale "
            f"(accepted: {self.tolerance:.3g}), {self.max_abs:.3g} absolute",
        ]


def pack(
    source: str,
    output: Path,
    *,
    name: str,
    version: str = "1",
    batch: bool | None = None,
    max_batch: int | None = None,
    dynamic: Iterable[str] = (),
    bounds: Iterable[str] = (),
    progress: Callable[[str, float], None] | None = None,
) -> Summary:
    """Convert ``source`` and write the bundle to ``output``. Raises ExportError.

    What the source says of itself holds unless the arguments say otherwise. ``dynamic`` are texts such as
    ``ids:1=sequence:1..512``, ``bounds`` such as ``ids=0..30521``.
    """
    found = load_source(source)
    axes = {key: dict(value) for key, value in (found.dynamic_axes or {}).items()}
    for text in dynamic:
        match = _DYNAMIC.fullmatch(text)
        if not match:
            raise ExportError(f"--dynamic {text!r} is not INPUT:AXIS=SYMBOL:MIN..MAX, such as ids:1=sequence:1..512")
        axes.setdefault(match["input"], {})[int(match["axis"])] = (
            match["symbol"],
            int(match["low"]),
            int(match["high"]),
        )
    limits = dict(found.input_bounds or {})
    for text in bounds:
        match = _BOUNDS.fullmatch(text)
        if not match:
            raise ExportError(f"--bounds {text!r} is not INPUT=LOW..HIGH, such as ids=0..30521")
        limits[match["input"]] = (int(match["low"]), int(match["high"]))
    packed = convert(
        found.module,
        found.inputs,
        name=name,
        version=version,
        batch=found.batch if batch is None else batch,
        max_batch=64 if max_batch is None else max_batch,
        dynamic_axes=axes,
        output_names=found.output_names,
        input_bounds=limits,
        progress=progress,
    )
    write_bundle(output, packed.bundle, packed.blobs)
    graph = packed.bundle.graph
    return Summary(
        name=name,
        version=version,
        output=str(output),
        operator_count=len(graph.nodes),
        weight_count=len(packed.tensors),
        weight_bytes=model_bytes(graph),
        max_rel=packed.report.max_rel,
        tolerance=packed.bundle.tolerance,
        max_abs=packed.report.max_abs,
        notes=tuple(found.notes),
    )
