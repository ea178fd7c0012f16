"""A list of models and a real sidecar: it serves while the origin is away, has the models when that is there, and only once."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest
from click.testing import CliRunner
from trunkline.errors import TrunklineError

from sidecar.cli.exits import FAILED
from sidecar.cli.main import main
from sidecar.probe import is_well
from sidecar.publishing import publish
from tests import origin_server as origin
from tests.bundles import write_adding_bundle
from tests.origin_server import OriginServer, origin_server
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import until


def listed(sidecar: SidecarProcess) -> dict[str, int]:
    """Return how many models of the list are in which state, as metrics tell it."""
    try:
        lines = sidecar.admin.metrics().splitlines()
    except TrunklineError:
        return {}
    found = [line for line in lines if line.startswith("trunkline_listed_models{")]
    return {line.split('"')[1]: int(float(line.rsplit(" ", 1)[1])) for line in found}


def published(server: OriginServer, folder: Path, name: str, value: float) -> str:
    write_adding_bundle(folder / name, name, [value] * 1000)
    reference = publish(str(folder / name), str(server.root), store_dir=folder / name, sign_key=None).reference
    return f"{server.url}/{reference}\n"


def models(sidecar: SidecarProcess) -> set[str]:
    return {row["name"] for row in sidecar.admin.get("models")["models"]}


def test_a_node_has_what_is_listed(tmp_path: Path, nothing_leaks: None) -> None:
    (tmp_path / "origin").mkdir()
    path = tmp_path / "models"
    with origin_server(tmp_path / "origin") as server:
        first, second = published(server, tmp_path, "first", 1.0), published(server, tmp_path, "second", 2.0)
        path.write_text(first)
        # As what stands before an origin says while that is away.
        server.misbehave["/"] = origin.status(503)
        with sidecar_process(tmp_path, "--pull-origin", server.url, "--pull-list", str(path)) as running:
            until(lambda: listed(running) == {"present": 0, "waiting": 0, "failed": 1})
            # It is ready for all that, and alive.
            assert is_well(running.run_dir / "admin.sock")
            assert is_well(running.run_dir / "admin.sock", "/healthz")
            assert models(running) == set()
            server.misbehave.clear()
            until(lambda: listed(running).get("present") == 1)
            assert models(running) == {"first"}
            assert running.admin.post("models/first/load")["state"] == "resident"
            path.write_text(first + second)
            until(lambda: listed(running).get("present") == 2)
            assert models(running) == {"first", "second"}
            # The process that does it is one of several, and any of them may die: the next one asks no origin for anything.
            server.asked.clear()
            (worker,) = holders(running.run_dir / "pull-list.lock")
            os.kill(worker, signal.SIGKILL)
            until(lambda: bool(others := holders(running.run_dir / "pull-list.lock")) and others != [worker])
            until(lambda: listed(running).get("present") == 2)
            assert running.stop() == 0
            # Nor does the next sidecar, whose endpoint has looked at the list when it has found an engine.
            running.start()
            until(lambda: bool(holders(running.run_dir / "pull-list.lock")))
            until(lambda: listed(running).get("present") == 2)
            assert models(running) == {"first", "second"}
            assert server.asked == []
            assert running.log.read_text().count("is pulled: 1 of 1 weights, 4000 bytes") == 2


def holders(lock: Path) -> list[int]:
    """Return the processes that hold a lock, as the kernel tells it."""
    inode = lock.stat().st_ino
    found = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    return [int(each[4]) for each in found if each[1] == "FLOCK" and each[5].endswith(f":{inode}")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense\n", "line 1: a model to pull is named"),
        (f"https://b.example/m@sha256:{64 * '0'}\n", "line 1: .*none of the 1 ori"),
    ],
)
def test_a_list_with_a_mistake_is_told_at_the_start(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "models").write_text(text)
    words = ["serve", "--run-dir", str(tmp_path / "run"), "--store-dir", str(tmp_path / "store"), "--admin-port", "0"]
    flags = ["--device", "cpu", "--pull-origin", "https://a.example", "--pull-list", str(tmp_path / "models")]
    result = CliRunner().invoke(main, [*words, *flags])
    assert result.exit_code == FAILED
    assert re.search(said, result.stderr)
