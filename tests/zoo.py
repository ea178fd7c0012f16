"""Small torch models with seeded random weights, one per kind of network that bundles have to carry.

Every function returns a ``Source``. Sizes are parameters; the defaults keep a conversion to a few seconds, and
``PUBLISHED`` has those of the networks as they were published. Batch norms get statistics as if trained, since those of a
fresh layer (mean 0, variance 1) would hide mistakes.
"""

from __future__ import annotations

import fcntl
import functools
import os
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidecar.bundle import Bundle, blob_path, read_bundle, write_bundle
from sidecar.export import PackedModel, Source, convert

# Names the folder where the processes of a test run keep what they have converted.
FOLDER: Final = "CONVERTED_FOR_TESTS"


def _seeded(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Fill a module's weights. ``gain`` makes up for what ReLUs take away where no norm does."""
    if any(parameter.is_meta for parameter in module.parameters()):
        return module.eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = gain / max(parameter[0].numel() if parameter.dim() > 1 else parameter.numel(), 1) ** 0.5
            parameter.copy_((torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound)
        for layer in module.modules():
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                assert layer.running_mean is not None
                assert layer.running_var is not None
                layer.running_mean.copy_(torch.randn(layer.running_mean.shape, generator=generator) * 0.1)
                layer.running_var.copy_(torch.rand(layer.running_var.shape, generator=generator) + 0.5)
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
            elif isinstance(layer, nn.LayerNorm):
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
    return module.eval()


def _picture(size: int, channels: int = 3) -> Tensor:
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1), device="cpu")


# --- convolutional networks ---------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two 3x3 convolutions around a shortcut [He et al., 2015]; the ReLUs work in place, as torchvision's do."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class Bottleneck(nn.Module):
    """Narrow, convolve, widen, around a shortcut: the unit of the deeper ResNets."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        narrow = outside // 4
        self.layers = nn.Sequential(
            nn.Conv2d(inside, narrow, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, narrow, 3, stride, 1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inside != outside:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        y += self.shortcut(x)
        return F.relu(y, inplace=True)


class ResNet(nn.Module):
    """The plan of all ResNets at any width; ``widen`` is how much wider the result of a unit is than its 3x3 convolution."""

    def __init__(
        self,
        width: int,
        classes: int,
        blocks: tuple[int, ...],
        unit: type[Residual] | type[Bottleneck] = Residual,
        widen: int = 1,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )
        stages: list[nn.Module] = []
        inside = width
        for number, count in enumerate(blocks):
            outside = (width << number) * widen
            for block in range(count):
                stages.append(unit(inside, outside, 2 if number and not block else 1))
                inside = outside
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inside, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages(self.stem(image))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet(width: int = 8, size: int = 32, classes: int = 10, blocks: tuple[int, ...] = (2, 2, 2, 2)) -> Source:
    """ResNet-18 by default but narrower; ``width=64, size=224, classes=1000`` is ResNet-18 itself."""
    return Source(_seeded(ResNet(width, classes, blocks), 2), (_picture(size),))


def resnet50(width: int = 4, size: int = 32, classes: int = 10, blocks: tuple[int, ...] = (1, 2, 1)) -> Source:
    """Four of ResNet-50's bottlenecks; it has ``(3, 4, 6, 3)``."""
    return Source(_seeded(ResNet(width, classes, blocks, Bottleneck, 4), 11, gain=6**0.5), (_picture(size),))


