"""The expressions of the admission policies, evaluated: what pods they make, and whose changes of nodes they refuse."""

from __future__ import annotations

import copy
import re
from typing import Any

import cel
import pytest

from sidecar.kubernetes.injection import MODES_OF_TENANTS
from tests.charts import MODES, TENANTS, Manifest, combination, named, rendered, with_tenants

MOUNT = {"name": "trunkline", "mountPath": "/run/trunkline", "readOnly": True}
SOCKET = {"name": "TRUNKLINE_SOCKET", "value": "/run/trunkline/trunkline.sock"}
URL = {"name": "TRUNKLINE_URL", "value": "http://trunkline.trunkline.svc:9470"}
SOURCES = {
    "csi": {"csi": {"driver": "csi.trunkline.dev", "readOnly": True}},
    "pvc": {"persistentVolumeClaim": {"claimName": "trunkline", "readOnly": True}},
    "hostPath": {"hostPath": {"path": "/run/trunkline/public", "type": "DirectoryOrCreate"}},
}
# By what the API server tells the elements of a pod's lists apart, and so merges them.
KEYS = {"containers": "name", "volumes": "name", "env": "name", "volumeMounts": "mountPath"}


def merged(old: Any, new: Any, field: str = "") -> Any:
    """Return what server-side apply makes of a part of a pod."""
    if isinstance(new, dict):
        return {**old, **{key: merged(old[key], each, key) if key in old else each for key, each in new.items()}}
    if isinstance(new, list):
        key = KEYS[field]
        added = {each[key]: each for each in new}
        kept = [merged(each, added.pop(each[key])) if each[key] in added else each for each in old]
        return [*kept, *added.values()]
    return new


def changed(mode: str, pod: Manifest, namespace: str = "") -> Manifest:
    """Return the pod as the policy makes it; with a namespace, as that does where tenants have sockets of their own."""
    found = with_tenants(mode, "admissionPolicy") if namespace else combination(mode, "admissionPolicy", False)
    spec = named(found, "MutatingAdmissionPolicy", "trunkline")["spec"]
    context: Manifest = {"object": copy.deepcopy(pod), "request": {"namespace": namespace}, "variables": {}}
    if not all(cel.evaluate(each["expression"], context) for each in spec.get("matchConditions", ())):
        return pod
    for each in spec.get("variables", ()):
        context["variables"][each["name"]] = cel.evaluate(each["expression"], context)
    (mutation,) = spec["mutations"]
    # The API server has a type for each place of a pod, and no other evaluator does: to merge them, maps will do.
    expression = re.sub(r"\bObject[.\w]*\{", "{", mutation["applyConfiguration"]["expression"])
    expression = re.sub(r"([{,]\s*)(\w+):", r'\1"\2":', expression)
    result: Manifest = merged(pod, cel.evaluate(expression, context))
    return result


def pod(*containers: Manifest, **spec: Any) -> Manifest:
    return {"spec": {"containers": list(containers), **spec}}


@pytest.mark.parametrize("mode", MODES)
def test_a_pod_gets_the_socket_once_and_keeps_what_it_has(mode: str) -> None:
    own = {"name": "data", "mountPath": "/data"}
    before = pod(
        {"name": "function", "image": "f"},
        {"name": "queue-proxy", "image": "q"},
        {
            "name": "other",
            "image": "o",
            "env": [{"name": "A", "value": "1"}],
            "volumeMounts": [own],
            "resources": {"limits": {"cpu": "1"}},
        },
        volumes=[{"name": "data", "emptyDir": {}}],
    )
    after = changed(mode, before)
    function, proxy, other = after["spec"]["containers"]
    assert proxy == {"name": "queue-proxy", "image": "q"}
    mounts = mode in SOURCES
    assert function["env"] == ([SOCKET, URL] if mounts else [URL])
    assert other["env"][0] == {"name": "A", "value": "1"}
    assert function.get("volumeMounts") == ([MOUNT] if mounts else None)
    assert other["volumeMounts"] == ([own, MOUNT] if mounts else [own])
    volumes = [{"name": "trunkline", **SOURCES[mode]}] if mounts else []
    assert after["spec"]["volumes"] == [{"name": "data", "emptyDir": {}}, *volumes]
    device = {"trunkline.dev/socket": "1"}
    assert function.get("resources") == ({"requests": device, "limits": device} if mode == "devicePlugin" else None)
    assert other["resources"]["limits"]["cpu"] == "1"
    assert changed(mode, after) == after


