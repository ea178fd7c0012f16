"""`trunkline up`: a stack of small functions, run as processes of their own, asked through the gateway."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from sidecar.admin_client import AdminClient
from sidecar.errors import ConfigError
from sidecar.local import LocalStack
from sidecar.local import environment as environment_module
from sidecar.local import runner as runner_module
from sidecar.local.environment import ensure_environment
from sidecar.local.gateway import create_app
from sidecar.local.processes import Kept, descendants
from sidecar.local.stack import find_template, lay_out, read_stack
from tests.bundles import write_adding_bundle
from tests.waiting import PATIENCE_S, soon

ROOT = Path(__file__).parents[2]
STACK = """
version: 1.0
provider: {name: openfaas}
functions:
  add:
    lang: python3-trunkline
    handler: ./add
    image: add
    environment: {GREETING: "${WHO:-nobody}", TRUNKLINE_SOCKET: /of/the/cluster.sock, PORT: 80, FLAG: true, EMPTY: }
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
import importlib.util
def handle(event, context):
    has_torch = importlib.util.find_spec("torch") is not None
    return {"body": event.body, "headers": {"X-Torch": has_torch, "X-Seen": event.headers.get("Transfer-Encoding"),
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
    deadline = soon()
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_function_is_ready_when_its_model_is_there(stack: LocalStack, tmp_path: Path) -> None:
    ready = f"http://127.0.0.1:{stack.ports['add']}/_/trunkline/ready"
    # Directly, and through the gateway, which lets nobody through before.
    for answer in (
        requests.get(ready, timeout=PATIENCE_S),
        requests.post(f"{stack.url}/function/add", json=[[1.0]], timeout=PATIENCE_S),
    ):
        assert answer.status_code == 503
        assert answer.headers["Retry-After"] == "1"
        assert answer.json()["error"]["code"] == "unknown_model"
    write_adding_bundle(tmp_path / "adder", "adder", [1.0, 2.0])
    with AdminClient(stack.admin) as admin:
        admin.push(tmp_path / "adder")
    stack.wait_ready()
    answer = requests.post(f"{stack.url}/function/add", json=[[1.0, 1.0]], timeout=PATIENCE_S)
    assert answer.json() == {"sum": [[2.0, 3.0]], "greeting": "nobody"}


def test_the_gateway_behaves_like_openfaas(stack: LocalStack) -> None:
    answer = requests.post(f"{stack.url}/function/echo/a/b?q=1", data=b"x" * 99_999, timeout=PATIENCE_S)
    assert answer.content == b"x" * 99_999
    assert answer.headers["X-Seen"] == "chunked"
    assert (answer.headers["X-Path"], answer.headers["X-Query"]) == ("/a/b", "1")
    assert answer.headers["X-Forwarded"]
    assert answer.headers["X-Call-Id"]
    assert answer.headers["X-Torch"] == "False"
    kept = requests.post(f"{stack.url}/function/echo.openfaas-fn/", headers={"X-Call-Id": "mine"}, timeout=PATIENCE_S)
    assert kept.headers["X-Call-Id"] == "mine"
    assert requests.get(f"{stack.url}/function/nobody", timeout=PATIENCE_S).status_code == 404
    assert [entry["name"] for entry in requests.get(f"{stack.url}/system/functions", timeout=PATIENCE_S).json()] == [
        "add",
        "echo",
    ]


def test_a_body_past_the_limit_comes_back_as_413_through_the_gateway(stack: LocalStack) -> None:
    answer = requests.post(f"{stack.url}/function/echo", data=b"x" * (17 << 20), timeout=PATIENCE_S)
    assert answer.status_code == 413


def test_a_killed_function_is_started_again(stack: LocalStack, lines: list[str]) -> None:
    pids = stack.pids()["echo"]
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGKILL)
    eventually(lambda: stack.pids().get("echo", pids)[0] != pids[0])

    def answers() -> bool:
        return requests.get(f"{stack.url}/function/echo", timeout=PATIENCE_S).status_code == 200

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


class Upstream(BaseHTTPRequestHandler):
    """Answers with what it was asked."""

    def do_GET(self) -> None:
        body = json.dumps({"path": self.path, "headers": dict(self.headers.items())}).encode()
        self.send_response(200)
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.send_header("X-Of-This-Hop", "1")
        self.send_header("Connection", "X-Of-This-Hop")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def test_the_gateway_passes_on_what_was_meant_for_the_function_and_nothing_else() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Upstream) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        http = create_app({"f": f"http://127.0.0.1:{server.server_port}"}).test_client(use_cookies=False)

        def path_seen(asked: str) -> str:
            return str(json.loads(http.get(asked, headers={"Connection": "close"}).data)["path"])

        assert path_seen("/function/f") == "/"
        assert path_seen("/function/f/a%3Fb=1") == "/a%3Fb=1"
        assert path_seen("/function/f/a%23b//c?q=%2F+a") == "/a%23b//c?q=%2F+a"
        answer = http.get("/function/f", headers={"Connection": "X-Mine", "X-Mine": "1", "X-Yours": "2"})
        seen = json.loads(answer.data)["headers"]
        assert "X-Mine" not in seen
        assert (seen["X-Yours"], seen["X-Forwarded-For"]) == ("2", "127.0.0.1")
        assert answer.headers.getlist("Set-Cookie") == ["a=1", "b=2"]
        assert "X-Of-This-Hop" not in answer.headers
        assert answer.headers["Content-Length"] == str(len(answer.data))
        server.shutdown()


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
    assert process.wait(PATIENCE_S) == 0
    process.stderr.close()
    eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in started))


