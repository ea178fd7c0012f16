"""Trials: rows that touch each other are found out, whatever way they do it, and rows that do not are told to be independent."""

from __future__ import annotations

import itertools
import json
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from trunkline.errors import DeviceFault, DeviceOutOfMemory

from sidecar.bundle import Bundle
from sidecar.devices import TorchDevice, open_device
from sidecar.errors import BlobMissing
from sidecar.export import Source, convert
from sidecar.graph import FusedGraph
from sidecar.merkle import skeleton_id
from sidecar.stages import Staged
from sidecar.trials import Trials, Verdict
from sidecar.verdicts import Verdicts
from sidecar.wavefront import INPUT
from tests import zoo
from tests.forms import prefer
from tests.waiting import PATIENCE_S


class Blobs:
    """Weights in a dictionary, as the store reads them."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.reads = 0

    def read_blob(self, digest: str, target: memoryview, crc32: int | None = None) -> None:
        self.reads += 1
        if digest not in self.contents:
            raise BlobMissing("gone")
        target[:] = self.contents[digest]


def deployed(source: Source, blobs: Blobs) -> tuple[Bundle, Staged]:
    made = convert(source.module, source.inputs, name="m", dynamic_axes=source.dynamic_axes)
    blobs.contents |= {digest: bytes(content) for digest, content in made.blobs}
    graph = FusedGraph()
    graph.add(made.bundle)
    return made.bundle, graph.staged("m")


def judge(bundle: Bundle, staged: Staged, blobs: Blobs, folder: Path, device: TorchDevice | None = None) -> list[Verdict]:
    """Return what a trial tells, which is nothing when it could not be held."""
    posted: list[Callable[[], None]] = []
    trials = Trials(device or open_device("cpu"), blobs, Verdicts(folder, "test"), posted.append)  # type: ignore[arg-type]
    verdicts: list[Verdict] = []
    trials.ask(bundle, staged, verdicts.append)
    trials.stop()
    thread = threading.Thread(target=trials.run)  # whose priority it lowers
    thread.start()
    thread.join()
    for command in posted:
        command()
    return verdicts


@pytest.mark.parametrize("kind", ["resnet", "mlp", "unet", "vit", "bert", "pair"])
@pytest.mark.row("T13")
def test_rows_of_ordinary_networks_are_independent(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    blobs = Blobs()
    bundle, staged = deployed(next(zoo.ALL[name] for name in zoo.ALL if kind in name)(), blobs)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.reason == ""
    assert verdict.layouts is not None
    assert all(verdict.layouts[key] == INPUT for key in staged.results)
    # The next start finds the verdict on disk.
    reads = blobs.reads
    (again,) = judge(bundle, staged, blobs, tmp_path)
    assert again == verdict
    assert blobs.reads == reads


class Mixing(nn.Module):
    """A linear layer followed by something that may look at the other rows."""

    def __init__(self, mix: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.mix = mix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mix(self.layer(x))


def dynamic_int8(x: torch.Tensor) -> torch.Tensor:
    scale = x.abs().amax() / 127
    return torch.round(x / scale) * scale


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: torch.softmax(x, 0),
        lambda x: x / x.abs().amax().clamp_min(1.0),  # nothing to see beside zeros
        lambda x: (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt(),
        dynamic_int8,
        lambda x: torch.flip(x, (0,)),
        lambda x: torch.cumsum(x, 0),
        lambda x: x.sum(0),
        lambda x: x + torch.arange(x.shape[0]).unsqueeze(1),
        lambda x: x @ x.T,
    ],
    ids=["softmax", "maximum", "norm", "int8", "flip", "cumsum", "sum", "place", "square"],
)
@pytest.mark.row("T13")
def test_rows_that_touch_each_other_are_found_out(mix: Callable[[torch.Tensor], torch.Tensor], tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(Source(Mixing(mix).eval(), (torch.randn(2, 4),)), blobs)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.layouts is None
    assert "stage 0 of 1" in verdict.reason


def test_rows_may_lie_along_another_axis_and_in_several_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 64)

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            turned = self.one(x).transpose(0, 1)  # [places, batch, width]
            heads = self.two(turned).reshape(x.shape[1], x.shape[0] * 2, 3)
            return heads.reshape(x.shape[1], x.shape[0], 6).transpose(0, 1)

    blobs = Blobs()
    bundle, staged = deployed(Source(Turned().eval(), (torch.randn(2, 5, 6),)), blobs)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.layouts is not None
    found = [verdict.layouts[key] for stage in staged.stages for key in stage.gives]
    assert found[-1] == INPUT
    assert None not in found
    assert 1 in found


class Pooled(nn.Module):
    """The mean of those tokens that the mask has, or of all of them."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.masked = nn.Embedding(10, 4), masked

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        mask = attention_mask.unsqueeze(-1).to(torch.float32)
        found = self.table(ids) + 1.0
        total = (found * mask).sum(1) if self.masked else found.sum(1)
        return total / mask.sum(1).clamp_min(1.0)


