"""The function that the benchmarks measure: raw float32 image in, raw scores out, written straight into shared memory."""

import os

import numpy as np
from trunkline import model

m = model(os.environ["MODEL"])
INPUT = os.environ.get("INPUT", "image")


def handle(event, context):
    with m.request() as request:
        request[INPUT].reshape(-1)[...] = np.frombuffer(event.body, np.float32)
        return request.run().tobytes()
