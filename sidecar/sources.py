"""Sources: how a publisher names the model to convert.

This runs the publisher's own code in the publisher's own environment, which is the point of a converter. Nothing here
may ever be imported by the engine, which reads bundles only.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sidecar.errors import ExportError, UnsupportedModel

BATCH = "batch"
# Where an exported program sets no upper bound to an axis, this is one.
UNBOUNDED_SIZE = 512

# input -> axis -> (symbol, smallest, largest)
DynamicAxes = Mapping[str, Mapping[int, tuple[str, int, int]]]


@dataclass(frozen=True)
class Source:
    """A model and what the converter must know about it.

    ``inputs`` are example tensors, positional (tuple) or by name (mapping). ``input_bounds`` gives the smallest and
    largest value of integer inputs. ``output_names`` names the outputs in the order the model returns them; None: names
    from the structure it returns. ``notes`` are printed to the publisher.
    """

    module: torch.nn.Module
    inputs: tuple[Any, ...] | Mapping[str, Any]
    dynamic_axes: DynamicAxes | None = None
    input_bounds: Mapping[str, tuple[int, int]] | None = None
    output_names: tuple[str, ...] | None = None
    batch: bool = True
    notes: tuple[str, ...] = field(default=())


def load_source(source: str) -> Source:
    """Return the model that ``source`` names.

    ``module:callable`` or ``path/to/file.py:callable`` calls a function without arguments, which returns
    (module, example inputs), a mapping of ``Source`` fields, or a ``Source``; the current folder can be imported from.
    A folder with ``config.json`` is a transformers model. A ``.pt2`` file is loaded by ``torch.export.load``, which
    runs whatever code the file's author put into it. Raises ExportError.
    """
    if os.path.isdir(source):
        return _transformers(Path(source))
    if source.endswith(".pt2"):
        return _pt2(Path(source))
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name:
        raise ExportError(
            f"{source!r} is no source: give module:callable, file.py:callable, a .pt2 file or a transformers folder"
        )
    return _from_callable(_import(place), name, source)


def _import(place: str) -> Any:
    folder = os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None or not path.is_file():
            raise ExportError(f"{place}: there is no such file")
        if str(path.parent) not in sys.path:
            sys.path.insert(0, str(path.parent))
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses and pickles of the module's own look it up by name
        spec.loader.exec_module(module)
        return module
    except ImportError as error:
        raise ExportError(f"{place} cannot be imported: {error}", source=place) from error


def _from_callable(module: Any, name: str, source: str) -> Source:
    function = getattr(module, name, None)
    if not callable(function):
        raise ExportError(f"{source}: there is no function {name!r}", source=source)
    made = function()
    if isinstance(made, tuple) and len(made) == 2:
        made = {"module": made[0], "inputs": made[1]}
    if isinstance(made, Mapping):
        try:
            made = Source(**made)
        except TypeError as error:
            raise ExportError(f"{source} returned a mapping with other fields than Source has: {error}") from error
    if not isinstance(made, Source) or not isinstance(made.module, torch.nn.Module):
        raise ExportError(f"{source} returned {type(made).__name__}, not (module, example inputs)", source=source)
    return made


def _pt2(path: Path) -> Source:
    if not path.is_file():
        raise ExportError(f"{path}: there is no such file", source=str(path))
    try:
        program = torch.export.load(str(path))
    except (RuntimeError, ValueError, TypeError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise ExportError(f"{path}: torch cannot load it: {str(error)[:200]}", source=str(path)) from error
    if program.example_inputs is None:
        raise UnsupportedModel(f"{path}: holds no example inputs; save it with them", source=str(path))
    args, kwargs = program.example_inputs
    if args and kwargs:
        raise UnsupportedModel(f"{path}: takes positional and named inputs; use one kind", source=str(path))
    module = program.module()
    names = tuple(kwargs) if kwargs else tuple(inspect.signature(module.forward).parameters)[: len(args)]
    axes, batch = _exported_axes(program, names)
    return Source(
        module=module,
        inputs=kwargs or args,
        dynamic_axes=axes,
        batch=batch,
        notes=(f"{path.name} was loaded by torch.export.load, which runs code from the file; a bundle has none",),
    )


def _exported_axes(program: torch.export.ExportedProgram, names: tuple[str, ...]) -> tuple[DynamicAxes, bool]:
    """Return the axes an exported program lets vary, in its own ranges, and whether axis 0 is one batch for all."""
    fakes = {node.name: node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"}
    shapes = [tuple(fakes[name].shape) for name in program.graph_signature.user_inputs if isinstance(name, str)]
    first = {str(shape[0]) for shape in shapes if shape}
    batch = len(first) == 1 and all(shape and isinstance(shape[0], torch.SymInt) for shape in shapes)
    found: dict[str, dict[int, tuple[str, int, int]]] = {}
    symbols: dict[str, str] = {str(shapes[0][0]): BATCH} if batch else {}
    for name, shape in zip(names, shapes, strict=True):
        for axis, size in enumerate(shape):
            bounds = program.range_constraints.get(size.node.expr) if isinstance(size, torch.SymInt) else None
            if bounds is None:
                continue
            symbol = symbols.setdefault(str(size), f"{name}_{axis}".lower())
            # torch calls 2 the smallest size of an axis that was not said to include 1, without looking at 1.
            low = 1 if bounds.lower <= 2 else int(bounds.lower)
            high = int(bounds.upper) if bounds.upper.is_Integer else UNBOUNDED_SIZE
            found.setdefault(name, {})[axis] = (symbol, low, max(min(high, UNBOUNDED_SIZE), low))
    return found, batch


# --- transformers -----------------------------------------------------------------------------------------------------

# Which output of a transformers model is served: the first of these that it has.
_PREFERRED_OUTPUTS = ("logits", "last_hidden_state")


class _OneOutput(torch.nn.Module):
    """Calls a transformers model by name and returns one tensor of its answer."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True)
        for name in _PREFERRED_OUTPUTS:
            if name in answer:
                return {name: answer[name]}
        raise UnsupportedModel(f"{type(self.model).__name__} returns neither {' nor '.join(_PREFERRED_OUTPUTS)}")


