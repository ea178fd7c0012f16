"""`trunkline pack`: from the words of a command line to a bundle folder. Runs in the publisher's environment."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from sidecar.bundle import model_bytes, write_bundle
from sidecar.errors import ExportError
from sidecar.export import convert, load_source

_DYNAMIC: Final = re.compile(r"(?P<input>[^:=]+):(?P<axis>\d)=(?P<symbol>[a-z][a-z0-9_]*):(?P<low>\d+)\.\.(?P<high>\d+)")
_BOUNDS: Final = re.compile(r"(?P<input>[^=]+)=(?P<low>-?\d+)\.\.(?P<high>-?\d+)")


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
) -> list[str]:
    """Convert ``source`` and write the bundle to ``output``; return lines for people. Raises ExportError.

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
    return [
        *found.notes,
        f"{name} version {version}: {len(graph.nodes)} operators, {len(packed.tensors)} weights, "
        f"{model_bytes(graph) / 1e6:.1f} MB, written to {output}",
        f"largest difference from the original: {packed.report.max_rel:.3g} of the output's scale "
        f"(accepted: {packed.bundle.tolerance:.3g}), {packed.report.max_abs:.3g} absolute",
    ]
