"""What docs/injection.md and docs/scaling.md show is what the program does, and has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.cli.main import main
from sidecar.kubernetes.affinity import MOST_MODELS, label_of, preferred_terms
from sidecar.kubernetes.injection import LEFT_ALONE, MODES, Injection
from sidecar.kubernetes.names import DRIVER, ENABLED, FOLDER, HOST_FOLDER, LABEL, MODELS, RESOURCE, SOCKET, VOLUME

DOCS = Path(__file__).parents[2] / "docs"
INJECTION = (DOCS / "injection.md").read_text()
SCALING = (DOCS / "scaling.md").read_text()


def documents(text: str) -> list[Any]:
    return [each for block in re.findall(r"```yaml\n(.*?)```", text, re.S) for each in yaml.safe_load_all(block)]


def of_kind(text: str, kind: str) -> dict[str, Any]:
    (found,) = [each for each in documents(text) if each.get("kind") == kind]
    return dict(found)


@pytest.mark.parametrize(
    ("command", "text", "heading"),
    [
        ("webhook", INJECTION, "## The webhook"),
        ("device-plugin", INJECTION, "## The device plugin"),
        ("node-labels", SCALING, "## What nodes have"),
    ],
)
def test_every_option_is_in_the_table_of_its_command(command: str, text: str, heading: str) -> None:
    section = text.split(f"{heading}\n")[1].split("\n## ")[0]
    rows = "\n".join(re.findall(r"^\| (`--.*?) \|", section, re.M))
    options = {option for param in main.commands[command].params for option in param.opts if option.startswith("--")}
    assert set(re.findall(r"--[a-z-]+", rows)) == options


def test_each_mode_and_each_proxy_is_told() -> None:
    assert re.findall(r"^\| `(\w+)` \|", INJECTION.split("--mode")[1].split("\n\n")[0], re.M) == [
        "csi", "devicePlugin", "pvc", "hostPath", "none",
    ]  # fmt: skip
    assert set(MODES) == {"csi", "devicePlugin", "pvc", "hostPath", "none"}
    assert ", ".join(f"`{name}`" for name in LEFT_ALONE[:-1]) + f" and `{LEFT_ALONE[-1]}`" in INJECTION


def test_what_a_pod_says_is_what_is_looked_for() -> None:
    metadata = documents(INJECTION)[0]["metadata"]
    assert metadata["labels"] == {LABEL: ENABLED}
    assert list(metadata["annotations"]) == [MODELS]
    configured = of_kind(INJECTION, "MutatingWebhookConfiguration")["webhooks"][0]
    assert configured["objectSelector"]["matchLabels"] == {LABEL: ENABLED}
    assert configured["clientConfig"]["service"]["path"] == "/mutate"
    assert f"`{RESOURCE}: 1`" in INJECTION
    assert f"{MOST_MODELS} at most" in SCALING


def test_the_policy_gives_what_the_webhook_gives() -> None:
    policy = of_kind(INJECTION, "MutatingAdmissionPolicy")["spec"]
    assert policy["matchConstraints"]["objectSelector"]["matchLabels"] == {LABEL: ENABLED}
    given = policy["mutations"][0]["applyConfiguration"]["expression"]
    source = Injection("csi").volume_source()
    assert source == {"csi": {"driver": DRIVER, "readOnly": True}}
    assert f'driver: "{DRIVER}", readOnly: true' in given
    assert f'name: "{VOLUME}", mountPath: "{FOLDER}", readOnly: true' in given
    assert f'name: "TRUNKLINE_SOCKET", value: "{SOCKET}"' in given
    assert json.dumps(list(LEFT_ALONE)) in given


def test_the_claim_is_the_one_that_is_asked_for() -> None:
    claim, volume = of_kind(INJECTION, "PersistentVolumeClaim"), of_kind(INJECTION, "PersistentVolume")
    assert Injection("pvc").volume_source() == {
        "persistentVolumeClaim": {"claimName": claim["metadata"]["name"], "readOnly": True}
    }
    assert volume["spec"]["claimRef"] == {"namespace": claim["metadata"]["namespace"], "name": claim["metadata"]["name"]}
    assert claim["spec"]["volumeName"] == volume["metadata"]["name"]
    assert volume["spec"]["hostPath"]["path"] == HOST_FOLDER
    assert of_kind(INJECTION, "CSIDriver")["metadata"]["name"] == DRIVER


def test_terms_are_those_that_the_webhook_writes() -> None:
    shown: dict[str, Any] = {}
    for each in documents(SCALING):
        shown |= each.get("spec", {}).get("affinity", {}).get("nodeAffinity", {})
    assert shown["preferredDuringSchedulingIgnoredDuringExecution"] == preferred_terms(["classify"])
    (term,) = shown["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert term == {"matchExpressions": [{"key": label_of("classify"), "operator": "Exists"}]}


def test_rights_are_for_what_is_asked_and_no_more() -> None:
    assert of_kind(SCALING, "ClusterRole")["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]}]
    account = of_kind(SCALING, "ClusterRoleBinding")["subjects"][0]
    condition = of_kind(SCALING, "ValidatingAdmissionPolicy")["spec"]["matchConditions"][0]["expression"]
    assert f"system:serviceaccount:{account['namespace']}:{account['name']}" in condition
