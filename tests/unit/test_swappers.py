"""Comparators that swap: the answers of the model, and as many bytes read as there must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.comparators.swappers import Pipelined, Reader, Resident, Stored, Swapper, TwoBlocks, WholeLru, store
from benchmarks.models import perceptron
from benchmarks.siblings import reseed
from benchmarks.swap_tasks import Task

TASKS = {name: Task(lambda width=width: perceptron(width, 64)) for name, width in (("one", 128), ("two", 192), ("three", 160))}
KINDS: dict[str, Callable[[dict[str, Stored]], Swapper]] = {
    "two_blocks": lambda models: TwoBlocks(models, Reader()),
    "pipelined": lambda models: Pipelined(models, Reader()),
    "whole_lru": WholeLru,
    "resident": Resident,
}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, torch.Tensor]:
    answers = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        model = reseed(task.build(), seed)
        store(model, tmp_path / name)
        given = np.random.default_rng(seed).standard_normal((1, 256), np.float32)
        np.save(tmp_path / f"{name}.npy", given)
        with torch.inference_mode():
            answers[name] = model(torch.from_numpy(given))
    return answers


def swapper(kind: str, folder: Path) -> Swapper:
    return KINDS[kind]({name: Stored(task, folder / name, "buffered") for name, task in TASKS.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_the_models(kind: str, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    made = swapper(kind, tmp_path)
    sizes = {name: model.size_bytes for name, model in made.models.items()}
    for budget_bytes in (sum(sizes.values()), max(sizes.values())):
        made.resize(budget_bytes)
        for name in ("one", "two", "two", "three", "one"):
            found = made.run(name)
            assert found is not None
            assert torch.allclose(found[1], expected[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "read"),
    [("two_blocks", (1, 1, 1, 1)), ("pipelined", (1, 0, 1, 1)), ("whole_lru", (1, 0, 1, 0)), ("resident", (0,) * 4)],
)
def test_what_is_read_again(kind: str, read: tuple[int, ...], tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    made = swapper(kind, tmp_path)
    sizes = {name: model.size_bytes for name, model in made.models.items()}
    made.resize(sizes["one"] + sizes["two"])
    for name, times in zip(("one", "one", "two", "one"), read, strict=True):
        found = made.run(name)
        assert found is not None
        assert found[0] == times * sizes[name]


def test_the_model_used_longest_ago_leaves_whole(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    made = swapper("whole_lru", tmp_path)
    sizes = {name: model.size_bytes for name, model in made.models.items()}
    made.resize(sum(sizes.values()) - 4096)
    for name in ("one", "two", "three"):
        made.run(name)
    for name, read_bytes in (("two", 0), ("one", sizes["one"]), ("two", 0), ("three", sizes["three"])):
        found = made.run(name)
        assert found is not None
        assert found[0] == read_bytes


@pytest.mark.parametrize("kind", ["two_blocks", "pipelined", "whole_lru"])
def test_what_does_not_fit_is_refused(kind: str, tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    made = swapper(kind, tmp_path)
    made.resize(4096)
    assert made.run("one") is None
