"""Jobs and pulls over HTTP: the routes, what is refused at once, and what becomes of jobs when processes die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flask.testing
import pytest
from trunkline.errors import UnknownModel

from sidecar.admin_client import AdminClient
from sidecar.errors import OriginRefused
from sidecar.http.admin import create_app
from sidecar.jobs import ACTIVE, Jobs
from sidecar.origins import Policy, parse_origin
from sidecar.publishing import publish
from sidecar.store import Store
from tests import origin_server as origin
from tests.bundles import adding_bundle
from tests.integration.test_admin import FakeEngine
from tests.integration.test_admin_http import HttpServer
from tests.origin_server import OriginServer, origin_server, write_chained_bundle
from tests.waiting import PATIENCE_S, soon

LARGE = [0.5] * 3_000_001


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs", limit_count=1)


@pytest.fixture
def http(engine: FakeEngine, store: Store, jobs: Jobs, tmp_path: Path) -> flask.testing.FlaskClient:
    policy = Policy(origins=(parse_origin(f"file://{tmp_path}/origin"),))
    return create_app(engine, store, jobs=jobs, policy=policy).test_client()


def ended(ask: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Return a job as it is when it has ended; ``ask`` gives a path's JSON."""
    deadline = soon()
    while (found := ask(f"jobs/{job['id']}"))["state"] in ACTIVE:
        assert time.monotonic() < deadline, found
        time.sleep(0.01)
    return dict(found)


def begun(http: flask.testing.FlaskClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    answer = http.post(f"/admin/v1/{path}", json=body)
    assert answer.status_code == 202, answer.json
    assert answer.json is not None
    assert answer.headers["Location"] == f"/admin/v1/jobs/{answer.json['id']}"
    return ended(lambda name: http.get(f"/admin/v1/{name}").json, answer.json)


def published(tmp_path: Path, root: Path, name: str, values: list[float]) -> str:
    write_chained_bundle(tmp_path / name, name, values)
    return publish(str(tmp_path / name), str(root), store_dir=tmp_path / "none").reference


def test_what_takes_long_is_waited_for_or_a_job(http: flask.testing.FlaskClient, store: Store, engine: FakeEngine) -> None:
    _, blobs = adding_bundle("m", [1.0])
    for digest, content in blobs.items():
        store.put_blob(digest, [content], len(content))
    for path, body, result, total in (
        ("store/verify", {}, {"blob_count": 1, "size_bytes": 4, "corrupt": [], "broken": {}}, 1),
        ("store/gc", {"dry_run": True}, {"count": 0, "size_bytes": 0, "dry_run": True}, 1),
        ("models/m@here/load", {}, {"name": "m@here"}, 0),
    ):
        assert http.post(f"/admin/v1/{path}", json=body).json == result
        assert http.post(f"/admin/v1/{path}?wait=true", json=body).json == result
        found = begun(http, f"{path}?wait=false", body)
        assert found["state"] == "done"
        assert found["result"] == result
        assert found["progress"]["total"] == total
        refused = http.post(f"/admin/v1/{path}?wait=maybe", json=body)
        assert refused.status_code == 400
        assert "wait must be true or false" in refused.text
    assert [job["kind"] for job in http.get("/admin/v1/jobs").json["jobs"]] == ["load", "gc", "verify"]  # type: ignore[index]
    engine.answers["load"] = UnknownModel("no such model")
    assert begun(http, "models/none/load?wait=false", {})["error"]["code"] == "unknown_model"


def test_jobs_wait_for_the_engine_for_longer(store: Store, jobs: Jobs) -> None:
    engine, patient = FakeEngine(), FakeEngine()
    http = create_app(engine, store, jobs=jobs, patient=patient).test_client()
    http.post("/admin/v1/models/m/load", json={})
    assert (len(engine.asked), len(patient.asked)) == (1, 0)
    begun(http, "models/m/load?wait=false", {})
    assert (len(engine.asked), len(patient.asked)) == (1, 1)


def test_a_pull_is_a_job_and_deploys_the_model(
    http: flask.testing.FlaskClient, store: Store, engine: FakeEngine, tmp_path: Path
) -> None:
    reference = published(tmp_path, tmp_path / "origin", "m", [1.0, 2.0])
    found = begun(http, "pull", {"source": f"file://{tmp_path}/origin/{reference}", "name": "mine"})
    assert found["state"] == "done", found
    assert found["result"]["name"] == "mine"
    assert found["result"]["model"] == {"name": "mine"}
    assert engine.asked == [("model_changed", {"name": "mine"})]
    assert store.models() == ["mine"]


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 400, "invalid_input"),
        ({"source": 7}, 400, "invalid_input"),
        ({"source": "m"}, 400, "invalid_input"),
        ({"source": "https://a.example/m@latest"}, 400, "invalid_input"),
        ({"source": "gopher://a.example/m@sha256:" + "0" * 64}, 400, "invalid_input"),
        ({"source": "https://a.example/m@sha256:" + "0" * 64}, 403, "origin_refused"),
        ({"source": "http://169.254.169.254/m@sha256:" + "0" * 64}, 403, "origin_refused"),
        ({"source": "http://0xa9fea9fe/m@sha256:" + "0" * 64}, 400, "invalid_input"),
        ({"source": "file:///etc/m@sha256:" + "0" * 64}, 403, "origin_refused"),
        ({"source": "https://a.example/m@sha256:" + "0" * 64, "name": "../x"}, 404, "unknown_model"),
        ({"source": "https://a.example/m@sha256:" + "0" * 64, "name": 7}, 404, "unknown_model"),
        ({"source": "https://a.example/m@sha256:" + "0" * 64, "force": True}, 400, "invalid_input"),
    ],
)
def test_what_may_not_be_pulled_is_no_job(http: flask.testing.FlaskClient, body: Any, status: int, code: str) -> None:
    refused = http.post("/admin/v1/pull", json=body)
    assert (refused.status_code, refused.json["error"]["code"]) == (status, code)  # type: ignore[index]
    assert http.get("/admin/v1/jobs").json == {"jobs": []}


