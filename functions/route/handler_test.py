"""Tests that run while the image is built: the sidecar is replaced by a function, the rest is real."""

from types import SimpleNamespace

import numpy as np
import pytest
from trunkline.errors import InvalidInput
from trunkline.testing import fake_models, signature

from .handler import INTENTS, handle

SIGNATURE = signature(
    "route",
    inputs={"input_ids": ("int64", ("batch", "tokens")), "attention_mask": ("int64", ("batch", "tokens"))},
    outputs={"confidence": ("float32", ("batch", len(INTENTS)))},
    symbols={"batch": (1, 64), "tokens": (2, 256)},
)


def answer(input_ids, attention_mask):
    return np.array([[0.125, 0.125, 0.5, 0.125, 0.125]], np.float32)


def post(body):
    with fake_models({"route": (SIGNATURE, answer)}):
        return handle(SimpleNamespace(body=body, headers={}), None)["body"]


def test_message_goes_to_the_desk_with_the_most_confidence():
    reply = post(b"Where is my parcel?")
    assert (reply["intent"], reply["confidence"]) == ("delivery", 0.5)
    assert list(reply["intents"]) == INTENTS


def test_empty_message_is_the_callers_fault():
    with pytest.raises(InvalidInput, match="no word"):
        post(b" \n ")
