"""What pods are given: the patch, applied as the API server applies it, to pods of every shape."""

from __future__ import annotations

import copy
from typing import Any

import jsonpatch
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sidecar.kubernetes.affinity import MOST_MODELS, label_of, preferred_terms
from sidecar.kubernetes.injection import MODES, Injection, UnreadablePod, patch_of
from sidecar.kubernetes.jsonpatch import Additions, pointer

URL = "http://trunkline.trunkline.svc:9470"
MOUNT = {"name": "trunkline", "mountPath": "/run/trunkline", "readOnly": True}
SOCKET = {"name": "TRUNKLINE_SOCKET", "value": "/run/trunkline/trunkline.sock"}
AT_URL = {"name": "TRUNKLINE_URL", "value": URL}
CSI = {"name": "trunkline", "csi": {"driver": "csi.trunkline.dev", "readOnly": True}}
PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


def pod_of(*containers: dict[str, Any], models: str = "", **spec: Any) -> dict[str, Any]:
    annotations = {"trunkline.dev/models": models} if models else {}
    metadata = {"name": "f", "labels": {"trunkline": "enabled"}, "annotations": annotations}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": list(containers), **spec}}


def patched(pod: dict[str, Any], injection: Injection) -> dict[str, Any]:
    before = copy.deepcopy(pod)
    after = jsonpatch.apply_patch(pod, list(patch_of(pod, injection).operations))
    assert pod == before
    return dict(after)


def test_a_pod_without_the_label_is_left_alone() -> None:
    for labels in ({}, None, {"trunkline": "disabled"}, {"trunkline": True}, {"app": "f"}):
        pod = pod_of({"name": "f"}, models="a")
        pod["metadata"]["labels"] = labels
        assert not patch_of(pod, Injection("csi", URL)).operations
    assert not patch_of({}, Injection("csi", URL)).operations


@pytest.mark.parametrize(
    ("mode", "source"),
    [
        ("csi", {"csi": {"driver": "csi.trunkline.dev", "readOnly": True}}),
        ("pvc", {"persistentVolumeClaim": {"claimName": "claimed", "readOnly": True}}),
        ("hostPath", {"hostPath": {"path": "/run/elsewhere", "type": "DirectoryOrCreate"}}),
    ],
)
def test_a_volume_is_mounted_in_each_container(mode: str, source: dict[str, Any]) -> None:
    injection = Injection(mode, URL, "/run/elsewhere", "claimed")
    spec = patched(pod_of({"name": "a"}, {"name": "b"}), injection)["spec"]
    assert spec["volumes"] == [{"name": "trunkline", **source}]
    for container in spec["containers"]:
        assert container["volumeMounts"] == [MOUNT]
        assert container["env"] == [SOCKET, AT_URL]


def test_a_device_is_a_limit_and_no_volume() -> None:
    for resources in (None, {}, {"limits": None}, {"limits": {}}, {"limits": {"cpu": "1"}, "requests": {"cpu": "1"}}):
        pod = pod_of({"name": "f", "resources": resources} if resources is not None else {"name": "f"})
        spec = patched(pod, Injection("devicePlugin", URL))["spec"]
        limits = (resources or {}).get("limits") or {}
        container = spec["containers"][0]
        assert container["resources"] == {**(resources or {}), "limits": {**limits, "trunkline.dev/socket": "1"}}
        assert "volumes" not in spec
        assert "volumeMounts" not in container
        assert container["env"] == [AT_URL]


def test_a_limit_of_its_authors_stays() -> None:
    pod = pod_of({"name": "f", "resources": {"limits": {"trunkline.dev/socket": "2"}}})
    assert not patch_of(pod, Injection("devicePlugin")).operations


def test_without_a_socket_functions_are_told_the_url_alone() -> None:
    spec = patched(pod_of({"name": "f"}), Injection("none", URL))["spec"]
    assert spec == {"containers": [{"name": "f", "env": [AT_URL]}]}


