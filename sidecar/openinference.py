"""The Open Inference Protocol's wire format (v2, REST): what a request's bytes mean, and an answer as bytes. Pure.

A body is JSON, or JSON that tensors follow as raw bytes, in the order of the inputs (the binary tensor extension). Names,
datatypes and shapes are compared with the model's signature before anything is made of the data. Whatever the bytes
are, ``decode`` raises nothing but a RequestError.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from trunkline.errors import BodyTooLarge, InvalidInput, SignatureMismatch, UnsupportedTensor
from trunkline.oip import DATATYPES, DTYPES, MAX_TIMEOUT_US, SIGNATURE, SIGNATURE_ID
from trunkline.protocol import ITEM_BYTES, MAX_ARENA_BYTES, MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS, TensorSpec
from trunkline.signature import Signature

from sidecar.errors import BundleError
from sidecar.strictjson import elements, integer, load_json, members

Array = NDArray[Any]

# JSON is the dear way: what is parsed takes up to MOST_PARSED_BYTES of memory for a byte of text.
MAX_JSON_BYTES: Final = 16 << 20
MOST_PARSED_BYTES: Final = 32
# Nothing else runs in a process while it writes JSON, so more than tenths of a second of it are refused.
MAX_JSON_NUMBERS: Final = 250_000
MAX_ID: Final = 256

# Numbers that no model here takes.
_OTHERS: Final = {"UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64", "BF16": "bfloat16"}
_LENGTH: Final = re.compile(r"[0-9]{1,15}")
_TYPES: Final[Mapping[str, frozenset[type]]] = {
    "b": frozenset({bool}),
    "i": frozenset({int}),
    "u": frozenset({int}),
    "f": frozenset({int, float}),
}


class Wanted(NamedTuple):
    """An output to be sent, and whether as raw bytes."""

    name: str
    is_binary: bool


@dataclass(frozen=True)
class Inference:
    """A request: inputs by name, as the model takes them. ``id`` is None when there was none, ``timeout_us`` likewise.

    ``signature_id`` is that of the signature which the caller goes by, empty for any.
    """

    id: str | None
    inputs: Mapping[str, Array]
    outputs: tuple[Wanted, ...]
    timeout_us: int | None
    signature_id: str = ""


def json_length(announced: str | None, body_bytes: int) -> int:
    """Return how many bytes of a body are JSON, by its Inference-Header-Content-Length. Raises InvalidInput, BodyTooLarge."""
    length = body_bytes
    if announced is not None:
        if not _LENGTH.fullmatch(announced) or not 0 < int(announced) <= body_bytes:
            raise InvalidInput(
                f"Inference-Header-Content-Length is {announced[:20]!r}; it must be the length of the JSON, from 1 to the "
                f"body's {body_bytes} bytes",
                body_bytes=body_bytes,
            )
        length = int(announced)
    if length > MAX_JSON_BYTES:
        raise BodyTooLarge(
            f"the JSON has {length} bytes, at most {MAX_JSON_BYTES} are taken; send the tensors with the binary tensor extension",
            size_bytes=length,
            limit_bytes=MAX_JSON_BYTES,
        )
    return length


def decode(body: bytes, json_bytes: int, signature: Signature) -> Inference:
    """Return the request whose JSON is the first ``json_bytes`` of ``body``; arrays share the body's bytes where they can.

    Raises InvalidInput, SignatureMismatch, UnsupportedTensor, and nothing else.
    """
    try:
        plain = members(
            load_json(body[:json_bytes], "the body", MAX_JSON_BYTES),
            "the body",
            ("inputs",),
            # KServe's client says the name once more.
            ("id", "parameters", "outputs", "model_name"),
        )
        parameters = _parameters(plain, "the body", ("timeout", "binary_data_output", SIGNATURE_ID))
        signature_id = _signature_id(parameters)
        signature.check_current(signature_id, signature.model)
        parts = [_Part.of(each, f"inputs[{n}]") for n, each in enumerate(elements(plain["inputs"], "inputs", MAX_TENSORS))]
        signature.bind([(part.name, part.dtype, part.shape) for part in parts])
        return Inference(
            _id(plain),
            _arrays(parts, body, json_bytes),
            _wanted(plain, _flag(parameters, "binary_data_output", "the body"), signature),
            _timeout(parameters),
            signature_id,
        )
    except BundleError as error:
        # What reads JSON here speaks of bundles elsewhere.
        raise InvalidInput(error.message) from error


def encode(signature: Signature, name: str, asked: Inference, outputs: Mapping[str, Array]) -> tuple[bytes, int | None]:
    """Return the answer's body and, where raw bytes follow, the length of its JSON.

    Raises UnsupportedTensor, SignatureMismatch.
    """
    described = []
    raw: list[Array] = []
    numbers = 0
    for wanted in asked.outputs:
        if wanted.name not in outputs:
            raise SignatureMismatch(f"{name} was replaced while it was asked, and has no output {wanted.name!r} now; ask again")
        array = np.ascontiguousarray(outputs[wanted.name])
        entry: dict[str, object] = {
            "name": wanted.name,
            "datatype": DATATYPES[array.dtype.name],
            # Of the answer: ascontiguousarray gives a number one axis.
            "shape": list(outputs[wanted.name].shape),
        }
        if wanted.is_binary:
            entry["parameters"] = {"binary_data_size": array.nbytes}
            raw.append(array)
        else:
            numbers += array.size
            entry["data"] = _numbers(wanted.name, array, numbers)
        described.append(entry)
    plain: dict[str, object] = {"model_name": name, "model_version": signature.version}
    if asked.id is not None:
        plain["id"] = asked.id
    header = json.dumps(plain | {"outputs": described}, separators=(",", ":"), allow_nan=False).encode()
    if not raw:
        return header, None
    return b"".join([header, *(array.reshape(-1).view(np.uint8).data for array in raw)]), len(header)


def metadata(signature: Signature, name: str, versions: Sequence[str]) -> dict[str, object]:
    """Return what the protocol tells of a model that there is in these versions; an axis of any size is -1."""

    def tensors(specs: Iterable[TensorSpec]) -> list[dict[str, object]]:
        return [{"name": spec.name, "datatype": DATATYPES[spec.dtype], "shape": _dims(spec)} for spec in specs]

    return {
        "name": name,
        "versions": list(versions),
        "platform": "trunkline",
        "inputs": tensors(signature.inputs),
        "outputs": tensors(signature.outputs),
        # What functions need besides: bounds, the names of axes, an id. Values of parameters are no objects.
        "parameters": {SIGNATURE: json.dumps(signature.to_plain(), separators=(",", ":"))},
    }


def config(signature: Signature, name: str) -> dict[str, object]:
    """Return the same as Triton's configuration has it. Its ``max_batch_size`` 0 says that ``dims`` are whole shapes."""

    def tensors(specs: Iterable[TensorSpec]) -> list[dict[str, object]]:
        return [{"name": spec.name, "data_type": f"TYPE_{DATATYPES[spec.dtype]}", "dims": _dims(spec)} for spec in specs]

    return {
        "name": name,
        "platform": "trunkline",
        "backend": "trunkline",
        "max_batch_size": 0,
        "input": tensors(signature.inputs),
        "output": tensors(signature.outputs),
    }