@pytest.mark.parametrize("masked", [True, False])
def test_a_mask_is_believed_when_padding_changes_nothing(masked: bool, tmp_path: Path) -> None:
    ones = torch.ones(2, 6, dtype=torch.int64)
    made = convert(
        Pooled(masked).eval(),
        {"ids": ones, "attention_mask": ones},
        name="m",
        dynamic_axes={"ids": {1: ("tokens", 1, 64)}, "attention_mask": {1: ("tokens", 1, 64)}},
        input_bounds={"ids": (0, 9), "attention_mask": (0, 1)},
    )
    blobs, graph = Blobs(), FusedGraph()
    blobs.contents |= {digest: bytes(content) for digest, content in made.blobs}
    graph.add(made.bundle)
    for _ in range(2):  # tried, and found again
        (verdict,) = judge(made.bundle, graph.staged("m"), blobs, tmp_path)
        assert verdict.reason == ""
        assert verdict.padded == ("tokens" if masked else "")


def test_stages_of_one_structure_have_one_form_whatever_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    answers = itertools.cycle(("packed", "blocked", "plain"))
    monkeypatch.setattr("sidecar.forms._fastest", lambda seconds, joins: next(answers))
    torch.manual_seed(0)
    layers = [layer for _ in range(6) for layer in (nn.Linear(32, 32), nn.ReLU())]
    forms = []
    for head in (3, 5):
        blobs = Blobs()
        bundle, staged = deployed(Source(nn.Sequential(*layers, nn.Linear(32, head)).eval(), (torch.randn(2, 32),)), blobs)
        (verdict,) = judge(bundle, staged, blobs, tmp_path)
        forms.append([lowered and lowered.form for lowered in verdict.forms])
    assert len(forms[0]) >= 6
    assert len(set(forms[0][:6])) == 1
    assert forms[0][:6] == forms[1][:6]


def test_a_model_of_fixed_size_is_not_tried(tmp_path: Path) -> None:
    blobs = Blobs()
    source = zoo.ALL["mlp"]()
    made = convert(source.module, source.inputs, name="m", batch=False)
    blobs.contents |= {digest: bytes(content) for digest, content in made.blobs}
    graph = FusedGraph()
    graph.add(made.bundle)
    (verdict,) = judge(made.bundle, graph.staged("m"), blobs, tmp_path)
    assert (verdict.layouts, verdict.reason) == (None, "its batch size is fixed")
    few = convert(source.module, source.inputs, name="m", max_batch=3)
    graph.add(few.bundle)
    (verdict,) = judge(few.bundle, graph.staged("m"), blobs, tmp_path)
    assert (verdict.layouts, verdict.reason) == (None, "it takes at most 3 rows")


