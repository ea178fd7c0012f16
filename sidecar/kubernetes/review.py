"""AdmissionReview, version 1: what the API server asks of the webhook, and what it is answered. Pure.

A pod is never refused: one that cannot be read goes on as it is, with a warning for whoever made it.
"""

from __future__ import annotations

import base64
import json
from typing import Any, Final

from sidecar.errors import BundleError
from sidecar.kubernetes.injection import Injection, UnreadablePod, patch_of
from sidecar.strictjson import load_json

_VERSION: Final = "admission.k8s.io/v1"
_KIND: Final = "AdmissionReview"
_POD: Final = {"group": "", "version": "v1", "kind": "Pod"}
# The API server takes no larger objects, and sends at most two: the new one, and the old.
LIMIT_BYTES: Final = 8 << 20
# Longer warnings may be cut on their way.
_WARNING_CHARACTERS: Final = 120


class BadReview(ValueError):
    """What was sent is no AdmissionReview that could be answered; the message says why."""


def answer(body: bytes, injection: Injection) -> dict[str, Any]:
    """Return the AdmissionReview that answers the one in ``body``. Raises BadReview."""
    request = _request(body)
    if {key: request["kind"].get(key) for key in _POD} != _POD or request.get("subResource"):
        return _allowed(request["uid"], warnings=("this webhook changes pods and nothing else; correct its rules",))
    # A pod's volumes and containers can be changed by nobody once it is there.
    if request.get("operation") != "CREATE":
        return _allowed(request["uid"])
    try:
        if not isinstance(pod := request.get("object"), dict):
            raise UnreadablePod("the request has no object")
        # Where the API server puts the pod, whatever that says itself.
        patch = patch_of(pod, injection.of(request.get("namespace")))
    except UnreadablePod as error:
        return _allowed(request["uid"], warnings=(f"the pod is left as it is: {error}",))
    return _allowed(request["uid"], patch.operations, patch.warnings)


def _request(body: bytes) -> dict[str, Any]:
    try:
        review = load_json(body, "the review", LIMIT_BYTES)
    except BundleError as error:
        raise BadReview(error.message) from error
    if not isinstance(review, dict) or (review.get("apiVersion"), review.get("kind")) != (_VERSION, _KIND):
        raise BadReview(f"the body must be an {_KIND} of {_VERSION}")
    request = review.get("request")
    if not isinstance(request, dict) or not isinstance(uid := request.get("uid"), str) or not uid:
        raise BadReview("the review must have a request with a uid")
    if not isinstance(request.get("kind"), dict):
        raise BadReview("the request must tell the kind of its object")
    return request


def _allowed(uid: str, operations: Any = (), warnings: Any = ()) -> dict[str, Any]:
    response: dict[str, Any] = {"uid": uid, "allowed": True}
    if operations:
        text = json.dumps(list(operations), separators=(",", ":"))
        response |= {"patchType": "JSONPatch", "patch": base64.b64encode(text.encode()).decode()}
    if warnings:
        response["warnings"] = [f"trunkline: {warning}"[:_WARNING_CHARACTERS] for warning in warnings]
    return {"apiVersion": _VERSION, "kind": _KIND, "response": response}
