"""Where the parts of a sidecar are put together. The only module that builds them; it holds no logic of its own."""

from __future__ import annotations

import bisect
import contextlib
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from sidecar import wall
from sidecar.config import Settings
from sidecar.deaths import Deaths
from sidecar.errors import ConfigError
from sidecar.http.server import AdminServer, check_settings, listen_tcp, listen_unix
from sidecar.inflight import InFlight
from sidecar.machine import raise_descriptor_limit
from sidecar.pins import Pins
from sidecar.prepull import read_list
from sidecar.processes import end_within, forbid_core_dumps
from sidecar.quarantine import Suspects
from sidecar.quotas import read_quotas
from sidecar.reloading import QuotaFile
from sidecar.rundirectory import Ownership, RunDirectory
from sidecar.server import MOST_GREETING
from sidecar.store import Store
from sidecar.supervisor import EXIT_GRACE_S, Supervisor
from sidecar.systemd import Notifier
from sidecar.takeover import TakeOver, outstay
from sidecar.tenants import OPEN, Quotas
from sidecar.tenantsockets import Keeper, Listeners, TenantSockets
from sidecar.tracing import Tracer

if TYPE_CHECKING:
    # Not before the supervisor is asked to: looking and pushing have to be quick.
    from sidecar.engine import Engine

log = logging.getLogger("trunkline")

# A socket, and what Python's mmap keeps of each arena.
_DESCRIPTORS_PER_SESSION = 3
_OTHER_DESCRIPTORS = 64
# How an engine ends whose device is lost: with the system's code for errors of software.
_DEVICE_LOST = os.EX_SOFTWARE
# How long a process that ends waits for its last spans to be exported.
_LAST_SPANS_S = 1.0


def serve(settings: Settings, *, take_over: bool = False, stay: bool = False) -> int:
    """Run a sidecar until SIGTERM or SIGINT, or until another takes over; return the exit code. Raises ConfigError.

    One that is to ``take_over`` gets ready beside the one that runs in the run directory, if one does. One that is to ``stay``
    does not return when another has taken over, but when it is told to end.
    """
    run = RunDirectory(settings.run_dir)
    run.create()
    if _serve_in(run, settings, take_over=take_over) and stay:
        outstay(run)
    return 0


def _serve_in(run: RunDirectory, settings: Settings, *, take_over: bool) -> bool:
    """Run a sidecar; return whether another has taken over."""
    with run.ownership() as ownership, contextlib.ExitStack() as succession:
        if take_over:
            succession.enter_context(run.succession())
            if not ownership.take_if_free():
                return _serve(settings, run, ownership, succession)
            succession.close()
        # The children of one that was killed end by themselves, and have its sockets and its memory until then.
        ownership.take(settings.drain_timeout_s + 2 * EXIT_GRACE_S)
        return _serve(settings, run)


