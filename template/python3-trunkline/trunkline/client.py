"""The function author's view: ``model("name")``, called with numpy arrays, answering with numpy arrays.

Nothing happens before the first use, so a handler may create its models at import time, before gunicorn forks.
Models are safe to share between threads: each call takes a connection of its own from the process's pool. A call
that loses its connection is repeated on a new one until its deadline: inference changes nothing, so once more is harmless.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Final, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from trunkline import context, protocol
from trunkline.arguments import Array, by_name, checked, dtype_name, sendable, size_of, traced
from trunkline.connection import view
from trunkline.errors import (
    ArenaFull,
    ConnectionLost,
    Draining,
    InvalidInput,
    Quarantined,
    SignatureMismatch,
    TrunklineError,
)
from trunkline.pool import AnyConnection, Pool
from trunkline.protocol import JOINT, JOINT_OUTPUT, MAX_JOINT, Placement
from trunkline.signature import Signature

Outputs = Array | dict[str, Array]
T = TypeVar("T")

# A request that has cost its sidecar the connection so often is not offered again.
_MAX_LOST = 5
# Nor is it where that was twice, and the sidecar is certain that it was such a request. Others wait to be let through, so long at
# most.
_MAX_LOST_IN_QUARANTINE: Final = 1
_LONGEST_QUARANTINE_S: Final = 1.0
_READY_DEADLINE_S = 2.0
# A version of a model is named with its label behind a colon.
_NAME: Final = re.compile(rf"(?=.{{1,{protocol.MAX_NAME}}}$)[A-Za-z0-9._-]+(:[A-Za-z0-9._-]+)?")
# Layouts kept for each model. A model of texts meets many lengths.
_MAX_LAYOUTS: Final = 256


@dataclass
class Counters:
    """What this process has done: calls, inputs copied into an arena by the client, their bytes, repeated calls."""

    calls: int = 0
    input_copies: int = 0
    input_copy_bytes: int = 0
    repeats: int = 0


_pool = Pool()
_counters = Counters()


def counters() -> dict[str, int]:
    """Return this process's counters. Threads may race on them; they are for measuring, not for accounting."""
    return {field.name: getattr(_counters, field.name) for field in fields(_counters)}


def transport_name() -> str | None:
    """Return how this process reaches the sidecar: ``unix:/run/trunkline/trunkline.sock``, or ``http://127.0.0.1:9470``.

    None before it did, and when it has lost it.
    """
    return _pool.address


def model(name: str) -> Model:
    """Return the model ``name`` as the sidecar holds it, or one of its versions, as ``name:version``.

    No I/O happens before its first use. Raises InvalidInput.

    A name used outside a request is one the function stands for: ``ready`` asks for it, and arenas are sized for it.
    """
    if not _NAME.fullmatch(name):
        raise InvalidInput(
            f"{name[:64]!r} is no model's name: at most {protocol.MAX_NAME} of the characters a-z, 0-9, '.', '_', '-', with ':' "
            "before a version"
        )
    if not context.call_id.get():
        _pool.expect(name)
    return Model(name, _pool)


def models(*names: str) -> Models:
    """Return several models as one that is asked about one input: what they have in common is computed once::

        both = models("age", "gender")
        answer = both(face)  # {"age": ..., "gender": ...}

    Raises InvalidInput.
    """
    if not 2 <= len(set(names)) <= MAX_JOINT:
        raise InvalidInput(f"models takes 2 to {MAX_JOINT} different names, got {len(set(names))}")
    if len(joined := JOINT.join(names)) > protocol.MAX_NAME:
        raise InvalidInput(f"the names of the models have {len(joined)} characters together, at most {protocol.MAX_NAME} travel")
    return Models([model(name) for name in dict.fromkeys(names)])


def ready(deadline_s: float = _READY_DEADLINE_S) -> None:
    """Return when the sidecar answers for every model this process has named; raise the TrunklineError otherwise."""
    deadline = time.monotonic() + deadline_s

    def ask() -> None:
        connection = _pool.take(0, 0, deadline)
        try:
            for name in _pool.models:
                connection.describe(name, deadline)
        finally:
            _pool.give(connection)

    _repeated(_pool, ask)


def _deadline(deadline_s: float | None) -> float:
    """Return the time of ``time.monotonic`` by which a call must be answered."""
    if deadline_s is None:
        text = os.environ.get("TRUNKLINE_DEADLINE_S", "30")
        try:
            deadline_s = float(text)
        except ValueError as error:
            raise InvalidInput(f"TRUNKLINE_DEADLINE_S is {text[:40]!r}; it must be a number of seconds") from error
    if math.isnan(deadline_s):
        raise InvalidInput("a deadline of nan seconds never passes; give a number of seconds")
    return time.monotonic() + deadline_s


class Layout(NamedTuple):
    """Where the inputs of one call lie in the request arena, and the bytes the call takes in both arenas."""

    inputs: tuple[Placement, ...]
    input_bytes: int
    reply_bytes: int


