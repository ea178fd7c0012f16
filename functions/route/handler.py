"""route: a customer's message to the desk that should answer it, with the confidence in each desk."""

from pathlib import Path

from trunkline import model

from . import texts

m = model("route")
INTENTS = Path(__file__).with_name("intents.txt").read_text().split()


def handle(event, context):
    (confidences,) = texts.run(m, [texts.read_text(event.body)]).tolist()
    intents = dict(zip(INTENTS, confidences, strict=True))
    best = max(intents, key=intents.__getitem__)
    return {"statusCode": 200, "body": {"intent": best, "confidence": intents[best], "intents": intents}}