def _serve(
    settings: Settings, run: RunDirectory, ownership: Ownership | None = None, succession: contextlib.ExitStack | None = None
) -> bool:
    """Run a sidecar that has the run directory, or else takes it over with these; return whether another has taken over."""
    forbid_core_dumps()
    descriptors = raise_descriptor_limit()
    # Whoever comes beyond it is told so, which takes a descriptor, too.
    room = _connections_within(descriptors)
    if settings.connection_limit > room:
        log.warning(
            "%d connections need %d open files, the limit is %d: no more than %d are let in; raise the limit on open files, "
            "or lower --connection-limit",
            settings.connection_limit,
            _descriptors_for(settings.connection_limit),
            *(descriptors, room),
        )
        settings = replace(settings, connection_limit=room)
    check_settings(settings)
    tcp: list[socket.socket] = []

    def listen() -> None:
        if (listener := listen_tcp(settings)) is not None:
            tcp.append(listener)

    def listen_at_last() -> None:
        try:
            listen()
        except ConfigError as error:
            log.error("%s; until the next start there is only %s", error, run.admin_socket)

    if ownership is None:
        listen()
    # As the store below: each engine reads it again.
    quotas = OPEN if settings.quota_file is None else read_quotas(settings.quota_file)
    if settings.pull_signers is not None:
        from sidecar.signers import read_signers

        # As above: each pull reads it again.
        read_signers(settings.pull_signers)
    if settings.pull_list is not None:
        # As above: it is looked at again and again.
        read_list(settings.pull_list, settings.pull_policy)
    # Opened here as well, so that a folder that cannot be written to is told at once, and not by each engine.
    store = Store(settings.store_dir)

    def engine(
        listeners: Listeners, token: bytes, generation: int, segments: Sequence[int], keeper: Keeper, deaths: Deaths
    ) -> None:
        for each in tcp:
            each.close()
        _engine_process(settings, run, listeners, token, generation, segments, keeper, deaths, tracer)

    def state() -> Iterable[Path]:
        pins = [run.pins(number) for number in range(len(settings.devices))]
        quota_files = [] if settings.quota_file is None else [settings.quota_file]
        return (run.constraints, *pins, *quota_files, *store.published())

    taking_over = None
    if ownership is not None and succession is not None:
        log.info("a sidecar runs in %s; this one gets ready to take over", run.root)
        # The other has the port until it ends.
        taking_over = TakeOver(run, ownership, succession, quotas, state=state, alone=listen_at_last)
    tracer = _tracer(settings)

    supervisor = Supervisor(
        run,
        preload=_preload,
        engine=engine,
        http=lambda: _http_process(settings, [listen_unix(run.admin_socket), *tcp], tracer),
        drain_timeout_s=settings.drain_timeout_s,
        watchdog_s=settings.watchdog_s,
        segment_bytes=[settings.segment_bytes(device) for device in settings.devices],
        take_over=taking_over,
        notifier=Notifier.from_environment(),
    )
    try:
        supervisor.run()
        return supervisor.is_succeeded
    finally:
        for each in tcp:
            each.close()


def _descriptors_for(connections: int) -> int:
    """Return how many descriptors an engine may have open with so many connections, and those who have said nothing yet."""
    return _DESCRIPTORS_PER_SESSION * connections + min(connections, MOST_GREETING) + _OTHER_DESCRIPTORS


def _connections_within(descriptors: int) -> int:
    """Return how many connections may be open with so many descriptors, at least one."""
    return max(1, bisect.bisect_right(range(1, descriptors), descriptors, key=_descriptors_for))


def _http_process(settings: Settings, listeners: Sequence[socket.socket], tracer: Tracer | None) -> None:
    # Imported before the fork, as what engines need.
    from sidecar.vetting import vet

    AdminServer(settings, listeners, tracer, vet).run()


def _tracer(settings: Settings) -> Tracer | None:
    """Return what traces, if it is asked for; every process that is forked exports by itself. Raises ConfigError."""
    if not settings.traces:
        return None
    try:
        from sidecar.otel import open_tracer
    except ImportError as error:
        raise ConfigError(
            f"traces are asked for, and OpenTelemetry's packages are not installed here ({error.name}); install them with "
            "`pip install 'trunkline[otel]'`, or start the sidecar with --traces off",
            key="traces",
        ) from error
    return open_tracer()


def _preload() -> None:
    """Import what an engine needs, torch above all, once for all engines to come. No device is touched."""
    # An operator's threads wait for each other at its end. Where functions share their cores, threads that spin meanwhile keep
    # those off that they wait for. Read when torch's OpenMP library is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import sidecar.devices
    import sidecar.engine
    import sidecar.engines
    import sidecar.memories
    import sidecar.server
    import sidecar.store
    import sidecar.verdicts
    import sidecar.vetting  # noqa: F401