class _Known(NamedTuple):
    """A signature, and the layouts of the calls that were made with it."""

    signature: Signature
    layouts: dict[object, Layout]

    def takes(self, layout: Layout) -> bool:
        """Return whether a call laid out for another version is one of this version, too."""
        try:
            sizes = self.signature.bind([(each.name, each.dtype, each.shape) for each in layout.inputs])
        except SignatureMismatch:
            return False
        return _layout(self.signature, sizes).inputs == layout.inputs

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
        """Names, dtypes, shapes and bounds of inputs and outputs, as of the latest call; the first use asks the sidecar."""
        return self._find(_deadline(None)).signature

    def _find(self, deadline: float) -> _Known:
        known = self._known
        if known is None:
            known = self._known = _Known(_repeated(self._pool, lambda: self._describe(deadline)), {})
        return known

    def _find_again(self, known: _Known, deadline: float) -> _Known | None:
        """Return what the sidecar says now, or None when that is what it said before."""
        if self._known is known:
            self._known = None
        fresh = self._find(deadline)
        return None if fresh.signature == known.signature else fresh

    def _describe(self, deadline: float) -> Signature:
        connection = self._pool.take(0, 0, deadline)
        try:
            return Signature.from_plain(connection.describe(self.name, deadline))
        finally:
            self._pool.give(connection)

    def __call__(self, *arrays: ArrayLike, **named: ArrayLike) -> Outputs:
        """Run the model: inputs in order or by name. Returns the output array, or a dict when there are several."""
        return self._call_known(arrays, named, _deadline(None), None)

    def call(self, inputs: Mapping[str, ArrayLike], *, deadline_s: float | None = None, call_id: str | None = None) -> Outputs:
        """Run the model on ``inputs`` within ``deadline_s`` (default TRUNKLINE_DEADLINE_S, 30 s).

        ``call_id`` stands in the sidecar's log; it defaults to the X-Call-Id of the HTTP request being served. The traceparent
        of that request goes along (``trunkline.context``).
        Raises TrunklineError: RequestError for the caller's fault, TransportError and CapacityError for ours.
        """
        return self._call_known((), inputs, _deadline(deadline_s), call_id)

    def _call_known(
        self, ordered: Sequence[ArrayLike], named: Mapping[str, ArrayLike], deadline: float, call_id: str | None
    ) -> Outputs:
        known = self._find(deadline)
        try:
            return self._call(known, ordered, named, deadline, call_id)
        except SignatureMismatch:
            # The model may have been replaced by a version that takes something else.
            fresh = self._find_again(known, deadline)
            if fresh is None:
                raise
            return self._call(fresh, ordered, named, deadline, call_id)

    def _call(
        self,
        known: _Known,
        ordered: Sequence[ArrayLike],
        named: Mapping[str, ArrayLike],
        deadline: float,
        call_id: str | None,
    ) -> Outputs:
        signature = known.signature
        inputs = by_name(signature, ordered, named) if ordered else named
        arrays = {name: np.asarray(value) for name, value in inputs.items()}
        for spec in signature.inputs:
            if spec.name in arrays:
                arrays[spec.name] = checked(signature.model, spec, arrays[spec.name])
        tensors = tuple((name, dtype_name(array), array.shape) for name, array in arrays.items())
        layout = known.layout(tensors, lambda: signature.bind(tensors))
        with Request(self, known, layout, deadline, call_id) as request:
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
        deadline = _deadline(deadline_s)
        whole = {axis: size_of(self.name, axis, size) for axis, size in sizes.items()}
        known = self._find(deadline)
        try:
            layout = self._request_layout(known, whole)
        except SignatureMismatch:
            fresh = self._find_again(known, deadline)
            if fresh is None:
                raise
            known, layout = fresh, self._request_layout(fresh, whole)
        return Request(self, known, layout, deadline, call_id)

    def _request_layout(self, known: _Known, sizes: Mapping[str, int]) -> Layout:
        return known.layout(("sizes", *sizes.items()), lambda: self._bound(known.signature, sizes))

    def _bound(self, signature: Signature, sizes: Mapping[str, int]) -> dict[str, int]:
        shapes = {spec.name: signature.resolve(spec, sizes) for spec in signature.inputs}
        bound = signature.bind([(spec.name, spec.dtype, shapes[spec.name]) for spec in signature.inputs])
        if unknown := sizes.keys() - signature.symbols.keys():
            raise SignatureMismatch(
                f"{self.name} has no axis {min(unknown)!r}; its symbolic axes are {', '.join(signature.symbols) or 'none'}"
            )
        return bound


