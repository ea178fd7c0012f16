"""Comparators A and B: a Flask function that holds its model itself, in the process that answers HTTP.

Environment: MODEL; WEIGHTS, a state dict, or several with ``:`` between them: the first is asked at ``/``, the others at ``/1``,
``/2`` and so on; COPIES: ``private`` (A: its own copy), ``mapped`` (A with a memory-mapped file, assigned, not copied) or
``shared`` (B, as ShmFaas does it: tensors over one shared memory segment); THREADS of torch, else torch chooses; DEVICE. All
import torch. Run as ``gunicorn benchmarks.comparators.torch_function:app``; the body is one float32 image [1, 3, side, side], the
answer the scores.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from flask import Flask, Response, request

from benchmarks.models import MODELS

DEVICE = os.environ.get("DEVICE", "cpu")
if "THREADS" in os.environ:
    torch.set_num_threads(int(os.environ["THREADS"]))


def _load(name: str, weights: str, copies: str) -> torch.nn.Module:
    if copies == "private":
        model = MODELS[name]()
        model.load_state_dict(torch.load(weights, weights_only=True))
        return model.eval().to(DEVICE)
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
    return model.eval().to(DEVICE)


NAME, COPIES = os.environ["MODEL"], os.environ.get("COPIES", "private")
HELD = [_load(NAME, weights, COPIES) for weights in os.environ["WEIGHTS"].split(os.pathsep)]
app = Flask(__name__)


def _scores(number: int, image: np.ndarray) -> torch.Tensor:
    with torch.inference_mode():
        return HELD[number](torch.from_numpy(image).to(DEVICE)).cpu()


@app.post("/", defaults={"number": 0})
@app.post("/<int:number>")
def call(number: int) -> Response:
    body = request.get_data()
    side = math.isqrt(len(body) // 12)
    return Response(_scores(number, np.frombuffer(body, np.float32).reshape(1, 3, side, side).copy()).numpy().tobytes())


@app.post("/json")
def call_json() -> Response:
    """Comparator H over HTTP: the same tensor as nested JSON lists."""
    return app.json.response(_scores(0, np.asarray(request.get_json(), np.float32)).tolist())
