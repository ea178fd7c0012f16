"""Tests that run while the image is built: the sidecar is replaced by a function, the rest is real."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from trunkline.errors import InvalidInput
from trunkline.testing import fake_models, signature

from .handler import handle

SIGNATURE = signature(
    "similar",
    inputs={"input_ids": ("int64", ("batch", "tokens")), "attention_mask": ("int64", ("batch", "tokens"))},
    outputs={"vector": ("float32", ("batch", 2))},
    symbols={"batch": (1, 64), "tokens": (2, 256)},
)


def answer(input_ids, attention_mask):
    """Direction by the number of tokens: texts of one length are alike."""
    angle = attention_mask.sum(1) / 10
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def post(body):
    with fake_models({"similar": (SIGNATURE, answer)}):
        return handle(SimpleNamespace(body=json.dumps(body).encode(), headers={}), None)["body"]["ranked"]


def test_texts_come_back_nearest_first():
    ranked = post({"query": "one two", "texts": ["one two three four", "three", "two one"]})
    assert [(entry["index"], entry["text"]) for entry in ranked] == [
        (2, "two one"),
        (1, "three"),
        (0, "one two three four"),
    ]
    assert ranked[0]["score"] == pytest.approx(1)


@pytest.mark.parametrize("body", [{}, {"query": "a"}, {"query": "a", "texts": []}, {"query": 1, "texts": ["a"]}, []])
def test_bodies_of_another_shape_are_the_callers_fault(body):
    with pytest.raises(InvalidInput):
        post(body)


def test_too_many_texts_are_refused_with_the_numbers():
    with pytest.raises(InvalidInput, match="65 texts were given, the model takes 1 to 64"):
        post({"query": "a", "texts": ["b"] * 64})
