"""The labels of a node: what is told, when, and what becomes of it when the API server does not do it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import SidecarUnavailable

from sidecar.errors import ConfigError
from sidecar.kubernetes.affinity import label_of
from sidecar.kubernetes.apiserver import ApiFailure, ApiServer
from sidecar.kubernetes.nodelabels import NodeLabels
from tests.bundles import write_adding_bundle
from tests.kubernetes.apiserver import ApiServer as Fake
from tests.kubernetes.apiserver import api_server
from tests.kubernetes.programs import program
from tests.sidecar_process import sidecar_process
from tests.waiting import until

A, B = label_of("a"), label_of("b")


def row(name: str, state: str = "resident") -> dict[str, Any]:
    return {"name": name, "state": state}


class Node:
    """A node with a clock of its own, and what its API server was told. ``failures`` are raised first, one at a time."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.rows: list[dict[str, Any]] | None = [row("a")]
        self.told: list[dict[str, str]] = []
        self.failures: list[ApiFailure] = []
        self.labels = NodeLabels(self._models, self._tell, lambda: self.now_s, least_pause_s=30, most=3, chance=lambda: 1.0)

    def _models(self) -> list[dict[str, Any]]:
        if self.rows is None:
            raise SidecarUnavailable("away")
        return self.rows

    def _tell(self, labels: Any) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.told.append(dict(labels))

    def after(self, seconds: float) -> list[dict[str, str]]:
        """Let time pass and look; return what was told since."""
        self.now_s += seconds
        count = len(self.told)
        assert self.labels.step() == 5.0
        return self.told[count:]


@pytest.fixture
def node() -> Node:
    return Node()


def test_what_is_there_is_told_once(node: Node) -> None:
    assert node.after(0) == [{A: "resident"}]
    for _ in range(20):
        assert node.after(5) == []


def test_a_change_is_told_and_changes_at_once_are_told_as_one(node: Node) -> None:
    node.after(0)
    node.rows = [row("a", "stored")]
    assert node.after(5) == []
    node.rows = [row("a", "stored"), row("b")]
    assert node.after(20) == []
    assert node.after(10) == [{B: "resident", A: "stored"}]


def test_what_changes_and_changes_back_is_not_told(node: Node) -> None:
    node.after(0)
    node.rows = []
    assert node.after(5) == []
    node.rows = [row("a")]
    assert node.after(60) == []


def test_it_is_told_again_in_case_the_node_was_made_anew(node: Node) -> None:
    node.after(0)
    assert node.after(1199) == []
    assert node.after(1) == [{A: "resident"}]
    assert node.after(5) == []


def test_versions_and_domains_are_found_by_the_names_that_functions_ask(node: Node) -> None:
    node.rows = [row("a@red", "stored"), row("a@blue"), row("b:2")]
    assert node.after(0) == [{A: "resident", B: "resident", label_of("b:2"): "resident"}]


def test_a_sidecar_that_is_away_for_a_moment_keeps_its_labels(node: Node) -> None:
    node.after(0)
    node.rows = None
    assert node.after(50) == []
    node.rows = [row("a")]
    assert node.after(5) == []
    node.rows = None
    assert node.after(59) == []
    assert node.after(2) == [{}]
    assert node.after(60) == []
    node.rows = [row("a")]
    assert node.after(5) == [{A: "resident"}]


@pytest.mark.parametrize("status", [0, 401, 409, 410, 429, 500, 503])
def test_after_a_failure_it_waits_longer_each_time_and_then_tells(node: Node, status: int) -> None:
    node.failures = [ApiFailure("no", status) for _ in range(3)]
    looks = 0
    while not node.told:
        node.after(0.5)
        looks += 1
    # After 1, 2 and 4 seconds.
    assert looks == 15
    assert not node.failures
    assert node.told == [{A: "resident"}]


def test_a_pause_that_is_asked_for_is_kept_within_bounds(node: Node) -> None:
    node.failures = [ApiFailure("slow down", 429, 90.0), ApiFailure("slow down", 429, 1e9)]
    node.after(0)
    assert node.after(89) == []
    assert len(node.failures) == 1
    node.after(1)
    assert not node.failures
    assert node.after(599) == []
    assert node.after(1) == [{A: "resident"}]


@pytest.mark.parametrize("status", [403, 404, 422])
def test_a_refusal_is_not_tried_again_soon(node: Node, status: int, caplog: pytest.LogCaptureFixture) -> None:
    node.failures = [ApiFailure("forbidden", status)]
    node.after(0)
    assert "docs/scaling.md" in caplog.text
    assert node.after(299) == []
    assert node.after(1) == [{A: "resident"}]


def test_after_a_failure_what_the_node_carries_is_told_even_if_nothing_changed(node: Node) -> None:
    node.after(0)
    node.rows = []
    node.failures = [ApiFailure("lost", 0)]
    assert node.after(60) == []
    node.rows = [row("a")]
    assert node.after(60) == [{A: "resident"}]


def test_who_follows_another_changes_nothing(node: Node) -> None:
    stopped = threading.Event()
    node.after(0)
    stopped.set()
    node.labels.run(stopped)
    assert node.told == [{A: "resident"}]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Fake]:
    with api_server(tmp_path) as running:
        yield running


