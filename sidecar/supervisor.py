"""The supervisor: owns the listening socket, keeps one engine and one HTTP server alive, never touches a device.

Both are forked from a process that has imported everything they need: what is imported is in memory once, and a new engine
answers within moments of the old one's death. Functions that connect meanwhile wait in the socket's backlog, which is
the supervisor's and outlives every engine. The supervisor stays single-threaded: forking a process with threads
would copy locks that nobody holds any more.

Another sidecar may take over (``sidecar.takeover``): the supervisor sees it by its socket, which is another's then, and drains.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

from sidecar.deaths import Deaths
from sidecar.errors import ConfigError
from sidecar.processes import die_with_parent
from sidecar.rundirectory import RunDirectory, write_token
from sidecar.segment import Segment
from sidecar.systemd import Notifier
from sidecar.takeover import TakeOver
from sidecar.tenantsockets import HANDED_OVER, Keeper, Listeners, aside, listen_at, silence

log = logging.getLogger("trunkline.supervisor")

# How often it looks whether another has taken its place; and while it takes another's, how far that is.
_LOOK_S: Final = 1.0
_TAKING_OVER_LOOK_S: Final = 0.05
_SIGNALS: Final = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, HANDED_OVER}
# An engine that lived longer than this was healthy, as is one that has computed; the next one is started at once.
_HEALTHY_S: Final = 1.0
_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
# Beyond the drain itself: time for the exit.
EXIT_GRACE_S: Final = 2.0


class Supervisor:
    """Keeps the children alive until SIGTERM or SIGINT, then drains. ``run`` is the life of the main process."""

    def __init__(
        self,
        run: RunDirectory,
        *,
        preload: Callable[[], None],
        engine: Callable[[Listeners, bytes, int, Sequence[int], Keeper, Deaths], None],
        http: Callable[[], None],
        drain_timeout_s: float,
        watchdog_s: float,
        segment_bytes: Sequence[int],
        take_over: TakeOver | None = None,
        notifier: Notifier | None = None,
    ) -> None:
        """``preload`` imports what the engine needs; ``engine(listeners, token, generation, segments, keeper, deaths)`` is the
        engine process.

        ``keeper`` has the sockets of tenants that engines before it have opened, and takes its own. ``segments`` are the
        descriptors of the memory for weights that outlives the engine, of ``segment_bytes`` each. ``deaths`` is what is known of
        how those before it ended, and where it writes what it is at.

        ``http()`` is the process of the admin endpoint. With ``take_over`` another sidecar runs in the run directory still.
        ``notifier`` tells whoever started this process how it is.
        """
        self._run = run
        self._preload = preload
        self._engine = engine
        self._http_main = http
        self._drain_timeout_s = drain_timeout_s
        self._segment_bytes = segment_bytes
        self._deaths = Deaths(len(segment_bytes), watchdog_s)
        self._segments: list[Segment] = []
        self._keeper = Keeper()
        self._engine_pid = 0
        self._engine_started_s = 0.0
        self._generation = 0
        self._http_pid = 0
        self._pause_s = 0.0
        # Until this one is alone.
        self._take_over = take_over
        self._notifier = notifier or Notifier("")
        # What is at the functions' socket while it is this sidecar's.
        self._own: os.stat_result | None = None
        # Whether that was the end of this one.
        self.is_succeeded = False

    def run(self) -> int:
        """Serve until told to stop, or until another has taken over; return the exit code. The run directory is the caller's.

        Raises ConfigError, also where this one cannot take over.
        """
        run, taking_over = self._run, self._take_over
        # Signals are waited for, not handled: nothing here can be interrupted half-way.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        if taking_over is None:
            listeners, token = self._listen(), write_token(run.token)
        # Before any fork: what a parent imports later would take apart what it shares with its child.
        self._preload()
        if taking_over is not None:
            # Not sooner: what operators do meanwhile is known to the other alone.
            listeners, token = taking_over.listen(self._keeper)
            self._own = aside(run.socket).stat()
        try:
            if taking_over is None:
                # Before the segments: those of folders that are gone go with the next that is made.
                self._tidy_devices()
            self._open_segments()
            if taking_over is None:
                self._start_http(listeners)
            self._start_engine(listeners, token)
            log.info("listening on %s", run.socket if taking_over is None else aside(run.socket))
            # Whoever connects from now on is served, if not at once: connections wait in the backlog until the engine is there.
            self._notifier.ready()
            listeners = self._keep_alive(listeners, token)
        finally:
            self._notifier.stopping()
            self._stop_children()
            for segment in self._segments:
                segment.unlink()
                segment.close()
            listeners.close()
            self._keeper.close()
            if self._take_over is not None and not self._take_over.is_in_place:
                self._take_over.give_up()
            elif not run.has_successor():
                silence(run.tenants)
                for path in (run.socket, run.relay, run.token, run.admin_socket, run.quotas, run.admin_tokens):
                    path.unlink(missing_ok=True)
        return 0

    def _listen(self) -> Listeners:
        for path in (self._run.socket, self._run.relay):
            # Of one that was to take over, and was killed.
            aside(path).unlink(missing_ok=True)
        listeners = Listeners(listen_at(self._run.socket, 0o666), listen_at(self._run.relay, 0o600))
        self._own = self._run.socket.stat()
        return listeners

    def _is_replaced(self) -> bool:
        """Say whether another's socket is where functions look for this one's."""
        return self._run.socket.exists() and not self._is_in_place()

    def _is_in_place(self) -> bool:
        try:
            return self._own is not None and os.path.samestat(self._run.socket.stat(), self._own)
        except OSError:
            return False

    def _open_segments(self) -> None:
        """Make or adopt a segment for each device."""
        for number, size_bytes in enumerate(self._segment_bytes):
            folder = self._run.device_folder(number)
            folder.mkdir(exist_ok=True)
            self._segments.append(Segment.create_or_adopt(folder, size_bytes, is_next=self._take_over is not None))

    def _tidy_devices(self) -> None:
        """Have what there is for devices that are no more go with their folders."""
        for folder in self._run.device_folders(len(self._segment_bytes)):
            pins = folder / "pins.json"
            if pins.exists():
                log.warning("%s: there is no such device any more; what was pinned there is forgotten, pin it again", folder)
                pins.unlink()
            # Not what somebody else has put there.
            with contextlib.suppress(OSError):
                folder.rmdir()

    def _keep_alive(self, listeners: Listeners, token: bytes) -> Listeners:
        """Do so until told to end, or another has taken over; return the sockets, which may be others by then."""
        while True:
            self._notifier.alive()
            info = signal.sigtimedwait(_SIGNALS, self._until_next_look_s())
            received = None if info is None else info.si_signo
            if received in (signal.SIGTERM, signal.SIGINT):
                return listeners
            self._keeper.take()
            if received == signal.SIGCHLD:
                self._bury()
            elif received == signal.SIGHUP and self._engine_pid:
                # It reads the quota file anew, as one that is started does anyway.
                os.kill(self._engine_pid, signal.SIGHUP)
            if self._take_over is not None:
                listeners = self._go_on_taking_over(self._take_over, listeners)
            elif self._is_replaced():
                if self._run.has_successor():
                    log.info("another sidecar has taken over; this one drains, and ends")
                    self.is_succeeded = True
                    return listeners
                listeners = self._listen_again(listeners)
            if not self._engine_pid and time.monotonic() >= self._engine_started_s + self._pause_s:
                self._start_engine(listeners, token)
            if self._engine_pid and self._deaths.watch(self._engine_pid, time.monotonic()):
                os.kill(self._engine_pid, signal.SIGKILL)
            if not self._http_pid and self._take_over is None:
                self._start_http(listeners)

    def _until_next_look_s(self) -> float:
        look_s = _LOOK_S if self._take_over is None else _TAKING_OVER_LOOK_S
        if self._engine_pid:
            return min(look_s, self._deaths.due_s(time.monotonic()))
        return min(look_s, max(0.0, self._engine_started_s + self._pause_s - time.monotonic()))

    def _go_on_taking_over(self, taking_over: TakeOver, listeners: Listeners) -> Listeners:
        """Take the next step, if it is time; return the sockets, which may be others then.

        Raises ConfigError when the engine has ended before it was asked anything.
        """
        if not taking_over.is_in_place:
            if not self._engine_pid:
                raise ConfigError(
                    f"the engine that was to take over in {self._run.root} has ended; its log tells why, and the sidecar that "
                    "runs there goes on",
                    run_dir=str(self._run.root),
                )
            if taking_over.is_ready():
                taking_over.put_in_place(self._keeper)
        elif taking_over.is_alone():
            self._tidy_devices()
            for segment in self._segments:
                segment.take_place()
            if taking_over.finish() and self._engine_pid:
                log.info("models or settings were changed meanwhile; an engine that knows all of it is started")
                os.kill(self._engine_pid, signal.SIGTERM)
            self._take_over = None
            if not self._is_in_place():
                # Removed by one that knows of no successor: it is of an older version.
                return self._listen_again(listeners)
        return listeners

    def _listen_again(self, listeners: Listeners) -> Listeners:
        """Take the place back from one that has died while it took over, or that has removed what was not its own."""
        log.error("%s is not this sidecar's any more, and nobody is about to take over; it listens there again", self._run.socket)
        try:
            found = self._listen()
        except ConfigError as error:
            log.error("%s", error)
            return listeners
        listeners.close()
        self._keeper.forget()
        if self._engine_pid:
            # The next one listens at the new sockets.
            os.kill(self._engine_pid, signal.SIGTERM)
        return found

    def _start_engine(self, listeners: Listeners, token: bytes) -> None:
        self._engine_started_s = time.monotonic()
        self._generation += 1
        segments = [segment.descriptor for segment in self._segments]
        # What the last one has handed over, in its last moment perhaps.
        self._keeper.take()
        self._deaths.engine_starts(self._engine_started_s)
        self._engine_pid = _fork(
            "engine", lambda: self._engine(listeners, token, self._generation, segments, self._keeper, self._deaths)
        )

    def _start_http(self, listeners: Listeners) -> None:
        def serve() -> None:
            # Functions are the engine's; a second holder would keep their socket open beyond the supervisor's death.
            listeners.close()
            self._keeper.close()
            for segment in self._segments:
                segment.close()
            self._deaths.close()
            self._http_main()

        self._http_pid = _fork("HTTP server", serve)

    def _bury(self) -> None:
        """Reap what has died, and decide when the next engine starts."""
        if self._http_pid:
            pid, status = os.waitpid(self._http_pid, os.WNOHANG)
            if pid:
                log.error("the HTTP server ended with %d; it is started again", os.waitstatus_to_exitcode(status))
                self._http_pid = 0
                time.sleep(_FIRST_PAUSE_S)
        if not self._engine_pid:
            return
        pid, status = os.waitpid(self._engine_pid, os.WNOHANG)
        if not pid:
            return
        lived_s = time.monotonic() - self._engine_started_s
        log.error("engine %d ended with %d after %.1f s; starting another", pid, os.waitstatus_to_exitcode(status), lived_s)
        self._engine_pid = 0
        has_served = self._deaths.engine_died(pid, status, time.monotonic())
        if has_served or lived_s >= _HEALTHY_S:
            self._pause_s = 0.0
        else:
            self._pause_s = min(max(2 * self._pause_s, _FIRST_PAUSE_S), _LONGEST_PAUSE_S)

    def _stop_children(self) -> None:
        """End both children: politely, the engine with time to drain, then for good."""
        if self._engine_pid and not _ended(self._engine_pid, self._drain_timeout_s + EXIT_GRACE_S):
            log.error("the engine did not drain within %.1f s and is killed", self._drain_timeout_s)
            os.kill(self._engine_pid, signal.SIGKILL)
            os.waitpid(self._engine_pid, 0)
        if self._http_pid and not _ended(self._http_pid, EXIT_GRACE_S):
            os.kill(self._http_pid, signal.SIGKILL)
            os.waitpid(self._http_pid, 0)


def _fork(name: str, child: Callable[[], None]) -> int:
    """Run ``child`` in a process that ends with this one; return its pid."""
    # What exists now is shared with the child as long as neither writes to it; a collector's visit is a write.
    gc.collect()
    gc.freeze()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        # What tells this process to look again must not end a child that does not care, or is not listening yet.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        die_with_parent(parent)
        child()
        status = 0
    except SystemExit as end:
        # How gunicorn ends, its workers included.
        status = end.code if isinstance(end.code, int) else 0
    except Exception:
        log.exception("the %s cannot go on", name)
    finally:
        # Not sys.exit: the supervisor's own clean-up, copied by the fork, must not run here.
        logging.shutdown()
        os._exit(status)


def _ended(pid: int, patience_s: float) -> bool:
    """Ask a child to end; return whether it did in time."""
    deadline = time.monotonic() + patience_s
    os.kill(pid, signal.SIGTERM)
    while time.monotonic() < deadline:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        signal.sigtimedwait({signal.SIGCHLD}, max(0.0, deadline - time.monotonic()))
    return False
