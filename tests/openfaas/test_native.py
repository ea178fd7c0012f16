"""The repository as faas-cli, its watchdog and a gateway meet it: pulled, laid out, confined, asked, redeployed, scaled down."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from tests.fakes import FakeSource, bundle_of, running_server
from tests.integration.test_admin_http import free_port
from tests.namespaces.confinement import Confined, inside, require, within
from tests.openfaas import faascli
from tests.waiting import PATIENCE_S, until

ROOT = Path(__file__).parents[2]
LANGUAGE = "python3-trunkline"
FUNCTIONS = ("fresh", "classify", "embed", "similar", "route")
STACKS = ("stack.yml", "stack.faasd.yml")
GIT = ("git", "-c", "user.name=t", "-c", "user.email=t@localhost", "-c", "init.defaultBranch=main")


# --- files that faas-cli reads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_file_holds_nothing_that_faas_cli_does_not_read(name: str) -> None:
    stack = faascli.check_stack(ROOT / name)
    assert stack["provider"]["name"] == "openfaas"
    assert stack["configuration"]["templates"] == [{"name": LANGUAGE, "source": "."}]
    for function in stack["functions"].values():
        assert function["lang"] == LANGUAGE
        assert function["labels"]["trunkline"] == "enabled"
        assert (ROOT / function["handler"] / "handler.py").is_file()


def test_the_stack_files_differ_in_how_the_sidecar_is_reached_and_nowhere_else() -> None:
    kubernetes, faasd = (faascli.check_stack(ROOT / name) for name in STACKS)
    for name, function in kubernetes["functions"].items():
        # A secret that is not there would fail the deployment on Kubernetes.
        assert "secrets" not in function
        assert function["environment"].pop("TRUNKLINE_URL") == "${TRUNKLINE_URL:-http://trunkline.trunkline:9470}"
        assert function.pop("readonly_root_filesystem") is True
        assert faasd["functions"][name].pop("secrets") == ["trunkline"]
    assert kubernetes == faasd


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("    labels:", "    volumes: [a]\n    labels:", "functions.classify.volumes: faas-cli knows no such key"),
        ('max_inflight: "8"', "max_inflight: 8", "functions.classify.environment must be a map of text"),
        ("      memory: 384Mi", "      gpu: 1", "functions.classify.limits.gpu"),
        ("version: 1.0", "version: [1]", "version is"),
    ],
)
def test_the_check_finds_what_faas_cli_would_drop(tmp_path: Path, old: str, new: str, told: str) -> None:
    (tmp_path / "stack.yml").write_text((ROOT / "stack.yml").read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=re.escape(told)):
        faascli.check_stack(tmp_path / "stack.yml")


def test_the_template_and_the_store_of_templates_have_the_fields_that_are_read() -> None:
    faascli.check(yaml.safe_load((ROOT / "template" / LANGUAGE / "template.yml").read_text()), faascli.TEMPLATE, "template.yml")
    (entry,) = json.loads((ROOT / "templates.json").read_text())
    faascli.check(entry, faascli.STORE_ENTRY, "templates.json")
    assert entry.keys() == faascli.STORE_ENTRY.keys()
    assert entry["template"] == LANGUAGE
    assert entry["repo"].endswith(".git")


def test_the_lines_that_faas_cli_adds_to_gitignore_do_not_hide_the_template() -> None:
    """`faas-cli new` and `local-run` append them where they are missing, and the last line that matches counts."""
    lines = (ROOT / ".gitignore").read_text().splitlines()
    assert lines[:4] == ["template", "build", ".secrets", "!template/"]


def test_every_stage_that_matters_is_reached_by_one_that_is_built() -> None:
    """BuildKit builds what the last stage depends on, and nothing else."""
    text = (ROOT / "template" / LANGUAGE / "Dockerfile").read_text()
    stages = {match[2]: match for match in re.finditer(r"^FROM (?:--\S+ )?(\S+) AS (\w+)$", text, re.MULTILINE)}
    reached, left = set(), ["ship"]
    for name in left:
        reached.add(name)
        after = text[stages[name].end() :]
        body = after[: after.find("\nFROM ")] if "\nFROM " in after else after
        left += [found for found in (stages[name][1], *re.findall(r"--from=(\w+)", body)) if found in stages.keys() - reached]
    assert reached == stages.keys()


# --- functions as they are built and run ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder into which the template of this repository, as it is now, was pulled."""
    source, folder = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("project")
    shutil.copytree(ROOT / "template", source / "template", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / ".gitignore", source)
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "-m", "as it is"]):
        subprocess.run([*GIT, *command], cwd=source, check=True)
    assert faascli.pull(source, folder) == [LANGUAGE]
    return folder


def built(project: Path, name: str) -> Path:
    """Return a function's build context, made readable as the Dockerfile makes it."""
    handler = faascli.new(project, LANGUAGE, name) if name == "fresh" and not (project / name).exists() else project / name
    context = faascli.build(project, LANGUAGE, name, ROOT / "functions" / name if name != "fresh" else handler)
    assert context.stat().st_mode & 0o777 == 0o700
    assert "chmod -R a+rX index.py gunicorn.conf.py trunkline function" in (context / "Dockerfile").read_text()
    subprocess.run(["chmod", "-R", "a+rX", str(context)], check=True)
    return context


