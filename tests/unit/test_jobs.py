"""Jobs: what any process can read of them, that death is noticed, and that they stay few."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import QueueFull

from sidecar import jobs as jobs_module
from sidecar.errors import BlobCorrupt, JobLost, UnknownJob
from sidecar.jobs import ACTIVE, Cancelled, Jobs, Unwatched, Watch
from tests.waiting import PATIENCE_S, soon

ROOT = Path(__file__).parents[2]


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "jobs")


def ended(jobs: Jobs, begun: dict[str, Any]) -> dict[str, Any]:
    deadline = soon()
    while (found := jobs.get(begun["id"]))["state"] in ACTIVE:
        assert time.monotonic() < deadline, found
        time.sleep(0.005)
    return found


class Held:
    """Work that goes on until it is released, telling each step."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.release = threading.Event()

    def __call__(self, watch: Watch) -> object:
        self.begun.set()
        while not self.release.wait(0.005):
            watch.checkpoint()
        return {"held": True}


def test_a_job_ends_with_its_result(jobs: Jobs, tmp_path: Path) -> None:
    def work(watch: Watch) -> object:
        watch.advance(3, 10, "bytes", "half")
        return {"found": 7}

    begun = jobs.begin("pull", "m", work)
    assert begun["kind"] == "pull"
    assert begun["subject"] == "m"
    found = ended(jobs, begun)
    assert found["state"] == "done"
    assert found["result"] == {"found": 7}
    assert found["error"] is None
    assert found["progress"] == {"done": 3, "total": 10, "unit": "bytes", "step": "half"}
    assert found["created_s"] <= found["started_s"] <= found["ended_s"]
    # Another process sees the same.
    assert Jobs(tmp_path / "jobs").all() == [found]


def test_what_fails_is_told_in_the_usual_form(jobs: Jobs) -> None:
    def refuse(watch: Watch) -> object:
        raise BlobCorrupt("altered", digest="ab")

    def break_down(watch: Watch) -> object:
        raise ZeroDivisionError("/secret/path")

    found = ended(jobs, jobs.begin("pull", "m", refuse))
    assert found["state"] == "failed"
    assert found["error"] == BlobCorrupt("altered", digest="ab").to_dict()
    found = ended(jobs, jobs.begin("pull", "m", break_down))
    assert found["error"]["code"] == "sidecar_fault"
    assert "incident" in found["error"]["message"]
    assert "secret" not in json.dumps(found)


def test_a_running_job_is_cancelled_from_any_process(jobs: Jobs, tmp_path: Path) -> None:
    held = Held()
    begun = jobs.begin("verify", "store", held)
    assert held.begun.wait(PATIENCE_S)
    assert jobs.get(begun["id"])["state"] == "running"
    Jobs(tmp_path / "jobs").cancel(begun["id"])
    found = ended(jobs, begun)
    assert found["state"] == "cancelled"
    assert found["result"] is None
    # One that has ended stays as it is.
    assert jobs.cancel(begun["id"]) == found


def test_every_step_looks_whether_to_stop(jobs: Jobs) -> None:
    stopped = threading.Event()

    def work(watch: Watch) -> object:
        try:
            while True:
                watch.advance(1, 2, "blobs")
        except Cancelled:
            stopped.set()
            raise

    begun = jobs.begin("verify", "store", work)
    jobs.cancel(begun["id"])
    assert ended(jobs, begun)["state"] == "cancelled"
    assert stopped.is_set()


def test_only_a_few_run_at_a_time(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "jobs", limit_count=2)
    held = [Held(), Held()]
    begun = [jobs.begin("pull", "m", each) for each in held]
    with pytest.raises(QueueFull, match="2 jobs are under way, the limit is 2") as refused:
        jobs.begin("pull", "n", Held())
    assert refused.value.retryable
    held[0].release.set()
    ended(jobs, begun[0])
    third = Held()
    begun.append(jobs.begin("pull", "n", third))
    held[1].release.set()
    third.release.set()
    assert [ended(jobs, each)["state"] for each in begun] == ["done"] * 3


