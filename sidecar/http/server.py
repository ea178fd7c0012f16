"""The process that serves the admin endpoint: gunicorn on a Unix socket and on loopback, outside the engine."""

from __future__ import annotations

import gc
import logging
import os
from typing import Any

from gunicorn.app.base import BaseApplication
from trunkline.admin import AdminConnection

from sidecar.config import Settings, load_settings
from sidecar.http.admin import admin_token, create_app
from sidecar.store import Store

_THREADS = 4
# A push of a large blob, or the verification of a large store, may take this long.
_TIMEOUT_S = 600


def _freeze(server: object, worker: object) -> None:
    # What the master imported stays shared with its worker as long as the collector does not touch it.
    gc.collect()
    gc.freeze()


class AdminServer(BaseApplication):  # type: ignore[misc]
    """gunicorn with the settings given here instead of a command line."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        super().__init__()

    def load_config(self) -> None:
        settings = self._settings
        addresses = [f"unix:{settings.run_dir}/admin.sock"]
        if settings.admin_port:
            addresses.append(f"{settings.admin_host}:{settings.admin_port}")
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
        engine = AdminConnection(str(settings.run_dir / "public" / "trunkline.sock"), token)
        return create_app(engine, Store(settings.store_dir))


def main() -> None:
    """Serve with the settings found in the environment, where the supervisor puts them."""
    settings = load_settings({}, os.environ)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(name)s %(levelname)s %(message)s")
    AdminServer(settings).run()


if __name__ == "__main__":
    main()
