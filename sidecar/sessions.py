"""Sessions: lowered graphs run by ONNX Runtime, their weights given by reference with each run.

A session knows the structure of a stage and nothing of its weights, so all models of that structure are run by one. It is made
when inputs of a new form are met: other ranks, other channels, sizes that are equal where they were not. Making one takes
milliseconds, and only the last few are kept. What a session does not take, or fails at, is run by torch instead, from the same
weights: slower, and with torch's errors.

Threads sleep between runs, in pools of each session's own, since functions share the cores; there are not more than a container
may have (``_Spare``). What was lent for a run stays bound until the next (``sidecar.bindings``). CPU only. Whether ONNX Runtime
is there, and has blocks on this processor, ``block`` says.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import torch
from torch.utils.dlpack import from_dlpack
from trunkline.errors import DeviceOutOfMemory

from sidecar.bindings import Bindings
from sidecar.blocked import Blocked
from sidecar.ir import Graph
from sidecar.programs import FAILURES, Program, failure
from sidecar.stretches import Unjoined

# From 1.29 on it tells its makers what it is used for, unless it is told not to before it is imported.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"
try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _state

    from sidecar import onnxgraph

    # What it raises are classes of its own, without a common one.
    _RAISED: tuple[type[Exception], ...] = tuple(
        each for each in vars(_state).values() if isinstance(each, type) and issubclass(each, Exception)
    )
except ImportError:
    # It has no wheel for every machine.
    onnxruntime = None
    _RAISED = ()

log = logging.getLogger("trunkline.engine")

_ERRORS: Final[tuple[type[Exception], ...]] = (*_RAISED, *FAILURES)

_MOST_SESSIONS: Final = 16
# Beyond so many, one is made only where there were so many runs for each that was.
_RUNS_EACH: Final = 16
# As ONNX Runtime counts: errors.
_ERRORS_ONLY: Final = 3


@functools.cache
def block() -> int:
    """Return how many channels ONNX Runtime has in a block on this processor; 0 where it is not there, or has no blocks."""
    if onnxruntime is None:
        return 0
    try:
        x = _value(torch.zeros(1, 4, 1, 1))
        given = _run(Bindings(_open(onnxgraph.probe(), 1), x), (), {"x": x}, ["y"])
        return int(given[0].shape[1])
    except _ERRORS as error:
        log.warning("ONNX Runtime has no convolutions in blocks here (%s); it is not used", str(error).partition("\n")[0])
        return 0


def version() -> str:
    """Return the version of ONNX Runtime, ``none`` where it is not used."""
    return str(onnxruntime.__version__) if block() else "none"


def has_operators(graph: Graph) -> bool:
    """Say whether there is a translation for each operator of a lowered graph. Only where there is a ``block``."""
    return onnxgraph.translatable(graph)


class SessionProgram:
    """A lowered graph with weights in blocks. Like ``Program``, it has no weights, and several threads may run it at once."""

    def __init__(self, graph: Graph, program: Program | None) -> None:
        """``program`` runs the same graph on torch; None for several stages, which torch would run one by one.

        Of those, threads do not sleep before the end of a run.
        """
        self._graph = graph
        self._program = program
        self._sessions: OrderedDict[Any, _Opened | None] = OrderedDict()
        self._lock = threading.Lock()
        # Runs, those that torch had to do instead, and sessions that were made.
        self._run_count = 0
        self.fallback_count = 0
        self._made_count = 0

    def run(self, weights: Sequence[Any], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the outputs, as ``Program.run`` does. The outputs are ONNX Runtime's memory, freed with them.

        Raises Unjoined where torch would have to run several stages.
        """
        found = self._session(weights, inputs)
        if found is None:
            return self._on_torch(weights, inputs, "there is no session for it")
        bindings, outputs = found
        names = list(dict.fromkeys(name for name, _ in outputs))
        try:
            given = _run(bindings, weights, _input_values(inputs), names)
        except _ERRORS as error:
            if isinstance(told := failure("running a stage", error), DeviceOutOfMemory):
                raise told from error
            return self._on_torch(weights, inputs, str(error).partition("\n")[0])
        by_name = dict(zip(names, given, strict=True))
        return [by_name[name].permute(0, 3, 1, 2) if is_last else by_name[name] for name, is_last in outputs]

    def _on_torch(self, weights: Sequence[Any], inputs: Sequence[torch.Tensor], reason: str) -> list[torch.Tensor]:
        self.fallback_count += 1
        if self._program is None:
            raise Unjoined(f"ONNX Runtime does not run them as one: {reason}")
        log.debug("a stage is run by torch: %s", reason)
        return self._program.run(weights, inputs)

    def _session(self, weights: Sequence[Any], inputs: Sequence[torch.Tensor]) -> _Opened | None:
        """Return the session for such inputs and the calling thread's number of threads; None where there is none.

        One for any size is wanted. Where a graph has a size in it that is that of an axis, it must be for this size.
        """
        self._run_count += 1
        for exact in (False, True):
            forms = _forms(inputs, exact)
            if forms is not None and (found := self._known(weights, forms, torch.get_num_threads())) is not None:
                return found
        return None

    def _known(self, weights: Sequence[Any], forms: tuple[onnxgraph.InputForm, ...], threads: int) -> _Opened | None:
        key = (forms, threads)
        with self._lock:
            if key in self._sessions:
                self._sessions.move_to_end(key)
                return self._sessions[key]
            # Where inputs are of ever other forms, to make one for each takes longer than it saves.
            if self._made_count >= _MOST_SESSIONS and self._run_count < _RUNS_EACH * self._made_count:
                return None
            self._made_count += 1
        made = self._make(weights, forms, threads)
        with self._lock:
            self._sessions[key] = made
            while len(self._sessions) > _MOST_SESSIONS:
                self._sessions.popitem(last=False)
        return made

    def _make(self, weights: Sequence[Any], forms: tuple[onnxgraph.InputForm, ...], threads: int) -> _Opened | None:
        weight_forms = [
            onnxgraph.WeightForm("float32", each.layout.padded_shape, each.layout)
            if isinstance(each, Blocked)
            else onnxgraph.WeightForm(str(each.dtype).removeprefix("torch."), tuple(each.shape))
            for each in weights
        ]
        try:
            translated = onnxgraph.translate(self._graph, forms, weight_forms)
            session = _open(translated.model, threads, spins=self._program is None)
            return _Opened(Bindings(session, _value(torch.zeros(1))), translated.outputs)
        except onnxgraph.Untranslatable as error:
            log.info("a stage is run by torch: %s", error)
        except _ERRORS as error:
            if isinstance(told := failure("opening a session", error), DeviceOutOfMemory):
                # There may be some the next time.
                raise told from error
            log.warning("ONNX Runtime takes no stage like this (%s); it is run by torch", str(error).partition("\n")[0])
        return None


