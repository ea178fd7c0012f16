"""embed: one text, or JSON {"texts": [...]}, to vectors of unit length, whose dot products say how alike texts are."""

from trunkline import model
from trunkline.errors import InvalidInput

from . import texts

m = model("embed")


def handle(event, context):
    if event.headers.get("Content-Type", "").startswith("application/json"):
        given = texts.read_json(event.body).get("texts")
        if not isinstance(given, list):
            raise InvalidInput('JSON must look like {"texts": ["one text", "another"]}')
    else:
        given = [texts.read_text(event.body)]
    return {"statusCode": 200, "body": {"vectors": texts.run(m, given).tolist()}}
