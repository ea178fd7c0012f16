"""A call about several models for which there is no room together, for weights or to compute: they are asked one after the other.

Each model's part is a request of its own, which goes the way of all requests; only when the last has been answered, or one has
failed, is the session told. What they have in common is computed for each of them, which is the price of too little memory. Part
of the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from trunkline.errors import TrunklineError

from sidecar.catalog import Deployed, Joint
from sidecar.ports import OutputSpecs, Session, Work
from sidecar.scheduler import Scheduler


class InTurn:
    """The session of the parts of one call.

    ``submit`` takes the next part and the call, ``over`` is told when there is none any more, and whether the call was answered.
    """

    def __init__(
        self,
        work: Work,
        parts: Sequence[Deployed],
        joint: Joint,
        submit: Callable[[Work, Work], None],
        over: Callable[[InTurn, bool], None],
    ) -> None:
        self.work = work
        self._joint = joint
        self._submit = submit
        self._over = over
        self._left = list(parts)
        self._specs: list[tuple[str, tuple[int, ...]]] = []
        self._outputs: list[Any] = []

    def go_on(self) -> None:
        """Submit the next part."""
        work, deployed = self.work, self._left.pop(0)
        assert work.inputs is not None
        inputs = self._joint.inputs_of(deployed, work.inputs)
        self._submit(replace(work, session=self, model=deployed.name, inputs=inputs, signature=deployed.signature), work)

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        self._specs += [(dtype, shape) for _, dtype, shape in specs]
        self._outputs += outputs
        if self._left:
            self.go_on()
            return
        named = zip(self._joint.signature.outputs, self._specs, strict=True)
        joint_specs = tuple((spec.name, dtype, shape) for spec, (dtype, shape) in named)
        # Should this fail, ``fail`` is told.
        self.work.session.answer(request_id, joint_specs, self._outputs, read)
        self._over(self, True)

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self._over(self, False)
        self.work.session.fail(request_id, error)

    def document(self, request_id: int, plain: object) -> None:
        raise AssertionError("a part of a call is never a load")

    def released(self) -> None:
        raise AssertionError("the parts of a call have no connection")


class AllInTurn:
    """Such calls, from their first part to their end."""

    def __init__(self, scheduler: Scheduler[Work], clock: Callable[[], float]) -> None:
        self._scheduler = scheduler
        self._clock = clock
        self._calls: list[InTurn] = []

    def __len__(self) -> int:
        return len(self._calls)

    def begin(self, work: Work, parts: Sequence[Deployed], joint: Joint) -> None:
        """Have the models of a call run one after the other."""
        in_turn = InTurn(work, parts, joint, self._scheduler.follow, self._end)
        self._calls.append(in_turn)
        in_turn.go_on()

    def _end(self, in_turn: InTurn, answered: bool) -> None:
        # Its caller may have left before a lane was done with it.
        if in_turn in self._calls:
            self._calls.remove(in_turn)
        self._scheduler.leave(in_turn.work, self._clock() if answered else None)

    def forget(self, session: Session) -> list[InTurn]:
        """End the calls of a session that is no more; return what is the session of their parts."""
        over = [each for each in self._calls if each.work.session is session]
        for in_turn in over:
            self._end(in_turn, answered=False)
        return over
