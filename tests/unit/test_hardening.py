"""What SECURITY.md says about running the sidecar is true of the image and of its settings."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import yaml

from sidecar.cli.main import main
from sidecar.config import Settings, flag_of, parse_size
from tests.rows import ROOT, by_row

TEXT = (ROOT / "SECURITY.md").read_text()
IMAGE = (ROOT / "Dockerfile").read_text().partition(" AS ship\n")[2]


def fenced(language: str, beginning: str) -> str:
    """Return the block of code in that language that has ``beginning`` in it."""
    return next(block for block in re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL) if beginning in block)


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(fenced("yaml", "spec:"))["spec"]
    return found


def docker_run() -> list[str]:
    """Return the arguments with which the sidecar is run."""
    return shlex.split(fenced("sh", "docker run").partition("docker run")[2].replace("\\\n", " "))


@pytest.fixture(scope="module")
def docker() -> list[str]:
    return docker_run()


def written(image: str = IMAGE) -> set[str]:
    """Return the folders that the image says must be writable, and that for temporary files."""
    (volumes,) = re.findall(r"^VOLUME (\[.*\])$", image, re.MULTILINE)
    return {*yaml.safe_load(volumes), "/tmp"}


def uid() -> int:
    return int(re.findall(r"^USER (\d+):\d+$", IMAGE, re.MULTILINE)[0])


def serves(arguments: Sequence[str]) -> dict[str, int]:
    """Return the sizes that a ``serve`` is given; every flag must be one."""
    assert arguments[0] == "serve"
    flags = {flag_of(name): name for name in Settings.__dataclass_fields__}
    return {flags[flag]: parse_size(value) for flag, value in zip(arguments[1::2], arguments[2::2], strict=True)}


def test_the_pod_has_no_privilege(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": uid(),
        "runAsGroup": uid(),
        "fsGroup": uid(),
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    assert not any(pod[each] for each in ("automountServiceAccountToken", "hostNetwork", "hostPID", "hostIPC"))


def test_the_pod_may_write_where_the_image_says_and_nowhere_else(pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts.values()) == written()
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes.keys() == mounts.keys()
    host_paths = [volume["hostPath"]["path"] for volume in volumes.values() if "hostPath" in volume]
    assert host_paths == [mounts["sockets"], mounts["store"]]


def test_the_pod_is_probed_as_the_image_is(pod: dict[str, Any]) -> None:
    (command,) = re.findall(r"^HEALTHCHECK .* CMD (\[.*\])$", IMAGE, re.MULTILINE)
    assert pod["containers"][0]["readinessProbe"]["exec"]["command"] == yaml.safe_load(command)


def test_the_command_line_says_the_same_as_the_pod(docker: list[str], pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    options, arguments = docker[: docker.index("trunkline", docker.index("-v"))], docker[docker.index("serve") :]
    assert arguments == container["args"]
    values = dict(pairwise(options))
    assert {"--read-only"} <= set(options)
    assert values["--user"] == f"{uid()}:{uid()}"
    assert values["--cap-drop"] == "ALL"
    assert values["--security-opt"] == "no-new-privileges"
    assert values["--tmpfs"].startswith("/tmp:")
    assert {"core=0", "nofile=8192:8192"} <= set(options)
    mounted = {value.split(":")[1] for flag, value in pairwise(options) if flag == "-v"}
    assert mounted | {"/tmp"} == written()
    assert "--privileged" not in options


def test_what_is_set_fits_into_the_memory_limit(docker: list[str], pod: dict[str, Any]) -> None:
    (container,) = pod["containers"]
    sizes = serves(container["args"])
    needed = sizes["memory_budget_bytes"] + sizes["activation_budget_bytes"] + Settings.arena_total_bytes + (1 << 30)
    limit = container["resources"]["limits"]["memory"]
    assert needed <= parse_size(f"{limit}B")
    assert docker[docker.index("--memory") + 1] == limit.removesuffix("i").lower()


def test_the_ways_to_run_it_do_not_contradict_each_other() -> None:
    short = (ROOT / "docs" / "configuration.md").read_text().partition("## In a container")[2]
    command = shlex.split(short.partition("docker run -d")[2].partition("trunkline serve")[0].replace("\\\n", ""))
    assert {"--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"} <= set(command)
    assert {value.split(":")[1] for flag, value in pairwise(command) if flag == "-v"} | {"/tmp"} == written()


def test_what_follows_an_image_is_a_command() -> None:
    """The image begins with `trunkline` by itself."""
    pages = [ROOT / "SECURITY.md", *(ROOT / "docs").glob("*.md")]
    lines = [line for page in pages for line in re.findall("docker run .*", page.read_text().replace("\\\n", " "))]
    told = [words for line in lines for words in re.findall(r" -v \S+ +([\w.:-]+) +(\w+)(?= |$)", line)]
    assert {image for image, _ in told} == {"trunkline", "NEW_IMAGE"}
    assert {command for _, command in told} <= set(main.commands)
    assert len(told) >= 5


def test_nobody_is_told_an_address_that_does_not_exist() -> None:
    assert "@" not in TEXT.partition("## Reporting a hole")[2].partition("\n## ")[0]


def test_every_rule_is_kept_somewhere_and_tried() -> None:
    rules = re.findall(r"^\| ([SMG]\d+) \| [^|]+ \| \[(\w+)\]\((\S+)\) \| ([^|]+) \|$", TEXT, re.MULTILINE)
    counts = {"S": 7, "M": 9, "G": 13}
    assert [rule for rule, *_ in rules] == [f"{kind}{number}" for kind, count in counts.items() for number in range(1, count + 1)]
    tried = by_row()
    for rule, module, path, rows in rules:
        assert (ROOT / path).stem == module, rule
        assert (ROOT / path).is_file(), rule
        assert all(tried[row] for row in rows.split(", ")), rule
