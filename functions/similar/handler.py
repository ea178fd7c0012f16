"""similar: JSON {"query": "...", "texts": [...]} to the texts, those that ask the same as the query first."""

from trunkline import model
from trunkline.errors import InvalidInput

from . import texts

m = model("similar")


def handle(event, context):
    body = texts.read_json(event.body)
    query, given = body.get("query"), body.get("texts")
    if not isinstance(query, str) or not isinstance(given, list) or not given:
        raise InvalidInput('the body must look like {"query": "a text", "texts": ["one text", "another"]}')
    # One call for all: row 0 is the query. Rows have unit length, so a dot product is a cosine.
    vectors = texts.run(m, [query, *given])
    scores = vectors[1:] @ vectors[0]
    ranked = [{"index": int(i), "text": given[i], "score": float(scores[i])} for i in (-scores).argsort(kind="stable")]
    return {"statusCode": 200, "body": {"ranked": ranked}}
