"""Commands of the program as processes of their own, watched by what they log."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).parents[2]


class Program:
    """A running `trunkline COMMAND`."""

    def __init__(self, log: Path, *command: str, **environment: str) -> None:
        self._log = log
        paths = {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "sidecar", *command], stdout=file, stderr=file, env=os.environ | paths | environment
            )

    def told(self, pattern: str) -> re.Match[str]:
        """Wait until something that matches was logged."""
        found: list[re.Match[str]] = []

        def look() -> bool:
            match = re.search(pattern, self._log.read_text())
            found.extend([match] if match else [])
            return bool(found) or self.process.poll() is not None

        until(look)
        assert found, self._log.read_text()
        return found[0]

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def program(log: Path, *command: str, **environment: str) -> Iterator[Program]:
    """Run a command while the block runs."""
    running = Program(log, *command, **environment)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.stop()
