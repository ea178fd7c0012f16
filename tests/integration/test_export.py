"""The converter: networks of every kind become bundles that compute the same, and what cannot is refused by name and line."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidecar import operators
from sidecar.bundle import blob_path, read_bundle, write_bundle
from sidecar.devices import open_device
from sidecar.errors import ExportError, NumericsMismatch, UnsupportedModel, UnsupportedOperator
from sidecar.export import Source, load_source
from sidecar.ir import Graph
from tests import zoo

HERE = Path(__file__).name


packed, from_zoo = zoo.packed, zoo.converted


def served(graph: Graph, folder: Path, inputs: list[Tensor]) -> list[Tensor]:
    """Answer as a node does: weights read from the bundle's files into the device's memory, inputs from bytes."""
    device = open_device("cpu")
    program = device.prepare(graph)
    weights = []
    for weight in graph.weights:
        content = blob_path(folder, weight.digest).read_bytes()
        weights.append(device.new_weight(weight, lambda target, content=content: target.__setitem__(slice(None), content)))
    tensors = []
    for spec, tensor in zip(graph.inputs, inputs, strict=True):
        buffer = bytearray(tensor.numpy().tobytes())
        tensors.append(device.view(memoryview(buffer), spec.dtype, tuple(tensor.shape)))
    return device.run(program, weights, tensors)


def original(source: Source, inputs: Mapping[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        if isinstance(source.inputs, Mapping) and not isinstance(source.module, nn.Sequential):
            answer = source.module(**inputs)
        else:
            answer = source.module(*inputs.values())
    return [leaf for leaf in torch.utils._pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]


# --- networks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(zoo.ALL))
def test_a_network_of_every_kind_answers_as_it_did(name: str, tmp_path: Path) -> None:
    source, model = from_zoo(name)
    assert model.report.equal_at_batch_1
    assert model.report.max_rel <= model.report.tolerance == 1e-4
    assert {dict(case.sizes)["batch"] for case in model.report.cases} == {1, 2, 3}
    write_bundle(tmp_path, model.bundle, model.blobs)
    graph = read_bundle(tmp_path).graph
    generator = torch.Generator().manual_seed(3)
    sizes = {symbol.name: min(symbol.maximum, 5) for symbol in graph.symbols}
    inputs = {}
    for spec in graph.inputs:
        shape = [axis if isinstance(axis, int) else sizes.get(axis, 9) for axis in spec.shape]
        if spec.dtype == "int64":
            low, high = spec.minimum or 0, spec.maximum or 1
            inputs[spec.name] = torch.randint(low, high + 1, shape, generator=generator)
        else:
            inputs[spec.name] = torch.randn(shape, generator=generator)
    if "attention_mask" in inputs:
        inputs["attention_mask"][:, 0] = 1
    expected = original(source, inputs)
    found = served(graph, tmp_path, list(inputs.values()))
    for spec, wanted, got in zip(graph.outputs, expected, found, strict=True):
        assert got.dtype == wanted.dtype, spec
        assert torch.equal(got, wanted), spec


@pytest.mark.parametrize("name", sorted(zoo.ALL))
def test_a_bundle_holds_listed_operators_and_no_place_of_the_publishers_machine(name: str) -> None:
    graph = from_zoo(name)[1].bundle.graph
    assert {node.op for node in graph.nodes} <= operators.ALLOWED
    assert not [node.origin for node in graph.nodes if "/" in node.origin]
    assert any("zoo.py:" in node.origin for node in graph.nodes) or name in ("bert", "mlp", "mobilenet", "efficientnet_lite")


def test_composite_operators_stay_whole() -> None:
    """Attention and convolution choose their kernel on the device that serves them."""
    ops = [node.op for name in ("vit", "bert", "resnet") for node in from_zoo(name)[1].bundle.graph.nodes]
    for op in ("scaled_dot_product_attention", "layer_norm", "linear", "gelu", "conv2d", "batch_norm", "max_pool2d"):
        assert f"aten.{op}.default" in ops
    assert not [op for op in ops if "flash" in op or "efficient_attention" in op or "native" in op]


def test_no_view_depends_on_the_strides_of_the_publishers_device() -> None:
    for name in zoo.ALL:
        assert "aten.view.default" not in {node.op for node in from_zoo(name)[1].bundle.graph.nodes}


def test_sizes_are_named() -> None:
    graph = from_zoo("bert")[1].bundle.graph
    assert [(symbol.name, symbol.minimum, symbol.maximum) for symbol in graph.symbols] == [
        ("batch", 1, 64),
        ("sequence", 2, 64),
    ]
    assert [spec.shape for spec in graph.inputs] == [("batch", "sequence")] * 2
    assert [(spec.minimum, spec.maximum) for spec in graph.inputs] == [(0, 99), (0, 1)]
    assert [(spec.name, spec.shape) for spec in graph.outputs] == [("last_hidden_state", ("batch", "sequence", 32))]


def test_outputs_are_named_by_their_structure() -> None:
    assert [spec.name for spec in from_zoo("pair")[1].bundle.graph.outputs] == ["score", "vectors_0", "vectors_1"]
    outputs = from_zoo("outputs")[1].bundle.graph.outputs
    assert [(spec.name, spec.dtype, spec.shape) for spec in outputs][2:6] == [
        ("output_2", "bool", ("batch", 4)),
        ("output_3", "float16", ("batch", 4)),
        ("output_4", "float32", ("?",)),
        ("output_5", "int64", ("batch",)),
    ]


def test_weights_are_stored_once_and_only_when_used() -> None:
    source, model = from_zoo("pair")
    stored = {tuple(weight.shape) for weight in model.bundle.graph.weights}
    assert (8, 4) in stored
    assert (100, 100) not in stored
    assert sum(weight.shape == (8, 4) for weight in model.bundle.graph.weights) == 1
    assert model.report.weight_bytes == sum(len(content) for _, content in model.blobs)
    assert sum(parameter.numel() * 4 for parameter in source.module.parameters()) > model.report.weight_bytes


def test_converting_again_gives_the_same_bundle() -> None:
    assert packed(zoo.vit(), "vit").bundle == from_zoo("vit")[1].bundle


class Corners(nn.Module):
    """Weights that lie oddly in memory, constants made in the forward, a write into a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.arange(4.0).reshape(1, 4).expand(3, 4))
        self.turned = nn.Parameter(torch.arange(12.0).reshape(4, 3).t())
        self.register_buffer("small", torch.tensor(0.5, dtype=torch.float16))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, 0] = 3.0
        y += torch.tensor([1.0, 2.0, 3.0, 4.0])
        z = torch.einsum("bi,oi->bo", self.drop(y), self.wide + self.turned)
        return z.transpose(0, 1).contiguous().view(3, x.shape[0]).t() * self.small + torch.arange(x.shape[0])[:, None]


