"""The engine: one thread that owns graph, residency and queue, and gives the device its work.

Everybody else posts a command to its inbox and is told the outcome through the session the command came from. Nothing
here waits for a disk: a mover thread reads weights and posts them to the same inbox. Devices and the store
come in as arguments; this module imports neither torch nor the store.

Life of a request: queued; leased (its model's weights may no longer be evicted); parked while missing weights are read;
run; answered; lease returned.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import queue
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from trunkline.errors import (
    BudgetExceeded,
    DeadlineExceeded,
    Draining,
    InvalidInput,
    ModelCorrupt,
    QueueFull,
    SidecarFault,
    SignatureMismatch,
    TrunklineError,
    UnknownModel,
)
from trunkline.protocol import JOINT, MAX_JOINT
from trunkline.signature import Signature

from sidecar.bundle import Bundle, Weight
from sidecar.errors import BundleError, StoreError
from sidecar.fuse import fuse
from sidecar.graph import FusedBlock, FusedGraph
from sidecar.logs import RateLimit
from sidecar.merkle import skeleton_id
from sidecar.mover import Mover
from sidecar.pins import Pins
from sidecar.ports import Device, OutputSpecs, Session, Source, Work
from sidecar.residency import Residency
from sidecar.scheduler import Queue

log = logging.getLogger("trunkline.engine")
# One line a refused request, as long as there are not too many of them.
refusals = logging.getLogger("trunkline.engine.refusals")
refusals.addFilter(RateLimit(20))

# An engine that had nothing to do for so long gives back what its last runs left in the allocator.
_IDLE_S: Final = 1.0
# Commands and requests that are taken from the inbox before a request must be started.
_MOST_TAKEN: Final = 8
# Combinations of models that are kept ready.
_MOST_JOINT: Final = 64
# Fusing takes some 50 us for each operator, in a thread that others wait for.
_MOST_JOINT_NODES: Final = 20_000
# How long the models pinned before a restart may take to come back.
_PIN_LOAD_S = 600.0


@dataclass(slots=True)
class Deployed:
    """A deployed version of a model and what the engine prepared for it."""

    bundle: Bundle
    plan: str
    signature: Signature
    skeleton: str
    program: Any = None
    bound: list[object] | None = None
    request_count: int = 0
    last_used_s: float | None = None


@dataclass(slots=True)
class Counts:
    """What the engine has done since it started."""

    answered: int = 0
    failed: int = 0
    expired: int = 0
    fetched_bytes: int = 0
    evicted_bytes: int = 0


@dataclass(slots=True)
class _Load:
    """Weights still on their way for a plan, the requests that wait for them, and what went wrong so far."""

    waiting: set[str]
    parked: list[Work] = field(default_factory=list)
    error: TrunklineError | None = None


class Engine:
    """Owner of all mutable state. ``run`` is the engine thread; every other public method may be called anywhere."""

    def __init__(
        self,
        device: Device,
        source: Source,
        pins: Pins,
        *,
        budget_bytes: int,
        queue_limit: int,
        generation: int = 0,
        facts: dict[str, object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._source = source
        self._pins = pins
        self._clock = clock
        self._generation = generation
        self._facts = facts or {}
        self._started_s = clock()
        self._inbox: queue.SimpleQueue[Work | Callable[[], None]] = queue.SimpleQueue()
        self._mover = Mover(device, source, self._post)
        self._graph = FusedGraph()
        self._residency = Residency(budget_bytes)
        self._queue: Queue[Work] = Queue(queue_limit)
        self._deployed: dict[str, Deployed] = {}
        self._broken: dict[str, TrunklineError] = {}
        # Models that were asked about together, by their names with JOINT between them.
        self._joint: dict[str, Deployed] = {}
        # Versions that were replaced while they were in use, by plan.
        self._retired: dict[str, Deployed] = {}
        self._handles: dict[str, object] = {}
        # Prepared programs by skeleton, of the models that are deployed.
        self._programs: dict[str, Any] = {}
        self._loads: dict[str, _Load] = {}
        # Weights that the mover was asked for and has not brought yet.
        self._in_flight: set[str] = set()
        self._ready: deque[tuple[Work, Deployed]] = deque()
        # Set while the head of the queue waits for a lease of somebody else to end.
        self._blocked = False
        self._untrimmed = False
        # Commands and requests taken from the inbox since a request was last started.
        self._taken = 0
        self._draining = False
        self._drained: Callable[[], None] | None = None
        self._finished = False
        self._counts = Counts()
        self._session_count = 0
        # Written by the server's thread alone.
        self._turned_away = 0
        # Replaced as a whole, never changed in place, so that other threads may read it without a lock.
        self._published: dict[str, Signature | TrunklineError] = {}
        self._bundles: dict[str, Bundle] = {}
        # What models asked about together take and give; made by whichever thread needs it first, from what is published.
        self._fused: dict[str, tuple[tuple[Bundle, ...], Bundle, Signature]] = {}
        self._commands: dict[str, Callable[[Work, dict[str, Any]], object | None]] = {
            "status": self._status,
            "models": lambda work, arguments: {"models": self._models()},
            "model": self._model,
            "blocks": self._blocks,
            "graph": lambda work, arguments: self._graph.tree(),
            "memory": lambda work, arguments: self._memory(),
            "load": self._load,
            "unload": self._evict,
            "evict": self._evict,
            "pin": self._pin,
            "unpin": self._unpin,
            "model_changed": self._model_changed,
            "model_removed": self._model_removed,
        }

    # --- called from other threads -----------------------------------------------------------------------------------

    def signature(self, name: str) -> Signature:
        """Return the signature of a deployed model. Raises UnknownModel, ModelCorrupt."""
        found = self._published.get(name)
        if isinstance(found, Signature):
            return found
        if found is not None:
            raise ModelCorrupt(f"{name} cannot be served: {found.message}", model=name)
        if JOINT in name:
            return self._fuse(name)[1]
        known = ", ".join(sorted(self._published)[:8]) or "none"
        raise UnknownModel(
            f"the sidecar holds no model {name[:64]!r}; it holds {known}; `trunkline push` adds one", model=name[:64]
        )

    def _fuse(self, name: str) -> tuple[Bundle, Signature]:
        """Return what several models are together. Raises UnknownModel, ModelCorrupt, InvalidInput. Any thread."""
        names = name.split(JOINT)
        if len(names) > MAX_JOINT or names != sorted(set(names)):
            raise InvalidInput(f"{name[:64]!r} does not name up to {MAX_JOINT} models in the order of their names, each once")
        for each in names:
            self.signature(each)
        published = self._bundles
        try:
            bundles = tuple(published[each] for each in names)
        except KeyError as error:
            raise UnknownModel(f"{error.args[0]} is being replaced; try again", model=str(error.args[0])) from error
        known = self._fused.get(name)
        if known is not None and all(one is other for one, other in zip(known[0], bundles, strict=True)):
            return known[1:]
        node_count = sum(len(bundle.graph.nodes) for bundle in bundles)
        if node_count > _MOST_JOINT_NODES:
            raise InvalidInput(
                f"{name[:64]} have {node_count} operators together, at most {_MOST_JOINT_NODES} are asked together",
                node_count=node_count,
                limit_count=_MOST_JOINT_NODES,
            )
        graph = fuse({bundle.name: bundle.graph for bundle in bundles})
        digest = hashlib.sha256(" ".join(bundle.graph_digest for bundle in bundles).encode()).hexdigest()
        version = JOINT.join(bundle.version for bundle in bundles)
        tolerance = max(bundle.tolerance for bundle in bundles)
        made = Bundle(name, version, graph, digest, None, tolerance, {})
        signature = _signature(made)
        # Two threads may be here; a copy of the keys is taken at one stroke.
        for oldest in list(self._fused)[: len(self._fused) - _MOST_JOINT + 1]:
            self._fused.pop(oldest, None)
        self._fused[name] = (bundles, made, signature)
        return made, signature

    def view(self, buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> object:
        """Return private bytes as the device takes its inputs and gives its outputs; they share the memory."""
        return self._device.view(buffer, dtype, shape)

    def submit(self, work: Work) -> None:
        """Queue a request; its session is told the outcome."""
        self._inbox.put(work)

    def check_room(self) -> None:
        """Raise QueueFull while requests would only be refused. For the server's thread: a flood ends before the inbox."""
        try:
            self._queue.check_room()
        except QueueFull:
            self._turned_away += 1
            raise

    def command(self, session: Session, request_id: int, name: str, arguments: dict[str, Any], deadline: float) -> None:
        """Run an administrator's command; its session gets the answer as a document."""
        work = Work(session, request_id, str(arguments.get("name", "")), deadline)
        self._post(lambda: self._run_command(work, name, arguments))

    def session_opened(self) -> None:
        """Count a session."""

        def count() -> None:
            self._session_count += 1

        self._post(count)

    def session_closed(self, session: Session) -> None:
        """Drop everything a session has queued; it is told ``released`` when nothing of it is left."""
        self._post(lambda: self._forget(session))

    def drain(self, drained: Callable[[], None]) -> None:
        """Refuse new requests from now on, finish the accepted ones, then call ``drained`` and end ``run``."""
        self._post(lambda: self._start_drain(drained))

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)

    # --- the engine thread -------------------------------------------------------------------------------------------

    def deploy_stored(self) -> None:
        """Deploy every model of the store. Call once, before ``run`` starts; a broken model does not stop the others."""
        for name in self._source.models():
            self._deploy(name)
        for name in self._pins.names():
            if name in self._deployed:
                self._pin_if_possible(self._deployed[name])
        self._publish()

    def run(self) -> None:
        """Serve until drained. The engine thread's body."""
        threading.Thread(target=self._mover.run, name="mover", daemon=True).start()
        for name in self._pins.names():
            if name in self._deployed:
                self._accept(Work(_Nobody(), 0, name, self._clock() + _PIN_LOAD_S))
        while not self._finished:
            try:
                self._step()
            except Exception:
                # A bug in one command must not end the service for all; it is logged with its trace.
                log.exception("a command failed")
        self._mover.stop()
        if self._drained is not None:
            self._drained()

    def _step(self) -> None:
        # Work goes on while there is some, but what has been posted meanwhile comes first.
        busy = bool(self._ready) or (len(self._queue) > 0 and not self._blocked)
        try:
            command = self._inbox.get(block=not busy, timeout=_IDLE_S if self._untrimmed else None)
        except queue.Empty:
            if busy:
                self._start_next()
            else:
                self._device.trim()
                self._untrimmed = False
            return
        self._untrimmed = True
        if isinstance(command, Work):
            self._accept(command)
        else:
            command()
        self._taken += 1
        # All that has been posted is seen before the next request is chosen; but a flood of what is only refused must not
        # keep the chosen ones waiting.
        if self._inbox.empty() or self._taken >= _MOST_TAKEN:
            self._taken = 0
            self._start_next()

    def _accept(self, work: Work) -> None:
        if self._draining:
            work.session.fail(work.request_id, _draining())
            return
        try:
            self.signature(work.model)
            self._queue.submit(work)
        except TrunklineError as error:
            self._fail(work, error)

    def _start_next(self) -> None:
        if self._ready:
            self._run(*self._ready.popleft())
        elif not self._blocked:
            expired, work = self._queue.take(self._clock())
            for late in expired:
                self._counts.expired += 1
                self._fail(late, self._late(late, "waiting"))
            if work is not None:
                self._admit(work)
        self._finish_if_drained()

    def _admit(self, work: Work) -> None:
        try:
            deployed = self._deploy_joint(work.model) if JOINT in work.model else self._deployed.get(work.model)
        except TrunklineError as error:
            self._fail(work, error)
            return
        if deployed is None:
            self._fail(work, UnknownModel(f"{work.model} was removed while the request was waiting", model=work.model))
            return
        if work.signature is not None and not _takes_the_same(deployed.signature, work.signature):
            # What was checked is what is computed: these inputs were another version's.
            version = deployed.signature.version
            self._fail(work, SignatureMismatch(f"{work.model} became version {version} while the request was waiting"))
            return
        try:
            self._prepare(deployed)
            was_held = self._residency.is_held(deployed.plan)
            grant = self._residency.lease(deployed.plan)
        except TrunklineError as error:
            self._fail(work, error)
            return
        if grant is None:
            self._queue.put_back(work)
            self._blocked = True
            return
        if not was_held:
            self._drop(grant.evict)
            self._fetch(deployed)
        if deployed.plan in self._loads:
            self._loads[deployed.plan].parked.append(work)
        else:
            self._run(work, deployed)

    def _fetch(self, deployed: Deployed) -> None:
        weights = self._weights(deployed)
        waiting = {digest for digest in weights if not self._residency.is_resident(digest)}
        if not waiting:
            return
        # The load itself holds a lease: bytes that are being read must not be taken for evictable. Some of them may
        # be on their way already, for another model.
        self._residency.lease(deployed.plan)
        self._loads[deployed.plan] = _Load(waiting)
        # Those on their way for another model are waited for; those that failed on it are tried again.
        for digest in waiting - self._in_flight:
            self._in_flight.add(digest)
            self._mover.fetch(weights[digest], self._arrived)

    def _arrived(self, weight: Weight, outcome: object) -> None:
        error = outcome if isinstance(outcome, TrunklineError) else None
        self._in_flight.discard(weight.digest)
        if error is None:
            self._handles[weight.digest] = outcome
            self._residency.arrived(weight.digest)
            self._counts.fetched_bytes += weight.size_bytes
        else:
            log.error("weight %s could not be loaded: %s", weight.digest[:12], error.message)
        for plan, load in list(self._loads.items()):
            if weight.digest in load.waiting:
                load.waiting.discard(weight.digest)
                load.error = load.error or error
                if not load.waiting:
                    self._finish_load(plan)

    def _finish_load(self, plan: str) -> None:
        load = self._loads.pop(plan)
        deployed = self._by_plan(plan)
        if load.error is None:
            self._ready.extend((work, deployed) for work in load.parked)
            self._release(deployed)
            return
        for work in load.parked:
            self._fail(work, load.error)
            self._release(deployed)
        self._release(deployed)
        # What did arrive goes too, so that the next request starts the load afresh.
        self._drop(self._residency.evict(plan))

    def _run(self, work: Work, deployed: Deployed) -> None:
        try:
            if work.inputs is None:
                work.session.document(work.request_id, self._describe(work.model, deployed))
            else:
                if work.deadline <= self._clock():
                    raise self._late(work, "waiting for its model to be loaded")
                self._compute(work, deployed, work.inputs)
                self._counts.answered += 1
        except TrunklineError as error:
            self._fail(work, error)
        except Exception as error:  # noqa: BLE001 - _incident logs it
            self._fail(work, _incident(f"{work.model} (call {work.call_id})", error))
        finally:
            self._release(deployed)

    def _compute(self, work: Work, deployed: Deployed, inputs: Sequence[object]) -> None:
        device = self._device
        if deployed.bound is None:
            deployed.bound = [device.as_weight(self._handles[weight.digest], weight) for weight in deployed.bundle.graph.weights]
        outputs = device.run(deployed.program, deployed.bound, inputs)
        specs = tuple(
            (spec.name, *device.output_spec(output)) for spec, output in zip(deployed.signature.outputs, outputs, strict=True)
        )
        work.session.answer(work.request_id, specs, outputs, device.read_output)
        now = self._clock()
        for used in (self._deployed.get(name) for name in work.model.split(JOINT)):
            if used is not None:
                used.request_count += 1
                used.last_used_s = now

    def _release(self, deployed: Deployed) -> None:
        self._residency.release(deployed.plan)
        self._blocked = False
        if deployed.plan in self._retired and not self._residency.lease_count(deployed.plan):
            del self._retired[deployed.plan]
            self._drop_programs()
            self._drop(self._residency.remove_plan(deployed.plan))

    def _drop(self, digests: Sequence[str]) -> None:
        if not digests:
            return
        weights = self._graph.all_weights()
        for digest in digests:
            self._handles.pop(digest, None)
            if digest in weights:
                self._counts.evicted_bytes += weights[digest].size_bytes
        # A bound list would keep the dropped bytes alive.
        for deployed in self._all():
            if deployed.bound is not None and not self._residency.is_held(deployed.plan):
                deployed.bound = None

    def _late(self, work: Work, doing: str) -> DeadlineExceeded:
        late_s = self._clock() - work.deadline
        return DeadlineExceeded(
            f"the deadline passed {late_s:.3f} s ago while the request was {doing}; {len(self._queue)} others wait",
            late_s=round(late_s, 3),
            waiting_count=len(self._queue),
        )

    def _fail(self, work: Work, error: TrunklineError) -> None:
        self._counts.failed += 1
        refusals.info("%s refused (call %s): %s: %s", work.model, work.call_id or "-", error.code, error.message)
        work.session.fail(work.request_id, error)

    def _forget(self, session: Session) -> None:
        self._session_count -= 1
        self._queue.drop(lambda work: work.session is session)
        for plan, load in self._loads.items():
            kept = [work for work in load.parked if work.session is not session]
            for _ in range(len(load.parked) - len(kept)):
                self._release(self._by_plan(plan))
            load.parked = kept
        for entry in [entry for entry in self._ready if entry[0].session is session]:
            self._ready.remove(entry)
            self._release(entry[1])
        session.released()

    def _start_drain(self, drained: Callable[[], None]) -> None:
        self._draining = True
        self._drained = drained
        self._finish_if_drained()

    def _finish_if_drained(self) -> None:
        waiting = bool(self._ready) or len(self._queue) > 0 or any(load.parked for load in self._loads.values())
        self._finished = self._draining and not waiting

    def check_invariants(self) -> None:
        """Raise AssertionError when the engine's books do not balance. Only in the engine thread, or after it ended."""
        self._graph.check_invariants()
        self._residency.check_invariants()
        used = {deployed.skeleton for deployed in self._all()}
        assert self._programs.keys() <= used, "programs are kept for nobody"
        for digest in self._handles:
            assert self._residency.is_resident(digest), f"weight {digest[:12]} is kept though it was evicted"
        for plan in {deployed.plan for deployed in self._all()}:
            ready = sum(1 for _, deployed in self._ready if deployed.plan == plan)
            load = self._loads.get(plan)
            expected = ready + (len(load.parked) + 1 if load else 0)
            assert self._residency.lease_count(plan) == expected, f"{plan}: leases do not match the requests under way"

    # --- deployed models ---------------------------------------------------------------------------------------------

    def _weights(self, deployed: Deployed) -> dict[str, Weight]:
        return {weight.digest: weight for weight in deployed.bundle.graph.weights}

    def _by_plan(self, plan: str) -> Deployed:
        if plan in self._retired:
            return self._retired[plan]
        name = plan.rpartition("@")[0]
        return self._joint[name] if JOINT in name else self._deployed[name]

    def _all(self) -> Iterator[Deployed]:
        return itertools.chain(self._deployed.values(), self._joint.values(), self._retired.values())

    def _deploy(self, name: str) -> None:
        self._broken.pop(name, None)
        try:
            bundle = self._source.model(name)
        except (BundleError, StoreError, ModelCorrupt) as error:
            log.error("%s cannot be served: %s", name, error.message)
            self._withdraw(name)
            self._broken[name] = error
            return
        plan = f"{name}@{bundle.graph_digest}"
        if name in self._deployed and self._deployed[name].plan == plan:
            # The same graph under another version, perhaps.
            self._deployed[name].bundle, self._deployed[name].signature = bundle, _signature(bundle)
            return
        was_pinned = name in self._deployed and self._residency.is_pinned(self._deployed[name].plan)
        self._withdraw(name)
        self._graph.add(bundle)
        deployed = self._retired.pop(plan, None) or Deployed(bundle, plan, _signature(bundle), skeleton_id(bundle.graph))
        self._residency.add_plan(plan, {digest: weight.size_bytes for digest, weight in self._weights(deployed).items()})
        self._deployed[name] = deployed
        if was_pinned and not self._pin_if_possible(deployed):
            # After a restart, too: its pin could come before those of others, and keep them out.
            self._pins.discard(name)

    def _pin_if_possible(self, deployed: Deployed) -> bool:
        """Pin again what was pinned before a restart or a push. A pin is a preference: without it the model still serves."""
        try:
            self._residency.pin(deployed.plan)
        except BudgetExceeded as error:
            log.error("%s is not pinned any more: %s", deployed.bundle.name, error.message)
            return False
        return True

    def _withdraw(self, name: str) -> None:
        deployed = self._deployed.pop(name, None)
        if deployed is None:
            return
        for joint in [joint for joint in self._joint if name in joint.split(JOINT)]:
            self._retire(self._joint.pop(joint))
        self._retire(deployed)
        self._graph.remove(name)

    def _retire(self, deployed: Deployed) -> None:
        """Let go of what is deployed no more, once nobody uses it."""
        if self._residency.lease_count(deployed.plan):
            self._residency.unpin(deployed.plan)
            self._retired[deployed.plan] = deployed
        else:
            self._drop(self._residency.remove_plan(deployed.plan))
        self._drop_programs()

    def _deploy_joint(self, name: str) -> Deployed:
        """Return several models as one, whose plan has the weights of all and whose program computes what is equal once."""
        bundle, signature = self._fuse(name)
        plan = f"{name}@{bundle.graph_digest}"
        known = self._joint.pop(name, None)
        if known is not None and known.plan != plan:
            self._retire(known)
            known = None
        if known is None:
            while len(self._joint) >= _MOST_JOINT:
                self._retire(self._joint.pop(next(iter(self._joint))))
            known = self._retired.pop(plan, None) or Deployed(bundle, plan, signature, skeleton_id(bundle.graph))
            self._residency.add_plan(plan, {digest: weight.size_bytes for digest, weight in self._weights(known).items()})
        # The latest last: the first is the next to be let go.
        self._joint[name] = known
        return known

    def _publish(self) -> None:
        self._bundles = {name: entry.bundle for name, entry in self._deployed.items()}
        for joint, (bundles, _, _) in list(self._fused.items()):
            if any(self._bundles.get(bundle.name) is not bundle for bundle in bundles):
                self._fused.pop(joint, None)
        self._published = {**self._broken, **{name: entry.signature for name, entry in self._deployed.items()}}

    def _prepare(self, deployed: Deployed) -> None:
        if deployed.program is not None:
            return
        # Models that differ in nothing but the bytes of their weights are run by one program.
        program = self._programs.get(deployed.skeleton)
        if program is None:
            program = self._programs[deployed.skeleton] = self._device.prepare(deployed.bundle.graph)
        deployed.program = program

    def _drop_programs(self) -> None:
        used = {deployed.skeleton for deployed in self._all()}
        self._programs = {skeleton: program for skeleton, program in self._programs.items() if skeleton in used}

    # --- administrator's commands ------------------------------------------------------------------------------------

    def _run_command(self, work: Work, name: str, arguments: dict[str, Any]) -> None:
        command = self._commands.get(name)
        try:
            if command is None:
                raise InvalidInput(f"there is no command {name[:64]!r}")
            answer = command(work, arguments)
        except TrunklineError as error:
            work.session.fail(work.request_id, error)
            return
        except Exception as error:  # noqa: BLE001 - _incident logs it
            # A bug in one command is answered like any other failure; whoever asked must not wait for ever.
            work.session.fail(work.request_id, _incident(name[:64], error))
            return
        if answer is not None:
            work.session.document(work.request_id, answer)

    def _known(self, name: str) -> Deployed:
        if JOINT in name:
            raise InvalidInput(f"{name[:64]} names several models; commands are for one")
        self.signature(name)
        return self._deployed[name]

    def _status(self, work: Work, arguments: dict[str, Any]) -> object:
        return {
            "engine": {
                "pid": os.getpid(),
                "generation": self._generation,
                "uptime_s": round(self._clock() - self._started_s, 3),
                "draining": self._draining,
                "device": self._device.name,
                **self._facts,
            },
            "memory": self._memory(),
            "models": self._models(),
            "sessions": self._session_count,
            "requests": {
                "answered": self._counts.answered,
                "failed": self._counts.failed + self._turned_away,
                "expired": self._counts.expired,
                "waiting": len(self._queue),
                "fetched_bytes": self._counts.fetched_bytes,
                "evicted_bytes": self._counts.evicted_bytes,
            },
        }

    def _memory(self) -> dict[str, int]:
        residency = self._residency
        resident = [name for name, deployed in self._deployed.items() if self._is_resident(deployed)]
        logical_bytes = sum(self._graph.bytes_of(name)[0] for name in resident)
        return {
            "budget_bytes": residency.budget_bytes,
            "resident_bytes": residency.committed_bytes,
            "logical_bytes": logical_bytes,
            # While a model is being loaded or let go, there may be bytes in memory that no whole model stands for.
            "saved_bytes": max(0, logical_bytes - residency.committed_bytes),
            "pinned_bytes": residency.pinned_bytes,
            **self._device.memory(),
        }

    def _is_resident(self, deployed: Deployed) -> bool:
        # Whole in memory, be it by its own doing or by that of models it was asked with. One without weights once it was used.
        weightless = not deployed.bundle.graph.weights
        return self._residency.is_ready(deployed.plan) and (not weightless or self._residency.is_held(deployed.plan))

    def _models(self) -> list[dict[str, object]]:
        listed = [self._describe(name, deployed) for name, deployed in sorted(self._deployed.items())]
        broken: list[dict[str, object]] = [
            {"name": name, "state": "corrupt", "error": error.to_dict()} for name, error in sorted(self._broken.items())
        ]
        return listed + broken

    def _describe(self, name: str, deployed: Deployed) -> dict[str, object]:
        plan = deployed.plan
        model_bytes, shared_bytes = self._graph.bytes_of(name) if name in self._graph else (0, 0)
        state = "stored"
        if self._is_resident(deployed):
            state = "resident"
        elif plan in self._loads:
            state = "loading"
        return {
            "name": name,
            "version": deployed.bundle.version,
            "state": state,
            "bytes": model_bytes,
            "shared_bytes": shared_bytes,
            "unique_bytes": model_bytes - shared_bytes,
            "shared_with": self._graph.sharers(name) if name in self._graph else [],
            "pinned": self._residency.is_pinned(plan),
            "leases": self._residency.lease_count(plan),
            "requests": deployed.request_count,
            "last_used_s": None if deployed.last_used_s is None else round(self._clock() - deployed.last_used_s, 3),
        }

    def _model(self, work: Work, arguments: dict[str, Any]) -> object:
        deployed = self._known(work.model)
        return self._describe(work.model, deployed) | {
            "graph": deployed.bundle.graph_digest,
            "node_count": len(deployed.bundle.graph.nodes),
            "shared_node_count": self._graph.nodes_of(work.model)[1],
            "weight_count": len(self._weights(deployed)),
            "signature": deployed.signature.to_plain(),
        }

    def _blocks(self, work: Work, arguments: dict[str, Any]) -> object:
        blocks = self._graph.blocks()
        offset, limit = int(arguments.get("offset", 0)), int(arguments.get("limit", 100))
        return {"total": len(blocks), "blocks": [self._describe_block(block) for block in blocks[offset : offset + limit]]}

    def _describe_block(self, block: FusedBlock) -> dict[str, object]:
        resident = [digest for digest in block.weights if self._residency.is_resident(digest)]
        plans = [self._deployed[name].plan for name in block.models]
        return block.to_plain() | {
            "weights": len(block.weights),
            "resident_bytes": sum(block.weights[digest] for digest in resident),
            "tier": "device" if len(resident) == len(block.weights) else "disk",
            "leases": sum(map(self._residency.lease_count, plans)),
        }

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
        for joint, entry in self._joint.items():
            if work.model in joint.split(JOINT) and not self._residency.lease_count(entry.plan):
                self._drop(self._residency.evict(entry.plan))
        self._drop(self._residency.evict(deployed.plan))
        freed_bytes = before_bytes - self._residency.committed_bytes
        return self._describe(work.model, deployed) | {"freed_bytes": freed_bytes}

    def _pin(self, work: Work, arguments: dict[str, Any]) -> None:
        deployed = self._known(work.model)
        self._residency.pin(deployed.plan)
        self._pins.add(work.model)
        self._accept(work)

    def _unpin(self, work: Work, arguments: dict[str, Any]) -> object:
        deployed = self._known(work.model)
        self._residency.unpin(deployed.plan)
        self._pins.discard(work.model)
        self._blocked = False
        return self._describe(work.model, deployed)

    def _model_changed(self, work: Work, arguments: dict[str, Any]) -> object:
        self._deploy(work.model)
        self._publish()
        deployed = self._known(work.model)
        return self._describe(work.model, deployed)

    def _model_removed(self, work: Work, arguments: dict[str, Any]) -> object:
        self._broken.pop(work.model, None)
        self._withdraw(work.model)
        self._pins.discard(work.model)
        self._publish()
        return {"name": work.model}


class _Nobody:
    """The session of work the engine gives itself."""

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        raise AssertionError("the engine asks itself for loads only")

    def document(self, request_id: int, plain: object) -> None:
        pass

    def fail(self, request_id: int, error: TrunklineError) -> None:
        pass

    def released(self) -> None:
        pass


def _incident(what: str, error: Exception) -> SidecarFault:
    incident = secrets.token_hex(4)
    log.error("incident %s: %s failed", incident, what, exc_info=error)
    return SidecarFault(f"the sidecar failed at {what}; its log has incident {incident}", incident=incident)


def _draining() -> Draining:
    return Draining("the sidecar is shutting down; the next one will answer")


def _signature(bundle: Bundle) -> Signature:
    graph = bundle.graph
    return Signature(
        bundle.name,
        bundle.version,
        graph.inputs,
        graph.outputs,
        {symbol.name: (symbol.minimum, symbol.maximum) for symbol in graph.symbols},
        hashlib.sha256(f"{bundle.version} {bundle.graph_digest}".encode()).hexdigest()[:16],
    )


def _takes_the_same(one: Signature, other: Signature) -> bool:
    return one is other or (one.inputs == other.inputs and one.symbols == other.symbols)
