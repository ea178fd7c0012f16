"""`make containers`: both images as a container engine builds and runs them. Not part of `make test`: it takes minutes, and root.

No image is pulled. What the Dockerfiles begin with is made here: a Debian with Python, by debootstrap, under a tag of its own;
of-watchdog's image, unless it is there, by the stand-in of ``tests.openfaas.watchdog``. pip asks in a build whom it asks here;
folders on this machine that it looks into are served to it for as long.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.bundles import write_adding_bundle
from tests.nodes import until
from tests.openfaas import faascli
from tests.rows import ROOT
from tests.unit.test_hardening import docker_run

# All of it, from an empty disk.
pytestmark = pytest.mark.timeout(3600)

PYTHON, DEBIAN, LOCAL = "3.11", "bookworm", "trunkline-local"
BASE = f"python:{PYTHON}-{LOCAL}"
WATCHDOG = re.findall(r"(\S+/of-watchdog:\S+)", (ROOT / "template/python3-trunkline/Dockerfile").read_text())[0]
ARGUMENTS = ("--build-arg", f"PYTHON_VERSION={PYTHON}", "--build-arg", f"DEBIAN_OS={LOCAL}", "--network", "host")
SIDECAR, LISTED, FUNCTION = "trunkline:tried", "trunkline:listed", "trunkline-function:tried"
# OpenFaaS runs functions as this user on Kubernetes.
FUNCTION_UID = 12000
HANDLER = """
import json

from trunkline import model


def handle(event, context):
    return json.dumps(model("adding")([[1.0, 2.0]]).tolist())
"""
ASK = """
import sys, urllib.error, urllib.request

try:
    with urllib.request.urlopen("http://127.0.0.1:8080/", b"", 60) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print("nobody listens:", error)
"""


def docker(*arguments: str, **options: Any) -> str:
    """Run docker; return what it printed."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE, check=False, text=True, **options)
    assert done.returncode == 0, f"docker {' '.join(arguments)[:200]} ended with {done.returncode}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def engine() -> None:
    """A container engine that answers, and what the base is made with."""
    missing = [program for program in ("docker", "debootstrap") if shutil.which(program) is None]
    if missing or os.geteuid():
        pytest.fail(f"this takes root and docker and debootstrap; apt install docker.io debootstrap (missing: {missing})")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.fail("docker does not answer; start its daemon: systemctl start docker, or dockerd")


