"""The strict reader: what was written reads back, and nothing a stranger writes does anything but fail with BundleError."""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline.protocol import TensorSpec

from sidecar import graphfile, strictjson
from sidecar.bundle import (
    Bundle,
    blob_path,
    canonical_graph,
    graph_digest,
    manifest_bytes,
    model_bytes,
    parse_bundle,
    parse_graph,
    parse_manifest,
    read_bundle,
    write_bundle,
)
from sidecar.errors import BundleError
from sidecar.ir import Dtype, Enum, Graph, Node, Symbol, Value, Weight

Plain = dict[str, Any]
CONTENT = bytes(range(48))


def weight(shape: tuple[int, ...] = (3, 4), dtype: str = "float32", content: bytes = CONTENT) -> Weight:
    return Weight(hashlib.sha256(content).hexdigest(), dtype, shape, len(content), zlib.crc32(content))


def graph() -> Graph:
    """Return a graph with every kind of argument."""
    return Graph(
        symbols=(Symbol("batch", 1, 8), Symbol("sequence", 2, 16)),
        inputs=(
            TensorSpec("image", "float32", ("batch", 4)),
            TensorSpec("ids", "int64", ("batch", "sequence"), 0, 99),
        ),
        outputs=(TensorSpec("y", "float32", ("batch", "?")), TensorSpec("best", "int64", ("batch",))),
        weights=(weight(), weight((12,)), weight((), "int64", bytes(8)), weight((0, 3), "bfloat16", b"")),
        nodes=(
            Node("aten.sym_size.int", (Value("input", 0), 0)),
            Node("sym.mul", (Value("node", 0), 2)),
            Node("aten.linear.default", (Value("input", 0), Value("weight", 0), None), (), "model.py:3 self.fc"),
            Node("aten.gelu.default", (Value("node", 2),), (("approximate", Enum("tanh")),)),
            Node("aten._to_copy.default", (Value("node", 3),), (("dtype", Dtype("float16")),)),
            Node("aten.clamp.default", (Value("node", 3), -math.inf, 1.5)),
            Node("aten.max.dim", (Value("node", 5), -1, True)),
            Node("aten.cat.default", ((Value("node", 3), Value("node", 6, 0)), 1)),
            Node("aten.index.Tensor", (Value("node", 7), (None, Value("input", 1)))),
            Node("aten.reshape.default", (Value("node", 8), (Value("node", 0), -1))),
        ),
        results=(Value("node", 9), Value("node", 6, 1)),
    )


def bundle(name: str = "two.towers", **changes: Any) -> Bundle:
    made = graph()
    return replace(Bundle(name, "1.0", made, graph_digest(made), "batch", 1e-4, {"torch": "2.13.0"}), **changes)


def blobs() -> list[tuple[str, bytes]]:
    return [(hashlib.sha256(content).hexdigest(), content) for content in (CONTENT, CONTENT, bytes(8), b"")]


def plain() -> Plain:
    return json.loads(canonical_graph(graph()))  # type: ignore[no-any-return]


# --- what is written reads back -----------------------------------------------------------------------------------


def test_a_graph_reads_back_as_it_was_written() -> None:
    assert parse_graph(canonical_graph(graph())) == graph()
    assert canonical_graph(parse_graph(canonical_graph(graph()))) == canonical_graph(graph())


def test_a_not_a_number_survives() -> None:
    fill = Node("aten.full_like.default", (Value("input", 0), math.nan))
    again = parse_graph(canonical_graph(replace(graph(), nodes=(*graph().nodes, fill))))
    assert math.isnan(again.nodes[-1].args[1])  # type: ignore[arg-type]


def test_a_bundle_reads_back_from_its_folder(tmp_path: Path) -> None:
    write_bundle(tmp_path / "new", bundle(), blobs())
    assert read_bundle(tmp_path / "new") == bundle()
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["blobs", "graph.json", "manifest.json"]


def test_equal_bytes_are_counted_and_stored_once(tmp_path: Path) -> None:
    write_bundle(tmp_path, bundle(), blobs())
    assert model_bytes(graph()) == 48 + 8
    assert len(list((tmp_path / "blobs").iterdir())) == 3


def test_writing_again_removes_the_weights_of_before(tmp_path: Path) -> None:
    write_bundle(tmp_path, bundle(), blobs())
    small = replace(graph(), weights=(weight(),), nodes=graph().nodes)
    write_bundle(tmp_path, bundle(graph=small, graph_digest=graph_digest(small)), blobs())
    assert [path.name for path in (tmp_path / "blobs").iterdir()] == [weight().digest]
    assert read_bundle(tmp_path).graph == small


