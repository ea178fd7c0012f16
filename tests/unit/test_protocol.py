"""The wire's encoding: what goes in comes out, and nothing else gets in."""

from __future__ import annotations

from pathlib import Path

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trunkline import protocol
from trunkline.arguments import traced
from trunkline.errors import FrameTooLarge, MalformedFrame
from trunkline.protocol import (
    Coder,
    Command,
    Describe,
    Document,
    Fault,
    Hello,
    Infer,
    Placement,
    Result,
    Welcome,
    decode,
    encode,
)

GOLDEN = Path(__file__).parent.parent / "golden" / "wire"
TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"

EXAMPLES: dict[str, protocol.Message] = {
    "hello": Hello(1, 1, b"secret", "classify/7", 602_112, 65_536, ("classify", "embed")),
    "describe": Describe(17, "classify"),
    "infer": Infer(
        18,
        30_000_000,
        "call-1",
        "embed",
        "5ca1ab1e5ca1ab1e",
        (Placement("input_ids", "int64", (2, 16), 0), Placement("attention_mask", "int64", (2, 16), 256)),
    ),
    "command": Command(19, "status", 2),
    "welcome": Welcome(1, 5, 602_112, 65_536, "sealed", 3),
    "document": Document(19, 1234),
    "result": Result(18, (Placement("vectors", "float32", (2, 384), 0),)),
    "fault": Fault(18, "queue_full", "256 requests are waiting", True, {"limit_count": 256, "ratio": 1.5, "who": "a"}),
}

# What version 2 has besides.
NEWER: dict[str, protocol.Message] = {"traced-infer": EXAMPLES["infer"]._replace(traceparent=TRACEPARENT)}  # type: ignore[union-attr]

names = st.text(max_size=protocol.MAX_NAME)
ids = st.integers(0, protocol.MAX_ID)
sizes = st.integers(0, protocol.MAX_ARENA_BYTES)
placements = st.lists(
    st.builds(
        Placement,
        st.text(max_size=20),
        st.sampled_from(list(protocol.ITEM_BYTES)),
        st.lists(st.integers(0, 2**20), max_size=4).map(tuple),
        sizes,
    ),
    max_size=6,
).map(tuple)
messages = st.one_of(
    st.builds(Describe, ids, names),
    st.builds(
        Infer,
        *(ids, st.integers(1, protocol.MAX_DEADLINE_US), names, names, names, placements),
        st.just("") | st.from_regex(protocol.TRACEPARENT, fullmatch=True),
    ),
    st.builds(Result, ids, placements),
    st.builds(Document, ids, sizes),
    st.builds(Command, ids, names, sizes),
)


@pytest.mark.parametrize(
    ("version", "name", "message"),
    [*(("v1", *each) for each in EXAMPLES.items()), *(("v2", *each) for each in NEWER.items())],
)
def test_golden_frames_never_change(version: str, name: str, message: protocol.Message) -> None:
    """Images of functions live longer than sidecars: the bytes of a released version stay as they are."""
    frame = bytes.fromhex((GOLDEN / version / f"{name}.hex").read_text())
    assert encode(message) == frame
    assert decode(frame) == message


@pytest.mark.parametrize(
    "traceparent",
    [
        "",
        TRACEPARENT.upper(),
        TRACEPARENT[:-1],
        f"{TRACEPARENT}0",
        f"{TRACEPARENT}\n",
        f"ff{TRACEPARENT[2:]}",
        f"01{TRACEPARENT[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01",
        TRACEPARENT.replace("-", "_"),
        TRACEPARENT.replace("4", "\u0664"),
        TRACEPARENT.encode(),
        7,
        None,
    ],
)
def test_what_is_no_traceparent_is_dropped_by_the_client_and_refused_by_the_server(traceparent: object) -> None:
    with pytest.raises(MalformedFrame):
        decode(msgpack.packb([3, 1, 1, "c", traceparent, "m", "s", []]))
    coder = Coder()
    coder.decode(encode(Infer(1, 1, "c", "m", "s", ())))
    with pytest.raises(MalformedFrame):
        coder.decode(msgpack.packb([3, 1, 1, "c", traceparent, "m", "s", []]))
    if isinstance(traceparent, str) and traceparent.strip() != TRACEPARENT:
        assert traced(traceparent) == ""