def written(project: Path, name: str, handler: str) -> Path:
    """Return the context of a function with this handler."""
    folder = project / f"{name}-handler"
    folder.mkdir()
    (folder / "handler.py").write_text(handler)
    context = faascli.build(project, LANGUAGE, name, folder)
    subprocess.run(["chmod", "-R", "a+rX", str(context)], check=True)
    return context


def image_environment(context: Path) -> dict[str, str]:
    """Return the variables that the image sets for the watchdog."""
    given = re.findall(r'^ENV (.*=".*)$', (context / "Dockerfile").read_text(), re.MULTILINE)
    return dict(pair for line in given for pair in re.findall(r'(\w+)="([^"]*)"', line))


class Deployed:
    """A function behind a watchdog, with the image's variables."""

    def __init__(self, context: Path, stderr: int | None = None, **environment: str) -> None:
        self.port, upstream = free_port(), free_port()
        given = (
            image_environment(context)
            | {"healthcheck_interval": "1s", "TRUNKLINE_SOCKET": "/nowhere/trunkline.sock"}
            | {"TMPDIR": tempfile.mkdtemp(dir=context)}
            | environment
        )
        given |= {
            "port": str(self.port),
            "bind_address": "127.0.0.1",
            "upstream_url": f"http://127.0.0.1:{upstream}",
            "fprocess": given["fprocess"].replace("python", sys.executable, 1),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
        }
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "tests.openfaas.watchdog"]
        self.process = subprocess.Popen(command, cwd=context, env=given, stderr=stderr)

    def status(self, path: str, body: bytes | None = None) -> int:
        try:
            return requests.post(self.url + path, data=body, timeout=PATIENCE_S).status_code
        except requests.ConnectionError:
            return 0

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(PATIENCE_S)


