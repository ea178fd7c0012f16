"""A sidecar made of plain Python callables, for the tests of a handler::

    with fake_models({"classify": (signature("classify", inputs={...}, outputs={...}), answer)}):
        assert handle(event, context)["statusCode"] == 200

Everything on the function's side is the production code: signatures are checked, inputs travel through an arena.
Only the far end is replaced, by ``answer(**inputs)``, which gets numpy arrays and returns one array or a dict of them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trunkline import client, protocol
from trunkline.arena import page_aligned
from trunkline.connection import view
from trunkline.errors import ArenaFull, UnknownModel
from trunkline.protocol import Placement, TensorSpec
from trunkline.signature import Signature

Tensors = Mapping[str, tuple[str, Sequence[int | str]]]
Answer = Callable[..., Any]


def signature(
    model: str, *, inputs: Tensors, outputs: Tensors, symbols: Mapping[str, tuple[int, int]] | None = None
) -> Signature:
    """Return a signature from ``{name: (dtype, shape)}``. Symbolic axes default to sizes from 1 to 64."""

    def specs(tensors: Tensors) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name, dtype, tuple(shape)) for name, (dtype, shape) in tensors.items())

    axes = {axis for _, shape in (*inputs.values(), *outputs.values()) for axis in shape if isinstance(axis, str)}
    return Signature(model, "test", specs(inputs), specs(outputs), dict.fromkeys(axes, (1, 64)) | dict(symbols or {}))


@contextlib.contextmanager
def fake_models(models: Mapping[str, tuple[Signature, Answer]]) -> Iterator[None]:
    """Let every ``model(name)`` of this process be answered by ``models`` while the block runs."""
    pool = client._pool
    pool.close()
    before = pool.connector

    def connect(path: str, *, request_bytes: int = 0, reply_bytes: int = 0, **_: object) -> FakeConnection:
        return FakeConnection(path, models, request_bytes, reply_bytes)

    pool.connector = connect  # type: ignore[assignment]
    try:
        with _socket_named():
            yield
    finally:
        pool.close()
        pool.connector = before


@contextlib.contextmanager
def _socket_named() -> Iterator[None]:
    before = os.environ.get("TRUNKLINE_SOCKET")
    os.environ["TRUNKLINE_SOCKET"] = "fake"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRUNKLINE_SOCKET"]
        else:
            os.environ["TRUNKLINE_SOCKET"] = before


class FakeConnection:
    """Stands in for ``trunkline.connection.Connection``."""

    address = "fake"
    transport = "fake"
    generation = 0

    def __init__(
        self, endpoint: str, models: Mapping[str, tuple[Signature, Answer]], request_bytes: int, reply_bytes: int
    ) -> None:
        self.endpoint = endpoint
        self._models = models
        self.request_bytes = page_aligned(request_bytes)
        self.reply_bytes = page_aligned(reply_bytes)
        self.request = bytearray(self.request_bytes)
        self.reply = bytearray(self.reply_bytes)
        self.closed = False
        self.is_foreign = False

    def describe(self, model: str, deadline: float) -> Any:
        return self._find(model)[0].to_plain()

    def infer(
        self,
        model: str,
        inputs: tuple[Placement, ...],
        deadline: float,
        call_id: str = "",
        signature: str = "",
        traceparent: str = "",
    ) -> tuple[tuple[str, NDArray[Any]], ...]:
        known, answer = self._find(model)
        known.bind([(p.name, p.dtype, p.shape) for p in inputs])
        arrays = {p.name: view(self.request, p).copy() for p in inputs}
        answered = answer(**arrays)
        if not isinstance(answered, Mapping):
            answered = {known.outputs[0].name: answered}
        tensors = {name: np.ascontiguousarray(value) for name, value in answered.items()}
        placements, size = protocol.place([(name, str(value.dtype), value.shape) for name, value in tensors.items()])
        if size > self.reply_bytes:
            raise ArenaFull("the answer is longer than the reply arena", needed_reply_bytes=size)
        outputs = tuple((placement.name, view(self.reply, placement)) for placement in placements)
        for name, array in outputs:
            array[...] = tensors[name]
        return outputs

    def _find(self, model: str) -> tuple[Signature, Answer]:
        if protocol.JOINT in model:
            return _together({name: self._find(name) for name in model.split(protocol.JOINT)})
        if model not in self._models:
            raise UnknownModel(f"the fake sidecar has no model {model!r}; it has {', '.join(self._models) or 'none'}")
        return self._models[model]

    def close(self) -> None:
        self.closed = True


def _together(parts: Mapping[str, tuple[Signature, Answer]]) -> tuple[Signature, Answer]:
    """Return what ``models`` meets: all parts asked about the same inputs, which are told apart by their order alone."""
    longest = max((known for known, _ in parts.values()), key=lambda known: len(known.inputs))
    outputs = tuple(
        replace(spec, name=f"{name}{protocol.JOINT_OUTPUT}{spec.name}")
        for name, (known, _) in parts.items()
        for spec in known.outputs
    )
    symbols = {axis: bounds for known, _ in parts.values() for axis, bounds in known.symbols.items()}

    def answer(**arrays: Any) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, (known, one) in parts.items():
            given = {spec.name: arrays[other.name] for spec, other in zip(known.inputs, longest.inputs, strict=False)}
            answered = one(**given)
            if not isinstance(answered, Mapping):
                answered = {known.outputs[0].name: answered}
            found |= {f"{name}{protocol.JOINT_OUTPUT}{output}": array for output, array in answered.items()}
        return found

    return Signature(protocol.JOINT.join(parts), "test", longest.inputs, outputs, symbols), answer
