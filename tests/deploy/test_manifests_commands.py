"""What the chart starts beside the sidecar takes what it is told, and the policies do to pods what the webhook does."""

from __future__ import annotations

import base64
import copy
import itertools
import json
from typing import Any

import jsonpatch
import pytest

from sidecar.cli.main import main
from sidecar.kubernetes import webhook
from sidecar.kubernetes.injection import LEFT_ALONE, MODES_OF_TENANTS, Injection, patch_of
from sidecar.kubernetes.names import DRIVER, ENABLED, LABEL, RESOURCE, SOCKET
from sidecar.kubernetes.review import answer
from tests.charts import INJECTIONS, MODES, TENANTS, Manifest, combination, containers, pods, rendered, with_tenants
from tests.deploy.test_manifests_policies import changed, pod

URL = "http://trunkline.trunkline.svc:9470"


def arguments() -> list[tuple[str, ...]]:
    """Return what containers of our image are told, each once."""
    found = [combination(mode, injection, False) for mode, injection in itertools.product(MODES, INJECTIONS)]
    found.append(tuple(rendered(values={"nodeLabels": {"enabled": True}})))
    found.append(tuple(rendered(values={"update": {"takeOver": True}})))
    told = {
        tuple(container["args"])
        for each in found
        for _, template in pods(each)
        for container in containers(template)
        if container["image"].startswith("trunkline:") and "command" not in container
    }
    return sorted(told)


def test_what_is_started_takes_the_flags_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NODE_NAME", "n1")
    commands = {told[0] for told in arguments()}
    assert commands == {"serve", "webhook", "device-plugin", "node-labels"}
    for command, *flags in arguments():
        # Reads flags and values, and runs nothing.
        main.commands[command].make_context(command, flags)


def socket_and_url(mode: str, before: Manifest) -> Manifest:
    """Return the pod as the webhook makes it."""
    whole = {"metadata": {"labels": {LABEL: ENABLED}}, **copy.deepcopy(before)}
    patch = patch_of(whole, Injection(mode, URL, host_path="/run/trunkline/public"))
    result: Manifest = jsonpatch.apply_patch(whole, list(patch.operations))
    return {"spec": result["spec"]}


def without_requests(made: Manifest) -> Manifest:
    """Leave out what the API server adds by itself: a device that is limited is requested."""
    made = copy.deepcopy(made)
    for container in made["spec"]["containers"]:
        container.get("resources", {}).pop("requests", None)
    return made


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "before",
    [
        pod({"name": "function"}),
        pod({"name": "function"}, *({"name": each} for each in LEFT_ALONE), volumes=[{"name": "a", "emptyDir": {}}]),
        pod(
            {"name": "f", "env": [{"name": "TRUNKLINE_URL", "value": "x"}]}, {"name": "g", "resources": {"limits": {"cpu": "1"}}}
        ),
    ],
)
def test_the_policy_makes_of_a_pod_what_the_webhook_makes(mode: str, before: Manifest) -> None:
    assert without_requests(changed(mode, before)) == socket_and_url(mode, before)


@pytest.mark.parametrize("mode", MODES_OF_TENANTS)
@pytest.mark.parametrize("namespace", [*TENANTS, "elsewhere"])
def test_the_webhook_is_told_the_tenants_that_the_policy_knows(
    mode: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (args,) = {
        tuple(container["args"])
        for _, template in pods(with_tenants(mode, "webhook"))
        for container in containers(template)
        if container["name"] == "webhook"
    }
    given: list[Injection] = []

    class Told:
        def __init__(self, injection: Injection, *rest: object, **more: object) -> None:
            given.append(injection)

        def run(self) -> None:
            pass

    monkeypatch.setattr(webhook, "WebhookServer", Told)
    monkeypatch.setattr(webhook, "listen", lambda *address: None)
    assert main.commands["webhook"].main(list(args[1:]), standalone_mode=False) is None
    before = pod({"name": "function"})
    whole = {"metadata": {"labels": {LABEL: ENABLED}, "namespace": "default"}, **before}
    review = {"uid": "u", "kind": {"group": "", "version": "v1", "kind": "Pod"}, "operation": "CREATE", "object": whole}
    asked = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": {**review, "namespace": namespace}}
    response = answer(json.dumps(asked).encode(), given[0])["response"]
    made = jsonpatch.apply_patch(whole, json.loads(base64.b64decode(response["patch"])))
    assert {"spec": made["spec"]} == changed(mode, before, namespace)


def test_names_are_the_same_everywhere() -> None:
    def texts(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [text for each in (*value, *value.values()) for text in texts(each)]
        return [text for each in value for text in texts(each)] if isinstance(value, list) else [str(value)]

    for mode, name in (("csi", DRIVER), ("devicePlugin", RESOURCE)):
        for injection in ("admissionPolicy", "kyverno"):
            said = " ".join(texts(list(combination(mode, injection, False))))
            assert name in said
            assert all(each in said for each in (*LEFT_ALONE, f"{LABEL} {ENABLED}" if injection == "kyverno" else ENABLED))
            assert (SOCKET in said) == (mode == "csi")