@contextlib.contextmanager
def deployed(context: Path, **environment: str) -> Iterator[Deployed]:
    running = Deployed(context, **environment)
    try:
        until(lambda: running.status("/_/health") == 200)
        yield running
    finally:
        if running.process.poll() is None:
            assert running.stop() == 0


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_tests_that_run_while_the_image_is_built_pass_in_its_context(project: Path, name: str) -> None:
    context = built(project, name)
    tox = (context / "function" / "tox.ini").read_text()
    assert "commands = pytest --rootdir=.. -p no:cacheprovider handler_test.py" in tox
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(context), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--rootdir=..",
        "-p",
        "no:cacheprovider",
        "-c",
        os.devnull,
        "handler_test.py",
    ]
    done = subprocess.run(command, cwd=context / "function", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "passed" in done.stdout


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_runs_as_uid_12000_on_a_read_only_root_without_capabilities_or_network(project: Path, name: str) -> None:
    """The watchdog is not in there: the function says itself whether it is ready, 503 without a sidecar."""
    require()
    context = built(project, name)
    image = image_environment(context)
    confined = Confined(context, environment={"upstream_url": "http://127.0.0.1:5000", "healthcheck_interval": "0s"})
    process = subprocess.Popen(confined.command(*image["fprocess"].split(" ")[1:]), stderr=subprocess.PIPE)
    ready = f"http://127.0.0.1:5000{image['ready_path']}"
    try:
        until(lambda: process.poll() is not None or (within(process.pid, "true").returncode == 0 and inside(process.pid) != 0))
        first = inside(process.pid)
        until(lambda: process.poll() is not None or within(first, "curl", "-s", ready).stdout != b"")
        assert process.poll() is None, process.communicate()[1].decode()
        answer = within(first, "curl", "-s", "-w", "%{http_code}", ready).stdout.decode()
        assert answer.endswith("503")
        assert json.loads(answer[:-3])["error"]["code"] == "sidecar_unavailable"
        facts = Path(f"/proc/{first}/status").read_text()
        assert re.search(r"^Uid:\t12000\t12000\t12000\t12000$", facts, re.MULTILINE)
        assert re.search(r"^NoNewPrivs:\t1$", facts, re.MULTILINE)
    finally:
        if process.poll() is None:
            os.kill(inside(process.pid), signal.SIGTERM)
        _, log = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, log.decode()
    assert b"Read-only" not in log


def test_a_fresh_function_answers_through_the_watchdog(project: Path, tmp_path: Path) -> None:
    source = FakeSource()
    source.put(bundle_of("classify", [b"weights"]), [b"weights"])
    with running_server(tmp_path, source) as sidecar, deployed(built(project, "fresh"), TRUNKLINE_SOCKET=sidecar.path) as running:
        until(lambda: running.status("/_/ready") == 200)
        answer = requests.post(running.url, data=b"x" * 99_999, timeout=PATIENCE_S)
        assert answer.json()["model"] == "classify"


ECHO = """
def handle(event, context):
    return {"body": event.body, "headers": {"X-Seen": event.headers.get("Transfer-Encoding")}}
"""
# The folder of the context is the one that both sides see.
SLOW_START = "import os, time\nwhile not os.path.exists('go'):\n    time.sleep(0.01)\n" + ECHO
HELD = """
import os, time

def handle(event, context):
    if event.path == "/held":
        open("entered", "a").close()
        while not os.path.exists("leave"):
            time.sleep(0.01)
    return "answered"
"""


def test_bodies_come_in_chunks_and_whole(project: Path) -> None:
    body = os.urandom(123_456)
    with deployed(written(project, "echo", ECHO)) as running:
        until(lambda: running.status("/") == 200)
        answer = requests.post(running.url, data=body, timeout=PATIENCE_S)
        assert answer.content == body
        assert answer.headers["X-Seen"] == "chunked"


def test_a_function_is_healthy_when_it_listens_and_not_before(project: Path) -> None:
    context = written(project, "slow-start", SLOW_START)
    running = Deployed(context)
    try:
        until(lambda: running.status("/") == 500)
        assert running.status("/_/health") == running.status("/_/ready") == 503
        (context / "go").touch()
        until(lambda: running.status("/_/health") == 200)
        assert running.status("/") == 200
        # Ready is more than listening: there is no sidecar.
        assert running.status("/_/ready") == 503
    finally:
        assert running.stop() == 0


def test_a_lock_of_before_a_restart_makes_nobody_healthy(project: Path) -> None:
    context = written(project, "restarted", SLOW_START)
    lock = project / ".lock"
    lock.touch()
    running = Deployed(context, TMPDIR=str(project))
    try:
        until(lambda: not lock.exists())
        assert running.status("/_/health") in (0, 503)
        (context / "go").touch()
        until(lambda: running.status("/_/health") == 200)
    finally:
        assert running.stop() == 0


def test_a_function_without_a_place_for_the_lock_says_what_it_needs(project: Path) -> None:
    running = Deployed(written(project, "no-place", ECHO), TMPDIR="/proc/nowhere", stderr=subprocess.PIPE)
    _, told = running.process.communicate(timeout=PATIENCE_S)
    assert running.process.returncode == 1
    assert b"cannot write /proc/nowhere/.lock: No such file or directory; mount a writable /proc/nowhere there" in told


def test_a_function_goes_on_after_calls_that_took_too_long_or_were_too_many(project: Path) -> None:
    context = written(project, "held", HELD)
    with deployed(context, exec_timeout="500ms", max_inflight="1") as running:
        until(lambda: running.status("/") == 200)
        statuses: list[int] = []
        asking = threading.Thread(target=lambda: statuses.append(running.status("/held")))
        asking.start()
        until((context / "entered").exists)
        assert running.status("/") in (429, 200)
        asking.join(PATIENCE_S)
        assert statuses == [504]
        (context / "leave").touch()
        until(lambda: running.status("/") == 200)


class Gateway:
    """Asks replicas in turn, as a gateway does, and goes on asking one that is gone until it has noticed."""

    def __init__(self, replicas: list[Deployed], threads: int = 4) -> None:
        self.replicas = replicas
        self.answers: dict[int, int] = {}
        self.lost: list[Any] = []
        self._stopping = threading.Event()
        self._turns = itertools.count()
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self) -> None:
        while not self._stopping.is_set():
            replica = self.replicas[next(self._turns) % len(self.replicas)]
            try:
                answer = requests.post(replica.url, data=b"x" * 5000, timeout=PATIENCE_S)
            except requests.RequestException as error:
                self.lost.append(error)
                continue
            if answer.status_code == 200 and answer.content == b"x" * 5000:
                self.answers[replica.port] = self.answers.get(replica.port, 0) + 1
            else:
                self.lost.append((answer.status_code, answer.content[:80]))

    def await_answers(self, of: Deployed, more: int = 20) -> None:
        wanted = self.answers.get(of.port, 0) + more
        until(lambda: self.lost or self.answers.get(of.port, 0) >= wanted)

    def __enter__(self) -> Gateway:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)


@pytest.mark.parametrize("what", ["redeploy", "scale-down"])
def test_no_request_is_lost_when_a_function_is(project: Path, what: str) -> None:
    """The gateway sends to whoever is healthy, and after SIGTERM on to the one that goes, for as long as the watchdog admits."""
    context = written(project, what, ECHO)
    with contextlib.ExitStack() as stack:
        old = stack.enter_context(deployed(context, healthcheck_interval="5s"))
        others = [stack.enter_context(deployed(context))] if what == "scale-down" else []
        with Gateway([old, *others]) as gateway:
            gateway.await_answers(old)
            if what == "redeploy":
                others = [stack.enter_context(deployed(context))]
                gateway.replicas = [old, *others]
            signalled = time.monotonic()
            old.process.send_signal(signal.SIGTERM)
            # Requests after the signal, before anybody has noticed; then it is left out.
            gateway.await_answers(old)
            gateway.replicas = others
            noticed_s = time.monotonic() - signalled
            gateway.await_answers(others[0])
            assert old.process.wait(PATIENCE_S) == 0
            gateway.await_answers(others[0])
        assert not gateway.lost, f"{gateway.lost[:3]} (noticed after {noticed_s:.1f} s)"