def _engine_process(
    settings: Settings,
    run: RunDirectory,
    listeners: Listeners,
    token: bytes,
    generation: int,
    segments: Sequence[int],
    keeper: Keeper,
    deaths: Deaths,
    tracer: Tracer | None,
) -> None:
    from sidecar.constraints import Constraints
    from sidecar.engines import Engines
    from sidecar.routing import ReleaseFiles
    from sidecar.server import Server
    from sidecar.upkeep import scrub

    quota_file = None if settings.quota_file is None else QuotaFile(settings.quota_file, run.quotas)
    quotas = OPEN
    if quota_file is not None:
        # First of all: what is changed from here on is told.
        signal.signal(signal.SIGHUP, lambda number, frame: quota_file.reload())
        if generation == 1:
            # What an earlier sidecar went by, which was killed perhaps, is not in force any more.
            run.quotas.unlink(missing_ok=True)
        quotas = quota_file.read_or_keep()
    sockets = TenantSockets(run.tenants, keeper)
    # Swept when the sidecar started; to look through it again would keep those waiting who were served before a restart.
    store = Store(settings.store_dir, sweep=False)
    in_flight = InFlight()
    suspects = deaths.suspects(time.monotonic)
    engines = [
        _engine(settings, run, store, quotas, in_flight, generation, deaths, suspects, number, segment)
        for number, segment in enumerate(segments)
    ]
    engine: Engine | Engines = engines[0]
    if len(engines) > 1:
        by_device = {each.device_name: each for each in engines}
        engine = Engines(by_device, Constraints(run.constraints, list(by_device)), run.places)
    releases = ReleaseFiles(store)
    server = Server(
        listeners.functions,
        engine,
        admin_token=token,
        arena_limit_bytes=settings.arena_limit_bytes,
        arena_total_bytes=settings.arena_total_bytes,
        connection_limit=settings.connection_limit,
        quotas=quotas,
        tenant_sockets=sockets.follow(quotas),
        relay=listeners.relay,
        reload=None if quota_file is None else quota_file.reload,
        releases=releases,
        generation=generation,
        tracer=tracer,
        suspects=suspects,
    )
    engine.deploy_stored()

    def drain(number: int, frame: FrameType | None) -> None:
        log.info("draining")
        # Later than the supervisor would end it, if there still is one.
        end_within(settings.drain_timeout_s + 1.5 * EXIT_GRACE_S)
        server.drain()
        engine.drain(server.stop)

    signal.signal(signal.SIGTERM, drain)
    # A Ctrl-C in the terminal reaches the whole group; the supervisor's SIGTERM is what counts.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What the parts of an engine do when they are made is done; from here on it works for strangers.
    wall.build()
    threading.Thread(target=engine.run, name="engine", daemon=True).start()
    threading.Thread(target=releases.run, name="releases", daemon=True).start()
    threading.Thread(target=scrub, args=(store.scrub, threading.Event()), name="store", daemon=True).start()
    if quota_file is not None:

        def use(changed: Quotas, done: Callable[[], None]) -> None:
            server.use_quotas(changed, done, sockets.follow(changed))

        threading.Thread(target=quota_file.run, args=(use,), name="quotas", daemon=True).start()
    if tracer is not None:
        tracer.start()
    server.run()
    if tracer is not None:
        tracer.close(_LAST_SPANS_S)


def _end_at_once() -> None:
    # Nothing is told to anybody: clients come back, and ask the next engine.
    logging.shutdown()
    os._exit(_DEVICE_LOST)


def _engine(
    settings: Settings,
    run: RunDirectory,
    store: Store,
    quotas: Quotas,
    in_flight: InFlight,
    generation: int,
    deaths: Deaths,
    suspects: Suspects,
    number: int,
    segment: int,
) -> Engine:
    """Return the engine of one of the devices."""
    from sidecar.devices import open_device
    from sidecar.engine import Engine
    from sidecar.memories import budget_of, memory_of
    from sidecar.verdicts import Verdicts

    name = settings.devices[number]
    device = open_device(name, settings.threads)
    budget_bytes = budget_of(device, settings.budget_bytes(name), is_fixed=name != "auto")
    # Files of one layout are in one folder, and what was tried on a device is true there.
    blocks = settings.store_dir / (f"blocks-{number}" if number else "blocks")
    verdicts = Verdicts(settings.store_dir / "verdicts", device.name, *map(str, device.facts().values()), *device.layout_facts())
    return Engine(
        device,
        store,
        Pins(run.pins(number)),
        budget_bytes=budget_bytes,
        activation_budget_bytes=settings.activation_budget_bytes,
        eviction_policy=settings.eviction_policy,
        queue_limit=settings.queue_limit,
        batch_limit=settings.batch_limit,
        batch_window_s=settings.batch_window_s,
        compute_once=settings.compute_once,
        packing=settings.packing,
        stacking=settings.stacking,
        quotas=quotas,
        lanes=settings.lanes,
        verdicts=verdicts,
        in_flight=in_flight,
        memory=memory_of(
            device, store, segment, blocks, budget_bytes, settings.host_budget_bytes, settings.block_files_limit_bytes
        ),
        generation=generation,
        page=deaths.page(number),
        suspects=suspects,
        device_lost=_end_at_once,
        facts={**deaths.facts(), **device.facts()},
        tracing=settings.traces,
    )
