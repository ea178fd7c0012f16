from trunkline.testing import fake_models, signature

from function.handler import handle

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
