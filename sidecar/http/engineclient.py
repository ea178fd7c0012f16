"""The engine as HTTP workers see it: somebody who is asked as the administrator, and who may not answer."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from trunkline.errors import Draining, SidecarUnavailable, TrunklineError

log = logging.getLogger("trunkline.admin")


class EngineClient(Protocol):
    """How the engine is asked as the administrator; ``trunkline.admin.AdminConnection`` is one."""

    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any: ...


def check_ready(engine: EngineClient) -> None:
    """Raise SidecarUnavailable when the engine does not answer, Draining when it takes no new work."""
    try:
        # Not its status: that lists all models, and whoever probes, be it a stranger, must not have them deployed.
        draining = engine.command("intake")["draining"]
    except TrunklineError as error:
        # Whatever the reason, a probe hears 503 and nothing about the machine.
        log.info("not ready: %s", error.message)
        raise SidecarUnavailable("the engine does not answer") from error
    if draining:
        raise Draining("the sidecar takes no new work")