def test_a_header_with_spaces_around_it_is_a_traceparent() -> None:
    assert traced(f" {TRACEPARENT} ") == TRACEPARENT


def test_a_coder_takes_calls_with_and_without_a_trace_by_turns() -> None:
    sender, receiver, inputs = Coder(), Coder(), (Placement("x", "float32", (1, 3), 0),)
    kept = None
    for number in range(6):
        message = Infer(number, 1000 + number, f"call {number}", "m", "s", inputs, TRACEPARENT if number % 2 else "")
        frame = sender.encode(message)
        assert frame == encode(message)
        assert (b"4bf92f" in frame) == bool(number % 2)
        decoded = receiver.decode(frame)
        assert decoded == message
        assert isinstance(decoded, Infer)
        # The placements are not decoded anew.
        assert kept is None or decoded.inputs is kept
        kept = decoded.inputs


@given(messages)
def test_round_trip(message: protocol.Message) -> None:
    try:
        frame = encode(message)
    except FrameTooLarge:
        return
    assert len(frame) <= protocol.MAX_FRAME_BYTES
    assert decode(frame) == message


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_decoded_never_worse(frame: bytes) -> None:
    try:
        decode(frame)
    except (MalformedFrame, FrameTooLarge):
        pass


@settings(max_examples=500)
@given(st.sampled_from(sorted(EXAMPLES)), st.data())
def test_mutated_frames_are_refused_or_decoded_never_worse(name: str, data: st.DataObject) -> None:
    frame = bytearray(encode(EXAMPLES[name]))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    try:
        decode(bytes(frame))
    except (MalformedFrame, FrameTooLarge):
        pass


@pytest.mark.parametrize(
    ("what", "value"),
    [
        ("a map instead of an array", {1: 2}),
        ("an empty array", []),
        ("no kind", ["hello"]),
        ("an unknown kind", [99, 1]),
        ("too few fields", [2, 1]),
        ("too many fields", [2, 1, "m", 1]),
        ("a negative id", [2, -1, "m"]),
        ("an id that is a bool", [2, True, "m"]),
        ("an id of 64 bits", [2, 2**64 - 1, "m"]),
        ("a name that is bytes", [2, 1, b"m"]),
        ("a name too long", [2, 1, "m" * 129]),
        ("a deadline of zero", [3, 1, "m", 0, "", []]),
        ("a tensor of three fields", [3, 1, "m", 1, "", [["x", "float32", [1]]]]),
        ("a tensor of five fields", [3, 1, "m", 1, "", [["x", "float32", [1], 0, 0]]]),
        ("an unknown dtype", [3, 1, "m", 1, "", [["x", "object", [1], 0]]]),
        ("a dtype that cannot be a key", [3, 1, "m", 1, "", [["x", [], [1], 0]]]),
        ("a negative axis", [3, 1, "m", 1, "", [["x", "float32", [-1], 0]]]),
        ("an axis that is a float", [3, 1, "m", 1, "", [["x", "float32", [1.0], 0]]]),
        ("nine axes", [3, 1, "m", 1, "", [["x", "float32", [1] * 9, 0]]]),
        ("seventeen tensors", [3, 1, "m", 1, "", [["x", "float32", [1], 0]] * 17]),
        ("nine models", [1, 1, 1, b"", "c", 0, 0, ["m"] * 9]),
        ("a token too long", [1, 1, 1, b"x" * 65, "c", 0, 0, []]),
        ("a text as token", [1, 1, 1, "x", "c", 0, 0, []]),
        ("an unknown transport", [17, 1, 1, 1, 1, "tcp", 0]),
        ("retryable as a number", [20, 1, "c", "m", 1, {}]),
        ("details as an array", [20, 1, "c", "m", True, []]),
        ("nested details", [20, 1, "c", "m", True, {"a": [1]}]),
    ],
)
def test_frames_outside_the_schema_are_refused(what: str, value: object) -> None:
    with pytest.raises(MalformedFrame):
        decode(msgpack.packb(value))