# --- a folder that is not what it says ----------------------------------------------------------------------------


def truncate_blob(folder: Path) -> None:
    path = blob_path(folder, weight().digest)
    path.write_bytes(path.read_bytes()[:-1])


def swap_graph(folder: Path) -> None:
    text = (folder / "graph.json").read_bytes()
    (folder / "graph.json").write_bytes(text.replace(b"image", b"photo"))


def reformat_graph(folder: Path) -> None:
    (folder / "graph.json").write_text(json.dumps(plain(), indent=1, sort_keys=True))
    digest = hashlib.sha256((folder / "graph.json").read_bytes()).hexdigest()
    manifest = json.loads((folder / "manifest.json").read_bytes()) | {"graph": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate_blob, "47 bytes long, its weight needs 48"),
        (swap_graph, "names digest"),
        (reformat_graph, "canonical"),
        (lambda folder: blob_path(folder, weight().digest).unlink(), "cannot be read"),
        (lambda folder: (folder / "graph.json").unlink(), "graph.json: cannot be read"),
        (lambda folder: (folder / "manifest.json").write_bytes(b""), "manifest.json: is not JSON"),
        (lambda folder: (folder / "manifest.json").write_bytes(b" " * (2 << 20)), "the limit is"),
    ],
)
@pytest.mark.row("T11", "F18")
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_bundle(tmp_path, bundle(), blobs())
    damage(tmp_path)
    with pytest.raises(BundleError, match=message):
        read_bundle(tmp_path)


def test_bytes_of_another_digest_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="disagree"):
        write_bundle(tmp_path, bundle(), [(weight().digest, b"other"), *blobs()])
    with pytest.raises(BundleError, match=r"manifest\.json: cannot be read"):
        read_bundle(tmp_path)


def test_a_bundle_without_all_its_weights_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="2 of 3 weights are missing"):
        write_bundle(tmp_path, bundle(), blobs()[:1])


# --- manifests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "resnet-18", "text.embed_v2", "0", "a" * 128])
def test_a_good_model_name_is_taken(name: str) -> None:
    assert parse_manifest(manifest_bytes(bundle(name))).name == name


@pytest.mark.parametrize("name", ["", "-a", "a-", "A", "a..b", "a/b", "../a", "a" * 129, "a\n", "é", ".", 3, None])
def test_a_bad_model_name_is_refused(name: object) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json: name"):
        parse_manifest(json.dumps(json.loads(manifest_bytes(bundle())) | {"name": name}).encode())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "trunkline-bundle-9"),
        ("version", "1 0"),
        ("graph", "0" * 63),
        ("batch", "Batch!"),
        ("tolerance", -0.1),
        ("tolerance", True),
        ("tolerance", "small"),
        ("created", {"k": 3}),
        ("created", {"K": "v"}),
        ("created", {"k": "line\nline"}),
        ("created", {f"k{number}": "" for number in range(40)}),
        ("created", []),
        ("more", 1),
    ],
)
def test_a_bad_manifest_is_refused(field: str, value: object) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        parse_manifest(json.dumps(json.loads(manifest_bytes(bundle())) | {field: value}).encode())


def test_a_batch_that_is_not_axis_0_of_every_input_is_refused() -> None:
    with pytest.raises(BundleError, match="axis 0 of input"):
        parse_bundle(manifest_bytes(bundle(batch="sequence")), canonical_graph(graph()))


# --- graphs -------------------------------------------------------------------------------------------------------


def change(path: str, value: object) -> Callable[[Plain], None]:
    """Return a change of the JSON value at ``path``, which is written with dots."""
    *way, last = [int(step) if step.isdigit() else step for step in path.split(".")]

    def apply(root: Plain) -> None:
        place: Any = root
        for step in way:
            place = place[step]
        if isinstance(place, list) and last == len(place):
            place.append(value)
        else:
            place[last] = value

    return apply


