"""A real sidecar as a process of its own, for tests of what only real processes do: dying, restarting, draining."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from trunkline.errors import TrunklineError

from sidecar.admin_client import AdminClient
from sidecar.segment import SHARED_MEMORY, segment_name
from tests.forks import Forked, fork
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parent.parent
START_S = 120.0
Process = Forked | subprocess.Popen[bytes]


class SidecarProcess:
    """A running `trunkline serve`."""

    def __init__(self, folder: Path, *flags: str, through: Sequence[str] = ()) -> None:
        """``through`` stands before the program, as what changes it first (``tests.fault.launching``)."""
        self.run_dir = folder / "run"
        self.store_dir = folder / "store"
        self.socket = self.run_dir / "public" / "trunkline.sock"
        self.admin = AdminClient(f"unix:{self.run_dir}/admin.sock")
        self.log = folder / "sidecar.log"
        self._flags = flags
        self._through = through
        self.process = self.start()

    def command(self) -> list[str]:
        return [
            *(sys.executable, "-m", *self._through, "sidecar", "serve"),
            *("--run-dir", str(self.run_dir), "--store-dir", str(self.store_dir)),
            *("--admin-port", "0", "--device", "cpu", "--threads", "1"),
            *self._flags,
        ]

    def spawn(self, *flags: str) -> Process:
        """Start a sidecar in this one's folder, with further flags; it is not waited for."""
        command = [*self.command(), *flags]
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
        with self.log.open("ab") as log:
            if command[:2] == [sys.executable, "-m"]:
                return fork(command[2:], environment, log)
            return subprocess.Popen(command, stdout=log, stderr=log, env=environment)

    def start(self) -> Process:
        self.process = self.spawn()
        self.await_engine()
        return self.process

    def await_engine(self) -> int:
        """Return the pid of an engine that answers."""
        deadline = time.monotonic() + START_S
        while True:
            try:
                return int(self.admin.get("status")["engine"]["pid"])
            except TrunklineError:
                if time.monotonic() > deadline or self.process.poll() is not None:
                    raise AssertionError(f"the sidecar did not start:\n{self.log.read_text()}") from None
                time.sleep(0.02)

    def stop(self) -> int:
        """Send SIGTERM and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def sidecar_process(folder: Path, *flags: str, through: Sequence[str] = ()) -> Iterator[SidecarProcess]:
    """Run a sidecar in ``folder`` while the block runs."""
    running = SidecarProcess(folder, *flags, through=through)
    try:
        yield running
    finally:
        # Before the end: a connection that may be asked again is waited for.
        running.admin.close()
        running.stop()
        # A supervisor that was killed leaves its segment to the next one.
        for path in SHARED_MEMORY.glob(f"{segment_name(running.run_dir.resolve())[1:]}*"):
            path.unlink()
