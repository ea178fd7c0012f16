"""What operators ask the engine for: to tell what there is, and to load, evict, pin, unpin, keep and follow the store.

Every command runs in the engine thread. Its answer is a plain document; None when the answer comes later, as that of a request.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from trunkline.errors import InvalidInput
from trunkline.protocol import JOINT

from sidecar.catalog import Catalog, Deployed
from sidecar.graph import FusedBlock
from sidecar.holdings import Holdings
from sidecar.loads import Loads
from sidecar.picture import Picture
from sidecar.ports import Work
from sidecar.scheduler import Scheduler
from sidecar.tenants import unqualified
from sidecar.traces import LIMIT

# Commands that no model matters to, or that only tell what there is now: what is to be deployed after a restart may wait.
LOOKS_ONLY: Final = frozenset({"metrics", "picture", "drain", "resume", "intake"})
# Commands that follow the store, one after the other: what they do of a model takes time for each of its nodes (``slices``).
FOLLOWS_STORE: Final = frozenset({"model_changed", "model_removed"})


class Commands:
    """Commands by name.

    ``accept``, ``drop``, ``unblock`` and ``deployed`` are the engine's; ``requests`` gives its counts, ``counts`` those that only
    metrics tell, ``trace`` its latest leases. ``intake`` has it take requests or not, None: as before, and tells what is left.
    """

    def __init__(
        self,
        catalog: Catalog,
        loads: Loads,
        *,
        accept: Callable[[Work], None],
        drop: Callable[[Sequence[str]], None],
        unblock: Callable[[], None],
        deployed: Callable[[Deployed], None],
        requests: Callable[[], Mapping[str, object]],
        counts: Callable[[], Mapping[str, object]],
        trace: Callable[[int], Mapping[str, object]],
        intake: Callable[[bool | None], object],
        scheduler: Scheduler[Work],
        facts: Mapping[str, object],
        started_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._catalog = catalog
        self._residency = catalog.residency
        self._loads = loads
        self._accept = accept
        self._drop = drop
        self._unblock = unblock
        self._on_deployed = deployed
        self._requests = requests
        self._counts = counts
        self._leases_recorded = trace
        self._scheduler = scheduler
        self._facts = facts
        self._started_s = started_s
        self._clock = clock
        holdings = Holdings(catalog, loads, drop)
        self._picture = Picture(catalog, clock)
        self._commands: dict[str, Callable[[Work, dict[str, Any]], object | None]] = {
            "status": self._status,
            "models": lambda work, arguments: {"models": self._models()},
            "model": self._model,
            "blocks": self._blocks,
            "graph": lambda work, arguments: self._catalog.graph.tree(),
            "memory": lambda work, arguments: self._memory(),
            "trace": self._trace,
            "queues": lambda work, arguments: self._queues(),
            "metrics": lambda work, arguments: {"devices": {self._catalog.device.name: self._metrics()}},
            "leases": lambda work, arguments: holdings.leases(),
            "residency": lambda work, arguments: holdings.residency(int(arguments.get("limit", 100))),
            "relieve": lambda work, arguments: holdings.relieve(arguments.get("bytes")),
            "drain": lambda work, arguments: intake(False),
            "resume": lambda work, arguments: intake(True),
            "intake": lambda work, arguments: intake(None),
            "picture": self._look,
            "load": self._load,
            "unload": self._evict,
            "evict": self._evict,
            "pin": self._pin,
            "unpin": self._unpin,
            "keep": self._keep,
            "place": self._place,
            "placement": self._place,
            "model_changed": self._model_changed,
            "model_removed": self._model_removed,
        }

    def run(self, work: Work, name: str, arguments: dict[str, Any]) -> object | None:
        """Run a command. Raises TrunklineError."""
        command = self._commands.get(name)
        if command is None:
            raise InvalidInput(f"there is no command {name[:64]!r}")
        device = arguments.pop("device", own := self._catalog.device.name)
        if device != own:
            raise InvalidInput(f"there is no device {str(device)[:64]!r} here, there is {own}")
        return command(work, arguments)

    def _known(self, name: str) -> Deployed:
        if JOINT in name:
            raise InvalidInput(f"{name[:64]} names several models; commands are for one")
        self._catalog.check_deployed(name)
        return self._catalog.deployed[name]

    # --- what there is -----------------------------------------------------------------------------------------------

    def _status(self, work: Work, arguments: dict[str, Any]) -> object:
        return {**self._overview(), "models": self._models()}

    def _overview(self) -> dict[str, object]:
        requests = dict(self._requests())
        return {
            "engine": {
                "pid": os.getpid(),
                "uptime_s": round(self._clock() - self._started_s, 3),
                "draining": requests.pop("draining"),
                **self._facts,
            },
            "memory": self._memory(),
            **requests,
        }

    def _metrics(self) -> dict[str, object]:
        """Return all that is counted here, of each model what fits into a line: so that it may be asked every few seconds."""
        return {
            **self._overview(),
            **self._counts(),
            "queues": self._queues(),
            "models": {name: self._measures(deployed) for name, deployed in self._catalog.deployed.items()},
            "corrupt": sorted(self._catalog.broken),
            "awaited_count": len(self._catalog.awaited),
        }

    def _look(self, work: Work, arguments: dict[str, Any]) -> object:
        """Return the picture of this device; ``of`` has by device what is known of it."""
        device = self._catalog.device.name
        known = arguments.get("of", {}).get(device, {})
        return {"devices": {device: self._picture.to_plain(known)}}

    def _measures(self, deployed: Deployed) -> dict[str, object]:
        """Return what of a model is a number, or counts with others that are alike."""
        plan, residency = deployed.plan, self._residency
        model_bytes, shared_bytes = self._catalog.graph.bytes_of(deployed.name)
        return {
            "state": self._state(deployed),
            "bytes": model_bytes,
            "shared_bytes": shared_bytes,
            "pinned": residency.is_pinned(plan),
            "priority": residency.priority(plan),
            "keep_alive_s": residency.ttl_s(plan),
            "leases": residency.lease_count(plan),
            "last_used_s": self._last_used_s(deployed),
        }

    def _memory(self) -> dict[str, object]:
        residency, graph = self._residency, self._catalog.graph
        resident = [name for name, deployed in self._catalog.deployed.items() if self._is_resident(deployed)]
        logical_bytes = sum(graph.bytes_of(name)[0] for name in resident)
        return {
            "budget_bytes": residency.budget_bytes,
            "resident_bytes": residency.committed_bytes,
            "logical_bytes": logical_bytes,
            # While a model is being loaded or let go, there may be bytes in memory that no whole model stands for.
            "saved_bytes": max(0, logical_bytes - residency.committed_bytes),
            "pinned_bytes": residency.pinned_bytes,
            "residency": residency.metrics(),
            **self._catalog.device.memory(),
            **self._catalog.memory.facts(),
        }

    def _trace(self, work: Work, arguments: dict[str, Any]) -> object:
        residency = self._residency
        traced = self._leases_recorded(int(arguments.get("limit", LIMIT)))
        return {"budget_bytes": residency.budget_bytes, "policy": residency.policy.name, **traced}

    def _queues(self) -> dict[str, object]:
        forecast = self._scheduler.forecast
        said_s, actual_s = forecast.percentiles(0.99)
        return {
            "forecast": {
                "predicted_p99_s": round(said_s, 6),
                "actual_p99_s": round(actual_s, 6),
            },
            "tenants": {
                name: {
                    "waiting": load.waiting_count,
                    "running": load.running_count,
                    "input_bytes": load.input_bytes,
                    "wait_s": round(load.wait_s, 6),
                    "device_s": round(load.device_s, 6),
                }
                for name, load in self._scheduler.loads().items()
            },
        }

    def _is_resident(self, deployed: Deployed) -> bool:
        # Whole in memory, be it by its own doing or by that of others. One without weights once it was used.
        if deployed.loaded and deployed.weights:
            return True
        return self._residency.is_ready(deployed.plan) and (bool(deployed.weights) or self._residency.is_held(deployed.plan))

    def _state(self, deployed: Deployed) -> str:
        if self._is_resident(deployed):
            return "resident"
        return "loading" if deployed in self._loads else "stored"

    def _last_used_s(self, deployed: Deployed) -> float | None:
        """Return how long ago a model was last asked; None for never."""
        return None if deployed.last_used_s is None else round(self._clock() - deployed.last_used_s, 3)

    def _models(self) -> list[dict[str, object]]:
        listed = [self.describe(deployed) for _, deployed in sorted(self._catalog.deployed.items())]
        broken: list[dict[str, object]] = [
            {"name": name, "domain": unqualified(name)[1], "state": "corrupt", "error": error.to_dict()}
            for name, error in sorted(self._catalog.broken.items())
        ]
        return listed + broken

    def describe(self, deployed: Deployed) -> dict[str, object]:
        """Return what an operator wants to know of a model."""
        name, plan, graph = deployed.name, deployed.plan, self._catalog.graph
        model_bytes, shared_bytes = graph.bytes_of(name) if name in graph else (0, 0)
        return {
            "name": name,
            "domain": unqualified(name)[1],
            "version": deployed.bundle.version,
            "state": self._state(deployed),
            "bytes": model_bytes,
            "shared_bytes": shared_bytes,
            "unique_bytes": model_bytes - shared_bytes,
            "shared_with": graph.sharers(name) if name in graph else [],
            "pinned": self._residency.is_pinned(plan),
            "priority": self._residency.priority(plan),
            "keep_alive_s": self._residency.ttl_s(plan),
            "leases": self._residency.lease_count(plan),
            "requests": deployed.request_count,
            "last_used_s": self._last_used_s(deployed),
        }

    def _model(self, work: Work, arguments: dict[str, Any]) -> object:
        deployed = self._known(work.model)
        return self.describe(deployed) | {
            "graph": deployed.bundle.graph_digest,
            "node_count": len(deployed.bundle.graph.nodes),
            "shared_node_count": self._catalog.graph.nodes_of(work.model)[1],
            "weight_count": len(deployed.weights),
            "stage_count": len(deployed.steps),
            "packed_stage_count": sum(1 for step in deployed.steps if step.recipes),
            "tried": deployed.verdict is not None,
            "batched": deployed.layouts is not None,
            "padded_along": deployed.verdict.padded if deployed.verdict else "",
            "unbatched_because": deployed.verdict.reason if deployed.verdict else "it was not tried yet",
            "signature": deployed.signature.to_plain(),
            **self._progress(deployed),
        }

    def _progress(self, deployed: Deployed) -> dict[str, object]:
        """Return what a model's weights take in memory in the form they are used in, and how much of that is there."""
        weights = self._residency.weights(deployed.plan)
        resident_bytes = sum(size for digest, size in weights.items() if self._residency.is_resident(digest))
        return {"memory_bytes": sum(weights.values()), "resident_bytes": resident_bytes}

    def _blocks(self, work: Work, arguments: dict[str, Any]) -> object:
        blocks = self._catalog.graph.blocks()
        offset, limit = int(arguments.get("offset", 0)), int(arguments.get("limit", 100))
        # A weight counts where it is first used, as in the graph.
        counted: set[str] = set()
        described = [self._describe_block(block, counted) for block in blocks]
        return {"total": len(blocks), "blocks": described[offset : offset + limit]}

    def _describe_block(self, block: FusedBlock, counted: set[str]) -> dict[str, object]:
        users = [self._catalog.deployed[name] for name in block.models]
        # What lies in memory are the weights of the form that the block is run in.
        step = next(step for step in users[0].steps if step.block == block.id)
        weights = {weight.digest: self._catalog.memory.size_bytes(weight) for weight in step.graph.weights}
        resident = {digest: size for digest, size in weights.items() if self._residency.is_resident(digest)}
        resident_bytes = sum(size for digest, size in resident.items() if digest not in counted)
        counted.update(weights)
        return block.to_plain() | {
            "weights": len(weights),
            "form": step.form,
            "resident_bytes": resident_bytes,
            "tier": "device" if len(resident) == len(weights) else "disk",
            "leases": sum(self._residency.lease_count(deployed.plan) for deployed in users),
        }

    # --- what is to change -------------------------------------------------------------------------------------------

    def _load(self, work: Work, arguments: dict[str, Any]) -> None:
        # Answered when the weights are there, by the same path as a request.
        self._known(work.model)
        self._accept(work)

    def _evict(self, work: Work, arguments: dict[str, Any]) -> object:
        deployed = self._known(work.model)
        if leases := self._residency.lease_count(deployed.plan):
            raise InvalidInput(f"{work.model} is in use by {leases} requests; try again", leases=leases)
        if self._residency.is_pinned(deployed.plan):
            raise InvalidInput(f"{work.model} is pinned; unpin it first")
        before_bytes = self._residency.committed_bytes
        self._drop(self._residency.evict(deployed.plan))
        # Whoever says so wants the memory.
        self._loads.trim()
        return self.describe(deployed) | {"freed_bytes": before_bytes - self._residency.committed_bytes}

    def _pin(self, work: Work, arguments: dict[str, Any]) -> None:
        deployed = self._known(work.model)
        self._residency.pin(deployed.plan)
        self._catalog.pins.add(work.model)
        self._accept(work)

    def _unpin(self, work: Work, arguments: dict[str, Any]) -> object:
        deployed = self._known(work.model)
        self._residency.unpin(deployed.plan)
        self._catalog.pins.discard(work.model)
        self._unblock()
        return self.describe(deployed)

    def _keep(self, work: Work, arguments: dict[str, Any]) -> object:
        deployed = self._known(work.model)
        pins = self._catalog.pins
        asked = {key: value for key, value in arguments.items() if key != "name"}
        pins.keep(work.model, pins.kept(work.model).changed(asked))
        self._catalog.keep(deployed)
        return self.describe(deployed)

    def _place(self, work: Work, arguments: dict[str, Any]) -> object:
        name = self._catalog.device.name
        raise InvalidInput(f"this sidecar has one device, {name}; start it with --device DEVICE,DEVICE to have several")

    def _model_changed(self, work: Work, arguments: dict[str, Any]) -> object:
        self._drop(self._catalog.deploy(work.model))
        self._catalog.publish()
        names = self._catalog.names(work.model)
        found = [self._known(name) for name in names]
        for deployed in found:
            self._on_deployed(deployed)
        described = [self.describe(deployed) for deployed in found]
        # Without domains, the model itself.
        return described[0] if names == [work.model] else {"name": work.model, "deployed": described}

    def _model_removed(self, work: Work, arguments: dict[str, Any]) -> object:
        self._drop(self._catalog.remove(work.model))
        self._catalog.publish()
        return {"name": work.model}
