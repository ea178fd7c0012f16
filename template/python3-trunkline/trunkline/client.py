"""The function author's view: ``model("name")``, called with numpy arrays, answering with numpy arrays.

Nothing happens before the first use, so a handler may create its models at import time, before gunicorn forks.
Models are safe to share between threads: each call takes a connection of its own from the process's pool. A call
that loses its connection is repeated on a new one until its deadline: inference changes nothing, so once more is harmless.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trunkline import context, protocol
from trunkline.connection import Connection, view
from trunkline.errors import (
    ArenaFull,
    ConnectionLost,
    Draining,
    SignatureMismatch,
    TrunklineError,
    UnsupportedTensor,
    ValueOutOfBounds,
)
from trunkline.pool import Pool
from trunkline.protocol import Placement, TensorSpec
from trunkline.signature import Signature

Array = NDArray[Any]
Outputs = Array | dict[str, Array]

# A request that has cost its sidecar the connection so often is not offered again.
_MAX_LOST = 5
_READY_DEADLINE_S = 2.0
# Layouts kept for each model. A model of texts meets many lengths.
_MAX_LAYOUTS: Final = 256


@dataclass
class Counters:
    """What this process has done: calls, inputs copied into an arena by the client, their bytes, repeated calls."""

    calls: int = 0
    input_copies: int = 0
    input_copy_bytes: int = 0
    repeats: int = 0


# numpy takes microseconds to spell the name of a dtype.
_DTYPE_NAMES = {np.dtype(name): name for name in protocol.ITEM_BYTES}

_pool = Pool()
_counters = Counters()


def counters() -> dict[str, int]:
    """Return this process's counters. Threads may race on them; they are for measuring, not for accounting."""
    return {field.name: getattr(_counters, field.name) for field in fields(_counters)}


def transport_name() -> str | None:
    """Return how this process reaches the sidecar, e.g. ``unix:/run/trunkline/trunkline.sock``; None before it did."""
    return _pool.address


def model(name: str) -> Model:
    """Return the model ``name`` as the sidecar holds it. No I/O happens before its first use."""
    _pool.expect(name)
    return Model(name, _pool)


def ready(deadline_s: float = _READY_DEADLINE_S) -> None:
    """Return when the sidecar answers for every model this process has named; raise the TrunklineError otherwise."""
    deadline = time.monotonic() + deadline_s
    connection = _pool.take(0, 0, deadline)
    try:
        for name in _pool.models:
            connection.describe(name, deadline)
    except ConnectionLost:
        # The idle connection was from before a restart; a new one tells how things are now.
        connection = _pool.take(0, 0, deadline)
        for name in _pool.models:
            connection.describe(name, deadline)
    finally:
        _pool.give(connection)


def _default_deadline_s() -> float:
    return float(os.environ.get("TRUNKLINE_DEADLINE_S", "30"))


class Layout(NamedTuple):
    """Where the inputs of one call lie in the request arena, and the bytes the call takes in both arenas."""

    inputs: tuple[Placement, ...]
    input_bytes: int
    reply_bytes: int


class _Known(NamedTuple):
    """A signature, and the layouts of the calls that were made with it."""

    signature: Signature
    layouts: dict[object, Layout]

    def layout(self, key: object, sizes: Callable[[], Mapping[str, int]]) -> Layout:
        """Return the layout of a call, made with the symbols' ``sizes`` unless ``key`` was seen before."""
        found = self.layouts.get(key)
        if found is None:
            if len(self.layouts) >= _MAX_LAYOUTS:
                self.layouts.clear()
            found = self.layouts[key] = _layout(self.signature, sizes())
        return found


def _layout(signature: Signature, sizes: Mapping[str, int]) -> Layout:
    inputs, input_bytes = protocol.place([(spec.name, spec.dtype, signature.resolve(spec, sizes)) for spec in signature.inputs])
    return Layout(inputs, input_bytes, signature.reply_bytes(sizes, protocol.ALIGNMENT))


