"""`trunkline model publish`, `model pull` and `job`: what they print, and a real sidecar that pulls from a real server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from trunkline.errors import SidecarUnavailable

from sidecar.cli import jobs as jobs_cli
from sidecar.cli.exits import FAILED, INTERRUPTED, UNREACHABLE
from sidecar.cli.main import main
from sidecar.errors import JobLost
from sidecar.publishing import publish
from sidecar.store import Store
from tests import origin_server as origin
from tests.bundles import write_adding_bundle
from tests.integration.test_cli import Answers, run
from tests.origin_server import OriginServer, origin_server, write_chained_bundle
from tests.sidecar_process import ROOT, SidecarProcess, sidecar_process
from tests.unit.test_signers import write_key
from tests.waiting import PATIENCE_S, soon

DIGEST = "ab" * 32
SOURCE = f"https://models.example/m@sha256:{DIGEST}"
LARGE = [0.5] * 3_000_001
JOB = {
    "id": "0123456789abcdef",
    "kind": "pull",
    "subject": SOURCE,
    "state": "running",
    "progress": {"done": 500_000, "total": 2_000_000, "unit": "bytes", "step": "weight 1 of 3"},
    "result": None,
    "error": None,
    "created_s": 0.0,
    "started_s": 1.0,
    "ended_s": None,
}
PULLED = {
    "name": "m",
    "version": "1",
    "digest": DIGEST,
    "signer": None,
    "fetched_count": 2,
    "blob_count": 3,
    "fetched_bytes": 2_000_000,
    "blob_bytes": 3_000_000,
}
DONE = JOB | {"state": "done", "result": PULLED}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    return Answers(monkeypatch)


# --- what is printed --------------------------------------------------------------------------------------------------


def test_a_pull_follows_its_job(answers: Answers) -> None:
    answers.table |= {"pull": JOB, f"jobs/{JOB['id']}": DONE}
    result = run("model", "pull", SOURCE, "--name", "mine")
    assert result.exit_code == 0, result.output
    assert "m version 1: fetched 2 of 3 weights, 2.0 MB of 3.0 MB" in result.output
    assert answers.asked == [("POST", "pull"), ("GET", f"jobs/{JOB['id']}")]
    assert answers.sent[0] == {"source": SOURCE, "name": "mine"}
    result = run("model", "pull", SOURCE, "--json")
    assert json.loads(result.stdout) == PULLED
    answers.table["pull"] = DONE | {"result": PULLED | {"signer": "release"}}
    assert "m version 1, signed by release: " in run("model", "pull", SOURCE).output


def test_a_job_that_fails_ends_the_command_with_its_error(answers: Answers) -> None:
    answers.table |= {"pull": JOB, f"jobs/{JOB['id']}": JOB | {"state": "lost", "error": JobLost("it died").to_dict()}}
    result = run("model", "pull", SOURCE)
    assert result.exit_code == FAILED
    assert result.stderr == "error: job_lost: it died\n"
    answers.table[f"jobs/{JOB['id']}"] = JOB | {"state": "cancelled"}
    result = run("model", "pull", SOURCE)
    assert result.exit_code == FAILED
    assert "cancelled" in result.stderr


def test_an_endpoint_that_is_started_again_is_waited_for(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    answers.table["pull"] = JOB
    left: list[Any] = [SidecarUnavailable("not now"), SidecarUnavailable("not yet"), DONE]
    ask = answers._answer

    def answer(method: str, path: str, **rest: Any) -> Any:
        if not path.startswith("jobs/"):
            return ask(method, path, **rest)
        found = left.pop(0)
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(answers, "_answer", answer)
    assert run("model", "pull", SOURCE).exit_code == 0
    assert left == []
    monkeypatch.setattr(jobs_cli, "PATIENCE_S", 0.0)
    left.append(SidecarUnavailable("not now"))
    assert run("model", "pull", SOURCE).exit_code == UNREACHABLE


def test_jobs_are_listed_shown_and_cancelled(answers: Answers) -> None:
    failed = JOB | {"id": "f" * 16, "state": "failed", "error": JobLost("it [red]died").to_dict()}
    verify = JOB | {
        "id": "e" * 16,
        "kind": "verify",
        "subject": "store",
        "state": "done",
        "progress": {"done": 3, "total": 7, "unit": "blobs", "step": ""},
        "result": {"blob_count": 7},
    }
    begun = JOB | {"id": "d" * 16, "state": "queued", "progress": {"done": 0, "total": 0, "unit": "", "step": ""}}
    listed = [JOB, failed, verify, begun]
    answers.table["jobs"] = {"jobs": listed}
    answers.table |= {f"jobs/{job['id']}": job for job in listed}
    lines = [" ".join(line.split()) for line in run("job", "ls").output.splitlines()]
    assert any(line.startswith("0123456789abcdef pull running 500.0 kB of 2.0 MB, weight 1 of 3 19") for line in lines), lines
    assert any(line.startswith("eeeeeeeeeeeeeeee verify done 3 of 7 blobs") for line in lines), lines
    assert any(line.startswith("dddddddddddddddd pull queued - ") for line in lines), lines
    assert json.loads(run("job", "ls", "--json").stdout) == listed
    assert "job_lost: it [red]died" in run("job", "show", "f" * 16).output
    assert "blob_count: 7" in run("job", "show", "e" * 16).output
    assert json.loads(run("job", "show", "e" * 16, "--json").stdout) == verify
    assert run("job", "cancel", JOB["id"]).output == "0123456789abcdef: asked to stop\n"  # type: ignore[arg-type]
    assert run("job", "cancel", "e" * 16).output == "eeeeeeeeeeeeeeee: done\n"
    assert json.loads(run("job", "cancel", "e" * 16, "--json").stdout) == verify
    assert ("DELETE", f"jobs/{JOB['id']}") in answers.asked
    for bad in ("../status", "", "a b", "ä"):
        assert run("job", "show", bad).exit_code == 2


# --- publishing -------------------------------------------------------------------------------------------------------


def files(root: Path) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def published(*words: str) -> Result:
    return CliRunner().invoke(main, ["model", "publish", *words])


def test_only_what_is_not_there_is_written(tmp_path: Path) -> None:
    root = tmp_path / "origin"
    write_chained_bundle(tmp_path / "first", "first", [1.0, 2.0], [3.0, 4.0])
    result = published(str(tmp_path / "first"), str(root))
    assert result.exit_code == 0, result.output
    assert "wrote 2 of 2 weights, 16 B of 16 B" in result.output
    reference = result.output.splitlines()[-1]
    assert re.fullmatch(r"first@sha256:[0-9a-f]{64}", reference)
    digest = reference.partition("sha256:")[2]
    assert hashlib.sha256((root / "manifests" / digest).read_bytes()).hexdigest() == digest
    before = {name: (root / name).stat().st_mtime_ns for name in files(root)}
    assert len(before) == 4
    told = {"reference": reference, "sent_count": 0, "blob_count": 2, "sent_bytes": 0, "blob_bytes": 16}
    assert json.loads(published(str(tmp_path / "first"), str(root), "--json").stdout) == told
    assert "wrote 0 of 2 weights" in published(str(tmp_path / "first"), str(root)).output
    assert {name: (root / name).stat().st_mtime_ns for name in files(root)} == before
    write_chained_bundle(tmp_path / "sibling", "sibling", [1.0, 2.0], [5.0, 6.0])
    assert "wrote 1 of 2 weights, 8 B of 16 B" in published(str(tmp_path / "sibling"), str(root)).output
    assert len(files(root)) == 7


def test_what_was_cut_off_is_written_again(tmp_path: Path) -> None:
    write_chained_bundle(tmp_path / "m", "m", [1.0, 2.0])
    published(str(tmp_path / "m"), str(tmp_path / "origin"))
    blob = next((tmp_path / "origin" / "blobs").glob("*/*"))
    blob.write_bytes(b"cut")
    assert "wrote 1 of 1 weights" in published(str(tmp_path / "m"), str(tmp_path / "origin")).output
    assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name


def test_a_model_of_the_store_is_published_by_name(tmp_path: Path) -> None:
    bundle, blobs = origin.chained_bundle("m", [1.0, 2.0])
    store = Store(tmp_path / "store")
    for digest, content in blobs.items():
        store.put_blob(digest, [content], len(content))
    from sidecar.bundle import canonical_graph, manifest_bytes

    store.put_model(manifest_bytes(bundle), canonical_graph(bundle.graph))
    write_chained_bundle(tmp_path / "m", "m", [1.0, 2.0])
    folder = published(str(tmp_path / "m"), str(tmp_path / "a"))
    by_name = published("m", str(tmp_path / "b"), "--store-dir", str(tmp_path / "store"))
    assert by_name.output == folder.output.replace(str(tmp_path / "m"), "m")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    for words, problem in (
        (["none"], "unknown_model"),
        (["none/such"], "bundle_error"),
        (["m", "--store-dir", str(tmp_path / "nowhere")], "nor a store in"),
    ):
        refused = published(words[0], str(tmp_path / "c"), "--store-dir", str(tmp_path / "store"), *words[1:])
        assert refused.exit_code == FAILED
        assert problem in refused.stderr
    assert not (tmp_path / "nowhere").exists()


def test_bytes_that_are_not_their_digests_are_not_published(tmp_path: Path) -> None:
    bundle = write_chained_bundle(tmp_path / "m", "m", [1.0, 2.0])
    blob = tmp_path / "m" / "blobs" / bundle.graph.weights[0].digest
    blob.write_bytes(b"!" + blob.read_bytes()[1:])
    for destination in (str(tmp_path / "origin"), "memory://altered"):
        refused = published(str(tmp_path / "m"), destination)
        assert refused.exit_code == FAILED
        assert refused.stderr.startswith("error: blob_corrupt")
    assert files(tmp_path / "origin") == set()


def test_where_nothing_can_be_written_is_told(tmp_path: Path) -> None:
    write_chained_bundle(tmp_path / "m", "m", [1.0, 2.0])
    (tmp_path / "file").touch()
    for destination, problem in (
        (str(tmp_path / "file"), "Not a directory"),
        ("http://127.0.0.1:9/models", "NotImplementedError"),
        ("nonsense://x", "ValueError"),
    ):
        refused = published(str(tmp_path / "m"), destination)
        assert refused.exit_code == FAILED
        assert re.search(f"store_error: .* cannot be written to .*{problem}", refused.stderr), refused.stderr


def test_a_key_that_cannot_sign_is_told_before_anything_is_written(tmp_path: Path) -> None:
    write_chained_bundle(tmp_path / "m", "m", [1.0, 2.0])
    refused = published(str(tmp_path / "m"), str(tmp_path / "origin"), "--sign-key", str(tmp_path / "none"))
    assert refused.exit_code == FAILED
    assert refused.stderr.startswith("error: config_error")
    assert not (tmp_path / "origin").exists()


# --- a real sidecar ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OriginServer]:
    with origin_server(tmp_path_factory.mktemp("origin")) as made:
        yield made


@pytest.fixture(scope="module")
def sidecar(tmp_path_factory: pytest.TempPathFactory, server: OriginServer) -> Iterator[SidecarProcess]:
    folder = tmp_path_factory.mktemp("sidecar")
    (folder / "signers").write_text(write_key(folder / "release", name="release"))
    flags = ("--pull-origin", server.url, "--pull-origin", f"file://{server.root}", "--pull-signers", str(folder / "signers"))
    with sidecar_process(folder, *flags) as running:
        yield running


def signed(sidecar: SidecarProcess, server: OriginServer, bundle: Path) -> str:
    key = sidecar.store_dir.parent / "release"
    return publish(str(bundle), str(server.root), store_dir=bundle, sign_key=key).reference


def cli(sidecar: SidecarProcess, *words: str) -> Result:
    return CliRunner().invoke(main, ["--admin", sidecar.admin.address, *words])


def test_a_model_is_pulled_and_answers(sidecar: SidecarProcess, server: OriginServer, tmp_path: Path) -> None:
    write_adding_bundle(tmp_path / "adder", "adder", [1.0] * 1000)
    reference = signed(sidecar, server, tmp_path / "adder")
    for source in (server.url, f"file://{server.root}"):
        result = cli(sidecar, "model", "pull", f"{source}/{reference}")
        assert result.exit_code == 0, result.output
        assert "adder version 1, signed by release: fetched " in result.output
    assert "adder: resident" in cli(sidecar, "model", "load", "adder").output
    job = sidecar.admin.post("models/adder/load?wait=false")
    deadline = soon()
    while (found := sidecar.admin.get(f"jobs/{job['id']}"))["state"] in jobs_cli.ACTIVE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert found["result"]["state"] == "resident"
    assert "0 corrupt" in cli(sidecar, "store", "verify").output
    refused = cli(sidecar, "model", "pull", f"http://localhost:{server.port}/{reference}")
    assert refused.exit_code == FAILED
    assert refused.stderr.startswith("error: origin_refused")


def test_a_key_that_is_pressed_to_end_it_ends_the_job(sidecar: SidecarProcess, server: OriginServer, tmp_path: Path) -> None:
    write_chained_bundle(tmp_path / "large", "large", LARGE)
    reference = signed(sidecar, server, tmp_path / "large")
    server.misbehave["/blobs"] = origin.silent_in_the_middle
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/template/python3-trunkline"}
    words = ["--admin", sidecar.admin.address, "model", "pull", f"{server.url}/{reference}"]
    with subprocess.Popen(
        [sys.executable, "-m", "sidecar", *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert server.waited_for.wait(PATIENCE_S)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == INTERRUPTED
    assert re.fullmatch(r"job [0-9a-f]{16} is asked to stop\ninterrupted\n", told)
    deadline = soon()
    while (found := sidecar.admin.get("jobs")["jobs"][0])["state"] in jobs_cli.ACTIVE:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert found["state"] == "cancelled"
    server.release.set()
    server.misbehave.clear()
    result = cli(sidecar, "model", "pull", f"{server.url}/{reference}")
    assert result.exit_code == 0, result.output
    assert len(server.ranges()) == 1


def test_a_file_of_signers_with_a_mistake_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "signers").write_text("nonsense\n")
    words = ["serve", "--run-dir", str(tmp_path / "run"), "--store-dir", str(tmp_path / "store"), "--admin-port", "0"]
    result = CliRunner().invoke(main, [*words, "--device", "cpu", "--pull-signers", str(tmp_path / "signers")])
    assert result.exit_code == FAILED
    assert "line 1: no public key as OpenSSH writes it" in result.stderr
