"""How a model is called: the names of its inputs, which of their axes vary, and inputs of any admitted size.

Part of the converter; holds the publisher's module, so it never reaches the engine. Must not import anything above
layer 2.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim
from torch.utils import _pytree as pytree

from sidecar.errors import ExportError, UnsupportedModel
from sidecar.graphfile import SYMBOL
from sidecar.ir import Symbol
from sidecar.sources import BATCH, DynamicAxes

Bounds = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Call:
    """A module with its example inputs. ``axes`` maps input to axis to symbol, for the axes that vary."""

    module: torch.nn.Module
    names: tuple[str, ...]
    examples: tuple[torch.Tensor, ...]
    by_name: bool
    batch: str | None
    symbols: Mapping[str, Symbol]
    axes: Mapping[str, Mapping[int, str]]
    bounds: Bounds

    def arguments(self, tensors: Iterable[torch.Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional and named arguments for tensors in the order of ``names``."""
        if self.by_name:
            return (), dict(zip(self.names, tensors, strict=True))
        return tuple(tensors), {}

    def original(self, tensors: Iterable[torch.Tensor]) -> Any:
        """Return what the model itself answers. Whatever its code raises passes through."""
        args, kwargs = self.arguments(tensors)
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def dynamic_shapes(self) -> dict[str, Any]:
        """Return the table of varying axes in the form that ``torch.export.export`` takes."""
        dims = {symbol.name: Dim(symbol.name, min=symbol.minimum, max=symbol.maximum) for symbol in self.symbols.values()}
        tables = [{axis: dims[symbol] for axis, symbol in self.axes.get(name, {}).items()} or None for name in self.names]
        args, kwargs = self.arguments(tables)  # type: ignore[arg-type]  # binds whatever stands in for the tensors
        return dict(inspect.signature(self.module.forward).bind(*args, **kwargs).arguments)

    def sizes(self) -> dict[str, int]:
        """Return the size each symbol has in the example inputs, in the order of ``symbols``."""
        found: dict[str, int] = {}
        for name, example in zip(self.names, self.examples, strict=True):
            for axis, symbol in self.axes.get(name, {}).items():
                found.setdefault(symbol, example.shape[axis])
        return {symbol: found[symbol] for symbol in self.symbols}

    def inputs(self, sizes: Mapping[str, int], generator: torch.Generator) -> list[torch.Tensor]:
        """Return random inputs: normal floats, integers within their bounds or the range of the example."""
        made = []
        for name, example in zip(self.names, self.examples, strict=True):
            table = self.axes.get(name, {})
            shape = [sizes[table[axis]] if axis in table else size for axis, size in enumerate(example.shape)]
            if example.dtype.is_floating_point:
                made.append(torch.randn(shape, generator=generator).to(example.dtype))
            elif example.dtype == torch.bool:
                made.append(torch.randint(0, 2, shape, generator=generator).bool())
            else:
                seen = (int(example.min()), int(example.max())) if example.numel() else (0, 0)
                low, high = self.bounds.get(name, seen)
                made.append(torch.randint(low, high + 1, shape, generator=generator, dtype=example.dtype))
        return made


