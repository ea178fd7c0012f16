"""classify: a JPEG or PNG picture to its five most probable ImageNet labels."""

from pathlib import Path

import numpy as np
from trunkline import model

from . import picture

m = model("classify")
LABELS = [line for line in Path(__file__).with_name("labels.txt").read_text().splitlines() if line[0] != "#"]


def handle(event, context):
    pixels = picture.square(event.body)
    with m.request() as request:
        # The model takes (value - 127) / 128, written straight into the memory it shares with the sidecar.
        image = request["image"][0]
        np.subtract(pixels.transpose(2, 0, 1), np.float32(127), out=image)
        image /= 128
        probabilities = request.run()[0]
    best = probabilities.argsort()[:-6:-1]
    labels = [{"label": LABELS[i], "probability": float(probabilities[i])} for i in best]
    return {"statusCode": 200, "body": {"labels": labels}}
