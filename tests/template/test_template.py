"""The template as faas-cli builds it: laid out, started the way its image starts it, asked over HTTP, told to stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from trunkline.admin import AdminConnection

from tests.fakes import ADMIN_TOKEN, FakeSource, bundle_of, running_server
from tests.over_http import routes_of
from tests.waiting import PATIENCE_S, soon

TEMPLATE = Path(__file__).parents[2] / "template" / "python3-trunkline"
HANDLER = """
import logging, os, threading
import numpy as np
from trunkline import errors, model
from trunkline.context import call_id, traceparent

m = model("nobody")
held = threading.Event()

def handle(event, context):
    what = event.query.get("what", "")
    if what == "echo":
        return {"statusCode": 201, "body": event.body, "headers": {"X-Length": len(event.body), "Content-Type": "application/x"}}
    if what == "facts":
        return {"body": {"method": event.method, "path": event.path, "query": event.query["what"], "call": call_id.get(),
                         "host": context.hostname, "header": event.headers["X-Mine"], "uid": os.getuid()}}
    if what == "wait":
        open(os.environ["ENTERED"], "w").close()
        while not os.path.exists(os.environ["LEAVE"]):
            threading.Event().wait(0.01)
        return "waited"
    if what == "boom":
        raise ZeroDivisionError("internal detail")
    if what == "model":
        return m([1.0])
    if what == "text":
        return "text"
    if what == "trace":
        return traceparent.get() or "none"
    if what == "status":
        return {"statusCode": event.query["code"], "body": "x"}
    if what == "flask-status":
        return "x", int(event.query["code"])
    if what == "none":
        return None
    if what == "list":
        return [1, 2]
    if what == "plain":
        return {"a": 1}
    if what == "tuple":
        return "made", 202
    if what == "bytearray":
        return {"body": bytearray(b"abc")}
    if what == "array":
        return {"z": np.arange(3, dtype="float32"), "a": np.int64(7)}
    if what == "array-body":
        return {"body": [np.float32(0.5), np.zeros((1, 2))]}
    if what == "log":
        logging.getLogger("mine").info("a line of the handler")
        return "logged"
    raise getattr(errors, what)("asked 3 of 2", asked=3)
"""
ASKING = """
from trunkline import model, transport_name

age = model("age")

def handle(event, context):
    asked = model(event.query["model"]) if "model" in event.query else age
    return {"y": asked([[0, 0, 0]]).tolist(), "by": transport_name()}
