"""Messages between function and sidecar, and their encoding. Pure: no I/O, no clock, no state.

A message is one msgpack array of at most 4 KiB whose first element names its kind and whose length is fixed by that
kind. Tensors never travel in a message: it only says where in the connection's arena they lie. Longer texts (a
signature, an administrator's answer) lie in the arena as well, as JSON, and the message carries their length.

Function images outlive sidecars. Both sides therefore state the range of versions they speak, and the encoding of a
version is never changed once it was released.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgpack

from trunkline.errors import Detail, FrameTooLarge, MalformedFrame

VERSION: Final = 2
OLDEST_VERSION: Final = 1
MAX_FRAME_BYTES: Final = 4096
MAX_TENSORS: Final = 16
MAX_DIMENSIONS: Final = 8
MAX_MODELS: Final = 8
MAX_NAME: Final = 128
MAX_MESSAGE: Final = 1024
MAX_TOKEN_BYTES: Final = 64
# Models that are asked about together are named by their names, in order, with this between them. No model's name has it.
JOINT: Final = "+"
MAX_JOINT: Final = 8
# Between the model's name and the output's in the name of an output of such a call.
JOINT_OUTPUT: Final = "/"
MAX_ID: Final = 2**63 - 1
MAX_ARENA_BYTES: Final = 2**40
MAX_DEADLINE_US: Final = 24 * 3600 * 1_000_000
# The first version in which an Infer may carry a traceparent.
TRACING_VERSION: Final = 2
# W3C Trace Context, version 00: trace id, id of the parent span, flags. Neither id may be all zeros.
TRACEPARENT: Final = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}", re.ASCII)
# Every tensor starts on a cache line; vector loads need no more.
ALIGNMENT: Final = 64

# The dtypes that numpy, torch and a function all know, with their size in bytes.
ITEM_BYTES: Final[dict[str, int]] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "float32": 4,
    "float64": 8,
}

SEALED: Final = "sealed"
COPY: Final = "copy"
# Not of this protocol: how the transport is called of who asks over HTTP instead.
HTTP: Final = "http"


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model. ``shape`` holds integers and names of symbolic axes; ``dtype`` is numpy's name.

    ``minimum`` and ``maximum`` bound the values of an integer input, both inclusive; None: no bound.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    minimum: int | None = None
    maximum: int | None = None


class Placement(NamedTuple):
    """One tensor in an arena: C-contiguous little-endian elements from ``offset`` (bytes) on."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Hello(NamedTuple):
    """First message of a client: versions it speaks, credential, arena sizes it would like (0: sized by ``models``)."""

    oldest: int
    newest: int
    token: bytes
    client: str
    request_bytes: int
    reply_bytes: int
    models: tuple[str, ...]


class Describe(NamedTuple):
    """Ask for the signature of a model."""

    request_id: int
    model: str


class Infer(NamedTuple):
    """Run a model on tensors in the request arena. ``deadline_us`` is the time left, so clocks need not agree.

    ``signature`` is the id of the signature that the client went by; empty: any. ``traceparent`` is the W3C header of that name,
    by which spans of the sidecar find their trace; empty: none, and then it takes no bytes. Never sent in version 1.

    In a frame, what changes from call to call stands first, what mostly stays the same last: see ``Coder``.
    """

    request_id: int
    deadline_us: int
    call_id: str
    model: str
    signature: str
    inputs: tuple[Placement, ...]
    traceparent: str = ""


class Command(NamedTuple):
    """An administrator's command; its arguments are ``length`` bytes of JSON at the start of the request arena."""

    request_id: int
    name: str
    length: int


class Welcome(NamedTuple):
    """Answer to Hello; the descriptors of the request and the reply arena travel with it, in this order."""

    version: int
    session: int
    request_bytes: int
    reply_bytes: int
    transport: str
    generation: int


class Document(NamedTuple):
    """Answer to Describe and Command: ``length`` bytes of JSON at the start of the reply arena."""

    request_id: int
    length: int


class Result(NamedTuple):
    """Answer to Infer: outputs in the reply arena."""

    request_id: int
    outputs: tuple[Placement, ...]


class Fault(NamedTuple):
    """Answer to anything that failed. ``request_id`` is 0 when the message that failed had none."""

    request_id: int
    code: str
    message: str
    retryable: bool
    details: dict[str, Detail]


Message = Hello | Describe | Infer | Command | Welcome | Document | Result | Fault

_HELLO, _DESCRIBE, _INFER, _COMMAND, _WELCOME, _DOCUMENT, _RESULT, FAULT = 1, 2, 3, 4, 17, 18, 19, 20


