"""The repository as Knative's func meets it: a function created, built, served by func's own middleware, with a real sidecar."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml
from trunkline.pool import DEFAULT_CREDENTIAL

from knative.language_pack import PUBLISHED, ROOT, SOURCE, TEMPLATE, write_language_pack
from sidecar.local.environment import ensure_environment
from tests.bundles import write_adding_bundle
from tests.integration.test_admin_http import free_port
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import until

PATIENCE_S = 60
MIDDLEWARE = "func-python==0.8.1\n"
# What func's scaffolding for Python does.
MAIN = "from func_python.http import serve\nfrom function import new as handler\nserve(handler)\n"
# The keys of manifest.yaml that func reads.
REPOSITORY_KEYS = {"name", "version", "templates"}
TEMPLATE_KEYS = {"builderImages", "buildpacks", "healthEndpoints", "buildEnvs", "runEnvs", "invoke"}
HANDLER = """
import json, threading
from trunkline import model, transport_name
m = model("adder")

def handle(event, context):
    if event.path == "/echo":
        return {"statusCode": 201, "body": event.body, "headers": {"X-Query": event.query.get("q", "")}}
    return {"body": {"sum": m(json.loads(event.body)).tolist(), "by": transport_name()}}
"""


def created(repository: Path, folder: Path) -> Path:
    """Do what `func create` does with a clone of a repository; return the function's folder."""
    clone, function = folder / "clone", folder / "function"
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{repository}", str(clone)], check=True)
    templates = clone / yaml.safe_load((clone / "manifest.yaml").read_text())["templates"]
    runtimes = [path.name for path in templates.iterdir() if path.is_dir()]
    assert runtimes == ["python"]
    shutil.copytree(templates / "python" / "trunkline", function, symlinks=True, ignore=shutil.ignore_patterns("manifest.yaml"))
    # func copies links as links: one that led out of the template would lead nowhere.
    assert not [path for path in function.rglob("*") if path.is_symlink()]
    return function


@pytest.fixture(scope="module")
def function(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a function made from the language pack, with a handler of its own."""
    folder = tmp_path_factory.mktemp("func")
    write_language_pack(folder / "pack")
    made = created(folder / "pack", folder)
    shutil.copytree(made, folder / "fresh")
    (made / "function" / "handler.py").write_text(HANDLER)
    return made


@pytest.fixture(scope="module")
def interpreter(function: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return that of an environment with the function and func's middleware, as a builder makes it."""
    folder = tmp_path_factory.mktemp("environment")
    (folder / "requirements.txt").write_text(f"{MIDDLEWARE}{function}\n")
    (folder / "main.py").write_text(MAIN)
    return str(ensure_environment([folder / "requirements.txt"], folder))


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SidecarProcess, int]]:
    port = free_port()
    with sidecar_process(tmp_path_factory.mktemp("box"), "--admin-port", str(port)) as running:
        yield running, port