"""
BLOCK_TORCH = "import sys; sys.modules['torch'] = None; import runpy; runpy.run_path('index.py', run_name='__main__')"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Running:
    """One started function."""

    def __init__(self, context: Path, environment: dict[str, str], code: str = BLOCK_TORCH) -> None:
        self.port = free_port()
        self.context = context
        self.url = f"http://127.0.0.1:{self.port}"
        base = {"PATH": os.environ["PATH"], "PORT": str(self.port), "bind_address": "127.0.0.1", "healthcheck_interval": "0s"}
        base |= {"TRUNKLINE_SOCKET": "/nowhere/trunkline.sock", "PYTHONDONTWRITEBYTECODE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=context, env=base | environment, stderr=subprocess.PIPE, text=True
        )
        deadline = soon()
        while True:
            try:
                requests.get(f"{self.url}/?what=text", timeout=PATIENCE_S)
                break
            except requests.ConnectionError:
                assert self.process.poll() is None, self.process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.02)

    def stop(self) -> tuple[int, str]:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, log


@pytest.fixture(scope="module")
def context() -> Iterator[Path]:
    """Return a build context: the template, with a handler's folder laid over ``function``.

    Not in pytest's folder: that one is private to this user, and a test below runs as another one.
    """
    with tempfile.TemporaryDirectory(prefix="trunkline-template-") as made:
        Path(made).chmod(0o755)
        folder = Path(made) / "echo"
        shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        (folder / "function" / "handler.py").write_text(HANDLER)
        yield folder


@pytest.fixture(scope="module")
def running(context: Path) -> Iterator[Running]:
    made = Running(context, {"max_body_bytes": "100000"})
    yield made
    made.stop()


def test_bytes_pass_untouched_in_both_directions(running: Running) -> None:
    body = bytes(range(256)) * 100
    answer = requests.post(f"{running.url}/?what=echo", data=body, timeout=PATIENCE_S)
    assert (answer.status_code, answer.content) == (201, body)
    assert answer.headers["X-Length"] == "25600"
    assert answer.headers["Content-Type"] == "application/x"


def test_chunked_bodies_are_read_to_their_end(running: Running) -> None:
    answer = requests.post(f"{running.url}/?what=echo", data=(bytes([n]) * 999 for n in range(50)), timeout=PATIENCE_S)
    assert answer.content == b"".join(bytes([n]) * 999 for n in range(50))


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_past_the_limit_is_refused_and_the_next_one_is_not(running: Running, chunked: bool) -> None:
    session = requests.Session()
    exact, over = b"x" * 100_000, b"x" * 100_001
    for body, status in ((exact, 201), (over, 413), (exact, 201), (b"x" * 450_000, 413)):
        answer = session.post(f"{running.url}/?what=echo", data=iter([body]) if chunked else body, timeout=PATIENCE_S)
        assert answer.status_code == status
    assert answer.json()["error"]["details"] == {"limit_bytes": 100_000}


def test_the_event_tells_what_was_asked(running: Running) -> None:
    answer = requests.put(f"{running.url}/a/b?what=facts", headers={"X-Mine": "yes", "X-Call-Id": "call-7"}, timeout=PATIENCE_S)
    assert answer.json()["method"] == "PUT"
    assert answer.json()["path"] == "/a/b"
    assert answer.json()["header"] == "yes"
    assert answer.json()["call"] == "call-7"
    assert answer.headers["X-Call-Id"] == "call-7"
    assert answer.headers["Content-Type"] == "application/json"


def test_a_call_without_an_id_gets_one(running: Running) -> None:
    ids = {requests.get(f"{running.url}/?what=text", timeout=PATIENCE_S).headers["X-Call-Id"] for _ in range(3)}
    assert len(ids) == 3


@pytest.mark.parametrize(
    ("what", "status", "body"),
    [
        ("text", 200, "text"),
        ("none", 200, ""),
        ("list", 200, "[1,2]\n"),
        ("plain", 200, '{"a":1}\n'),
        ("tuple", 202, "made"),
        ("array", 200, '{"z":[0.0,1.0,2.0],"a":7}\n'),
        ("array-body", 200, "[0.5, [[0.0, 0.0]]]"),
    ],
)
def test_a_handler_may_return_what_flask_takes(running: Running, what: str, status: int, body: str) -> None:
    answer = requests.get(f"{running.url}/?what={what}", timeout=PATIENCE_S)
    assert (answer.status_code, answer.text) == (status, body)


def test_a_bytearray_is_bytes(running: Running) -> None:
    assert requests.get(f"{running.url}/?what=bytearray", timeout=PATIENCE_S).content == b"abc"


@pytest.mark.parametrize(
    ("what", "status", "code"),
    [
        ("InvalidInput", 400, "invalid_input"),
        ("UnknownModel", 404, "unknown_model"),
        ("BodyTooLarge", 413, "body_too_large"),
        ("QueueFull", 503, "queue_full"),
        ("DeadlineExceeded", 504, "deadline_exceeded"),
        ("SidecarFault", 500, "sidecar_fault"),
        ("model", 503, "sidecar_unavailable"),
    ],
)
def test_errors_keep_their_shape_and_status(running: Running, what: str, status: int, code: str) -> None:
    answer = requests.get(f"{running.url}/?what={what}", timeout=PATIENCE_S)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["code"] == code
    assert sorted(error) == ["code", "details", "message", "retryable"]
    assert ("Retry-After" in answer.headers) == (status == 503)


@pytest.mark.parametrize(("code", "status"), [("200", 200), ("404 Gone astray", 404), ("599", 599)])
def test_a_handler_may_choose_the_status(running: Running, code: str, status: int) -> None:
    answer = requests.get(f"{running.url}/", params={"what": "status", "code": code}, timeout=PATIENCE_S)
    assert (answer.status_code, answer.text) == (status, "x")


@pytest.mark.parametrize("code", ["abc", "0", "99", "100", "101", "600", "1000", "-1"])
def test_a_status_that_cannot_be_sent_is_the_handlers_fault(running: Running, code: str) -> None:
    for what in ("status", "flask-status") if code.lstrip("-").isdigit() else ("status",):
        answer = requests.get(f"{running.url}/", params={"what": what, "code": code}, timeout=PATIENCE_S)
        assert answer.status_code == 500
        assert answer.json()["error"]["code"] == "handler_failed"


def test_an_exception_of_the_handler_shows_an_incident_and_no_trace(context: Path) -> None:
    running = Running(context, {})
    answer = requests.get(f"{running.url}/?what=boom", timeout=PATIENCE_S)
    incident = answer.json()["error"]["details"]["incident"]
    assert answer.status_code == 500
    assert "internal detail" not in answer.text
    code, log = running.stop()
    assert code == 0
    assert incident in log
    assert "ZeroDivisionError: internal detail" in log


def test_every_log_line_of_a_call_has_its_id(context: Path) -> None:
    running = Running(context, {})
    requests.get(f"{running.url}/?what=log", headers={"X-Call-Id": "call-8"}, timeout=PATIENCE_S)
    requests.get(f"{running.url}/?what=QueueFull", headers={"X-Call-Id": "call-9"}, timeout=PATIENCE_S)
    _, log = running.stop()
    assert "INFO mine a line of the handler call=call-8" in log
    assert re.search(r"^WARNING function queue_full: .* call=call-9$", log, re.MULTILINE)


def test_a_request_that_cannot_be_read_is_not_logged_with_the_id_of_the_one_before(context: Path) -> None:
    running = Running(context, {"threads": "1"})
    assert requests.get(f"{running.url}/?what=log", headers={"X-Call-Id": "before"}, timeout=PATIENCE_S).status_code == 200
    with socket.create_connection(("127.0.0.1", running.port)) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Call-Id: a\x01\r\n\r\n")
        assert sock.recv(100).startswith(b"HTTP/1.1 400")
    _, log = running.stop()
    assert "a line of the handler call=before" in log
    assert re.search(r"Invalid request.* call=-$", log, re.MULTILINE), log


def test_log_lines_are_json_where_that_is_asked_for(context: Path) -> None:
    running = Running(context, {"log_format": "json", "gunicorn_log_level": "info"})
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    requests.get(f"{running.url}/?what=log", headers={"X-Call-Id": "call-8", "traceparent": parent}, timeout=PATIENCE_S)
    requests.get(f"{running.url}/?what=boom", headers={"X-Call-Id": "call\u00e9"}, timeout=PATIENCE_S)
    _, log = running.stop()
    lines = [json.loads(line) for line in log.splitlines()]
    (mine,) = [line for line in lines if line["logger"] == "mine"]
    del mine["time"]
    told = {"level": "info", "logger": "mine", "message": "a line of the handler", "call_id": "call-8"}
    assert mine == told | {"trace_id": parent[3:35]}
    (failed,) = [line for line in lines if line["logger"] == "function"]
    assert "ZeroDivisionError: internal detail" in failed["exception"]
    assert failed["call_id"].startswith("call")
    # The server around the handler writes as it does.
    assert any(line["logger"] == "gunicorn.error" for line in lines)


def test_a_log_format_that_there_is_not_is_refused_at_the_start(context: Path) -> None:
    environment = os.environ | {"log_format": "xml", "PORT": str(free_port())}
    ended = subprocess.run(
        [sys.executable, "index.py"], cwd=context, env=environment, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert ended.returncode != 0
    assert "log_format is 'xml'; it must be human or json" in ended.stderr


def test_the_traceparent_of_a_request_is_sent_with_its_calls(context: Path) -> None:
    running = Running(context, {})
    parent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    told = [
        requests.get(f"{running.url}/?what=trace", headers=each, timeout=PATIENCE_S).text
        for each in ({"traceparent": parent}, {})
    ]
    running.stop()
    assert told == [parent, "none"]


@pytest.mark.parametrize("body", [b"5\r\nabc", b"zz\r\nabc\r\n"], ids=["ends early", "is no chunk"])
def test_a_broken_body_is_the_callers_fault_and_harms_nobody_else(running: Running, body: bytes) -> None:
    with socket.create_connection(("127.0.0.1", running.port), timeout=PATIENCE_S) as connection:
        connection.sendall(b"POST /?what=echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + body)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(4096).startswith(b"HTTP/1.1 400 ")
    assert requests.get(f"{running.url}/?what=text", timeout=PATIENCE_S).text == "text"


def test_ready_is_503_while_there_is_no_sidecar(running: Running) -> None:
    answer = requests.get(f"{running.url}/_/trunkline/ready", timeout=PATIENCE_S)
    assert answer.status_code == 503
    assert answer.headers["Retry-After"] == "1"
    assert answer.json()["error"]["code"] == "sidecar_unavailable"


def test_a_wrong_method_of_the_ready_route_reaches_the_handler_or_is_refused(running: Running) -> None:
    assert requests.post(f"{running.url}/_/trunkline/ready?what=text", timeout=PATIENCE_S).status_code in (200, 405)


def test_after_sigterm_requests_are_served_until_the_window_closes(context: Path, tmp_path: Path) -> None:
    """The request that was running, and those that come within the window, are all answered; then the exit code is 0."""
    marks = {"ENTERED": str(tmp_path / "entered"), "LEAVE": str(tmp_path / "leave")}
    running = Running(context, {"healthcheck_interval": "2s", **marks})
    waiting = subprocess.Popen(["curl", "-s", f"{running.url}/?what=wait"], stdout=subprocess.PIPE)
    while not Path(marks["ENTERED"]).exists():
        time.sleep(0.01)
    running.process.send_signal(signal.SIGTERM)
    for _ in range(8):
        assert requests.get(f"{running.url}/?what=text", timeout=PATIENCE_S).status_code == 200
    Path(marks["LEAVE"]).touch()
    assert waiting.communicate(timeout=PATIENCE_S)[0] == b"waited"
    assert running.process.wait(PATIENCE_S) == 0
    running.stop()


def test_sigterm_to_the_whole_container_loses_nothing_either(context: Path, tmp_path: Path) -> None:
    """Some runtimes signal every process, and the watchdog passes its own on besides; SIGQUIT is for the impatient."""
    marks = {"ENTERED": str(tmp_path / "entered"), "LEAVE": str(tmp_path / "leave")}
    running = Running(context, {"healthcheck_interval": "10m", **marks})
    master = running.process.pid
    (first,) = Path(f"/proc/{master}/task/{master}/children").read_text().split()
    waiting = subprocess.Popen(["curl", "-s", f"{running.url}/?what=wait"], stdout=subprocess.PIPE)
    while not Path(marks["ENTERED"]).exists():
        time.sleep(0.01)
    for _ in range(2):
        os.kill(master, signal.SIGTERM)
        assert requests.get(f"{running.url}/?what=text", timeout=PATIENCE_S).status_code == 200
    # A worker that is told so itself ends when its request is answered, and is replaced.
    os.kill(int(first), signal.SIGTERM)
    Path(marks["LEAVE"]).touch()
    assert waiting.communicate(timeout=PATIENCE_S)[0] == b"waited"
    for _ in range(8):
        assert requests.get(f"{running.url}/?what=text", timeout=PATIENCE_S).status_code == 200
    assert running.process.poll() is None
    running.process.send_signal(signal.SIGQUIT)
    assert running.process.wait(PATIENCE_S) == 0
    running.stop()


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        ({}, 30),
        ({"exec_timeout": "10s", "write_timeout": "15s"}, 30),
        ({"exec_timeout": "1m30.5s"}, 91),
        ({"write_timeout": "2m"}, 120),
        ({"exec_timeout": "", "write_timeout": "soon"}, 30),
    ],
)
def test_what_is_under_way_at_the_end_is_given_as_long_as_the_watchdog_waits(limits: dict[str, str], seconds: int) -> None:
    code = "import index; print(index.FunctionServer().cfg.graceful_timeout)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=TEMPLATE,
        env={"PATH": os.environ["PATH"], **limits},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == seconds


def test_a_window_that_is_no_duration_is_refused_at_the_start(context: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PORT": str(free_port()), "healthcheck_interval": "soon"}
    done = subprocess.run(
        [sys.executable, "index.py"],
        cwd=context,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert "'soon' is no duration" in done.stderr


# Libraries first: the interpreter of the tests may lie where another user cannot look. The function's own files follow after.
AS_SOMEBODY = """
import os, sys
sys.modules['torch'] = None
sys.path.insert(0, '')
import flask, gunicorn.app.base, gunicorn.arbiter, gunicorn.glogging, gunicorn.sock, gunicorn.workers.gthread, runpy
import flask.json.provider, werkzeug.debug, trunkline, concurrent.futures.thread, encodings.idna, stringprep
if os.getuid() == 0:
    os.setgroups([]); os.setgid(12000); os.setuid(12000)