def example_call(
    module: torch.nn.Module,
    inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    batch: bool,
    dynamic_axes: DynamicAxes,
    max_batch: int,
    bounds: Bounds,
) -> Call:
    """Return the call of a module on example inputs, whose rows are repeated so that no varying axis is 1.

    torch takes a size of 0 or 1 in an example for a constant. A mapping whose names are not those of the module's
    parameters names the inputs in the module's order. Raises ExportError or UnsupportedModel, naming the input.
    """
    by_name = isinstance(inputs, Mapping) and _takes_by_name(module, inputs)
    names = _positional_names(module, len(inputs))
    if isinstance(inputs, Mapping):
        names = tuple(inputs)
    tensors = tuple(inputs.values()) if isinstance(inputs, Mapping) else tuple(inputs)
    if not tensors:
        raise ExportError("the model needs at least one example input")
    for name, tensor in zip(names, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise UnsupportedModel(
                f"example input {name!r} is {_described(tensor)}; the inputs of a bundle are dense tensors on the CPU",
                input=str(name),
            )
    for table, what in ((dynamic_axes, "dynamic axes"), (bounds, "bounds")):
        for name in table:
            if name not in names:
                raise ExportError(f"{what} are given for {name!r}, the inputs are {', '.join(names)}", input=name)
    symbols, axes = _tables(names, tensors, batch, dynamic_axes, max_batch)
    examples = tuple(_enlarged(name, tensor.detach(), axes.get(name, {})) for name, tensor in zip(names, tensors, strict=True))
    for name, (low, high) in bounds.items():
        example = examples[names.index(name)]
        if example.dtype.is_floating_point or example.dtype == torch.bool or low > high:
            raise ExportError(f"bounds {low}..{high} do not fit input {name!r} of dtype {example.dtype}", input=name)
    call = Call(module, names, examples, by_name, BATCH if batch else None, symbols, axes, dict(bounds))
    _check_equal_sizes(call)
    return call


def _takes_by_name(module: torch.nn.Module, inputs: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(module.forward).bind(**inputs)
    except TypeError:
        return False
    return True


def _positional_names(module: torch.nn.Module, count: int) -> tuple[str, ...]:
    names: list[str] = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names.extend(f"{parameter.name}_{number}" for number in range(count - len(names)))
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    if len(names) < count:
        raise ExportError(f"{count} example inputs are given, the model takes {len(names)}")
    return tuple(names[:count])


def _tables(
    names: tuple[str, ...],
    tensors: tuple[torch.Tensor, ...],
    batch: bool,
    dynamic_axes: DynamicAxes,
    max_batch: int,
) -> tuple[dict[str, Symbol], dict[str, dict[int, str]]]:
    wanted: dict[str, dict[int, tuple[str, int, int]]] = {name: {} for name in names}
    for name, table in dynamic_axes.items():
        wanted[name].update(table)
    firsts = (table[0] for table in wanted.values() if 0 in table)
    batch_entry = next((entry for entry in firsts if entry[0] == BATCH), (BATCH, 1, max_batch))
    for name, tensor in zip(names, tensors, strict=True):
        if batch:
            if tensor.dim() == 0:
                raise UnsupportedModel(f"input {name!r} has no axes, so no batch; convert with batch=False", input=name)
            wanted[name].setdefault(0, batch_entry)
            if wanted[name][0][0] != BATCH:
                raise UnsupportedModel(
                    f"axis 0 of input {name!r} is {wanted[name][0][0]!r}, not the batch; convert with batch=False",
                    input=name,
                )
        for axis in wanted[name]:
            if not 0 <= axis < tensor.dim():
                raise ExportError(f"input {name!r} has {tensor.dim()} axes, no axis {axis}", input=name)
    symbols = {BATCH: Symbol(*batch_entry)} if batch else {}  # the batch comes first
    for name, table in wanted.items():
        for axis, (symbol, low, high) in table.items():
            if not SYMBOL.fullmatch(symbol):
                raise ExportError(f"symbol {symbol[:40]!r} does not match {SYMBOL.pattern}")
            if not 1 <= low <= high or high < 2:
                raise ExportError(
                    f"axis {axis} of input {name!r} is to be {low}..{high}; an axis that varies needs a smallest size "
                    "of 1 or more and a largest of 2 or more",
                    input=name,
                )
            if symbols.setdefault(symbol, Symbol(symbol, low, high)) != Symbol(symbol, low, high):
                raise ExportError(f"symbol {symbol!r} is given two ranges", symbol=symbol)
    return symbols, {name: {axis: entry[0] for axis, entry in table.items()} for name, table in wanted.items()}


def _enlarged(name: str, tensor: torch.Tensor, table: Mapping[int, str]) -> torch.Tensor:
    for axis in table:
        if tensor.shape[axis] == 0:
            raise UnsupportedModel(f"axis {axis} of example input {name!r} is empty", input=name)
        if tensor.shape[axis] == 1:
            tensor = torch.cat((tensor, tensor), dim=axis)
    return tensor.contiguous()


def _check_equal_sizes(call: Call) -> None:
    sizes = call.sizes()
    for name, example in zip(call.names, call.examples, strict=True):
        for axis, symbol in call.axes.get(name, {}).items():
            size = example.shape[axis]
            if size != sizes[symbol]:
                raise UnsupportedModel(
                    f"the example inputs disagree about {symbol}: {size} and {sizes[symbol]}"
                    + ("; convert with batch=False when axis 0 is no batch" if symbol == BATCH else ""),
                    input=name,
                )
            if size > call.symbols[symbol].maximum:
                raise ExportError(
                    f"axis {axis} of example input {name!r} is {size}, its symbol {symbol} goes up to "
                    f"{call.symbols[symbol].maximum}",
                    input=name,
                )


def _described(value: object) -> str:
    return f"a {value.layout} tensor on {value.device}" if isinstance(value, torch.Tensor) else type(value).__name__


# --- outputs ----------------------------------------------------------------------------------------------------------


def output_names_of(answer: Any, given: Iterable[str] | None) -> list[str | None]:
    """Return a name per leaf of a model's answer, None for a leaf that is None.

    Without ``given``, one tensor is called ``output``, members of a mapping or dataclass go by their names, members of
    a tuple are numbered. Raises UnsupportedModel for an answer that holds something other than tensors.
    """
    leaves, _ = pytree.tree_flatten_with_path(answer)
    names: list[str | None] = []
    for path, leaf in leaves:
        if leaf is None:
            names.append(None)
        elif not isinstance(leaf, torch.Tensor):
            raise UnsupportedModel(f"the model returns a {type(leaf).__name__}; a bundle returns tensors only")
        else:
            names.append(_path_name(path))
    tensors = [name for name in names if name is not None]
    if not tensors:
        raise UnsupportedModel("the model returns no tensor")
    if given is not None:
        chosen = list(given)
        if len(chosen) != len(tensors):
            raise ExportError(f"{len(chosen)} output names are given, the model returns {len(tensors)} tensors")
        supply = iter(chosen)
        names = [None if name is None else next(supply) for name in names]
        tensors = chosen
    if len(set(tensors)) != len(tensors):
        raise ExportError(f"two outputs have one name: {', '.join(tensors)}; give output_names")
    return names


def tensors_in(answer: Any) -> list[torch.Tensor]:
    """Return the tensors of a model's answer in the order of ``output_names_of``."""
    return [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, torch.Tensor)]


def _path_name(path: tuple[Any, ...]) -> str:
    parts = [str(getattr(step, "key", getattr(step, "name", getattr(step, "idx", "")))) for step in path]
    name = re.sub(r"[^A-Za-z0-9_]", "_", "_".join(parts))
    if not name:
        return "output"
    return name if re.match(r"[A-Za-z_]", name) else f"output_{name}"