class Inverted(nn.Module):
    """Expand, depthwise convolution, project [Sandler et al., 2018]."""

    def __init__(self, inside: int, outside: int, stride: int, factor: int, kernel: int = 3) -> None:
        super().__init__()
        middle = inside * factor
        self.residual = stride == 1 and inside == outside
        expand = (nn.Conv2d(inside, middle, 1, bias=False), nn.BatchNorm2d(middle), nn.ReLU6(inplace=True))
        self.layers = nn.Sequential(
            *(expand if factor > 1 else ()),
            nn.Conv2d(middle, middle, kernel, stride, kernel // 2, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU6(inplace=True),
            nn.Conv2d(middle, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


# Of each stage: how much it expands, channels (of the stem's 32), how often, stride of the first, size of the kernel.
Plan = tuple[tuple[int, int, int, int, int], ...]
MOBILENET_V2: Plan = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 32, 3, 2, 3),
    (6, 64, 4, 2, 3),
    (6, 96, 3, 1, 3),
    (6, 160, 3, 2, 3),
    (6, 320, 1, 1, 3),
)
EFFICIENTNET_LITE0: Plan = (
    (1, 16, 1, 1, 3),
    (6, 24, 2, 2, 3),
    (6, 40, 2, 2, 5),
    (6, 80, 3, 2, 3),
    (6, 112, 3, 1, 5),
    (6, 192, 4, 2, 5),
    (6, 320, 1, 1, 3),
)
# A few of their stages.
SHORT_MOBILENET: Plan = ((1, 16, 1, 1, 3), (6, 32, 2, 2, 3), (6, 64, 1, 2, 3))
SHORT_EFFICIENTNET: Plan = ((1, 16, 1, 1, 3), (6, 32, 2, 2, 5))


def _mobile(width: int, classes: int, plan: Plan, last: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6(inplace=True)]
    inside = width
    for factor, channels, count, stride, kernel in plan:
        outside = channels * width // 32
        for number in range(count):
            layers.append(Inverted(inside, outside, 1 if number else stride, factor, kernel))
            inside = outside
    layers += [nn.Conv2d(inside, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU6(inplace=True)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(last, classes))


def mobilenet(width: int = 8, size: int = 32, classes: int = 10, plan: Plan = SHORT_MOBILENET, last: int = 32) -> Source:
    """MobileNetV2's inverted residuals."""
    return Source(_seeded(_mobile(width, classes, plan, last), 3, gain=6**0.5), (_picture(size),))


def efficientnet_lite(
    width: int = 8, size: int = 32, classes: int = 10, plan: Plan = SHORT_EFFICIENTNET, last: int = 32
) -> Source:
    """EfficientNet-Lite [Tan and Le, 2019]: inverted residuals with larger kernels, no squeeze and no swish."""
    return Source(_seeded(_mobile(width, classes, plan, last), 12, gain=6**0.5), (_picture(size),))


class Dense(nn.Module):
    """A layer that adds a few channels to all those before it [Huang et al., 2017]."""

    def __init__(self, inside: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(4 * growth)
        self.conv1 = nn.Conv2d(inside, 4 * growth, 1, bias=False)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, before: list[Tensor]) -> Tensor:
        x = self.conv1(F.relu(self.norm1(torch.cat(before, dim=1))))
        return self.conv2(F.relu(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, dim=1)


class DenseNet(nn.Module):
    """Blocks of dense layers with transitions that halve channels and size."""

    def __init__(self, growth: int, classes: int, blocks: tuple[int, ...]) -> None:
        super().__init__()
        inside = 2 * growth
        layers: list[nn.Module] = [
            nn.Conv2d(3, inside, 7, 2, 3, bias=False),
            nn.BatchNorm2d(inside),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        for number, count in enumerate(blocks):
            if number:
                norm, narrower = nn.BatchNorm2d(inside), nn.Conv2d(inside, inside // 2, 1, bias=False)
                layers += [norm, nn.ReLU(), narrower, nn.AvgPool2d(2)]
                inside //= 2
            layers.append(DenseBlock(Dense(inside + each * growth, growth) for each in range(count)))
            inside += count * growth
        self.features = nn.Sequential(*layers, nn.BatchNorm2d(inside), nn.ReLU())
        self.classifier = nn.Linear(inside, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image).mean((2, 3)))


def densenet(growth: int = 4, size: int = 32, classes: int = 10, blocks: tuple[int, ...] = (2, 3, 2)) -> Source:
    """A DenseNet of seven layers; DenseNet-121 has fifty-eight."""
    return Source(_seeded(DenseNet(growth, classes, blocks), 13, gain=6**0.5), (_picture(size),))


class VGG(nn.Module):
    """VGG-16 [Simonyan and Zisserman, 2014] at any width: thirteen convolutions and three wide linear layers."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inside = 3
        for outside, count in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
            for _ in range(count):
                layers += [nn.Conv2d(inside, outside * width, 3, padding=1), nn.ReLU(inplace=True)]
                inside = outside * width
            layers.append(nn.MaxPool2d(2))
        hidden = 64 * width
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten())
        self.classifier = nn.Sequential(
            nn.Linear(inside * 49, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(),
            nn.Linear(hidden, classes),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.classifier(self.features(image))


def vgg(width: int = 2, size: int = 32, classes: int = 10) -> Source:
    """VGG-16, much narrower."""
    return Source(_seeded(VGG(width, classes), 14, gain=6**0.5), (_picture(size),))


def _convolution(inside: int, outside: int, kernel: int, stride: int = 1) -> nn.Module:
    convolution = nn.Conv2d(inside, outside, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outside), nn.ReLU(inplace=True))


class Inception(nn.Module):
    """Four branches side by side, put together by their channels [Szegedy et al., 2015]."""

    def __init__(self, inside: int, one: int, to_three: int, three: int, to_five: int, five: int, pooled: int) -> None:
        super().__init__()
        self.branch1 = _convolution(inside, one, 1)
        self.branch2 = nn.Sequential(_convolution(inside, to_three, 1), _convolution(to_three, three, 3))
        # 3x3 as torchvision has it, 5x5 in the paper.
        self.branch3 = nn.Sequential(_convolution(inside, to_five, 1), _convolution(to_five, five, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), _convolution(inside, pooled, 1))
        self.outside = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1)


# Channels of the branches of each module, stage by stage.
Branches = tuple[tuple[tuple[int, int, int, int, int, int], ...], ...]
GOOGLENET: Branches = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class GoogLeNet(nn.Module):
    """The first Inception network, without its auxiliary heads."""

    def __init__(self, narrow: int, classes: int, stages: Branches) -> None:
        super().__init__()
        inside = 192 // narrow
        self.stem = nn.Sequential(
            _convolution(3, 64 // narrow, 7, 2),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            _convolution(64 // narrow, 64 // narrow, 1),
            _convolution(64 // narrow, inside, 3),
        )
        layers: list[nn.Module] = []
        for stage in stages:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
            for channels in stage:
                made = Inception(inside, *(channel // narrow for channel in channels))
                layers.append(made)
                inside = made.outside
        self.stages = nn.Sequential(*layers)
        self.fc = nn.Linear(inside, classes)

    def forward(self, image: Tensor) -> Tensor:
        return self.fc(F.adaptive_avg_pool2d(self.stages(self.stem(image)), 1).flatten(1))


def inception(narrow: int = 8, size: int = 32, classes: int = 10, stages: Branches | None = None) -> Source:
    """The first module of each of GoogLeNet's three stages, an eighth as wide."""
    chosen = tuple(stage[:1] for stage in GOOGLENET) if stages is None else stages
    return Source(_seeded(GoogLeNet(narrow, classes, chosen), 15, gain=6**0.5), (_picture(size),))


class UNet(nn.Module):
    """Down, up, and a bridge across [Ronneberger et al., 2015]; sizes are read from a tensor on the way."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(width, width * 2, 3, 2, 1), nn.ReLU())
        self.up = nn.ConvTranspose2d(width * 2, width, 2, 2)
        self.last = nn.Conv2d(width * 3, 1, 1)

    def forward(self, image: Tensor) -> Tensor:
        first = self.first(image)
        below = self.down(first)
        size = first.shape[-2:]
        up = F.interpolate(self.up(below), size=size, mode="nearest")
        smooth = F.interpolate(below, size=size, mode="bilinear", align_corners=False)[:, : first.shape[1]]
        return torch.sigmoid(self.last(torch.cat((first, up, smooth), dim=1)))


def unet(width: int = 8, size: int = 24) -> Source:
    """A U-Net of one level, whose picture may have any height."""
    height = {"image": {2: ("height", 8, 64)}}
    return Source(_seeded(UNet(width), 4), (_picture(size, 1),), dynamic_axes=height)


class DeepUNet(nn.Module):
    """U-Net as in the paper, but padded: two convolutions on each level, halving, doubling, and a bridge on each level."""

    def __init__(self, width: int, depth: int, classes: int) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(self._two(inside, outside) for inside, outside in zip([1, *widths], widths, strict=False))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(2 * outside, outside, 2, 2) for outside in widths[-2::-1])
        self.up = nn.ModuleList(self._two(2 * outside, outside) for outside in widths[-2::-1])
        self.last = nn.Conv2d(width, classes, 1)

    def _two(self, inside: int, outside: int) -> nn.Module:
        first, second = nn.Conv2d(inside, outside, 3, padding=1), nn.Conv2d(outside, outside, 3, padding=1)
        return nn.Sequential(first, nn.ReLU(), second, nn.ReLU())

    def forward(self, image: Tensor) -> Tensor:
        bridges = [self.down[0](image)]
        for layers in list(self.down)[1:]:
            bridges.append(layers(F.max_pool2d(bridges[-1], 2)))
        x = bridges.pop()
        for rise, layers in zip(self.rise, self.up, strict=True):
            x = layers(torch.cat((bridges.pop(), rise(x)), dim=1))
        return self.last(x)


def deep_unet(width: int = 4, size: int = 16, depth: int = 3, classes: int = 2) -> Source:
    """A U-Net of several levels."""
    return Source(_seeded(DeepUNet(width, depth, classes), 16, gain=6**0.5), (_picture(size, 1),))


# --- others -------------------------------------------------------------------------------------------------------


def mlp(inside: int = 6, width: int = 16, outside: int = 3, seed: int = 5) -> Source:
    """Three linear layers."""
    layers = nn.Sequential(nn.Linear(inside, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outside))
    return Source(_seeded(layers, seed), {"features": torch.randn(1, inside)})


class Block(nn.Module):
    """A transformer layer, normalised first, with torch's attention."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.mix(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches, a class token, layers [Dosovitskiy et al., 2020]. Its scale is a buffer that is not saved."""

    scale: Tensor

    def __init__(self, width: int, heads: int, depth: int, size: int, patch: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        self.register_buffer("scale", torch.tensor(1.5), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0]) * self.scale


def vit(width: int = 16, heads: int = 2, depth: int = 2, size: int = 16, patch: int = 4, classes: int = 5) -> Source:
    """A tiny vision transformer."""
    return Source(_seeded(ViT(width, heads, depth, size, patch, classes), 6), (_picture(size),))


class Decoder(nn.Module):
    """GPT-2's plan [Radford et al., 2019], without a cache: every position sees those before it; tied embeddings."""

    def __init__(self, width: int, heads: int, depth: int, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(longest, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.positions.weight[: input_ids.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.words.weight)


def _texts(vocabulary: int, longest: int, length: int = 7) -> dict[str, Any]:
    """Return what a source of texts says of its tokens, without the mask."""
    ids = torch.randint(vocabulary, (2, length), generator=torch.Generator().manual_seed(1), device="cpu")
    return {
        "inputs": {"input_ids": ids},
        "dynamic_axes": {"input_ids": {1: ("tokens", 2, longest)}},
        "input_bounds": {"input_ids": (0, vocabulary - 1)},
    }


def decoder(width: int = 16, heads: int = 2, depth: int = 2, vocabulary: int = 50, longest: int = 32) -> Source:
    """A small decoder that gives the scores of the next token at every position."""
    return Source(_seeded(Decoder(width, heads, depth, vocabulary, longest), 17), **_texts(vocabulary, longest))


class EncoderLayer(nn.Module):
    """A transformer layer, normalised last, that sees what its mask lets it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width)
        self.mix, self.norm1 = nn.Linear(width, width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        parts = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        x = self.norm1(x + self.mix(F.scaled_dot_product_attention(*parts, attn_mask=seen).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.mlp(x))


class Sentences(nn.Module):
    """MiniLM's plan [Wang et al., 2020]: an encoder, the mean over the tokens the mask keeps, length 1."""

    def __init__(self, width: int, heads: int, depth: int, vocabulary: int, longest: int) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(longest, width)
        self.kinds = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(depth))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.words(input_ids) + self.kinds.weight[0] + self.positions.weight[: input_ids.shape[1]]
        x, seen = self.norm(x), attention_mask[:, None, None, :] != 0
        for layer in self.layers:
            x = layer(x, seen)
        share = attention_mask[:, :, None].to(x.dtype)
        return F.normalize((x * share).sum(1) / share.sum(1).clamp(min=1e-9), dim=1)


def minilm(width: int = 16, heads: int = 2, depth: int = 2, vocabulary: int = 50, longest: int = 32) -> Source:
    """A small encoder of sentences."""
    known = _texts(vocabulary, longest)
    mask = torch.ones((2, 7), dtype=torch.int64, device="cpu")
    mask[1, 5:] = 0
    known["inputs"]["attention_mask"] = mask
    known["dynamic_axes"]["attention_mask"] = known["dynamic_axes"]["input_ids"]
    known["input_bounds"]["attention_mask"] = (0, 1)
    return Source(_seeded(Sentences(width, heads, depth, vocabulary, longest), 18), **known)


def bert(width: int = 32, heads: int = 2, depth: int = 2, vocabulary: int = 100, longest: int = 64, inner: int = 64) -> Source:
    """BERT as the transformers package has it, with attention mask and any length."""
    import transformers

    from sidecar.sources import transformers_source

    torch.manual_seed(7)  # the package draws the weights itself
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=inner,
        max_position_embeddings=longest,
    )
    return transformers_source(transformers.BertModel(config, add_pooling_layer=False))


class Pair(nn.Module):
    """Two towers with tied weights and a table of kinds; gives a score and both vectors."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.left = nn.Linear(4, width)
        self.right = nn.Linear(4, width)
        self.right.weight = self.left.weight
        self.kinds = nn.Embedding(7, width)
        self.unused = nn.Linear(100, 100)

    def forward(self, left: Tensor, right: Tensor, kind: Tensor) -> dict[str, Any]:
        first = F.normalize(self.left(left) + self.kinds(kind), dim=-1)
        second = F.normalize(self.right(right), dim=-1)
        return {"score": (first * second).sum(-1), "vectors": (first, second), "nothing": None}


def pair(width: int = 8) -> Source:
    """Three inputs, one of them a bounded integer; three outputs, a tied weight and an unused layer."""
    inputs = {"left": torch.randn(1, 4), "right": torch.randn(1, 4), "kind": torch.tensor([3])}
    return Source(_seeded(Pair(width), 8), inputs, input_bounds={"kind": (0, 6)})


class Outputs(nn.Module):
    """Outputs of many dtypes; one is an input, one a weight, one has a size that is no plain symbol."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        best, place = (x * self.weight).max(dim=-1)
        rows = torch.arange(x.shape[0], device=x.device)
        doubled = torch.cat((x, x)).reshape(-1)
        return best, place, x > 0, x.to(torch.float16), doubled, rows, self.weight, x


def outputs(width: int = 4) -> Source:
    """One input, eight outputs."""
    return Source(_seeded(Outputs(width), 9), (torch.randn(3, width),))


ALL = {
    "resnet": resnet,
    "resnet50": resnet50,
    "mobilenet": mobilenet,
    "efficientnet_lite": efficientnet_lite,
    "densenet": densenet,
    "vgg": vgg,
    "inception": inception,
    "mlp": mlp,
    "unet": unet,
    "deep_unet": deep_unet,
    "vit": vit,
    "bert": bert,
    "minilm": minilm,
    "decoder": decoder,
    "pair": pair,
    "outputs": outputs,
}

# The sizes of the published networks: which of the above, and its parameters.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "ResNet-18": ("resnet", {"width": 64, "size": 224, "classes": 1000}),
    "ResNet-50": ("resnet50", {"width": 64, "size": 224, "classes": 1000, "blocks": (3, 4, 6, 3)}),
    "MobileNetV2": ("mobilenet", {"width": 32, "size": 224, "classes": 1000, "plan": MOBILENET_V2, "last": 1280}),
    "EfficientNet-Lite0": (
        "efficientnet_lite",
        {"width": 32, "size": 224, "classes": 1000, "plan": EFFICIENTNET_LITE0, "last": 1280},
    ),
    "DenseNet-121": ("densenet", {"growth": 32, "size": 224, "classes": 1000, "blocks": (6, 12, 24, 16)}),
    "VGG-16": ("vgg", {"width": 64, "size": 224, "classes": 1000}),
    "GoogLeNet": ("inception", {"narrow": 1, "size": 224, "classes": 1000, "stages": GOOGLENET}),
    "U-Net": ("deep_unet", {"width": 64, "size": 512, "depth": 4}),
    "ViT-B/16": ("vit", {"width": 768, "heads": 12, "depth": 12, "size": 224, "patch": 16, "classes": 1000}),
    "BERT-base": ("bert", {"width": 768, "heads": 12, "depth": 12, "vocabulary": 30522, "longest": 512, "inner": 3072}),
    "all-MiniLM-L6": ("minilm", {"width": 384, "heads": 12, "depth": 6, "vocabulary": 30522, "longest": 512}),
    "GPT-2": ("decoder", {"width": 768, "heads": 12, "depth": 12, "vocabulary": 50257, "longest": 1024}),
}


def packed(source: Source, name: str = "model", **options: Any) -> PackedModel:
    """Convert a source; ``options`` go before what it says itself."""
    given: dict[str, Any] = {
        "batch": source.batch,
        "dynamic_axes": source.dynamic_axes,
        "input_bounds": source.input_bounds,
        "output_names": source.output_names,
    }
    return convert(source.module, source.inputs, name=name, **(given | options))


@functools.cache
def converted(name: str) -> tuple[Source, PackedModel]:
    """Return a network of ``ALL`` and what it was converted to, once for all tests of a process."""
    source = ALL[name]()
    return source, packed(source, name)


@functools.cache
def stored(name: str) -> tuple[Source, Bundle, dict[str, bytes]]:
    """Return a network of ``ALL``, its bundle, and the bundle's blobs by digest: converted once for all processes of a run."""
    source = ALL[name]()
    # As conversion leaves it.
    source.module.eval()
    path = Path(os.environ[FOLDER]) / name
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # The manifest comes last.
        if not (path / "manifest.json").exists():
            made = converted(name)[1]
            write_bundle(path, made.bundle, made.blobs)
    bundle = read_bundle(path)
    return source, bundle, {weight.digest: blob_path(path, weight.digest).read_bytes() for weight in bundle.graph.weights}