def _transformers(folder: Path) -> Source:
    if not (folder / "config.json").is_file():
        raise ExportError(f"{folder}: is no transformers folder, config.json is missing", source=str(folder))
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ExportError(
            "converting a transformers folder needs the package transformers: pip install 'trunkline[transformers]'"
        ) from error
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        # A model of transformers itself, named by the folder; without one, the plain encoder of the folder's kind.
        kind: Any = getattr(transformers, (getattr(config, "architectures", None) or [""])[0], None)
        if not isinstance(kind, type) or not issubclass(kind, transformers.PreTrainedModel):
            kind = transformers.AutoModel
        model, loaded = kind.from_pretrained(
            str(folder),
            config=config,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        raise ExportError(f"{folder}: transformers cannot load it: {str(error)[:300]}", source=str(folder)) from error
    source = transformers_source(model)
    # The pooler of a plain encoder has no part in its last hidden state.
    missing = sorted(key for key in loaded["missing_keys"] if not key.startswith("pooler."))
    if not missing:
        return source
    note = f"{len(missing)} weights are not in the folder and were drawn at random, such as {missing[0]}"
    return replace(source, notes=(*source.notes, note))


def transformers_source(model: Any) -> Source:
    """Return the source of a transformers text model: token ids and attention mask in, one tensor out."""
    config = model.config
    vocabulary = getattr(config, "vocab_size", None)
    if not vocabulary or getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModel(
            f"{type(model).__name__} does not take token ids and one attention mask; write a module:callable source"
        )
    longest = int(getattr(config, "max_position_embeddings", 0) or 512)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # a cache of keys and values is state
    for name, layer in model.named_modules():
        if name.endswith("position_embeddings") and getattr(layer, "padding_idx", None) is not None:
            longest -= layer.padding_idx + 1  # the RoBERTa family counts positions from behind the padding index
    length = min(8, longest)
    ids = torch.arange(2 * length, dtype=torch.int64).reshape(2, length) % vocabulary
    sequence = {1: ("sequence", min(2, longest), longest)}
    return Source(
        module=_OneOutput(model),
        inputs={"input_ids": ids, "attention_mask": torch.ones(2, length, dtype=torch.int64)},
        dynamic_axes={"input_ids": sequence, "attention_mask": sequence},
        input_bounds={"input_ids": (0, int(vocabulary) - 1), "attention_mask": (0, 1)},
    )
