"""A rolling upgrade as a DaemonSet with `maxSurge` does it: two pods on a node, one run directory, and a function that asks.

A pod is namespaces and a `/dev/shm` of its own. What the kubelet and the DaemonSet's controller do is done here, as the chart
says: a new pod is started beside the old one, which is told to end when the new one's probe is content.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.charts import named, rendered
from tests.fault.matrix import Neighbour, Row, write_scaled
from tests.namespaces.confinement import inside, network, require, within
from tests.sidecar_process import ROOT, SidecarProcess
from tests.waiting import PATIENCE_S, until

pytestmark = pytest.mark.timeout(600)

PORT = 9470
_SHM = 'mount --make-rprivate /; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; exec "$@"'


class Pod(SidecarProcess):
    """A pod of the chart's DaemonSet, with its one container. ``folder`` is the node's."""

    def __init__(self, folder: Path, net: str, *, is_first: bool) -> None:
        self._net = net
        self._is_first = is_first
        super().__init__(folder, "--admin-port", str(PORT), *surge_flags(), "--drain-timeout", "30")

    def command(self) -> list[str]:
        return [
            *("ip", "netns", "exec", self._net),
            *("unshare", "--mount", "--ipc", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"),
            *("sh", "-c", _SHM, "sh", "setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
            *super().command(),
        ]

    def await_engine(self) -> int:
        # The endpoint is the other pod's until that has ended.
        return super().await_engine() if self._is_first else 0

    @property
    def pid(self) -> int:
        return inside(self.process.pid)

    def probe(self, *flags: str) -> bool:
        """Say what a probe finds that the kubelet runs in the container."""
        entered = [
            "nsenter",
            "--target",
            str(self.pid),
            "--mount",
            "--pid",
            "--net",
            sys.executable,
            "-m",
            "sidecar.probe",
            *flags,
        ]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "TRUNKLINE_RUN_DIR": str(self.run_dir)}
        return not subprocess.run(entered, env=environment, timeout=PATIENCE_S, check=False).returncode

    def is_ready(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        return bool(self.pid) and self.probe("--own")

    def answers_tcp(self) -> bool:
        """Say whether the pod is any good to the Service."""
        asked = within(self.pid, "curl", "-s", "-o", "/dev/null", f"http://127.0.0.1:{PORT}/readyz", timeout_s=PATIENCE_S)
        return asked.returncode == 0

    def end(self) -> int:
        """End the pod, as one that is deleted; return the exit code of its container."""
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGTERM)
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        if self.process.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
            self.process.wait(PATIENCE_S)


def surge_flags() -> list[str]:
    """Return the flags that the chart has the sidecar started with for that, and for nothing else."""
    (with_it,), (without,) = (
        named(rendered(values={"update": {"takeOver": each}}), "DaemonSet", "trunkline")["spec"]["template"]["spec"]["containers"]
        for each in (True, False)
    )
    return [flag for flag in with_it["args"] if flag not in without["args"]]


@pytest.fixture
def row() -> Row:
    return Row(("F6",))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[tuple[Path, str, str]]:
    """Give the folder of a node, and networks for two pods."""
    require()
    with network() as first, network() as second:
        yield tmp_path, first, second


@contextlib.contextmanager
def pod(folder: Path, net: str, *, is_first: bool = False) -> Iterator[Pod]:
    made = Pod(folder, net, is_first=is_first)
    try:
        yield made
    finally:
        made.admin.close()
        made.kill()


@pytest.fixture(scope="module")
def scaled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scaled(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def old(node: tuple[Path, str, str], scaled: Path) -> Iterator[Pod]:
    folder, net, _ = node
    with pod(folder, net, is_first=True) as made:
        made.admin.push(scaled)
        yield made


def test_a_pod_is_replaced_without_a_request_lost(node: tuple[Path, str, str], old: Pod, row: Row) -> None:
    folder, _, net = node
    until(old.is_ready)
    with Neighbour(row, old.socket, threads=4) as neighbour:
        row.attempts += 1
        with pod(folder, net) as new:
            until(lambda: bool(new.pid))
            # The endpoint in the folder that both have is the other one's: without --own that would be taken for this pod's.
            assert new.probe()
            assert not new.is_ready()
            until(new.is_ready)
            assert new.answers_tcp()
            # The old one has ended, and its container has not: nothing starts it again.
            assert old.process.poll() is None
            assert not old.is_ready()
            assert old.probe("--live")
            assert not old.answers_tcp()
            neighbour.await_answers()
            # Now the controller removes it.
            assert old.end() == 0
            neighbour.await_answers()
            neighbour.stop()
    row.check()


def test_the_old_one_is_back_when_the_new_one_dies(node: tuple[Path, str, str], old: Pod, row: Row) -> None:
    folder, net, other = node
    with Neighbour(row, old.socket, threads=2) as neighbour:
        row.attempts += 1
        with pod(folder, other) as new:
            until(new.is_ready)
            new.kill()
            # Its container ends because the other is gone; the kubelet starts it again, and it serves.
            assert old.process.wait(PATIENCE_S) == 0
            with pod(folder, net) as again:
                until(again.is_ready)
                neighbour.await_answers()
                neighbour.stop()
    row.check()
