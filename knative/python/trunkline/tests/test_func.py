"""Tests of the handler, without a sidecar: `pip install -e . pytest && pytest`."""

from function import new
from function.handler import handle
from trunkline.testing import fake_models, signature

CLASSIFY = signature(
    "classify",
    inputs={"image": ("float32", ("batch", 3, 224, 224))},
    outputs={"scores": ("float32", ("batch", 1000))},
)


def test_the_answer_names_the_inputs():
    with fake_models({"classify": (CLASSIFY, lambda image: image)}):
        answer = handle(None, None)
    assert answer["body"]["inputs"] == {"image": ["float32", "batch", 3, 224, 224]}


def test_the_function_lives():
    assert new().alive()[0]
