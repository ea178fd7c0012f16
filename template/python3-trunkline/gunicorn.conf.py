"""How gunicorn serves a function. Every value can be set by an environment variable of stack.yml."""

import gc
import os
import threading
from pathlib import Path
from urllib.parse import urlsplit

import trunkline
from gunicorn import glogging
from trunkline import logs
from trunkline.errors import TrunklineError


def _is_behind_watchdog() -> bool:
    # PORT is the watchdog's to listen on then, and this server's address is the one the watchdog forwards to.
    try:
        return Path(f"/proc/{os.getppid()}/comm").read_text().strip() == "fwatchdog"
    except OSError:
        return False


_has_watchdog = _is_behind_watchdog()
# The watchdog calls a function healthy while this file is there. Told to ``suppress_lock``, as in the image, it leaves that to
# whoever knows better: by itself it writes it before anything listens, and the first calls are answered with 500.
_lock = Path(os.environ.get("TMPDIR") or "/tmp", ".lock")
_writes_lock = _has_watchdog and os.environ.get("suppress_lock") in ("true", "1")
if _writes_lock:
    # It outlives a container that is restarted.
    _lock.unlink(missing_ok=True)

if os.environ.get("PORT") and not _has_watchdog:
    bind = f"{os.environ.get('bind_address', '0.0.0.0')}:{os.environ['PORT']}"
else:
    bind = urlsplit(os.environ.get("upstream_url", "http://127.0.0.1:5000")).netloc


class Logger(glogging.Logger):
    """Writes gunicorn's own lines as the function's are written, with the call they belong to."""

    def setup(self, cfg):
        super().setup(cfg)
        logs.adopt(self.error_log)


logger_class = Logger
workers = int(os.environ.get("workers", "1"))
threads = int(os.environ.get("threads", "4"))
worker_class = "gthread"
# What the handler needs is imported once, before the fork, and shared by all workers.
preload_app = True
keepalive = 75
# A request may take as long as the watchdog allows; the watchdog, not gunicorn, ends those that take longer.
timeout = 0
loglevel = os.environ.get("gunicorn_log_level", "warning")
accesslog = None
# Nothing may be written below a read-only root.
control_socket_disable = True
if os.access("/dev/shm", os.W_OK):
    worker_tmp_dir = "/dev/shm"


def when_ready(server):
    """Let the watchdog know that calls are taken: what comes from now on waits for the first worker."""
    if _writes_lock:
        try:
            _lock.touch()
        except OSError as error:
            raise SystemExit(f"cannot write {_lock}: {error.strerror}; mount a writable {_lock.parent} there") from error


def pre_fork(server, worker):
    """Keep the collector off what the workers share: each object it looked at would be copied into every worker."""
    gc.freeze()
    gc.enable()


def post_worker_init(worker):
    """Tell the sidecar which models the handler is going to ask about, so that they are loaded when the first request comes."""
    threading.Thread(target=_greet, args=(worker.log,), daemon=True).start()


def _greet(log):
    try:
        trunkline.ready()
    except TrunklineError as error:
        # The first request will be told, if that is still so.
        log.info("the sidecar is not ready: %s", error.message)