class Models:
    """Several models that are asked about the same inputs. Instances are cheap and shared by threads."""

    def __init__(self, parts: Sequence[Model]) -> None:
        self.names = tuple(part.name for part in parts)
        self._joint = Model(JOINT.join(sorted(self.names)), parts[0]._pool)

    @property
    def signature(self) -> Signature:
        """What all of them take together, and what they give: outputs are called ``model/output``."""
        return self._joint.signature

    def __call__(self, *arrays: ArrayLike, **named: ArrayLike) -> dict[str, Outputs]:
        """Run the models: inputs in order or by name, as the first of them in the alphabet calls them. Returns by model."""
        return self._split(self._joint(*arrays, **named))

    def call(
        self, inputs: Mapping[str, ArrayLike], *, deadline_s: float | None = None, call_id: str | None = None
    ) -> dict[str, Outputs]:
        """Run the models on ``inputs`` within ``deadline_s``, as ``Model.call`` does."""
        return self._split(self._joint.call(inputs, deadline_s=deadline_s, call_id=call_id))

    def _split(self, outputs: Outputs) -> dict[str, Outputs]:
        assert isinstance(outputs, dict), "several models have several outputs"
        found: dict[str, dict[str, Array]] = {name: {} for name in self.names}
        for called, array in outputs.items():
            name, _, output = called.partition(JOINT_OUTPUT)
            found[name][output] = array
        return {name: next(iter(answer.values())) if len(answer) == 1 else answer for name, answer in found.items()}


class Request:
    """One call whose inputs lie in shared memory. Use as a context manager, in one thread.

    ``request[name]`` is a writable array; its contents are undefined until written. Arrays taken from it must not be
    used after the block.
    """

    def __init__(self, owner: Model, known: _Known, layout: Layout, deadline: float, call_id: str | None) -> None:
        self._owner = owner
        self._pool = owner._pool
        self._known = known
        self._layout = layout
        self._deadline = deadline
        self._call_id = sendable(context.call_id.get() if call_id is None else call_id)
        header = context.traceparent.get()
        self._traceparent = traced(header) if header else ""
        self._reply_bytes = layout.reply_bytes
        self._connection: AnyConnection | None = None
        # Where the inputs are written: the arena of the first connection, which outlives it while this refers to it.
        self._memory: Any = None

    def __enter__(self) -> Request:
        self._connection = self._take()
        self._memory = self._connection.request
        return self

    def _take(self) -> AnyConnection:
        return self._pool.take(self._layout.input_bytes, self._reply_bytes, self._deadline)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._connection is not None:
            self._pool.give(self._connection)
        self._connection = self._memory = None

    def _open(self) -> AnyConnection:
        if self._connection is None:
            raise RuntimeError("a request is used inside its `with` block only")
        return self._connection

    def __getitem__(self, name: str) -> Array:
        """Return the input ``name`` as a writable array over shared memory."""
        self._open()
        for placement in self._layout.inputs:
            if placement.name == name:
                return view(self._memory, placement)
        names = ", ".join(placement.name for placement in self._layout.inputs)
        raise SignatureMismatch(f"{self._owner.name} has no input {name!r}; it takes {names}")

    def run(self) -> Outputs:
        """Run the model on what was written; return copies of the outputs, the caller's to keep. May be called again."""
        _counters.calls += 1
        lost = 0
        while True:
            connection = self._open()
            try:
                found = self._ask(connection)
                break
            except (ConnectionLost, Draining):
                lost += 1
                if lost > _MAX_LOST:
                    raise
                self._pool.close()
            except ArenaFull as error:
                # An output of a size that only the run could tell.
                needed = error.details.get("needed_reply_bytes")
                if type(needed) is not int or needed <= self._reply_bytes:
                    raise
                self._reply_bytes = needed
            except SignatureMismatch:
                # A new version that takes what was written here is as good as the one before.
                fresh = self._owner._find_again(self._known, self._deadline)
                if fresh is None or not fresh.takes(self._layout):
                    raise
                self._known = fresh
                _counters.repeats += 1
                continue
            except Quarantined as error:
                if lost > _MAX_LOST_IN_QUARANTINE and error.details.get("certain"):
                    raise
                wait_s = error.details.get("retry_after_s")
                if not isinstance(wait_s, (int, float)) or not self._can_wait(wait_s):
                    raise
                time.sleep(wait_s)
                _counters.repeats += 1
                continue
            _counters.repeats += 1
            connection.close()
            self._connection = None
            self._connection = self._take()
        if len(found) == 1:
            return found[0][1].copy()
        return {name: array.copy() for name, array in found}

    def _can_wait(self, seconds: float) -> bool:
        return 0 <= seconds <= min(_LONGEST_QUARANTINE_S, self._deadline - time.monotonic())

    def _ask(self, connection: AnyConnection) -> tuple[tuple[str, Array], ...]:
        if connection.request is not self._memory:
            input_bytes = self._layout.input_bytes
            connection.request[:input_bytes] = self._memory[:input_bytes]
        signature = self._known.signature
        return connection.infer(
            signature.model, self._layout.inputs, self._deadline, self._call_id, signature.id, self._traceparent
        )


def _repeated(pool: Pool, attempt: Callable[[], T]) -> T:
    lost = 0
    while True:
        try:
            return attempt()
        except (ConnectionLost, Draining):
            lost += 1
            if lost > _MAX_LOST:
                raise
            pool.close()


__all__ = [
    "Counters",
    "Layout",
    "Model",
    "Models",
    "Outputs",
    "Request",
    "TrunklineError",
    "counters",
    "model",
    "models",
    "ready",
    "transport_name",
]
