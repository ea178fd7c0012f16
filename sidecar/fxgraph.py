"""Reading torch's captured graphs: what a node is called, where in the sources it comes from, what an output needs.

Part of the converter. Must not import anything above layer 2.
"""

from __future__ import annotations

import operator
import os
import re
from dataclasses import dataclass

import torch
from torch.fx import Node as FxNode

_SYMBOLIC: dict[object, str] = {
    operator.add: "sym.add",
    operator.sub: "sym.sub",
    operator.mul: "sym.mul",
    operator.floordiv: "sym.floordiv",
    operator.mod: "sym.mod",
    operator.neg: "sym.neg",
    torch.sym_max: "sym.max",
    torch.sym_min: "sym.min",
}

_FRAME = re.compile(r'File "(.+?)", line (\d+)')
_TORCH_FOLDER = os.path.dirname(torch.__file__) + os.sep


@dataclass(frozen=True)
class Place:
    """Where in the publisher's sources a node comes from; empty strings and 0 where torch did not say."""

    file: str
    line: int
    module: str

    def __str__(self) -> str:
        source = f"{self.file}:{self.line} " if self.file else ""
        return f"{source}self.{self.module}".rstrip(".")

    def short(self) -> str:
        """Return the place without folders, so that a bundle does not depend on where the sources lay."""
        short = Place(os.path.basename(self.file), self.line, self.module)
        text = "".join(character if character.isprintable() else "?" for character in str(short))
        return text[-200:]


def place_of(node: FxNode) -> Place:
    """Return the line of the model's own code a node was made by, and the module that was running."""
    frames = [(file, int(line)) for file, line in _FRAME.findall(node.meta.get("stack_trace") or "")]
    own = [frame for frame in frames if not frame[0].startswith((_TORCH_FOLDER, "torch/"))]
    file, line = (own or [("", 0)])[-1]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return Place(file, line, str(stack[-1][0]) if stack and stack[-1][0] != stack[-1][1] else "")


def operand(argument: object) -> FxNode:
    """Return the node an argument is; that it is one is torch's promise for the operand of an operator."""
    assert isinstance(argument, FxNode), "the operand of an operator is a node"
    return argument


def dtype_name(dtype: torch.dtype) -> str:
    """Return numpy's name of a dtype, or torch's own where numpy has none."""
    return str(dtype).removeprefix("torch.")


def operator_name(node: FxNode) -> str:
    """Return ``aten.<operator>.<overload>``, ``sym.<operator>``, ``getitem``, or for anything else its Python name."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return f"{target.namespace}.{target.__name__}"
    if target is operator.getitem:
        return "getitem"
    return _SYMBOLIC.get(target, getattr(target, "__name__", str(target)))


def live_nodes(nodes: list[FxNode], results: list[FxNode]) -> set[FxNode]:
    """Return the nodes that ``results`` need, themselves included. ``nodes`` stand in order of execution."""
    live = set(results)
    for node in reversed(nodes):
        if node in live:
            live.update(node.all_input_nodes)
    return live