def test_a_trial_without_its_weights_is_held_another_time(tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    kept, blobs.contents = blobs.contents, {}
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert (verdict.layouts, verdict.held) == (None, False)
    assert "could not be tried" in verdict.reason
    assert list(tmp_path.glob("rows-*")) == []
    blobs.contents = kept
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.layouts is not None


def test_what_killed_the_engine_twice_is_not_tried_again(tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)

    class Died(BaseException):
        pass

    class Dying(TorchDevice):
        def run(self, *arguments: object) -> list[torch.Tensor]:
            raise Died

    for _ in range(2):
        verdicts = Verdicts(tmp_path, "test")
        trials = Trials(Dying(torch.device("cpu")), blobs, verdicts, lambda command: None)  # type: ignore[arg-type]
        verdicts.end = lambda *arguments: None  # type: ignore[method-assign]
        with pytest.raises(Died):
            trials._verdict(bundle, staged)
    assert [path.suffix for path in tmp_path.glob("rows-*")] == [".trying"]
    assert judge(bundle, staged, blobs, tmp_path) == [Verdict(None, "the engine ended when it was tried")]
    # Once may have been anything.
    (mark,) = tmp_path.glob("rows-*")
    mark.write_bytes(b".")
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.layouts is not None


def test_who_comes_while_it_is_tried_again_waits_for_that(tmp_path: Path) -> None:
    """Of two domains one has its trial under way, after the engine ended in the first one; that is no second death."""
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    verdicts = Verdicts(tmp_path, "test")
    seen: list[Verdict | None] = []

    class Asked(TorchDevice):
        def run(self, *arguments: Any) -> list[torch.Tensor]:
            seen.append(trials.known(bundle, staged))
            return super().run(*arguments)

    trials = Trials(Asked(torch.device("cpu")), blobs, verdicts, lambda command: None)
    verdicts.begin("rows", f"{bundle.graph_digest} {bundle.batch}")
    assert trials._verdict(bundle, staged).layouts is not None
    assert set(seen) == {None}
    assert trials.known(bundle, staged) is not None


def test_a_process_that_ends_during_a_trial_has_not_died_of_it(tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    entered, leave = threading.Event(), threading.Event()

    class Slow(TorchDevice):
        def run(self, *arguments: object) -> list[torch.Tensor]:
            entered.set()
            leave.wait(PATIENCE_S)
            return super().run(*arguments)  # type: ignore[arg-type]

    trials = Trials(Slow(torch.device("cpu")), blobs, Verdicts(tmp_path, "test"), lambda command: None)  # type: ignore[arg-type]
    trials.ask(bundle, staged, lambda verdict: None)
    thread = threading.Thread(target=trials.run)
    thread.start()
    assert entered.wait(PATIENCE_S)
    assert [path.suffix for path in tmp_path.glob("rows-*")] == [".trying"]
    trials.stop()
    assert list(tmp_path.glob("rows-*")) == []
    leave.set()
    thread.join()


def test_whatever_happens_in_a_trial_the_next_model_is_tried(tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)

    class Broken(TorchDevice):
        def prepare(self, graph: object) -> object:  # type: ignore[override]
            raise ZeroDivisionError("a bug")

    (verdict,) = judge(bundle, staged, blobs, tmp_path, Broken(torch.device("cpu")))
    assert (verdict.reason, verdict.held) == ("it could not be tried: a bug", False)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.layouts is not None


def test_inputs_too_large_to_be_tried_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    monkeypatch.setattr("sidecar.trials._LARGEST_INPUT_BYTES", 8)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict == Verdict(None, "its inputs take 24 bytes, at most 8 are tried")


def test_siblings_whose_weights_choose_what_is_computed_are_each_tried(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self, gate: float) -> None:
            super().__init__()
            self.layer, self.gate = nn.Linear(4, 4), nn.Parameter(torch.tensor(gate))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.layer(x)
            return torch.where(self.gate > 0, y - y.mean(0), y)

    found = []
    for gate in (-1.0, 1.0):
        blobs = Blobs()
        bundle, staged = deployed(Source(Gated(gate).eval(), (torch.randn(2, 4),)), blobs)
        found += judge(bundle, staged, blobs, tmp_path)
    assert [verdict.layouts is not None for verdict in found] == [True, False]


def test_a_model_that_cannot_be_run_on_four_rows_is_served_one_by_one(tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)

    class Refusing(TorchDevice):
        def run(self, program, weights, inputs):  # type: ignore[no-untyped-def]
            if inputs[0].shape[0] > 1:
                raise DeviceFault("too large")
            return super().run(program, weights, inputs)

    (verdict,) = judge(bundle, staged, blobs, tmp_path, Refusing(torch.device("cpu")))
    assert (verdict.layouts, verdict.reason) == (None, "it could not be run on 4 rows: too large")


def written(path: Path) -> dict[str, Any]:
    """Return a verdict as it is on disk."""
    found: dict[str, Any] = json.loads(path.read_bytes().partition(b"\n")[2])
    return found


def test_stages_are_timed_in_the_form_they_are_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1024)
    prefer(monkeypatch, "blocked", "packed")
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["resnet"](), blobs)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    verdicts = Verdicts(tmp_path, "test")
    rows = verdicts.find("rows", f"{bundle.graph_digest} {bundle.batch}")
    assert rows is not None
    assert any(verdict.forms)
    assert len(verdict.run_s) == len(rows["run_us"]) == len(staged.stages) > 1
    for stage, lowered, plain_us, run_s in zip(staged.stages, verdict.forms, rows["run_us"], verdict.run_s, strict=True):
        assert isinstance(plain_us, int)
        if lowered is None:
            assert run_s == pytest.approx(plain_us * 1e-6)
            continue
        form = verdicts.find("form", skeleton_id(stage.graph))
        assert form is not None
        assert form["form"] == lowered.form
        assert run_s == pytest.approx(plain_us * 1e-6 * form[f"{lowered.form}_us"] / form["base_us"])