def test_odd_weights_constants_and_writes_are_carried() -> None:
    model = packed(Source(Corners(), (torch.randn(2, 4),)))
    assert model.report.max_abs == 0
    assert {weight.dtype for weight in model.bundle.graph.weights} == {"float32", "float16"}
    assert "aten.clone.default" not in {node.op for node in model.bundle.graph.nodes}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(8, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lstm(x)[0])[0]


def test_recurrent_networks_are_carried() -> None:
    model = packed(Source(Recurrent(), (torch.randn(2, 5, 3),)))
    assert {"aten.lstm.input", "aten.gru.input"} <= {node.op for node in model.bundle.graph.nodes}
    assert model.report.max_rel < 1e-6


def test_a_transformer_layer_of_torch_is_carried_although_it_takes_a_faster_path_itself() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    length = {"src": {1: ("length", 2, 9)}}
    model = packed(Source(layer, (torch.randn(2, 5, 8),), dynamic_axes=length))
    assert 0 < model.report.max_rel < 1e-5
    with pytest.raises(NumericsMismatch, match=r"output 'output' at batch \d, length \d differs by .* tolerance is 0"):
        packed(Source(layer, (torch.randn(2, 5, 8),), dynamic_axes=length), tolerance=0.0)


def test_a_half_precision_model_gets_a_wider_tolerance() -> None:
    model = packed(Source(nn.Linear(4, 4).half(), (torch.randn(2, 4).half(),)))
    assert model.bundle.tolerance == 2e-2
    assert model.bundle.graph.inputs[0].dtype == "float16"


def test_progress_is_told_and_grows() -> None:
    told: list[tuple[str, float]] = []
    packed(zoo.mlp(), progress=lambda stage, fraction: told.append((stage, fraction)))
    fractions = [fraction for _, fraction in told]
    assert fractions == sorted(fractions)
    assert told[0][0] == "trying the model on its example inputs"
    assert fractions[-1] == 1.0


def test_an_integer_input_without_bounds_is_pointed_out() -> None:
    assert from_zoo("pair")[1].report.notes == ()
    (note,) = packed(zoo.pair(), input_bounds={}).report.notes
    assert "'kind' has no bounds" in note


# --- how it is called ---------------------------------------------------------------------------------------------