def up(path: Path, *flags: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
    return subprocess.Popen(
        [sys.executable, "-m", "sidecar", "up", str(path), *flags], stderr=subprocess.PIPE, text=True, env=environment
    )


def test_nothing_outlives_an_up_that_is_killed(tmp_path: Path) -> None:
    process = up(make_stack(tmp_path), "--gateway-port", "0")
    assert process.stderr is not None
    for line in process.stderr:
        if "Ctrl-C stops everything" in line:
            break
    started = descendants(process.pid)
    process.kill()
    process.wait()
    process.stderr.close()
    eventually(lambda: not any(Path(f"/proc/{pid}/exe").exists() for pid in started))
    process.stderr.close()


def test_a_signal_stops_what_is_still_starting(tmp_path: Path) -> None:
    """The function here never listens."""
    path = make_stack(tmp_path)
    (tmp_path / "echo" / "handler.py").write_text("import time\nprint('asleep', flush=True)\ntime.sleep(600)\n")
    process = up(path, "--gateway-port", "0")
    assert process.stderr is not None
    for line in process.stderr:
        if "[echo] asleep" in line:
            break
    started = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in started)
    process.stderr.close()


def test_a_function_that_cannot_start_is_given_up_with_its_trace(tmp_path: Path) -> None:
    path = make_stack(tmp_path)
    (tmp_path / "echo" / "handler.py").write_text("import nothing_of_this_name\n")
    process = up(path, "--function", "echo", "--gateway-port", "0")
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode not in (0, None)
    assert "[echo] ModuleNotFoundError: No module named 'nothing_of_this_name'" in said
    assert "echo does not start: it ended 3 times" in said


def test_a_gateway_port_that_is_taken_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} "):
            LocalStack(make_stack(tmp_path), gateway_port=port)
    assert not (tmp_path / ".trunkline" / "build").exists()


def test_ports_are_all_different() -> None:
    ports = runner_module._free_ports(200, 0)
    assert len(set(ports)) == 200


def test_a_function_may_not_have_the_runners_names(tmp_path: Path) -> None:
    path = make_stack(tmp_path)
    path.write_text(STACK.replace("  echo:", "  gateway:"))
    with pytest.raises(ConfigError, match="'gateway'"):
        LocalStack(path)


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


def test_stopping_between_two_starts_starts_nothing() -> None:
    lines: list[str] = []
    kept = Kept("brief", ["true"], environment=os.environ, folder=Path("/"), write=lines.append)
    eventually(lambda: any("starting again" in line for line in lines))
    kept.stop()
    ended = kept.ended_count
    assert not kept.alive
    assert not kept._thread.is_alive()
    assert ended == sum("ended with" in line for line in lines)


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
    assert add.environment["GREETING"] == "me"


def test_an_environment_is_text_as_faas_cli_reads_it(tmp_path: Path) -> None:
    add, _ = read_stack(make_stack(tmp_path))
    assert (add.environment["FLAG"], add.environment["EMPTY"], add.environment["PORT"]) == ("true", "", "80")


def test_a_context_is_the_template_with_the_handler_over_it(tmp_path: Path) -> None:
    path = make_stack(tmp_path)
    (function,) = read_stack(path, ["echo"])
    context = lay_out(function, find_template(path), tmp_path / "build")
    assert (context / "index.py").is_file()
    assert (context / "trunkline" / "client.py").is_file()
    assert (context / "function" / "handler.py").read_text() == ECHO
    # faas-cli copies over what is there, and takes nothing away.
    assert (context / "function" / "tox.ini").is_file()


def test_a_context_is_left_without_the_folders_faas_cli_skips(tmp_path: Path) -> None:
    path = make_stack(tmp_path)
    for inner in ("build", "template", "kept/build", "__pycache__"):
        (tmp_path / "echo" / inner).mkdir(parents=True)
    (function,) = read_stack(path, ["echo"])
    context = lay_out(function, find_template(path), tmp_path / "build")
    names = {path.name for path in (context / "function").iterdir()}
    assert not names & {"build", "template", "__pycache__"}
    assert (context / "function" / "kept" / "build").is_dir()


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
        ("functions: {add: {lang: python3-trunkline, handler: ./add}}", "provider.name must be openfaas"),
        ("{provider: {name: faas}, functions: {add: {lang: python3-trunkline}}}", "provider.name must be openfaas"),
    ],
)
def test_bad_stack_files_name_the_key(tmp_path: Path, content: str, message: str) -> None:
    path = make_stack(tmp_path)
    path.write_text(content if "provider" in content or "provider" in message else f"{content}\nprovider: {{name: openfaas}}")
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


def test_an_installation_that_fails_tells_why_and_leaves_nothing(tmp_path: Path) -> None:
    """What another one left behind when it was killed goes as well, unless it is young enough to be going on."""
    (tmp_path / "requirements.txt").write_text("--no-such-option\n")
    for name, age_s in (("a.part-1", 7200), ("b.part-2", 0), ("c", 7200)):
        (tmp_path / "envs" / name).mkdir(parents=True)
        os.utime(tmp_path / "envs" / name, (time.time() - age_s, time.time() - age_s))
    lines: list[str] = []
    with pytest.raises(ConfigError, match="no such option"):
        ensure_environment([tmp_path / "requirements.txt"], tmp_path / "envs", lines.append)
    assert sorted(path.name for path in (tmp_path / "envs").iterdir()) == ["b.part-2", "c"]
    assert lines[0].startswith("[setup] installing")
    assert any("no such option" in line for line in lines[1:])


def test_an_environment_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "requirements.txt").write_text("")
    python = ensure_environment([tmp_path / "requirements.txt"], tmp_path / "envs")
    assert python.exists()

    def refuse(command: list[str], **named: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(environment_module, "_run", refuse)
    assert ensure_environment([tmp_path / "requirements.txt"], tmp_path / "envs") == python