def _forms(inputs: Sequence[torch.Tensor], exact: bool) -> tuple[onnxgraph.InputForm, ...] | None:
    """Return what a session depends on of inputs; None where they are not for any.

    Channels, and the last axis of what are no pictures, are part of it; of all other axes, unless ``exact``, only which are as
    long as which. An axis is named by the first input that has its size at that place. Of the first axis, the rows, that is so
    in any case.
    """
    names: dict[tuple[int, int, int], tuple[int, int]] = {}
    forms = []
    for number, tensor in enumerate(inputs):
        rank = tensor.dim()
        if not tensor.numel() or tensor.dtype not in _DTYPES:
            return None
        fixed = 1 if rank == 4 else rank - 1
        axes = tuple(
            size if axis and (exact or axis == fixed) else names.setdefault((rank if axis else 0, axis, size), (number, axis))
            for axis, size in enumerate(tensor.shape)
        )
        forms.append(onnxgraph.InputForm(_DTYPES[tensor.dtype], axes, _is_last(tensor)))
    return tuple(forms)


_DTYPES: Final = {torch.float32: "float32", torch.int64: "int64", torch.int32: "int32", torch.bool: "bool"}


def _is_last(tensor: torch.Tensor) -> bool:
    """Say whether a picture's channels lie last in memory."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


class _Opened(NamedTuple):
    """A session, by what was bound to it, and the outputs of its graph (``onnxgraph.Translation``)."""

    bindings: Bindings
    outputs: tuple[tuple[str, bool], ...]


class _Spare:
    """How many threads sessions may still have beside those that run them. Sessions that come when there are none do without."""

    def __init__(self, count: int) -> None:
        self.count = count
        # Given back when a session goes, which a collection within ``take`` may bring about.
        self._lock = threading.RLock()

    def take(self, wanted: int) -> int:
        with self._lock:
            # Half a pool would be in the way of a whole one.
            taken = wanted if wanted <= self.count else 0
            self.count -= taken
            return taken

    def give_back(self, count: int) -> None:
        with self._lock:
            self.count += count


# Of 512 that SECURITY.md gives the sidecar's container.
_SPARE: Final = _Spare(192)


def _open(model: bytes, threads: int, spins: bool = False) -> Any:
    """Return a session that runs on so many threads, that of the caller included, or on that alone where there are no more.

    With ``spins``, those that have nothing to do look out for work until the run ends, instead of sleeping. That is for runs of
    some length: to wake a core takes as long as a small operator, and a session of a single stage ends before it pays.
    """
    taken = _SPARE.take(threads - 1)
    try:
        session = _opened(model, 1 + taken, spins)
    except BaseException:
        _SPARE.give_back(taken)
        raise
    weakref.finalize(session, _SPARE.give_back, taken)
    return session


def _opened(model: bytes, threads: int, spins: bool) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # As it is written: what the optimiser would make of it stands there.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    # An arena would keep what a run took, outside of any budget.
    options.enable_cpu_mem_arena = False
    options.enable_mem_pattern = False
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spins)))
    # Otherwise they go on for some 50 ms, on cores that functions share.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _value(tensor: torch.Tensor) -> Any:
    """Return a contiguous tensor as ONNX Runtime takes it; it shares the memory."""
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def _input_values(inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    return {
        onnxgraph.input_name(number): _value(tensor.permute(0, 2, 3, 1) if _is_last(tensor) else tensor.contiguous())
        for number, tensor in enumerate(inputs)
    }


def _weight_values(weights: Sequence[Any]) -> dict[str, Any]:
    values = {}
    for number, each in enumerate(weights):
        if isinstance(each, Blocked):
            values[onnxgraph.weight_name(number)], values[onnxgraph.bias_name(number)] = _value(each.weight), _value(each.bias)
        else:
            values[onnxgraph.weight_name(number)] = _value(each)
    return values


def _run(bindings: Bindings, weights: Sequence[Any], inputs: dict[str, Any], outputs: Sequence[str]) -> list[torch.Tensor]:
    return [from_dlpack(value) for value in bindings.run(weights, lambda: _weight_values(weights), inputs, outputs)]