class Model:
    """A model in the sidecar. Instances are cheap, stateless but for the cached signature, and shared by threads."""

    def __init__(self, name: str, pool: Pool) -> None:
        self.name = name
        self._pool = pool
        self._known: _Known | None = None

    @property
    def signature(self) -> Signature:
        """Names, dtypes, shapes and bounds of inputs and outputs; asked from the sidecar once."""
        return self._find(time.monotonic() + _default_deadline_s()).signature

    def _find(self, deadline: float) -> _Known:
        known = self._known
        if known is None:
            known = _Known(_repeated(lambda: self._describe(deadline), lambda: time.monotonic() < deadline), {})
            self._known = known
        return known

    def _describe(self, deadline: float) -> Signature:
        connection = self._pool.take(0, 0, deadline)
        try:
            return Signature.from_plain(connection.describe(self.name, deadline))
        finally:
            self._pool.give(connection)

    def __call__(self, *arrays: ArrayLike, **named: ArrayLike) -> Outputs:
        """Run the model: inputs in order or by name. Returns the output array, or a dict when there are several."""
        if arrays:
            specs = self.signature.inputs
            if len(arrays) > len(specs):
                raise SignatureMismatch(f"{self.name} takes {len(specs)} inputs, got {len(arrays)}")
            for spec, array in zip(specs, arrays, strict=False):
                if spec.name in named:
                    raise SignatureMismatch(f"{self.name} got {spec.name} twice, in order and by name")
                named[spec.name] = array
        return self.call(named)

    def call(self, inputs: Mapping[str, ArrayLike], *, deadline_s: float | None = None, call_id: str | None = None) -> Outputs:
        """Run the model on ``inputs`` within ``deadline_s`` (default TRUNKLINE_DEADLINE_S, 30 s).

        ``call_id`` stands in the sidecar's log; it defaults to the X-Call-Id of the HTTP request being served.
        Raises TrunklineError: RequestError for the caller's fault, TransportError and CapacityError for ours.
        """
        deadline = time.monotonic() + (_default_deadline_s() if deadline_s is None else deadline_s)
        known = self._find(deadline)
        try:
            return self._call(known, inputs, deadline, call_id)
        except SignatureMismatch:
            # The model may have been replaced by a version that takes something else.
            self._known = None
            if (fresh := self._find(deadline)).signature == known.signature:
                raise
            return self._call(fresh, inputs, deadline, call_id)

    def _call(self, known: _Known, inputs: Mapping[str, ArrayLike], deadline: float, call_id: str | None) -> Outputs:
        signature = known.signature
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        for spec in signature.inputs:
            if spec.name in arrays:
                arrays[spec.name] = _checked(signature.model, spec, arrays[spec.name])
        tensors = tuple((name, _dtype_name(array), array.shape) for name, array in arrays.items())
        layout = known.layout(tensors, lambda: signature.bind(tensors))
        with Request(self._pool, signature.model, layout, deadline, call_id) as request:
            for spec in signature.inputs:
                array = arrays[spec.name]
                np.copyto(request[spec.name], array)
                _counters.input_copies += 1
                _counters.input_copy_bytes += array.nbytes
            return request.run()

    def request(self, *, deadline_s: float | None = None, call_id: str | None = None, **sizes: int) -> Request:
        """Return a request whose inputs are written straight into shared memory::

            with m.request(batch=1) as r:
                r["image"][...] = picture
                scores = r.run()

        ``sizes`` are the sizes of the model's symbolic axes; those not given take their smallest size.
        """
        deadline = time.monotonic() + (_default_deadline_s() if deadline_s is None else deadline_s)
        known = self._find(deadline)
        layout = known.layout(("sizes", *sizes.items()), lambda: self._bound(known.signature, sizes))
        return Request(self._pool, self.name, layout, deadline, call_id)

    def _bound(self, signature: Signature, sizes: Mapping[str, int]) -> dict[str, int]:
        shapes = {spec.name: signature.resolve(spec, sizes) for spec in signature.inputs}
        bound = signature.bind([(spec.name, spec.dtype, shapes[spec.name]) for spec in signature.inputs])
        if unknown := sizes.keys() - signature.symbols.keys():
            raise SignatureMismatch(
                f"{self.name} has no axis {min(unknown)!r}; its symbolic axes are {', '.join(signature.symbols) or 'none'}"
            )
        return bound


