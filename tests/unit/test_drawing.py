"""The fused DAG as text, DOT and SVG."""

from __future__ import annotations

from typing import Any
from xml.etree import ElementTree

from rich.console import Console

from sidecar.drawing import as_dot, as_svg, as_text, branches


def block(number: int, parent: int | None, *models: str) -> dict[str, Any]:
    name = None if parent is None else f"{parent:064x}"
    return {"id": f"{number:064x}", "parent": name, "nodes": 10, "bytes": 100, "models": list(models)}


TREE = {
    "models": ["age", "<gender>", "other"],
    "logical_bytes": 900,
    "unique_bytes": 600,
    "saved_bytes": 300,
    "blocks": [
        block(1, None, "age", "<gender>"),
        block(2, 1, "age", "<gender>"),
        block(3, 2, "age"),
        block(4, 2, "<gender>"),
        block(5, 4, "<gender>"),
        block(6, None, "other"),
    ],
}


def size(count: int) -> str:
    return f"{count} B"


def test_chains_of_the_same_models_are_one_branch() -> None:
    trunk, other = branches(TREE)
    assert (len(trunk.ids), trunk.nodes, trunk.bytes, trunk.models) == (2, 20, 200, ["age", "<gender>"])
    assert [(child.models, len(child.ids)) for child in trunk.children] == [(["age"], 1), (["<gender>"], 2)]
    assert other.models == ["other"]
    assert not other.children


def test_the_text_tells_what_is_shared_and_saved() -> None:
    console = Console(width=100)
    with console.capture() as captured:
        console.print(as_text(TREE, size))
    lines = captured.get().splitlines()
    assert lines[0] == "3 models, 6 blocks, 600 B instead of 900 B"
    assert lines[1] == "├── 2 blocks from 00000000, 20 operators, 200 B: age, <gender>"
    assert lines[2] == "│   ├── block 00000000, 10 operators, 100 B: age"
    assert lines[-1].startswith("└── block")


def test_the_dot_has_every_branch_and_edge() -> None:
    dot = as_dot(TREE, size)
    assert dot.startswith("digraph trunkline {")
    assert dot.count("->") == 2
    assert dot.count("[label=") == 4
    assert dot.count("style=bold") == 1


def test_the_svg_is_well_formed_and_shows_every_branch() -> None:
    picture = ElementTree.fromstring(as_svg(TREE, size))
    tag = "{http://www.w3.org/2000/svg}"
    assert len(picture.findall(f"{tag}rect")) == 4
    assert len(picture.findall(f"{tag}path")) == 2
    texts = [text.text for text in picture.iter(f"{tag}text")]
    assert "age, <gender>" in texts
    xs = [float(box.get("x", "-1")) for box in picture.findall(f"{tag}rect")]
    assert all(x >= 0 and x + 200 <= float(picture.get("width", "0")) for x in xs)


def test_nothing_deployed_is_drawn_as_nothing() -> None:
    empty: dict[str, Any] = {"models": [], "logical_bytes": 0, "unique_bytes": 0, "saved_bytes": 0, "blocks": []}
    assert branches(empty) == []
    assert ElementTree.fromstring(as_svg(empty, size)).get("width")
    assert "->" not in as_dot(empty, size)
