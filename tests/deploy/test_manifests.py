"""What the chart renders, in all combinations, is what the API server takes, and means what it should."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from sidecar.cli.main import main
from sidecar.config import PREFIX, Settings, parse_size
from sidecar.kubernetes.injection import MODES_OF_TENANTS
from sidecar.supervisor import EXIT_GRACE_S
from tests.charts import (
    INJECTIONS,
    MODES,
    NAMESPACE,
    TENANTS,
    Manifest,
    chosen,
    combination,
    containers,
    named,
    of_kind,
    pods,
    rendered,
    with_tenants,
)
from tests.customresources import SCHEMAS

COMBINATIONS = list(itertools.product(MODES, INJECTIONS, (False, True)))
# The one that MutatingAdmissionPolicy is stable in, and the one that `internalTrafficPolicy` is.
NEWEST, OLDEST = "1.36", "1.26"
# What runs as root, and why it must: folders that belong to root.
ROOTS = {"prepare", "driver", "registrar", "device-plugin"}
everywhere = pytest.mark.parametrize(("mode", "injection", "gpu"), COMBINATIONS)


@functools.cache
def flaw(text: str, version: str) -> str | None:
    """Say what is wrong with a manifest."""
    manifest = json.loads(text)
    schema = SCHEMAS.get((manifest["apiVersion"], manifest["kind"]))
    try:
        if schema is None:
            kubernetes_validate.validate(manifest, version, strict=True)
        else:
            jsonschema.validate(manifest, schema)
    except jsonschema.ValidationError as error:
        return f"{manifest['kind']}: {error.json_path}: {error.message[:300]}"
    return None


def flaws(found: list[Manifest] | tuple[Manifest, ...], version: str) -> list[str]:
    said = (flaw(json.dumps(each, sort_keys=True), version) for each in found)
    return [each for each in said if each is not None]


@everywhere
def test_every_manifest_is_of_the_published_schema(mode: str, injection: str, gpu: bool) -> None:
    assert not flaws(combination(mode, injection, gpu), NEWEST)


@pytest.mark.parametrize("mode", MODES_OF_TENANTS)
@pytest.mark.parametrize("injection", INJECTIONS)
def test_what_tenants_have_of_their_own_is_of_the_schema(mode: str, injection: str) -> None:
    found = with_tenants(mode, injection)
    assert not flaws(found, NEWEST)
    volumes = {each["spec"]["claimRef"]["namespace"]: each["spec"]["hostPath"] for each in of_kind(found, "PersistentVolume")}
    expected = {space: {"path": f"/run/trunkline/tenants/{tenant}", "type": "Directory"} for space, tenant in TENANTS.items()}
    assert volumes == (expected if mode == "pvc" else {})


def test_what_all_clusters_get_is_of_the_oldest_schema_that_the_chart_is_for() -> None:
    for mode in MODES:
        found = list(combination(mode, "webhook", False))
        if mode == "pvc":
            values = chosen(mode, "webhook")
            values["attach"]["pvc"]["readOnlyPolicy"] = False  # type: ignore[index]
            left_out = [each["kind"] for each in found]
            found = rendered(values=values)
            left_out = [kind for kind in left_out if kind not in {each["kind"] for each in found}]
            assert left_out == ["ValidatingAdmissionPolicy", "ValidatingAdmissionPolicyBinding"]
        assert not flaws(found, OLDEST)


def test_names_that_look_like_numbers_are_names() -> None:
    """A namespace may be called 123, and so may a Secret."""
    values = chosen("pvc", "webhook") | {
        "nodeLabels": {"enabled": True},
        "priorityClassName": "7",
        "supplementalGroups": [20001, 10_000_000],
    }
    values["attach"]["pvc"] = {"namespaces": ["123", "7"]}  # type: ignore[index]
    found = rendered("--namespace", "456", values={**values, "http": {"tokensSecret": "8", "tlsSecret": "9"}, "quotas": "#"})
    assert not flaws(found, NEWEST)
    context = named(found, "DaemonSet", "trunkline")["spec"]["template"]["spec"]["securityContext"]
    assert context["supplementalGroups"] == [20001, 10_000_000]


def test_everything_that_may_be_said_is_of_the_schema() -> None:
    said: dict[str, object] = {
        "image": {"digest": "sha256:" + 64 * "0"},
        "imagePullSecrets": [{"name": "registry"}],
        "quotas": "[tenants.a]\ntokens = []\n",
        "pull": {
            "origins": ["https://models.example.com/"],
            "networks": ["10.0.0.0/8"],
            "models": [f"https://models.example.com/a/m@sha256:{64 * '0'}"],
            "signers": "ssh-ed25519 AAAA me",
        },
        "settings": {"queue_limit": 64, "log_format": "json"},
        "extraEnv": [{"name": "AWS_PROFILE", "valueFrom": {"secretKeyRef": {"name": "origin", "key": "profile"}}}],
        "http": {"tlsSecret": "tls"},
        "cpu": {"limit": "4"},
        "gpu": {"enabled": True, "count": 2, "runtimeClassName": "nvidia"},
        "podLabels": {"team": "ml"},
        "podAnnotations": {"note": "x"},
        "nodeSelector": {"pool": "inference"},
        "tolerations": [{"operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "priorityClassName": "system-node-critical",
        "seLinuxOptions": {"type": "spc_t", "level": "s0"},
        "serviceAccount": {"annotations": {"a": "b"}},
        "functions": {"namespaceLabels": {"functions": "yes"}},
        "networkPolicy": {"from": [{"podSelector": {}}], "egress": [{"ports": [{"port": 443}]}]},
        "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "attach": {
            "mode": "csi",
            "injection": "webhook",
            "webhook": {"certificates": "secret", "tlsSecret": "hook", "caBundle": "QUJD"},
        },
    }
    found = rendered(values=said)
    assert not flaws(found, NEWEST)
    (sidecar,) = named(found, "DaemonSet", "trunkline")["spec"]["template"]["spec"]["containers"]
    assert "cuda:0,cuda:1" in sidecar["args"]
    assert sidecar["resources"]["limits"]["nvidia.com/gpu"] == "2"
    assert named(found, "ConfigMap", "trunkline")["data"]["quotas.toml"].startswith("[tenants.a]\n")


def test_a_new_pod_takes_over_beside_the_old_one_where_that_is_said() -> None:
    found = rendered(values={"update": {"takeOver": True, "maxUnavailable": "10%"}})
    assert not flaws(found, NEWEST) + flaws(found, OLDEST)
    spec = named(found, "DaemonSet", "trunkline")["spec"]
    # Kubernetes takes no two of them that are not 0.
    assert spec["updateStrategy"]["rollingUpdate"] == {"maxSurge": "10%", "maxUnavailable": 0}
    (sidecar,) = spec["template"]["spec"]["containers"]
    probes = {kind: sidecar[f"{kind}Probe"]["exec"]["command"][3:] for kind in ("startup", "readiness", "liveness")}
    # What was taken over from has no endpoint, and is to be left alone.
    assert probes == {"startup": ["--own"], "readiness": ["--own"], "liveness": ["--live"]}
    assert not spec["template"]["spec"]["hostPID"]
    assert not any("hostPort" in port for port in sidecar["ports"])


def test_the_device_plugin_asks_with_a_token_where_there_is_one() -> None:
    attach = {"mode": "devicePlugin", "devicePlugin": {"tokenSecret": "plugin-token"}}
    found = rendered(values={"quotas": "[tenants.a]\n", "attach": attach})
    assert not flaws(found, NEWEST)
    spec = named(found, "DaemonSet", "trunkline-device-plugin")["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    (variable,) = container["env"]
    (folder,) = (each["mountPath"] for each in container["volumeMounts"] if each["name"] == "token")
    assert variable == {"name": "TRUNKLINE_TOKEN_FILE", "value": f"{folder}/token"}
    # It is root without any capability: what is not its own file it could not read.
    assert {"name": "token", "secret": {"secretName": "plugin-token", "defaultMode": 0o400}} in spec["volumes"]


def test_a_schema_refuses_what_it_does_not_know() -> None:
    found = [json.loads(json.dumps(each)) for each in combination("csi", "kyverno", False)]
    assert not flaws(found, NEWEST)
    for each in found:
        each["spec" if "spec" in each else "metadata"]["unheardOf"] = True
    assert len(flaws(found, NEWEST)) == len(found)


@everywhere
def test_containers_have_no_privilege_that_they_do_not_need(mode: str, injection: str, gpu: bool) -> None:
    for _, template in pods(combination(mode, injection, gpu)):
        spec = template["spec"]
        assert not any(spec.get(each) for each in ("hostNetwork", "hostPID", "hostIPC", "automountServiceAccountToken"))
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in containers(template):
            context, name = spec["securityContext"] | container["securityContext"], container["name"]
            assert context["readOnlyRootFilesystem"] is True
            assert context["capabilities"]["drop"] == ["ALL"]
            assert context["capabilities"].get("add", []) == (["CHOWN"] if name == "prepare" else [])
            assert context.get("privileged", False) is (name == "driver")
            assert context.get("allowPrivilegeEscalation") is (None if name == "driver" else False)
            if name not in ROOTS:
                assert (context["runAsNonRoot"], context["runAsUser"]) == (True, 10001)


def test_nothing_of_it_may_ask_the_api_server() -> None:
    for mode, injection, gpu in COMBINATIONS:
        found = combination(mode, injection, gpu)
        assert not {each["kind"] for each in found} & {"Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding", "Secret"}


def test_what_labels_nodes_may_do_that_and_nothing_else() -> None:
    values = {"nodeLabels": {"enabled": True}, "attach": {"mode": "csi", "injection": "webhook"}}
    found = rendered(values=values)
    assert not flaws(found, NEWEST)
    name = "trunkline-node-labels"
    (role,) = of_kind(found, "ClusterRole")
    assert role["rules"] == [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["patch"]}]
    (binding,) = of_kind(found, "ClusterRoleBinding")
    assert binding["subjects"] == [{"kind": "ServiceAccount", "name": name, "namespace": NAMESPACE}]
    assert not of_kind(found, "Role")
    with_token = [each for each, template in pods(found) if template["spec"]["automountServiceAccountToken"]]
    with_account = [each for each, template in pods(found) if template["spec"]["serviceAccountName"] == name]
    assert with_token == with_account == [name]
    policy = named(found, "ValidatingAdmissionPolicy", name)["spec"]
    assert policy["failurePolicy"] == "Fail"
    assert f"system:serviceaccount:{NAMESPACE}:{name}" in policy["matchConditions"][0]["expression"]
    binding = named(found, "ValidatingAdmissionPolicyBinding", name)
    assert binding["spec"] == {"policyName": name, "validationActions": ["Deny"]}
    (container,) = dict(pods(found))[name]["spec"]["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    egress = {each["metadata"]["name"] for each in of_kind(found, "NetworkPolicy") if "egress" in each["spec"]}
    assert egress == {name}


@everywhere
def test_volumes_are_there_and_used(mode: str, injection: str, gpu: bool) -> None:
    for name, template in pods(combination(mode, injection, gpu)):
        there = {volume["name"] for volume in template["spec"]["volumes"]}
        used = {mount["name"] for container in containers(template) for mount in container["volumeMounts"]}
        assert used == there, name


@everywhere
def test_selectors_match_their_own_pods_and_no_others(mode: str, injection: str, gpu: bool) -> None:
    found = combination(mode, injection, gpu)
    templates = dict(pods(found))
    for each in found:
        if each["kind"] in ("DaemonSet", "Deployment"):
            assert selected(each["spec"]["selector"], templates) == [each["metadata"]["name"]]
    services = {each["metadata"]["name"]: each for each in of_kind(found, "Service")}
    for name, service in services.items():
        (target,) = selected({"matchLabels": service["spec"]["selector"]}, templates)
        assert target == name
        ports = {port["name"] for container in containers(templates[target]) for port in container.get("ports", ())}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports
    assert services["trunkline"]["spec"]["internalTrafficPolicy"] == "Local"


def selected(selector: Manifest, templates: dict[str, Manifest]) -> list[str]:
    wanted = selector["matchLabels"].items()
    return [name for name, template in templates.items() if wanted <= template["metadata"]["labels"].items()]


@everywhere
def test_every_port_has_a_name(mode: str, injection: str, gpu: bool) -> None:
    for name, template in pods(combination(mode, injection, gpu)):
        for container in containers(template):
            assert all(port.get("name") for port in container.get("ports", ())), name


@pytest.mark.parametrize("drain_s", [0, 10, 3600])
def test_a_pod_is_given_more_than_the_drain_and_the_end_take(drain_s: int) -> None:
    spec = named(rendered(values={"drainTimeoutSeconds": drain_s}), "DaemonSet", "trunkline")["spec"]["template"]["spec"]
    (sidecar,) = spec["containers"]
    assert float(value_of(sidecar, "--drain-timeout")) == drain_s
    assert spec["terminationGracePeriodSeconds"] > drain_s + 2 * EXIT_GRACE_S


def value_of(container: Manifest, flag: str) -> str:
    return str(container["args"][container["args"].index(flag) + 1])


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("size_mib", [1024, 3_000_000])
def test_the_memory_limit_is_made_of_what_is_set(gpu: bool, size_mib: int) -> None:
    memory = {"weightsMiB": size_mib, "hostMiB": 2 * size_mib, "activationsMiB": 500, "arenasMiB": 250, "processesMiB": 1000}
    found = rendered(values={"memory": memory, "gpu": {"enabled": gpu}})
    spec = named(found, "DaemonSet", "trunkline")["spec"]["template"]["spec"]
    (sidecar,) = spec["containers"]
    assert parse_size(value_of(sidecar, "--memory-budget")) == size_mib << 20
    host_mib = 2 * size_mib + 64 if gpu else size_mib
    assert parse_size(sidecar["resources"]["limits"]["memory"] + "B") == (host_mib + 1750) << 20
    assert sidecar["resources"]["requests"]["memory"] == sidecar["resources"]["limits"]["memory"]
    (shm,) = (volume["emptyDir"] for volume in spec["volumes"] if volume["name"] == "shm")
    # With the ledger: less, and the sidecar would take memory that a container's end takes with it.
    assert parse_size(shm["sizeLimit"] + "B") >= (host_mib << 20) + (5 << 20)
    assert shm["medium"] == "Memory"


def test_what_is_set_is_a_setting_and_each_can_be_set() -> None:
    schema_keys = settings_of_the_schema()
    given = {"queue_limit": 2_000_000, "watchdog_s": 2.5, "packing": False, "log_format": "json"}
    found = rendered(values={"settings": given})
    (sidecar,) = named(found, "DaemonSet", "trunkline")["spec"]["template"]["spec"]["containers"]
    variables = {each["name"]: each["value"] for each in sidecar["env"]}
    assert variables == {
        "TRUNKLINE_QUEUE_LIMIT": "2000000",
        "TRUNKLINE_WATCHDOG_S": "2.5",
        "TRUNKLINE_PACKING": "false",
        "TRUNKLINE_LOG_FORMAT": "json",
    }
    fields = set(Settings.__dataclass_fields__)
    assert {name.removeprefix(PREFIX).lower() for name in variables} <= fields
    # What the chart has values of its own for, or what is not the operator's to choose in a pod.
    own = {option for option in serve_options(everything=True) if option in fields}
    assert schema_keys == fields - own - {"run_dir", "store_dir"}


def settings_of_the_schema() -> set[str]:
    from tests.charts import CHART

    schema = json.loads((CHART / "values.schema.json").read_text())
    return set(schema["properties"]["settings"]["propertyNames"]["enum"])


def serve_options(*, everything: bool) -> set[str]:
    """Return the settings that the chart gives as flags, with all that it can be told."""
    values: dict[str, object] = {}
    if everything:
        values = {
            "quotas": "[tenants.a]\n",
            "pull": {
                "origins": ["file:///x"],
                "networks": ["10.0.0.0/8"],
                "models": [f"file:///x/m@sha256:{64 * '0'}"],
                "signers": "x",
            },
            "http": {"tlsSecret": "tls"},
            "gpu": {"enabled": True},
        }
    (sidecar,) = named(rendered(values=values), "DaemonSet", "trunkline")["spec"]["template"]["spec"]["containers"]
    options = {flag: option.name for option in main.commands["serve"].params for flag in option.opts}
    return {str(options[flag]) for flag in sidecar["args"] if flag.startswith("--")}


@pytest.mark.parametrize("gpu", [False, True])
def test_the_sidecar_takes_the_flags_that_it_is_given(gpu: bool) -> None:
    (sidecar,) = named(combination("none", "none", gpu), "DaemonSet", "trunkline")["spec"]["template"]["spec"]["containers"]
    command, *flags = sidecar["args"]
    known = {flag for option in main.commands[command].params for flag in option.opts}
    assert set(flags[::2]) <= known
    assert len(flags) % 2 == 0


def test_the_network_lets_functions_in_and_who_is_named_and_nobody_else() -> None:
    prometheus = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
    egress = [{"to": [{"ipBlock": {"cidr": "10.1.0.0/16"}}], "ports": [{"port": 443, "protocol": "TCP"}]}]
    values = {"networkPolicy": {"from": [prometheus], "egress": egress}, "functions": {"namespaceLabels": {"functions": "yes"}}}
    found = rendered(values=values)
    templates = dict(pods(found))
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "NetworkPolicy")}
    assert selected(policies["trunkline"]["podSelector"], templates) == list(templates)
    assert sorted(policies["trunkline"]["policyTypes"]) == ["Egress", "Ingress"]
    assert not policies["trunkline"].keys() & {"ingress", "egress"}
    own = {"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["kube-system", NAMESPACE]}
    functions = {
        "namespaceSelector": {"matchLabels": {"functions": "yes"}, "matchExpressions": [own]},
        "podSelector": {"matchLabels": {"trunkline": "enabled"}},
    }
    ports = [{"port": "http", "protocol": "TCP"}]
    assert policies["trunkline-sidecar"]["ingress"] == [{"from": [functions, prometheus], "ports": ports}]
    assert policies["trunkline-sidecar"]["policyTypes"] == ["Ingress"]
    assert policies["trunkline-egress"]["egress"] == egress
    assert policies["trunkline-egress"]["policyTypes"] == ["Egress"]
    assert policies.keys() == {"trunkline", "trunkline-sidecar", "trunkline-egress"}
    for name in ("trunkline-sidecar", "trunkline-egress"):
        assert selected(policies[name]["podSelector"], templates) == ["trunkline"]


def test_without_tcp_nobody_is_let_in() -> None:
    found = rendered(values={"http": {"enabled": False}, "attach": {"mode": "csi", "injection": "webhook"}})
    policies = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "NetworkPolicy")}
    # The API server is in no pod, so the webhook's port is open.
    assert policies.keys() == {"trunkline", "trunkline-webhook"}
    assert policies["trunkline-webhook"]["ingress"] == [{"ports": [{"port": "https", "protocol": "TCP"}]}]
    assert selected(policies["trunkline-webhook"]["podSelector"], dict(pods(found))) == ["trunkline-webhook"]
    (sidecar,) = named(found, "DaemonSet", "trunkline")["spec"]["template"]["spec"]["containers"]
    assert value_of(sidecar, "--admin-port") == "0"
    assert "ports" not in sidecar
    assert not any(each["metadata"]["name"] == "trunkline" for each in of_kind(found, "Service"))


def test_what_the_api_server_believes_outlives_the_webhooks_certificate() -> None:
    """One that vouches for itself is replaced in the API server before it is in the pods."""
    found = combination("csi", "webhook", False)
    (secret,) = (
        each["secret"]["secretName"]
        for each in named(found, "Deployment", "trunkline-webhook")["spec"]["template"]["spec"]["volumes"]
        if "secret" in each
    )
    certificates = {each["spec"]["secretName"]: each for each in of_kind(found, "Certificate")}
    issuers = {each["metadata"]["name"]: each["spec"] for each in of_kind(found, "Issuer")}
    leaf = certificates[secret]
    hook: Any = named(found, "MutatingWebhookConfiguration", "trunkline")
    assert hook["metadata"]["annotations"]["cert-manager.io/inject-ca-from"] == f"{NAMESPACE}/{leaf['metadata']['name']}"
    service = hook["webhooks"][0]["clientConfig"]["service"]
    assert leaf["spec"]["dnsNames"] == [f"{service['name']}.{service['namespace']}.svc"]
    authority = certificates[issuers[leaf["spec"]["issuerRef"]["name"]]["ca"]["secretName"]]
    assert authority["spec"]["isCA"] is True
    assert authority["spec"]["duration"] == "87600h"
    assert issuers[authority["spec"]["issuerRef"]["name"]] == {"selfSigned": {}}


@pytest.mark.parametrize("injection", ["webhook", "admissionPolicy", "kyverno"])
def test_only_labelled_pods_of_others_are_changed_and_none_is_refused(injection: str) -> None:
    found = combination("csi", injection, False)
    kind = {"webhook": "MutatingWebhookConfiguration", "admissionPolicy": "MutatingAdmissionPolicy", "kyverno": "ClusterPolicy"}
    rule: Any = named(found, kind[injection], "trunkline")
    if injection == "webhook":
        (rule,) = rule["webhooks"]
        assert (rule["failurePolicy"], rule["sideEffects"]) == ("Ignore", "None")
        assert rule["timeoutSeconds"] <= 10
        pod, namespace = rule["objectSelector"], rule["namespaceSelector"]
        assert rule["rules"][0]["resources"] == ["pods"]
    elif injection == "admissionPolicy":
        assert rule["spec"]["failurePolicy"] == "Ignore"
        pod, namespace = (rule["spec"]["matchConstraints"][each] for each in ("objectSelector", "namespaceSelector"))
        assert named(found, "MutatingAdmissionPolicyBinding", "trunkline")["spec"] == {"policyName": "trunkline"}
    else:
        assert rule["spec"]["webhookConfiguration"]["failurePolicy"] == "Ignore"
        (one,) = {json.dumps(each["match"], sort_keys=True) for each in rule["spec"]["rules"]}
        resources = json.loads(one)["any"][0]["resources"]
        pod, namespace = resources["selector"], resources["namespaceSelector"]
    assert pod == {"matchLabels": {"trunkline": "enabled"}}
    (expression,) = namespace["matchExpressions"]
    assert (expression["operator"], expression["values"]) == ("NotIn", ["kube-system", NAMESPACE])


@pytest.mark.parametrize(("mode", "injection"), [(mode, each) for mode in MODES for each in ("admissionPolicy", "kyverno")])
def test_functions_are_given_what_their_mode_takes(mode: str, injection: str) -> None:
    kind = {"admissionPolicy": "MutatingAdmissionPolicy", "kyverno": "ClusterPolicy"}[injection]
    text = json.dumps(named(combination(mode, injection, False), kind, "trunkline")["spec"])
    sources = {"csi": "csi.trunkline.dev", "pvc": "claimName", "hostPath": "/run/trunkline/public"}
    for each, source in sources.items():
        assert (source in text) == (each == mode)
    assert ("trunkline.dev/socket" in text) == (mode == "devicePlugin")
    assert ("volumeMounts: [" in text or '"volumeMounts"' in text) == (mode in sources)
    assert ("/run/trunkline/trunkline.sock" in text) == (mode in sources)
    assert "http://trunkline.trunkline.svc:9470" in text
    assert all(each in text for each in ("queue-proxy", "istio-proxy", "linkerd-proxy"))


def has_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(has_null(each) for each in value.values())
    return any(has_null(each) for each in value) if isinstance(value, list) else value is None


@pytest.mark.parametrize("http", [{}, {"enabled": False}, {"tlsSecret": "tls"}])
def test_nothing_is_null_which_in_a_patch_would_take_away_what_a_pod_has(http: dict[str, object]) -> None:
    for mode, injection in itertools.product(MODES, INJECTIONS):
        # There would be nothing to inject.
        if http and mode == "none" and injection != "none":
            continue
        found = rendered(values={**chosen(mode, injection), "http": http}) if http else combination(mode, injection, False)
        assert not [each["kind"] for each in found if has_null(each)], (mode, injection)


def test_functions_are_given_the_folder_public_and_nothing_else_of_the_sidecar() -> None:
    for mode, injection, gpu in COMBINATIONS:
        for each in combination(mode, injection, gpu):
            if each["kind"] == "PersistentVolume":
                assert each["spec"]["hostPath"]["path"] == "/run/trunkline/public"
            if each["kind"] == "DaemonSet" and each["metadata"]["name"] != "trunkline":
                paths = set(host_paths(each["spec"]["template"]))
                assert "/run/trunkline" not in paths
                assert "/var/lib/trunkline" not in paths


def host_paths(template: Manifest) -> Iterator[str]:
    for volume in template["spec"]["volumes"]:
        if "hostPath" in volume:
            assert PurePosixPath(volume["hostPath"]["path"]).is_absolute()
            yield volume["hostPath"]["path"]


def test_the_image_is_taken_by_what_is_most_exact() -> None:
    digest = "sha256:" + 64 * "a"
    for image, expected in (
        ({}, "trunkline:0.1.0"),
        ({"repository": "registry.example/trunkline", "tag": "2"}, "registry.example/trunkline:2"),
        ({"tag": "2", "digest": digest}, f"trunkline@{digest}"),
    ):
        (template,) = (template for _, template in pods(rendered(values={"image": image})))
        assert {container["image"] for container in containers(template)} == {expected}
