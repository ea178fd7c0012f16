"""Deployments: when a model of the store is deployed, and as its trial has shown to be best. Part of the engine thread.

After a start all of the store is *awaited*: what is asked for is deployed at once, where weights are in memory from an engine
before this one everything else while nobody waits for anything. What may be used besides since the quotas changed is *lacking*,
and is deployed one by one while others are served. What is deployed is tried out, unless it is known how that ended; what the
trial has shown is adopted when it is over.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from trunkline.errors import UnknownModel

from sidecar.activations import Activations
from sidecar.catalog import Catalog, Deployed
from sidecar.loads import Loads
from sidecar.ownloads import own_load
from sidecar.ports import Work
from sidecar.trials import Trials, Verdict

log = logging.getLogger("trunkline.engine")


class Deployments:
    """What is to be deployed. ``accept`` takes a load, ``drop`` forgets evicted weights, ``post`` has something done later."""

    def __init__(
        self,
        catalog: Catalog,
        loads: Loads,
        activations: Activations | None,
        trials: Trials | None,
        post: Callable[[Callable[[], None]], None],
        clock: Callable[[], float],
        *,
        accept: Callable[[Work], None],
        drop: Callable[[Sequence[str]], None],
    ) -> None:
        """Without ``activations`` nothing is found out of what calls take, without ``trials`` nothing is tried out."""
        self.has_begun = False
        self._catalog = catalog
        self._residency = catalog.residency
        self._loads = loads
        self._activations = activations
        self._trials = trials
        self._post = post
        self._clock = clock
        self._accept = accept
        self._drop = drop
        # Weights that an earlier engine has left in memory, and no model that is deployed has.
        self._kept: set[str] = set()
        # Models that may be used since the quotas changed, by the names they are still to be deployed under.
        self._lacking: deque[str] = deque()
        # What is to be called when there are none.
        self._when_complete: list[Callable[[], None]] = []

    # --- what is awaited ---------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Deploy every model of the store, now or later; a broken one does not stop the others."""
        self.has_begun = True
        self._kept = set(self._catalog.memory.kept())
        self._catalog.await_stored()
        self.complete(self._catalog.pins.names())
        if not self._kept:
            self.complete_all()
        self._deploy_lacking()

    def complete_all(self) -> None:
        """Deploy all that is awaited."""
        self.complete(list(self._catalog.awaited))

    def complete(self, names: Iterable[str]) -> None:
        """Deploy those of these models that are awaited."""
        for name in names:
            if name in self._catalog.awaited and (deployed := self._completed(name)) is not None:
                self._begin(deployed)
        if self._kept and not self._catalog.awaited:
            # No model needs it.
            self._loads.free(list(self._kept))
            self._kept.clear()

    def complete_for(self, parts: Sequence[Deployed]) -> None:
        """Deploy all models before something is to be loaded: what has to leave memory for it is chosen among all."""
        if self._catalog.awaited and not all(
            self._residency.is_committed(digest) for deployed in parts for digest in deployed.weights
        ):
            self.complete_all()

    def _completed(self, name: str) -> Deployed | None:
        """Deploy a model and return it; None when it is not to be, or cannot, or is there no more."""
        try:
            return self._catalog.complete(name)
        except UnknownModel:
            log.info("%s was removed from the store before it was deployed", name)
            return None

    def _begin(self, deployed: Deployed) -> None:
        """Go on with a model as the engine before this one has left it: as its trial has shown, and with what is in memory."""
        self._expect(deployed)
        verdict = self._trials.known(deployed.bundle, deployed.staged) if self._trials is not None else None
        if verdict is None:
            self._try_out(deployed)
        else:
            self._adopt(deployed, verdict, is_new=False)
        serving = self._catalog.deployed[deployed.name]
        self._residency.take_over(serving.plan, self._kept & serving.weights.keys())
        self._kept -= serving.weights.keys()

    # --- what is lacking ---------------------------------------------------------------------------------------------

    def domains_changed(self, done: Callable[[], None]) -> None:
        """Deploy what may be used besides since the catalog has other domains; ``done`` is called when all of that is there."""
        self._when_complete.append(done)
        while self._catalog.renamed:
            if (deployed := self._catalog.deployed.get(name := self._catalog.renamed.pop())) is not None:
                self._begin(deployed)
                self._load_pinned(name)
        if self.has_begun:
            self._lacking = deque(self._catalog.lacking())
            self._deploy_lacking()

    def deploy_first(self, names: Sequence[str]) -> None:
        """Deploy those of these models that may be used since the quotas changed and have not had their turn yet."""
        for name in names:
            if name in self._lacking:
                self._lacking.remove(name)
                self._deploy_one(name)

    def _deploy_lacking(self) -> None:
        if not self._lacking:
            # Whose quotas were replaced meanwhile are told as well.
            told, self._when_complete = self._when_complete, []
            for done in told:
                done()
            return
        name = self._lacking.popleft()
        # Others take their turn in between.
        self._post(self._deploy_lacking)
        self._deploy_one(name)

    def _deploy_one(self, name: str) -> None:
        deployed = self._completed(name)
        if deployed is not None:
            self.is_new(deployed)
            self._load_pinned(name)

    def _load_pinned(self, name: str) -> None:
        if name in self._catalog.pinned():
            self._accept(own_load(name, self._clock()))

    # --- what was deployed -------------------------------------------------------------------------------------------

    def is_new(self, deployed: Deployed) -> None:
        """Have it found out what there is to know of a model that was deployed just now."""
        self._expect(deployed)
        self._try_out(deployed)

    def _expect(self, deployed: Deployed) -> None:
        if self._activations is not None:
            self._activations.expect(deployed.bundle)

    def _try_out(self, deployed: Deployed) -> None:
        if self._trials is not None and (deployed.verdict is None or not deployed.verdict.held):
            self._trials.ask(deployed.bundle, deployed.staged, lambda verdict: self._tried(deployed, verdict))

    def _tried(self, deployed: Deployed, verdict: Verdict) -> None:
        was_resident = self._residency.is_held(deployed.plan) if self._catalog.is_deployed(deployed) else False
        self._adopt(deployed, verdict, is_new=True)
        name = deployed.name
        if was_resident and not self._catalog.is_deployed(deployed) and name in self._catalog.deployed:
            # It serves on in another form, whose weights are made while nobody waits for them.
            self._accept(own_load(name, self._clock()))

    def _adopt(self, deployed: Deployed, verdict: Verdict, *, is_new: bool) -> None:
        assert self._trials is not None
        if not self._catalog.is_deployed(deployed):
            # Removed during its trial: what was to be forgotten of it has been by now, and must not be written again.
            return
        self._drop(self._catalog.adopt(deployed, verdict))
        # After a restart what is on disk stays there: else each would make room for itself at the cost of the next.
        self._trials.keep(deployed.bundle, deployed.staged, verdict.forms, evicts=is_new)
