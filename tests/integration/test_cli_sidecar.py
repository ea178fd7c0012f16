"""The command line and a real sidecar: what commands print as JSON, exit codes, completion in a shell, `top` on a terminal."""

from __future__ import annotations

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

import pytest
from click.testing import CliRunner, Result

from sidecar.cli.main import main
from tests.bundles import write_adding_bundle
from tests.sidecar_process import SidecarProcess, sidecar_process

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
ENVIRONMENT = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
# Sizes that stay where they are, and can be compared.
WIDTH = 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def sidecar(folder: Path) -> Iterator[SidecarProcess]:
    with sidecar_process(folder, "--memory-budget", "64MB") as running:
        yield running


def run(sidecar: SidecarProcess, *words: str) -> Result:
    return CliRunner().invoke(main, ["--admin", sidecar.admin.address, *words])


def told(sidecar: SidecarProcess, *words: str) -> Any:
    """Return what a command that succeeds prints as JSON, and nothing else."""
    result = run(sidecar, *words, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    return json.loads(result.stdout)


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
        ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=ENVIRONMENT, text=True, timeout=60)
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
    found = subprocess.run([bash, "-c", asking], env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert (found.stdout, found.stderr) == ("three\n", "")


class Terminal:
    """A command on a terminal of its own."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.screen = ""
        self._pid, self.descriptor = pty.fork()
        if not self._pid:
            os.execve(sys.executable, [sys.executable, "-m", "sidecar", *words], ENVIRONMENT | {"TERM": "xterm"} | environment)

    def read_until(self, is_there: Callable[[str], object]) -> None:
        deadline = time.monotonic() + PATIENCE_S
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
