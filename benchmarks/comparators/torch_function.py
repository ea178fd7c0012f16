"""Comparators A and B: a Flask function that holds its model itself, in the process that answers HTTP.

Environment: MODEL, WEIGHTS (a state dict), and COPIES: ``private`` (A: its own copy), ``mapped`` (A with a memory-mapped file,
assigned, not copied) or ``shared`` (B, as ShmFaas does it: tensors over one shared memory segment). All import torch.
Run as ``gunicorn benchmarks.comparators.torch_function:app``; the body is 1x3x224x224 float32, the answer the scores.
"""

from __future__ import annotations

import os

import numpy as np
import torch
from flask import Flask, Response, request

from benchmarks.models import MODELS, SIDE

torch.set_num_threads(int(os.environ.get("THREADS", "1")))


def _load(name: str, weights: str, copies: str) -> torch.nn.Module:
    if copies == "private":
        model = MODELS[name]()
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval()
    with torch.device("meta"):
        model = MODELS[name]()
    if copies == "mapped":
        state = torch.load(weights, weights_only=True, mmap=True)
    else:
        shapes = torch.load(weights, weights_only=True, map_location="meta")
        size_bytes = os.path.getsize(weights + ".segment")
        segment = torch.from_file(weights + ".segment", shared=True, size=size_bytes, dtype=torch.uint8)
        state, offset = {}, 0
        for key, like in shapes.items():
            count = like.numel() * like.element_size()
            state[key] = segment[offset : offset + count].view(like.dtype).view(like.shape)
            offset += -(-count // 64) * 64
    model.load_state_dict(state, assign=True)
    return model.eval()


MODEL = _load(os.environ["MODEL"], os.environ["WEIGHTS"], os.environ.get("COPIES", "private"))
app = Flask(__name__)


@app.post("/")
def call() -> Response:
    image = np.frombuffer(request.get_data(), np.float32).reshape(-1, 3, SIDE, SIDE).copy()
    with torch.inference_mode():
        return Response(MODEL(torch.from_numpy(image)).numpy().tobytes())


@app.post("/json")
def call_json() -> Response:
    """Comparator H over HTTP: the same tensor as nested JSON lists."""
    image = np.asarray(request.get_json(), np.float32)
    with torch.inference_mode():
        return app.json.response(MODEL(torch.from_numpy(image)).tolist())
