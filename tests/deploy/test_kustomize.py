"""kustomize's folders are what the chart renders, built by kubectl."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from itertools import permutations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from sidecar.quotas import read_quotas
from tests.charts import CHART, KUSTOMIZE, Manifest, built, by_identity, rendered, tool
from tests.rows import ROOT

COMPONENTS = KUSTOMIZE / "components"
NAMES = sorted(each.name for each in COMPONENTS.iterdir())
# Any of them in any order, but that `gpu` comes after `csi`: it is for the pods of that, too.
ORDERS = [
    each
    for count in range(len(NAMES) + 1)
    for each in permutations(NAMES, count)
    if not {"csi", "gpu"} <= {*each} or each.index("csi") < each.index("gpu")
]
LEFT_OUT = ("helm.sh/chart", "app.kubernetes.io/managed-by")


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", KUSTOMIZE / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_helm(found: list[Manifest]) -> dict[tuple[str, str, str], Manifest]:
    for each in found:
        for label in LEFT_OUT:
            del each["metadata"]["labels"][label]
    return by_identity(found)


def test_what_was_written_from_the_chart_is_still_that(generate: ModuleType) -> None:
    for path, text in generate.files(tool("helm")).items():
        assert path.read_text() == text, f"{path.relative_to(ROOT)} is out of date; run deploy/kustomize/generate.py"


def values_of(components: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return what the chart is told for the same."""
    values: dict[str, Any] = {}
    if "csi" in components:
        values["attach"] = {"mode": "csi", "injection": "admissionPolicy"}
    if "tenants" in components:
        values["quotas"] = (COMPONENTS / "tenants" / "quotas.toml").read_text()
    return ("--values", str(CHART / "values-gpu.yaml")) if "gpu" in components else (), values


def combined(folder: Path, *components: str) -> Path:
    """Write a folder that has the base with some components, and copies of both; return it."""
    shutil.copytree(KUSTOMIZE, folder / "kustomize")
    named = {"resources": ["kustomize/base"], "components": [f"kustomize/components/{each}" for each in components]}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(named))
    return folder


@pytest.mark.parametrize("components", ORDERS, ids=lambda each: "+".join(each) or "base")
def test_base_and_components_are_the_chart_with_some_values(tmp_path: Path, components: tuple[str, ...]) -> None:
    made = by_identity(built(combined(tmp_path, *components)))
    namespace = made.pop(("Namespace", "", "trunkline"))
    assert namespace["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "privileged"}
    arguments, values = values_of(components)
    expected = without_helm(rendered(*arguments, values=values))
    assert made.keys() == expected.keys()
    for key, each in made.items():
        assert orderless(each) == orderless(expected[key]), key


def test_a_component_does_not_change_flags_that_it_does_not_know(tmp_path: Path) -> None:
    """Should the chart write its flags in another order, what is changed by place must not be another flag's value."""
    folder = combined(tmp_path, "gpu")
    base = folder / "kustomize" / "base" / "trunkline.yaml"
    base.write_text(base.read_text().replace("        - --device\n        - cpu\n", ""))
    with pytest.raises(AssertionError, match="args/1 failed: test failed"):
        built(folder)


def orderless(value: Any) -> Any:
    """Return a manifest in which mounts and volumes, and flags with their values, are in the order of the alphabet."""
    if isinstance(value, dict):
        return {key: in_pairs(each) if key == "args" else orderless(each) for key, each in value.items()}
    if isinstance(value, list):
        return sorted((orderless(each) for each in value), key=lambda each: json.dumps(each, sort_keys=True))
    return value


def in_pairs(arguments: list[str]) -> tuple[str, list[tuple[str, str]]]:
    command, *flags = arguments
    return command, sorted(zip(flags[::2], flags[1::2], strict=False))


def test_an_overlay_of_ones_own_sets_the_image(tmp_path: Path) -> None:
    """As docs/kubernetes.md writes it, in a folder beside a checkout."""
    shutil.copytree(KUSTOMIZE, tmp_path / "trunkline" / "deploy" / "kustomize")
    own = tmp_path / "own"
    own.mkdir()
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    (block,) = re.findall(r"^```yaml\n# kustomization.yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (own / "kustomization.yaml").write_text(block.replace("REGISTRY", "registry.example"))
    pod = by_identity(built(own))["DaemonSet", "trunkline", "trunkline"]["spec"]["template"]["spec"]
    images = {each["image"] for each in (*pod["initContainers"], *pod["containers"])}
    assert images == {"registry.example/trunkline:0.1.0"}


def test_the_example_of_a_quota_file_is_one() -> None:
    assert list(read_quotas(COMPONENTS / "tenants" / "quotas.toml").tenants) == ["vision"]
