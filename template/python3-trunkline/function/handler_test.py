import pytest
from trunkline.testing import fake_models, signature

from function.handler import handle

# faas-cli lays a function's files over these: without a handler_test.py of its own, a function gets this one.
pytestmark = pytest.mark.skipif("Replace this" not in (handle.__doc__ or ""), reason="the handler has no tests of its own")

CLASSIFY = signature(
    "classify",
    inputs={"image": ("float32", ("batch", 3, 224, 224))},
    outputs={"scores": ("float32", ("batch", 1000))},
)


def test_the_answer_names_the_inputs():
    with fake_models({"classify": (CLASSIFY, lambda image: image)}):
        answer = handle(None, None)
    assert answer["statusCode"] == 200
    assert answer["body"]["inputs"] == {"image": ["float32", "batch", 3, 224, 224]}
