"""What the benchmarks run: sidecars, functions and comparators as processes of their own, and variants that take turns."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Self

import requests
from trunkline.client import Model, Models
from trunkline.endpoint import Endpoint
from trunkline.errors import TrunklineError
from trunkline.pool import Pool

from benchmarks.report import Report
from sidecar.admin_client import AdminClient
from sidecar.local.environment import ensure_environment
from sidecar.processes import die_with_parent

ROOT = Path(__file__).parent.parent
TEMPLATE = ROOT / "template" / "python3-trunkline"
BLOCK = 20


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Sidecar:
    """A sidecar that serves from a folder of its own, asked by clients of this process."""

    def __init__(self, folder: Path, process: subprocess.Popen[bytes], port: int = 0) -> None:
        self.process = process
        self.url = f"http://127.0.0.1:{port}"
        self.socket = folder / "run" / "public" / "trunkline.sock"
        self.admin_socket = folder / "run" / "admin.sock"
        self.admin = AdminClient(f"unix:{self.admin_socket}")
        self._pools: dict[tuple[str, ...], Pool] = {}

    def model(self, name: str) -> Model:
        """Return a model as a function of its own would have it: with connections of its own."""
        return Model(name, self._pool(name))

    def models(self, *names: str) -> Models:
        pool = self._pool(*names)
        return Models([Model(name, pool) for name in names])

    def _pool(self, *names: str) -> Pool:
        if names not in self._pools:
            self._pools[names] = Pool(endpoint=Endpoint(str(self.socket)))
        return self._pools[names]

    def model_over_http(self, name: str) -> Model:
        """Return a model as a function without a socket would have it. The sidecar must have been given a port."""
        pool = self._pools.setdefault((name, self.url), Pool(endpoint=Endpoint(self.url)))
        return Model(name, pool)

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        self.admin.close()


class Bench:
    """The processes of one benchmark run, in a folder that goes with it."""

    def __init__(self, report: Report, seed: int) -> None:
        self.report = report
        self.seed = seed
        self.folder = Path(tempfile.mkdtemp(prefix="trunkline-bench-"))
        # What a pool looks for before it connects; `Sidecar` knows better.
        os.environ["TRUNKLINE_SOCKET"] = str(self.folder)
        self._started: list[subprocess.Popen[bytes]] = []
        self._sidecars: list[Sidecar] = []
        self.context = self.folder / "context"
        shutil.copytree(TEMPLATE, self.context, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "benchmarks" / "thin_handler.py", self.context / "function" / "handler.py")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        for sidecar in self._sidecars:
            sidecar.close()
        for process in self._started:
            process.send_signal(signal.SIGTERM)
        for process in list(self._started):
            self.stop(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    @cached_property
    def interpreter(self) -> Path:
        """The interpreter of functions, in an environment that is made once for all runs."""
        return ensure_environment([TEMPLATE / "requirements.txt"], ROOT / ".trunkline" / "envs")

    # --- processes ---------------------------------------------------------------------------------------------------

    def start(
        self, command: list[str], folder: Path = ROOT, clean: bool = False, talks: bool = False, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a process that ends with this one; one that ``talks`` does so over pipes."""
        inherited = {"PATH": os.environ["PATH"]} if clean else dict(os.environ)
        if not clean:
            inherited["PYTHONPATH"] = f"{ROOT}:{TEMPLATE}"
        parent = os.getpid()
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=inherited | environment,
            stdin=subprocess.PIPE if talks else None,
            stdout=subprocess.PIPE if talks else subprocess.DEVNULL,
            stderr=(self.folder / "stderr.log").open("ab"),
            preexec_fn=lambda: die_with_parent(parent),
        )
        self._started.append(process)
        return process

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._started.remove(process)

    def end(self, sidecar: Sidecar) -> None:
        """Stop a sidecar. Its connections are closed before: an HTTP worker waits for those that may be asked again."""
        sidecar.close()
        self.stop(sidecar.process)

    def start_sidecar(
        self,
        name: str = "ours",
        threads: int = 1,
        *,
        store: str | None = None,
        device: str = "",
        port: int = 0,
        **environment: str,
    ) -> Sidecar:
        """Start a sidecar without waiting for it. ``port`` is for HTTP. ``environment`` holds settings: TRUNKLINE_PACKING="off".

        Sidecars of one ``store`` have their models in common, what was found out about them, and their block files. They have
        one lane unless it is said otherwise: what is compared must not change on the way.
        """
        environment = {"TRUNKLINE_LANES": "1"} | environment
        folder = self.folder / name
        run = ["--run-dir", str(folder / "run"), "--store-dir", str(self.folder / (store or name) / "store")]
        chosen = ["--admin-port", str(port), "--threads", str(threads), "--device", device or self.report.device]
        process = self.start([sys.executable, "-m", "sidecar", "serve", *run, *chosen], **environment)
        sidecar = Sidecar(folder, process, port)
        self._sidecars.append(sidecar)
        return sidecar

    def sidecar(
        self, name: str = "ours", threads: int = 1, *, store: str | None = None, port: int = 0, **environment: str
    ) -> Sidecar:
        """Start a sidecar and wait until it answers."""
        sidecar = self.start_sidecar(name, threads, store=store, port=port, **environment)
        self.until(lambda: bool(sidecar.admin.get("status")))
        return sidecar

    def thin_function(self, name: str, sidecar: Sidecar, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start a function of the template, which asks the model ``name``."""
        port = free_port()
        process = self.start(
            [str(self.interpreter), "index.py"],
            self.context,
            clean=True,
            PORT=str(port),
            bind_address="127.0.0.1",
            MODEL=name,
            TRUNKLINE_SOCKET=str(sidecar.socket),
            healthcheck_interval="0s",
            **environment,
        )
        return process, f"http://127.0.0.1:{port}/"

    def torch_function(
        self, name: str, weights: list[Path], copies: str = "private", **environment: str
    ) -> tuple[subprocess.Popen[bytes], str]:
        """Start comparator A or B: a function that holds a model, or several, itself."""
        port = free_port()
        command = [sys.executable, "-m", "gunicorn", "benchmarks.comparators.torch_function:app"]
        options = ["-b", f"127.0.0.1:{port}", "-k", "gthread", "--keep-alive", "75", "--timeout", "0"]
        threads = str(4 * len(weights))
        process = self.start(
            [*command, *options, "--threads", threads, "--log-level", "error"],
            MODEL=name,
            WEIGHTS=os.pathsep.join(map(str, weights)),
            COPIES=copies,
            **environment,
        )
        return process, f"http://127.0.0.1:{port}/"

    # --- waiting -----------------------------------------------------------------------------------------------------

    def until(self, holds: Callable[[], bool], timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(TrunklineError, requests.RequestException):
                if holds():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError((self.folder / "stderr.log").read_text()[-2000:])
            time.sleep(0.005)

    def answers(self, url: str, body: bytes) -> bytes:
        """Wait for a function's first right answer and return it."""
        found: list[bytes] = []

        def ask() -> bool:
            answer = requests.post(url, data=body, timeout=60)
            if answer.status_code == 200:
                found.append(answer.content)
            elif answer.status_code < 500:
                raise ValueError(answer.text)
            return bool(found)

        self.until(ask)
        return found[0]


def interleaved(
    variants: Mapping[str, Callable[[], object]], count: int, block: int = BLOCK, warm: int = 3, rest_s: float = 0.0
) -> dict[str, list[float]]:
    """Time each variant ``count`` times after ``warm`` times, in blocks that take turns; return microseconds.

    Nobody does anything for ``rest_s`` before each block.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        for _ in range(warm):
            variant()
    block = min(block, count)
    for _ in range(-(-count // block)):
        for name, variant in variants.items():
            time.sleep(rest_s)
            for _ in range(block):
                started = time.perf_counter_ns()
                variant()
                times[name].append((time.perf_counter_ns() - started) / 1000)
    return times
