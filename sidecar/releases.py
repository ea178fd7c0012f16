"""Releases: which versions of a model answer whoever asks for it by name alone, and how often each. Pure.

A release names one version, the default, or several with weights, a split. An operator writes it as ``{"default": "2"}`` or
``{"split": {"1": 90, "2": 10}}``; the store keeps it in one form, ``{"name", "weights", "sticky"}``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from trunkline.errors import InvalidInput
from trunkline.protocol import TensorSpec
from trunkline.signature import show_shape

from sidecar.bundle import MODEL_NAME, Graph
from sidecar.errors import BundleError
from sidecar.labels import LABEL, LABEL_RULE
from sidecar.strictjson import encode_json, integer, load_json, members, refuse, shown, text

# With this the id begins of the signature of a name that has a release. It is that of what callers can tell apart alone, so that
# nobody has to ask for the signature again because of a version that takes and gives the same.
RELEASED: Final = "released-"
MOST_VERSIONS: Final = 8
HEAVIEST: Final = 10_000
_LIMIT_BYTES: Final = 16 * 1024


@dataclass(frozen=True)
class Release:
    """``weights`` by the label of each version that answers; an empty label is what was pushed without a version.

    In a ``sticky`` release calls with one call id are answered by one version.
    """

    weights: Mapping[str, int]
    sticky: bool = False

    @property
    def is_split(self) -> bool:
        return len(self.weights) > 1

    @property
    def is_plain(self) -> bool:
        """Whether a name means what was pushed under it without a version, as if there were no release."""
        return self.weights.keys() == {""}

    def relabelled(self, labels: Mapping[str, str]) -> Release:
        """Return the same with other labels for some of its versions."""
        return Release({labels.get(label, label): weight for label, weight in self.weights.items()}, self.sticky)

    def to_plain(self) -> dict[str, object]:
        """Return it as an operator writes it."""
        if not self.is_split:
            return {"default": next(iter(self.weights))}
        return {"split": dict(self.weights), "sticky": self.sticky}


def as_asked(plain: Mapping[str, Any]) -> Release:
    """Return what an operator asks for, as JSON has it. Raises InvalidInput."""
    if plain.keys() == {"default"}:
        return Release({checked_label(plain["default"], "default"): 1})
    if "split" not in plain or plain.keys() - {"split", "sticky"}:
        raise InvalidInput(
            'a release is {"default": VERSION} or {"split": {VERSION: WEIGHT, …}}, the latter with "sticky" if wanted'
        )
    try:
        weights = _weights(plain["split"], "split")
    except BundleError as error:
        raise InvalidInput(error.message) from error
    for label in weights:
        checked_label(label, "split")
    sticky = plain.get("sticky", False)
    if not isinstance(sticky, bool):
        raise InvalidInput(f"sticky is {shown(sticky)}; it must be true or false")
    return Release(weights, sticky)


def checked_label(label: object, place: str) -> str:
    """Return what an operator calls a version. Raises InvalidInput."""
    if not isinstance(label, str) or not LABEL.fullmatch(label):
        raise InvalidInput(f"{place}: {shown(label)} is no label of a version: one has {LABEL_RULE}")
    return label


def _weights(value: object, place: str) -> dict[str, int]:
    if not isinstance(value, dict) or not 1 <= len(value) <= MOST_VERSIONS:
        refuse(place, f"must be an object of 1 to {MOST_VERSIONS} versions and their weights, not {shown(value)}")
    return {label: integer(weight, f"{place}: weight of {shown(label)}", 1, HEAVIEST) for label, weight in value.items()}


def release_bytes(name: str, release: Release) -> bytes:
    """Return the text of a release's file."""
    return encode_json({"name": name, "weights": dict(release.weights), "sticky": release.sticky})


def parse_release(data: bytes, name: str) -> Release:
    """Return what a release's file says, which must be that of ``name``. Raises BundleError."""
    place = "the release"
    fields = members(load_json(data, place, _LIMIT_BYTES), place, ("name", "weights", "sticky"))
    if text(fields["name"], f"{place}: name", MODEL_NAME) != name:
        refuse(place, f"is that of {shown(fields['name'])}")
    weights = _weights(fields["weights"], f"{place}: weights")
    for label in weights:
        if label:
            text(label, f"{place}: weights", LABEL)
    if not isinstance(fields["sticky"], bool):
        refuse(f"{place}: sticky", "must be true or false")
    return Release(weights, fields["sticky"])


class RoundRobin:
    """Smooth weighted round robin, as of nginx: of any run of as many draws as the weights add up to, each has its weight's.

    Draws of one label lie as far from each other as can be: of 90 to 10, every tenth is of the second.
    """

    def __init__(self, weights: Mapping[str, int]) -> None:
        divisor = math.gcd(*weights.values())
        self._weights = {label: weight // divisor for label, weight in weights.items()}
        self._total = sum(self._weights.values())
        self._due = dict.fromkeys(weights, 0)

    def draw(self) -> str:
        """Return whose turn it is."""
        for label, weight in self._weights.items():
            self._due[label] += weight
        chosen = max(self._due, key=self._due.__getitem__)
        self._due[chosen] -= self._total
        return chosen


def by_call_id(name: str, call_id: str, weights: Mapping[str, int]) -> str:
    """Return the version that answers all calls of one id, on every node and after every restart.

    Who is moved when weights change are as few as can be where there are two versions.
    """
    drawn = int.from_bytes(hashlib.sha256(f"{name}\0{call_id}".encode()).digest()[:8])
    left = drawn * sum(weights.values()) >> 64
    for label in sorted(weights):
        left -= weights[label]
        if left < 0:
            return label
    raise AssertionError("unreachable")


def difference(one: Graph, other: Graph) -> str:
    """Return what two models take or give differently, for people; empty where callers cannot tell them apart."""
    for verb, ours, theirs in (("takes", one.inputs, other.inputs), ("gives", one.outputs, other.outputs)):
        if ours != theirs:
            return f"one {verb} {_tensors(ours)}, the other {_tensors(theirs)}"
    bounds, others = ({each.name: (each.minimum, each.maximum) for each in graph.symbols} for graph in (one, other))
    for symbol in sorted(bounds.keys() | others.keys()):
        if bounds.get(symbol) != others.get(symbol):
            return f"one has {symbol} from {_range(bounds.get(symbol))}, the other from {_range(others.get(symbol))}"
    return ""


def _tensors(specs: Iterable[TensorSpec]) -> str:
    return ", ".join(
        f"{spec.name} {spec.dtype} {show_shape(spec.shape)}"
        + ("" if spec.minimum is None and spec.maximum is None else f" from {spec.minimum} to {spec.maximum}")
        for spec in specs
    )


def _range(bounds: tuple[int, int] | None) -> str:
    return "nothing" if bounds is None else f"{bounds[0]} to {bounds[1]}"
