"""The process that serves the admin endpoint: gunicorn on a Unix socket and on loopback, outside the engine.

One worker with a few threads, forked from a master that has imported everything: nothing here may start a thread or open a
session with the engine before that fork. Must not import torch.
"""

from __future__ import annotations

import gc
import os
import queue
from collections.abc import Callable
from typing import Any

from gunicorn.app.base import BaseApplication
from trunkline.admin import AdminConnection

from sidecar.config import Settings
from sidecar.http.admin import EngineClient, admin_token, create_app
from sidecar.store import Store

_THREADS = 4
# A push of a large blob, or the verification of a large store, may take this long.
_TIMEOUT_S = 600


def _freeze(server: object, worker: object) -> None:
    # What the master imported stays shared with its worker as long as the collector does not touch it.
    gc.collect()
    gc.freeze()


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


class AdminServer(BaseApplication):  # type: ignore[misc]
    """gunicorn with the settings given here instead of a command line."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        addresses = [f"unix:{settings.run_dir}/admin.sock"]
        if settings.admin_port:
            host = f"[{settings.admin_host}]" if ":" in settings.admin_host else settings.admin_host
            addresses.append(f"{host}:{settings.admin_port}")
        chosen: dict[str, Any] = {
            "bind": addresses,
            # The Unix socket is made with this mask: 0660.
            "umask": 0o117,
            "workers": 1,
            "worker_class": "gthread",
            "threads": _THREADS,
            "timeout": _TIMEOUT_S,
            "graceful_timeout": 2,
            "keepalive": 5,
            "preload_app": True,
            "pre_fork": _freeze,
            "loglevel": "warning",
            "proc_name": "trunkline-admin",
            "control_socket_disable": True,
            "limit_request_field_size": 2048,
        }
        if os.access("/dev/shm", os.W_OK):  # noqa: S108 - gunicorn's heartbeat file, not ours
            chosen["worker_tmp_dir"] = "/dev/shm"  # noqa: S108
        for key, value in chosen.items():
            if key in self.cfg.settings:
                self.cfg.set(key, value)

    def load(self) -> Any:
        settings = self._settings
        token = admin_token(str(settings.run_dir / "admin.token"))
        engine = EnginePool(lambda: AdminConnection(str(settings.run_dir / "public" / "trunkline.sock"), token))
        return create_app(engine, Store(settings.store_dir), blob_limit_bytes=settings.blob_limit_bytes)