def test_names_of_a_mapping_name_the_inputs_whatever_the_module_calls_them() -> None:
    assert [spec.name for spec in from_zoo("mlp")[1].bundle.graph.inputs] == ["features"]


def test_given_output_names_are_used() -> None:
    model = packed(zoo.pair(), output_names=("similarity", "left_vector", "right_vector"))
    assert [spec.name for spec in model.bundle.graph.outputs] == ["similarity", "left_vector", "right_vector"]


def test_a_fixed_batch_is_kept() -> None:
    model = packed(replace(zoo.mlp(), inputs={"features": torch.randn(3, 6)}), batch=False)
    assert model.bundle.batch is None
    assert model.bundle.graph.symbols == ()
    assert model.bundle.graph.inputs[0].shape == (3, 6)
    assert len(model.report.cases) == 1


def test_the_largest_batch_is_the_publishers_choice() -> None:
    assert packed(zoo.mlp(), max_batch=5).bundle.graph.symbols[0].maximum == 5


class Variadic(nn.Module):
    def forward(self, *parts: Tensor, scale: float = 2.0) -> Tensor:
        return torch.cat(parts, dim=1) * scale


def test_variadic_inputs_are_numbered() -> None:
    model = packed(Source(Variadic(), (torch.randn(2, 1), torch.randn(2, 3))))
    assert [spec.name for spec in model.bundle.graph.inputs] == ["parts_0", "parts_1"]


class Shuffled(nn.Module):
    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return first - second


def test_inputs_by_name_reach_the_parameter_of_that_name() -> None:
    model = packed(Source(Shuffled(), {"second": torch.randn(2, 3), "first": torch.randn(2, 3)}))
    assert model.report.max_abs == 0
    assert {spec.name for spec in model.bundle.graph.inputs} == {"first", "second"}


