"""The Open Inference Protocol's bytes: what they mean, and that nothing but our own refusals comes of bad ones."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trunkline import oip
from trunkline.errors import BodyTooLarge, InvalidInput, RequestError, SignatureMismatch, UnsupportedTensor
from trunkline.protocol import TensorSpec
from trunkline.signature import Signature

from sidecar import openinference
from sidecar.openinference import (
    MAX_JSON_BYTES,
    MAX_JSON_NUMBERS,
    Inference,
    Wanted,
    config,
    decode,
    encode,
    json_length,
    metadata,
)

NUMBERS = Signature(
    "m",
    "7",
    (TensorSpec("x", "float32", ("batch", 2)), TensorSpec("n", "int64", ("batch",))),
    (TensorSpec("y", "float32", ("batch", 2)), TensorSpec("z", "int64", ())),
    {"batch": (1, 8)},
)
HALF = Signature("h", "1", (TensorSpec("x", "float16", (2,)),), (TensorSpec("y", "float16", (2,)),), {})
X = {"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.5, 2]}
N = {"name": "n", "shape": [1], "datatype": "INT64", "data": [3]}


def of_one(dtype: str, *shape: int) -> Signature:
    return Signature("m", "1", (TensorSpec("x", dtype, shape),), (TensorSpec("y", dtype, shape),), {})


def decoded(plain: object, raw: bytes = b"", signature: Signature = NUMBERS) -> Inference:
    header = json.dumps(plain).encode()
    return decode(header + raw, len(header), signature)


def test_inputs_come_as_json_flat_or_nested() -> None:
    for data in ([1.5, 2, 3, 4], [[1.5, 2], [3, 4]]):
        found = decoded({"inputs": [X | {"shape": [2, 2], "data": data}, N | {"shape": [2], "data": [5, -6]}]})
        assert found.inputs["x"].dtype == np.float32
        assert found.inputs["x"].tolist() == [[1.5, 2], [3, 4]]
        assert found.inputs["n"].tolist() == [5, -6]
    assert found.id is None
    assert found.timeout_us is None
    assert found.outputs == (Wanted("y", False), Wanted("z", False))


def test_inputs_come_as_bytes_wherever_they_lie() -> None:
    x = np.array([[1.5, -0.0]], "<f4")
    for pad in range(4):
        plain = {
            "id": "a" * pad,
            "model_name": "whatever",
            "parameters": {"binary_data_output": True, "timeout": 5},
            "inputs": [
                {"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}},
                {"name": "n", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}},
            ],
            "outputs": [{"name": "z", "parameters": {"binary_data": False}}, {"name": "y"}],
        }
        found = decoded(plain, x.tobytes() + np.array([3], "<i8").tobytes())
        assert found.inputs["x"].tobytes() == x.tobytes()
        assert found.inputs["n"].tolist() == [3]
        assert (found.id, found.timeout_us) == ("a" * pad, 5)
        assert found.outputs == (Wanted("z", False), Wanted("y", True))


def test_bytes_and_json_in_one_request() -> None:
    binary = {"name": "n", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}
    assert decoded({"inputs": [X, binary]}, bytes(8)).inputs["n"].tolist() == [0]


@pytest.mark.parametrize("dtype", openinference.DATATYPES)
def test_every_dtype_comes_back_as_it_went(dtype: str) -> None:
    signature = of_one(dtype, 2, 2)
    array = np.array([[0, 1], [1, 0]], dtype)
    asked = {"name": "x", "shape": [2, 2], "datatype": openinference.DATATYPES[dtype]}
    plain = {"inputs": [asked | {"parameters": {"binary_data_size": array.nbytes}}], "parameters": {"binary_data_output": True}}
    found = decoded(plain, array.tobytes(), signature)
    assert found.inputs["x"].dtype == array.dtype
    body, length = encode(signature, "m", found, {"y": found.inputs["x"]})
    assert length is not None
    assert body[length:] == array.tobytes()
    told = json.loads(body[:length])["outputs"]
    assert told == [
        {"name": "y", "datatype": asked["datatype"], "shape": [2, 2], "parameters": {"binary_data_size": array.nbytes}}
    ]
    if dtype != "float16":
        found = decoded({"inputs": [asked | {"data": array.tolist()}]}, signature=signature)
        assert found.inputs["x"].dtype == array.dtype
        body, length = encode(signature, "m", found, {"y": found.inputs["x"]})
        assert length is None
        assert json.loads(body)["outputs"][0]["data"] == array.reshape(-1).tolist()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_numbers_of_fp32_survive_json_to_the_bit(values: list[float]) -> None:
    array = np.array(values, np.float32)
    signature = of_one("float32", len(values))
    asked = {"name": "x", "shape": [len(values)], "datatype": "FP32", "data": array.tolist()}
    found = decoded({"inputs": [asked]}, signature=signature)
    assert found.inputs["x"].tobytes() == array.tobytes()
    body, _ = encode(signature, "m", found, {"y": array})
    assert np.array(json.loads(body)["outputs"][0]["data"], np.float32).tobytes() == array.tobytes()


def test_an_answer_tells_model_version_and_id() -> None:
    asked = Inference("x\ud800\n", {}, (Wanted("z", False), Wanted("y", True)), None)
    y = np.ones((1, 2), np.float32)
    body, length = encode(NUMBERS, "known-as", asked, {"y": y, "z": np.array(4)})
    assert length == len(body) - 8
    assert json.loads(body[:length]) == {
        "model_name": "known-as",
        "model_version": "7",
        "id": "x\ud800\n",
        "outputs": [
            {"name": "z", "datatype": "INT64", "shape": [], "data": [4]},
            {"name": "y", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
        ],
    }


def test_an_answer_that_cannot_be_json_is_refused() -> None:
    asked = Inference(None, {}, (Wanted("y", False),), None)
    for bad in (np.nan, np.inf):
        with pytest.raises(UnsupportedTensor, match=r"output y holds NaN or infinity.*binary_data"):
            encode(NUMBERS, "m", asked, {"y": np.array([[bad, 1]], np.float32)})
    with pytest.raises(UnsupportedTensor, match="250001 numbers or more, JSON carries at most 250000"):
        encode(NUMBERS, "m", asked, {"y": np.zeros(MAX_JSON_NUMBERS + 1, np.float32)})
    with pytest.raises(SignatureMismatch, match="was replaced while it was asked"):
        encode(NUMBERS, "m", asked, {"other": np.zeros(1)})


@pytest.mark.parametrize(
    ("plain", "problem"),
    [
        ([], "must be an object"),
        ({}, "'inputs' is missing"),
        ({"inputs": {}}, "inputs: must be a list"),
        ({"inputs": [X] * 17}, "has 17 elements, the limit is 16"),
        ({"inputs": [X, N], "output": []}, "unknown field 'output'"),
        ({"inputs": [X, N], "id": 7}, "id must be a text"),
        ({"inputs": [X, N], "id": "x" * 257}, "at most 256"),
        ({"inputs": [X, N], "parameters": {"sequence_id": 1}}, "unknown field 'sequence_id'"),
        ({"inputs": [X, N], "parameters": {"timeout": 0}}, r"parameters.timeout \(microseconds\): 0 is outside 1"),
        ({"inputs": [X, N], "parameters": {"timeout": True}}, "must be an integer"),
        ({"inputs": [X, N], "parameters": {"binary_data_output": 1}}, "must be true or false"),
        ({"inputs": [X, N], "outputs": [{"name": "w"}]}, r"outputs\[0\] must be one of y, z"),
        ({"inputs": [X, N], "outputs": [{"name": "y"}, {"name": "y"}]}, r"outputs\[1\].*each once"),
        ({"inputs": [X, N], "outputs": [{"name": 1}]}, "must be a text"),
        ({"inputs": [X, N], "outputs": [{"name": "y", "parameters": {"classification": 3}}]}, "unknown field 'classification'"),
        ({"inputs": [X, N], "outputs": [{"name": "y", "parameters": {"shared_memory_region": "r"}}]}, "cannot register shared"),
        ({"inputs": [X | {"parameters": {"shared_memory_region": "r"}}, N]}, "cannot register shared"),
        ({"inputs": [X | {"name": "x" * 129}, N]}, "at most 128 characters"),
        ({"inputs": [X | {"name": 1}, N]}, "must be a text"),
        ({"inputs": [X | {"datatype": "float32"}, N]}, r"inputs\[0\].datatype is none of BOOL, UINT8"),
        ({"inputs": [X | {"datatype": []}, N]}, "datatype is none of"),
        ({"inputs": [X | {"datatype": "BYTES"}, N]}, "datatype BYTES; models here take numbers"),
        ({"inputs": [X | {"datatype": "BF16"}, N]}, "takes x as float32, got bfloat16"),
        ({"inputs": [X | {"datatype": "UINT64"}, N]}, "takes x as float32, got uint64"),
        ({"inputs": [X | {"datatype": "FP64"}, N]}, "takes x as float32, got float64"),
        ({"inputs": [X]}, "'n' is missing"),
        ({"inputs": [X, X, N]}, "'x' comes twice"),
        ({"inputs": [X, N, N | {"name": "o"}]}, "has no input 'o'"),
        ({"inputs": [X | {"shape": [1, 3]}, N]}, "axis 1 must be 2"),
        ({"inputs": [X | {"shape": [9, 2]}, N]}, "from 1 to 8, got 9"),
        ({"inputs": [X | {"shape": [2, 2], "data": [1.0] * 4}, N]}, "takes inputs of one batch"),
        ({"inputs": [X | {"shape": [-1, 2]}, N]}, "-1 is outside"),
        ({"inputs": [X | {"shape": [1.0, 2]}, N]}, "must be an integer"),
        ({"inputs": [X | {"shape": [1] * 9}, N]}, "has 9 elements, the limit is 8"),
        ({"inputs": [X | {"shape": "12"}, N]}, "must be a list"),
        ({"inputs": [X | {"data": 1}, N]}, "data of input x: must be a list"),
        ({"inputs": [X | {"data": [1]}, N]}, r"has 1 numbers, its shape \[1, 2\] takes 2"),
        ({"inputs": [X | {"data": [[1], [2]]}, N]}, r"not nested as its shape \[1, 2\]"),
        ({"inputs": [X | {"data": [[1, 2], 3]}, N]}, "not nested as its shape"),
        ({"inputs": [X | {"data": [[1, [2]]]}, N]}, "x is FP32, and its data are of another kind"),
        ({"inputs": [X | {"data": [1, True]}, N]}, "x is FP32, and its data are of another kind"),
        ({"inputs": [X | {"data": ["1", 2]}, N]}, "another kind"),
        ({"inputs": [X | {"data": [1, None]}, N]}, "another kind"),
        ({"inputs": [X | {"data": [1, 1e39]}, N]}, "x has numbers beyond FP32"),
        ({"inputs": [X | {"data": [1, 10**400]}, N]}, "x has numbers beyond FP32"),
        ({"inputs": [X, N | {"data": [1.0]}]}, "n is INT64, and its data are of another kind"),
        ({"inputs": [X, N | {"data": [2**63]}]}, "n has numbers beyond INT64"),
        ({"inputs": [X, N | {"parameters": {"binary_data_size": 8}}]}, "not both"),
        ({"inputs": [X, {"name": "n", "shape": [1], "datatype": "INT64"}]}, "needs data, or parameters.binary_data_size"),
        ({"inputs": [X, {"name": "n", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}]}, "0 are there"),
        ({"inputs": [X, {"name": "n", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": -8}}]}, "outside 0"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_why(plain: object, problem: str) -> None:
    with pytest.raises(RequestError, match=problem) as caught:
        decoded(plain)
    assert caught.value.http_status == 400


@pytest.mark.parametrize(
    ("size", "raw", "problem"),
    [
        (8, 7, "announce 8 bytes behind the JSON, 7 are there"),
        (8, 9, "announce 8 bytes behind the JSON, 9 are there"),
        (7, 7, "binary_data_size of 7, its shape and datatype take 8"),
        (16, 16, "binary_data_size of 16, its shape and datatype take 8"),
    ],
)
def test_bytes_that_are_too_few_or_too_many(size: int, raw: int, problem: str) -> None:
    binary = {"name": "n", "shape": [1], "datatype": "INT64", "parameters": {"binary_data_size": size}}
    with pytest.raises(InvalidInput, match=problem):
        decoded({"inputs": [X, binary]}, bytes(raw))


def test_fp16_is_for_bytes_only() -> None:
    described: dict[str, Any] = {"name": "x", "shape": [2], "datatype": "FP16"}
    binary = described | {"parameters": {"binary_data_size": 4}}
    with pytest.raises(UnsupportedTensor, match="input x is FP16"):
        decoded({"inputs": [described | {"data": [1, 2]}], "parameters": {"binary_data_output": True}}, signature=HALF)
    with pytest.raises(UnsupportedTensor, match="output y is FP16"):
        decoded({"inputs": [binary]}, bytes(4), HALF)


def test_a_truth_value_is_0_or_1() -> None:
    described = {"name": "x", "shape": [2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}}
    with pytest.raises(InvalidInput, match="neither 0 nor 1"):
        decoded({"inputs": [described]}, b"\x01\x02", of_one("bool", 2))


def test_an_axis_may_be_empty() -> None:
    for raw in ({"data": []}, {"parameters": {"binary_data_size": 0}}):
        found = decoded({"inputs": [{"name": "x", "shape": [0, 2], "datatype": "FP32"} | raw]}, signature=of_one("float32", 0, 2))
        assert found.inputs["x"].shape == (0, 2)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b'{"inputs": NaN}', b"[" * 100_000, b'{"id": "", "id": ""}'])
def test_what_is_not_json_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidInput, match="the body"):
        decode(body, len(body), NUMBERS)


def test_the_length_of_the_json_is_looked_at_before_the_json() -> None:
    assert json_length(None, 7) == 7
    assert json_length("5", 7) == 5
    for bad in ("0", "8", "-1", "x", "", "1e1", "\u0665", "9" * 30):
        with pytest.raises(InvalidInput, match="from 1 to the body's 7 bytes"):
            json_length(bad, 7)
    with pytest.raises(BodyTooLarge, match="binary tensor extension"):
        json_length(None, MAX_JSON_BYTES + 1)
    assert json_length("9", MAX_JSON_BYTES + 1) == 9


def test_what_is_told_of_a_model() -> None:
    x, n = {"name": "x", "shape": [-1, 2]}, {"name": "n", "shape": [-1]}
    y, z = {"name": "y", "shape": [-1, 2]}, {"name": "z", "shape": list[int]()}
    told = metadata(NUMBERS, "m", ["6", "7"])
    # What functions need, and the protocol has no place for.
    assert Signature.from_plain(oip.signature_of(told)) == NUMBERS
    assert told == {
        "parameters": told["parameters"],
        "name": "m",
        "versions": ["6", "7"],
        "platform": "trunkline",
        "inputs": [x | {"datatype": "FP32"}, n | {"datatype": "INT64"}],
        "outputs": [y | {"datatype": "FP32"}, z | {"datatype": "INT64"}],
    }
    told = config(NUMBERS, "m")
    assert told["max_batch_size"] == 0
    assert told["input"] == [
        {"name": "x", "data_type": "TYPE_FP32", "dims": [-1, 2]},
        {"name": "n", "data_type": "TYPE_INT64", "dims": [-1]},
    ]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
NEARLY = {
    "name": st.sampled_from(["x", "n", "y", "z"]) | JSON,
    "shape": st.lists(st.integers(0, 4), max_size=3) | JSON,
    "datatype": st.sampled_from([*openinference.DATATYPES.values(), "BF16", "BYTES"]) | JSON,
    "data": st.lists(st.integers(-5, 5) | st.floats(-5, 5), max_size=4) | JSON,
    "parameters": st.fixed_dictionaries({}, optional={"binary_data_size": st.integers(0, 16) | JSON, "binary_data": JSON}) | JSON,
}
TENSOR = st.fixed_dictionaries({}, optional=NEARLY)
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON,
        "inputs": st.lists(st.sampled_from([X, N]) | TENSOR, max_size=3) | JSON,
        "outputs": st.lists(TENSOR, max_size=3) | JSON,
        "parameters": st.fixed_dictionaries({}, optional={"timeout": JSON, "binary_data_output": JSON}) | JSON,
    },
)


@given(REQUEST | JSON, st.binary(max_size=24), st.integers(-3, 3), st.sampled_from([NUMBERS, HALF, of_one("bool", 2)]))
def test_whatever_comes_is_understood_or_refused(plain: object, raw: bytes, off: int, signature: Signature) -> None:
    header = json.dumps(plain).encode()
    body = header + raw
    try:
        found = decode(body, min(max(len(header) + off, 1), len(body)), signature)
    except RequestError as error:
        assert error.http_status == 400
    else:
        signature.bind([(name, array.dtype.name, array.shape) for name, array in found.inputs.items()])


@given(st.binary(max_size=60), st.integers(1, 60))
def test_whatever_bytes_come_are_refused(body: bytes, length: int) -> None:
    with pytest.raises(RequestError):
        decode(body, length, NUMBERS)