def test_lists_that_are_there_are_added_to_at_their_end() -> None:
    container = {"name": "f", "env": [{"name": "A", "value": "1"}], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    spec = patched(pod_of(container, volumes=[{"name": "v", "emptyDir": {}}]), Injection("csi", URL))["spec"]
    assert spec["volumes"] == [{"name": "v", "emptyDir": {}}, CSI]
    assert spec["containers"][0]["volumeMounts"] == [*container["volumeMounts"], MOUNT]
    assert spec["containers"][0]["env"] == [*container["env"], SOCKET, AT_URL]


def test_lists_that_are_empty_or_null_are_as_good_as_none() -> None:
    for nothing in (list, lambda: None):
        pod = pod_of({"name": "f", "env": nothing(), "volumeMounts": nothing()}, volumes=nothing())
        spec = patched(pod, Injection("csi", URL))["spec"]
        assert spec["volumes"] == [CSI]
        assert spec["containers"] == [{"name": "f", "env": [SOCKET, AT_URL], "volumeMounts": [MOUNT]}]


@pytest.mark.parametrize("name", ["queue-proxy", "istio-proxy", "linkerd-proxy", "own-proxy"])
def test_proxies_are_left_alone(name: str) -> None:
    injection = Injection("csi", URL, left_alone=("queue-proxy", "istio-proxy", "linkerd-proxy", "own-proxy"))
    spec = patched(pod_of({"name": name}, {"name": "f"}), injection)["spec"]
    assert spec["containers"][0] == {"name": name}
    assert spec["containers"][1]["volumeMounts"] == [MOUNT]


def test_a_pod_of_proxies_alone_gets_no_volume() -> None:
    assert not patch_of(pod_of({"name": "queue-proxy"}), Injection("csi", URL)).operations


def test_init_containers_are_left_alone() -> None:
    before = [{"name": "fetch"}, {"name": "envoy", "restartPolicy": "Always"}]
    assert patched(pod_of({"name": "f"}, initContainers=before), Injection("csi", URL))["spec"]["initContainers"] == before


def test_variables_of_its_authors_stay() -> None:
    own = [{"name": "TRUNKLINE_URL", "valueFrom": {"fieldRef": {"fieldPath": "status.hostIP"}}}]
    spec = patched(pod_of({"name": "f", "env": own}), Injection("csi", URL))["spec"]
    assert spec["containers"][0]["env"] == [*own, SOCKET]


@pytest.mark.parametrize("path", ["/run/trunkline", "/run/trunkline/", "/run//trunkline"])
def test_a_mount_of_its_authors_at_that_path_stays(path: str) -> None:
    own = {"name": "mine", "mountPath": path}
    pod = pod_of({"name": "f", "volumeMounts": [own]}, volumes=[{"name": "mine", "hostPath": {"path": "/srv"}}])
    for mode in MODES:
        spec = patched(pod, Injection(mode, URL))["spec"]
        assert spec["containers"] == [{"name": "f", "volumeMounts": [own], "env": [AT_URL]}]
        assert spec["volumes"] == pod["spec"]["volumes"]


def test_our_volume_mounted_elsewhere_by_its_author_stays_there() -> None:
    own = {"name": "trunkline", "mountPath": "/var/openfaas/secrets/trunkline"}
    spec = patched(pod_of({"name": "f", "volumeMounts": [own]}, volumes=[CSI]), Injection("csi", URL))["spec"]
    assert spec["containers"] == [{"name": "f", "volumeMounts": [own], "env": [AT_URL]}]


def test_a_volume_of_our_name_that_is_another_is_not_mounted() -> None:
    pod = pod_of({"name": "f"}, volumes=[{"name": "trunkline", "configMap": {"name": "c"}}])
    patch = patch_of(pod, Injection("csi", URL))
    assert "rename it" in patch.warnings[0]
    spec = patched(pod, Injection("csi", URL))["spec"]
    assert spec["volumes"] == pod["spec"]["volumes"]
    assert spec["containers"] == [{"name": "f", "env": [AT_URL]}]


def test_what_the_api_server_adds_to_our_volume_does_not_make_it_anothers() -> None:
    defaulted = {"name": "trunkline", "csi": {"driver": "csi.trunkline.dev", "readOnly": True, "fsType": "ext4"}}
    spec = patched(pod_of({"name": "f"}, volumes=[defaulted]), Injection("csi"))["spec"]
    assert spec["volumes"] == [defaulted]
    assert spec["containers"][0]["volumeMounts"] == [MOUNT]


def test_a_container_that_came_after_the_first_pass_is_completed_by_the_second() -> None:
    injection = Injection("csi", URL)
    once = patched(pod_of({"name": "f"}, models="a"), injection)
    once["spec"]["containers"].append({"name": "late"})
    twice = patched(once, injection)["spec"]
    assert twice["volumes"] == [CSI]
    assert twice["containers"][0] == once["spec"]["containers"][0]
    assert twice["containers"][1] == {"name": "late", "volumeMounts": [MOUNT], "env": [SOCKET, AT_URL]}


def test_windows_has_no_such_sockets() -> None:
    patch = patch_of(pod_of({"name": "f"}, os={"name": "windows"}), Injection("csi", URL))
    assert not patch.operations
    assert "Windows" in patch.warnings[0]


@pytest.mark.parametrize("affinity", [None, {}, {"nodeAffinity": None}, {"nodeAffinity": {}}, {"podAffinity": {"x": []}}])
def test_nodes_with_its_models_are_preferred(affinity: dict[str, Any] | None) -> None:
    pod = pod_of({"name": "f"}, models="a, b", **({"affinity": affinity} if affinity is not None else {}))
    spec = patched(pod, Injection("none", URL))["spec"]
    assert spec["affinity"]["nodeAffinity"][PREFERRED] == preferred_terms(["a", "b"])
    assert spec["affinity"].get("podAffinity") == (affinity or {}).get("podAffinity")


def test_terms_of_its_authors_stay_and_count() -> None:
    own = {"weight": 7, "preference": {"matchExpressions": [{"key": label_of("a"), "operator": "Exists"}]}}
    other = {"weight": 9, "preference": {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["x"]}]}}
    affinity = {"nodeAffinity": {PREFERRED: [own, other], "requiredDuringSchedulingIgnoredDuringExecution": {"x": 1}}}
    spec = patched(pod_of({"name": "f"}, models="a,b", affinity=affinity), Injection("none", URL))["spec"]
    assert spec["affinity"]["nodeAffinity"][PREFERRED] == [own, other, *preferred_terms(["b"])]
    assert spec["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"] == {"x": 1}


