"""The command line and a real sidecar: what commands print as JSON, exit codes, completion in a shell, `top` on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from trunkline.client import Model
from trunkline.endpoint import Endpoint
from trunkline.errors import Draining
from trunkline.pool import Pool

from sidecar.cli.main import main
from tests.bundles import write_adding_bundle
from tests.integration.test_admin_http import free_port
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, soon

ROOT = Path(__file__).parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
# Sizes that stay where they are, and can be compared.
WIDTH = 1000
X = np.ones((1, WIDTH), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def sidecar(folder: Path) -> Iterator[SidecarProcess]:
    (folder / "origin").mkdir()
    with sidecar_process(folder, "--memory-budget", "64MB", "--pull-origin", f"file://{folder}/origin") as running:
        yield running


def run(sidecar: SidecarProcess, *words: str) -> Result:
    return CliRunner().invoke(main, ["--admin", sidecar.admin.address, *words])


def told(sidecar: SidecarProcess, *words: str) -> Any:
    """Return what a command that succeeds prints as JSON, and nothing else."""
    result = run(sidecar, *words, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


@contextlib.contextmanager
def functions(sidecar: SidecarProcess) -> Iterator[Pool]:
    """Connections of functions, while the block runs."""
    pool = Pool(endpoint=Endpoint(str(sidecar.socket)), credential=lambda: b"")
    try:
        yield pool
    finally:
        pool.close()


def test_every_command_tells_in_json_what_it_did(sidecar: SidecarProcess, folder: Path) -> None:
    for name, values in (("one", [1.0] * WIDTH), ("two", [1.0] * WIDTH)):
        write_adding_bundle(folder / name, name, values)
    pushed = told(sidecar, "push", str(folder / "one"), str(folder / "two"))
    assert [(entry["name"], entry["sent_count"]) for entry in pushed] == [("one", 1), ("two", 0)]
    assert [entry["name"] for entry in told(sidecar, "model", "ls")] == ["one", "two"]
    shown = told(sidecar, "model", "show", "one")
    assert (shown["state"], shown["memory_bytes"] >= 4 * WIDTH, shown["resident_bytes"]) == ("stored", True, 0)
    assert told(sidecar, "model", "load", "one")["state"] == "resident"
    shown = told(sidecar, "model", "show", "one")
    assert shown["resident_bytes"] == shown["memory_bytes"]
    assert told(sidecar, "pin", "two")["pinned"] is True
    assert told(sidecar, "unpin", "two")["pinned"] is False
    assert told(sidecar, "model", "pin", "one")["pinned"] is True
    refused = run(sidecar, "evict", "one", "--json")
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert refused.stderr == "error: invalid_input: one is pinned; unpin it first\n"
    assert told(sidecar, "model", "unpin", "one")["pinned"] is False
    assert told(sidecar, "model", "keep", "one", "--priority", "7")["priority"] == 7
    assert told(sidecar, "status")["memory"]["saved_bytes"] > 0
    assert told(sidecar, "graph")["models"] == ["one", "two"]
    assert "leases" in told(sidecar, "trace")
    (top,) = [told(sidecar, "top")]
    assert (top["state"], [model["name"] for model in top["models"]]) == ("serving", ["one", "two"])
    assert [(model["state"], model["bytes"]) for model in top["models"]] == [("resident", 4 * WIDTH)] * 2
    assert top["saved_bytes"] > 0
    assert told(sidecar, "evict", "one")["freed_bytes"] >= 0
    assert told(sidecar, "model", "evict", "two")["state"] == "stored"
    assert told(sidecar, "model", "unload", "one")["state"] == "stored"
    assert [entry["name"] for entry in told(sidecar, "tenant", "ls")] == ["anyone"]
    assert told(sidecar, "store", "verify")["blob_count"] == 1
    assert told(sidecar, "store", "gc", "--dry-run")["dry_run"] is True
    assert told(sidecar, "model", "rm", "two")["name"] == "two"


def test_what_operators_do_to_a_sidecar_is_told_in_json(sidecar: SidecarProcess, folder: Path) -> None:
    write_adding_bundle(folder / "held", "held", [4.0] * WIDTH)
    told(sidecar, "push", str(folder / "held"))
    told(sidecar, "pin", "held")
    (device,) = told(sidecar, "leases")["devices"].values()
    assert [entry["model"] for entry in device["pinned"]] == ["held"]
    (device,) = told(sidecar, "residency", "--limit", "1")["devices"].values()
    tiers = {tier["tier"]: tier for tier in device["tiers"]}
    assert device["pinned_bytes"] >= 4 * WIDTH
    # More than there is: all that may leave does, and what is pinned stays.
    (freed,) = told(sidecar, "evict", "--bytes", "1TB")["devices"].values()
    assert freed["budget_bytes"] == tiers["device"]["budget_bytes"]
    (device,) = told(sidecar, "residency")["devices"].values()
    assert (device["leaving_bytes"], device["leaving"]) == (0, [])
    assert device["pinned_bytes"] == freed["budget_bytes"] - freed["free_bytes"] >= 4 * WIDTH
    told(sidecar, "unpin", "held")
    assert told(sidecar, "log-level") == {"engine": "info", "http": "info"}
    assert told(sidecar, "log-level", "debug") == {"engine": "debug", "http": "debug"}
    assert told(sidecar, "log-level", "info") == told(sidecar, "log-level")
    with functions(sidecar) as function:
        assert np.array_equal(Model("held", function).call({"x": X}), X + 4)
        (entry,) = [entry for entry in told(sidecar, "sessions")["sessions"] if not entry["administrator"]]
        assert (entry["tenant"], entry["pid"]) == ("anyone", os.getpid())
        drained = told(sidecar, "drain", "--timeout", "60")
        assert drained == {"draining": True, "drained": True, "waiting": 0, "running": 0}
        assert told(sidecar, "top")["state"] == "draining"
        with functions(sidecar) as another, pytest.raises(Draining):
            Model("held", another).call({"x": X})
        assert told(sidecar, "resume")["draining"] is False
        assert np.array_equal(Model("held", function).call({"x": X}), X + 4)


def test_models_go_to_an_origin_and_back_by_jobs(sidecar: SidecarProcess, folder: Path) -> None:
    origin = folder / "origin"
    write_adding_bundle(folder / "far", "far", [5.0] * WIDTH)
    published = told(sidecar, "model", "publish", str(folder / "far"), str(origin))
    assert (published["sent_count"], published["blob_bytes"]) == (1, 4 * WIDTH)
    source = f"file://{origin}/{published['reference']}"
    pulled = told(sidecar, "model", "pull", source, "--name", "near")
    assert (pulled["name"], pulled["fetched_count"], pulled["model"]["name"]) == ("near", 1, "near")
    # What the store has is published by its name, and is there.
    again = told(sidecar, "model", "publish", "near", str(origin), "--store-dir", str(sidecar.store_dir))
    assert (again["sent_count"], again["blob_count"]) == (0, 1)
    latest, *_ = told(sidecar, "job", "ls")
    assert (latest["kind"], latest["state"], latest["subject"]) == ("pull", "done", source)
    assert told(sidecar, "job", "show", latest["id"]) == latest
    # What has ended stays as it is.
    assert told(sidecar, "job", "cancel", latest["id"]) == latest
    # As a table, or where the source is too long for one as lines.
    assert {latest["id"], "pull", "done"} <= {*run(sidecar, "job", "ls").stdout.split()}
    refused = run(sidecar, "job", "cancel", "0" * 16)
    assert (refused.exit_code, refused.stderr.startswith("error: unknown_job: ")) == (1, True)
    refused = run(sidecar, "model", "pull", source.replace("/origin/", "/other/"))
    assert (refused.exit_code, refused.stderr.startswith("error: origin_refused: ")) == (1, True)


def test_versions_are_pushed_released_and_removed(sidecar: SidecarProcess, folder: Path) -> None:
    for label, value in (("1", 6.0), ("2", 7.0)):
        write_adding_bundle(folder / f"lived-{label}", "lived", [value] * WIDTH)
    (pushed,) = told(sidecar, "push", str(folder / "lived-1"), "--version", "1", "--default")
    assert pushed["release"] == {"default": "1"}
    (pushed,) = told(sidecar, "push", str(folder / "lived-2"), "--version", "2")
    assert pushed["release"] == {"default": "1"}
    with functions(sidecar) as function:
        assert np.array_equal(Model("lived", function).call({"x": X}), X + 6)
        assert np.array_equal(Model("lived:2", function).call({"x": X}), X + 7)
        assert told(sidecar, "model", "release", "lived", "2")["release"] == {"default": "2"}
        assert np.array_equal(Model("lived", function).call({"x": X}), X + 7)
    split = {"split": {"1": 90, "2": 10}, "sticky": True}
    assert told(sidecar, "model", "release", "lived", "1=90", "2=10", "--sticky")["release"] == split
    found = told(sidecar, "model", "versions", "lived")
    assert (found["release"], {entry["version"]: entry["weight"] for entry in found["versions"]}) == (split, {"1": 90, "2": 10})
    refused = run(sidecar, "model", "rm-version", "lived", "1")
    assert (refused.exit_code, refused.stdout) == (1, "")
    told(sidecar, "model", "release", "lived", "2", "--no-load")
    assert told(sidecar, "model", "rm-version", "lived", "1")["name"] == "lived"
    assert [entry["version"] for entry in told(sidecar, "model", "versions", "lived")["versions"]] == ["2"]
    assert told(sidecar, "model", "rm", "lived")["name"] == "lived"


def test_a_token_that_is_added_counts_and_one_that_is_removed_does_not(tmp_path: Path) -> None:
    file, token = tmp_path / "tokens.toml", tmp_path / "token"
    words = ["token", "add", "ann", "--role", "read", "--file", str(file), "--token-file", str(token), "--json"]
    assert CliRunner().invoke(main, words).exit_code == 0
    port = free_port()
    with sidecar_process(tmp_path, "--admin-tokens", str(file), "--admin-port", str(port)):
        asked = ["--admin", f"http://127.0.0.1:{port}", "--token-file", str(token)]
        assert CliRunner().invoke(main, [*asked, "status"]).exit_code == 0
        refused = CliRunner().invoke(main, [*asked, "drain"])
        assert (refused.exit_code, refused.stderr.startswith("error: forbidden: ")) == (1, True)
        assert CliRunner().invoke(main, ["token", "rm", "ann", "--file", str(file)]).exit_code == 0
        refused = CliRunner().invoke(main, [*asked, "status"])
        assert (refused.exit_code, refused.stderr.startswith("error: unauthorized: ")) == (1, True)


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["model", "show", "none"], 1, "error: unknown_model: "),
        (["model", "load", "none"], 1, "error: unknown_model: "),
        (["placement"], 1, "error: invalid_input: "),
        (["push", "."], 1, "error: bundle_error: "),
        (["frobnicate"], 2, "No such command"),
        (["--admin", "unix:/nowhere/admin.sock", "status"], 3, "error: sidecar_unavailable: "),
        (["--admin", "unix:/nowhere/admin.sock", "top"], 3, "error: sidecar_unavailable: "),
    ],
)
def test_exit_codes_tell_how_it_ended(sidecar: SidecarProcess, words: list[str], code: int, problem: str) -> None:
    result = run(sidecar, *words)
    assert (result.exit_code, result.stdout) == (code, "")
    assert problem in result.stderr
    assert "Traceback" not in result.stderr


def test_a_reader_that_leaves_is_no_traceback(sidecar: SidecarProcess) -> None:
    for words in (["status"], ["status", "--json"], ["top"], ["model", "ls"]):
        command = [sys.executable, "-m", "sidecar", "--admin", sidecar.admin.address, *words]
        reader, writer = os.pipe()
        os.close(reader)
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True, timeout=PATIENCE_S)
        os.close(writer)
        assert (ended.returncode, "Traceback" in ended.stderr, "Exception" in ended.stderr) == (1, False, False), ended.stderr


def test_bash_completes_the_names_of_models(sidecar: SidecarProcess, folder: Path, tmp_path: Path) -> None:
    write_adding_bundle(folder / "three", "three", [3.0])
    run(sidecar, "push", str(folder / "three"))
    bash = shutil.which("bash")
    assert bash
    program = tmp_path / "trunkline"
    program.write_text(
        f'#!{bash}\nexec {sys.executable} -c "from sidecar.cli.main import main; main(prog_name=\'trunkline\')" "$@"\n'
    )
    program.chmod(0o755)
    asking = (
        'eval "$(trunkline completion bash)"\n'
        "COMP_WORDS=(trunkline model show thr) COMP_CWORD=3\n"
        "_trunkline_completion trunkline\n"
        'echo "${COMPREPLY[@]}"\n'
    )
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TRUNKLINE_ADMIN": sidecar.admin.address}
    found = subprocess.run([bash, "-c", asking], env=environment, capture_output=True, text=True, check=True, timeout=PATIENCE_S)
    assert (found.stdout, found.stderr) == ("three\n", "")


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.screen = ""
        self._pid, self.descriptor = pty.fork()
        if not self._pid:
            os.execve(sys.executable, [sys.executable, "-m", "sidecar", *words], ENVIRONMENT | {"TERM": "xterm"} | environment)

    def read_until(self, is_there: Callable[[str], object]) -> None:
        deadline = soon()
        while not is_there(self.screen):
            assert time.monotonic() < deadline, self.screen
            if select.select([self.descriptor], [], [], 1.0)[0]:
                self.screen += os.read(self.descriptor, 65536).decode(errors="replace")

    def end(self) -> int:
        """Return the exit code, when it has ended."""
        while True:
            try:
                more = os.read(self.descriptor, 65536)
            except OSError:
                # The other side is closed.
                more = b""
            if not more:
                break
            self.screen += more.decode(errors="replace")
        _, status = os.waitpid(self._pid, 0)
        self.left = termios.tcgetattr(self.descriptor)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(status)


def test_top_is_drawn_until_q_and_waits_for_the_sidecar(tmp_path: Path) -> None:
    with sidecar_process(tmp_path, "--memory-budget", "64MB") as running:
        terminal = Terminal("--admin", running.admin.address, "top", "--interval", "0.1")
        before = termios.tcgetattr(terminal.descriptor)
        terminal.read_until(lambda screen: "serving on cpu, engine 1" in screen)
        assert running.stop() == 0
        terminal.read_until(lambda screen: "away: no sidecar answers" in screen)
        terminal.screen = ""
        running.start()
        terminal.read_until(lambda screen: "serving on cpu, engine 1" in screen)
        os.write(terminal.descriptor, b"q")
        assert terminal.end() == 0
        assert terminal.left == before


def test_colours_can_be_declined(sidecar: SidecarProcess) -> None:
    terminal = Terminal("--admin", sidecar.admin.address, "model", "ls", NO_COLOR="1")
    assert terminal.end() == 0
    assert "one" in terminal.screen
    # Bold is no colour.
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", terminal.screen)
