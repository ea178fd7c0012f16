"""Packed weights as flat bytes: to the bit what they were, in memory that is shared and not copied."""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import hashlib
import json
import mmap
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from trunkline.arena import page_aligned

from sidecar import flat, packed
from sidecar.blockfiles import BlockFiles, Entry
from sidecar.devices import open_device
from sidecar.disk import BUFFERED, DIRECT, Source
from sidecar.export import convert
from sidecar.ir import Enum, Node, Weight
from sidecar.lowering import CONV2D, LINEAR, TURNED_LINEAR, Option, Recipe, lower
from sidecar.packed import Packed
from tests import zoo
from tests.waiting import PATIENCE_S


@pytest.fixture(autouse=True)
def possible() -> Iterator[None]:
    if not flat.can_flatten():
        pytest.skip("this torch keeps packed weights in memory only")
    torch.manual_seed(4)
    yield
    flat.can_flatten.cache_clear()
    flat.facts.cache_clear()
    flat._fingerprint.cache_clear()


def pack(kind: Any, parts: dict[str, torch.Tensor], **options: Option) -> Packed:
    weights = [
        Weight(hashlib.sha256(role.encode()).hexdigest(), "float32", tuple(part.shape), part.nbytes, 0)
        for role, part in parts.items()
    ]
    return packed.pack(Recipe(kind, tuple(parts), tuple(weights), tuple(sorted(options.items()))), list(parts.values()))


def conv2d(
    shape: tuple[int, ...] = (16, 16, 3, 3), *, bias: bool = True, norm: bool = False, groups: int = 1, **options: Option
) -> Packed:
    parts = {"weight": torch.randn(shape)}
    if bias:
        parts["bias"] = torch.randn(shape[0])
    if norm:
        parts |= {"norm mean": torch.randn(shape[0]), "norm variance": torch.rand(shape[0]) + 1}
        options["epsilon"] = 1e-5
    pairs: dict[str, Option] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
    return pack("conv2d", parts, **(pairs | options), groups=groups)


def linear(layout: str, rows: int = 96, columns: int = 200, *, bias: bool = True) -> Packed:
    parts = {"weight": torch.randn(rows, columns)}
    if bias:
        parts["bias"] = torch.randn(rows)
    return pack("linear", parts, layout=layout)


CASES: dict[str, tuple[Callable[[], Packed], str, tuple[int, ...]]] = {
    "conv": (conv2d, CONV2D, (16, 14, 14)),
    "conv without bias": (lambda: conv2d(bias=False), CONV2D, (16, 14, 14)),
    "conv with norm": (lambda: conv2d(bias=False, norm=True), CONV2D, (16, 14, 14)),
    "first conv": (lambda: conv2d((64, 3, 7, 7), stride=(2, 2), padding=(3, 3)), CONV2D, (3, 32, 32)),
    "stride": (lambda: conv2d((32, 16, 3, 3), stride=(2, 1)), CONV2D, (16, 15, 14)),
    "dilation": (lambda: conv2d(dilation=(2, 3), padding=(2, 3)), CONV2D, (16, 14, 14)),
    "pointwise": (lambda: conv2d((40, 24, 1, 1), padding=(0, 0)), CONV2D, (24, 7, 7)),
    "groups": (lambda: conv2d((32, 8, 3, 3), groups=4), CONV2D, (32, 14, 14)),
    "depthwise": (lambda: conv2d((48, 1, 3, 3), groups=48), CONV2D, (48, 14, 14)),
    "depthwise, odd": (lambda: conv2d((6, 1, 5, 5), groups=6, padding=(2, 2)), CONV2D, (6, 9, 9)),
    "widened": (lambda: conv2d((24, 1, 3, 3), groups=24, stride=(2, 2), zeros=(0, 1, 0, 1)), CONV2D, (24, 14, 14)),
    "odd channels": (lambda: conv2d((7, 5, 3, 3)), CONV2D, (5, 9, 9)),
    "blocked": (lambda: linear("blocked"), LINEAR, (200,)),
    "blocked without bias": (lambda: linear("blocked", bias=False), LINEAR, (200,)),
    "blocked, large": (lambda: linear("blocked", 1000, 768), LINEAR, (768,)),
    "transposed": (lambda: linear("transposed"), TURNED_LINEAR, (200,)),
    "transposed without bias": (lambda: linear("transposed", bias=False), TURNED_LINEAR, (200,)),
    "transposed, odd": (lambda: linear("transposed", 7, 13), TURNED_LINEAR, (13,)),
}


def payload_of(made: flat.Flat) -> memoryview:
    """Return a payload as it comes of a file: on pages of shared memory."""
    payload = memoryview(mmap.mmap(-1, made.size_bytes))[: made.size_bytes]
    payload[:] = b"\xff" * made.size_bytes
    made.copy_to(payload)
    return payload


def runner(op: str) -> Callable[[torch.Tensor, Packed], torch.Tensor]:
    return packed.operator(Node(op, (None, None, Enum("none"), (), None)))


