"""The chart's own: what may be said, what is refused, and the container that makes folders of the host the sidecar's."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sidecar.admintokens import parse_tokens
from sidecar.origins import Policy, parse_origin
from sidecar.prepull import read_list
from sidecar.segment import LEDGER_END
from sidecar.tenants import hash_of
from tests.charts import CHART, MODES, combination, helm, identity, named, rendered, tool
from tests.rows import ROOT
from tests.waiting import PATIENCE_S

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES = (CHART / "values.yaml").read_text()
DOCUMENT = (ROOT / "docs" / "kubernetes.md").read_text()
# What is as Kubernetes has it, and empty unless said. `global` is helm's own, for charts that hold others.
LEFT_EMPTY = {".imagePullSecrets[]", ".extraEnv[]", ".seLinuxOptions"}


def objects(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the schema of each object whose keys are known."""
    if "properties" in schema:
        yield path, schema
        for key, each in schema["properties"].items():
            yield from objects(each, f"{path}.{key}")
    elif "items" in schema:
        yield from objects(schema["items"], f"{path}[]")


def keys(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, bool]]:
    """Yield all keys of the values, and whether the schema knows them."""
    for key, value in values.items():
        known = schema["properties"].get(key)
        yield f"{path}.{key}", known is not None
        if isinstance(value, dict) and known and "properties" in known:
            yield from keys(value, known, f"{path}.{key}")


def test_the_schema_takes_no_key_that_it_does_not_know() -> None:
    for path, schema in objects(SCHEMA):
        assert schema["additionalProperties"] is False, path


def test_the_schema_and_the_values_have_the_same_keys() -> None:
    values = yaml.safe_load(VALUES)
    in_values = dict(keys(values, SCHEMA))
    assert all(in_values.values()), in_values
    in_schema = {f"{path}.{key}" for path, schema in objects(SCHEMA) if path not in LEFT_EMPTY for key in schema["properties"]}
    assert in_schema - {".global"} == set(in_values)


def test_every_value_is_explained() -> None:
    for before, line in itertools.pairwise(VALUES.splitlines()):
        if re.fullmatch(r" *\w+: .+", line):
            assert before.lstrip().startswith("# "), line