# gunicorn looks at who it is when it is imported.
gunicorn.config.User.default, gunicorn.config.Group.default = os.getuid(), os.getgid()
runpy.run_path('index.py', run_name='__main__')
"""


def test_any_uid_and_a_read_only_folder_will_do(context: Path) -> None:
    """As root, as uid 12000, which OpenFaaS on Kubernetes uses; otherwise as whoever runs the tests."""
    folders = [context, *(path for path in context.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    try:
        running = Running(context, {"HOME": "/nonexistent"}, AS_SOMEBODY)
        answer = requests.get(f"{running.url}/?what=facts", headers={"X-Mine": "1"}, timeout=PATIENCE_S)
        assert answer.json()["uid"] == (os.getuid() or 12000)
        assert running.stop()[0] == 0
    finally:
        for folder in folders:
            folder.chmod(0o755)


def test_behind_a_watchdog_the_upstream_url_is_served(context: Path, tmp_path: Path) -> None:
    """The watchdog has PORT for itself. A copy of the interpreter's launcher stands in for it, by name."""
    watchdog = tmp_path / "fwatchdog"
    shutil.copy(shutil.which("sh") or "/bin/sh", watchdog)
    port = free_port()
    process = subprocess.Popen(
        [str(watchdog), "-c", f"{sys.executable} index.py; true"],
        cwd=context,
        env={"PATH": os.environ["PATH"], "PORT": "8080", "upstream_url": f"http://127.0.0.1:{port}", "healthcheck_interval": "0"},
        start_new_session=True,
    )
    try:
        deadline = soon()
        while True:
            try:
                assert requests.get(f"http://127.0.0.1:{port}/?what=text", timeout=PATIENCE_S).text == "text"
                break
            except requests.ConnectionError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(PATIENCE_S)