class Serving:
    def __init__(self, interpreter: str, folder: Path, **environment: str) -> None:
        self.url = f"http://127.0.0.1:{(port := free_port())}"
        (folder / "main.py").write_text(MAIN)
        given = {"PATH": os.environ["PATH"], "LISTEN_ADDRESS": f"127.0.0.1:{port}"} | environment
        self.process = subprocess.Popen([interpreter, "main.py"], cwd=folder, env=given, stderr=subprocess.PIPE, text=True)
        until(lambda: self.status("/health/liveness") == 200 or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()[1]

    def status(self, path: str) -> int:
        try:
            return requests.get(self.url + path, timeout=PATIENCE_S).status_code
        except requests.ConnectionError:
            return 0

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, log


def test_a_function_answers_over_the_socket_as_it_does_on_openfaas(
    interpreter: str, box: tuple[SidecarProcess, int], tmp_path: Path
) -> None:
    sidecar, _ = box
    serving = Serving(interpreter, tmp_path, TRUNKLINE_SOCKET=str(sidecar.socket), max_body_bytes="100000")
    # Listening without its model, which a start must not fail for.
    assert serving.status("/health/readiness") == 500
    missing = requests.post(serving.url, data=b"[[1.0]]", timeout=PATIENCE_S)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_model")
    write_adding_bundle(tmp_path / "adder", "adder", [1.0, 2.0])
    sidecar.admin.push(tmp_path / "adder")
    until(lambda: serving.status("/health/readiness") == 200)
    answer = requests.post(serving.url, data=json.dumps([[1.0, 1.0]]), timeout=PATIENCE_S)
    assert answer.json() == {"sum": [[2.0, 3.0]], "by": f"unix:{sidecar.socket}"}
    assert answer.headers["X-Call-Id"]
    for body in (b"x" * 70_000, iter([b"x" * 30_000, b"x" * 40_000])):
        echoed = requests.post(f"{serving.url}/echo?q=1", data=body, timeout=PATIENCE_S)
        assert (echoed.status_code, echoed.content, echoed.headers["X-Query"]) == (201, b"x" * 70_000, "1")
    refused = requests.post(f"{serving.url}/echo", data=b"x" * 100_001, timeout=PATIENCE_S)
    assert (refused.status_code, refused.json()["error"]["details"]) == (413, {"limit_bytes": 100_000})
    code, log = serving.stop()
    assert code == 0, log
    assert re.search(r"^WARNING function unknown_model: .* call=\w+$", log, re.MULTILINE), log


def test_the_same_function_answers_over_http_where_there_is_no_socket(
    interpreter: str, box: tuple[SidecarProcess, int], tmp_path: Path
) -> None:
    sidecar, port = box
    write_adding_bundle(tmp_path / "adder", "adder", [1.0, 2.0])
    sidecar.admin.push(tmp_path / "adder")
    url = f"http://127.0.0.1:{port}"
    serving = Serving(interpreter, tmp_path, TRUNKLINE_URL=url)
    until(lambda: serving.status("/health/readiness") == 200)
    assert requests.post(serving.url, data=b"[[0.0, 0.0]]", timeout=PATIENCE_S).json() == {"sum": [[1.0, 2.0]], "by": url}
    assert serving.stop()[0] == 0


def test_a_fresh_functions_own_tests_pass(function: Path, interpreter: str, tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{function.parent / 'fresh'}"}
    code = "import tests.test_func as t; t.test_the_answer_names_the_inputs(); t.test_the_function_lives()"
    subprocess.run([interpreter, "-c", code], cwd=function.parent / "fresh", env=environment, check=True, timeout=PATIENCE_S)


def test_manifests_hold_what_func_reads_and_nothing_else() -> None:
    manifest = yaml.safe_load((ROOT / "manifest.yaml").read_text())
    assert manifest.keys() == REPOSITORY_KEYS
    assert [path.name for path in (ROOT / manifest["templates"]).iterdir() if path.is_dir() and path.name != "__pycache__"] == [
        "python"
    ]
    template = yaml.safe_load((ROOT / TEMPLATE / "manifest.yaml").read_text())
    assert template.keys() <= TEMPLATE_KEYS
    assert template["healthEndpoints"] == {"liveness": "/health/liveness", "readiness": "/health/readiness"}
    assert all(each.keys() == {"name", "value"} for each in template["runEnvs"])


def test_what_is_asked_of_pypi_is_what_the_client_is() -> None:
    client = tomllib.loads((SOURCE / "pyproject.toml").read_text())["project"]
    function = tomllib.loads((ROOT / TEMPLATE / "pyproject.toml").read_text())["project"]
    assert function["name"] == "function"
    assert json.loads(PUBLISHED) in function["dependencies"]
    assert PUBLISHED.startswith(f'"{client["name"]}[frame]')
    assert client["version"].startswith("0.1.")
    assert "frame" in client["optional-dependencies"]


def test_the_service_runs_the_openfaas_image_within_what_knative_allows() -> None:
    service = yaml.safe_load((ROOT / "knative" / "service.yaml").read_text())
    template = service["spec"]["template"]
    (container,) = template["spec"]["containers"]
    fprocess = yaml.safe_load((SOURCE / "template.yml").read_text())["fprocess"]
    assert container["command"] == fprocess.split(" ")
    assert template["metadata"]["labels"] == {"trunkline": "enabled"}
    # Reserved by Knative, as are these ports in its pods.
    assert not {each["name"] for each in container["env"]} & {"PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"}
    assert not {each["containerPort"] for each in container["ports"]} & {8008, 8012, 8013, 8022, 9090, 9091}
    assert container["readinessProbe"]["httpGet"]["path"] == "/_/trunkline/ready"
    # The probe, which queue-proxy goes on asking, finds a thread while all requests that may be under way are.
    threads = next(int(each["value"]) for each in container["env"] if each["name"] == "threads")
    assert threads > template["spec"]["containerConcurrency"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    # Any other volume would need a flag of the cluster's. This one may be missing, and a mount of it must be read-only.
    (volume,) = template["spec"]["volumes"]
    assert volume["secret"] == {"secretName": "trunkline-token", "optional": True}
    (mount,) = container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": str(Path(DEFAULT_CREDENTIAL).parent), "readOnly": True}
