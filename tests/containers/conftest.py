"""Both images, built from their Dockerfiles.

No image is pulled. What the Dockerfiles begin with is made here: a Debian with Python, by debootstrap, under a tag of its own;
of-watchdog's image, unless it is there, by the stand-in of ``tests.openfaas.watchdog``. pip asks in a build whom it asks here;
folders on this machine that it looks into are served to it for as long.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.containers.engine import docker
from tests.namespaces.test_confined import HANDLER as CONFINED
from tests.openfaas import faascli
from tests.rows import ROOT

PYTHON, DEBIAN, LOCAL = "3.11", "bookworm", "trunkline-local"
BASE = f"python:{PYTHON}-{LOCAL}"
WATCHDOG = re.findall(r"(\S+/of-watchdog:\S+)", (ROOT / "template/python3-trunkline/Dockerfile").read_text())[0]
ARGUMENTS = ("--build-arg", f"PYTHON_VERSION={PYTHON}", "--build-arg", f"DEBIAN_OS={LOCAL}", "--network", "host")
SIDECAR, LISTED, FUNCTION = "trunkline:tried", "trunkline:listed", "trunkline-function:tried"
HANDLER = """
from . import confined
from .classify import handler as classify


def handle(event, context):
    return (classify if event.path == "/picture" else confined).handle(event, context)
"""


@pytest.fixture(scope="module")
def engine() -> None:
    """A container engine that answers, and what the base is made with."""
    missing = [program for program in ("docker", "debootstrap", "curl") if shutil.which(program) is None]
    if missing or os.geteuid():
        pytest.fail(f"this takes root and: apt install docker.io debootstrap curl (missing: {missing})")
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
    handler = faascli.new(folder, "python3-trunkline", "tried")
    shutil.copytree(ROOT / "functions/classify", handler / "classify", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.move(handler / "classify/requirements.txt", handler / "requirements.txt")
    (handler / "__init__.py").touch()
    (handler / "handler.py").write_text(HANDLER)
    (handler / "confined.py").write_text(CONFINED)
    (handler / "handler_test.py").write_text("from .classify.handler_test import *\n")
    context = faascli.build(folder, "python3-trunkline", "tried", handler)
    docker("build", "--tag", FUNCTION, *ARGUMENTS, str(context))
    yield FUNCTION
    docker("rmi", "--force", FUNCTION)
