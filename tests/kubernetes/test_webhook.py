"""The webhook: the shape of what it answers, and its life as a process behind TLS."""

from __future__ import annotations

import base64
import http.client
import json
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from flask.testing import FlaskClient
from hypothesis import given
from hypothesis import strategies as st

from sidecar.cli.main import main
from sidecar.errors import ConfigError
from sidecar.kubernetes.certificates import Certificate
from sidecar.kubernetes.injection import Injection
from sidecar.kubernetes.review import LIMIT_BYTES, BadReview, answer
from sidecar.kubernetes.webhook import create_app, listen
from tests.kubernetes.authority import issue
from tests.kubernetes.programs import ROOT, Program, program
from tests.waiting import PATIENCE_S

CERTIFICATE = ROOT / "tests" / "certificates" / "localhost.pem"
KEY = ROOT / "tests" / "certificates" / "localhost.key"
INJECTION = Injection("csi", "http://trunkline:9470")
POD = {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": {"containers": [{"name": "f"}]}}


def review_of(pod: object = POD, **request: Any) -> dict[str, Any]:
    kind = {"group": "", "version": "v1", "kind": "Pod"}
    asked = {"uid": "0b4c", "kind": kind, "operation": "CREATE", "object": pod, "namespace": "functions", **request}
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": asked}


def response_in(review: dict[str, Any], uid: str = "0b4c") -> dict[str, Any]:
    """Return the response after a look at its shape, which the API server is strict about."""
    assert set(review) == {"apiVersion", "kind", "response"}
    assert (review["apiVersion"], review["kind"]) == ("admission.k8s.io/v1", "AdmissionReview")
    response = dict(review["response"])
    assert set(response) <= {"uid", "allowed", "patchType", "patch", "warnings"}
    assert response["uid"] == uid
    assert response["allowed"] is True
    assert ("patch" in response) == ("patchType" in response)
    if "patch" in response:
        assert response["patchType"] == "JSONPatch"
        response["patch"] = json.loads(base64.b64decode(response["patch"], validate=True))
        assert all(set(each) == {"op", "path", "value"} and each["op"] == "add" for each in response["patch"])
    for warning in response.get("warnings", ()):
        assert isinstance(warning, str)
        assert len(warning) <= 120
    return response


def answered(review: object) -> dict[str, Any]:
    return response_in(answer(json.dumps(review).encode(), INJECTION))


def test_a_labelled_pod_is_patched() -> None:
    response = answered(review_of())
    assert [each["path"] for each in response["patch"]] == [
        "/spec/volumes",
        "/spec/containers/0/volumeMounts",
        "/spec/containers/0/env",
    ]
    assert "warnings" not in response


def test_what_needs_no_change_has_no_patch() -> None:
    assert set(answered(review_of({"metadata": {}, "spec": {"containers": []}}))) == {"uid", "allowed"}


@pytest.mark.parametrize("change", [{"operation": "UPDATE"}, {"operation": "DELETE"}, {"operation": "CONNECT"}])
def test_nothing_but_new_pods_is_changed(change: dict[str, Any]) -> None:
    assert set(answered(review_of(**change))) == {"uid", "allowed"}


@pytest.mark.parametrize(
    "change",
    [
        {"kind": {"group": "apps", "version": "v1", "kind": "Deployment"}},
        {"kind": {"group": "", "version": "v1", "kind": "Service"}},
        {"kind": {}},
        {"subResource": "ephemeralcontainers"},
        {"object": None},
        {"object": [1]},
        {"object": {"metadata": {"labels": {"trunkline": "enabled"}}}},
        {"object": {"metadata": {"labels": {"trunkline": "enabled"}}, "spec": {"containers": [{"env": [1]}]}}},
    ],
)
def test_what_cannot_be_changed_goes_on_with_a_warning(change: dict[str, Any]) -> None:
    response = answered(review_of(**change))
    assert "patch" not in response
    assert response["warnings"][0].startswith("trunkline: ")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        json.dumps({**review_of(), "apiVersion": "admission.k8s.io/v1beta1"}).encode(),
        json.dumps({**review_of(), "kind": "Pod"}).encode(),
        json.dumps({**review_of(), "request": None}).encode(),
        json.dumps(review_of(uid="")).encode(),
        json.dumps(review_of(uid=3)).encode(),
        json.dumps(review_of(kind=None)).encode(),
        b" " * (LIMIT_BYTES + 1),
    ],
)
def test_what_is_no_review_cannot_be_answered(body: bytes) -> None:
    with pytest.raises(BadReview):
        answer(body, INJECTION)


_json = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.sampled_from(["trunkline", "enabled", "f", ""])),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["metadata", "labels", "trunkline", "spec", "containers", "env", "volumes", "name", "affinity"]),
            inner,
            max_size=4,
        ),
    ),
)


