"""Functions in containers of their own and sidecars in theirs, on one node and on two: what each reaches, and at what cost."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sidecar.local.stack import Function, lay_out
from tests.bundles import write_adding_bundle
from tests.fault.matrix import write_model
from tests.namespaces.confinement import UID, Confined, MemoryLimit, inside, network, require, within
from tests.sidecar_process import ROOT, SidecarProcess
from tests.waiting import PATIENCE_S, until

PORT = 9470
# More than the function may have: the arena alone would be the end of it, were it the function's.
LIMIT_BYTES = 96 << 20
INPUT_BYTES = 160 << 20
HANDLER = """
import json, os
from trunkline import counters, model, transport_name

def handle(event, context):
    if event.path == "/write":
        return {"body": [where for where in ("/", "/etc", "/srv/app", "/run/trunkline", "/root", "/var/tmp") if writes(where)]}
    if event.path == "/large":
        with model("total").request(batch=int(event.query["rows"])) as r:
            r["x"][...] = 1.0
            return {"body": {"total": r.run().tolist()}}
    return {"body": {"sum": model("adder")(json.loads(event.body)).tolist(), "by": transport_name()}}

def writes(where):
    try:
        with open(os.path.join(where, "written"), "w"):
            return True
    except OSError:
        return False
"""
WIDTH = 1 << 22


class Total(torch.nn.Module):
    """The sum of each row: a large input, and next to no output."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(dim=1)


