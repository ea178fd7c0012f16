"""The engines of a node with several devices, one for each, as one: to the server it is an engine.

A request goes where the table says (``sidecar.placing``), to that one of a model's devices that is said to answer first. A
command goes to every device that it concerns, and what they tell is made one document. Tenants have their shares, queues and
quotas of weights and of room to compute on each device by itself. All of this happens in the server's thread.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from trunkline.errors import InvalidInput, TrunklineError
from trunkline.protocol import JOINT
from trunkline.signature import Signature

from sidecar import gathered
from sidecar.constraints import Constraints
from sidecar.engine import Engine
from sidecar.placement import UNKNOWN_S
from sidecar.placing import Placing, Tally
from sidecar.ports import Session, Work
from sidecar.relays import Relay
from sidecar.tenants import ANYONE, Quotas, Tenant

# Commands whose answers have each device by its name.
_TOLD_APART: Final = ("leases", "residency", "relieve")


class Together:
    """Something that ends on several devices: ``over`` is called once, when it has on all. Any thread."""

    def __init__(self, devices: Sequence[str], over: Callable[[], None]) -> None:
        self._left = set(devices)
        self._over = over
        self._lock = threading.Lock()

    def ended(self, device: str) -> None:
        """Note that it has ended on a device."""
        with self._lock:
            is_last = self._left == {device}
            self._left.discard(device)
        if is_last:
            self._over()


class Engines:
    """Engines by the names of their devices, in the order in which an operator named them. For the server, one engine."""

    def __init__(
        self, engines: Mapping[str, Engine], constraints: Constraints, path: Path, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._engines = dict(engines)
        self._devices = list(engines)
        self._first = engines[self._devices[0]]
        self._relays: dict[Session, Relay] = {}
        self._tallies = {device: Tally() for device in engines}
        self._draining = False
        self._placing = Placing(engines, self._tallies, constraints, path, clock)

    # --- the server's thread, as with one engine ---------------------------------------------------------------------

    def signature(self, name: str) -> Signature:
        """Return the signature of a deployed model. Raises UnknownModel, ModelCorrupt, InvalidInput."""
        return self._first.signature(name)

    def versions(self, name: str) -> list[str]:
        """Return the versions that a model is deployed in, in the domain of ``name``."""
        return self._first.versions(name)

    def view(self, buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> object:
        """Return private bytes as devices take inputs and give outputs; they share the memory."""
        return self._first.view(buffer, dtype, shape)

    def check_room(self, tenant: Tenant) -> None:
        """Raise QueueFull or QuotaExceeded while requests would only be refused, on whichever device."""
        if not any(engine.has_room(tenant) for engine in self._engines.values()):
            self._first.check_room(tenant)

    def submit(self, work: Work) -> None:
        """Send a request to the device that is said to answer it first."""
        try:
            device = self._chosen(work.model)
        except TrunklineError as error:
            work.session.fail(work.request_id, error)
            return
        counted_as = self._tallies[device].begin(work.model)
        work.session = self._relay(work.session).begin(device, counted_as)
        self._engines[device].submit(work)

    def _relay(self, session: Session) -> Relay:
        relay = self._relays.get(session)
        if relay is None:
            relay = self._relays[session] = Relay(session, self._devices, self._is_over)
        return relay

    def _is_over(self, device: str, model: str) -> None:
        self._tallies[device].end(model)

    def _chosen(self, name: str) -> str:
        """Return the device for a request. Raises InvalidInput where there is none for models that are asked together."""
        where = self._placing.table.get(name) or self._until_placed(name)
        if len(where) == 1:
            return next(iter(where))
        seconds = self._placing.seconds.get(name, {})
        return min(sorted(where), key=lambda device: self._answered_in_s(device, seconds.get(device, UNKNOWN_S)))

    def _answered_in_s(self, device: str, seconds: float) -> float:
        """Return in how long a request is answered by a device, about, that it takes so many seconds for."""
        # What an engine has not looked at yet, and what it does not know the cost of, is taken to be like this one.
        others_s = max(self._engines[device].backlog_s, self._tallies[device].under_way * seconds)
        return others_s + seconds

    def _until_placed(self, name: str) -> frozenset[str]:
        """Return where something may be asked that has no place yet: where its models are, if they are together."""
        parts = name.split(JOINT)
        allowed = self._placing.allowed(name)
        if not allowed:
            raise InvalidInput(
                f"{', '.join(parts)[:200]} may not be on one device; ask them one by one, or allow all of them the same one"
            )
        known = [self._placing.table[part] for part in parts if part in self._placing.table]
        return frozenset.intersection(allowed, *known) or allowed

    def command(self, session: Session, request_id: int, name: str, arguments: dict[str, Any], deadline: float) -> None:
        """Run an administrator's command, on all devices that it concerns; the session gets the answer as a document."""
        model = str(arguments.get("name", ""))
        relay = self._relay(session)
        if name == "placement":
            self._placing.describe(relay.hold(), request_id)
            return
        if name == "place":
            asked = {key: value for key, value in arguments.items() if key != "name"}
            self._placing.constrain(relay.hold(), request_id, model, asked)
            return
        devices: Sequence[str] = self._devices
        merge = gathered.MERGES.get(name, gathered.model)
        if name in ("load", "pin"):
            devices = sorted(self._placing.table.get(model) or self._placing.allowed(model)) or self._devices[:1]
        elif name in ("blocks", "graph", "trace") or (name in _TOLD_APART and "device" in arguments):
            # What one device has, the first unless another is named.
            device = arguments.pop("device", self._devices[0])
            if not isinstance(device, str) or device not in self._engines:
                session.fail(
                    request_id, InvalidInput(f"there is no device {str(device)[:64]!r} here: {', '.join(self._devices)}")
                )
                return
            devices, merge = [device], lambda found: next(iter(found.values()))
        relay.gather(devices, merge)
        for device in devices:
            self._engines[device].command(relay.lines[device], request_id, name, dict(arguments), deadline)

    def use_quotas(self, quotas: Quotas, done: Callable[[], None] = lambda: None) -> None:
        """Take up what an operator says of tenants, on every device; ``done`` is called when every device has all it takes."""
        over = Together(self._devices, done)
        for device, engine in self._engines.items():
            engine.use_quotas(quotas, functools.partial(over.ended, device))

    def session_opened(self, models: Sequence[str] = (), tenant: Tenant = ANYONE) -> None:
        """Count a session, and load the models it is going to ask about, where they will be asked."""
        for device, engine in self._engines.items():
            engine.session_opened([name for name in models if device in self._placing.table.get(name, ())], tenant)

    def session_closed(self, session: Session) -> None:
        """Drop everything a session has queued anywhere; it is told ``released`` when nothing of it is left."""
        relay = self._relay(session)
        del self._relays[session]
        for device, engine in self._engines.items():
            engine.session_closed(relay.lines[device])

    def drain(self, drained: Callable[[], None]) -> None:
        """Refuse new requests from now on, finish the accepted ones, then call ``drained`` and end ``run``; once is enough."""
        if self._draining:
            return
        self._draining = True

        def stop() -> None:
            # Until here, those that had nothing to do any more have said so to whoever asked.
            for engine in self._engines.values():
                engine.end()
            self._placing.stop()
            drained()

        over = Together(self._devices, stop)
        for device, engine in self._engines.items():
            engine.drain(functools.partial(over.ended, device), stays=True)

    # --- before and while they run -----------------------------------------------------------------------------------

    def deploy_stored(self) -> None:
        """Deploy every model of the store on every device, and place it. Call once, before ``run`` starts."""
        for engine in self._engines.values():
            engine.deploy_stored()
        self._placing.begin()

    def run(self) -> None:
        """Serve until drained: in a thread for each engine; this one moves models."""
        threads = [
            threading.Thread(target=engine.run, name=f"engine {device}", daemon=True) for device, engine in self._engines.items()
        ]
        for thread in threads:
            thread.start()
        self._placing.run()
        for thread in threads:
            thread.join()
