"""Loads that nobody has asked for over a connection: of what is pinned, deployed anew, placed here, or soon to be asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

from trunkline.errors import TrunklineError

from sidecar.ports import OutputSpecs, Session, Work
from sidecar.tenants import ANYONE

# Whose such loads are: nobody's who has limits.
_ITSELF: Final = replace(ANYONE, name="(sidecar)")
# How long one may take: of models that were pinned before a restart, say.
_LOAD_S: Final = 600.0


def own_load(name: str, now: float, over: Callable[[TrunklineError | None], None] = lambda error: None) -> Work:
    """Return a load of a model, or of several together. ``over`` is told when it is over, and what was wrong."""
    return Work(_Awaited(over), 0, name, now + _LOAD_S, tenant=_ITSELF)


def unheard() -> Session:
    """Return a session for what goes on although nobody is there any more to be told."""
    return _Awaited(lambda error: None)


class _Awaited:
    """The session of such a load."""

    def __init__(self, over: Callable[[TrunklineError | None], None]) -> None:
        self._over = over

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        raise AssertionError("the engine asks itself for loads only")

    def document(self, request_id: int, plain: object) -> None:
        self._over(None)

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self._over(error)

    def released(self) -> None:
        raise AssertionError("a load has no connection")