@pytest.mark.parametrize(("text", "seconds"), [("10s", 10), ("1m30s", 90), ("500ms", 0.5), ("2", 2), ("1.5h", 5400), ("0s", 0)])
def test_go_durations(text: str, seconds: float) -> None:
    code = f"import index; print(index.duration_s({text!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=TEMPLATE, capture_output=True, text=True, check=True)
    assert float(done.stdout) == seconds


def test_a_bad_duration_is_refused() -> None:
    code = "import index\ntry: index.duration_s('soon')\nexcept ValueError as e: print(e)"
    done = subprocess.run([sys.executable, "-c", code], cwd=TEMPLATE, capture_output=True, text=True, check=True)
    assert "no duration" in done.stdout


# --- what only an image build would run -------------------------------------------------------------------------------


def dockerfile() -> str:
    return (TEMPLATE / "Dockerfile").read_text()


def test_template_and_image_start_the_same_process() -> None:
    template = yaml.safe_load((TEMPLATE / "template.yml").read_text())
    match = re.search(r'fprocess="([^"]+)"', dockerfile())
    assert match
    assert match[1] == template["fprocess"] == "python index.py"
    assert template["language"] == TEMPLATE.name
    # The watchdog splits at single spaces and knows no quotes.
    assert not set(template["fprocess"]) & set("'\"$|&;")