def encode(message: Message) -> bytes:
    """Return the frame of ``message``. Raises FrameTooLarge when it would exceed 4 KiB."""
    return _sendable(msgpack.packb(_fields(message)))


def _sendable(frame: bytes) -> bytes:
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameTooLarge(
            f"the header takes {len(frame)} bytes, at most {MAX_FRAME_BYTES} are allowed; shorten names or call ids",
            size_bytes=len(frame),
            limit_bytes=MAX_FRAME_BYTES,
        )
    return frame


def _fields(message: Message) -> tuple[object, ...]:
    match message:
        case Infer():
            return *_fields_of_front(message), message.model, message.signature, message.inputs
        case Result():
            return _RESULT, message.request_id, message.outputs
        case Describe():
            return _DESCRIBE, message.request_id, message.model
        case Document():
            return _DOCUMENT, message.request_id, message.length
        case Command():
            return _COMMAND, message.request_id, message.name, message.length
        case Fault():
            text = message.message[:MAX_MESSAGE]
            return FAULT, message.request_id, message.code, text, message.retryable, message.details
        case Hello():
            return (
                _HELLO,
                message.oldest,
                message.newest,
                message.token,
                message.client,
                message.request_bytes,
                message.reply_bytes,
                message.models,
            )
        case Welcome():
            return (
                _WELCOME,
                message.version,
                message.session,
                message.request_bytes,
                message.reply_bytes,
                message.transport,
                message.generation,
            )


def _fields_of_front(message: Infer) -> tuple[object, ...]:
    front = _INFER, message.request_id, message.deadline_us, message.call_id
    return (*front, message.traceparent) if message.traceparent else front


def decode(frame: bytes) -> Message:
    """Return the message in ``frame``, every field checked for type and range.

    Raises FrameTooLarge and MalformedFrame, nothing else, whatever the bytes are. The limits given to msgpack keep
    a nested or over-long frame from costing more memory than the frame itself.
    """
    if len(frame) > MAX_FRAME_BYTES:
        raise FrameTooLarge(
            f"a message is longer than {MAX_FRAME_BYTES} bytes", limit_bytes=MAX_FRAME_BYTES, size_bytes=len(frame)
        )
    fields = _unpack(frame)
    decoder = _DECODERS.get(fields[0])
    if decoder is None:
        raise MalformedFrame(f"{fields[0]} is no kind of message", kind=fields[0])
    arities, build = decoder
    if len(fields) not in arities:
        known = " or ".join(map(str, arities))
        raise MalformedFrame(f"a message of kind {fields[0]} has {known} fields, this one has {len(fields)}", kind=fields[0])
    return build(fields)


def _unpack(frame: bytes) -> tuple[Any, ...]:
    try:
        fields = msgpack.unpackb(
            frame,
            use_list=False,
            raw=False,
            strict_map_key=True,
            max_array_len=MAX_TENSORS,
            max_map_len=MAX_TENSORS,
            max_str_len=4 * MAX_MESSAGE,
            max_bin_len=MAX_TOKEN_BYTES,
            max_ext_len=0,
        )
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise MalformedFrame(f"a message of {len(frame)} bytes is not msgpack within the limits") from error
    if type(fields) is not tuple or not fields or type(fields[0]) is not int:
        raise MalformedFrame("a message is an array that starts with its kind")
    return fields


# The first bytes of the messages that carry tensors: an array of so many fields, and the kind. An Infer has one field more with
# a traceparent.
_INFER_STARTS, _RESULT_START = (bytes((0x97, _INFER)), bytes((0x98, _INFER))), bytes((0x93, _RESULT))


