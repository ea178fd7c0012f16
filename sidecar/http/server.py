"""The process that serves the admin endpoint and the Open Inference Protocol: gunicorn, outside the engine.

It listens on a Unix socket and on TCP, where the operator may have TLS. Some workers with some threads each, forked from a
master that has imported everything: nothing here may start a thread or open a session with the engine before that fork.
Functions use none of it, and a worker that dies costs those who ask here the requests that it had. Must not import torch.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import queue
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gunicorn.app.base import BaseApplication
from trunkline.admin import AdminConnection

from sidecar.config import Settings
from sidecar.errors import ConfigError
from sidecar.http.access import Gate
from sidecar.http.admin import admin_token, create_app
from sidecar.http.audit import SharedFile, append_to
from sidecar.http.callers import Callers, Room
from sidecar.http.correlation import Correlation
from sidecar.http.engineclient import EngineClient
from sidecar.http.events import MOST_VIEWERS
from sidecar.http.oip import add_open_inference
from sidecar.http.tokenfile import TokenFile
from sidecar.http.worker import configure, impatient_tls
from sidecar.jobs import Jobs, Unwatched
from sidecar.libc import LIBC
from sidecar.openinference import MAX_JSON_BYTES
from sidecar.origins import Reference
from sidecar.prepull import Fetched, Prepull, is_stored, told_of
from sidecar.rundirectory import RunDirectory
from sidecar.store import Store
from sidecar.tracing import Tracer
from sidecar.versions import Vet

log = logging.getLogger("trunkline.admin")

# Of each worker. Threads are made as they are needed. Inferences may hold as many as there is room for, and have to wait for the
# engine; so may whoever has the page open; the others are left to health, status and whatever else an operator asks meanwhile.
# Not divided among workers: a kernel gives connections to whichever is awake first, and one that has most of them must not refuse
# what others had room for.
_MOST_INFERENCES = 32
_THREADS = _MOST_INFERENCES + MOST_VIEWERS + 8
# Memory up to the one size is taken from what was freed before, of which up to the other stays with each heap: else the kernel
# clears fresh pages for each copy of a tensor, which took a quarter of the time of an inference of 600 KB.
_REUSED_BYTES = 8 << 20
_KEPT_BYTES = 16 << 20
_HEAPS = 4
# What inferences may hold of the memory of all workers at a time, parsed JSON included.
_ROOM_BYTES = 1 << 30
# Sessions that all workers keep for one token while nobody asks with it: they are its tenant's connections.
_IDLE_SESSIONS = 4
# A push of a large blob, or the verification of a large store, may take this long.
_TIMEOUT_S = 600
_BACKLOG = 64
# An engine that does not answer a scrape for so long is away; Prometheus waits for 10 s unless told otherwise.
_SCRAPE_S = 4.0
# Nobody waits for a job, so it may wait for the engine.
_JOB_S = 3600.0
# How long a worker that ends waits for its last spans to be exported.
_LAST_SPANS_S = 0.5


def _freeze(server: object, worker: object) -> None:
    # What the master imported stays shared with its workers as long as the collector does not touch it.
    gc.collect()
    gc.freeze()


def _reuse_memory() -> None:
    """Let this process keep some of the memory that it frees."""
    # By these numbers glibc calls them; other C libraries take none, and change nothing.
    m_trim_threshold, m_mmap_threshold, m_arena_max = -1, -3, -8
    if (mallopt := getattr(LIBC, "mallopt", None)) is not None:
        for option, value in ((m_mmap_threshold, _REUSED_BYTES), (m_trim_threshold, _KEPT_BYTES), (m_arena_max, _HEAPS)):
            mallopt(ctypes.c_int(option), ctypes.c_int(value))


class EnginePool:
    """As many sessions with the engine as commands run at a time: a model that loads for long holds up nobody's status.

    Sessions are opened when the first command needs them, so this may be made before a fork.
    """

    def __init__(self, connect: Callable[[], EngineClient]) -> None:
        self._connect = connect
        # The last one used comes first: most of the time one session does all the work.
        self._free: queue.LifoQueue[EngineClient] = queue.LifoQueue()

    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        """Run a command in a session that no other thread uses. Raises TrunklineError."""
        try:
            client = self._free.get_nowait()
        except queue.Empty:
            client = self._connect()
        try:
            return client.command(name, arguments)
        finally:
            self._free.put(client)


def listen_tcp(settings: Settings) -> socket.socket | None:
    """Return the endpoint's TCP socket, or None where only ``admin.sock`` is wanted. Raises ConfigError.

    Made before anything is forked, so that a port that is taken is told to whoever starts the sidecar.
    """
    if not settings.admin_port:
        return None
    family = socket.AF_INET6 if ":" in settings.admin_host else socket.AF_INET
    try:
        return socket.create_server((settings.admin_host, settings.admin_port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise ConfigError(
            f"the admin endpoint cannot listen on {settings.admin_host} port {settings.admin_port} "
            f"({os.strerror(error.errno or 0)}); choose another --admin-port, or 0 for the Unix socket alone",
            port=settings.admin_port,
        ) from error


def check_settings(settings: Settings) -> None:
    """Raise ConfigError for files that the endpoint cannot do with, while whoever starts the sidecar can be told.

    What tokens an earlier life went by is not in force any more.
    """
    if settings.admin_tokens is not None:
        in_force = RunDirectory(settings.run_dir).admin_tokens
        in_force.unlink(missing_ok=True)
        TokenFile(settings.admin_tokens, in_force)
    if settings.admin_tls_certificate is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.admin_tls_certificate, settings.admin_tls_key)
        except OSError as error:
            raise ConfigError(
                f"the certificate {settings.admin_tls_certificate} and the key {settings.admin_tls_key} cannot be used "
                f"({error.strerror or error}); correct --admin-tls-certificate and --admin-tls-key",
                key="admin_tls_certificate",
            ) from error
    elif settings.is_exposed:
        log.warning(
            "the admin endpoint listens on %s without TLS: tokens can be read on the way; give --admin-tls-certificate and "
            "--admin-tls-key, or have a proxy before it that you trust",
            settings.admin_host,
        )
    if settings.audit_file is not None:
        SharedFile(settings.audit_file).close()


def listen_unix(path: Path) -> socket.socket:
    """Return a socket at ``path``, for this user and group alone, whatever an earlier life has left there."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    before = os.umask(0o117)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(_BACKLOG)
    return listener


