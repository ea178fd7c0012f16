"""Tests that run while the image is built: the sidecar is replaced by a function, the rest is real."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from trunkline.errors import InvalidInput
from trunkline.testing import fake_models, signature

from .handler import LABELS, handle

SIGNATURE = signature(
    "classify",
    inputs={"image": ("float32", ("batch", 3, 224, 224))},
    outputs={"probability": ("float32", ("batch", 1000))},
)


def post(body):
    return handle(SimpleNamespace(body=body, headers={}), None)


def png(colour):
    body = io.BytesIO()
    Image.new("RGB", (300, 200), colour).save(body, "PNG")
    return body.getvalue()


def test_picture_reaches_the_model_scaled_and_labels_come_back_best_first():
    seen = []

    def answer(image):
        seen.append(image)
        probabilities = np.zeros((1, 1000), np.float32)
        probabilities[0, [7, 284, 1, 2, 3]] = 0.5, 0.25, 0.12, 0.08, 0.05
        return probabilities

    with fake_models({"classify": (SIGNATURE, answer)}):
        reply = post(png((255, 127, 0)))
    labels = reply["body"]["labels"]
    assert [entry["label"] for entry in labels] == [LABELS[number] for number in (7, 284, 1, 2, 3)]
    assert labels[0]["probability"] == 0.5
    assert seen[0].shape == (1, 3, 224, 224)
    assert (seen[0] == np.array([1, 0, -127 / 128], np.float32)[:, None, None]).all()


def test_body_that_is_no_picture_is_the_callers_fault():
    with pytest.raises(InvalidInput, match="11 bytes"):
        post(b"hello world")
