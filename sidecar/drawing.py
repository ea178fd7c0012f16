"""The fused DAG for people: as a tree of text, as DOT, and as an SVG. From the plain form of ``FusedGraph.tree``. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from rich.tree import Tree

_BOX_WIDTH, _BOX_HEIGHT, _GAP_X, _GAP_Y, _MARGIN = 200, 58, 24, 46, 16


@dataclass
class Branch:
    """Consecutive blocks that the same models run through, and the branches that follow them."""

    models: list[str]
    ids: list[str] = field(default_factory=list)
    nodes: int = 0
    bytes: int = 0
    children: list[Branch] = field(default_factory=list)


def branches(tree: dict[str, Any]) -> list[Branch]:
    """Return the first branches of the DAG; a chain of blocks of the same models is one."""
    following: dict[str | None, list[dict[str, Any]]] = {}
    for block in tree["blocks"]:
        following.setdefault(block["parent"], []).append(block)

    def grow(block: dict[str, Any]) -> Branch:
        branch = Branch(block["models"])
        while True:
            branch.ids.append(block["id"])
            branch.nodes += block["nodes"]
            branch.bytes += block["bytes"]
            after = following.get(block["id"], [])
            if len(after) != 1 or after[0]["models"] != branch.models:
                branch.children = [grow(each) for each in after]
                return branch
            block = after[0]

    return [grow(block) for block in following.get(None, [])]


def _label(branch: Branch, size: Callable[[int], str]) -> list[str]:
    count = len(branch.ids)
    blocks = f"block {branch.ids[0][:8]}" if count == 1 else f"{count} blocks from {branch.ids[0][:8]}"
    return [blocks, f"{branch.nodes} operators, {size(branch.bytes)}"]


def as_text(tree: dict[str, Any], size: Callable[[int], str]) -> Tree:
    """Return the DAG as a tree to print. ``size`` writes bytes."""
    counts = f"{len(tree['models'])} models, {len(tree['blocks'])} blocks"
    found = Tree(f"{counts}, {size(tree['unique_bytes'])} instead of {size(tree['logical_bytes'])}", highlight=False)

    def hang(branch: Branch, under: Tree) -> None:
        shared = "bold" if len(branch.models) > 1 else "default"
        made = under.add(f"{', '.join(_label(branch, size))}: [{shared}]{', '.join(branch.models)}[/]")
        for child in branch.children:
            hang(child, made)

    for branch in branches(tree):
        hang(branch, found)
    return found


def as_dot(tree: dict[str, Any], size: Callable[[int], str]) -> str:
    """Return the DAG in the language of Graphviz."""
    lines = ["digraph trunkline {", "  node [shape=box, fontname=sans-serif];"]

    def write(branch: Branch, parent: str | None) -> None:
        name = f'"{branch.ids[0][:16]}"'
        label = "\\n".join([*_label(branch, size), ", ".join(branch.models)])
        lines.append(f'  {name} [label="{label}"{", style=bold" if len(branch.models) > 1 else ""}];')
        if parent is not None:
            lines.append(f"  {parent} -> {name};")
        for child in branch.children:
            write(child, name)

    for branch in branches(tree):
        write(branch, None)
    return "\n".join([*lines, "}", ""])


def as_svg(tree: dict[str, Any], size: Callable[[int], str]) -> str:
    """Return the DAG as a picture: one row for each fork, what is shared in a stronger frame."""
    shapes: list[str] = []
    columns = 0
    rows = 0

    def draw(branch: Branch, depth: int) -> float:
        """Draw a branch and all below it; return the x of its middle."""
        nonlocal columns, rows
        rows = max(rows, depth + 1)
        below = [draw(child, depth + 1) for child in branch.children]
        if below:
            middle = sum(below) / len(below)
        else:
            middle = _MARGIN + columns * (_BOX_WIDTH + _GAP_X) + _BOX_WIDTH / 2
            columns += 1
        top = _MARGIN + depth * (_BOX_HEIGHT + _GAP_Y)
        for x in below:
            shapes.append(
                f'<path d="M{middle:g} {top + _BOX_HEIGHT} L{x:g} {top + _BOX_HEIGHT + _GAP_Y}" stroke="#666" fill="none"/>'
            )
        is_shared = len(branch.models) > 1
        shapes.append(
            f'<rect x="{middle - _BOX_WIDTH / 2:g}" y="{top}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="5" '
            f'fill="{"#dbeafe" if is_shared else "#f5f5f5"}" stroke="#333" stroke-width="{2 if is_shared else 1}"/>'
        )
        models = ", ".join(branch.models)
        shown = models if len(models) <= 30 else f"{models[:27]}..."
        for line, text in enumerate([*_label(branch, size), shown]):
            shapes.append(f'<text x="{middle:g}" y="{top + 17 + 16 * line}" text-anchor="middle">{escape(text)}</text>')
        shapes.append(f"<title>{escape(models)}</title>")
        return middle

    for branch in branches(tree):
        draw(branch, 0)
    width = 2 * _MARGIN + max(columns, 1) * (_BOX_WIDTH + _GAP_X) - _GAP_X
    height = 2 * _MARGIN + max(rows, 1) * (_BOX_HEIGHT + _GAP_Y) - _GAP_Y
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" font-size="12">'
    return "\n".join([head, *shapes, "</svg>", ""])