class Request:
    """One call whose inputs lie in shared memory. Use as a context manager, in one thread.

    ``request[name]`` is a writable array; its contents are undefined until written. Arrays taken from it must not be
    used after the block.
    """

    def __init__(self, pool: Pool, model_name: str, layout: Layout, deadline: float, call_id: str | None) -> None:
        self._pool = pool
        self._model_name = model_name
        self._deadline = deadline
        self._call_id = (context.call_id.get() if call_id is None else call_id)[: protocol.MAX_NAME]
        self._inputs, self._input_bytes, self._reply_bytes = layout
        self._connection: Connection | None = None

    def __enter__(self) -> Request:
        self._connection = self._pool.take(self._input_bytes, self._reply_bytes, self._deadline)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._connection is not None:
            self._pool.give(self._connection)
            self._connection = None

    def _open(self) -> Connection:
        if self._connection is None:
            raise RuntimeError("a request is used inside its `with` block only")
        return self._connection

    def __getitem__(self, name: str) -> Array:
        """Return the input ``name`` as a writable array over shared memory."""
        for placement in self._inputs:
            if placement.name == name:
                return view(self._open().request, placement)
        names = ", ".join(placement.name for placement in self._inputs)
        raise SignatureMismatch(f"{self._model_name} has no input {name!r}; it takes {names}")

    def run(self) -> Outputs:
        """Run the model on what was written; return copies of the outputs, the caller's to keep."""
        _counters.calls += 1
        connection = self._open()
        lost = 0
        while True:
            try:
                found = connection.infer(self._model_name, self._inputs, self._deadline, self._call_id)
                break
            except (ConnectionLost, Draining):
                lost += 1
                if lost > _MAX_LOST:
                    raise
            except ArenaFull as error:
                # An output of a size that only the run could tell.
                needed = error.details.get("needed_reply_bytes")
                if type(needed) is not int or needed <= self._reply_bytes:
                    raise
                self._reply_bytes = needed
            _counters.repeats += 1
            connection = self._move(connection)
        if len(found) == 1:
            return found[0][1].copy()
        return {name: array.copy() for name, array in found}

    def _move(self, old: Connection) -> Connection:
        # The mapping of a closed connection outlives it, so the inputs are still there to be copied over.
        old.close()
        self._connection = None
        new = self._pool.take(self._input_bytes, self._reply_bytes, self._deadline)
        self._connection = new
        new.request[: self._input_bytes] = old.request[: self._input_bytes]
        return new


def _dtype_name(array: Array) -> str:
    return _DTYPE_NAMES.get(array.dtype) or str(array.dtype)


def _checked(model_name: str, spec: TensorSpec, array: Array) -> Array:
    """Return ``array`` as the dtype of ``spec``, refusing every conversion that changes a value's meaning."""
    if _dtype_name(array) == spec.dtype:
        return array
    wanted = np.dtype(spec.dtype)
    if array.dtype.hasobject or array.dtype.kind not in "biuf":
        raise UnsupportedTensor(f"{model_name} takes {spec.name} as {spec.dtype}; {array.dtype} cannot be converted")
    if not np.can_cast(array.dtype, wanted, "same_kind"):
        lost = f" ({int(np.isnan(array).sum())} of its values are NaN)" if array.dtype.kind == "f" else ""
        raise SignatureMismatch(
            f"{model_name} takes {spec.name} as {spec.dtype}, got {array.dtype}{lost}; convert it in the handler",
            expected=spec.dtype,
            got=str(array.dtype),
        )
    if wanted.kind in "iu" and array.size and array.dtype.itemsize > wanted.itemsize:
        limits = np.iinfo(wanted)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            raise ValueOutOfBounds(
                f"{model_name} takes {spec.name} as {spec.dtype}; its values reach from {low} to {high}",
                minimum=low,
                maximum=high,
            )
    return array.astype(wanted)


def _repeated(attempt: Callable[[], Signature], may_repeat: Callable[[], bool]) -> Signature:
    lost = 0
    while True:
        try:
            return attempt()
        except (ConnectionLost, Draining):
            lost += 1
            if lost > _MAX_LOST or not may_repeat():
                raise


__all__ = ["Counters", "Layout", "Model", "Outputs", "Request", "TrunklineError", "counters", "model", "ready", "transport_name"]
