"""Activations: what calls take beside weights, and how many may be under way within a budget of their own.

What a call takes is found by a dry run (``sidecar.dryrun``) in a thread of its own, once for each model and class of sizes:
sizes that may vary are rounded up to a power of two, and each row counts as much as the next. Until then a call goes alone.
What was found is kept on disk: a dry run is all Python, which keeps those off that answer the first calls after a restart.
``needed_bytes`` belongs to the engine thread.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeGuard

from trunkline.protocol import ITEM_BYTES

from sidecar.bundle import Bundle
from sidecar.ports import Device
from sidecar.reserves import Reserves
from sidecar.verdicts import Verdicts

log = logging.getLogger("trunkline.engine")

# Where a dry run does not tell, a call is taken for so many times its inputs.
_GUESS: Final = 16
# Classes of sizes that are remembered.
_MOST: Final = 4096
_NICE: Final = 10

_Sizes = tuple[tuple[str, int], ...]


class _Cost(NamedTuple):
    """What a call of some rows takes, in bytes: what it takes anyway, and what for each row."""

    base_bytes: int
    row_bytes: int


class Activations:
    """``run`` is the body of the thread; ``post`` hands what it has found to the engine thread, which is told by ``learned``."""

    def __init__(
        self,
        device: Device,
        budget_bytes: int,
        post: Callable[[Callable[[], None]], None],
        learned: Callable[[], None],
        verdicts: Verdicts | None = None,
    ) -> None:
        """Without ``verdicts`` nothing is kept on disk."""
        self.reserves = Reserves(budget_bytes)
        self._device = device
        self._post = post
        self._learned = learned
        self._verdicts = verdicts
        self._known: dict[tuple[str, _Sizes], _Cost | None] = {}
        # By the very shapes, so that what is asked all the time is not reckoned each time.
        self._needed: dict[tuple[str, tuple[tuple[int, ...], ...]], int] = {}
        self._asked: set[tuple[str, _Sizes]] = set()
        self._jobs: queue.SimpleQueue[tuple[Bundle, _Sizes] | None] = queue.SimpleQueue()

    def expect(self, bundle: Bundle) -> None:
        """Find out ahead what a model's calls take, if all of them have the same sizes."""
        if {symbol.name for symbol in bundle.graph.symbols} <= {bundle.batch}:
            self._ask(bundle, ())

    def needed_bytes(self, bundle: Bundle, inputs: Sequence[Any]) -> int | None:
        """Return about how many bytes a call with these inputs takes; None while that is being found out."""
        shapes = (bundle.graph_digest, tuple(tuple(value.shape) for value in inputs))
        needed_bytes = self._needed.get(shapes)
        if needed_bytes is None:
            needed_bytes = self._estimate(bundle, inputs)
            if needed_bytes is None:
                return None
            if len(self._needed) >= _MOST:
                self._needed.clear()
            self._needed[shapes] = needed_bytes
        return needed_bytes

    def _estimate(self, bundle: Bundle, inputs: Sequence[Any]) -> int | None:
        largest = {symbol.name: symbol.maximum for symbol in bundle.graph.symbols}
        sizes = {
            axis: size
            for spec, value in zip(bundle.graph.inputs, inputs, strict=True)
            for axis, size in zip(spec.shape, value.shape, strict=True)
            if isinstance(axis, str)
        }
        rows = sizes.pop(bundle.batch, 1) if bundle.batch is not None else 1
        place = (bundle.graph_digest, tuple(sorted((axis, min(_rounded(size), largest[axis])) for axis, size in sizes.items())))
        if place not in self._known:
            self._ask(bundle, place[1])
            return None
        cost = self._known[place]
        if cost is None:
            pairs = zip(bundle.graph.inputs, inputs, strict=True)
            input_bytes: int = sum(math.prod(value.shape) * ITEM_BYTES[spec.dtype] for spec, value in pairs)
            return _GUESS * input_bytes
        return cost.base_bytes + rows * cost.row_bytes

    def _ask(self, bundle: Bundle, sizes: _Sizes) -> None:
        place = (bundle.graph_digest, sizes)
        if place not in self._known and place not in self._asked:
            self._asked.add(place)
            self._jobs.put((bundle, sizes))

    def _learn(self, place: tuple[str, _Sizes], cost: _Cost | None) -> None:
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[place] = cost
        self._asked.discard(place)
        self._learned()

    # --- the thread --------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        self._jobs.put(None)

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        while (job := self._jobs.get()) is not None:
            bundle, sizes = job
            cost = self._kept(bundle, sizes)
            if cost is None:
                log.info("what calls of %s take beside weights is not known; %d times their inputs, say", bundle.name, _GUESS)
            place = (bundle.graph_digest, sizes)
            self._post(lambda place=place, cost=cost: self._learn(place, cost))  # type: ignore[misc]

    def _kept(self, bundle: Bundle, sizes: _Sizes) -> _Cost | None:
        """Return what a dry run has found, now or before a restart."""
        if self._verdicts is None:
            return self._found(bundle, dict(sizes))
        named_as = f"{bundle.graph_digest} {bundle.batch} {sizes}"
        plain = self._verdicts.find("activations", named_as) or {}
        base_bytes, row_bytes = plain.get("base_bytes"), plain.get("row_bytes")
        if _is_size(base_bytes) and _is_size(row_bytes):
            return _Cost(base_bytes, row_bytes)
        cost = self._found(bundle, dict(sizes))
        if cost is not None:
            self._verdicts.end("activations", named_as, cost._asdict())
        return cost

    def _found(self, bundle: Bundle, sizes: Mapping[str, int]) -> _Cost | None:
        dry_run = self._device.dry_run(bundle.graph)

        def peak_bytes(rows: int) -> int | None:
            named = {**sizes, bundle.batch: rows} if bundle.batch is not None else sizes
            inputs = [
                (spec.dtype, tuple(axis if isinstance(axis, int) else named[axis] for axis in spec.shape))
                for spec in bundle.graph.inputs
            ]
            found: int | None = dry_run.peak_bytes(inputs)
            return found

        one = peak_bytes(1)
        if one is None or bundle.batch is None:
            return None if one is None else _Cost(one, 0)
        two = peak_bytes(2)
        # Some models take no two rows.
        row_bytes = one if two is None else max(0, two - one)
        return _Cost(one - min(one, row_bytes), row_bytes)


def _is_size(found: object) -> TypeGuard[int]:
    return isinstance(found, int) and not isinstance(found, bool) and found >= 0


def _rounded(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()
