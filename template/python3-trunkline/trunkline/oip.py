"""The Open Inference Protocol's bytes (v2, REST, binary tensors) as a function writes and reads them. Pure.

The sidecar's own half reads and writes the same tables of datatypes, and much more that other clients may send. Whatever an
answer's bytes are, reading it raises nothing but a MalformedFrame.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final

from trunkline import protocol
from trunkline.errors import MalformedFrame, TrunklineError, from_wire
from trunkline.protocol import MAX_MESSAGE, MAX_TENSORS, Placement

# The protocol's name of each dtype there is here.
DATATYPES: Final = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}
DTYPES: Final = {datatype: dtype for dtype, datatype in DATATYPES.items()}
# Says how many bytes of a body are JSON.
HEADER_LENGTH: Final = "Inference-Header-Content-Length"
# What a server names that does all a function needs: the two below, and the sizes and models told when it is greeted.
EXTENSION: Final = "trunkline"
# In a model's metadata, its signature as JSON: the protocol has no place for bounds, axes' names and ids. Its parameters are
# texts, numbers and truth values.
SIGNATURE: Final = "trunkline_signature"
# In a request, the id of the signature that the caller goes by.
SIGNATURE_ID: Final = "trunkline_signature_id"
MAX_TIMEOUT_US: Final = 600_000_000
# The JSON of an answer: its tensors are described, and follow it.
MAX_HEADER_BYTES: Final = 64 << 10

_LENGTH: Final = re.compile(r"[0-9]{1,15}")


def encode(
    inputs: Sequence[Placement], memory: Any, *, timeout_us: int, call_id: str = "", signature_id: str = ""
) -> tuple[bytes, int]:
    """Return the body of a request for tensors that lie in ``memory``, and the length of its JSON.

    Without a ``signature_id`` any version of the model will do.
    """
    parameters: dict[str, object] = {"binary_data_output": True, "timeout": timeout_us}
    if signature_id:
        parameters[SIGNATURE_ID] = signature_id
    described = [
        {
            "name": tensor.name,
            "datatype": DATATYPES[tensor.dtype],
            "shape": tensor.shape,
            "parameters": {"binary_data_size": tensor.size_bytes},
        }
        for tensor in inputs
    ]
    plain = {"id": call_id, "parameters": parameters, "inputs": described}
    header = json.dumps(plain, separators=(",", ":")).encode()
    whole = memoryview(memory)
    raw = (whole[tensor.offset : tensor.offset + tensor.size_bytes] for tensor in inputs)
    return b"".join([header, *raw]), len(header)


def decode(body: bytes, announced: str | None) -> tuple[Placement, ...]:
    """Return where in ``body`` the outputs lie; ``announced`` is its Inference-Header-Content-Length. Raises MalformedFrame."""
    if announced is None or not _LENGTH.fullmatch(announced) or not 0 < int(announced) <= min(len(body), MAX_HEADER_BYTES):
        raise MalformedFrame(f"an answer of {len(body)} bytes has no {HEADER_LENGTH} from 1 to {MAX_HEADER_BYTES}")
    offset = int(announced)
    outputs = load(body[:offset]).get("outputs")
    if not isinstance(outputs, list) or len(outputs) > MAX_TENSORS:
        raise MalformedFrame(f"the outputs must be a list of at most {MAX_TENSORS}")
    placements: list[Placement] = []
    for output in outputs:
        try:
            shape, size_bytes = output["shape"], output["parameters"]["binary_data_size"]
            fields = (output["name"], DTYPES.get(output["datatype"]), tuple(shape), offset)
        except (KeyError, TypeError) as error:
            raise MalformedFrame("an output needs name, datatype, shape, and its bytes behind the JSON") from error
        (placement,) = protocol.placements((fields,), "the outputs")
        if type(size_bytes) is not int or size_bytes != placement.size_bytes:
            raise MalformedFrame(
                f"output {placement.name[:64]!r} has another binary_data_size than the {placement.size_bytes} bytes that its "
                "shape and datatype take"
            )
        placements.append(placement)
        offset += placement.size_bytes
    if offset != len(body):
        raise MalformedFrame(f"the outputs announce {offset} bytes with their JSON, {len(body)} are there")
    return tuple(placements)


def signature_of(metadata: Mapping[str, Any]) -> Any:
    """Return the plain form of the signature in a model's metadata. Raises MalformedFrame."""
    parameters = metadata.get("parameters")
    text = parameters.get(SIGNATURE) if isinstance(parameters, dict) else None
    if not isinstance(text, str):
        raise MalformedFrame(f"the model's metadata have no {SIGNATURE} among their parameters")
    return load(text)


def error_of(body: bytes) -> TrunklineError:
    """Return what a server tells of a failure: ``{"error": message, "code", "retryable", "details"}``. Raises MalformedFrame."""
    plain = load(body)
    message = plain.get("error")
    told = protocol.fault(
        (
            protocol.FAULT,
            0,
            plain.get("code"),
            message[:MAX_MESSAGE] if isinstance(message, str) else None,
            plain.get("retryable"),
            plain.get("details"),
        )
    )
    return from_wire(told.code, told.message, told.details)


def load(text: bytes | str) -> dict[str, Any]:
    """Return the JSON object in ``text``. Raises MalformedFrame."""
    try:
        plain = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise MalformedFrame(f"an answer of {len(text)} bytes is not JSON") from error
    if not isinstance(plain, dict):
        raise MalformedFrame("an answer's JSON must be an object")
    return plain
