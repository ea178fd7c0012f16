"""`trunkline up`: a stack of small functions, run as processes of their own, asked through the gateway."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from sidecar.admin_client import AdminClient
from sidecar.errors import ConfigError
from sidecar.local import LocalStack
from sidecar.local import environment as environment_module
from sidecar.local.environment import ensure_environment
from sidecar.local.gateway import create_app
from sidecar.local.processes import Kept, descendants
from sidecar.local.stack import find_template, lay_out, read_stack
from tests.bundles import write_adding_bundle

ROOT = Path(__file__).parents[2]
STACK = """
version: 1.0
provider: {name: openfaas}
functions:
  add:
    lang: python3-trunkline
    handler: ./add
    image: add
    environment: {GREETING: "${WHO:-nobody}"}
  echo:
    lang: python3-trunkline
    handler: ./echo
    image: echo
"""
ADD = """
import json, os
from trunkline import model
m = model("adder")
def handle(event, context):
    return {"body": {"sum": m(json.loads(event.body)).tolist(), "greeting": os.environ["GREETING"]}}
"""
ECHO = """
import sys
def handle(event, context):
    return {"body": event.body, "headers": {"X-Torch": "torch" in sys.modules, "X-Seen": event.headers.get("Transfer-Encoding"),
            "X-Path": event.path, "X-Query": event.query.get("q", ""), "X-Forwarded": event.headers.get("X-Forwarded-Host", "")}}