def test_links_lead_somewhere() -> None:
    found = re.findall(r"(docs/[a-z-]+\.md)(?:#([a-z-]+))?", VALUES)
    assert found
    for path, anchor in found:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), re.MULTILINE)
        assert not anchor or anchor in {re.sub(r"[^a-z -]", "", each.lower()).replace(" ", "-") for each in headings}, anchor


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"memory": {"weightsMib": 5}}, "weightsMib"),
        ({"memory": {"weightsMiB": "2GiB"}}, "/memory/weightsMiB"),
        ({"attach": {"mode": "socket"}}, "/attach/mode"),
        ({"attach": {"injection": "istio"}}, "/attach/injection"),
        ({"settings": {"queu_limit": 3}}, "queu_limit"),
        # What the chart says itself, and would say twice.
        ({"settings": {"admin_port": 3}}, "admin_port"),
        ({"http": {"port": 80}}, "/http/port"),
        ({"socketDir": "run/trunkline"}, "/socketDir"),
        ({"socketDir": "/run/trunkline; reboot"}, "/socketDir"),
        ({"image": {"digest": "sha256:12"}}, "/image/digest"),
        ({"update": {"maxUnavailable": 0}}, "/update/maxUnavailable"),
        ({"update": {"takeOver": True}, "gpu": {"enabled": True}}, "update.takeOver does not go with gpu.enabled"),
        ({"update": {"takeOver": True}, "store": {"kind": "emptyDir"}}, "update.takeOver needs store.kind"),
        ({"gpus": 1}, "gpus"),
        ({"attach": {"pvc": {"namespaces": ["A B"]}}}, "/attach/pvc/namespaces/0"),
        ({"extraEnv": [{"nam": "A"}]}, "/extraEnv/0"),
        ({"podMonitor": {"enabled": True}, "http": {"enabled": False}}, "podMonitor.enabled needs http.enabled"),
        ({"pull": {"models": ["https://a.example/m"]}}, "/pull/models/0"),
        ({"pull": {"models": [f"https://a.example/m@sha256:{64 * '0'}\nx"]}}, "/pull/models/0"),
        (
            {"pull": {"models": [f"https://a.example/m@sha256:{64 * '0'}"], "origins": ["https://a.example/models"]}},
            "at none of pull.origins",
        ),
        ({"attach": {"mode": "pvc"}}, "attach.pvc.namespaces"),
        ({"attach": {"mode": "hostPath", "tenants": {"a": "../public"}}}, "/attach/tenants/a"),
        ({"attach": {"mode": "hostPath", "tenants": {"A b": "a"}}}, "invalid propertyName 'A b'"),
        ({"attach": {"mode": "csi", "tenants": {"a": "vision"}}, "quotas": "x"}, "with csi all pods get one"),
        ({"attach": {"mode": "hostPath", "tenants": {"a": "vision"}}}, "attach.tenants needs quotas"),
        (
            {"attach": {"mode": "pvc", "pvc": {"namespaces": ["b"]}, "tenants": {"a": "vision"}}, "quotas": "x"},
            "a is none of attach.pvc.namespaces",
        ),
        ({"fullnameOverride": "1st"}, "a Service cannot be called 1st"),
        ({"attach": {"injection": "webhook"}, "http": {"enabled": False}}, "attach.injection has nothing to give"),
        ({"attach": {"injection": "kyverno"}, "http": {"tlsSecret": "tls"}}, "attach.injection has nothing to give"),
        (
            {"attach": {"injection": "webhook", "webhook": {"certificates": "secret", "tlsSecret": "tls"}}},
            "attach.webhook.caBundle",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_its_key(values: dict[str, object], said: str) -> None:
    done = helm(values=values)
    assert done.returncode
    assert said in done.stderr


def test_a_release_whose_name_no_service_can_have_is_refused_before_half_of_it_is_there() -> None:
    done = subprocess.run(
        [tool("helm"), "template", "of.two", str(CHART)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode
    assert "a Service cannot be called of.two" in done.stderr
    assert rendered("--set", "fullnameOverride=of-two")


@pytest.mark.parametrize("mode", MODES)
def test_a_second_release_for_other_nodes_takes_nothing_of_the_first_ones(mode: str) -> None:
    """As docs/kubernetes.md has it for nodes without a GPU: helm refuses to install what another release has made."""
    first = {identity(each) for each in combination(mode, "webhook", True)}
    attach = {"mode": "none" if mode == "pvc" else mode, "injection": "none", "csi": {"createDriver": mode != "csi"}}
    second = rendered(values={"fullnameOverride": "cpu", "attach": attach, "nodeLabels": {"enabled": True}})
    assert not first & {identity(each) for each in second}
    assert any(kind == "DaemonSet" and name == "cpu-csi" for kind, _, name in map(identity, second)) == (mode == "csi")


@pytest.mark.parametrize("mode", ["devicePlugin", "csi"])
def test_all_pods_that_have_to_do_with_the_socket_have_the_options_of_selinux(mode: str) -> None:
    options = {"type": "spc_t", "level": "s0"}
    made = rendered(values={"attach": {"mode": mode}, "seLinuxOptions": options, "nodeLabels": {"enabled": True}})
    daemons = [each["spec"]["template"]["spec"]["securityContext"] for each in made if each["kind"] == "DaemonSet"]
    assert [each.get("seLinuxOptions") for each in daemons] == [options] * 3


def test_drains_of_nodes_take_one_pod_of_the_webhook_after_the_other() -> None:
    webhook: dict[str, object] = {"nodeSelector": {"pool": "system"}, "tolerations": [{"operator": "Exists"}]}
    values = {"attach": {"mode": "hostPath", "injection": "webhook", "webhook": webhook}}
    made = rendered(values=values)
    (budget,) = (each["spec"] for each in made if each["kind"] == "PodDisruptionBudget")
    (deployment,) = (each["spec"] for each in made if each["kind"] == "Deployment")
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == deployment["selector"]
    pod = deployment["template"]["spec"]
    assert {key: pod[key] for key in webhook} == webhook
    # Of a single one it would hold every drain up.
    webhook["replicas"] = 1
    assert not [each for each in rendered(values=values) if each["kind"] == "PodDisruptionBudget"]


def test_helm_finds_nothing_to_complain_of() -> None:
    done = subprocess.run(
        [tool("helm"), "lint", "--strict", str(CHART)], capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stdout


def test_the_ledger_has_room_beside_the_weights() -> None:
    spec = named(rendered(values={"memory": {"weightsMiB": 1000}}), "DaemonSet", "trunkline")["spec"]["template"]["spec"]
    (size,) = (each["emptyDir"]["sizeLimit"] for each in spec["volumes"] if each["name"] == "shm")
    assert int(size.removesuffix("Mi")) << 20 >= (1000 << 20) + LEDGER_END


def test_models_to_pull_ahead_are_a_list_that_the_sidecar_reads(tmp_path: Path) -> None:
    models = [f"https://models.example/bundles/{name}@sha256:{64 * digit}" for name, digit in (("a", "0"), ("b", "1"))]
    # A change of it makes no pod anew: the kubelet brings the file, and the sidecar looks at it.
    one, two = ({"pull": {"origins": ["https://models.example/"], "models": models[:count]}} for count in (1, 2))
    before, after = (named(rendered(values=each), "DaemonSet", "trunkline") for each in (one, two))
    assert before == after
    (sidecar,) = after["spec"]["template"]["spec"]["containers"]
    assert sidecar["args"][sidecar["args"].index("--pull-list") + 1] == "/etc/trunkline/files/models"
    (tmp_path / "models").write_text(named(rendered(values=two), "ConfigMap", "trunkline")["data"]["models"])
    policy = Policy(origins=(parse_origin("https://models.example/"),))
    assert [str(each) for each in read_list(tmp_path / "models", policy)] == models


@pytest.mark.parametrize("text", ["  [tenants.a]\nmodels = []", "\t[tenants.a]\n", "[tenants.a]\n\n# the end\n"])
def test_a_text_is_taken_as_it_is_written(text: str) -> None:
    found = rendered(values={"quotas": text, "pull": {"signers": text}})
    assert named(found, "ConfigMap", "trunkline")["data"] == {
        name: text.removesuffix("\n") + "\n" for name in ("quotas.toml", "signers")
    }


def prepared(host: Path) -> subprocess.CompletedProcess[str]:
    """Run what the first container runs, on folders of a host's stand-in, with its one capability."""
    pod = named(rendered(), "DaemonSet", "trunkline")["spec"]["template"]["spec"]
    (prepare,) = pod["initContainers"]
    (script,) = prepare["args"]
    script = re.sub(r"/(run|var/lib)/trunkline", lambda found: f"{host}{found[0]}", script)
    limits = ["setpriv", "--bounding-set=-all,+chown", "--inh-caps=-all", "--no-new-privs"]
    return subprocess.run([*limits, *prepare["command"], script], capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def state(path: Path) -> tuple[int, int, int]:
    found = path.lstat()
    return found.st_uid, found.st_gid, found.st_mode & 0o7777


@pytest.fixture
def host(tmp_path: Path) -> Path:
    if os.geteuid():
        pytest.skip("changing owners takes root, as the container that is tried here has it")
    tmp_path.chmod(0o755)
    for folder in ("run/trunkline", "var/lib/trunkline"):
        (tmp_path / folder).mkdir(parents=True, mode=0o755)
    return tmp_path


def test_folders_that_the_kubelet_made_become_the_sidecars(host: Path) -> None:
    # The kubelet made it for a function's pod that was there first.
    (host / "run/trunkline/public").mkdir()
    for _ in range(2):
        done = prepared(host)
        assert done.returncode == 0, done.stderr
        assert state(host / "run/trunkline") == (10001, 10001, 0o755)
        assert state(host / "run/trunkline/public") == (10001, 10001, 0o755)
        assert state(host / "var/lib/trunkline") == (10001, 10001, 0o700)


def test_the_folder_of_the_socket_is_there_before_a_functions_pod_can_have_it_made(host: Path) -> None:
    assert not (host / "run/trunkline/public").exists()
    # As it is after a reboot, and as it is while an older pod has it.
    for owner in (0, 10001):
        os.chown(host / "run/trunkline", owner, owner)
        done = prepared(host)
        assert done.returncode == 0, done.stderr
        for folder in ("run/trunkline", "run/trunkline/public"):
            assert state(host / folder) == (10001, 10001, 0o755)
        (host / "run/trunkline/public").rmdir()


def test_folders_of_somebody_else_become_the_sidecars(host: Path) -> None:
    for folder in ("run/trunkline", "var/lib/trunkline"):
        (host / folder).chmod(0o777)
        os.chown(host / folder, 1000, 1000)
    done = prepared(host)
    assert done.returncode == 0, done.stderr
    assert state(host / "run/trunkline") == (10001, 10001, 0o755)
    assert state(host / "var/lib/trunkline") == (10001, 10001, 0o700)


def test_a_link_that_the_sidecar_has_made_leads_root_nowhere(host: Path) -> None:
    victim = host / "etc"
    victim.mkdir()
    (host / "run/trunkline/public").symlink_to(victim)
    os.chown(host / "run/trunkline", 10001, 10001)
    before = state(victim)
    done = prepared(host)
    assert done.returncode == 0, done.stderr
    assert state(victim) == before


def test_the_document_names_values_that_there_are() -> None:
    values = yaml.safe_load(VALUES)
    known = {path.removeprefix(".") for path, _ in keys(values, SCHEMA)}
    said = {each for each in re.findall(r"`([a-z]\w*(?:\.\w+)+)", DOCUMENT) if each.partition(".")[0] in values}
    assert len(said) > 15
    assert said <= known


def test_what_the_document_says_to_type_makes_a_token_file_and_is_taken_by_helm(tmp_path: Path) -> None:
    (commands,) = (each for each in re.findall(r"```sh\n(.*?)```", DOCUMENT, re.DOTALL) if "helm install" in each)
    made, _, rest = commands.partition("kubectl create namespace")
    subprocess.run(
        ["sh", "-euc", made + '\nprintf %s "$TOKEN" > prometheus; printf %s "$FUNCTIONS_TOKEN" > functions'],
        cwd=tmp_path,
        timeout=PATIENCE_S,
        check=True,
    )
    tokens = parse_tokens((tmp_path / "tokens.toml").read_text(), "tokens.toml")
    assert [(token.name, token.role) for token in tokens] == [("prometheus", "read"), ("functions", "infer")]
    assert [token.token_hash for token in tokens] == [hash_of((tmp_path / token.name).read_bytes()) for token in tokens]
    install = shlex.split(rest.partition("helm install ")[2].partition("\n\n")[0].partition("\nkubectl")[0].replace("\\\n", ""))
    done = helm(*install[install.index("--set") :])
    assert done.returncode == 0, done.stderr
    assert "image: REGISTRY/trunkline:0.1.0" in done.stdout
    # The Secrets that it makes are those that the chart looks for.
    secrets = set(re.findall(r"create secret generic (\S+)", commands))
    assert secrets == {yaml.safe_load(VALUES)["http"]["tokensSecret"], yaml.safe_load(VALUES)["podMonitor"]["tokenSecret"]}
