"""The sample functions on their real models: as sources, as bundles in a real sidecar, and over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from trunkline import client
from trunkline.errors import SignatureMismatch, UnknownModel, ValueOutOfBounds

from functions import demo, sources
from functions.classify.handler import handle as classify
from functions.embed.handler import handle as embed
from functions.route.handler import handle as route
from functions.similar.handler import handle as similar
from sidecar.bundle import read_bundle
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import until

ROOT = Path(__file__).resolve().parents[2]
# The first test of a fresh clone converts four models, the last one installs what functions need.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def bundles() -> Path:
    demo.STATE.mkdir(exist_ok=True)
    return demo.bundles()


@pytest.fixture(scope="module")
def sidecar(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SidecarProcess]:
    with sidecar_process(tmp_path_factory.mktemp("sidecar")) as running:
        for name in demo.NAMES:
            running.admin.push(bundles / name)
        yield running


@pytest.fixture
def functions(sidecar: SidecarProcess, monkeypatch: pytest.MonkeyPatch) -> Iterator[SidecarProcess]:
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(sidecar.socket))
    client._pool.close()
    yield sidecar
    client._pool.close()


def post(handle: Any, body: bytes | dict[str, object]) -> Any:
    kind = "application/json" if isinstance(body, dict) else "text/plain"
    sent = json.dumps(body).encode() if isinstance(body, dict) else body
    return handle(SimpleNamespace(body=sent, headers={"Content-Type": kind}), None)["body"]


# --- sources ----------------------------------------------------------------------------------------------------------


def test_our_minilm_computes_what_transformers_computes() -> None:
    """The numbers are from transformers 5.23, BertModel with eager attention, mean pooling and normalisation."""
    rows = ["a short text", "a longer text, with a comma and with more words than the other"]
    found = sources.vectors(sources.minilm(), rows)
    expected = [
        [-0.000291, 0.179820, 0.034572, 0.030787, 0.006628, 0.044618, 0.096254, 0.032817],
        [0.089918, 0.094247, 0.025270, -0.065086, -0.036901, 0.032848, 0.032901, 0.038604],
    ]
    np.testing.assert_allclose(found[:, :8].numpy(), expected, rtol=0, atol=2e-6)
    assert float(found[0] @ found[1]) == pytest.approx(0.619548, abs=2e-6)


def test_training_the_heads_twice_gives_equal_bytes_and_useful_heads() -> None:
    trunk = sources.minilm()
    learn, held_out = sources.read_wordings(trunk)
    assert not set(learn.questions.tolist()) & set(held_out.questions.tolist())
    for train in (sources.train_route, sources.train_similar):
        assert torch.equal(train(learn).weight, train(learn).weight)
    right = (sources.train_route(learn)(held_out.vectors).argmax(1) == held_out.desks).float().mean().item()
    assert right >= 0.7, "a guess finds the desk of one text in five"
    head = sources.train_similar(learn)
    before, after = (sources.nearest_is_same(held_out, learn, part) for part in (torch.nn.Identity(), head))
    assert after > before


def test_bundles_on_one_trunk_share_its_weights(bundles: Path) -> None:
    weights = {
        name: {weight.digest: weight.size_bytes for weight in read_bundle(bundles / name).graph.weights} for name in demo.NAMES
    }
    assert weights["embed"].keys() < weights["similar"].keys()
    assert weights["embed"].keys() < weights["route"].keys()
    assert len(weights["similar"].keys() - weights["embed"].keys()) == 1
    assert len(weights["route"].keys() - weights["embed"].keys()) == 2
    assert not weights["classify"].keys() & weights["embed"].keys()


# --- handlers on a real sidecar ---------------------------------------------------------------------------------------


def test_classify_equals_the_original_model(functions: SidecarProcess) -> None:
    expected = demo.original_probabilities()
    for name, right in demo.PICTURES.items():
        labels = post(classify, demo.picture(name))["labels"]
        assert labels[0]["label"].split(",")[0] in right
        assert [entry["probability"] for entry in labels] == pytest.approx(
            sorted(expected[name].values(), reverse=True)[:5], abs=demo.TOLERANCE
        )
        assert [expected[name][entry["label"]] for entry in labels] == pytest.approx(
            [entry["probability"] for entry in labels], abs=demo.TOLERANCE
        )


def test_embed_equals_the_original_model_whatever_it_is_padded_with(functions: SidecarProcess) -> None:
    expected = np.array(demo.original_vectors())
    alone = [post(embed, text.encode())["vectors"][0] for text in demo.TEXTS]
    np.testing.assert_allclose(alone, expected, rtol=0, atol=demo.TOLERANCE)
    together = post(embed, {"texts": [*demo.TEXTS, "word " * 254]})["vectors"]
    np.testing.assert_allclose(together[:3], expected, rtol=0, atol=demo.TOLERANCE)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=0, atol=1e-5)


def test_similar_ranks_and_route_routes(functions: SidecarProcess) -> None:
    ranked = post(similar, {"query": demo.QUERY, "texts": demo.CANDIDATES})["ranked"]
    assert ranked[0]["text"] == demo.CANDIDATES[1]
    assert sorted(entry["index"] for entry in ranked) == [0, 1, 2, 3]
    for message, desk in demo.MESSAGES.items():
        assert post(route, message.encode())["intent"] == desk


def test_status_shows_one_copy_of_the_trunk(functions: SidecarProcess) -> None:
    # Until all are, some are served in another form than others, whose weights are others.
    until(lambda: all(functions.admin.get(f"models/{name}")["tried"] for name in demo.NAMES))
    for name in demo.NAMES:
        functions.admin.post(f"models/{name}/load")
    status = functions.admin.get("status")
    models = {entry["name"]: entry for entry in status["models"]}
    trunk_bytes = models["embed"]["bytes"]
    assert models["embed"]["unique_bytes"] == 0
    assert models["embed"]["shared_with"] == ["route", "similar"]
    assert models["similar"]["unique_bytes"] == 384 * 384 * 4
    assert models["route"]["unique_bytes"] == (384 * 5 + 5) * 4
    # Packed weights take a little more or less than those they stand in for.
    alone_bytes = sum((models["classify"]["bytes"], trunk_bytes, 384 * 384 * 4, (384 * 5 + 5) * 4))
    assert status["memory"]["resident_bytes"] == pytest.approx(alone_bytes, rel=0.01)
    assert status["memory"]["saved_bytes"] == status["memory"]["logical_bytes"] - status["memory"]["resident_bytes"]


def test_the_sidecar_refuses_what_a_handler_would_not_send(functions: SidecarProcess) -> None:
    ids = np.array([[101, 30522, 102]])
    with pytest.raises(ValueOutOfBounds, match="30522"):
        client.model("embed")(input_ids=ids, attention_mask=np.ones_like(ids))
    with pytest.raises(SignatureMismatch, match="attention_mask"):
        client.model("embed")(input_ids=ids)
    with pytest.raises(SignatureMismatch, match="224"):
        client.model("classify")(np.zeros((1, 3, 225, 224), np.float32))
    with pytest.raises(UnknownModel, match="embedding"):
        client.model("embedding")(ids)


# --- over HTTP --------------------------------------------------------------------------------------------------------


def test_the_demo_finds_every_answer_right(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a folder of its own, so that a running `make demo` or `trunkline up` is left alone."""
    shutil.copy(ROOT / "stack.yml", tmp_path)
    for name in ("functions", "template"):
        (tmp_path / name).symlink_to(ROOT / name)
    environments = ROOT / ".trunkline" / "envs"
    environments.mkdir(parents=True, exist_ok=True)
    (tmp_path / ".trunkline").mkdir()
    (tmp_path / ".trunkline" / "envs").symlink_to(environments)
    monkeypatch.setattr(demo, "WARM_UP_CALLS", 0)
    monkeypatch.setattr(demo, "TIMED_CALLS", 3)
    log: list[str] = []
    try:
        demo.run(tmp_path / "stack.yml", log.append)
    except demo.WrongAnswer as error:
        raise AssertionError("\n".join([str(error), *log])) from error
    assert "saved by sharing" in capsys.readouterr().out


def test_the_demo_fails_with_the_reason_when_an_answer_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    class OtherLabels:
        def post(self, name: str, body: bytes) -> dict[str, object]:
            return {"labels": [{"label": "tench, Tinca tinca", "probability": 0.9}] * 5}

    with pytest.raises(demo.WrongAnswer, match=r"classify says 'tench' to coffee\.png, not espresso"):
        demo.show_classify(OtherLabels(), {})  # type: ignore[arg-type]
