"""Thin client of the Trunkline sidecar: ``model("name")`` answers numpy arrays with numpy arrays.

from trunkline import model

m = model("classify")

def handle(event, context):
    with m.request() as r:
        r["image"][...] = picture(event.body)
        return {"scores": r.run().tolist()}
"""

from trunkline import errors
from trunkline.client import Model, Models, Request, counters, model, models, ready, transport_name
from trunkline.protocol import TensorSpec
from trunkline.signature import Signature

__all__ = [
    "Model",
    "Models",
    "Request",
    "Signature",
    "TensorSpec",
    "counters",
    "errors",
    "model",
    "models",
    "ready",
    "transport_name",
]