@pytest.mark.parametrize(
    ("what", "frame"),
    [
        ("deep nesting", b"\x91" * 4000 + b"\x00"),
        ("an array that claims four billion elements", b"\xdd\xff\xff\xff\xff"),
        ("a map that claims four billion entries", b"\xdf\xff\xff\xff\xff"),
        ("a text that claims four gigabytes", b"\xdb\xff\xff\xff\xff"),
        ("an extension type", msgpack.packb([2, 1, msgpack.ExtType(5, b"x")])),
        ("a timestamp", msgpack.packb(msgpack.Timestamp(1, 1))),
        ("text that is not UTF-8", b"\x93\x02\x01\xa2\xff\xfe"),
        ("two messages", encode(Describe(1, "m")) * 2),
        ("nothing", b""),
        ("half a message", encode(EXAMPLES["infer"])[:-3]),
    ],
)
def test_bombs_are_refused(what: str, frame: bytes) -> None:
    with pytest.raises(MalformedFrame):
        decode(frame)


def test_frames_over_the_limit_are_refused_on_both_sides() -> None:
    with pytest.raises(FrameTooLarge):
        decode(b"\x00" * (protocol.MAX_FRAME_BYTES + 1))
    tensors = tuple(Placement("x" * 128, "float32", (2**30,) * 8, 2**39) for _ in range(16))
    with pytest.raises(FrameTooLarge, match="at most 4096"):
        encode(Infer(1, 1, "c" * 128, "m" * 128, "", tensors * 2))
    with pytest.raises(FrameTooLarge, match="at most 4096"):
        Coder().encode(Infer(1, 1, "c" * 128, "m" * 128, "", tensors * 2))
    with pytest.raises(FrameTooLarge):
        Coder().decode(b"\x00" * (protocol.MAX_FRAME_BYTES + 1))


@given(st.lists(messages, max_size=8))
def test_a_coder_gives_what_encode_and_decode_give(sequence: list[protocol.Message]) -> None:
    sender, receiver = Coder(), Coder()
    for message in [each for each in sequence for _ in range(2)]:
        frame = sender.encode(message)
        assert frame == encode(message)
        assert receiver.decode(frame) == message


@given(st.sampled_from([EXAMPLES["infer"], NEWER["traced-infer"], EXAMPLES["result"]]), st.data())
def test_a_coder_takes_and_refuses_what_decode_does(message: protocol.Message, data: st.DataObject) -> None:
    """Also a frame that ends like the one before and is something else in front."""
    coder = Coder()
    coder.decode(encode(message))
    frame = encode(message)
    cut = data.draw(st.integers(0, len(frame)))
    altered = frame[: data.draw(st.integers(0, 3))] + data.draw(st.binary(max_size=20)) + frame[cut:]
    try:
        expected = decode(altered)
    except MalformedFrame:
        with pytest.raises(MalformedFrame):
            coder.decode(altered)
    else:
        assert coder.decode(altered) == expected
    assert coder.decode(frame) == message


def test_equal_tensors_come_out_of_a_coder_as_one_object() -> None:
    coder = Coder()
    first, second, other, back = (
        coder.decode(encode(Result(number, (Placement("y", "float32", (rows, 4), 0),))))
        for number, rows in ((1, 2), (300, 2), (3, 1), (4, 2))
    )
    assert isinstance(first, Result)
    assert isinstance(second, Result)
    assert isinstance(other, Result)
    assert second.request_id == 300
    assert second.outputs is first.outputs
    assert other.outputs[0].shape == (1, 4)
    assert back == Result(4, first.outputs)


def test_a_front_that_swallows_the_end_is_read_from_the_front() -> None:
    """A call id whose length covers the model's name: the ending is the same, what it means is not."""
    coder = Coder()
    coder.decode(encode(Infer(7, 1, "", "ab", "", ())))
    # Fields: id, deadline, call id "\xa2" of one byte, which leaves "a" and "b", numbers where a name should stand.
    frame = b"\x97\x01\x07\x01\xa1" + encode(Infer(7, 1, "", "ab", "", ()))[-5:]
    with pytest.raises(MalformedFrame):
        coder.decode(frame)


def test_long_error_messages_are_cut_to_fit() -> None:
    decoded = decode(encode(Fault(1, "sidecar_fault", "x" * 5000, False, {})))
    assert isinstance(decoded, Fault)
    assert len(decoded.message) == protocol.MAX_MESSAGE


def test_place_aligns_every_tensor() -> None:
    placements, size_bytes = protocol.place([("a", "uint8", (3,)), ("b", "float32", (2, 2)), ("c", "int64", ())])
    assert [placement.offset for placement in placements] == [0, 64, 128]
    assert size_bytes == 128 + 8
