"""Models of the sizes the comparisons speak of, with seeded random weights: their arithmetic is real, their answers are not.

``tiny`` isolates the transport: its forward takes a fraction of a millisecond. The others have the shapes of MobileNetV2
(14 MB), ResNet-50 (103 MB) and VGG-16 (553 MB). All take float32 images [batch, 3, 224, 224].
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


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
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
        expand = [_conv(inputs, hidden, 1)] if expansion != 1 else []
        self.body = nn.Sequential(*expand, _conv(hidden, hidden, 3, stride, hidden), _conv(hidden, outputs, 1, act=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.adds else self.body(x)


def mobilenet() -> nn.Module:
    plan = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    layers: list[nn.Module] = [_conv(3, 32, 3, 2)]
    width = 32
    for expansion, outputs, count, stride in plan:
        for number in range(count):
            layers.append(InvertedResidual(width, outputs, stride if number == 0 else 1, expansion))
            width = outputs
    layers += [_conv(width, 1280, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return Classifier(layers)


class Bottleneck(nn.Module):
    """ResNet-50's block."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(_conv(inputs, width, 1), _conv(width, width, 3, stride), _conv(width, outputs, 1, act=False))
        self.skip = nn.Identity() if inputs == outputs and stride == 1 else _conv(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.skip(x))


def resnet50() -> nn.Module:
    layers: list[nn.Module] = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
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


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tiny": Tiny,
    "mobilenet": mobilenet,
    "resnet50": resnet50,
    "vgg16": vgg16,
}
# As the published comparisons name them.
SIZES_MB = {"mobilenet": 14, "resnet50": 103, "vgg16": 553}


def build(name: str, seed: int = 0) -> nn.Module:
    """Return a model in eval mode with the weights of ``seed``."""
    torch.manual_seed(seed)
    return MODELS[name]().eval()
