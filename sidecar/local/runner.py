"""Sidecar, functions and gateway of one stack, started together, stopped together."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType, TracebackType

import requests
from trunkline.errors import SidecarUnavailable, TrunklineError

from sidecar.admin_client import AdminClient
from sidecar.errors import ConfigError
from sidecar.local.environment import ensure_environment
from sidecar.local.processes import Kept, descendants, to_stderr
from sidecar.local.stack import READY_PATH, find_template, lay_out, read_stack

_STATE = Path(".trunkline")
_START_S = 60.0
_PROBE_S = 0.05
# What has ended so often without an answer will not answer.
_ENOUGH_ENDS = 3
# The names of what runs beside the functions, in logs and in `pids`.
_SIDECAR, _GATEWAY = "sidecar", "gateway"
# Where a socket's path may have at most 107 characters, the project's own folder can be too deep.
_LONGEST_RUN_DIR = 70


class LocalStack:
    """A running stack. A context manager; ``url`` is the gateway's, ``admin`` the sidecar's admin address.

    Everything that is made (environments, build contexts, sockets, the store) lies in ``.trunkline`` beside the stack file.
    """

    def __init__(
        self,
        stack: Path,
        *,
        functions: list[str] | None = None,
        gateway_port: int = 0,
        settings: Mapping[str, str] | None = None,
        write: Callable[[str], None] = to_stderr,
    ) -> None:
        """Start sidecar, functions and gateway of ``stack``; ``settings`` are TRUNKLINE_ settings of the sidecar.

        Returns when every process listens; functions are ready only when their models are there. Raises ConfigError.
        """
        self._write = write
        self._kept: list[Kept] = []
        state = stack.resolve().parent / _STATE
        state.mkdir(exist_ok=True)
        self._scratch = None
        run_dir = state / "run"
        if len(str(run_dir)) > _LONGEST_RUN_DIR:
            self._scratch = tempfile.TemporaryDirectory(prefix="trunkline-")
            run_dir = Path(self._scratch.name)
        self.admin = f"unix:{run_dir}/admin.sock"
        self.socket = run_dir / "public" / "trunkline.sock"
        self.ports: dict[str, int] = {}
        try:
            self._start(stack, state, run_dir, functions, gateway_port, settings or {})
        except BaseException:
            self.stop()
            raise

    def _start(
        self,
        stack: Path,
        state: Path,
        run_dir: Path,
        only: list[str] | None,
        gateway_port: int,
        settings: Mapping[str, str],
    ) -> None:
        functions = read_stack(stack, only)
        for function in functions:
            if function.name in (_SIDECAR, _GATEWAY):
                raise ConfigError(f"{stack}: a function cannot be called {function.name!r} here: the runner uses that name")
        template = find_template(stack)
        self._refuse_a_second(run_dir)
        ports = _free_ports(len(functions) + 1, gateway_port)
        contexts = {function.name: lay_out(function, template, state / "build") for function in functions}
        interpreters = {
            name: ensure_environment(
                [template / "requirements.txt", context / "function" / "requirements.txt"], state / "envs", self._write
            )
            for name, context in contexts.items()
        }
        chosen = {
            "TRUNKLINE_RUN_DIR": str(run_dir),
            "TRUNKLINE_STORE_DIR": str(state / "store"),
            "TRUNKLINE_ADMIN_PORT": "0",
            **settings,
        }
        sidecar = self._keep(_SIDECAR, [sys.executable, "-m", "sidecar", "serve"], os.environ | chosen, stack.resolve().parent)
        with AdminClient(self.admin) as admin:
            self._await(sidecar, lambda: bool(admin.get("status")))
        started = []
        for function, port in zip(functions, ports[1:], strict=True):
            self.ports[function.name] = port
            kept = self._keep(
                function.name,
                [str(interpreters[function.name]), "index.py"],
                _function_environment(function.environment, port, self.socket),
                contexts[function.name],
            )
            started.append(kept)
        upstreams = {name: f"http://127.0.0.1:{port}" for name, port in self.ports.items()}
        self.url = f"http://127.0.0.1:{ports[0]}"
        bound = {"GATEWAY_BIND": f"127.0.0.1:{ports[0]}", "GATEWAY_UPSTREAMS": json.dumps(upstreams)}
        command = [sys.executable, "-m", "sidecar.local.gateway"]
        gateway = self._keep(_GATEWAY, command, os.environ | bound, stack.resolve().parent)
        for kept in started:
            self._await(kept, lambda kept=kept: _listens(f"{upstreams[kept.name]}{READY_PATH}"))  # type: ignore[misc]
        self._await(gateway, lambda: _listens(f"{self.url}/healthz"))

    def _refuse_a_second(self, run_dir: Path) -> None:
        try:
            with AdminClient(self.admin) as admin:
                admin.get("status")
        except TrunklineError:
            return
        raise ConfigError(f"this stack is running already, with its sidecar in {run_dir}; stop it first")

    def _keep(self, name: str, command: list[str], environment: Mapping[str, str], folder: Path) -> Kept:
        kept = Kept(name, command, environment=environment, folder=folder, write=self._write)
        self._kept.append(kept)
        return kept

    def _await(self, kept: Kept, answers: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and kept.ended_count < _ENOUGH_ENDS:
            try:
                if answers():
                    return
            except TrunklineError:
                pass
            time.sleep(_PROBE_S)
        raise SidecarUnavailable(
            f"{kept.name} does not start: it ended {kept.ended_count} times within {_START_S:.0f} s; its output tells why",
            ended_count=kept.ended_count,
        )

    def wait_ready(self, timeout_s: float = _START_S) -> None:
        """Wait until every function has its models. Raises SidecarUnavailable with what the last one lacks."""
        deadline = time.monotonic() + timeout_s
        for name, port in self.ports.items():
            while True:
                answer = requests.get(f"http://127.0.0.1:{port}{READY_PATH}", timeout=10)
                if answer.status_code == 200:
                    break
                if time.monotonic() > deadline:
                    raise SidecarUnavailable(f"{name} is not ready: {answer.json()['error']['message']}")
                time.sleep(_PROBE_S)

    def pids(self) -> dict[str, list[int]]:
        """Return the processes of the sidecar, of each function and of the gateway, workers included."""
        return {kept.name: descendants(kept.pid) for kept in self._kept if kept.alive}

    def stop(self) -> None:
        """Stop everything: the gateway first, the sidecar last, so that accepted requests are answered."""
        for names in ({_GATEWAY}, self.ports.keys(), {_SIDECAR}):
            going = [kept for kept in self._kept if kept.name in names]
            for kept in going:
                kept.ask_to_stop()
            for kept in going:
                kept.stop()
        self._kept.clear()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> LocalStack:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _function_environment(given: Mapping[str, str], port: int, sidecar_socket: Path) -> dict[str, str]:
    """Return the environment of a function: little of this machine's, as in a container; what is local goes before ``given``."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "TZ") if key in os.environ}
    return {
        **kept,
        "PYTHONUNBUFFERED": "1",
        **given,
        "bind_address": "127.0.0.1",
        "PORT": str(port),
        "TRUNKLINE_SOCKET": str(sidecar_socket),
        # The one in a stack file is a cluster's.
        "TRUNKLINE_URL": "",
        # No gateway needs time to notice: stop at once.
        "healthcheck_interval": "0s",
    }