def _dims(spec: TensorSpec) -> list[int]:
    return [axis if isinstance(axis, int) else -1 for axis in spec.shape]


class _Part(NamedTuple):
    """An input as it was described. ``binary_bytes`` is None where its ``data`` are in the JSON."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: object
    binary_bytes: int | None

    @classmethod
    def of(cls, value: object, place: str) -> _Part:
        plain = members(value, place, ("name", "shape", "datatype"), ("parameters", "data"))
        parameters = _parameters(plain, place, ("binary_data_size",))
        shape = elements(plain["shape"], f"{place}.shape", MAX_DIMENSIONS)
        binary_bytes = None
        if "binary_data_size" in parameters:
            binary_bytes = integer(parameters["binary_data_size"], f"{place}.parameters.binary_data_size", 0, MAX_ARENA_BYTES)
        if ("data" in plain) is (binary_bytes is not None):
            raise InvalidInput(
                f"{place} needs data, or parameters.binary_data_size where its bytes follow the JSON, and not both"
            )
        return cls(
            _name(plain["name"], f"{place}.name"),
            _dtype(plain["datatype"], place),
            tuple(integer(axis, f"{place}.shape", 0, MAX_ARENA_BYTES) for axis in shape),
            plain.get("data"),
            binary_bytes,
        )


def _name(value: object, place: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise InvalidInput(f"{place} must be a text of at most {MAX_NAME} characters")
    return value


def _dtype(value: object, place: str) -> str:
    if value == "BYTES":
        raise UnsupportedTensor(
            f"{place} is of datatype BYTES; models here take numbers, so texts and pictures are made numbers where they come from"
        )
    found = None if not isinstance(value, str) else DTYPES.get(value) or _OTHERS.get(value)
    if found is None:
        raise InvalidInput(f"{place}.datatype is none of {', '.join(DTYPES)}")
    return found


def _id(plain: Mapping[str, object]) -> str | None:
    value = plain.get("id")
    if value is not None and (not isinstance(value, str) or len(value) > MAX_ID):
        raise InvalidInput(f"id must be a text of at most {MAX_ID} characters")
    return value


def _parameters(plain: Mapping[str, object], place: str, known: Sequence[str]) -> Mapping[str, object]:
    """Return ``parameters``; one that would change the answer must not be taken for one that was left out."""
    value = plain.get("parameters", {})
    if isinstance(value, dict) and "shared_memory_region" in value:
        raise InvalidInput(f"{place}: clients cannot register shared memory here; send the tensor in the body")
    return members(value, f"{place}.parameters", (), known)


def _flag(parameters: Mapping[str, object], key: str, place: str, default: bool = False) -> bool:
    value = parameters.get(key, default)
    if not isinstance(value, bool):
        raise InvalidInput(f"{place}.parameters.{key} must be true or false")
    return value


def _timeout(parameters: Mapping[str, object]) -> int | None:
    if "timeout" not in parameters:
        return None
    return integer(parameters["timeout"], "parameters.timeout (microseconds)", 1, MAX_TIMEOUT_US)


def _signature_id(parameters: Mapping[str, object]) -> str:
    value = parameters.get(SIGNATURE_ID, "")
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise InvalidInput(f"parameters.{SIGNATURE_ID} must be a text of at most {MAX_NAME} characters")
    return value


def _wanted(plain: Mapping[str, object], is_binary: bool, signature: Signature) -> tuple[Wanted, ...]:
    specs = {spec.name: spec for spec in signature.outputs}
    found: dict[str, Wanted] = {}
    # An empty list is what clients send who leave the choice open.
    for number, value in enumerate(elements(plain.get("outputs", []), "outputs", MAX_TENSORS)):
        place = f"outputs[{number}]"
        entry = members(value, place, ("name",), ("parameters",))
        name = _name(entry["name"], f"{place}.name")
        if name not in specs or name in found:
            raise InvalidInput(f"{place} must be one of {', '.join(specs)}, each once")
        found[name] = Wanted(name, _flag(_parameters(entry, place, ("binary_data",)), "binary_data", place, is_binary))
    wanted = tuple(found.values()) or tuple(Wanted(name, is_binary) for name in specs)
    for each in wanted:
        if specs[each.name].dtype == "float16" and not each.is_binary:
            raise UnsupportedTensor(f"output {each.name} is FP16, which JSON does not carry; ask for it with binary_data")
    return wanted


def _arrays(parts: Sequence[_Part], body: bytes, json_bytes: int) -> dict[str, Array]:
    """Return the inputs. Raises InvalidInput unless the raw bytes are all of the body behind its JSON."""
    raw_bytes = sum(part.binary_bytes or 0 for part in parts)
    if raw_bytes != len(body) - json_bytes:
        raise InvalidInput(
            f"the inputs announce {raw_bytes} bytes behind the JSON, {len(body) - json_bytes} are there; compare "
            "binary_data_size, Inference-Header-Content-Length and Content-Length",
            announced_bytes=raw_bytes,
            body_bytes=len(body),
        )
    found = {}
    start = json_bytes
    for part in parts:
        if part.binary_bytes is None:
            found[part.name] = _from_json(part)
            continue
        # The signature has named the dtype, so it is one with a size.
        needed_bytes = math.prod(part.shape) * ITEM_BYTES[part.dtype]
        if part.binary_bytes != needed_bytes:
            raise InvalidInput(
                f"input {part.name} has a binary_data_size of {part.binary_bytes}, its shape and datatype take {needed_bytes}",
                announced_bytes=part.binary_bytes,
                needed_bytes=needed_bytes,
            )
        array = np.frombuffer(body, np.uint8, needed_bytes, start)
        start += needed_bytes
        if part.dtype == "bool" and array.size and array.max() > 1:
            raise InvalidInput(f"input {part.name} is BOOL and has bytes that are neither 0 nor 1")
        found[part.name] = array.view(np.dtype(part.dtype).newbyteorder("<")).reshape(part.shape)
    return found


def _from_json(part: _Part) -> Array:
    if part.dtype == "float16":
        raise UnsupportedTensor(f"input {part.name} is FP16, which JSON does not carry; send it as binary data")
    flat = _flat(part)
    dtype = np.dtype(part.dtype)
    if not set(map(type, flat)) <= _TYPES[dtype.kind]:
        raise InvalidInput(f"input {part.name} is {DATATYPES[part.dtype]}, and its data are of another kind")
    if dtype.kind in "iu" and flat and (min(flat) < np.iinfo(dtype).min or max(flat) > np.iinfo(dtype).max):
        raise InvalidInput(f"input {part.name} has numbers beyond {DATATYPES[part.dtype]}")
    try:
        with np.errstate(over="raise"):
            # Numbers of FP32 are rounded from those of FP64, once.
            found = np.array(flat, np.float64).astype(dtype) if dtype.kind == "f" else np.array(flat, dtype)
    except (OverflowError, FloatingPointError) as error:
        raise InvalidInput(f"input {part.name} has numbers beyond {DATATYPES[part.dtype]}") from error
    return found.reshape(part.shape)


def _flat(part: _Part) -> list[Any]:
    """Return the data as one list: they come as one, or nested as the shape says."""
    level = elements(part.data, f"data of input {part.name}", MAX_JSON_BYTES)
    if level and isinstance(level[0], list):
        level = [level]
        for size in part.shape:
            if not all(isinstance(each, list) and len(each) == size for each in level):
                raise InvalidInput(f"the data of input {part.name} are not nested as its shape {list(part.shape)}")
            level = list(chain.from_iterable(level))  # type: ignore[arg-type]
    if len(level) != math.prod(part.shape):
        raise InvalidInput(
            f"input {part.name} has {len(level)} numbers, its shape {list(part.shape)} takes {math.prod(part.shape)}",
            count=len(level),
        )
    return level


def _numbers(name: str, array: Array, count: int) -> list[Any]:
    if count > MAX_JSON_NUMBERS:
        raise UnsupportedTensor(
            f"the outputs are {count} numbers or more, JSON carries at most {MAX_JSON_NUMBERS} here; ask for binary_data",
            count=count,
            limit_count=MAX_JSON_NUMBERS,
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UnsupportedTensor(f"output {name} holds NaN or infinity, which JSON does not carry; ask for it with binary_data")
    found: list[Any] = array.reshape(-1).tolist()
    return found