def test_a_failing_handler_test_stops_the_image() -> None:
    """With BuildKit a stage that nothing depends on is never built: ship has to copy something out of test."""
    stages = re.split(r"^FROM ", dockerfile(), flags=re.MULTILINE)
    ship = next(stage for stage in stages if " AS ship" in stage.splitlines()[0])
    copied = re.search(r"^COPY --from=test (\S+)", ship, re.MULTILINE)
    assert copied
    test = next(stage for stage in stages if " AS test" in stage.splitlines()[0])
    assert f"&& touch {copied[1]}" in test


def test_the_image_takes_the_usual_build_arguments_and_runs_as_a_number() -> None:
    for argument in ("ADDITIONAL_PACKAGE", "UPGRADE_PACKAGES", "TEST_ENABLED", "TEST_COMMAND", "PYTHON_VERSION"):
        assert f"ARG {argument}" in dockerfile()
    assert 'mode="http"' in dockerfile()
    assert 'ready_path="/_/trunkline/ready"' in dockerfile()
    # What was installed with `--user` is found by users without a home, too.
    assert "PYTHONUSERBASE=/home/app/.local" in dockerfile()
    # A kubelet takes no name under `runAsNonRoot`.
    assert re.findall(r"^USER (\S+)", dockerfile(), re.MULTILINE)[-1] == "10100:10100"
    assert "groupadd --system --gid 10100 app && useradd --system --uid 10100 --gid app" in dockerfile()