class Coder:
    """Encoder and decoder of one connection, that does not encode or decode the same tensors twice in a row.

    A function sends the same shapes again and again, so nearly every Infer, and every Result, ends in the same bytes as
    the one before it. The ending is kept in both forms, one for each direction. What comes out is what ``encode``
    and ``decode`` give; only equal placements are moreover the same object as last time, so that whoever keeps something
    made from them can tell with ``is``. Belongs to one thread at a time in each direction.
    """

    def __init__(self) -> None:
        self._sent: tuple[Any, ...] = ()
        self._sent_end = b""
        self._received: tuple[Any, ...] = ()
        self._received_start: bytes | tuple[bytes, ...] = b""
        self._received_end = b""

    def encode(self, message: Message) -> bytes:
        """Return the frame of ``message``. Raises FrameTooLarge."""
        if isinstance(message, Infer):
            # The array's first byte says how many fields follow; the front alone would say too few.
            front = msgpack.packb(_fields_of_front(message))
            start = _INFER_STARTS[1 if message.traceparent else 0][:1]
            return _sendable(start + front[1:] + self._ending(message.model, message.signature, message.inputs))
        if isinstance(message, Result):
            front = msgpack.packb((_RESULT, message.request_id))
            return _sendable(_RESULT_START[:1] + front[1:] + self._ending(message.outputs))
        return encode(message)

    def _ending(self, *fields: object) -> bytes:
        if fields != self._sent:
            self._sent, self._sent_end = fields, b"".join(map(msgpack.packb, fields))
        return self._sent_end

    def decode(self, frame: bytes) -> Message:
        """Return the message in ``frame``. Raises FrameTooLarge and MalformedFrame, nothing else."""
        end = self._received_end
        if end and frame.endswith(end) and frame.startswith(self._received_start) and len(frame) <= MAX_FRAME_BYTES:
            front_count = (frame[0] & 0x0F) - len(self._received)
            try:
                # Where the front holds exactly its fields and no byte more, the end begins where it did last time.
                front = _unpack(bytes((0x90 | front_count,)) + frame[1 : -len(end)])
            except MalformedFrame:
                pass
            else:
                if front[0] == _INFER:
                    model, signature, inputs = self._received
                    return Infer(*_infer_front(front), model, signature, inputs, _traceparent(front))
                return Result(_id(front[1]), *self._received)
        message = decode(frame)
        if isinstance(message, Infer):
            self._keep(_INFER_STARTS, message[3:6])
        elif isinstance(message, Result):
            self._keep(_RESULT_START, message[1:])
        return message

    def _keep(self, start: bytes | tuple[bytes, ...], received: tuple[Any, ...]) -> None:
        self._received_start, self._received = start, received
        # Should the other side have written the same values otherwise, its frames never end like this.
        self._received_end = b"".join(map(msgpack.packb, received))


def _integer(value: Any, minimum: int, maximum: int, what: str) -> int:
    # bool is a subclass of int, so the type is compared, not tested with isinstance.
    if type(value) is not int or not minimum <= value <= maximum:
        raise MalformedFrame(f"{what} must be an integer from {minimum} to {maximum}")
    return value


def _text(value: Any, limit: int, what: str) -> str:
    if type(value) is not str or len(value) > limit:
        raise MalformedFrame(f"{what} must be a text of at most {limit} characters")
    return value


def _sequence(value: Any, limit: int, what: str) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) > limit:
        raise MalformedFrame(f"{what} must be an array of at most {limit} elements")
    return value


def placements(value: Any, what: str) -> tuple[Placement, ...]:
    """Return (name, dtype, shape, offset) of each tensor as placements. Raises MalformedFrame."""
    # The one decoder on every request's way, so its checks stand in line.
    found = []
    for entry in _sequence(value, MAX_TENSORS, what):
        if type(entry) is not tuple or len(entry) != 4:
            raise MalformedFrame(f"a tensor in {what} has 4 fields: name, dtype, shape, offset")
        name, dtype, shape, offset = entry
        if type(name) is not str or len(name) > MAX_NAME:
            raise MalformedFrame(f"a tensor's name must be a text of at most {MAX_NAME} characters")
        if type(dtype) is not str or dtype not in ITEM_BYTES:
            raise MalformedFrame(f"a tensor in {what} has an unknown dtype; known: {', '.join(ITEM_BYTES)}")
        if type(shape) is not tuple or len(shape) > MAX_DIMENSIONS:
            raise MalformedFrame(f"a shape must be an array of at most {MAX_DIMENSIONS} elements")
        for axis in shape:
            if type(axis) is not int or not 0 <= axis <= MAX_ARENA_BYTES:
                raise MalformedFrame(f"an axis must be an integer from 0 to {MAX_ARENA_BYTES}")
        if type(offset) is not int or not 0 <= offset <= MAX_ARENA_BYTES:
            raise MalformedFrame(f"an offset must be an integer from 0 to {MAX_ARENA_BYTES}")
        found.append(Placement(name, dtype, shape, offset))
    return tuple(found)


def _id(value: Any) -> int:
    return _integer(value, 0, MAX_ID, "a request id")