@pytest.mark.parametrize("mode", SOURCES)
def test_a_pod_without_any_volume_gets_one(mode: str) -> None:
    assert changed(mode, pod({"name": "function"}))["spec"]["volumes"] == [{"name": "trunkline", **SOURCES[mode]}]


@pytest.mark.parametrize("mode", SOURCES)
def test_what_has_the_name_or_the_place_already_stays(mode: str) -> None:
    taken = pod({"name": "function"}, volumes=[{"name": "trunkline", "emptyDir": {}}])
    assert changed(mode, taken) == taken
    mounted = {"name": "function", "volumeMounts": [{"name": "own", "mountPath": "/run/trunkline"}]}
    (container,) = changed(mode, pod(mounted, volumes=[{"name": "own", "emptyDir": {}}]))["spec"]["containers"]
    assert container == mounted
    named_so = {
        "name": "function",
        "env": [{"name": "TRUNKLINE_URL", "value": "mine"}, {"name": "TRUNKLINE_SOCKET", "value": "mine"}],
    }
    (container,) = changed(mode, pod(named_so))["spec"]["containers"]
    assert container["env"] == named_so["env"]


def own_folder(tenant: str) -> Manifest:
    return {"hostPath": {"path": f"/run/trunkline/tenants/{tenant}", "type": "Directory"}}


@pytest.mark.parametrize("mode", MODES_OF_TENANTS)
@pytest.mark.parametrize("namespace", [*TENANTS, "elsewhere", "vision"])
def test_whose_socket_a_pod_gets_is_said_by_its_namespace_and_not_by_the_pod(mode: str, namespace: str) -> None:
    liar = {"namespace": "default", "labels": {"trunkline": "enabled", "trunkline.dev/tenant": "text", "tenant": "text"}}
    after = changed(mode, {**pod({"name": "function"}), "metadata": liar}, namespace)
    (volume,), (container,) = after["spec"]["volumes"], after["spec"]["containers"]
    own = namespace in TENANTS
    source = own_folder(TENANTS[namespace]) if own and mode == "hostPath" else SOURCES[mode]
    assert volume == {"name": "trunkline", **source}
    # A tenant that has a socket of its own is nobody over HTTP.
    assert container["env"] == ([SOCKET] if own else [SOCKET, URL])
    assert changed(mode, after, namespace) == after


ACCOUNT = "system:serviceaccount:trunkline:trunkline-node-labels"
OWN_NODE = {"authentication.kubernetes.io/node-name": ["n1"]}
MODEL = "model.trunkline.dev/resnet"


def node(name: str = "n1", *, spec: object = None, **metadata: object) -> Manifest:
    return {"metadata": {"name": name, **metadata}, "spec": spec or {"podCIDR": "10.0.0.0/24"}}