def test_the_samples_own_test_passes_in_the_context_and_a_broken_handler_fails_it(tmp_path: Path) -> None:
    folder = tmp_path / "sample"
    shutil.copytree(TEMPLATE, folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={folder}", "-c", os.devnull]
    # Of the plugins that are installed here, an image has none, and they take long to import.
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def outcome() -> int:
        test = [*command, "handler_test.py"]
        return subprocess.run(test, cwd=folder / "function", env=environment, capture_output=True, check=False).returncode

    assert outcome() == 0
    handler = folder / "function" / "handler.py"
    handler.write_text(handler.read_text().replace('"statusCode": 200', '"statusCode": 500'))
    assert outcome() == 1
    # A function that brings no test inherits this one, which is not about it.
    handler.write_text("def handle(event, context):\n    return 'mine'\n")
    assert outcome() == 0


def test_the_clients_wheel_metadata_names_what_the_template_installs() -> None:
    needed = {re.split(r"[<>=]", line)[0] for line in (TEMPLATE / "requirements.txt").read_text().split()}
    assert {"flask", "gunicorn", "msgpack", "numpy", "posix-ipc", "requests", "urllib3"} == needed
    assert "torch" not in needed


def test_a_broken_handler_ends_the_process_with_its_trace(context: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(context, folder)
    (folder / "function" / "handler.py").write_text("import nothing_of_this_name\n")
    done = subprocess.run(
        [sys.executable, "index.py"],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "PORT": str(free_port()), "bind_address": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode != 0
    assert "nothing_of_this_name" in done.stderr


def test_the_answer_is_json_text_for_nested_bodies(running: Running) -> None:
    answer = requests.get(f"{running.url}/?what=facts", headers={"X-Mine": "1"}, timeout=PATIENCE_S)
    assert json.loads(answer.content)["query"] == "facts"


def test_a_function_that_starts_has_its_models_loaded_before_it_is_called(context: Path, tmp_path: Path) -> None:
    folder = tmp_path / "naming"
    shutil.copytree(context, folder)
    naming = 'from trunkline import model\n\nage = model("age")\n\n\ndef handle(event, context):\n    return "text"\n'
    (folder / "function" / "handler.py").write_text(naming)
    source = FakeSource()
    source.put(bundle_of("age", [b"weights"]), [b"weights"])
    with running_server(tmp_path, source) as sidecar:
        function = Running(folder, {"TRUNKLINE_SOCKET": sidecar.path})
        admin = AdminConnection(sidecar.path, ADMIN_TOKEN)
        deadline = soon()
        while admin.command("model", {"name": "age"})["state"] != "resident":
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert function.stop()[0] == 0


def test_a_function_without_a_socket_asks_over_http(context: Path, tmp_path: Path) -> None:
    folder = tmp_path / "remote"
    shutil.copytree(context, folder)
    (folder / "function" / "handler.py").write_text(ASKING)
    source = FakeSource()
    source.put(bundle_of("age", [b"weights"]), [b"weights"])
    with running_server(tmp_path, source) as sidecar, routes_of(sidecar, tmp_path) as url:
        function = Running(folder, {"TRUNKLINE_SOCKET": "", "TRUNKLINE_URL": url, "workers": "2"})
        for _ in range(6):
            answer = requests.get(function.url, timeout=PATIENCE_S)
            assert answer.json() == {"y": [[sum(b"weights")] * 3], "by": url}
        assert requests.get(f"{function.url}/_/trunkline/ready", timeout=PATIENCE_S).status_code == 200
        refused = requests.get(f"{function.url}?model=none", timeout=PATIENCE_S)
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "unknown_model")
        code, log = function.stop()
        assert code == 0
        assert f"sidecar reached at {url} (transport http)" in log