@given(_json)
def test_whatever_a_pod_is_it_is_allowed(pod: object) -> None:
    answered(review_of(pod))
    labelled = {"metadata": {"labels": {"trunkline": "enabled"}, "annotations": {"trunkline.dev/models": "a"}}, "spec": pod}
    answered(review_of(labelled))
    answered(review_of({**labelled, "spec": {"containers": [pod], "volumes": [pod], "affinity": pod}}))


@pytest.fixture
def client() -> FlaskClient:
    return create_app(INJECTION).test_client()


def test_bodies_have_limits_and_a_type(client: FlaskClient) -> None:
    assert client.get("/healthz").status_code == 200
    assert client.post("/mutate", json=review_of()).status_code == 200
    assert client.post("/mutate", data=json.dumps(review_of())).status_code == 415
    assert client.post("/mutate", data=b"{", content_type="application/json").status_code == 400
    assert client.post("/mutate", data=b" " * (LIMIT_BYTES + 1), content_type="application/json").status_code == 413
    assert client.get("/mutate").status_code == 405
    missing = client.get("/elsewhere")
    assert (missing.status_code, missing.get_json()["error"]["code"]) == (404, "not_found")


@pytest.fixture
def webhook(tmp_path: Path) -> Iterator[Program]:
    """Return a webhook of this folder's certificate, which goes on for 3 s after SIGTERM."""
    issue(tmp_path / "tls.crt", tmp_path / "tls.key")
    files = ("--tls-cert", str(tmp_path / "tls.crt"), "--tls-key", str(tmp_path / "tls.key"))
    flags = ("--port", "0", "--mode", "csi", "--linger", "3", "--leave-alone", "envoy")
    with program(tmp_path / "log", "webhook", *files, *flags) as running:
        yield running


def url_of(running: Program) -> str:
    port = running.told(r"reviewed at port (\d+)")[1]
    return f"https://localhost:{port}"


def review(url: str, ca_file: Path) -> dict[str, Any]:
    answer = requests.post(f"{url}/mutate", json=review_of(), verify=str(ca_file), timeout=PATIENCE_S)
    assert answer.status_code == 200, answer.text
    return response_in(answer.json())


def serial_at(url: str) -> int:
    pem = ssl.get_server_certificate(("localhost", int(url.rpartition(":")[2])), timeout=PATIENCE_S)
    return x509.load_pem_x509_certificate(pem.encode()).serial_number


def test_over_tls_a_certificate_is_replaced_without_losing_a_review(webhook: Program, tmp_path: Path) -> None:
    url = url_of(webhook)
    # Believed are both, so that whoever asks needs not know which is served.
    trusted = tmp_path / "trusted.pem"
    old = (tmp_path / "tls.crt").read_bytes()
    serial = issue(tmp_path / "next.crt", tmp_path / "next.key")
    trusted.write_bytes(old + (tmp_path / "next.crt").read_bytes())
    stop, served, lost = threading.Event(), [], []

    def ask() -> None:
        while not stop.is_set():
            try:
                served.append(review(url, trusted))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a lost review
                lost.append(error)

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    (tmp_path / "next.crt").replace(tmp_path / "tls.crt")
    # For a moment certificate and key do not belong together: the old ones are served.
    half_way = len(served)
    while len(served) < half_way + 10 and not lost:
        stop.wait(0.01)
    assert serial_at(url) != serial
    (tmp_path / "next.key").replace(tmp_path / "tls.key")
    for _ in range(8):
        assert serial_at(url) == serial
    stop.set()
    for thread in asking:
        thread.join()
    assert not lost
    assert "unfit" in webhook.told("unfit")[0]


def test_after_sigterm_reviews_are_answered_for_a_while_then_it_ends(webhook: Program, tmp_path: Path) -> None:
    url = url_of(webhook)
    review(url, tmp_path / "tls.crt")
    webhook.process.send_signal(signal.SIGTERM)
    webhook.process.send_signal(signal.SIGTERM)
    for _ in range(5):
        review(url, tmp_path / "tls.crt")
    assert webhook.process.wait(PATIENCE_S) == 0
    with pytest.raises(requests.ConnectionError):
        review(url, tmp_path / "tls.crt")


def test_curl_is_answered_as_the_api_server_is(webhook: Program, tmp_path: Path) -> None:
    (tmp_path / "review.json").write_text(json.dumps(review_of()))
    command = ["curl", "--silent", "--show-error", "--cacert", str(tmp_path / "tls.crt"), "-H", "Content-Type: application/json"]
    # In chunks, as Go sends what it encodes on the way.
    chunked = ["-H", "Transfer-Encoding: chunked", "--data-binary", f"@{tmp_path}/review.json", f"{url_of(webhook)}/mutate"]
    done = subprocess.run([*command, *chunked], capture_output=True, check=True, timeout=PATIENCE_S)
    assert response_in(json.loads(done.stdout))["patch"]
    (tmp_path / "review.json").write_bytes(b" " * (LIMIT_BYTES + 70_000))
    done = subprocess.run([*command, *chunked, "-w", "%{http_code}"], capture_output=True, check=True, timeout=PATIENCE_S)
    assert done.stdout.endswith(b"413")


