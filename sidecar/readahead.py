"""Reading ahead: models that functions have named, and not asked for yet, are loaded while nobody waits for anything.

Part of the engine thread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from trunkline.errors import TrunklineError
from trunkline.protocol import JOINT

from sidecar.admission import Admission
from sidecar.catalog import Catalog, Deployed
from sidecar.claims import Claims
from sidecar.deployments import Deployments
from sidecar.loads import Loads
from sidecar.ownloads import own_load
from sidecar.ports import Work
from sidecar.scheduler import Scheduler
from sidecar.tenants import Tenant


class ReadAhead:
    """What was named. ``drop`` forgets evicted weights."""

    def __init__(
        self,
        catalog: Catalog,
        scheduler: Scheduler[Work],
        loads: Loads,
        claims: Claims,
        deployments: Deployments,
        admission: Admission,
        clock: Callable[[], float],
        *,
        drop: Callable[[Sequence[str]], None],
    ) -> None:
        self._catalog = catalog
        self._residency = catalog.residency
        self._scheduler = scheduler
        self._loads = loads
        self._claims = claims
        self._deployments = deployments
        self._admission = admission
        self._clock = clock
        self._drop = drop
        # By whose functions they were named, too.
        self._named: dict[tuple[str, str], Tenant] = {}

    def note(self, models: Sequence[str], tenant: Tenant) -> None:
        """Have models loaded soon, in the quota of a tenant."""
        for name in (each for joint in models for each in joint.split(JOINT)):
            if name in self._catalog.deployed or name in self._catalog.awaited:
                self._named[name, tenant.name] = tenant

    def go_on(self) -> None:
        """Have loaded what there is room for, until somebody waits."""
        while self._named and not len(self._scheduler) and self._admission.is_open:
            name, _ = place = next(iter(self._named))
            tenant = self._named.pop(place)
            self._deployments.complete([name])
            deployed = self._catalog.deployed.get(name)
            if deployed is not None and not deployed.loaded and deployed not in self._loads:
                self._load(deployed, tenant)

    def _load(self, deployed: Deployed, tenant: Tenant) -> None:
        self._deployments.complete_for([deployed])
        try:
            self._catalog.prepare(deployed)
            # Of its quota, as if it had asked; or whoever names many models would push out those of others.
            freed = self._claims.make_room(tenant, [deployed.plan])
            if freed is None:
                return
            self._drop(freed)
            grant = self._residency.lease(deployed.plan)
        except TrunklineError:
            # Whoever asks for it is told, or has it streamed.
            return
        # Where there is no room just now it is read when it is asked for.
        if grant is not None:
            self._admission.load(own_load(deployed.name, self._clock()), (deployed,), None, tenant, grant)
