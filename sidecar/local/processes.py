"""Processes kept alive: output prefixed with a name, restarted when they die, ended with their keeper."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from sidecar.processes import die_with_parent

_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0
_HEALTHY_S = 5.0


class Kept:
    """One command, kept running until ``stop``. A thread of its own reads its output and starts it again.

    Make it in a thread that lives as long: the kernel ties a process to the thread that started it. ``ended_count``
    tells how often the command has ended by itself.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        write: Callable[[str], None],
        restart: bool = True,
    ) -> None:
        """Start the command. ``write`` is given each line of its output, prefixed with ``[name]``."""
        self.name = name
        self._command = command
        self._environment = dict(environment)
        self._folder = folder
        self._write = write
        self._restart = restart
        self.ended_count = 0
        self._stopping = threading.Event()
        # Held while a process is started or told to stop, so that none is started after `stop` has looked.
        self._changing = threading.Lock()
        self._process = self._start()
        self._thread = threading.Thread(target=self._keep, name=f"keep {name}", daemon=True)
        self._thread.start()

    def _start(self) -> subprocess.Popen[str]:
        parent = os.getpid()
        return subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Its own session: a Ctrl-C in the terminal is for the keeper, which stops everything in order.
            start_new_session=True,
            preexec_fn=lambda: die_with_parent(parent),
        )

    def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while True:
            started_s = time.monotonic()
            assert self._process.stdout is not None
            for line in self._process.stdout:
                self._write(f"[{self.name}] {line.rstrip()}")
            code = self._process.wait()
            self.ended_count += 1
            if self._stopping.is_set() or not self._restart:
                return
            pause_s = _FIRST_PAUSE_S if time.monotonic() - started_s > _HEALTHY_S else min(2 * pause_s, _LONGEST_PAUSE_S)
            self._write(f"[{self.name}] ended with {code}; starting again in {pause_s:.1f} s")
            self._stopping.wait(pause_s)
            with self._changing:
                if self._stopping.is_set():
                    return
                old, self._process = self._process, self._start()
            if old.stdout is not None:
                old.stdout.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def ask_to_stop(self) -> None:
        """Send SIGTERM, once."""
        with self._changing:
            if self._stopping.is_set():
                return
            self._stopping.set()
            if self.alive:
                self._process.send_signal(signal.SIGTERM)

    def stop(self, timeout_s: float = 15.0) -> None:
        """Wait for the end, and force it after ``timeout_s``."""
        self.ask_to_stop()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._write(f"[{self.name}] did not stop within {timeout_s:.0f} s and is killed")
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._thread.join(timeout_s)
        if self._process.stdout is not None:
            self._process.stdout.close()


def descendants(pid: int) -> list[int]:
    """Return a process and all its descendants."""
    found = [pid]
    for parent in found:
        try:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        except OSError:
            continue
        found.extend(int(child) for child in children)
    return found


def to_stderr(line: str) -> None:
    """Print a line of output."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