class Files(SimpleHTTPRequestHandler):
    """Files, of which nothing is said."""

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextlib.contextmanager
def served(folders: set[str]) -> Iterator[dict[str, str]]:
    """Serve folders of this machine on loopback; yield their addresses."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Files, directory="/")) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {folder: f"http://127.0.0.1:{server.server_port}{folder}" for folder in folders}
        server.shutdown()


@pytest.fixture(scope="module")
def pip_settings() -> Iterator[str]:
    """A pip.conf that has pip in a build find what it finds here, as long as builds go on."""
    printed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, check=True, text=True
    ).stdout
    found = dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", printed, re.MULTILINE))
    lines = {key: found[key] for key in ("index-url", "extra-index-url", "find-links") if key in found}
    local = {
        re.sub("^file://", "", word) for line in lines.values() for word in line.split() if word.startswith(("file:///", "/"))
    }
    with served(local) as addresses:
        for key, line in lines.items():
            lines[key] = "\n  ".join(addresses.get(re.sub("^file://", "", word), word) for word in line.split())
        yield "[global]\ntrusted-host = 127.0.0.1\n" + "".join(f"{key} = {line}\n" for key, line in lines.items())


@pytest.fixture(scope="module")
def base(engine: None, pip_settings: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's own Python under the name that the Dockerfiles begin with, but for its tag."""
    root = tmp_path_factory.mktemp("debian")
    packages = "python3,python3-venv,python3-pip,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", DEBIAN, str(root)], check=True, stdout=subprocess.DEVNULL
    )
    (root / "usr/local/bin/python").symlink_to("/usr/bin/python3")
    (root / f"usr/lib/python{PYTHON}/EXTERNALLY-MANAGED").unlink()
    authorities = Path(os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt"))
    shutil.copy(authorities, root / "etc/ssl/certs/ca-certificates.crt")
    (root / "etc/pip.conf").write_text(pip_settings)
    with subprocess.Popen(["tar", "-C", str(root), "-c", "."], stdout=subprocess.PIPE) as packed:
        docker("import", "--change", "ENV PATH=/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "-", BASE, stdin=packed.stdout)
    yield BASE
    docker("rmi", "--force", BASE)


@pytest.fixture(scope="module")
def watchdog(engine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The image of of-watchdog: the real one where it is, else that of the stand-in."""
    if not subprocess.run(["docker", "image", "inspect", WATCHDOG], capture_output=True, check=False).returncode:
        yield "of-watchdog"
        return
    folder = tmp_path_factory.mktemp("watchdog")
    program = folder / "fwatchdog"
    program.write_text("#!/usr/bin/python3\n" + (ROOT / "tests/openfaas/watchdog.py").read_text())
    program.chmod(0o755)
    (folder / "Dockerfile").write_text("FROM scratch\nCOPY fwatchdog /fwatchdog\n")
    docker("build", "--quiet", "--tag", WATCHDOG, str(folder))
    yield "the stand-in"
    docker("rmi", "--force", WATCHDOG)


@pytest.fixture(scope="module")
def sidecar_image(base: str) -> Iterator[str]:
    # torch from the index that pip is told of: its own may be out of reach.
    docker("build", "--tag", SIDECAR, *ARGUMENTS, "--build-arg", "TORCH_INDEX=", str(ROOT))
    yield SIDECAR
    docker("rmi", "--force", SIDECAR)


@pytest.fixture(scope="module")
def function_image(base: str, watchdog: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("function")
    shutil.copytree(ROOT / "template", folder / "template", ignore=shutil.ignore_patterns("__pycache__"))
    handler = faascli.new(folder, "python3-trunkline", "adding")
    (handler / "handler.py").write_text(HANDLER)
    (handler / "handler_test.py").write_text("def test_it() -> None:\n    import handler\n\n    assert handler.handle\n")
    context = faascli.build(folder, "python3-trunkline", "adding", handler)
    docker("build", "--tag", FUNCTION, *ARGUMENTS, str(context))
    yield FUNCTION
    docker("rmi", "--force", FUNCTION)


@contextlib.contextmanager
def running(*arguments: str) -> Iterator[str]:
    """Run a container until the block ends; yield its id."""
    container = docker("run", "--detach", *arguments)
    try:
        yield container
    except BaseException:
        print(docker("logs", container, stderr=subprocess.STDOUT))
        raise
    finally:
        docker("rm", "--force", "--volumes", container)


def flags(folder: Path, image: str) -> list[str]:
    """Return how SECURITY.md runs the sidecar, with its sockets in ``folder``."""
    shown = [word.replace("/run/trunkline:", f"{folder}/run:") for word in docker_run() if word != "-d"]
    at = shown.index("--name")
    del shown[at : at + 2]
    return [image if word == "trunkline" else word.replace("trunkline-store", f"trunkline-{folder.name}") for word in shown]


def test_a_function_asks_the_sidecar_both_in_containers(
    sidecar_image: str, function_image: str, watchdog: str, tmp_path: Path
) -> None:
    write_adding_bundle(tmp_path / "adding", "adding", [10.0, 20.0])
    # As the documentation says: its folder belongs to its user.
    subprocess.run(["chmod", "-R", "a+rX", str(tmp_path / "adding")], check=True)
    (tmp_path / "run").mkdir()
    os.chown(tmp_path / "run", 10001, 10001)
    for parent in (tmp_path, *tmp_path.parents[:2]):
        parent.chmod(0o755)
    with running(*flags(tmp_path, sidecar_image)) as sidecar:
        until(lambda: healthy(sidecar))
        docker("cp", str(tmp_path / "adding"), f"{sidecar}:/var/lib/trunkline/adding")
        docker("exec", sidecar, "trunkline", "push", "/var/lib/trunkline/adding")
        confined = ("--network", "none", "--user", str(FUNCTION_UID), "--read-only", "--tmpfs", "/tmp", "--cap-drop", "ALL")
        mount = ("--volume", f"{tmp_path}/run/public:/run/trunkline:ro")
        with running(*confined, "--memory", "128m", *mount, function_image) as function:
            until(lambda: ask(function) == "200 [[11.0, 22.0]]")
            # Within what Docker allows before it kills.
            began_s = time.monotonic()
            docker("stop", sidecar)
            assert json.loads(docker("inspect", sidecar))[0]["State"]["ExitCode"] == 0
            assert time.monotonic() - began_s < 10
            # The sidecar is away, or the watchdog has not waited for as long as the function does.
            assert re.match("50[34] ", ask(function))
            docker("start", sidecar)
            until(lambda: ask(function) == "200 [[11.0, 22.0]]")
            assert json.loads(docker("inspect", function))[0]["State"]["OOMKilled"] is False
        print(f"asked through {watchdog}")


def healthy(container: str) -> bool:
    state = json.loads(docker("inspect", container))[0]["State"]
    assert state["Running"], docker("logs", container, stderr=subprocess.STDOUT)
    return bool(state["Health"]["Status"] == "healthy")


def ask(function: str) -> str:
    return docker("exec", function, "python", "-c", ASK)


def test_the_list_of_what_is_in_the_image_has_torch(sidecar_image: str) -> None:
    docker("build", "--target", "listed", "--tag", LISTED, *ARGUMENTS, "--build-arg", "TORCH_INDEX=", str(ROOT))
    try:
        found = json.loads(docker("run", "--rm", LISTED, "cat", "/sbom.cdx.json"))
    finally:
        docker("rmi", "--force", LISTED)
    names = {component["name"].lower().replace("_", "-") for component in found["components"]}
    assert {"torch", "flask", "gunicorn", "msgpack", "posix-ipc"} <= names
