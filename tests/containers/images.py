"""`make containers`: both images as a container engine runs them. Not part of `make test`: it takes minutes, and root."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from functions import demo
from sidecar.packing import pack
from tests.bundles import write_adding_bundle
from tests.containers.conftest import ARGUMENTS, LISTED
from tests.containers.engine import docker, running, state
from tests.fault.matrix import write_model
from tests.namespaces.confinement import within
from tests.namespaces.test_confined import INPUT_BYTES, LIMIT_BYTES, WIDTH, Total
from tests.rows import ROOT
from tests.unit.test_hardening import docker_run
from tests.waiting import until

# All of it, from an empty disk.
pytestmark = pytest.mark.timeout(3600)

# OpenFaaS runs functions as this user on Kubernetes.
FUNCTION_UID = 12000
MODELS = "/models/adder", "/models/total", "/models/classify"
# As many at once ask while the sidecar is stopped and started.
CALLERS = 4


def flags(folder: Path, image: str) -> list[str]:
    """Return how SECURITY.md runs the sidecar, with its sockets in ``folder``."""
    shown = [word.replace("/run/trunkline:", f"{folder}/run:") for word in docker_run() if word != "-d"]
    at = shown.index("--name")
    del shown[at : at + 2]
    return [image if word == "trunkline" else word.replace("trunkline-store", volume(folder)) for word in shown]


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a node: bundles in it, and where the sidecar's sockets come to lie."""
    folder = tmp_path_factory.mktemp("node")
    (folder / "run").mkdir()
    os.chown(folder / "run", 10001, 10001)
    write_adding_bundle(folder / "models/adder", "adder", [10.0, 20.0])
    write_model(folder / "models", "total", Total(), torch.ones(2, WIDTH))
    pack("functions.sources:classify", folder / "models/classify", name="classify")
    # As the documentation says: bundles are read by the sidecar's user.
    subprocess.run(["chmod", "-R", "a+rX", str(folder / "models")], check=True)
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def sidecar(sidecar_image: str, node: Path) -> Iterator[str]:
    """A sidecar as SECURITY.md runs it, but for larger arenas."""
    try:
        with running(*flags(node, sidecar_image), "--arena-limit", str(2 * INPUT_BYTES)) as container:
            until(lambda: healthy(container))
            docker("run", "--rm", "--volumes-from", container, "-v", f"{node}/models:/models:ro", sidecar_image, "push", *MODELS)
            yield container
    finally:
        docker("volume", "rm", "--force", volume(node))