@pytest.mark.parametrize("name", CASES)
def test_what_comes_back_computes_the_same_to_the_bit(name: str) -> None:
    make, op, shape = CASES[name]
    run = runner(op)
    held = make()
    made = flat.flatten(held)
    payload = payload_of(made)
    back = flat.unflatten(made.meta, payload)
    assert (back.shape, back.size_bytes, back.rest[2:]) == (held.shape, held.size_bytes, held.rest[2:])
    assert len(made.meta) < 1000
    assert made.size_bytes == held.size_bytes
    inputs = {batch: torch.randn(batch, *shape) for batch in (1, 2, 8)}
    for given in inputs.values():
        assert torch.equal(run(given, back), run(given, held))
    # Flattened once more, it is the same bytes: nothing was lost, not even padding.
    again = flat.flatten(back)
    assert again.meta == made.meta
    assert payload_of(again) == payload
    payload[:] = bytes(len(payload))
    assert all(not run(given, back).any() for given in inputs.values())


def test_a_batch_changes_no_byte() -> None:
    held = conv2d()
    made = flat.flatten(held)
    payload = payload_of(made)
    before = bytes(payload)
    back = flat.unflatten(made.meta, payload)
    for batch in (1, 3, 32):
        runner(CONV2D)(torch.randn(batch, 16, 30, 30), back)
    assert payload == before


@pytest.mark.parametrize("make", [conv2d, lambda: linear("blocked"), lambda: linear("transposed")])
def test_the_payload_stays_as_long_as_the_weight_and_no_longer(make: Callable[[], Packed]) -> None:
    made = flat.flatten(make())

    class Memory(bytearray):
        """A buffer that can be watched."""

    memory = Memory(made.size_bytes)
    watched = weakref.ref(memory)
    made.copy_to(memoryview(memory))
    back = flat.unflatten(made.meta, memoryview(memory))
    weight, bias = back.rest[:2]
    del memory, back
    gc.collect()
    assert watched() is not None
    del weight
    gc.collect()
    assert watched() is not None, "the bias lies there, too"
    del bias
    gc.collect()
    assert watched() is None


def test_a_weight_that_was_flattened_is_let_go() -> None:
    held = conv2d()
    weight = weakref.ref(held.rest[0])
    payload_of(flat.flatten(held))
    del held
    gc.collect()
    assert weight() is None


def changed(meta: bytes, **fields: object) -> bytes:
    names = ("scheme", "facts", "kind", "shape", "layout", "weight_bytes", "bias_count", "steps")
    found = dict(zip(names, msgpack.unpackb(meta), strict=True)) | fields
    return bytes(msgpack.packb(list(found.values())))


@pytest.mark.parametrize("wrong", [{"scheme": 0}, {"facts": b"others"}], ids=str)
def test_another_scheme_or_other_facts_are_refused(wrong: dict[str, object]) -> None:
    made = flat.flatten(conv2d())
    with pytest.raises(ValueError, match="by another torch or for another processor; make it anew"):
        flat.unflatten(changed(made.meta, **wrong), payload_of(made))


@pytest.mark.parametrize("meta", [b"", b"\x01", b"\x90", b"\xc1", msgpack.packb({1: 2}), msgpack.packb(None)], ids=repr)
def test_what_is_no_meta_is_refused(meta: bytes) -> None:
    with pytest.raises(ValueError):
        flat.unflatten(meta, memoryview(bytearray(64)))


def test_another_torch_refuses_what_this_one_laid_out(monkeypatch: pytest.MonkeyPatch) -> None:
    made = flat.flatten(conv2d())
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    flat.facts.cache_clear()
    flat._fingerprint.cache_clear()
    assert flat.facts()[0] == "2.99.0"
    with pytest.raises(ValueError, match="another torch"):
        flat.unflatten(made.meta, payload_of(made))


@pytest.mark.parametrize("difference", [-64, -1, 1])
@pytest.mark.parametrize("make", [conv2d, lambda: linear("blocked", bias=False), lambda: linear("transposed")])
def test_a_payload_of_another_size_is_refused(make: Callable[[], Packed], difference: int) -> None:
    made = flat.flatten(make())
    wrong = memoryview(bytearray(made.size_bytes + difference))
    with pytest.raises(ValueError, match=f"has {made.size_bytes} bytes, {len(wrong)} were read; make it anew"):
        flat.unflatten(made.meta, wrong)


def test_a_layout_of_another_size_is_refused() -> None:
    made, larger = flat.flatten(conv2d(bias=False)), flat.flatten(conv2d((32, 16, 3, 3), bias=False))
    layout = msgpack.unpackb(larger.meta)[4]
    with pytest.raises(ValueError, match=f"a layout of {larger.size_bytes} bytes is given as one of {made.size_bytes}"):
        flat.unflatten(changed(made.meta, shape=[32, 16, 3, 3], layout=layout), payload_of(made))


def test_the_facts_name_torch_onednn_and_the_processor() -> None:
    version, onednn, ability, layouts = flat.facts()
    assert version == torch.__version__
    assert "v3." in onednn
    assert ability == torch.backends.cpu.get_cpu_capability()
    assert len(layouts) == 64


