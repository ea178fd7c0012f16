"""The tasks of `benchmarks.swap`: models of six architectures that need several times the memory they get.

VGG-16 is here with its convolutional body: its first linear layer alone, 411 MB, is larger than the smaller budgets, and a model
is read at least one layer at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.models import Classifier, Forked, encoder, mobilenet, perceptron, resnet, resnet50

WORDS = 8192


@dataclass(frozen=True)
class Task:
    """``side`` is that of images, ``tokens`` the length of texts of so many ``words``; a perceptron has neither."""

    build: Callable[[], nn.Module]
    side: int = 0
    tokens: int = 0
    words: int = WORDS

    @property
    def example(self) -> Tensor:
        if self.tokens:
            return torch.zeros(1, self.tokens, dtype=torch.int64)
        return torch.zeros(1, 3, self.side, self.side) if self.side else torch.zeros(1, 256)

    @property
    def bounds(self) -> dict[str, tuple[int, int]] | None:
        """Bounds of integer inputs."""
        return {"x": (0, self.words - 1)} if self.tokens else None


def vgg_body(divisor: int = 1) -> nn.Module:
    """Return VGG-16's convolutions, narrower by ``divisor``, under one linear layer."""
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, outputs // divisor, 3, padding=1), nn.ReLU()]
            inputs = outputs // divisor
        layers.append(nn.MaxPool2d(2))
    return Classifier([*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)])


# 880 MB. `resnet34` is the one that has a sibling: its head has 2 % of its bytes.
FULL = {
    "mobilenet": Task(mobilenet, 224),
    "resnet18": Task(resnet, 224),
    "resnet18_half": Task(lambda: resnet(32, 2), 224),
    "resnet18_wide": Task(lambda: resnet(96, 2), 224),
    "resnet34": Task(lambda: resnet(64, 4), 224),
    "resnet50": Task(resnet50, 224),
    "vgg_body": Task(vgg_body, 224),
    "encoder384": Task(lambda: encoder(384, 12, 6, 64, WORDS), tokens=64),
    "encoder512": Task(lambda: encoder(512, 8, 8, 64, WORDS), tokens=64),
    "encoder768": Task(lambda: encoder(768, 12, 6, 128, WORDS), tokens=128),
    "perceptron": Task(lambda: perceptron(4096, 4096)),
}
QUICK = {
    "resnet34": Task(lambda: resnet(32, 2, 64), 64),
    "vgg_body": Task(lambda: vgg_body(4), 64),
    "encoder": Task(lambda: encoder(256, 4, 8, 32, 1024), tokens=32, words=1024),
    "perceptron": Task(lambda: perceptron(1024, 1024)),
}
SIBLING = "resnet34"


def units_of(model: nn.Module) -> list[nn.Module]:
    """Return what a model runs one after another."""
    if isinstance(model, Forked):
        return [*model.units, model.head]
    assert isinstance(model, Classifier)
    return [*model.body]