@pytest.fixture(scope="module")
def function(function_image: str, node: Path, sidecar: str) -> Iterator[str]:
    """A function that has nothing but the folder of the sidecar's socket."""
    confined = ("--network", "none", "--user", str(FUNCTION_UID), "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
    mount = ("--volume", f"{node}/run/public:/run/trunkline:ro")
    with running(*confined, "--memory", str(LIMIT_BYTES), *mount, function_image) as container:
        until(lambda: ask(container)[0] == 200)
        yield container


def volume(folder: Path) -> str:
    return f"trunkline-{folder.name}"


def healthy(container: str) -> bool:
    found = state(container)
    assert found["Running"], docker("logs", container, stderr=subprocess.STDOUT)
    return bool(found["Health"]["Status"] == "healthy")


def ask(function: str, path: str = "/", body: str = "[[1, 1]]") -> tuple[int, bytes]:
    """POST to a function's watchdog, from within its network; return the status, 0 without an answer, and the body."""
    url = f"http://127.0.0.1:8080{path}"
    asked = within(state(function)["Pid"], "curl", "-s", "-w", "%{http_code}", "--data-binary", body, url)
    return int(asked.stdout[-3:] or b"0"), asked.stdout[:-3]


def is_right(answer: tuple[int, bytes]) -> bool:
    return answer[0] == 200 and json.loads(answer[1])["sum"] == [[11.0, 21.0]]


def test_a_function_without_any_right_asks_the_sidecar(function: str, watchdog: str) -> None:
    print(f"asked through {watchdog}")
    status, body = ask(function)
    assert (status, json.loads(body)) == (200, {"sum": [[11.0, 21.0]], "by": "unix:/run/trunkline/trunkline.sock"})
    assert json.loads(ask(function, "/write")[1]) == []
    facts = Path(f"/proc/{state(function)['Pid']}/status").read_text()
    assert f"Uid:\t{FUNCTION_UID}\t{FUNCTION_UID}" in facts
    assert re.search(r"^CapEff:\t0+$", facts, re.MULTILINE)
    assert os.listdir(f"/proc/{state(function)['Pid']}/root/sys/class/net") == ["lo"]


def test_a_picture_is_answered_as_by_the_original_model(function: str, tmp_path: Path) -> None:
    for name, expected in demo.original_probabilities().items():
        (tmp_path / name).write_bytes(demo.picture(name))
        status, body = ask(function, "/picture", f"@{tmp_path / name}")
        assert status == 200, body
        labels = json.loads(body)["labels"]
        assert labels[0]["label"].split(",")[0] in demo.PICTURES[name]
        assert all(abs(each["probability"] - expected[each["label"]]) <= demo.TOLERANCE for each in labels)


def test_memory_of_an_arena_is_not_the_functions(function: str, function_image: str) -> None:
    """It may have less than what it sends; who takes as much by itself is killed."""
    greedy = ("docker", "run", "--rm", "--memory", str(LIMIT_BYTES), function_image, "python", "-c", f"b'1' * {INPUT_BYTES}")
    assert subprocess.run(greedy, check=False).returncode == 128 + signal.SIGKILL
    rows = INPUT_BYTES // (4 * WIDTH)
    status, body = ask(function, f"/large?rows={rows}", "")
    assert (status, json.loads(body)) == (200, {"total": [float(WIDTH)] * rows})
    assert state(function)["OOMKilled"] is False


def test_no_call_is_lost_while_the_sidecar_is_stopped_and_started(sidecar: str, function: str) -> None:
    pid, answers, enough = state(function)["Pid"], list[tuple[int, bytes]](), threading.Event()

    def call() -> None:
        while not enough.is_set():
            answers.append(ask(function))

    with ThreadPoolExecutor(CALLERS) as pool:
        calls = [pool.submit(call) for _ in range(CALLERS)]
        try:
            until(lambda: len(answers) > CALLERS)
            docker("stop", sidecar)
            # It drained, and was not killed for having taken too long.
            assert state(sidecar)["ExitCode"] == 0
            before = len(answers)
            docker("start", sidecar)
            # Those that were under way then, and as many that began after it.
            until(lambda: len(answers) > before + 2 * CALLERS)
        finally:
            enough.set()
        for each in calls:
            each.result()
    assert [answer for answer in answers if not is_right(answer)] == []
    assert state(function)["Pid"] == pid


def test_a_function_whose_sidecar_stays_away_says_so_until_it_is_back(sidecar: str, function: str) -> None:
    pid = state(function)["Pid"]
    docker("stop", sidecar)
    # 504 is the watchdog's, when it has not waited for as long as the function does.
    assert ask(function)[0] in (503, 504)
    docker("start", sidecar)
    until(lambda: is_right(ask(function)))
    assert state(function)["Pid"] == pid


def test_the_list_of_what_is_in_the_image_has_torch(sidecar_image: str) -> None:
    docker("build", "--target", "listed", "--tag", LISTED, *ARGUMENTS, "--build-arg", "TORCH_INDEX=", str(ROOT))
    try:
        found = json.loads(docker("run", "--rm", LISTED, "cat", "/sbom.cdx.json"))
    finally:
        docker("rmi", "--force", LISTED)
    names = {component["name"].lower().replace("_", "-") for component in found["components"]}
    assert {"torch", "flask", "gunicorn", "msgpack", "posix-ipc"} <= names
