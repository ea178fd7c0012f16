"""Keeps the labels of this node as its models are: which are in memory, which on disk. For the scheduler, by the API server.

An API server has thousands of nodes to serve and hands each change of a node to whoever watches: so a change is told at most
once in a while, equal labels are not told again, and after a failure it waits longer each time, no two nodes alike.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from trunkline.errors import TrunklineError

from sidecar.kubernetes.affinity import labels_of
from sidecar.kubernetes.apiserver import ApiFailure
from sidecar.labels import parted
from sidecar.tenants import unqualified

log = logging.getLogger("trunkline.kubernetes")

# A node that was removed and is back has lost its labels. Equal ones cost the API server little, and are no change to it.
_SAY_AGAIN_S: Final = 600.0
# A sidecar that does not answer for so long is gone, and its models with it.
_GONE_S: Final = 60.0
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 300.0
# Of these nothing changes by itself soon: rights are missing, or the node.
_REFUSALS: Final = frozenset({400, 403, 404, 405, 415, 422})


class NodeLabels:
    """Asks the sidecar, and tells the API server. One thread; ``step`` says when it wants to be called again."""

    def __init__(
        self,
        models: Callable[[], Iterable[Mapping[str, Any]]],
        tell: Callable[[Mapping[str, str]], None],
        clock: Callable[[], float],
        *,
        look_s: float = 5.0,
        least_pause_s: float = 30.0,
        most: int = 100,
        chance: Callable[[], float] = random.random,
    ) -> None:
        """``models`` returns the rows of the admin endpoint, or raises TrunklineError; ``tell`` may raise ApiFailure.

        Looks every ``look_s`` seconds, tells changes at most every ``least_pause_s``, of at most ``most`` models. ``chance``
        returns numbers of 0 to 1, by which nodes differ.
        """
        self._models = models
        self._tell = tell
        self._clock = clock
        self._look_s = look_s
        self._least_pause_s = least_pause_s
        self._most = most
        self._chance = chance
        # What the node carries as far as is known: nothing is, in the beginning.
        self._told: dict[str, str] | None = None
        self._answered_s = clock()
        self._may_tell_s = self._answered_s
        self._say_again_s = self._answered_s
        self._pause_s = _FIRST_PAUSE_S

    def step(self) -> float:
        """Look once, and tell what has changed; return the seconds after which to look again."""
        wanted = self._wanted()
        now = self._clock()
        if wanted is None or now < self._may_tell_s or (wanted == self._told and now < self._say_again_s):
            return self._look_s
        try:
            self._tell(wanted)
        except ApiFailure as error:
            self._failed(error, now)
        else:
            if wanted != self._told:
                log.info("this node is labelled with %d models", len(wanted))
            self._told, self._pause_s = wanted, _FIRST_PAUSE_S
            self._may_tell_s = now + self._least_pause_s
            self._say_again_s = now + _SAY_AGAIN_S * (1 + self._chance())
        return self._look_s

    def run(self, stopped: threading.Event) -> None:
        """Look and tell until ``stopped``.

        The labels stay: whoever comes next finds them true, or makes them so. Were they taken away, an upgrade would change every
        node twice, and pods that start meanwhile would go where their models are not.
        """
        pause_s = 0.0
        while not stopped.wait(pause_s):
            pause_s = self.step()

    def _wanted(self) -> dict[str, str] | None:
        """Return the labels that the node should carry; None while that cannot be known."""
        try:
            rows = list(self._models())
        except TrunklineError as error:
            if self._clock() - self._answered_s < _GONE_S:
                return None
            log.debug("the sidecar does not answer (%s)", error.code)
            return {}
        self._answered_s = self._clock()
        return labels_of([(name, row["state"]) for row in rows for name in _asked_as(row["name"])], self._most)

    def _failed(self, error: ApiFailure, now: float) -> None:
        # What the node carries is not known any more: it may have been told, and the answer lost.
        self._told = None
        if error.status in _REFUSALS:
            self._pause_s = _LONGEST_PAUSE_S
            log.error("the API server refuses to label this node (%s); see RBAC in docs/scaling.md", error)
        else:
            log.warning("this node is not labelled yet (%s)", error)
        # Between half of it and all.
        pause_s = max(self._pause_s * (1 + self._chance()) / 2, error.retry_after_s)
        self._may_tell_s = now + min(pause_s, 2 * _LONGEST_PAUSE_S)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)


def _asked_as(deployed: str) -> tuple[str, ...]:
    """Return the names that a function may ask a deployed model by, in whatever domain: its own, and a version's model's."""
    name, _ = unqualified(deployed)
    return tuple(dict.fromkeys((name, parted(name)[0])))