def test_a_body_in_broken_chunks_is_a_bad_request(webhook: Program, tmp_path: Path) -> None:
    trusted = ssl.create_default_context(cafile=str(tmp_path / "tls.crt"))
    port = int(url_of(webhook).rpartition(":")[2])
    plain = socket.create_connection(("127.0.0.1", port), 60)
    with plain, trusted.wrap_socket(plain, server_hostname="localhost") as asking:
        asking.sendall(b"POST /mutate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
        asking.sendall(b"Transfer-Encoding: chunked\r\n\r\nzz\r\n")
        answered = http.client.HTTPResponse(asking)
        answered.begin()
        assert answered.status == 400
        assert "the request's body cannot be read (InvalidChunkSize)" in answered.read().decode()
    assert webhook.process.poll() is None


def test_what_cannot_be_read_does_not_replace_what_is_served(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    folder.mkdir()
    issue(folder / "tls.crt", folder / "tls.key")
    certificate = Certificate(folder / "tls.crt", folder / "tls.key")
    first = certificate.context()
    folder.rename(tmp_path / "away")
    # What a file is looked for in is none: neither there nor missing.
    folder.write_bytes(b"")
    assert certificate.context() is first
    with pytest.raises(ConfigError, match="--tls-cert"):
        Certificate(folder / "tls.crt", folder / "tls.key")
    folder.unlink()
    (tmp_path / "away").rename(folder)
    assert certificate.context() is not first


def test_a_key_that_demands_a_password_is_refused_and_nobody_is_asked(tmp_path: Path) -> None:
    certificate, key = tmp_path / "tls.crt", tmp_path / "tls.key"
    issue(certificate, key)
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    key.write_bytes(private.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    code = f"""
from pathlib import Path
from sidecar.errors import ConfigError
from sidecar.kubernetes.certificates import Certificate
try:
    Certificate(Path({str(certificate)!r}), Path({str(key)!r}))
except ConfigError:
    print("refused")
"""
    # Whoever reads the answer from here would take it for the password.
    environment = {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, input="secret\n", env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=True
    )
    assert (done.stdout, "pass phrase" in done.stderr) == ("refused\n", False)


def test_a_certificate_that_cannot_be_used_is_told_at_the_start(tmp_path: Path) -> None:
    for certificate, key in ((tmp_path / "none", KEY), (KEY, KEY), (CERTIFICATE, CERTIFICATE)):
        with pytest.raises(ConfigError, match="--tls-cert"):
            Certificate(certificate, key)
    command = [
        sys.executable,
        "-m",
        "sidecar",
        "webhook",
        "--tls-cert",
        "none",
        "--tls-key",
        "none",
        "--mode",
        "csi",
        "--port",
        "0",
    ]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}, capture_output=True)
    assert (done.returncode, b"config_error" in done.stderr) == (1, True)


def test_files_that_are_away_for_a_moment_change_nothing(tmp_path: Path) -> None:
    issue(tmp_path / "tls.crt", tmp_path / "tls.key")
    certificate = Certificate(tmp_path / "tls.crt", tmp_path / "tls.key")
    first = certificate.context()
    assert certificate.context() is first
    (tmp_path / "tls.crt").unlink()
    assert certificate.context() is first
    issue(tmp_path / "tls.crt", tmp_path / "tls.key")
    assert certificate.context() is not first


def test_a_port_that_is_taken_is_told() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(ConfigError, match="--port"):
        listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--mode", "csi", "--tenant", "a=vision"], "with csi all pods get one and the same"),
        (["--mode", "pvc", "--tenant", "a"], "must be NAMESPACE=TENANT"),
        (["--mode", "pvc", "--tenant", "a=../public"], "must be NAMESPACE=TENANT"),
        (["--mode", "pvc", "--tenant", "a=b", "--tenant", "a=c"], "a is said to be b's and c's"),
    ],
)
def test_tenants_are_said_plainly_or_not_at_all(words: list[str], said: str) -> None:
    result = CliRunner().invoke(main, ["webhook", "--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY), *words])
    assert result.exit_code == 2
    assert said in result.stderr.replace("\n", " ")


def test_without_a_socket_a_url_is_demanded() -> None:
    command = [sys.executable, "-m", "sidecar", "webhook", "--tls-cert", str(CERTIFICATE), "--tls-key", str(KEY)]
    done = subprocess.run(command, cwd=ROOT, env={"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}, capture_output=True)
    assert (done.returncode, b"--url" in done.stderr) == (2, True)