def _prepull(settings: Settings, path: Path, store: Store, engine: EngineClient, vet: Vet | None) -> Prepull:
    """Return what brings in the models that are listed in a file."""

    def pulled(reference: Reference) -> Fetched:
        # Not before it is needed: what it fetches with takes half a second to be loaded.
        from sidecar.pulling import pull

        return pull(reference, store, settings.pull_policy, Unwatched(), vet=vet)

    return Prepull(
        path,
        RunDirectory(settings.run_dir).pull_list,
        settings.pull_policy,
        stored=lambda reference: is_stored(reference, store),
        pull=pulled,
        tell=lambda name: engine.command("model_changed", {"name": name}),
        clock=time.monotonic,
    )


class AdminServer(BaseApplication):  # type: ignore[misc]
    """gunicorn with the settings given here instead of a command line."""

    def __init__(
        self, settings: Settings, listeners: Sequence[socket.socket], tracer: Tracer | None = None, vet: Vet | None = None
    ) -> None:
        """Serve on ``listeners``. Without ``tracer`` nothing is traced; ``vet`` looks at bundles before workers do."""
        self._settings = settings
        self._listeners = listeners
        self._tracer = tracer
        self._vet = vet
        self._prepull: Prepull | None = None
        super().__init__()

    def load_config(self) -> None:
        chosen: dict[str, Any] = {
            "bind": [f"fd://{listener.fileno()}" for listener in self._listeners],
            "workers": self._settings.admin_workers,
            "threads": _THREADS,
            "timeout": _TIMEOUT_S,
            "graceful_timeout": 2,
            "keepalive": 5,
            "pre_fork": _freeze,
            "post_worker_init": self._begin,
            "worker_exit": self._end,
            "proc_name": "trunkline-admin",
            "limit_request_field_size": 2048,
        }
        if self._settings.admin_tls_certificate is not None:
            chosen |= {"certfile": str(self._settings.admin_tls_certificate), "keyfile": str(self._settings.admin_tls_key)}
            chosen["ssl_context"] = impatient_tls
        configure(self.cfg, chosen)

    def _begin(self, worker: object) -> None:
        _reuse_memory()
        if self._tracer is not None:
            self._tracer.start()
        if self._prepull is not None:
            # Ends with the worker: what came until then is kept, and another goes on.
            lock, stopped = RunDirectory(self._settings.run_dir).pull_list_lock, threading.Event()
            threading.Thread(target=self._prepull.run, args=(lock, stopped), name="prepull", daemon=True).start()

    def _end(self, server: object, worker: object) -> None:
        if self._tracer is not None:
            self._tracer.close(_LAST_SPANS_S)

    def load(self) -> Any:
        settings = self._settings
        token = admin_token(str(settings.run_dir / "admin.token"))
        path = str(settings.run_dir / "public" / "trunkline.sock")
        engine = EnginePool(lambda: AdminConnection(path, token))
        scraped = EnginePool(lambda: AdminConnection(path, token, _SCRAPE_S))
        store = Store(settings.store_dir)
        tokens = None
        if settings.admin_tokens is not None:
            tokens = TokenFile(settings.admin_tokens, RunDirectory(settings.run_dir).admin_tokens)
        gate = Gate(tokens, is_exposed=settings.is_exposed, has_tenants=settings.quota_file is not None)
        if settings.audit_file is not None:
            append_to(settings.audit_file)
        patient = EnginePool(lambda: AdminConnection(path, token, _JOB_S))
        if settings.pull_list is not None:
            self._prepull = _prepull(settings, settings.pull_list, store, patient, self._vet)
        app = create_app(
            engine,
            store,
            blob_limit_bytes=settings.blob_limit_bytes,
            scraped=scraped,
            patient=patient,
            gate=gate,
            jobs=Jobs(settings.run_dir / "jobs"),
            policy=settings.pull_policy,
            spans=None if self._tracer is None else self._tracer.counts,
            vet=self._vet,
            listed=None if settings.pull_list is None else partial(told_of, RunDirectory(settings.run_dir).pull_list),
        )
        # What fits into an arena, and the JSON before it.
        limit_bytes = settings.arena_limit_bytes + MAX_JSON_BYTES
        workers = settings.admin_workers
        callers = Callers(str(RunDirectory(settings.run_dir).relay), idle_limit=max(1, _IDLE_SESSIONS // workers))
        room = Room(_MOST_INFERENCES, _ROOM_BYTES // workers)
        add_open_inference(app, engine, callers, room, body_limit_bytes=limit_bytes)
        app.wsgi_app = Correlation(app.wsgi_app, self._tracer)  # type: ignore[method-assign]
        return app