def test_labels_of_others_stay_and_ours_are_what_was_told_last(api: Fake) -> None:
    client = ApiServer(api.url, api.account)
    api.apply("node-1", "somebody", {"zone": "x"})
    client.label_node("node-1", {A: "resident", B: "stored"})
    client.label_node("node-1", {B: "resident"})
    client.label_node("node-1", {B: "resident"})
    assert api.nodes["node-1"] == {"kubernetes.io/os": "linux", "zone": "x", B: "resident"}
    assert api.version == 3
    client.label_node("node-1", {})
    assert api.nodes["node-1"] == {"kubernetes.io/os": "linux", "zone": "x"}


def test_a_token_that_was_replaced_is_read_anew(api: Fake) -> None:
    client = ApiServer(api.url, api.account)
    client.label_node("node-1", {})
    old = api.token
    api.rotate()
    client.label_node("node-1", {A: "stored"})
    assert api.nodes["node-1"][A] == "stored"
    (api.account / "token").write_text(old)
    with pytest.raises(ApiFailure) as raised:
        client.label_node("node-1", {})
    assert raised.value.status == 401


@pytest.mark.parametrize(
    ("status", "headers", "retry_after_s"),
    [
        (409, {}, 0.0),
        (410, {}, 0.0),
        (429, {"Retry-After": "7"}, 7.0),
        (429, {"Retry-After": "soon"}, 0.0),
        (429, {"Retry-After": "-3"}, 0.0),
        (500, {}, 0.0),
        (503, {"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0.0),
        # A date without a zone, beside the server's own, which has one.
        (503, {"Retry-After": "Fri, 31 Dec 2100 23:59:59 -0000"}, 0.0),
        (307, {"Location": "https://elsewhere/"}, 0.0),
    ],
)
def test_what_is_not_done_is_told_with_its_status(api: Fake, status: int, headers: dict[str, str], retry_after_s: float) -> None:
    api.answers = [(status, headers)]
    with pytest.raises(ApiFailure) as raised:
        ApiServer(api.url, api.account).label_node("node-1", {})
    assert (raised.value.status, raised.value.retry_after_s) == (status, retry_after_s)
    assert str(raised.value) == f"{status}: answered with {status}"
    assert len(api.asked) == 1


def test_a_node_that_is_not_there_is_told(api: Fake) -> None:
    with pytest.raises(ApiFailure, match="not found"):
        ApiServer(api.url, api.account).label_node("node-2", {})


def test_who_cannot_be_reached_or_believed_is_told(api: Fake, tmp_path: Path) -> None:
    with pytest.raises(ApiFailure, match="not reached") as raised:
        ApiServer("https://127.0.0.1:1", api.account).label_node("node-1", {})
    assert raised.value.status == 0
    certificate = (api.account / "ca.crt").read_bytes()
    (api.account / "ca.crt").unlink()
    with pytest.raises(ApiFailure, match="not reached"):
        ApiServer(api.url, api.account).label_node("node-1", {})
    (api.account / "ca.crt").write_bytes(certificate)
    (api.account / "token").unlink()
    with pytest.raises(ApiFailure, match="token"):
        ApiServer(api.url, api.account).label_node("node-1", {})
    assert not api.asked


def test_the_api_server_is_where_the_kubelet_says() -> None:
    assert ApiServer.of_this_cluster({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})._url == "https://10.0.0.1:443"
    found = ApiServer.of_this_cluster({"KUBERNETES_SERVICE_HOST": "fd00::1", "KUBERNETES_SERVICE_PORT": "6443"})
    assert found._url == "https://[fd00::1]:6443"
    with pytest.raises(ConfigError, match="--api-server"):
        ApiServer.of_this_cluster({})


def test_beside_a_sidecar_labels_come_and_go_and_the_next_to_label_finds_them(api: Fake, tmp_path: Path) -> None:
    # The first answers go wrong; each is a reason to ask again.
    api.answers = [(503, {}), (409, {})]
    with sidecar_process(tmp_path) as sidecar:
        flags = ("--node", "node-1", "--api-server", api.url, "--account", str(api.account), "--every", "0.05")
        where = {"TRUNKLINE_ADMIN": f"unix:{sidecar.run_dir}/admin.sock"}
        with program(tmp_path / "log", "node-labels", *flags, "--least-pause", "0.05", **where) as labelling:
            labelling.told("labelled with 0 models")
            write_adding_bundle(tmp_path / "bundle", "a", [1.0])
            sidecar.admin.push(tmp_path / "bundle")
            until(lambda: api.nodes["node-1"].get(A) is not None)
            sidecar.admin.post("models/a/load")
            until(lambda: api.nodes["node-1"].get(A) == "resident")
            sidecar.admin.post("models/a/evict")
            until(lambda: api.nodes["node-1"].get(A) == "stored")
            assert labelling.stop(signal.SIGTERM) == 0
        version = api.version
        with program(tmp_path / "log-2", "node-labels", *flags, "--least-pause", "0.05", **where) as labelling:
            labelling.told("labelled with 1 models")
            # To the API server it is no change.
            assert api.version == version
            sidecar.admin.delete("models/a")
            until(lambda: api.nodes["node-1"] == {"kubernetes.io/os": "linux"})
            assert labelling.stop(signal.SIGTERM) == 0
