"""Models of the sizes the comparisons speak of, with seeded random weights: their arithmetic is real, their answers are not.

``tiny`` isolates the transport: its forward takes a fraction of a millisecond. The others have the shapes of MobileNetV2
(14 MB), ResNet-18 (47 MB), ResNet-50 (103 MB) and VGG-16 (553 MB). Those of ``MODELS`` take float32 images [batch, 3, 224, 224].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SIDE = 224


class Tiny(nn.Module):
    """Average pooling to 7x7 and one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(32)
        self.classify = nn.Linear(3 * 49, 10)

    def forward(self, image: Tensor) -> Tensor:
        return self.classify(self.pool(image).flatten(1))


class Classifier(nn.Module):
    """A body of layers under a forward whose argument has a name."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        return self.body(image)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Return a convolution that keeps the side (at stride 1), its norm, and ReLU unless ``act`` is false."""
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, *([nn.ReLU()] if act else []))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: expand, depthwise, project."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        expand = [conv(inputs, hidden, 1)] if expansion != 1 else []
        self.body = nn.Sequential(*expand, conv(hidden, hidden, 3, stride, hidden), conv(hidden, outputs, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet() -> nn.Module:
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers: list[nn.Module] = [conv(3, 32, 3, 2)]
    width = 32
    for expansion, outputs, count, stride in plan:
        for number in range(count):
            layers.append(InvertedResidual(width, outputs, stride if number == 0 else 1, expansion))
            width = outputs
    layers += [conv(width, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return Classifier(layers)


class Residual(nn.Module):
    """ResNet-18's block."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(inputs, outputs, 3, stride), conv(outputs, outputs, 3, act=False))
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else conv(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


class Bottleneck(nn.Module):
    """ResNet-50's block."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(conv(inputs, width, 1), conv(width, width, 3, stride), conv(width, outputs, 1, act=False))
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else conv(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for number in range(count):
            layers.append(Bottleneck(inputs, width, stride if number == 0 else 1))
            inputs = 4 * width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 1000)]
    return Classifier(layers)


def vgg16() -> nn.Module:
    layers: list[nn.Module] = []
    inputs = 3
    for outputs, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    layers += [
        nn.Flatten(),
        nn.Linear(512 * 49, 4096),
        nn.ReLU(),
        nn.Linear(4096, 4096),
        nn.ReLU(),
        nn.Linear(4096, 1000),
    ]
    return Classifier(layers)


class Forked(nn.Module):
    """A trunk of units, and a head of this model's own."""

    def __init__(self, units: list[nn.Module], head: nn.Module) -> None:
        super().__init__()
        self.units = nn.Sequential(*units)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.units(x))


class Layer(nn.Module):
    """One layer of a transformer encoder, norms last as in BERT."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.merge = (nn.Linear(width, width) for _ in range(4))
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        split = [part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)
        x = self.first(x + self.merge(mixed))
        return self.second(x + self.narrow(nn.functional.gelu(self.widen(x))))


class Embedding(nn.Module):
    """Words and places."""

    def __init__(self, words: int, tokens: int, width: int) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.zeros(tokens, width))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.norm(self.words(tokens) + self.places)


class First(nn.Module):
    """The first token's features through one linear layer."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.classify = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(x[:, 0])


def resnet(width: int = 64, units_per_stage: int = 2, outputs: int = 1000) -> Forked:
    """Return a ResNet of basic units; the defaults are ResNet-18."""
    units: list[nn.Module] = [nn.Sequential(conv(3, width, 7, 2), nn.MaxPool2d(3, 2, 1))]
    inputs = width
    for stage in range(4):
        for number in range(units_per_stage):
            units.append(Residual(inputs, width << stage, 2 if stage and not number else 1))
            inputs = width << stage
    return Forked(units, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, outputs)))


def encoder(width: int, heads: int, layers: int, tokens: int, words: int = 8192) -> Forked:
    """Return a transformer encoder with a classifier on the first token."""
    units: list[nn.Module] = [Embedding(words, tokens, width), *(Layer(width, heads) for _ in range(layers))]
    return Forked(units, First(width, 16))


def perceptron(width: int, hidden: int) -> Forked:
    """Return a small multi-layer perceptron: two layers of trunk, large enough for blocks of their own, two of head."""
    trunk = [nn.Sequential(nn.Linear(256, 512), nn.ReLU()), nn.Sequential(nn.Linear(512, width), nn.ReLU())]
    return Forked(trunk, nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 16)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": Tiny,
    "mobilenet": mobilenet,
    "resnet50": resnet50,
    "vgg16": vgg16,
    "resnet18": resnet,
    "resnet10_narrow": lambda: resnet(width=16, units_per_stage=1),
}
# As the published comparisons name them.
SIZES_MB = {"mobilenet": 14, "resnet50": 103, "vgg16": 553}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a model in eval mode with the weights of ``seed``."""
    torch.manual_seed(seed)
    return MODELS[name]().eval()
