"""Small torch models with seeded random weights, one per kind of network that bundles have to carry.

Every function returns a ``Source``. Sizes are parameters; the defaults keep a conversion to a second or two. Batch
norms get statistics as if trained, since those of a fresh layer (mean 0, variance 1) would hide mistakes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sidecar.export import Source


def _seeded(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            bound = 1 / max(parameter[0].numel() if parameter.dim() > 1 else parameter.numel(), 1) ** 0.5
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
    return torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1))


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


class ResNet(nn.Module):
    """ResNet-18's plan at any width."""

    def __init__(self, width: int, classes: int, blocks: tuple[int, ...]) -> None:
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
            outside = width << number
            for block in range(count):
                stages.append(Residual(inside, outside, 2 if number and not block else 1))
                inside = outside
        self.stages = nn.Sequential(*stages)
        self.fc = nn.Linear(inside, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = self.stages(self.stem(image))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def resnet(width: int = 8, size: int = 32, classes: int = 10, blocks: tuple[int, ...] = (2, 2, 2, 2)) -> Source:
    """ResNet-18 by default but narrower; ``width=64, size=224, classes=1000`` is ResNet-18 itself."""
    return Source(_seeded(ResNet(width, classes, blocks), 2), (_picture(size),))


class Inverted(nn.Module):
    """Expand, depthwise convolution, project [Sandler et al., 2018]."""

    def __init__(self, inside: int, outside: int, stride: int, factor: int) -> None:
        super().__init__()
        middle = inside * factor
        self.residual = stride == 1 and inside == outside
        self.layers = nn.Sequential(
            nn.Conv2d(inside, middle, 1, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU6(inplace=True),
            nn.Conv2d(middle, middle, 3, stride, 1, groups=middle, bias=False),
            nn.BatchNorm2d(middle),
            nn.ReLU6(inplace=True),
            nn.Conv2d(middle, outside, 1, bias=False),
            nn.BatchNorm2d(outside),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def mobilenet(width: int = 8, size: int = 32, classes: int = 10) -> Source:
    """A MobileNetV2 of four inverted residuals."""
    layers = nn.Sequential(
        nn.Conv2d(3, width, 3, 2, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU6(inplace=True),
        Inverted(width, width, 1, 1),
        Inverted(width, width * 2, 2, 6),
        Inverted(width * 2, width * 2, 1, 6),
        Inverted(width * 2, width * 4, 2, 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(width * 4, classes),
    )
    return Source(_seeded(layers, 3), (_picture(size),))


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


# --- others -------------------------------------------------------------------------------------------------------


def mlp(inside: int = 6, width: int = 16, outside: int = 3, seed: int = 5) -> Source:
    """Three linear layers."""
    layers = nn.Sequential(nn.Linear(inside, width), nn.Tanh(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outside))
    return Source(_seeded(layers, seed), {"features": torch.randn(1, inside)})


class Block(nn.Module):
    """A transformer layer, normalised first, with torch's attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        attended = F.scaled_dot_product_attention(query, key, value)
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


def bert(width: int = 32, heads: int = 2, depth: int = 2, vocabulary: int = 100, longest: int = 64) -> Source:
    """BERT as the transformers package has it, with attention mask and any length."""
    import transformers

    from sidecar.sources import transformers_source

    torch.manual_seed(7)  # the package draws the weights itself
    config = transformers.BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=2 * width,
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
    "mobilenet": mobilenet,
    "mlp": mlp,
    "unet": unet,
    "vit": vit,
    "bert": bert,
    "pair": pair,
    "outputs": outputs,
}
