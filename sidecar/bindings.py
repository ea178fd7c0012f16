"""Bindings: weights that a session was lent stay bound to it, so that the next run with the same ones binds its inputs alone.

To bind the 64 weights of a small encoder took a tenth of the time of its run. A binding is of one run at a time; the last few
are kept, without inputs and outputs, whose memory is a request's. One is gone with the first of its weights: what was evicted
must not be held here. Callable from any thread.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple

# Of one session: models of one structure, and lanes, take turns.
_MOST: Final = 8

# Weights are known by their identity, as long as all of them are there.
_Key = tuple[int, ...]


class _Bound(NamedTuple):
    binding: Any
    watched: tuple[weakref.ref[Any], ...]


class Bindings:
    """Those of one ONNX Runtime ``session``. ``nothing`` is a value that stands for inputs between runs."""

    def __init__(self, session: Any, nothing: Any) -> None:
        self._session = session
        self._nothing = nothing
        self._kept: OrderedDict[_Key, _Bound] = OrderedDict()
        # A weight may go while the lock is held, by this very thread.
        self._lock = threading.RLock()

    def run(
        self,
        weights: Sequence[Any],
        values: Callable[[], Mapping[str, Any]],
        inputs: Mapping[str, Any],
        outputs: Sequence[str],
    ) -> list[Any]:
        """Run the session and return its outputs as values of ONNX Runtime.

        ``values`` returns what to bind by name for ``weights``, which must be the same for the same objects. Raises what ONNX
        Runtime raises.
        """
        key = tuple(map(id, weights))
        with self._lock:
            bound = self._kept.pop(key, None)
        if bound is None:
            bound = self._made(weights, key, values())
        binding = bound.binding
        for name, value in inputs.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        given: list[Any] = binding.get_outputs()
        binding.clear_binding_outputs()
        for name in inputs:
            binding.bind_ortvalue_input(name, self._nothing)
        with self._lock:
            self._kept[key] = bound
            while len(self._kept) > _MOST:
                self._kept.popitem(last=False)
        return given

    def _made(self, weights: Sequence[Any], key: _Key, values: Mapping[str, Any]) -> _Bound:
        binding = self._session.io_binding()
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        gone = functools.partial(_forget, weakref.ref(self), key)
        return _Bound(binding, tuple(weakref.ref(each, gone) for each in weights))

    def forget(self, key: _Key) -> None:
        """Keep no binding of these weights any more."""
        with self._lock:
            self._kept.pop(key, None)


def _forget(bindings: weakref.ref[Bindings], key: _Key, _: object) -> None:
    """Be called when a weight goes. Whatever holds this is held by the bindings, so it does not hold them."""
    if (found := bindings()) is not None:
        found.forget(key)