MLP = zoo.mlp().module


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (Source(MLP, ()), {}, "at least one example input"),
        (Source(MLP, ([1.0],)), {}, "example input 'input' is list"),
        (Source(MLP, (torch.ones(2, 6).to_sparse(),)), {}, "sparse"),
        (Source(MLP, (torch.ones(2, 6),) * 2), {}, "2 example inputs are given, the model takes 1"),
        (Source(MLP, (torch.tensor(1.0),)), {}, "has no axes, so no batch; convert with batch=False"),
        (Source(MLP, (torch.ones(0, 6),)), {}, "axis 0 of example input 'input' is empty"),
        (Source(MLP, (torch.ones(2, 6),)), {"dynamic_axes": {"x": {0: ("n", 1, 2)}}}, "dynamic axes are given for 'x'"),
        (Source(MLP, (torch.ones(2, 6),)), {"dynamic_axes": {"input": {5: ("n", 1, 2)}}}, "no axis 5"),
        (Source(MLP, (torch.ones(2, 6),)), {"dynamic_axes": {"input": {1: ("n", 1, 1)}}}, "largest of 2 or more"),
        (Source(MLP, (torch.ones(2, 6),)), {"dynamic_axes": {"input": {1: ("N!", 1, 9)}}}, "does not match"),
        (Source(MLP, (torch.ones(2, 6),)), {"dynamic_axes": {"input": {0: ("rows", 1, 9)}}}, "convert with batch=False"),
        (Source(MLP, (torch.ones(2, 6),)), {"dynamic_axes": {"input": {1: ("batch", 1, 9)}}}, "two ranges"),
        (Source(MLP, (torch.ones(2, 6),)), {"input_bounds": {"input": (0, 1)}}, "do not fit input 'input'"),
        (Source(MLP, (torch.ones(9, 6),)), {"max_batch": 8}, "is 9, its symbol batch goes up to 8"),
        (Source(MLP, (torch.ones(2, 6),)), {"output_names": ("a", "b")}, "the model returns 1 tensors"),
        (Source(MLP, (torch.ones(2, 6),)), {"output_names": ("a b",)}, "has no form in a bundle"),
        (Source(MLP, (torch.ones(2, 5),)), {}, "fails on its example inputs: RuntimeError.*in self.0"),
        (Source(Shuffled(), (torch.ones(2, 1), torch.ones(3, 1))), {}, "disagree about batch: 3 and 2"),
        (zoo.pair(), {"output_names": ("a", "a", "b")}, "two outputs have one name"),
        (zoo.pair(), {"name": "Not A Name"}, "'Not A Name' is no name of a model"),
        (zoo.pair(), {"version": "no way"}, "'no way' is no version of a model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_make_no_sense_are_refused(source: Source, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        packed(source, **options)


# --- what cannot be taken -----------------------------------------------------------------------------------------


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(4)  # the line of the random number


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate(x).sum() > 0:  # the line of the branch
            return x + 1
        return x


class Counts(nn.Module):
    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1  # the line of the counter
        return x * self.seen


class Overwrites(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x += 1  # the line of the write
        return x


class Selects(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x[x > 0])  # the line of the mask


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + x.max().item()  # the line of the item


class Drops(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, training=True)  # the line of the dropout


class Attends(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        q = x[:, None]
        return F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)  # the line of the attention


class Empty(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.empty(x.shape[0], 4) * 0 + x  # the line of the memory


class Reshapes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)


class Squeezes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(0) if x.shape[0] == 1 else x


class Returns(nn.Module):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Any:
        return self.value(x)


class Complex(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fft(x).abs()  # the line of the transform


def line_of(comment: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.endswith(f"# the line of the {comment}"))


def wrapped(module: nn.Module) -> nn.Module:
    return nn.ModuleDict({"inner": module})["inner"]


@pytest.mark.parametrize(
    ("module", "kind", "operator", "comment", "message"),
    [
        (nn.Sequential(nn.ReLU(), Inner()), UnsupportedOperator, "aten.rand.default", "random number", "random"),
        (Branches(), UnsupportedModel, None, "branch", "control flow depends on the values of tensors"),
        (Counts(), UnsupportedModel, None, "counter", "changes its own state self.seen"),
        (Overwrites(), UnsupportedModel, None, "write", "changes its input 'x' in place"),
        (Selects(), UnsupportedOperator, "aten.index.Tensor", "mask", "depends on the values of tensors"),
        (Reads(), UnsupportedOperator, "aten.item.default", "item", "reads a value out of a tensor"),
        (Drops(), UnsupportedOperator, "dropout", "dropout", "random"),
        (Attends(), UnsupportedOperator, "scaled_dot_product_attention", "attention", "random or it changes state"),
        (Empty(), UnsupportedOperator, "aten.empty.memory_format", "memory", "uninitialised"),
        (Complex(), UnsupportedOperator, "fft", "transform", "bundles do not take aten.fft_fft.default"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_taken_is_named_with_its_line(
    module: nn.Module, kind: type[ExportError], operator: str | None, comment: str, message: str
) -> None:
    with pytest.raises(kind, match=message) as caught:
        packed(Source(module, (torch.randn(3, 4),)))
    assert f"{HERE}:{line_of(comment)}" in caught.value.message
    if operator is not None:
        assert operator in str(caught.value.details["operator"])
        assert caught.value.details["module"] == ("1" if isinstance(module, nn.Sequential) else "")


def test_every_operator_in_the_way_is_named_at_once() -> None:
    with pytest.raises(UnsupportedOperator, match=r"aten\.rand\.default at .*; aten\.empty\.memory_format at "):
        packed(Source(nn.Sequential(Inner(), Empty()), (torch.randn(3, 4),)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda x: x.numpy(), "returns a ndarray"),
        (lambda x: {"x": x, "size": x.shape[0]}, "returns a int"),
        (lambda x: None, "returns no tensor"),
        (lambda x: x.to(torch.bfloat16), "bfloat16, which cannot travel"),
        (lambda x: x.to(torch.complex64), "complex64"),
    ],
)
def test_an_answer_that_is_no_array_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        packed(Source(Returns(value), (torch.randn(3, 4),)))


def test_a_batch_the_model_fixes_is_refused_with_the_way_out() -> None:
    source = Source(Reshapes(), (torch.randn(4, 6),))
    with pytest.raises(UnsupportedModel, match=r"batch \(axis 0 of x\) cannot vary.*convert with batch=False"):
        packed(source)
    assert packed(source, batch=False).bundle.graph.outputs[0].shape == (2, 12)


def test_a_model_that_treats_one_row_otherwise_is_found_out() -> None:
    with pytest.raises((NumericsMismatch, UnsupportedModel), match="batch"):
        packed(Source(Squeezes(), (torch.randn(4, 6),)))


def test_a_weight_on_another_device_is_refused() -> None:
    with pytest.raises(ExportError):
        packed(Source(nn.Linear(4, 4, device="meta"), (torch.randn(2, 4),)))


# --- sources ------------------------------------------------------------------------------------------------------

SOURCE_FILE = """
import torch

def pair():
    return torch.nn.Linear(3, 2), (torch.ones(1, 3),)

def mapping():
    return {"module": torch.nn.Linear(3, 2), "inputs": {"row": torch.ones(1, 3)}, "output_names": ("y",)}

def full():
    from sidecar.export import Source
    return Source(torch.nn.Linear(3, 2), (torch.ones(1, 3),), notes=("hello",))

def wrong():
    return 3

def strange():
    return {"module": torch.nn.Linear(3, 2), "weights": ()}

number = 3
"""


@pytest.fixture
def source_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models_of_mine.py").write_text(SOURCE_FILE)
    (tmp_path / "broken_of_mine.py").write_text("import no_such_package_anywhere")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


@pytest.mark.parametrize("place", ["models_of_mine", "models_of_mine.py", "{}/models_of_mine.py"])
@pytest.mark.parametrize("name", ["pair", "mapping", "full"])
def test_a_function_is_a_source(source_folder: Path, place: str, name: str) -> None:
    source = load_source(f"{place.format(source_folder)}:{name}")
    assert isinstance(source.module, nn.Linear)
    assert source.notes == (("hello",) if name == "full" else ())
    assert packed(source).bundle.graph.outputs[0].name == ("y" if name == "mapping" else "output")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models_of_mine", "is no source"),
        (":pair", "is no source"),
        ("models_of_mine:", "is no source"),
        ("no_such_module_anywhere:pair", "cannot be imported"),
        ("missing.py:pair", "there is no such file"),
        ("broken_of_mine:pair", "no_such_package_anywhere"),
        ("models_of_mine:missing", "there is no function 'missing'"),
        ("models_of_mine:number", "there is no function 'number'"),
        ("models_of_mine:wrong", "returned int"),
        ("models_of_mine:strange", "other fields than Source"),
        ("missing.pt2", "there is no such file"),
        (".", "config.json is missing"),
    ],
)
def test_a_source_that_is_none_is_refused(source_folder: Path, text: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load_source(text)


@pytest.mark.parametrize("named", [False, True])
def test_an_exported_program_is_a_source_and_its_publisher_is_warned(tmp_path: Path, named: bool) -> None:
    module, row = zoo.mlp().module, torch.randn(2, 6)
    rows = torch.export.Dim("rows", min=1, max=32)
    program = torch.export.export(module, () if named else (row,), {"input": row} if named else {}, dynamic_shapes=({0: rows},))
    torch.export.save(program, str(tmp_path / "mlp.pt2"))
    source = load_source(str(tmp_path / "mlp.pt2"))
    assert "runs code from the file" in source.notes[0]
    model = packed(source)
    assert model.report.equal_at_batch_1
    assert (model.bundle.batch, model.bundle.graph.symbols[0].maximum) == ("batch", 32)
    assert [weight.digest for weight in model.bundle.graph.weights] == [
        weight.digest for weight in from_zoo("mlp")[1].bundle.graph.weights
    ]


def test_an_exported_program_of_fixed_shape_stays_fixed(tmp_path: Path) -> None:
    program = torch.export.export(zoo.mlp().module, (torch.randn(2, 6),))
    torch.export.save(program, str(tmp_path / "mlp.pt2"))
    assert packed(load_source(str(tmp_path / "mlp.pt2"))).bundle.batch is None


def test_a_file_that_is_no_exported_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.pt2").write_bytes(b"junk" * 100)
    with pytest.raises(ExportError, match=r"junk\.pt2: torch cannot load it"):
        load_source(str(tmp_path / "junk.pt2"))


def test_a_transformers_folder_is_a_source(tmp_path: Path) -> None:
    bert = zoo.bert().module.model
    bert.save_pretrained(tmp_path)
    source = load_source(str(tmp_path))
    assert source.notes == ()
    graph = packed(source).bundle.graph
    assert [spec.name for spec in graph.outputs] == ["last_hidden_state"]
    mine = {weight.digest for weight in from_zoo("bert")[1].bundle.graph.weights}
    assert {weight.digest for weight in graph.weights} == mine


def test_weights_a_transformers_folder_lacks_are_pointed_out(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bert = zoo.bert().module.model
    bert.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["embeddings.LayerNorm.bias"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (note,) = load_source(str(tmp_path)).notes
    assert note == "1 weights are not in the folder and were drawn at random, such as embeddings.LayerNorm.bias"


def test_a_transformers_folder_with_pickled_weights_is_refused(tmp_path: Path) -> None:
    bert = zoo.bert().module.model
    bert.config.save_pretrained(tmp_path)
    torch.save(bert.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ExportError, match="transformers cannot load it"):
        load_source(str(tmp_path))


def test_a_transformers_folder_without_the_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExportError, match=r"pip install 'trunkline\[transformers\]'"):
        load_source(str(tmp_path))
