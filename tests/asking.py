"""Requests given to an engine as the server gives them, by the names that models are deployed under."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trunkline.errors import TrunklineError

from sidecar.ports import OutputSpecs, Work
from tests.fakes import Running
from tests.waiting import PATIENCE_S, soon


class Asked:
    """The session of one request, and what became of it."""

    def __init__(self, view: Callable[[memoryview, str, tuple[int, ...]], Any]) -> None:
        self._view = view
        self._told = threading.Event()
        self._error: TrunklineError | None = None
        self._given: dict[str, NDArray[Any]] = {}

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        for (name, dtype, shape), output in zip(specs, outputs, strict=True):
            self._given[name] = np.empty(shape, dtype)
            read(output, _viewed(self._view, self._given[name]))
        self._told.set()

    def document(self, request_id: int, plain: object) -> None:
        raise AssertionError("no document was asked for")

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self._error = error
        self._told.set()

    def released(self) -> None:
        pass

    def result(self) -> dict[str, NDArray[Any]]:
        """Return the outputs by name, once they are there. Raises what the request was refused with."""
        assert self._told.wait(PATIENCE_S), "a request was lost"
        if self._error is not None:
            raise self._error
        return self._given


def _viewed(view: Callable[[memoryview, str, tuple[int, ...]], Any], array: NDArray[Any]) -> Any:
    return view(array.reshape(-1).view(np.uint8).data, array.dtype.name, array.shape)


def submitted(running: Running, name: str, inputs: Mapping[str, NDArray[Any]]) -> Asked:
    """Give a request to the engine. Raises UnknownModel, as the server would be told."""
    engine = running.engine
    signature = engine.signature(name)
    asked = Asked(engine.view)
    arrays = [np.array(inputs[spec.name]) for spec in signature.inputs]
    views = [_viewed(engine.view, array) for array in arrays]
    engine.submit(Work(asked, 1, name, soon(), "test", views, signature))
    return asked


def called(running: Running, name: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Ask for a model, and wait for its answer."""
    return submitted(running, name, inputs).result()


def called_at_once(running: Running, *calls: tuple[str, Mapping[str, NDArray[Any]]]) -> list[dict[str, NDArray[Any]]]:
    """Ask while the engine is held up, so that all requests are there when the first is begun."""
    release = threading.Event()
    running.engine._post(lambda: release.wait(PATIENCE_S))  # type: ignore[arg-type, return-value]
    asked = [submitted(running, name, inputs) for name, inputs in calls]
    release.set()
    return [each.result() for each in asked]
