"""What a name means that somebody asks for: the engine's name of the model, if it is one that they may use."""

from __future__ import annotations

from collections.abc import Callable

from trunkline.errors import UnknownModel
from trunkline.protocol import JOINT
from trunkline.signature import Signature

from sidecar.routing import Routing
from sidecar.tenants import Tenant, qualified, unqualified


class Naming:
    """``signature`` is the engine's: of a deployed model. The server's thread."""

    def __init__(self, routing: Routing, signature: Callable[[str], Signature]) -> None:
        self._routing = routing
        self._engine_signature = signature

    def known_as(self, model: str, tenant: Tenant, is_admin: bool) -> str:
        """Return the engine's name of what a tenant, or the administrator, asks for. Raises UnknownModel where it may not."""
        if not all(tenant.allows(each) for each in model.split(JOINT)):
            raise self.unknown(model, tenant)
        # An administrator may ask for a model of any domain, by its full name.
        return model if is_admin and unqualified(model)[1] else qualified(model, tenant.domain)

    def unknown(self, models: str, tenant: Tenant) -> UnknownModel:
        """Return what is told of the first model that is not there, or not allowed: which of the two is not said."""
        model = next((each for each in models.split(JOINT) if not self._has(each, tenant)), models)[:64]
        allowed = ", ".join(tenant.models[:8]) or "none"
        return UnknownModel(
            f"there is no model {model!r} that {tenant.name} may use; the operator allows it {allowed}; "
            "`trunkline push` adds a model",
            model=model,
        )

    def _has(self, model: str, tenant: Tenant) -> bool:
        if not tenant.allows(model):
            return False
        known_as = qualified(model, tenant.domain)
        try:
            route = self._routing.route(known_as)
            _ = self._engine_signature(known_as) if route is None else route.signature
        except UnknownModel:
            return False
        return True