REFUSED = [
    ("format", "trunkline-graph-0", "format"),
    ("extra", 1, "unknown field 'extra'"),
    ("symbols.0.name", "Batch", "does not match"),
    ("symbols.0.name", "sequence", "declared twice"),
    ("symbols.0.minimum", 0, "outside 1"),
    ("symbols.0.maximum", 0, "outside 1"),
    ("symbols.0.maximum", 1 << 40, "outside 1"),
    ("symbols.0.minimum", 9, "outside 9"),
    ("symbols.0.minimum", True, "must be an integer"),
    ("symbols.0.minimum", 1.0, "must be an integer"),
    ("symbols.2", {"name": "height", "minimum": 1, "maximum": 2}, "no input has an axis"),
    ("inputs", [], "must not be empty"),
    ("inputs.0.name", "bad name", "does not match"),
    ("inputs.0.name", "ids", "twice"),
    ("inputs.0.dtype", "bfloat16", "allowed names"),
    ("inputs.0.dtype", ["float32"], "allowed names"),
    ("inputs.0.shape", "batch", "must be a list"),
    ("inputs.0.shape.1", "?", "no declared symbol"),
    ("inputs.0.shape.1", "2*batch", "no declared symbol"),
    ("inputs.0.shape.1", -1, "outside 0"),
    ("inputs.0.shape", ["batch", 1 << 30, 1 << 30], "more than"),
    ("inputs.0.shape", ["batch"] * 9, "the limit is 8"),
    ("inputs.0.minimum", 0, "integer inputs only"),
    ("inputs.1.minimum", 100, "above maximum"),
    ("inputs.1.minimum", 1 << 70, "outside"),
    ("outputs.0.shape.0", "rows", "no declared symbol"),
    ("outputs.1.minimum", 0, "integer inputs only"),
    ("weights.0.digest", "G" * 64, "does not match"),
    ("weights.0.digest", "../../etc/passwd", "does not match"),
    ("weights.0.dtype", "complex64", "allowed names"),
    ("weights.0.size_bytes", 47, "dtype and shape need 48"),
    ("weights.0.shape", [1 << 47, 1 << 47], "more than"),
    ("weights.0.shape", [1] * 13, "the limit is 12"),
    ("weights.0.crc32", 1, "differs from another weight"),
    ("weights.0.crc32", 1 << 32, "outside"),
    ("weights.0.offset", 0, "unknown field"),
    ("nodes.2.op", "aten.empty.memory_format", "allowed names"),
    ("nodes.2.op", "aten.linear", "allowed names"),
    ("nodes.2.op", "os.system", "allowed names"),
    ("nodes.2.op", None, "allowed names"),
    ("nodes.2.args", {}, "must be a list"),
    ("nodes.2.args", [0] * 33, "the limit is 32"),
    ("nodes.2.args.0", {"node": 2}, "outside 0..1"),
    ("nodes.2.args.0", {"node": 3}, "outside 0..1"),
    ("nodes.0.args.0", {"node": 0}, "outside 0..-1"),
    ("nodes.2.args.0", {"node": -1}, "outside"),
    ("nodes.2.args.0", {"input": 2}, "outside 0..1"),
    ("nodes.2.args.0", {"weight": 4}, "outside 0..3"),
    ("nodes.2.args.0", {"weight": 0, "input": 0}, "unknown field"),
    ("nodes.2.args.0", {"input": 0, "item": 0}, "unknown field"),
    ("nodes.2.args.0", {"node": 0, "item": -1}, "outside 0"),
    ("nodes.2.args.0", {"node": 0, "item": None}, "must be an integer"),
    ("nodes.2.args.0", {"node": "0"}, "must be an integer"),
    ("nodes.2.args.0", {}, "must refer to"),
    ("nodes.2.args.0", {"device": "cuda"}, "must refer to"),
    ("nodes.2.args.0", "cuda", "is no argument"),
    ("nodes.2.args.0", {"enum": "/etc/passwd"}, "allowed names"),
    ("nodes.2.args.0", {"dtype": "complex64"}, "allowed names"),
    ("nodes.2.args.0", {"dtype": "float32", "enum": "tanh"}, "unknown field"),
    ("nodes.2.args.0", {"float": "1.0"}, "allowed names"),
    ("nodes.2.args.0", 1 << 63, "outside"),
    ("nodes.2.args.0", [[[1]]], "nested deeper"),
    ("nodes.2.args.0", [1 << 31], "outside"),
    ("nodes.2.args.0", [-(1 << 40)], "outside"),
    ("nodes.2.args.0", [0] * 5000, "the limit is 4096"),
    ("nodes.2.kwargs", [], "must be an object"),
    ("nodes.2.kwargs", {"__class__": 1, "Bad": 1}, "does not match"),
    ("nodes.2.kwargs", {f"k{number}": 0 for number in range(40)}, "the limit is 32"),
    ("nodes.2.origin", "x" * 201, "printable"),
    ("nodes.2.origin", "\x1b[31m", "printable"),
    ("nodes.2.origin", 5, "must be a string"),
    ("nodes.1.args", [{"node": 0}], "takes 2 sizes"),
    ("nodes.1.args.1", 2.0, "takes 2 sizes"),
    ("nodes.1.args.1", True, "takes 2 sizes"),
    ("results", [], "0 entries for 2 outputs"),
    ("results.0", None, "must be an object"),
    ("results.0", {"node": 10}, "outside 0..9"),
    ("results.0", {"dtype": "float32"}, "must refer to"),
]