def _free_ports(count: int, first: int) -> list[int]:
    """Return ``count`` ports of 127.0.0.1 that are free, ``first`` among them unless it is 0. Raises ConfigError."""
    with contextlib.ExitStack() as held:
        ports = []
        for wanted in (first, *[0] * (count - 1)):
            # All are held until the last is found: a port that was let go could be found twice.
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", wanted))
            except OSError as error:
                reason = os.strerror(error.errno or 0)
                raise ConfigError(f"port {wanted} of 127.0.0.1 cannot be used ({reason}); choose another gateway port") from error
            ports.append(int(probe.getsockname()[1]))
        return ports


def _listens(url: str) -> bool:
    try:
        requests.get(url, timeout=2)
    except requests.RequestException:
        return False
    return True


class _StoppedEarly(BaseException):
    """SIGINT or SIGTERM came while the stack was being started."""


def up(stack: Path, *, functions: list[str] | None = None, gateway_port: int = 8080) -> int:
    """Run a stack until SIGINT or SIGTERM; return the exit code. Raises ConfigError and SidecarUnavailable."""
    if not stack.is_file():
        raise ConfigError(f"{stack} is not there; run this beside a stack.yml or name one")
    # Of all that a thread can wait for, this alone may be touched by a handler that runs in the middle of the waiting: an event's
    # lock would be taken already.
    told: queue.SimpleQueue[None] = queue.SimpleQueue()
    is_told = is_started = False

    def tell(number: int, frame: FrameType | None) -> None:
        nonlocal is_told
        # A second signal changes nothing: everything is being stopped already.
        if not is_told:
            is_told = True
            told.put(None)
            if not is_started:
                raise _StoppedEarly

    signal.signal(signal.SIGTERM, tell)
    signal.signal(signal.SIGINT, tell)
    try:
        with LocalStack(stack, functions=functions, gateway_port=gateway_port) as running:
            is_started = True
            to_stderr(f"[up] functions at {running.url}/function/NAME, sidecar at {running.admin}")
            for name in running.ports:
                to_stderr(f"[up] {running.url}/function/{name}")
            to_stderr(f"[up] push models with: trunkline --admin {running.admin} push DIR; Ctrl-C stops everything")
            told.get()
            to_stderr("[up] stopping")
    except _StoppedEarly:
        to_stderr("[up] stopped before everything had started")
    return 0