def test_a_model_of_fixed_size_is_timed_as_it_is_asked(tmp_path: Path) -> None:
    blobs, graph = Blobs(), FusedGraph()
    source = zoo.ALL["mlp"]()
    made = convert(source.module, source.inputs, name="m", batch=False)
    blobs.contents |= {digest: bytes(content) for digest, content in made.blobs}
    graph.add(made.bundle)
    (verdict,) = judge(made.bundle, graph.staged("m"), blobs, tmp_path)
    assert len(verdict.run_s) == len(graph.staged("m").stages)
    assert judge(made.bundle, graph.staged("m"), blobs, tmp_path) == [verdict]


@pytest.mark.parametrize("figures", [None, 5, [], [-1], [True], [0.5], [1, 2]])
def test_a_verdict_without_figures_is_one_nevertheless(figures: object, tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    assert len(staged.stages) == 1
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    (path,) = tmp_path.glob("rows-*.json")
    old = written(path) | {"run_us": figures}
    if figures is None:
        del old["run_us"]
    Verdicts(tmp_path, "test").end("rows", f"{bundle.graph_digest} {bundle.batch}", old)
    reads = blobs.reads
    assert judge(bundle, staged, blobs, tmp_path) == [replace(verdict, run_s=())]
    assert blobs.reads == reads
    assert written(path) == old


@pytest.mark.parametrize("form", [{}, {"base_us": 0, "packed_us": 5}, {"base_us": 5, "packed_us": "5"}])
def test_a_form_without_figures_changes_nothing_about_those_of_its_stage(form: dict[str, Any], tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    judge(bundle, staged, blobs, tmp_path)
    (rows,) = map(written, tmp_path.glob("rows-*.json"))
    Verdicts(tmp_path, "test").end("form", skeleton_id(staged.stages[0].graph), {"form": "packed"} | form)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.forms[0] is not None
    assert verdict.run_s == (rows["run_us"][0] * 1e-6,)


def test_a_device_without_room_says_nothing_of_a_model(tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)

    class Full(TorchDevice):
        def run(self, program, weights, inputs):  # type: ignore[no-untyped-def]
            raise DeviceOutOfMemory("no room")

    (verdict,) = judge(bundle, staged, blobs, tmp_path, Full(torch.device("cpu")))
    assert (verdict.held, verdict.reason) == (False, "it could not be tried: no room")
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    assert verdict.held
    assert verdict.layouts is not None


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"layouts": [[[0]]]}',
        '{"layouts": [[-1]], "padded": false}',
        '{"layouts": [[true]], "padded": false}',
        '{"layouts": 5}',
        '{"layouts": null}',
        "[" * 100_000,
    ],
)
def test_verdicts_that_are_no_verdicts_are_found_again(content: str, tmp_path: Path) -> None:
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    (verdict,) = judge(bundle, staged, blobs, tmp_path)
    (path,) = tmp_path.glob("rows-*.json")
    whole = written(path)
    # What the disk has altered, and what another program has written.
    for altered in (content.encode(), b"%08x\n" % zlib.crc32(content.encode()) + content.encode()):
        path.write_bytes(altered)
        (again,) = judge(bundle, staged, blobs, tmp_path)
        # It was tried, and so timed, once more.
        assert replace(again, run_s=verdict.run_s) == verdict
        assert written(path) | {"run_us": whole["run_us"]} == whole


def test_a_folder_that_cannot_be_used_is_told_and_costs_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    blobs = Blobs()
    bundle, staged = deployed(zoo.ALL["mlp"](), blobs)
    (verdict,) = judge(bundle, staged, blobs, blocked / "verdicts")
    assert verdict.layouts is not None
    assert "cannot be kept in" in caplog.text
