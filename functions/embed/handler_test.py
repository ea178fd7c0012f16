"""Tests that run while the image is built: the sidecar is replaced by a function, the rest is real."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from trunkline.errors import InvalidInput
from trunkline.testing import fake_models, signature

from .handler import handle

SIGNATURE = signature(
    "embed",
    inputs={"input_ids": ("int64", ("batch", "tokens")), "attention_mask": ("int64", ("batch", "tokens"))},
    outputs={"vector": ("float32", ("batch", 2))},
    symbols={"batch": (1, 64), "tokens": (2, 256)},
)


def answer(input_ids, attention_mask):
    """Number of tokens, and the id of the first word."""
    return np.stack([attention_mask.sum(1), input_ids[:, 1]], axis=1).astype(np.float32)


def post(body, kind="text/plain"):
    with fake_models({"embed": (SIGNATURE, answer)}):
        return handle(SimpleNamespace(body=body, headers={"Content-Type": kind}), None)["body"]["vectors"]


def test_one_text_gives_one_vector():
    assert post(b"hello world") == [[4, 7592]]


def test_texts_of_different_lengths_are_padded_and_masked():
    body = json.dumps({"texts": ["hello", "hello world, hello"]}).encode()
    assert post(body, "application/json; charset=utf-8") == [[3, 7592], [6, 7592]]


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", "text/plain", "no word"),
        (b"\xff", "text/plain", "not UTF-8 at byte 0"),
        (b"word " * 255, "text/plain", "257 tokens, the model takes at most 256"),
        (b"{", "application/json", "not JSON"),
        (b'{"texts": "hello"}', "application/json", "must look like"),
        (b'{"texts": []}', "application/json", "0 texts were given, the model takes 1 to 64"),
        (b'{"texts": ["a", 7]}', "application/json", "text 1 is of type int"),
    ],
)
def test_bad_bodies_are_the_callers_fault(body, kind, words):
    with pytest.raises(InvalidInput, match=words):
        post(body, kind)