def _hello(fields: tuple[Any, ...]) -> Hello:
    token = fields[3]
    if type(token) is not bytes or len(token) > MAX_TOKEN_BYTES:
        raise MalformedFrame(f"the token must be at most {MAX_TOKEN_BYTES} bytes")
    models = _sequence(fields[7], MAX_MODELS, "the models")
    return Hello(
        _integer(fields[1], 0, 2**16, "the oldest version"),
        _integer(fields[2], 0, 2**16, "the newest version"),
        token,
        _text(fields[4], MAX_NAME, "the client's name"),
        _integer(fields[5], 0, MAX_ARENA_BYTES, "the request arena's size"),
        _integer(fields[6], 0, MAX_ARENA_BYTES, "the reply arena's size"),
        tuple(_text(name, MAX_NAME, "a model's name") for name in models),
    )


def _describe(fields: tuple[Any, ...]) -> Describe:
    return Describe(_id(fields[1]), _text(fields[2], MAX_NAME, "the model's name"))


def _infer(fields: tuple[Any, ...]) -> Infer:
    model, signature, inputs = fields[-3:]
    return Infer(
        *_infer_front(fields),
        _text(model, MAX_NAME, "the model's name"),
        _text(signature, MAX_NAME, "the signature's id"),
        placements(inputs, "the inputs"),
        _traceparent(fields[:-3]),
    )


def _infer_front(fields: tuple[Any, ...]) -> tuple[int, int, str]:
    return (
        _id(fields[1]),
        _integer(fields[2], 1, MAX_DEADLINE_US, "the deadline in microseconds"),
        _text(fields[3], MAX_NAME, "the call id"),
    )


def _traceparent(front: tuple[Any, ...]) -> str:
    if len(front) == 4:
        return ""
    text = front[4]
    if type(text) is not str or not TRACEPARENT.fullmatch(text):
        raise MalformedFrame("the traceparent must be one of W3C Trace Context, version 00, in lower case")
    return text


def _command(fields: tuple[Any, ...]) -> Command:
    return Command(
        _id(fields[1]),
        _text(fields[2], MAX_NAME, "the command's name"),
        _integer(fields[3], 0, MAX_ARENA_BYTES, "the length"),
    )


def _welcome(fields: tuple[Any, ...]) -> Welcome:
    transport = _text(fields[5], MAX_NAME, "the transport")
    if transport not in (SEALED, COPY):
        raise MalformedFrame(f"{transport!r} is no transport; known: {SEALED}, {COPY}")
    return Welcome(
        _integer(fields[1], 0, 2**16, "the version"),
        _id(fields[2]),
        _integer(fields[3], 1, MAX_ARENA_BYTES, "the request arena's size"),
        _integer(fields[4], 1, MAX_ARENA_BYTES, "the reply arena's size"),
        transport,
        _id(fields[6]),
    )


def _document(fields: tuple[Any, ...]) -> Document:
    return Document(_id(fields[1]), _integer(fields[2], 0, MAX_ARENA_BYTES, "the length"))


def _result(fields: tuple[Any, ...]) -> Result:
    return Result(_id(fields[1]), placements(fields[2], "the outputs"))


def fault(fields: tuple[Any, ...]) -> Fault:
    """Return the fault with these fields, its kind the first of them. Raises MalformedFrame."""
    if type(fields[4]) is not bool:
        raise MalformedFrame("retryable must be true or false")
    details = fields[5]
    if type(details) is not dict:
        raise MalformedFrame("the details of a fault are a map")
    for key, value in details.items():
        if type(key) is not str or type(value) not in (int, float, str, bool):
            raise MalformedFrame("the details of a fault map names to plain values")
    return Fault(
        _id(fields[1]),
        _text(fields[2], MAX_NAME, "the code"),
        _text(fields[3], MAX_MESSAGE, "the message"),
        fields[4],
        details,
    )


_DECODERS: Final[dict[int, tuple[tuple[int, ...], Callable[[tuple[Any, ...]], Message]]]] = {
    _HELLO: ((8,), _hello),
    _DESCRIBE: ((3,), _describe),
    _INFER: ((7, 8), _infer),
    _COMMAND: ((4,), _command),
    _WELCOME: ((7,), _welcome),
    _DOCUMENT: ((3,), _document),
    _RESULT: ((3,), _result),
    FAULT: ((6,), fault),
}


def align(offset: int) -> int:
    """Return the first aligned offset at or after ``offset``."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def place(tensors: list[tuple[str, str, tuple[int, ...]]]) -> tuple[tuple[Placement, ...], int]:
    """Lay (name, dtype, shape) one after the other, each aligned; return the placements and the bytes they span."""
    placements = []
    end = 0
    for name, dtype, shape in tensors:
        placement = Placement(name, dtype, shape, align(end))
        placements.append(placement)
        end = placement.offset + placement.size_bytes
    return tuple(placements), end
