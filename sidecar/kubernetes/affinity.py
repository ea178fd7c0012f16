"""Where a function's models are, as the scheduler reads it: labels of nodes, and terms of pods that prefer them. Pure.

A node has a label ``model.trunkline.dev/NAME`` for each model that it has: ``resident`` in memory, or ``stored`` on its disk. A
pod that asks for models prefers nodes that have them; it runs elsewhere where those are full.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from sidecar.kubernetes.names import MODEL_PREFIX

RESIDENT: Final = "resident"
STORED: Final = "stored"
# What the API server takes for the part of a label's key behind the slash.
_FIT: Final = re.compile(r"(?=.{1,63}$)[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")
# Names that begin so are hashed, too, so that no model can have another's label.
_HASHED: Final = "sha256-"
_HASH_DIGITS: Final = 32
# States of a model that the admin endpoint tells, and what a pod that comes to the node would find; else nothing.
_FOUND: Final = {"resident": RESIDENT, "loading": RESIDENT, "stored": STORED}
# Weights of the scheduler's terms, of 1 to 100, which it adds up for each node. A model that has to be pulled costs many times
# what one costs that is read from disk, so the two are nearer to each other than to nothing.
_WEIGHTS: Final = {RESIDENT: 50, STORED: 30}
# How many models of a pod are looked at: each costs the scheduler two terms for each node.
MOST_MODELS: Final = 16


def label_of(model: str) -> str:
    """Return the key of the label that tells where ``model`` is: its name, or where that is not fit for a key, a hash of it."""
    if _FIT.fullmatch(model) and not model.startswith(_HASHED):
        return MODEL_PREFIX + model
    return MODEL_PREFIX + _HASHED + hashlib.sha256(model.encode()).hexdigest()[:_HASH_DIGITS]


def labels_of(states: Iterable[tuple[str, str]], most: int) -> dict[str, str]:
    """Return the labels of a node whose models are in these ``states``, as (name, state); at most ``most`` of them.

    A name that stands there several times is in the best of its states. Models in memory come before those on disk, and else
    the alphabet decides, so that the same models always have the same labels.
    """
    found: dict[str, str] = {}
    for name, state in states:
        if (value := _FOUND.get(state)) is not None and found.get(name) != RESIDENT:
            found[name] = value
    chosen = sorted(found, key=lambda name: (found[name] != RESIDENT, name))[:most]
    return {label_of(name): found[name] for name in chosen}


def preferred_terms(models: Sequence[str]) -> list[dict[str, Any]]:
    """Return the terms of ``preferredDuringSchedulingIgnoredDuringExecution`` for a pod that asks for ``models``."""
    return [
        {"weight": weight, "preference": {"matchExpressions": [{"key": label_of(model), "operator": "In", "values": [value]}]}}
        for model in dict.fromkeys(models)
        for value, weight in _WEIGHTS.items()
    ]


def score(terms: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> int:
    """Return what such terms are worth to the scheduler on a node with ``labels``: the sum of the weights of those that hold."""
    return sum(
        term["weight"]
        for term in terms
        if all(labels.get(each["key"]) in each["values"] for each in term["preference"]["matchExpressions"])
    )