"""


def make_stack(folder: Path) -> Path:
    for name, code in (("add", ADD), ("echo", ECHO)):
        (folder / name).mkdir(parents=True)
        (folder / name / "handler.py").write_text(code)
    (folder / "template").symlink_to(ROOT / "template")
    path = folder / "stack.yml"
    path.write_text(STACK)
    # Functions with the template's requirements alone: the environment of the sample functions is of no use here.
    (folder / ".trunkline").mkdir()
    (ROOT / ".trunkline" / "envs").mkdir(parents=True, exist_ok=True)
    (folder / ".trunkline" / "envs").symlink_to(ROOT / ".trunkline" / "envs")
    return path


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return []


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("stack")
    path = make_stack(folder)
    with LocalStack(path, write=lines.append) as running:
        yield running
    assert not running.pids()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_function_is_ready_when_its_model_is_there(stack: LocalStack, tmp_path: Path) -> None:
    ready = f"http://127.0.0.1:{stack.ports['add']}/_/trunkline/ready"
    assert requests.get(ready, timeout=10).json()["error"]["code"] == "unknown_model"
    assert requests.post(f"{stack.url}/function/add", json=[[1.0]], timeout=10).status_code == 404
    write_adding_bundle(tmp_path / "adder", "adder", [1.0, 2.0])
    AdminClient(stack.admin).push(tmp_path / "adder")
    stack.wait_ready()
    answer = requests.post(f"{stack.url}/function/add", json=[[1.0, 1.0]], timeout=10)
    assert answer.json() == {"sum": [[2.0, 3.0]], "greeting": "nobody"}


def test_the_gateway_behaves_like_openfaas(stack: LocalStack) -> None:
    answer = requests.post(f"{stack.url}/function/echo/a/b?q=1", data=b"x" * 99_999, timeout=10)
    assert answer.content == b"x" * 99_999
    assert answer.headers["X-Seen"] == "chunked"
    assert (answer.headers["X-Path"], answer.headers["X-Query"]) == ("/a/b", "1")
    assert answer.headers["X-Forwarded"]
    assert answer.headers["X-Call-Id"]
    assert answer.headers["X-Torch"] == "False"
    kept = requests.post(f"{stack.url}/function/echo.openfaas-fn/", headers={"X-Call-Id": "mine"}, timeout=10)
    assert kept.headers["X-Call-Id"] == "mine"
    assert requests.get(f"{stack.url}/function/nobody", timeout=10).status_code == 404
    assert [entry["name"] for entry in requests.get(f"{stack.url}/system/functions", timeout=10).json()] == ["add", "echo"]


def test_a_body_past_the_limit_comes_back_as_413_through_the_gateway(stack: LocalStack) -> None:
    answer = requests.post(f"{stack.url}/function/echo", data=b"x" * (17 << 20), timeout=30)
    assert answer.status_code == 413


def test_a_killed_function_is_started_again(stack: LocalStack, lines: list[str]) -> None:
    pids = stack.pids()["echo"]
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: stack.pids().get("echo", pids)[0] != pids[0])

    def answers() -> bool:
        return requests.get(f"{stack.url}/function/echo", timeout=10).status_code == 200

    eventually(answers)
    assert any(line.startswith("[echo] ended with -9") for line in lines)


def test_a_second_stack_in_one_place_is_refused(stack: LocalStack) -> None:
    path = Path(stack._kept[0]._folder) / "stack.yml"
    with pytest.raises(ConfigError, match="running already"):
        LocalStack(path, write=lambda line: None)


def test_an_unreachable_function_is_502() -> None:
    http = create_app({"gone": "http://127.0.0.1:1"}).test_client()
    assert http.get("/function/gone").status_code == 502
    assert http.get("/healthz").data == b"OK"


def test_a_slow_function_is_504(monkeypatch: pytest.MonkeyPatch) -> None:
    def time_out(*arguments: object, **named: object) -> None:
        raise requests.ReadTimeout

    monkeypatch.setattr(requests.Session, "request", time_out)
    assert create_app({"slow": "http://127.0.0.1:1"}).test_client().get("/function/slow").status_code == 504


def test_up_stops_everything_on_sigint(tmp_path: Path) -> None:
    path = make_stack(tmp_path)
    command = [sys.executable, "-m", "sidecar", "up", str(path), "--gateway-port", "0"]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    for line in process.stderr:
        if "Ctrl-C stops everything" in line:
            break
    started = descendants(process.pid)
    assert len(started) >= 8
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in started))


def test_nothing_outlives_a_killed_keeper(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom sidecar.local.processes import Kept\n"
        "k = Kept('x', ['sleep', '600'], environment={'PATH': '/bin:/usr/bin'}, folder=Path('/'), write=print)\n"
        "print(k.pid, flush=True)\ntime.sleep(600)"
    )
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
    keeper = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert keeper.stdout is not None
    child = int(keeper.stdout.readline())
    keeper.kill()
    keeper.wait()
    eventually(lambda: not Path(f"/proc/{child}/exe").exists())
    keeper.stdout.close()


def test_a_process_that_ignores_sigterm_is_killed() -> None:
    lines: list[str] = []
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
    kept = Kept("deaf", [sys.executable, "-c", code], environment=os.environ, folder=Path("/"), write=lines.append)
    eventually(lambda: "[deaf] up" in lines)
    kept.stop(timeout_s=0.5)
    assert not kept.alive
    assert any("is killed" in line for line in lines)


# --- stack files ------------------------------------------------------------------------------------------------------


def test_variables_are_substituted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "me")
    add, _ = read_stack(make_stack(tmp_path))
    assert add.environment == {"GREETING": "me"}


def test_a_context_is_the_template_with_the_handler_over_it(tmp_path: Path) -> None:
    path = make_stack(tmp_path)
    (function,) = read_stack(path, ["echo"])
    context = lay_out(function, find_template(path), tmp_path / "build")
    assert (context / "index.py").is_file()
    assert (context / "trunkline" / "client.py").is_file()
    assert (context / "function" / "handler.py").read_text() == ECHO
    assert not (context / "function" / "tox.ini").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("functions: [", "is not YAML"),
        ("version: 1.0", "no functions"),
        ("functions: {}", "no functions"),
        ("functions: {A_B: {}}", "no name of a function"),
        ("functions: {a: 1}", "must be a map"),
        ("functions: {a: {lang: go}}", "only python3-trunkline"),
        ("functions: {a: {lang: python3-trunkline, handler: ./none}}", "no handler.py"),
        ("functions: {add: {lang: python3-trunkline, handler: ./add, environment: [1]}}", "must be a map"),
    ],
)
def test_bad_stack_files_name_the_key(tmp_path: Path, content: str, message: str) -> None:
    path = make_stack(tmp_path)
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_stack(path)


def test_missing_pieces_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_stack(tmp_path / "none.yml")
    with pytest.raises(ConfigError, match="no function 'x'"):
        read_stack(make_stack(tmp_path), ["x"])
    (tmp_path / "template").unlink()
    with pytest.raises(ConfigError, match="template pull"):
        find_template(tmp_path / "stack.yml")


def test_an_installation_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("--no-such-option\n")
    with pytest.raises(ConfigError, match="pip"):
        ensure_environment([tmp_path / "requirements.txt"], tmp_path / "envs")
    assert list((tmp_path / "envs").iterdir()) == []


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("")
    python = ensure_environment([tmp_path / "requirements.txt"], tmp_path / "envs")
    assert python.exists()

    def refuse(command: list[str], **named: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(environment_module, "_run", refuse)
    assert ensure_environment([tmp_path / "requirements.txt"], tmp_path / "envs") == python