def refusals(user: str, extra: Manifest, old: Manifest | None, new: Manifest) -> list[str] | None:
    """Return why a change of a node is refused; None where the policy does not look at it."""
    found = rendered(values={"nodeLabels": {"enabled": True}})
    policy = named(found, "ValidatingAdmissionPolicy", "trunkline-node-labels")["spec"]
    context: Manifest = {"request": {"userInfo": {"username": user, "extra": extra}}, "object": new, "oldObject": old}
    if not all(cel.evaluate(each["expression"], context) for each in policy["matchConditions"]):
        return None
    context["variables"] = {each["name"]: cel.evaluate(each["expression"], context) for each in policy["variables"]}
    return [each["message"] for each in policy["validations"] if not cel.evaluate(each["expression"], context)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (node(), node(labels={MODEL: "resident"})),
        (node(labels={"zone": "a", MODEL: "stored"}), node(labels={"zone": "a", "model.trunkline.dev/bert": "stored"})),
        (node(labels={"zone": "a", MODEL: "stored"}), node(labels={"zone": "a"})),
        (node(annotations={"a": "b"}), node(annotations={"a": "b"}, labels={MODEL: "resident"})),
        (
            node(finalizers=["a"], ownerReferences=[{"uid": "1"}]),
            node(finalizers=["a"], ownerReferences=[{"uid": "1"}], labels={MODEL: "stored"}),
        ),
    ],
)
def test_a_node_may_be_labelled_with_its_models(old: Manifest, new: Manifest) -> None:
    assert refusals(ACCOUNT, OWN_NODE, old, new) == []


@pytest.mark.parametrize(
    ("extra", "old", "new"),
    [
        (OWN_NODE, node("n2"), node("n2", labels={MODEL: "resident"})),
        ({}, node(), node(labels={MODEL: "resident"})),
        (OWN_NODE, None, node(labels={MODEL: "resident"})),
        (OWN_NODE, node(), node(labels={"zone": "b"})),
        (OWN_NODE, node(labels={"zone": "a"}), node(labels={"zone": "b"})),
        (OWN_NODE, node(labels={"zone": "a"}), node()),
        (OWN_NODE, node(), node(spec={"taints": []})),
        (OWN_NODE, node(), node(annotations={"a": "b"})),
        # Whose owner does not exist is collected as garbage.
        (OWN_NODE, node(), node(ownerReferences=[{"kind": "Node", "name": "none", "uid": "1"}])),
        (OWN_NODE, node(ownerReferences=[{"uid": "1"}]), node()),
        (OWN_NODE, node(), node(finalizers=["example.com/stays"])),
        (OWN_NODE, node(finalizers=["example.com/stays"]), node()),
    ],
)
def test_nothing_else_of_a_node_may_be_changed(extra: Manifest, old: Manifest | None, new: Manifest) -> None:
    assert refusals(ACCOUNT, extra, old, new)


def test_what_others_do_with_nodes_is_not_looked_at() -> None:
    assert refusals("system:node:n1", {}, node(), node(labels={"zone": "b"})) is None


def claiming(**claim: object) -> Manifest:
    return pod({"name": "a"}, volumes=[{"name": "other", "emptyDir": {}}, {"name": "v", "persistentVolumeClaim": claim}])


@pytest.mark.parametrize(
    ("made", "is_let_in"),
    [
        (pod({"name": "a"}), True),
        (pod({"name": "a"}, volumes=[{"name": "trunkline", "emptyDir": {}}]), True),
        (claiming(claimName="trunkline", readOnly=True), True),
        (claiming(claimName="trunkline", readOnly=False), False),
        (claiming(claimName="trunkline"), False),
        (claiming(claimName="another"), True),
    ],
)
def test_whoever_claims_the_folder_for_writing_is_not_let_in(made: Manifest, is_let_in: bool) -> None:
    found = combination("pvc", "none", False)
    policy = named(found, "ValidatingAdmissionPolicy", "trunkline-claims")["spec"]
    assert policy["matchConstraints"]["namespaceSelector"]["matchExpressions"][0]["values"] == ["openfaas-fn", "default"]
    (rule,) = policy["validations"]
    assert cel.evaluate(rule["expression"], {"object": made}) is is_let_in


def test_what_the_policy_adds_is_let_in() -> None:
    (rule,) = named(combination("pvc", "none", False), "ValidatingAdmissionPolicy", "trunkline-claims")["spec"]["validations"]
    assert cel.evaluate(rule["expression"], {"object": changed("pvc", pod({"name": "a"}))})
