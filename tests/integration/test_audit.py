"""The audit log: what is recorded of changes and refusals, and how several workers keep one file."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import flask.testing
import pytest

from sidecar.errors import ConfigError
from sidecar.http.access import OPERATE, READ, Gate, Principal
from sidecar.http.admin import create_app
from sidecar.http.audit import _BURST, SharedFile
from sidecar.store import Store
from tests.waiting import PATIENCE_S

DIGEST = "0" * 64


class Engine:
    def command(self, name: str, arguments: dict[str, object] | None = None) -> Any:
        return {"name": name, "level": "error"}


class Known:
    def holder(self, token: bytes) -> Principal | None:
        return {b"looks": Principal("ann", READ), b"changes": Principal("bob", OPERATE)}.get(token)


@pytest.fixture
def http(tmp_path: Path) -> flask.testing.FlaskClient:
    return create_app(Engine(), Store(tmp_path / "store"), gate=Gate(Known())).test_client()


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Any:
    def read() -> list[dict[str, Any]]:
        found = [json.loads(record.getMessage()) for record in caplog.records if record.name == "trunkline.audit"]
        caplog.clear()
        return found

    # Where nothing but errors is logged, too.
    caplog.set_level(logging.ERROR)
    caplog.handler.setLevel(logging.NOTSET)
    return read


CHANGES = {"Authorization": "Bearer changes"}


def test_a_change_is_recorded(http: flask.testing.FlaskClient, lines: Any) -> None:
    answer = http.post("/admin/v1/models/m/evict", json={}, headers=CHANGES)
    (line,) = lines()
    assert line.pop("time").endswith("Z")
    assert line.pop("worker") == os.getpid()
    assert line.pop("call_id") == answer.headers["X-Call-Id"]
    assert line == {
        "sequence": 1,
        "name": "bob",
        "role": "operate",
        "address": "127.0.0.1",
        "method": "POST",
        "route": "/admin/v1/models/<name>/<any(unload,evict,pin,unpin):action>",
        "object": {"name": "m", "action": "evict"},
        "status": 200,
    }
    http.delete("/admin/v1/models/none", json={}, headers=CHANGES | {"X-Call-Id": "mine"})
    (line,) = lines()
    assert (line["sequence"], line["method"], line["status"], line["call_id"]) == (2, "DELETE", 404, "mine")


@pytest.mark.parametrize(
    ("method", "path", "body", "told"),
    [
        ("PUT", "log-level", {"level": "error"}, {"level": "error"}),
        ("POST", "evict", {"bytes": 5, "device": "cpu"}, {"bytes": 5, "device": "cpu"}),
        ("POST", "models/m/keep", {"priority": 3}, {"name": "m", "priority": 3}),
        ("POST", "models/m/place", {"forbid": ["cpu"]}, {"name": "m", "forbid": ["cpu"]}),
        ("PUT", "models/m/release", {"default": "2", "load": False}, {"name": "m", "default": "2"}),
        (
            "PUT",
            "models/m?version=2&default=true",
            {"manifest": {"name": "m"}, "graph": {}},
            {"name": "m", "version": "2", "default": True},
        ),
        (
            "POST",
            "pull",
            {"source": f"https://a.example/b/m@sha256:{DIGEST}", "name": "n"},
            {"source": f"https://a.example/b/m@sha256:{DIGEST}", "name": "n"},
        ),
    ],
)
def test_what_the_body_says_is_recorded_where_it_is_what_matters(
    http: flask.testing.FlaskClient, lines: Any, method: str, path: str, body: dict[str, Any], told: dict[str, Any]
) -> None:
    http.open(f"/admin/v1/{path}", method=method, json=body, headers=CHANGES)
    (line,) = lines()
    assert line["object"] == told


def test_looking_is_not(http: flask.testing.FlaskClient, lines: Any) -> None:
    assert http.get("/admin/v1/status", headers=CHANGES).status_code == 200
    assert http.get("/nowhere", headers=CHANGES).status_code == 404
    # It asks, and changes nothing.
    assert http.post("/admin/v1/blobs/missing", json={"digests": []}, headers=CHANGES).status_code == 200
    assert http.get("/healthz").status_code == 200
    assert lines() == []


def test_a_refusal_is_recorded_without_the_token(
    http: flask.testing.FlaskClient, lines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    http.get("/admin/v1/status", headers={"Authorization": "Bearer a-guess"})
    assert "a-guess" not in caplog.text
    (line,) = lines()
    assert (line["status"], line["name"], line["role"], line["route"]) == (401, None, None, "/admin/v1/status")
    http.post("/admin/v1/models/m/load", json={}, headers={"Authorization": "Bearer looks"})
    (line,) = lines()
    assert (line["status"], line["name"], line["role"], line["method"]) == (403, "ann", "read", "POST")
    http.get("/nowhere")
    (line,) = lines()
    assert (line["status"], line["route"], line["object"]) == (401, None, {})


def test_nobody_can_fill_the_log_by_being_refused(http: flask.testing.FlaskClient, lines: Any) -> None:
    answers = [http.get("/admin/v1/status").status_code for _ in range(4 * _BURST)]
    assert {401, 429} == set(answers)
    told = lines()
    assert _BURST <= len(told) < len(answers)
    http.post("/admin/v1/models/m/load", json={}, headers=CHANGES)
    (line,) = lines()
    left_out = sum(each.get("refusals_left_out", 0) for each in (*told, line))
    assert len(told) + left_out == len(answers)


@pytest.mark.parametrize("call_id", ["two words", "x" * 129, "ü", "\x7f"])
def test_what_strangers_send_forges_no_line(http: flask.testing.FlaskClient, lines: Any, call_id: str) -> None:
    http.post(
        "/admin/v1/models/m%0a%7b%7d%7f%e2%80%a8/load",
        json={},
        headers=CHANGES,
        environ_overrides={"HTTP_X_CALL_ID": call_id.encode("latin-1").decode("latin-1")},
    )
    (line,) = lines()
    assert line["object"]["name"] == "m\n{}\x7f\u2028"
    assert line["call_id"] != call_id


def test_a_line_has_no_control_characters(http: flask.testing.FlaskClient, caplog: pytest.LogCaptureFixture) -> None:
    http.post("/admin/v1/models/m%0a%00%7f%c2%85%e2%80%a8/load", json={}, headers=CHANGES)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "trunkline.audit"]
    assert line.isprintable()
    assert line.isascii()


def test_the_process_at_the_other_end_of_the_socket_is_named(http: flask.testing.FlaskClient, lines: Any) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        http.post("/admin/v1/models/m/load", json={}, environ_overrides={"gunicorn.socket": ours, "REMOTE_ADDR": ""})
    (line,) = lines()
    assert (line["name"], line["role"], line["pid"], line["uid"]) == ("socket", "operate", os.getpid(), os.getuid())
    http.post("/admin/v1/models/m/load", json={}, environ_overrides={"REMOTE_ADDR": ""})
    (line,) = lines()
    assert "pid" not in line


# --- the file ---------------------------------------------------------------------------------------------------------

LINE_COUNT = 200
PAD = "x" * 80


def append(file: SharedFile, writer: int) -> None:
    for number in range(LINE_COUNT):
        file.handle(logging.makeLogRecord({"msg": f"{writer} {number} {PAD}"}))


def test_workers_append_to_one_file_and_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    # Made before they are forked, as gunicorn's master makes it; too short for a tenth of what comes.
    file = SharedFile(path, limit_bytes=4096, old_count=100)
    workers = [multiprocessing.get_context("fork").Process(target=append, args=(file, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE_S)
        assert worker.exitcode == 0
    file.close()
    files = [each for each in tmp_path.iterdir() if each.suffix != ".lock"]
    assert len(files) > 10
    assert all(each.stat().st_size <= 4096 for each in files)
    lines = [line for each in files for line in each.read_text().splitlines()]
    assert sorted(lines) == sorted(f"{writer} {number} {PAD}" for writer in range(4) for number in range(LINE_COUNT))


def test_old_files_are_removed(tmp_path: Path) -> None:
    file = SharedFile(tmp_path / "audit.log", limit_bytes=1000, old_count=2)
    append(file, 0)
    file.close()
    file.close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["audit.log", "audit.log.1", "audit.log.2", "audit.log.lock"]


def test_a_file_that_somebody_has_taken_away_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    file = SharedFile(path)
    assert path.stat().st_mode & 0o777 == 0o640
    file.handle(logging.makeLogRecord({"msg": "one"}))
    path.unlink()
    file.handle(logging.makeLogRecord({"msg": "two"}))
    assert path.read_text() == "two\n"
    file.close()


def test_a_file_that_cannot_be_written_to_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match="cannot be written to .*No such file.*--audit-file"):
        SharedFile(tmp_path / "none" / "audit.log")
    folder = tmp_path / "made"
    folder.mkdir()
    file = SharedFile(folder / "audit.log")
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    file.handle(logging.makeLogRecord({"msg": "lost"}))
    assert "a line could not be appended" in caplog.text
    file.close()
