"""The same model in ONNX Runtime, on the CPU."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch


def onnx_session(model: torch.nn.Module, example: torch.Tensor, threads: int) -> Callable[[np.ndarray], Any]:
    """Return the model as a function of one array. Raises ImportError where onnx or onnxruntime is not installed."""
    import onnx  # noqa: F401  (torch's exporter needs it, and says so less clearly)

    # It tells its makers what it is used for otherwise.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        # The exporter that traces takes a tenth of the time of its successor and needs no further package.
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (example,), file, input_names=["x"], dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda array: session.run(None, {"x": array})[0]
