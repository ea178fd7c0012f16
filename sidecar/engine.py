"""The engine: one thread that owns graph, residency, queue and wavefront, and gives the device its work.

Everybody else posts a command to its inbox and is told the outcome through the session the command came from. Nothing
here waits for a disk: a mover thread reads weights and posts them to the same inbox. Devices and the store
come in as arguments; this module imports neither torch nor the store.

Life of a request: queued; taken up (``sidecar.admission``), which is to lease the weights of its models, so that they may no
longer be evicted; parked while those of its first stage are read (``sidecar.loads``); under way (``sidecar.underway``) in the
wavefront, which is run stage by stage as weights arrive (``sidecar.runs``); answered; leases returned.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Final

from trunkline.errors import CapacityError, Draining, TrunklineError
from trunkline.protocol import JOINT
from trunkline.signature import Signature

from sidecar import upkeep
from sidecar.activations import Activations
from sidecar.admission import Admission
from sidecar.catalog import Catalog
from sidecar.claims import Claims
from sidecar.commands import FOLLOWS_STORE, LOOKS_ONLY, Commands
from sidecar.costs import BatchCosts
from sidecar.deployments import Deployments
from sidecar.devicememory import DeviceMemory
from sidecar.division import Division, choice_for
from sidecar.inflight import InFlight
from sidecar.inturn import AllInTurn
from sidecar.journal import Journal, Page
from sidecar.loads import Loads
from sidecar.memory import Memory
from sidecar.mover import Mover
from sidecar.outcomes import Outcomes
from sidecar.ownloads import own_load, unheard
from sidecar.pins import Pins
from sidecar.placement import Cost
from sidecar.policies import Either
from sidecar.ports import Device, Session, Source, Work
from sidecar.quarantine import Suspects, nobody
from sidecar.readahead import ReadAhead
from sidecar.refusals import Refusals, as_told, incident
from sidecar.requestcosts import RequestCosts
from sidecar.rivals import open_residency
from sidecar.runs import Runs
from sidecar.scheduler import Scheduler
from sidecar.shortage import Shortage
from sidecar.slices import Slices
from sidecar.streams import Streams
from sidecar.strides import Strides
from sidecar.tenants import ANYONE, OPEN, Quotas, Tenant
from sidecar.traces import Recorder
from sidecar.trials import Trials
from sidecar.turns import Turns
from sidecar.underway import Call, UnderWay
from sidecar.verdicts import Verdicts
from sidecar.wavefront import Wavefront

log = logging.getLogger("trunkline.engine")

# An engine that had nothing to do for so long gives back what its last runs left in the allocator.
_IDLE_S: Final = 1.0
# And one that rests looks through its books, which takes a millisecond for every thousand weights, once in so long at most.
_AUDIT_EVERY_S: Final = 60.0
# After so long a rest a model is deployed that nobody has asked for yet: whoever was connected before a restart is back by then.
_QUIET_S: Final = 0.1
# Commands and requests that are taken from the inbox before a stage must be run: mostly all that came meanwhile, or whose turn it
# is would depend on who was the first to send a lot.
_MOST_TAKEN: Final = 64
# Between two slices while lanes run, which want the interpreter.
_LANES_TURN_S: Final = 0.000_5


class Engine:
    """Owner of all mutable state. ``run`` is the engine thread; every other public method may be called anywhere."""

    def __init__(
        self,
        device: Device,
        source: Source,
        pins: Pins,
        *,
        budget_bytes: int,
        eviction_policy: str = Either.name,
        queue_limit: int,
        batch_limit: int = 8,
        batch_window_s: float = 0.0,
        compute_once: bool = True,
        packing: bool = True,
        stacking: bool = True,
        quotas: Quotas = OPEN,
        lanes: int | None = 1,
        verdicts: Verdicts | None = None,
        in_flight: InFlight | None = None,
        memory: Memory | None = None,
        activation_budget_bytes: int | None = None,
        generation: int = 0,
        page: Page | None = None,
        suspects: Suspects | None = None,
        device_lost: Callable[[], None] = lambda: None,
        facts: dict[str, object] | None = None,
        tracing: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``page`` is where it is noted what the device is at, ``suspects`` whose requests are run alone, or refused.

        ``device_lost`` ends this process, in which nothing can be computed on the device any more.
        """
        self.budget_bytes = budget_bytes
        self._device = device
        self._device_lost = device_lost
        self._suspects = suspects = nobody() if suspects is None else suspects
        self._clock = clock
        self._batch_limit = batch_limit
        self._batch_window_s = batch_window_s
        # When the first of the requests came that wait for others.
        self._opened_s = 0.0
        self._inbox: queue.SimpleQueue[Work | Callable[[], None]] = queue.SimpleQueue()
        self._memory = DeviceMemory(device, source) if memory is None else memory
        self._mover = Mover(self._memory, self._post, self._moved)
        self._residency = open_residency(budget_bytes, eviction_policy, clock)
        self._catalog = Catalog(source, device, self._memory, self._residency, pins, self._forget_weights)
        self._queue: Scheduler[Work] = Scheduler(queue_limit, in_flight=in_flight)
        self._outcomes = Outcomes(lambda name: name in self._catalog.deployed or name in self._catalog.broken)
        self._refusals = Refusals(self._queue, self._outcomes, clock)
        self._request_costs = RequestCosts(self._catalog, clock)
        batch_costs = BatchCosts()
        self._wavefront: Wavefront[Call] = Wavefront(device, batch_costs, batch_limit)
        # Without a number of lanes it is chosen.
        choice = choice_for(device, verdicts) if lanes is None and verdicts is not None else None
        self._under_way = UnderWay(
            device,
            self._catalog,
            self._queue,
            self._wavefront,
            self._refusals,
            self._request_costs,
            self._outcomes,
            suspects,
            self._lost,
            clock,
            compute_once=compute_once,
            describe=lambda deployed: self._commands.describe(deployed),
            drop=self._drop,
            unblock=lambda: self._admission.unblock(),
        )
        self._loads = Loads(
            device,
            self._residency,
            self._mover,
            self._under_way.enter,
            self._under_way.load_failed,
            self._under_way.release,
            clock,
        )
        self._claims = Claims(self._residency)
        self._recorder = Recorder()
        self._started_s = clock()
        # Without a budget nothing is reckoned.
        self._activations: Activations | None = None
        if activation_budget_bytes is not None:
            self._activations = Activations(
                device, activation_budget_bytes, self._post, lambda: self._admission.unblock(), verdicts
            )
        self._streams = Streams(self._residency, self._loads, self._drop, lambda: self._mover.pace, clock)
        self._shortage = Shortage(
            device, self._residency, self._loads, self._mover, self._drop, gives_back=self._memory.gives_back
        )
        # Calls about several models for which there is no room together.
        self._in_turn = AllInTurn(self._queue, clock)
        # Enough of one tenant for the largest batch, and for another to form meanwhile; the others keep their deadlines.
        self._turns: Turns[Call] = Turns(self._queue, 2 * batch_limit)
        # Without a place for verdicts nothing is tried, and so nothing batched.
        self._trials: Trials | None = None
        if verdicts is not None:
            self._trials = Trials(device, source, verdicts, self._post, packing=packing, keep=self._memory.keep)
            self._trials.then(lambda: self._mover.expect(self._memory.calibrate(verdicts)))
        self._runs = Runs(
            device,
            self._wavefront,
            self._turns,
            self._loads,
            self._streams,
            Strides(
                *(self._wavefront, self._turns, self._loads, self._streams, batch_costs, clock),
                cut=self._catalog.cut,
            ),
            self._shortage,
            batch_costs,
            self._under_way,
            choice,
            Journal().page(0) if page is None else page,
            self._post,
            clock,
            stacking=stacking,
            tracing=tracing,
        )
        self._division = Division(
            device,
            self._wavefront,
            self._turns,
            self._runs,
            self._trials,
            verdicts,
            choice,
            count=lanes or 1,
            batch_limit=batch_limit,
        )
        self._deployments = Deployments(
            self._catalog,
            self._loads,
            self._activations,
            self._trials,
            self._post,
            clock,
            accept=self._accept,
            drop=self._drop,
        )
        self._admission = Admission(
            self._catalog,
            self._queue,
            self._turns,
            self._wavefront,
            self._under_way,
            self._loads,
            self._claims,
            self._streams,
            self._in_turn,
            self._activations,
            self._division,
            self._deployments,
            self._refusals,
            self._recorder,
            suspects,
            clock,
            batch_limit=batch_limit,
            drop=self._drop,
        )
        self._read_ahead = ReadAhead(
            self._catalog,
            self._queue,
            self._loads,
            self._claims,
            self._deployments,
            self._admission,
            clock,
            drop=self._drop,
        )
        self._untrimmed = False
        self._audited_s = -math.inf
        # Commands and requests taken from the inbox since a stage was last run.
        self._taken = 0
        # Commands that are done a little at a time, and whose they are.
        self._slices = Slices()
        self._sliced: list[Work] = []
        self._draining = False
        # An operator has it take no requests for a while.
        self._paused = False
        self._drained: Callable[[], None] | None = None
        self._stays = False
        self._finished = False
        self._ended = threading.Event()
        # For so long requests waited for weights, or for room, and nothing else could be run.
        self._stalled_s = 0.0
        # Device seconds that are reckoned to be needed for what waits and runs. Others may read it.
        self.backlog_s = 0.0
        self._session_count = 0
        # Written by the server's thread alone.
        self._turned_away = 0
        self._commands = Commands(
            self._catalog,
            self._loads,
            accept=self._accept,
            drop=self._drop,
            unblock=self._admission.unblock,
            deployed=self._deployments.is_new,
            requests=self._request_counts,
            counts=self._counts,
            trace=self._recorder.to_plain,
            intake=self._take_in,
            scheduler=self._queue,
            facts={"generation": generation, "device": device.name, **(facts or {})},
            started_s=self._started_s,
            clock=clock,
        )
        self._use_quotas(quotas)

    # --- called from other threads -----------------------------------------------------------------------------------

    def signature(self, name: str) -> Signature:
        """Return the signature of a deployed model. Raises UnknownModel, ModelCorrupt, InvalidInput."""
        return self._catalog.signature(name)

    def versions(self, name: str) -> list[str]:
        """Return the versions that a model is deployed in, in the domain of ``name``."""
        return self._catalog.versions(name)

    def view(self, buffer: memoryview, dtype: str, shape: tuple[int, ...]) -> object:
        """Return private bytes as the device takes its inputs and gives its outputs; they share the memory."""
        return self._device.view(buffer, dtype, shape)

    @property
    def device_name(self) -> str:
        return self._device.name

    def names(self) -> list[str]:
        """Return the names of models that are deployed and can be served, or are awaited."""
        return self._catalog.served()

    def check_deployed(self, name: str) -> None:
        """Raise UnknownModel, naming what there is in all domains, or ModelCorrupt. For operators."""
        self._catalog.check_deployed(name)

    def is_pinned(self, name: str) -> bool:
        """Say whether an operator has pinned a model here."""
        return self._catalog.pins.has(name)

    @property
    def pace(self) -> float:
        """Return the bytes of weights that are read in a second, about."""
        return self._mover.pace

    def tell_costs(self, names: Sequence[str], told: Callable[[Mapping[str, Cost]], None]) -> None:
        """Have somebody told what models cost here, alone or several together; in the engine's thread."""
        self._post(lambda: told(self.costs(names)))

    def bring(self, name: str, over: Callable[[TrunklineError | None], None]) -> None:
        """Have a model loaded, or several together; somebody is told when it is over, in the engine's thread."""
        self._post(lambda: self._accept(own_load(name, self._clock(), over)))

    def submit(self, work: Work) -> None:
        """Queue a request; its session is told the outcome."""
        self._inbox.put(work)

    def check_room(self, tenant: Tenant) -> None:
        """Raise QueueFull or QuotaExceeded while requests would only be refused. For the server's thread: a flood ends there."""
        try:
            if self._paused:
                raise _paused()
            self._queue.check_room(tenant)
        except CapacityError:
            self._turned_away += 1
            raise

    def has_room(self, tenant: Tenant) -> bool:
        """Say whether requests of a tenant would be taken. For the server's thread."""
        try:
            self._queue.check_room(tenant)
        except CapacityError:
            return False
        return not self._paused

    def command(self, session: Session, request_id: int, name: str, arguments: dict[str, Any], deadline: float) -> None:
        """Run an administrator's command; its session gets the answer as a document."""
        work = Work(session, request_id, str(arguments.get("name", "")), deadline)
        self._post(lambda: self._run_command(work, name, arguments))

    def use_quotas(self, quotas: Quotas, done: Callable[[], None] = lambda: None) -> None:
        """Take up what an operator says of tenants, for all requests to come; at once, before ``deploy_stored`` was called.

        What a domain may use no more is withdrawn; requests under way are answered. What it may use besides is deployed one by
        one, while others are served; ``done`` is called in the engine thread when all of that is there.
        """
        if self._deployments.has_begun:
            self._post(lambda: self._use_quotas(quotas, done))
        else:
            self._use_quotas(quotas, done)

    def session_opened(self, models: Sequence[str] = (), tenant: Tenant = ANYONE) -> None:
        """Count a session, and load the models it is going to ask about: their weights are on their way before it asks."""

        def count() -> None:
            self._session_count += 1
            self._read_ahead.note(models, tenant)

        self._post(count)

    def session_closed(self, session: Session) -> None:
        """Drop everything a session has queued; it is told ``released`` when nothing of it is left."""
        self._post(lambda: self._forget(session))

    def drain(self, drained: Callable[[], None], stays: bool = False) -> None:
        """Refuse new requests from now on, finish the accepted ones, then call ``drained`` and end ``run``.

        One that ``stays`` goes on to tell whoever asks that it is draining, until ``end`` is called.
        """
        self._post(lambda: self._start_drain(drained, stays))

    def end(self) -> None:
        """End ``run``, of an engine that is drained."""
        self._post(self._end)

    def _post(self, command: Callable[[], None]) -> None:
        self._inbox.put(command)

    # --- the engine thread -------------------------------------------------------------------------------------------

    def deploy_stored(self) -> None:
        """Deploy every model of the store. Call once, before ``run`` starts; a broken model does not stop the others.

        Where weights are in memory from an engine before this one, only what is pinned is deployed now; what is asked for, when
        it is; all else while nobody waits for anything.
        """
        self._deployments.begin()

    def costs(self, names: Sequence[str]) -> dict[str, Cost]:
        """Return what those of some models cost that are deployed, alone or several together. While the engine does not run."""
        return self._request_costs.of(names)

    def run(self) -> None:
        """Serve until drained. The engine thread's body."""
        self._device.enter()
        self._division.divide()
        threading.Thread(target=self._mover.run, name="mover", daemon=True).start()
        if self._trials is not None:
            threading.Thread(target=self._trials.run, name="trials", daemon=True).start()
        if self._activations is not None:
            threading.Thread(target=self._activations.run, name="dry runs", daemon=True).start()
        upkeep.begin(self._memory, self._mover, self._ended)
        for name in self._catalog.pinned():
            self._accept(own_load(name, self._clock()))
        while not self._finished:
            try:
                self._step()
            except Exception:
                # A bug in one command must not end the service for all; it is logged with its trace.
                log.exception("a command failed")
        self._runs.stop()
        self._mover.stop()
        if self._trials is not None:
            self._trials.stop()
        self._ended.set()
        if self._activations is not None:
            self._activations.stop()
        if self._drained is not None:
            self._drained()

    def _step(self) -> None:
        self._expire()
        # Work goes on while there is some, but what has been posted meanwhile comes first.
        busy = (bool(self._wavefront) and not self._runs.stalled) or self._admission.can_take_up()
        window_s = self._window_left_s() if busy else 0.0
        try:
            if busy or self._slices:
                rest_s = window_s or (_LANES_TURN_S if self._slices and self._runs.running else 0.0)
                command = self._inbox.get(block=rest_s > 0, timeout=rest_s or None)
            else:
                command = self._wait()
        except queue.Empty:
            if busy or self._slices:
                self._go_on()
            elif self._can_complete():
                self._deployments.complete(list(self._catalog.awaited)[:1])
            elif self._untrimmed and not self._runs.running:
                self._device.trim()
                self._loads.trim()
                self._untrimmed = False
                self._audit()
            return
        self._untrimmed = True
        if isinstance(command, Work):
            self._accept(command)
        else:
            command()
        self._taken += 1
        # All that has been posted is seen before the next stage is chosen; but a flood of what is only refused must not
        # keep the chosen ones waiting.
        if self._inbox.empty() or self._taken >= _MOST_TAKEN:
            self._taken = 0
            self._go_on()

    def _wait(self) -> Work | Callable[[], None]:
        """Return what is posted next. Time in which nothing is run although requests are under way is counted. Raises Empty."""
        parked = self._loads.parked
        if self._runs.running or not (self._wavefront or (parked and any(each.work.inputs is not None for each in parked))):
            return self._inbox.get(timeout=self._rest_s())
        began_s = self._clock()
        try:
            return self._inbox.get(timeout=self._rest_s())
        finally:
            self._stalled_s += self._clock() - began_s

    def _can_complete(self) -> bool:
        """Say whether models are to be deployed, and nobody waits for anything."""
        return bool(self._catalog.awaited) and not self._runs.running and not self._loads.parked

    def _audit(self) -> None:
        """Look through the books while nobody waits: what went wrong shows here before it is felt."""
        if self._clock() < self._audited_s + _AUDIT_EVERY_S:
            return
        self._audited_s = self._clock()
        try:
            self._residency.check_invariants()
            self._loads.check_invariants()
        except AssertionError as error:
            log.error("the books of what is in memory do not balance: %s; restart the sidecar, and report it", error)
        self._mover.audit()

    def _use_quotas(self, quotas: Quotas, done: Callable[[], None] = lambda: None) -> None:
        self._deployments.complete_all()
        self._queue.use(quotas)
        self._claims.use(quotas.tenants.values())
        if self._activations is not None:
            self._activations.reserves.use(quotas.tenants.values())
        self._admission.unblock()
        self._drop(self._catalog.use_domains(quotas.domains(), quotas.public))
        self._deployments.domains_changed(done)

    def _rest_s(self) -> float | None:
        """Return for how long nothing is to be done unless it is asked for; None: not before."""
        if self._can_complete():
            return _QUIET_S
        rest_s = self._residency.quiet_until_s
        if rest_s != math.inf:
            rest_s = max(0.0, rest_s - self._clock())
        if self._untrimmed and not self._runs.running:
            rest_s = min(rest_s, _IDLE_S)
        return None if rest_s == math.inf else rest_s

    def _expire(self) -> None:
        """Let go of what has been idle beyond its keep-alive time."""
        quiet_until_s = self._residency.quiet_until_s
        if quiet_until_s != math.inf and quiet_until_s <= self._clock():
            freed = self._residency.expire()
            self._drop(freed)
            self._untrimmed |= bool(freed)

    def _forget_weights(self, digests: Collection[str]) -> None:
        if self._trials is not None:
            self._trials.then(lambda: self._memory.forget(digests))

    def _window_left_s(self) -> float:
        """Return for how long the requests in the queue still wait for others, on a device that has nothing to do."""
        waiting = len(self._queue)
        if not self._batch_window_s or self._wavefront or self._draining or self._paused or not 0 < waiting < self._batch_limit:
            return 0.0
        return max(0.0, self._opened_s + self._batch_window_s - self._clock())

    def _accept(self, work: Work) -> None:
        if self._draining or (self._paused and work.inputs is not None):
            if work.inputs is not None:
                self._outcomes.failed(work.model, Draining.code)
            work.session.fail(work.request_id, _draining() if self._draining else _paused())
            return
        try:
            names = work.model.split(JOINT)
            self._deployments.complete(names)
            self._deployments.deploy_first(names)
            self.signature(work.model)
            if work.inputs is not None:
                self._suspects.check(work.tenant.name, work.model)
            if not len(self._queue):
                self._opened_s = self._clock()
            self._queue.submit(work, self._clock(), *self._forecast(work))
        except Exception as error:  # noqa: BLE001 - what is not ours is logged
            # It is nowhere yet: whoever asked must not wait for ever.
            self._refusals.fail(work, as_told(work, error))

    def _go_on(self) -> None:
        if self._slices:
            self._slices.go_on()
        # A run may have ended with what was just posted.
        self._admission.follow_stream()
        if self._window_left_s() > 0:
            return
        self._admission.take_up()
        if not self._draining:
            self._read_ahead.go_on()
        self._admission.follow_stream()
        if self._wavefront:
            self._runs.go_on()
        self._admission.follow_stream()
        self.backlog_s = self._queue.backlog_s()
        self._division.choose()
        self._finish_if_drained()

    def _forecast(self, work: Work) -> tuple[object, float, str]:
        """Return the kind of a request, by which its cost is known, the seconds its weights take to be there, and their name."""
        if work.inputs is None or work.signature is None:
            return None, 0.0, ""
        inputs: Sequence[Any] = work.inputs
        kind = (work.model, work.signature.version, *(tuple(value.shape) for value in inputs))
        parts = self._catalog.parts(work.model)
        if all(deployed.loaded for deployed in parts):
            return kind, 0.0, ""
        missing_bytes = sum(
            size_bytes
            for deployed in parts
            for digest, size_bytes in self._residency.weights(deployed.plan).items()
            if not self._residency.is_resident(digest)
        )
        return kind, missing_bytes / self._mover.pace, work.model

    def _drop(self, digests: Sequence[str]) -> None:
        if not digests:
            return
        self._loads.drop(digests)
        self._claims.prune()
        self._catalog.unbind()
        self._loads.free(digests)

    def _moved(self, handles: Mapping[str, object]) -> None:
        """Use weights where they lie now, and have those brought in anew that were lost on the way there."""
        self._catalog.unbind_all()
        lost = self._loads.moved(handles)
        for deployed in self._catalog.all():
            if self._residency.lease_count(deployed.plan):
                self._loads.fetch(deployed, [digest for digest in deployed.weights if digest in lost])

    def _forget(self, session: Session) -> None:
        self._session_count -= 1
        sessions: tuple[Session, ...] = (session, *self._in_turn.forget(session))
        self._queue.drop(lambda work: work.session in sessions)
        self._admission.forget(sessions)
        gone = [parked for parked in self._loads.parked if parked.work.session in sessions]
        self._loads.parked = [parked for parked in self._loads.parked if parked not in gone]
        for work in self._sliced:
            if work.session is session:
                work.session = unheard()
        self._under_way.forget(sessions, gone, session.released)

    def _lost(self, error: Exception) -> None:
        log.critical("%s can be used no more after this (%s); the engine ends, and another begins", self._device.name, error)
        self._device_lost()

    def _start_drain(self, drained: Callable[[], None], stays: bool) -> None:
        self._draining = True
        self._stays = stays
        self._drained = drained
        self._finish_if_drained()

    def _has_work(self) -> bool:
        """Say whether anything waits or is under way."""
        under_way = self._wavefront or self._runs.running or self._loads.parked
        return bool(under_way or len(self._queue) or self._admission.aside_count or self._slices)

    def _take_in(self, is_open: bool | None) -> dict[str, object]:
        """Take new requests or not, as an operator says; None: as before. Return whether what was taken before is answered."""
        if is_open is not None:
            self._paused = not is_open
        closed = self._paused or self._draining
        return {
            "draining": closed,
            "drained": closed and not self._has_work(),
            "waiting": len(self._queue) + self._admission.aside_count,
            "running": len(self._wavefront),
        }

    def _finish_if_drained(self) -> None:
        if self._draining and self._drained is not None and not self._has_work():
            if self._stays:
                # Told now: nothing comes after this.
                drained, self._drained = self._drained, None
                drained()
            else:
                self._finished = True

    def _end(self) -> None:
        self._finished = True

    def _run_command(self, work: Work, name: str, arguments: dict[str, Any]) -> None:
        with _telling(work, name):
            if name not in LOOKS_ONLY:
                # Operators are told of all models.
                self._deployments.complete_all()
            if name in FOLLOWS_STORE:
                self._sliced.append(work)
                self._slices.add(lambda: self._follow_store(work, name, arguments))
            else:
                self._answer(work, name, arguments)

    def _follow_store(self, work: Work, name: str, arguments: dict[str, Any]) -> None:
        try:
            with _telling(work, name):
                self._answer(work, name, arguments)
        finally:
            self._sliced.remove(work)

    def _answer(self, work: Work, name: str, arguments: dict[str, Any]) -> None:
        answer = self._commands.run(work, name, arguments)
        if answer is not None:
            work.session.document(work.request_id, answer)

    def _request_counts(self) -> dict[str, object]:
        return {
            "draining": self._draining or self._paused,
            "sessions": self._session_count,
            "requests": {
                "answered": self._under_way.answered_count,
                "failed": self._refusals.failed_count + self._turned_away,
                "expired": self._refusals.expired_count,
                "waiting": len(self._queue) + self._admission.aside_count,
                "running": len(self._wavefront),
                "fetched_bytes": self._loads.fetched_bytes,
                "evicted_bytes": self._residency.evicted_bytes,
            },
            "streams": {
                "runs": self._streams.counts.runs,
                "predicted_s": round(self._streams.counts.predicted_s, 6),
                "actual_s": round(self._streams.counts.actual_s, 6),
                "starved": self._streams.counts.starved,
            },
            "lanes": {
                "count": self._wavefront.lanes,
                "chosen": self._division.chosen,
                "running": len(self._runs.running),
                "measured_rates": self._division.rates(),
            },
            "shortage": {
                "splits": self._shortage.counts.splits,
                "reliefs": self._shortage.counts.reliefs,
                "refused": self._shortage.counts.refused,
            },
            "sharing": {
                "stages": self._runs.counts.stages,
                "stage_rows": self._runs.counts.stage_rows,
                "stage_requests": self._runs.counts.stage_requests,
                "stacked": self._runs.counts.stacked,
                "joined": self._runs.counts.joined,
                "programs": len(self._catalog.programs),
            },
        }

    def _counts(self) -> dict[str, object]:
        """Return what is counted for those who look every few seconds, and is no operator's usual reading."""
        asked = Counter(
            model for work in self._admission.waiting() if work.inputs is not None for model in work.model.split(JOINT)
        )
        return {
            "outcomes": self._outcomes.to_plain(),
            "waiting": asked,
            "device_s": self._request_costs.recent(),
            "stalled_s": round(self._stalled_s, 6),
        }

    def check_invariants(self) -> None:
        """Raise AssertionError when the engine's books do not balance. Only in the engine thread, or after it ended."""
        self._catalog.check_invariants()
        self._residency.check_invariants()
        self._loads.check_invariants()
        self._queue.check_invariants()
        calls = self._under_way.calls()
        self._runs.check_invariants()
        for deployed in self._catalog.all():
            running = sum(1 for call in calls if deployed in call.parts)
            expected = running + self._loads.count(deployed.plan)
            found = self._residency.lease_count(deployed.plan)
            assert found == expected, f"{deployed.plan}: {found} leases, {expected} requests under way"


@contextlib.contextmanager
def _telling(work: Work, name: str) -> Iterator[None]:
    """Tell whoever gave a command what was wrong with it, a bug as any other failure: nobody waits for ever."""
    try:
        yield
    except TrunklineError as error:
        work.session.fail(work.request_id, error)
    except Exception as error:  # noqa: BLE001 - incident logs it
        work.session.fail(work.request_id, incident(name[:64], error))


def _draining() -> Draining:
    return Draining("the sidecar is shutting down; the next one will answer")


def _paused() -> Draining:
    return Draining("an operator has the sidecar take no requests for a while; try again")