class NodeSidecar(SidecarProcess):
    """A sidecar in mount, ipc, uts and pid namespaces of its own, without capabilities, in the network of a node."""

    def __init__(self, folder: Path, node: str, *flags: str) -> None:
        self._node = node
        super().__init__(folder, *flags)

    def command(self) -> list[str]:
        # Its end is that of the first process in there; unshare hands its own on.
        return [
            *("ip", "netns", "exec", self._node),
            *("unshare", "--mount", "--ipc", "--uts", "--pid", "--fork", "--mount-proc", "--kill-child"),
            *("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"),
            *super().command(),
        ]

    def stop(self) -> int:
        if self.process.poll() is None:
            os.kill(inside(self.process.pid), signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def node(folder: Path, values: list[float], *flags: str) -> Iterator[tuple[str, NodeSidecar]]:
    """Run a node: a network, and a sidecar in it with a model that adds ``values``."""
    folder.mkdir()
    with network() as name:
        box = NodeSidecar(folder, name, "--admin-port", str(PORT), *flags)
        try:
            write_adding_bundle(folder / "adder", "adder", values)
            box.admin.push(folder / "adder")
            yield name, box
        finally:
            box.admin.close()
            assert box.stop() == 0


class ConfinedFunction:
    """A function in a container, asked from within its own network."""

    def __init__(self, confined: Confined, limit: MemoryLimit | None = None) -> None:
        command = confined.command("index.py")
        self.process = subprocess.Popen(limit.joined_by(command) if limit else command, stderr=subprocess.PIPE)
        self.url = confined.environment["upstream_url"]
        self.pid = 0
        until(self._listens)

    def _listens(self) -> bool:
        assert self.process.poll() is None, self.process.communicate()[1].decode()
        # What stands before: ip and unshare.
        self.pid = inside(self.process.pid)
        return bool(self.pid) and self.ask("/_/trunkline/ready")[0] != 0

    def ask(self, path: str, body: str = "") -> tuple[int, bytes]:
        """Return the status, 0 without an answer, and the body."""
        asked = within(self.pid, "curl", "-s", "-w", "%{http_code}", "--data-binary", body, self.url + path, timeout_s=PATIENCE_S)
        return int(asked.stdout[-3:] or b"0"), asked.stdout[:-3]

    def stop(self) -> tuple[int, str]:
        os.kill(self.pid, signal.SIGTERM)
        _, log = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, log.decode()


@contextlib.contextmanager
def running(confined: Confined, limit: MemoryLimit | None = None) -> Iterator[ConfinedFunction]:
    function = ConfinedFunction(confined, limit)
    try:
        yield function
    finally:
        code, log = function.stop()
        assert code == 0, log


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the build context of a function."""
    require()
    folder = tmp_path_factory.mktemp("context")
    (folder / "handler").mkdir()
    (folder / "handler" / "handler.py").write_text(HANDLER)
    made = lay_out(Function("confined", folder / "handler", {}), ROOT / "template" / "python3-trunkline", folder)
    subprocess.run(["chmod", "-R", "a+rX", str(made)], check=True)
    return made


def environment(port: int = 5000, **more: str) -> dict[str, str]:
    return {"upstream_url": f"http://127.0.0.1:{port}", "healthcheck_interval": "0s", **more}


def test_without_any_network_a_function_reaches_the_sidecar_by_its_socket_and_writes_nothing(
    context: Path, tmp_path: Path
) -> None:
    with node(tmp_path / "a", [1.0, 2.0]) as (_, box):
        # faasd mounts the folder of a secret; here it is a link to that of the socket (docs/deploy.md).
        link = tmp_path / "secret"
        link.symlink_to(box.socket.parent)
        with running(Confined(context, sockets=link, environment=environment())) as function:
            status, body = function.ask("/", "[[1, 1]]")
            assert (status, json.loads(body)) == (200, {"sum": [[2.0, 3.0]], "by": "unix:/run/trunkline/trunkline.sock"})
            assert within(function.pid, "curl", "-s", "--max-time", "5", f"http://127.0.0.1:{PORT}/healthz").returncode == 7
            assert json.loads(function.ask("/write")[1]) == []
            facts = Path(f"/proc/{function.pid}/status").read_text()
            assert f"Uid:\t{UID}\t{UID}" in facts
            assert "NoNewPrivs:\t1" in facts
            mine, its = (Path(f"/proc/{pid}/ns") for pid in (os.getpid(), function.pid))
            for kind in ("mnt", "pid", "net", "ipc"):
                assert os.readlink(mine / kind) != os.readlink(its / kind)
        assert os.listdir(context).count("written") == 0


def test_memory_of_the_arena_is_the_sidecars_not_the_functions(context: Path, tmp_path: Path) -> None:
    """A function that may have 96 MiB sends 160 MiB, and is not killed."""
    flags = ("--arena-limit", str(2 * INPUT_BYTES), "--arena-total", str(4 * INPUT_BYTES))
    rows = INPUT_BYTES // (4 * WIDTH)
    with node(tmp_path / "a", [0.0], *flags) as (_, box):
        box.admin.push(write_model(tmp_path, "total", Total(), torch.ones(2, WIDTH)))
        with MemoryLimit(LIMIT_BYTES) as limit:
            with running(Confined(context, sockets=box.socket.parent, environment=environment()), limit) as function:
                status, body = function.ask(f"/large?rows={rows}")
                assert (status, json.loads(body)) == (200, {"total": [float(WIDTH)] * rows})
                assert function.process.poll() is None
            assert limit.kills() == 0
            assert limit.used_bytes() <= LIMIT_BYTES < INPUT_BYTES


def test_the_memory_limit_kills_who_exceeds_it() -> None:
    """What the test above relies on."""
    require()
    with MemoryLimit(32 << 20) as limit:
        greedy = limit.joined_by(["sh", "-c", "exec head -c 100m /dev/zero | tail -c 100m > /dev/null"])
        subprocess.run(greedy, check=False, capture_output=True, timeout=PATIENCE_S)
        assert limit.kills() > 0


def test_two_nodes_with_the_same_address_and_each_function_reaches_its_own(context: Path, tmp_path: Path) -> None:
    """By network only, as with a Service that leads to this node's sidecar; and by socket, where both are there."""
    url = f"http://127.0.0.1:{PORT}"
    with node(tmp_path / "a", [1.0]) as (first, box), node(tmp_path / "b", [2.0]) as (second, _):
        for where, value in ((first, 1.0), (second, 2.0)):
            with running(Confined(context, network=where, environment=environment(TRUNKLINE_URL=url))) as function:
                status, body = function.ask("/", "[[0]]")
                assert (status, json.loads(body)) == (200, {"sum": [[value]], "by": url})
        given = environment(TRUNKLINE_URL=url)
        with running(Confined(context, sockets=box.socket.parent, network=first, environment=given)) as function:
            assert json.loads(function.ask("/", "[[0]]")[1]) == {"sum": [[1.0]], "by": "unix:/run/trunkline/trunkline.sock"}
        # A function in a network where no sidecar listens, and without a socket, is told so.
        with running(Confined(context, environment=environment(TRUNKLINE_URL=url, TRUNKLINE_DEADLINE_S="2"))) as function:
            status, body = function.ask("/", "[[0]]")
            assert status in (503, 504)
            assert json.loads(body)["error"]["code"] in ("sidecar_unavailable", "deadline_exceeded")


def test_a_confined_function_goes_on_while_its_sidecar_is_replaced(context: Path, tmp_path: Path) -> None:
    """Stopped and started in one folder: the mount of the folder stays good, which that of a socket would not."""
    with network() as name:
        (tmp_path / "a").mkdir()
        box = NodeSidecar(tmp_path / "a", name)
        write_adding_bundle(tmp_path / "adder", "adder", [3.0])
        box.admin.push(tmp_path / "adder")
        with running(Confined(context, sockets=box.socket.parent, environment=environment())) as function:
            answers = []
            for _ in range(3):
                answers.append(function.ask("/", "[[1]]"))
                assert box.stop() == 0
                box.start()
                answers.append(function.ask("/", "[[1]]"))
            assert [(status, json.loads(body)["sum"]) for status, body in answers] == [(200, [[4.0]])] * 6
        box.admin.close()
        assert box.stop() == 0
