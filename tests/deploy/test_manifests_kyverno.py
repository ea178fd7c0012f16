"""Kyverno's rules, carried out by a stand-in that goes by Kyverno's reference: what pods they make. Not Kyverno's own engine.

Of that it knows what the chart's rules use: namespaces, preconditions and lists as JMESPath, one element after the other, and a
strategic merge patch with a conditional anchor.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import jmespath
import jsonpatch
import pytest

from sidecar.kubernetes.injection import LEFT_ALONE, MODES_OF_TENANTS, Injection, patch_of
from sidecar.kubernetes.names import ENABLED, LABEL
from tests.charts import MODES, NAMESPACE, TENANTS, Manifest, combination, named, with_tenants
from tests.deploy.test_manifests_policies import MOUNT, SOCKET, SOURCES, URL, merged, own_folder, pod

_ONE_VARIABLE = re.compile(r"\{\{ (.*) \}\}", re.DOTALL)


def substituted(value: Any, context: Manifest) -> Any:
    """Return a part of a rule with its variables in place."""
    if isinstance(value, dict):
        return {key: substituted(each, context) for key, each in value.items()}
    if isinstance(value, list):
        return [substituted(each, context) for each in value]
    found = _ONE_VARIABLE.fullmatch(value) if isinstance(value, str) else None
    return jmespath.search(found[1], context) if found else value


def holds(conditions: Manifest, context: Manifest) -> bool:
    for each in conditions.get("all", ()):
        key, value = substituted(each["key"], context), each["value"]
        match each["operator"]:
            case "Equals":
                is_met = key == value
            case "AnyNotIn":
                is_met = key not in value
            case other:
                raise AssertionError(f"nothing is known here of {other}")
        if not is_met:
            return False
    return True


def patched(resource: Manifest, patch: Manifest) -> Manifest:
    """Return what a strategic merge patch makes of a pod. An element with an anchor is for the one that it names."""
    patch = copy.deepcopy(patch)
    for container in patch["spec"].get("containers", ()):
        container["name"] = container.pop("(name)")
        assert any(each["name"] == container["name"] for each in resource["spec"]["containers"])
    made: Manifest = merged(resource, patch)
    return made


def matches(resources: Manifest, namespace: str, labels: Manifest) -> bool:
    for each in resources.get("any", ()):
        chosen = each["resources"]
        selector = chosen.get("namespaceSelector", {})
        expressions = selector.get("matchExpressions", ())
        assert all((one["key"], one["operator"]) == ("kubernetes.io/metadata.name", "NotIn") for one in expressions)
        if (
            namespace in chosen.get("namespaces", [namespace])
            and not any(namespace in one["values"] for one in expressions)
            and labels.items() >= chosen.get("selector", {}).get("matchLabels", {}).items()
        ):
            return True
    return False


def changed(mode: str, before: Manifest, namespace: str = "", labels: Manifest | None = None) -> Manifest:
    """Return the pod as the rules make it, one after the other; with a namespace, where tenants have sockets of their own."""
    found = with_tenants(mode, "kyverno") if namespace else combination(mode, "kyverno", False)
    made = {"metadata": {}, **copy.deepcopy(before)}
    labels = {LABEL: ENABLED} if labels is None else labels
    for rule in named(list(found), "ClusterPolicy", "trunkline")["spec"]["rules"]:
        if not matches(rule["match"], namespace, labels) or matches(rule.get("exclude", {}), namespace, labels):
            continue
        # Each rule sees what those before it have made.
        context: Manifest = {"request": {"object": made, "namespace": namespace}}
        if not holds(rule.get("preconditions", {}), context):
            continue
        for each in rule["mutate"].get("foreach", ()):
            for element in jmespath.search(each["list"], context):
                within = {**context, "element": element}
                if holds(each.get("preconditions", {}), within):
                    made = patched(made, substituted(each["patchStrategicMerge"], within))
        if "patchStrategicMerge" in rule["mutate"]:
            made = patched(made, substituted(rule["mutate"]["patchStrategicMerge"], context))
    return {"spec": made["spec"]}


def by_the_webhook(mode: str, before: Manifest, namespace: str = "") -> Manifest:
    whole = {"metadata": {"labels": {LABEL: ENABLED}}, **copy.deepcopy(before)}
    injection = Injection(mode, URL["value"], tenants=TENANTS if namespace else {}).of(namespace)
    made: Manifest = jsonpatch.apply_patch(whole, list(patch_of(whole, injection).operations))
    return {"spec": made["spec"]}


def without_requests(made: Manifest) -> Manifest:
    """Leave out what the API server adds by itself: a device that is limited is requested."""
    for container in made["spec"]["containers"]:
        container.get("resources", {}).pop("requests", None)
    return made


PODS = [
    pod({"name": "function"}),
    pod({"name": "function"}, *({"name": each} for each in LEFT_ALONE), volumes=[{"name": "a", "emptyDir": {}}]),
    pod({"name": "f", "env": [{"name": "A", "value": "x"}]}, {"name": "g", "resources": {"limits": {"cpu": "1"}}}),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("before", PODS)
def test_the_rules_make_of_a_pod_what_the_webhook_makes(mode: str, before: Manifest) -> None:
    after = changed(mode, before)
    assert without_requests(copy.deepcopy(after)) == by_the_webhook(mode, before)
    assert changed(mode, after) == after


@pytest.mark.parametrize("mode", SOURCES)
def test_a_pod_that_has_a_volume_of_that_name_stays_as_it_is(mode: str) -> None:
    taken = pod({"name": "function"}, volumes=[{"name": "trunkline", "emptyDir": {}}])
    assert changed(mode, taken) == taken


@pytest.mark.parametrize("mode", MODES_OF_TENANTS)
@pytest.mark.parametrize("namespace", [*TENANTS, "elsewhere", "vision"])
def test_whose_socket_a_pod_gets_is_said_by_its_namespace_and_not_by_the_pod(mode: str, namespace: str) -> None:
    liar = {"namespace": "default", "labels": {LABEL: ENABLED, "trunkline.dev/tenant": "text"}}
    after = changed(mode, {**PODS[0], "metadata": liar}, namespace)
    assert after == by_the_webhook(mode, PODS[0], namespace)
    own = namespace in TENANTS
    source = own_folder(TENANTS[namespace]) if own and mode == "hostPath" else SOURCES[mode]
    assert after["spec"]["volumes"] == [{"name": "trunkline", **source}]
    assert after["spec"]["containers"] == [
        {"name": "function", "volumeMounts": [MOUNT], "env": [SOCKET] if own else [SOCKET, URL]}
    ]


def test_other_pods_are_left_alone() -> None:
    for namespace, labels in (("kube-system", None), (NAMESPACE, None), ("default", {}), ("default", {LABEL: "disabled"})):
        assert changed("hostPath", PODS[0], namespace, labels) == PODS[0]