def test_without_a_list_of_origins_it_is_told_what_to_set(store: Store, engine: FakeEngine) -> None:
    http = create_app(engine, store).test_client()
    refused = http.post("/admin/v1/pull", json={"source": "https://a.example/m@sha256:" + "0" * 64})
    assert refused.status_code == 403
    assert "--pull-origin" in refused.text


def test_a_job_is_cancelled_and_only_few_run(http: flask.testing.FlaskClient, jobs: Jobs) -> None:
    started, release = threading.Event(), threading.Event()

    def work(watch: Any) -> object:
        started.set()
        while not release.wait(0.005):
            watch.checkpoint()
        return None

    job = jobs.begin("pull", "m", work)
    assert started.wait(PATIENCE_S)
    full = http.post("/admin/v1/store/verify?wait=false", json={})
    assert full.status_code == 503
    assert full.headers["Retry-After"] == "1"
    assert full.json["error"]["code"] == "queue_full"  # type: ignore[index]
    # What somebody waits for is no job.
    assert http.post("/admin/v1/store/verify", json={}).status_code == 200
    assert http.delete(f"/admin/v1/jobs/{job['id']}").status_code == 400
    cancelled = http.delete(f"/admin/v1/jobs/{job['id']}", content_type="application/json")
    assert cancelled.status_code == 200
    assert ended(lambda name: http.get(f"/admin/v1/{name}").json, job)["state"] == "cancelled"
    for job_id in ("0" * 16, "%2e%2e", "lock"):
        assert http.get(f"/admin/v1/jobs/{job_id}").status_code == 404
        assert http.delete(f"/admin/v1/jobs/{job_id}", content_type="application/json").status_code == 404


# --- as gunicorn serves it, without an engine -------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OriginServer]:
    with origin_server(tmp_path / "origin") as made:
        monkeypatch.setenv("TRUNKLINE_PULL_ORIGINS", made.url)
        yield made


def test_an_engine_that_is_away_leaves_the_model_in_the_store(folder: Path, tmp_path: Path, server: OriginServer) -> None:
    reference = published(tmp_path, server.root, "m", [1.0, 2.0])
    running = HttpServer(folder)
    client = AdminClient(running.url)
    try:
        found = ended(client.get, client.post("pull", {"source": f"{server.url}/{reference}"}))
        assert found["state"] == "failed"
        assert found["error"]["code"] == "sidecar_unavailable"
        assert found["error"]["retryable"]
        assert str(running.run_dir) not in str(found)
        assert (running.store_dir / "models" / "m.json").exists()
        with pytest.raises(OriginRefused):
            client.post("pull", {"source": f"{server.url[:-1]}/{reference}"})
    finally:
        client.close()
        running.stop()


def test_a_full_disk_in_the_middle_of_a_pull_is_told_as_such(folder: Path, tmp_path: Path, server: OriginServer) -> None:
    reference = published(tmp_path, server.root, "m", LARGE)
    running = HttpServer(folder, file_limit_bytes=1 << 20)
    client = AdminClient(running.url)
    try:
        found = ended(client.get, client.post("pull", {"source": f"{server.url}/{reference}"}))
        assert found["state"] == "failed"
        assert found["error"]["code"] == "store_full"
        assert "12000004 bytes could not be stored" in found["error"]["message"]
        for kind in ("partial", "blobs"):
            assert not [path for path in (running.store_dir / kind).rglob("*") if path.is_file()]
    finally:
        client.close()
        running.stop()


def workers(running: HttpServer) -> list[int]:
    pid = running.process.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_worker_that_is_killed_loses_its_job_and_the_next_pull_goes_on(
    folder: Path, tmp_path: Path, server: OriginServer
) -> None:
    reference = published(tmp_path, server.root, "m", LARGE)
    source = {"source": f"{server.url}/{reference}"}
    server.misbehave["/blobs"] = origin.silent_in_the_middle
    running = HttpServer(folder)
    client = AdminClient(running.url)
    try:
        job = client.post("pull", source)
        assert server.waited_for.wait(PATIENCE_S)
        deadline = soon()
        while client.get(f"jobs/{job['id']}")["progress"]["done"] == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        client.close()
        for pid in workers(running):
            os.kill(pid, signal.SIGKILL)
        while not running._answers():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        found = client.get(f"jobs/{job['id']}")
        assert (found["state"], found["error"]["code"]) == ("lost", "job_lost")
        server.release.set()
        server.misbehave.clear()
        found = ended(client.get, client.post("pull", source))
        # There is no engine here; the weight came, and only the rest of it.
        assert found["error"]["code"] == "sidecar_unavailable"
        assert len(server.ranges()) == 1
        assert client.post("store/verify")["broken"] == {}
    finally:
        client.close()
        running.stop()