def facts_elsewhere(**environment: str) -> list[str]:
    """Return the facts of another process."""
    code = "import json; from sidecar import flat; print(json.dumps([*flat.facts(), flat.can_flatten()]))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment | {"PYTHONPATH": ":".join(sys.path)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=PATIENCE_S,
    )
    *facts, possible = json.loads(done.stdout)
    assert possible
    return facts


def test_facts_outlast_a_process_and_tell_what_onednn_may_use() -> None:
    here = [*flat.facts()]
    assert facts_elsewhere() == here
    if here[2] == "AVX512":
        # torch says the same as before, oneDNN lays out differently.
        other = facts_elsewhere(ONEDNN_MAX_CPU_ISA="SSE41")
        assert other[:3] == here[:3]
        assert other[3] != here[3]


@pytest.mark.parametrize("source", [BUFFERED, DIRECT], ids=["buffered", "direct"])
@pytest.mark.parametrize(
    "build", [lambda: zoo.mobilenet(16, 64), lambda: zoo.vit(width=384, heads=4, depth=1)], ids=["conv", "vit"]
)
def test_a_model_read_from_a_block_file_answers_as_before(tmp_path: Path, build: Callable[[], Any], source: Source) -> None:
    model = build()
    made = convert(model.module, model.inputs, name="m", dynamic_axes=model.dynamic_axes)
    blobs = {digest: bytes(content) for digest, content in made.blobs}
    device = open_device("cpu")
    lowered = lower(made.bundle.graph, device.packed_bytes)
    program = device.prepare_lowered(lowered.graph)

    def filler(digest: str) -> Callable[[memoryview], None]:
        return lambda target: target.__setitem__(slice(None), blobs[digest])

    handles: list[Any] = []
    entries: list[tuple[Entry, memoryview]] = []
    for weight in lowered.graph.weights:
        recipe = lowered.recipes.get(weight.digest)
        if recipe is None:
            handles.append(device.new_weight(weight, filler(weight.digest)))
        else:
            handles.append(device.new_packed(recipe, [filler(each.digest) for each in recipe.sources]))
            form = flat.flatten(handles[-1])
            entries.append((Entry(weight.digest, form.size_bytes, form.meta), payload_of(form)))
    assert entries
    BlockFiles(tmp_path, *flat.facts()).write(entries)

    files = BlockFiles(tmp_path, *flat.facts(), source=source)
    targets = [memoryview(mmap.mmap(-1, page_aligned(entry.size_bytes))) for entry, _ in entries]
    files.read([entry.key for entry, _ in entries], targets)
    read = {}
    for (entry, _), target in zip(entries, targets, strict=True):
        found = files.find(entry.key)
        assert found is not None
        read[entry.key] = flat.unflatten(found.meta, target[: found.size_bytes])
    bound = [read.get(weight.digest, held) for weight, held in zip(lowered.graph.weights, handles, strict=True)]
    inputs = list(model.inputs.values()) if isinstance(model.inputs, dict) else list(model.inputs)
    wanted, answer = device.run(program, handles, inputs), device.run(program, bound, inputs)
    assert all(torch.equal(one, other) for one, other in zip(answer, wanted, strict=True))


# --- a torch that cannot ----------------------------------------------------------------------------------------------


def cannot(monkeypatch: pytest.MonkeyPatch, target: Any, name: str, value: Any) -> bool:
    monkeypatch.setattr(target, name, value)
    flat.can_flatten.cache_clear()
    return not flat.can_flatten()


def test_a_torch_without_packed_weights_flattens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cannot(monkeypatch, flat, "available", lambda: False)


@pytest.mark.parametrize("kind", [OSError, AttributeError, RuntimeError, ValueError])
def test_a_torch_without_the_interface_flattens_none(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def fail() -> None:
        raise kind("not here")

    assert cannot(monkeypatch, flat, "_library", fail)


def test_a_library_without_a_function_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "PyDLL", lambda path: object())
    flat._library.cache_clear()
    try:
        with pytest.raises(AttributeError):
            flat._library()
    finally:
        flat._library.cache_clear()


def test_a_torch_that_gives_back_something_else_flattens_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(meta: bytes, payload: memoryview) -> Packed:
        held = conv2d((4, 4, 3, 3), bias=False)
        return dataclasses.replace(held)

    assert cannot(monkeypatch, flat, "unflatten", wrong)


@pytest.mark.parametrize("name", ["aoti_torch_get_data_ptr", "aoti_torch_create_tensor_from_blob_v2"])
def test_a_call_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    made = flat.flatten(conv2d())
    payload = payload_of(made)
    library = flat._library()

    class Failing:
        def __getattr__(self, asked: str) -> Any:
            return (lambda *arguments: 1) if asked == name else getattr(library, asked)

    monkeypatch.setattr(flat, "_library", Failing)
    with pytest.raises(RuntimeError, match="torch"):
        made.copy_to(payload)
        flat.unflatten(made.meta, payload)
