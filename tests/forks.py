"""Programs of the project as processes of their own, forked from one that has imported the libraries they need.

Importing torch takes seconds of processor time, and a sidecar that really starts takes them each time; tests start hundreds.
So one process for each test process imports libraries, and nothing of the project, and each program is forked from it: it then
does what ``python -m PROGRAM`` does. It lives as long as the test process.
"""

from __future__ import annotations

import array
import functools
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).parent.parent
# What a sidecar imports of others, that takes longest first.
LIBRARIES = (
    *("torch", "torch.fx", "torch.utils._pytree", "torch._subclasses.fake_tensor", "numpy", "flask", "gunicorn.app.base"),
    *("gunicorn.workers.gthread", "requests", "msgpack", "click", "rich.console", "rich.table", "prometheus_client"),
)
_LONGEST = 1 << 16


class Forked:
    """A process that was forked, with what tests need of a ``subprocess.Popen``."""

    def __init__(self, parent: _Parent, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._parent = parent

    def poll(self) -> int | None:
        """Return its exit code once it has ended: that of the signal, negative, where one has ended it."""
        if self.returncode is None:
            self.returncode = self._parent.ended(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code. Raises subprocess.TimeoutExpired."""
        until_s = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if timeout is not None and until_s is not None and time.monotonic() > until_s:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.002)
        return code

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The process that the others are forked from, seen from the tests'."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(_ITS.fileno())], pass_fds=[_ITS.fileno()], env=environment, cwd=ROOT
        )
        _ITS.close()
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}

    def fork(self, command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> Forked:
        """Run a module of this name with these arguments; what it prints goes into ``output``."""
        asked = json.dumps({"command": list(command), "environment": dict(environment), "folder": str(Path.cwd())})
        rights = array.array("i", [output.fileno()])
        with self._lock:
            _OURS.setblocking(True)
            _OURS.sendmsg([asked.encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            while "forked" not in (told := self._told()):
                self._codes[told["ended"]] = told["code"]
            return Forked(self, told["forked"])

    def ended(self, pid: int) -> int | None:
        with self._lock:
            _OURS.setblocking(False)
            while pid not in self._codes:
                try:
                    told = self._told()
                except BlockingIOError:
                    return None
                self._codes[told["ended"]] = told["code"]
            return self._codes[pid]

    def _told(self) -> dict[str, int]:
        received = _OURS.recv(_LONGEST)
        assert received, f"the process that others are forked from has ended with {self._process.wait()}"
        told: dict[str, int] = json.loads(received)
        return told


# Made when this is imported: a test that counts descriptors must not count these.
_OURS, _ITS = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
_parent = functools.cache(_Parent)


def fork(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes]) -> Forked:
    """Run ``python -m`` with ``command``: the name of a module, and its arguments."""
    return _parent().fork(command, environment, output)


def _serve(line: socket.socket) -> dict[str, object] | None:
    """Fork as asked until nobody is there to ask. Return what to do, in a child; None in the parent, at its end."""
    watched = selectors.DefaultSelector()
    watched.register(line, selectors.EVENT_READ)
    while True:
        for key, _ in watched.select():
            if key.data is not None:
                # A process has ended.
                _, status = os.waitpid(key.data, 0)
                watched.unregister(key.fd)
                os.close(key.fd)
                line.send(json.dumps({"ended": key.data, "code": os.waitstatus_to_exitcode(status)}).encode())
                continue
            asked, descriptors, _, _ = socket.recv_fds(line, _LONGEST, 1)
            if not asked:
                return None
            pid = os.fork()
            if not pid:
                for number in (1, 2):
                    os.dup2(descriptors[0], number)
                for each in (descriptors[0], *(key.fd for key in list(watched.get_map().values()))):
                    os.close(each)
                line.detach()
                watched.close()
                told: dict[str, object] = json.loads(asked)
                return told
            os.close(descriptors[0])
            watched.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
            line.send(json.dumps({"forked": pid}).encode())


def main() -> None:
    """Import, fork; in a child, run what was asked for."""
    for library in LIBRARIES:
        importlib.import_module(library)
    told = _serve(socket.socket(fileno=int(sys.argv[1])))
    if told is None:
        return
    os.environ.clear()
    os.environ.update(told["environment"])
    os.chdir(str(told["folder"]))
    sys.argv = list(told["command"])
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