def test_a_label_names_a_model_where_no_annotation_does() -> None:
    pod = pod_of({"name": "f"})
    pod["metadata"]["labels"]["trunkline.dev/models"] = "embed"
    assert patched(pod, Injection("none", URL))["spec"]["affinity"]["nodeAffinity"][PREFERRED] == preferred_terms(["embed"])
    pod["metadata"]["annotations"]["trunkline.dev/models"] = "rank"
    assert patched(pod, Injection("none", URL))["spec"]["affinity"]["nodeAffinity"][PREFERRED] == preferred_terms(["rank"])


def test_too_many_models_and_no_models_names_are_told() -> None:
    patch = patch_of(pod_of({"name": "f"}, models=",".join(f"m{n}" for n in range(20)) + ",no/name,$"), Injection("none", URL))
    terms = patch.operations[-1]["value"]["nodeAffinity"][PREFERRED]
    assert terms == preferred_terms([f"m{n}" for n in range(MOST_MODELS)])
    assert ["no/name" in patch.warnings[0], "20 models" in patch.warnings[1]] == [True, True]


@pytest.mark.parametrize(
    "broken",
    [
        {"metadata": []},
        {"metadata": {"labels": {"trunkline": "enabled"}}},
        {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": 3},
        {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": {"containers": {}}},
        {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": {"containers": [1]}},
        {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": {"containers": [{"env": "x"}]}},
        {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": {"containers": [{"resources": 1}]}},
        {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": {"containers": [], "volumes": 1}},
        {"metadata": {"labels": {"trunkline": "enabled"}, "annotations": 1}, "spec": {"containers": []}},
    ],
)
def test_a_pod_of_another_shape_is_said_to_be_so(broken: dict[str, Any]) -> None:
    with pytest.raises(UnreadablePod):
        patch_of(broken, Injection("devicePlugin", URL))


def test_pointers_escape_what_means_something_to_them() -> None:
    assert pointer("a/b", "m~n", 0, "-") == "/a~1b/m~0n/0/-"


@given(st.dictionaries(st.text(max_size=4), st.text(max_size=3), min_size=1, max_size=4))
def test_any_key_can_be_added(members: dict[str, str]) -> None:
    made = Additions()
    made.update((), "o", {}, members)
    made.update((), "p", None, members)
    assert jsonpatch.apply_patch({"o": {}}, made.operations) == {"o": members, "p": members}


_names = st.sampled_from(["f", "g", "queue-proxy", "trunkline", "TRUNKLINE_URL", "TRUNKLINE_SOCKET", "other"])
_mounts = st.fixed_dictionaries(
    {"name": _names, "mountPath": st.sampled_from(["/run/trunkline", "/run/trunkline/", "/run", "/v"])}
)
_variables = st.fixed_dictionaries({"name": _names}, optional={"value": st.just("v"), "valueFrom": st.just({"x": {}})})
_amounts = st.dictionaries(st.sampled_from(["cpu", "trunkline.dev/socket"]), st.just("1"))
_resources = st.one_of(st.none(), st.dictionaries(st.sampled_from(["limits", "requests"]), st.one_of(st.none(), _amounts)))
_containers = st.fixed_dictionaries(
    {"name": _names},
    optional={
        "env": st.one_of(st.none(), st.lists(_variables, max_size=3)),
        "volumeMounts": st.one_of(st.none(), st.lists(_mounts, max_size=3)),
        "resources": _resources,
    },
)
_volumes = st.one_of(st.just(CSI), st.fixed_dictionaries({"name": _names}, optional={"emptyDir": st.just({})}))
_terms = st.sampled_from([*preferred_terms(["a"]), {"weight": 1, "preference": {}}])
_affinities = st.one_of(
    st.none(),
    st.fixed_dictionaries(
        {},
        optional={
            "nodeAffinity": st.one_of(
                st.none(), st.fixed_dictionaries({}, optional={PREFERRED: st.one_of(st.none(), st.lists(_terms, max_size=2))})
            ),
            "podAffinity": st.just({}),
        },
    ),
)
_specs = st.fixed_dictionaries(
    {"containers": st.lists(_containers, max_size=3)},
    optional={"volumes": st.one_of(st.none(), st.lists(_volumes, max_size=3)), "affinity": _affinities},
)


@given(_specs, st.sampled_from(MODES), st.sampled_from(["", URL]), st.sampled_from(["", "a", "a,b/c"]))
def test_whatever_a_pod_is_it_is_added_to_once_and_nothing_of_it_is_lost(
    spec: dict[str, Any], mode: str, url: str, models: str
) -> None:
    pod = pod_of(models=models)
    pod["spec"] = spec
    injection = Injection(mode, url)
    once = patched(pod, injection)
    assert not patch_of(once, injection).operations
    _kept(pod, once)
    for container, before in zip(once["spec"]["containers"], spec["containers"], strict=True):
        if container["name"] == "queue-proxy":
            assert container == before
        elif mode == "csi" and [each for each in once["spec"].get("volumes") or () if each["name"] == "trunkline"][:1] == [CSI]:
            mounts = container["volumeMounts"]
            assert [each for each in mounts if each["name"] == "trunkline" or each["mountPath"].startswith("/run/trunkline")]


@given(
    _specs,
    st.sampled_from(["hostPath", "pvc"]),
    st.sampled_from(["a", "b", "vision", "text", "", None, 7]),
    st.dictionaries(
        st.sampled_from(["namespace", "tenant", "trunkline.dev/tenant", "trunkline"]), st.sampled_from(["a", "vision"])
    ),
)
def test_whatever_a_pod_says_its_namespace_decides_whose_socket_it_gets(
    spec: dict[str, Any], mode: str, namespace: object, said: dict[str, str]
) -> None:
    tenants = {"a": "vision", "b": "text"}
    pod = pod_of()
    pod["spec"] = spec
    pod["metadata"] |= {"namespace": "a", "labels": {**said, "trunkline": "enabled"}, "annotations": said}
    for_all = Injection(mode, URL, tenants=tenants)
    given = for_all.of(namespace)
    folder = f"/run/trunkline/tenants/{tenants[str(namespace)]}" if namespace in tenants else "/run/trunkline/public"
    before = [*(spec.get("volumes") or ())]
    for each in (patched(pod, given)["spec"].get("volumes") or ())[len(before) :]:
        assert each["name"] == "trunkline"
        assert mode == "pvc" or each["hostPath"]["path"] == folder
    # Once more, as another pass does.
    assert not patch_of(patched(pod, given), given).operations
    if namespace not in tenants:
        assert given == for_all
        return
    assert "TRUNKLINE_URL" not in str(patch_of(pod, given).operations)


def test_the_folder_of_a_tenant_is_the_sidecars_to_make() -> None:
    given = Injection("hostPath", URL, tenants={"a": "vision"}, tenants_path="/srv/tenants/").of("a")
    spec = patched(pod_of({"name": "f"}), given)["spec"]
    assert spec["volumes"] == [{"name": "trunkline", "hostPath": {"path": "/srv/tenants/vision", "type": "Directory"}}]
    assert spec["containers"][0]["env"] == [SOCKET]


def test_a_pod_that_brings_the_folder_of_another_is_left_without() -> None:
    other = {"name": "trunkline", "hostPath": {"path": "/run/trunkline/tenants/text", "type": "Directory"}}
    found = patch_of(pod_of({"name": "f"}, volumes=[other]), Injection("hostPath", tenants={"a": "vision", "b": "text"}).of("a"))
    assert not found.operations
    assert "of another kind" in found.warnings[0]


def _kept(before: Any, after: Any) -> None:
    """Check that a document has all that another has; lists may be longer, what was null may be something."""
    if isinstance(before, dict):
        for key, value in before.items():
            _kept(value, after[key])
    elif isinstance(before, list):
        for value, found in zip(before, after[: len(before)], strict=True):
            _kept(value, found)
    elif before is not None:
        assert after == before