@pytest.mark.parametrize(("path", "value", "message"), REFUSED, ids=[f"{row[0]}-{row[2]}" for row in REFUSED])
@pytest.mark.row("T11", "T9")
def test_a_bad_graph_is_refused_by_place(path: str, value: object, message: str) -> None:
    root = plain()
    change(path, value)(root)
    with pytest.raises(BundleError, match=message.replace("*", r"\*").replace("?", r"\?")) as caught:
        parse_graph(json.dumps(root).encode())
    assert caught.value.message.startswith(("graph.json: ", "node "))


@pytest.mark.parametrize("field", ["symbols", "inputs", "outputs", "weights", "nodes", "results", "format"])
def test_a_missing_field_is_refused(field: str) -> None:
    root = plain()
    del root[field]
    with pytest.raises(BundleError, match=f"'{field}' is missing"):
        parse_graph(json.dumps(root).encode())


def test_the_number_of_nodes_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphfile, "MAX_NODE_COUNT", 9)
    with pytest.raises(BundleError, match=r"nodes: has 10 elements, the limit is 9"):
        parse_graph(canonical_graph(graph()))


# --- texts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b'"\xc3"', "is not JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[" * 200 + b"]" * 200, "must be an object"),
        (b"9" * 5000, "is not JSON"),
        (b'{"format": NaN}', "constant NaN"),
        (b'{"format": -Infinity}', "constant -Infinity"),
        (b'{"format": 1e999}', "too large"),
        (b'{"format": 1, "format": 1}', "given twice"),
        (b"null", "must be an object"),
        (b"[" + b"{}," * 3_500_000 + b"{}]", "elements"),
        (b" " * ((64 << 20) + 1), "the limit is"),
    ],
    ids=lambda value: str(value[:20]) if isinstance(value, bytes) else value,
)
@pytest.mark.row("T9")
def test_a_hostile_text_is_refused(text: bytes, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        parse_graph(text)


def test_messages_do_not_repeat_what_a_stranger_wrote_at_length() -> None:
    for value in ("x" * 10_000, [0] * 10_000, {"a": "b" * 10_000}, 10**4000):
        assert len(strictjson.shown(value)) < 80


# --- properties ---------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 12),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["batch", "?", "float32", "aten.relu.default", "aten.add.Tensor", "sym.add", "node", "input"]),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["node", "input", "weight", "item", "dtype", "enum", "float", "x"]), inner),
    ),
    max_leaves=8,
)


def places(value: object, way: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    found = [way] if way else []
    members = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in members:
        found.extend(places(member, (*way, key)))
    return found


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_change_of_a_graph_is_refused_or_gives_a_graph(data: st.DataObject) -> None:
    root = plain()
    for _ in range(data.draw(st.integers(1, 3))):
        *way, last = data.draw(st.sampled_from(places(root)))
        place: Any = root
        for step in way:
            place = place[step]
        action = data.draw(st.sampled_from(["replace", "remove", "repeat"]))
        if action == "replace" or (action == "repeat" and isinstance(place, dict)):
            place[last] = data.draw(VALUES)
        elif action == "remove":
            del place[last]
        else:
            place.insert(last, place[last])
    try:
        made = parse_graph(json.dumps(root).encode())
    except BundleError as error:
        assert error.message
    else:
        assert parse_graph(canonical_graph(made)) == made or "nan" in repr(made)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_the_bytes_is_refused_or_gives_a_graph(data: st.DataObject) -> None:
    text = bytearray(canonical_graph(graph()))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(text) - 1))
        text[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        made = parse_graph(bytes(text))
    except BundleError as error:
        assert error.message
    else:
        assert isinstance(made, Graph)