@pytest.mark.parametrize("job_id", ["0" * 16, "", "..", "../../etc/passwd", "lock", "A" * 16])
def test_an_unknown_job_is_told(jobs: Jobs, job_id: str) -> None:
    with pytest.raises(UnknownJob, match="there is no job"):
        jobs.get(job_id)
    with pytest.raises(UnknownJob):
        jobs.cancel(job_id)


def test_what_ended_is_kept_for_a_while_and_not_all_of_it(tmp_path: Path) -> None:
    few = Jobs(tmp_path / "jobs", kept_count=2)
    ids = [ended(few, few.begin("gc", "store", lambda watch: None))["id"] for _ in range(4)]
    assert [job["id"] for job in few.all()] == ids[:-3:-1]
    none = Jobs(tmp_path / "jobs", kept_s=-1.0)
    assert none.all() == []
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["lock"]


LOSE = """
import sys, threading, time
from pathlib import Path
from sidecar.jobs import Jobs
jobs = Jobs(Path(sys.argv[1]))
begun = threading.Event()
def work(watch):
    watch.advance(1, 2, "bytes")
    begun.set()
    time.sleep(600)
found = jobs.begin("pull", "m", work)
begun.wait()
print(found["id"], flush=True)
time.sleep(600)
"""


def test_a_job_whose_process_was_killed_is_lost(jobs: Jobs, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
    with subprocess.Popen(
        [sys.executable, "-c", LOSE, str(tmp_path / "jobs")], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        job_id = process.stdout.readline().strip()
        assert jobs.get(job_id)["state"] == "running"
        with pytest.raises(QueueFull):
            Jobs(tmp_path / "jobs", limit_count=1).begin("pull", "n", Held())
        process.send_signal(signal.SIGKILL)
        process.wait(PATIENCE_S)
    found = jobs.get(job_id)
    assert found["state"] == "lost"
    assert found["error"]["code"] == JobLost.code
    assert found["error"]["retryable"]
    assert jobs.all() == [found]
    assert not (tmp_path / "jobs" / f"{job_id}.tmp").exists()
    # It does not count any more.
    held = Held()
    begun = Jobs(tmp_path / "jobs", limit_count=1).begin("pull", "n", held)
    held.release.set()
    assert ended(jobs, begun)["state"] == "done"


def test_a_job_that_ends_between_two_looks_is_not_lost(jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Held()
    begun = jobs.begin("gc", "store", held)
    assert held.begun.wait(PATIENCE_S)
    lock = jobs_module._locked

    def ending(path: Path) -> Any:
        monkeypatch.setattr(jobs_module, "_locked", lock)
        held.release.set()
        ended(jobs, begun)
        # Its lock goes a moment later than it is written down as ended.
        deadline = soon()
        while path.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        return lock(path)

    monkeypatch.setattr(jobs_module, "_locked", ending)
    assert jobs.get(begun["id"])["state"] == "done"
    assert {path.name for path in (tmp_path / "jobs").iterdir()} == {"lock", f"{begun['id']}.json"}


def test_what_was_left_before_a_job_was_written_down_goes(jobs: Jobs, tmp_path: Path) -> None:
    assert jobs.all() == []
    (tmp_path / "jobs" / "0123456789abcdef.lock").touch()
    assert jobs.all() == []
    assert [path.name for path in (tmp_path / "jobs").iterdir()] == ["lock"]


def test_a_disk_that_fails_does_not_stop_the_work(jobs: Jobs, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    gone, finished = threading.Event(), threading.Event()

    def work(watch: Watch) -> object:
        assert gone.wait(PATIENCE_S)
        watch.advance(1, 2, "bytes", "told to nobody")
        finished.set()
        return None

    with caplog.at_level(logging.ERROR):
        begun = jobs.begin("pull", "m", work)
        (tmp_path / "jobs").rename(tmp_path / "elsewhere")
        gone.set()
        assert finished.wait(PATIENCE_S)
    with pytest.raises(UnknownJob):
        jobs.get(begun["id"])
    assert f"what became of job {begun['id']} cannot be written down (No such file or directory)" in caplog.text


def test_work_that_somebody_waits_for_is_not_stopped() -> None:
    Unwatched().advance(1, 2, "bytes")
    Unwatched().checkpoint()
