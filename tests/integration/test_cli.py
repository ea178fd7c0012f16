"""The command line: what it prints, what it refuses, its exit codes. A sidecar is a table of answers here."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner, Result
from rich.console import Console
from trunkline.errors import DeadlineExceeded, Draining, SidecarUnavailable, TrunklineError, UnknownModel

from benchmarks.traces import recorded
from sidecar.admin_client import AdminClient
from sidecar.bundle import read_bundle
from sidecar.cli import bars, printing
from sidecar.cli.exits import FAILED
from sidecar.cli.main import main
from sidecar.cli.running import serve
from sidecar.config import Settings, flag_of
from tests.bundles import write_adding_bundle
from tests.unit.test_drawing import TREE
from tests.waiting import PATIENCE_S

ROOT = Path(__file__).parents[2]
MODEL = {
    "name": "m",
    "version": "1",
    "state": "resident",
    "bytes": 3_000_000,
    "shared_bytes": 2_000_000,
    "unique_bytes": 1_000_000,
    "shared_with": ["another-model-with-a-rather-long-name", "third"],
    "pinned": True,
    "priority": 5,
    "keep_alive_s": None,
    "leases": 0,
    "requests": 7,
    "last_used_s": 1.0,
}
CORRUPT = {"name": "bad", "state": "corrupt", "error": {"code": "model_corrupt", "message": "field [/nodes] is [red]odd"}}
STATUS = {
    "engine": {"pid": 1, "generation": 2, "uptime_s": 3.0, "draining": False, "device": "cpu"},
    "memory": {
        "budget_bytes": 4_000_000,
        "resident_bytes": 1_000_000,
        "pinned_bytes": 500_000,
        "logical_bytes": 3_000_000,
        "saved_bytes": 2_000_000,
    },
    "models": [MODEL, CORRUPT],
    "sessions": 5,
    "requests": {"answered": 7, "failed": 1, "expired": 0, "waiting": 0},
    "sharing": {"stages": 4, "stage_rows": 5, "stage_requests": 9, "programs": 1},
}


def done(result: Any) -> dict[str, Any]:
    """Return a job as it is when it has ended well."""
    progress = {"done": 1, "total": 1, "unit": "blobs", "step": ""}
    return {
        "id": "0" * 16,
        "kind": "verify",
        "subject": "store",
        "state": "done",
        "progress": progress,
        "result": result,
        "error": None,
    }


QUARANTINED = {
    "id": "0a" * 8,
    "tenant": "vision",
    "model": "embed@vision",
    "state": "refused",
    "refused_for_s": 1.5,
    "certain": True,
}
FREED = {"devices": {"cpu": {"freed_bytes": 2500, "free_bytes": 3000, "budget_bytes": 4000}}}
DRAINED = {"draining": True, "drained": True, "waiting": 0, "running": 0}
DRAINING = "draining: no new requests are taken, and all accepted are answered\n"


class Answers:
    """Stands where requests leave the process; remembers what was asked and whether the client was closed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.table: dict[str, Any] = {"status": STATUS, "models": {"models": [MODEL, CORRUPT]}}
        self.asked: list[tuple[str, str]] = []
        self.sent: list[Any] = []
        self.closed = 0
        monkeypatch.setattr(AdminClient, "_ask", lambda client, method, path, **rest: self._answer(method, path, **rest))
        monkeypatch.setattr(AdminClient, "metrics", lambda client: self._answer("GET", "/metrics"))
        monkeypatch.setattr(AdminClient, "close", lambda client: self._close())

    def _answer(self, method: str, path: str, **rest: Any) -> Any:
        self.asked.append((method, path))
        self.sent.append(rest.get("json"))
        answer = self.table.get(path, MODEL)
        if isinstance(answer, list):
            answer = answer.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _close(self) -> None:
        self.closed += 1


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    return Answers(monkeypatch)


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["--admin", "http://127.0.0.1:1", *words])


def test_status_shows_memory_and_what_is_shared(answers: Answers) -> None:
    result = run("status")
    assert result.exit_code == 0, result.output
    assert f"memory [{'#' * 8}{'.' * 22}] 1.0 MB of 4.0 MB, 500.0 kB pinned" in result.output
    assert "3.0 MB of models take 1.0 MB, 2.0 MB saved" in result.output
    assert "9 stages of requests took 4 runs" in result.output
    row = next(line for line in result.output.splitlines() if line.split()[:1] == ["m"])
    assert row.split() == [
        *("m", "resident,", "pinned", "3.0", "MB", "1.0", "MB", "2.0", "MB", "7"),
        *("another-model-with-a-rather-long-name,", "third"),
    ]
    assert answers.closed == 1


def test_what_a_model_says_of_itself_is_not_markup(answers: Answers) -> None:
    assert "field [/nodes] is [red]odd" in run("status").output
    assert "field [/nodes] is [red]odd" in run("model", "ls").output


@pytest.mark.parametrize("width", [200, 20])
def test_the_name_of_a_version_is_no_emoji(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr(printing.console, "_width", width)
    printing.console.print("add:x: resident")
    printing.print_rows(["model", "told"], [["[bold]add:x[/]", "add:x: it is what stands there"]])
    assert capsys.readouterr().out.replace("model: ", "").count("add:x") == 3


def test_graph_draws_what_is_asked_for(answers: Answers, tmp_path: Path) -> None:
    answers.table["graph"] = TREE
    assert "3 models, 6 blocks, 600 B instead of 900 B" in run("graph").output
    assert run("graph", "--dot", str(tmp_path / "g.dot"), "--svg", str(tmp_path / "g.svg")).output == ""
    assert (tmp_path / "g.dot").read_text().startswith("digraph")
    assert (tmp_path / "g.svg").read_text().startswith("<svg")
    refused = run("graph", "--svg", str(tmp_path / "none" / "g.svg"))
    assert refused.exit_code == FAILED
    assert "No such file" in refused.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["status"], STATUS),
        (["model", "ls"], [MODEL, CORRUPT]),
        (["model", "show", "m"], MODEL),
        (["graph"], TREE),
        (["store", "verify"], {"corrupt": [], "broken": {}}),
        (["store", "gc"], {"count": 2, "size_bytes": 3, "dry_run": False}),
        (["trace"], {"models": {}, "leases": []}),
        (["placement"], {"devices": {}, "models": []}),
        (["model", "load", "m"], MODEL),
        (["model", "unload", "m"], MODEL),
        (["model", "evict", "m"], MODEL),
        (["model", "pin", "m"], MODEL),
        (["model", "unpin", "m"], MODEL),
        (["model", "rm", "m"], MODEL),
        (["model", "keep", "m", "--priority", "1"], MODEL),
        (["model", "place", "m", "--anywhere"], MODEL),
        (["evict", "m"], MODEL),
        (["evict", "--bytes", "1MB"], FREED),
        (["pin", "m"], MODEL),
        (["unpin", "m"], MODEL),
        (["drain"], DRAINED),
        (["resume"], DRAINED | {"draining": False}),
        (["log-level"], {"engine": "info", "http": "info"}),
        (["log-level", "debug"], {"engine": "debug", "http": "debug"}),
        (["sessions"], {"total": 1, "sessions": [{"id": 1}]}),
        (["quarantine", "ls"], [QUARANTINED]),
        (["quarantine", "lift", QUARANTINED["id"]], {"lifted": [QUARANTINED]}),
        (["leases"], {"devices": {}}),
        (["residency"], {"devices": {}}),
    ],
)
def test_json_is_all_that_is_printed(answers: Answers, words: list[str], expected: Any) -> None:
    known = {"trace": "trace?limit=10000", "model": "models/m", "store": f"store/{words[-1]}?wait=false"}
    known |= {"sessions": "sessions?limit=1000", "residency": "residency?limit=20"}
    asked = known.get(words[0], words[0])
    answers.table |= {"quarantine": {"quarantine": [QUARANTINED]}, f"quarantine/{QUARANTINED['id']}": {"lifted": [QUARANTINED]}}
    answers.table.setdefault(asked, done(expected) if words[0] == "store" else expected)
    answers.table["store/verify?wait=false"] = done({"corrupt": [], "broken": {}})
    result = run(*words, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == expected
    assert result.stderr == ""


def test_a_trace_is_written_in_lines_that_can_be_replayed(answers: Answers, tmp_path: Path) -> None:
    answers.table["trace?limit=10000"] = {
        "budget_bytes": 30,
        "policy": "adaptive",
        "recorded": 2,
        "weights": [10, 5],
        "models": {"a": [0], "b": [0, 1]},
        "leases": [[0.5, [0], 0, 10, 0], [1.5, [0, 1], 10, 5, 0]],
    }
    result = run("trace", "-o", str(tmp_path / "found.jsonl"))
    assert (result.exit_code, result.output) == (0, "")
    header, first, second = map(json.loads, (tmp_path / "found.jsonl").read_text().splitlines())
    assert header["weights"] == [10, 5]
    assert first == {"time_s": 0.5, "models": ["a"], "hit_bytes": 0, "missed_bytes": 10, "evicted_bytes": 0}
    assert second["models"] == ["a", "b"]
    trace = recorded(tmp_path / "found.jsonl")
    assert trace.models == {"a": {"0": 10}, "b": {"0": 10, "1": 5}}
    assert trace.asked == [("a",), ("a", "b")]
    assert run("trace").stdout == (tmp_path / "found.jsonl").read_text()


def test_a_broken_store_fails_also_in_json(answers: Answers) -> None:
    answers.table["store/verify?wait=false"] = done({"corrupt": ["0" * 64], "broken": {"m": "1 weights are missing"}})
    result = run("store", "verify", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["broken"] == {"m": "1 weights are missing"}


@pytest.mark.parametrize(
    ("error", "code"),
    [(UnknownModel("no m"), 1), (Draining("bye"), 1), (SidecarUnavailable("nobody"), 3)],
)
def test_errors_are_one_line_and_an_exit_code(answers: Answers, error: TrunklineError, code: int) -> None:
    answers.table["status"] = error
    result = run("status", "--json")
    assert result.exit_code == code
    assert result.stdout == ""
    assert result.stderr == f"error: {error.code}: {error.message}\n"


@pytest.mark.parametrize("name", ["../status", "../store/gc?x=", "a//b", "A", "", "m\n", "a..b", "m?x=1", "m#"])
def test_a_name_that_is_none_asks_nothing(answers: Answers, name: str) -> None:
    for words in (["show"], ["load"], ["unload"], ["evict"], ["pin"], ["unpin"], ["keep", "--priority=1"], ["rm"]):
        assert run("model", *words, name).exit_code == 2
    assert answers.asked == []


def test_a_deployed_model_is_named_with_its_domain(answers: Answers) -> None:
    for words in (["show"], ["load"], ["unload"], ["evict"], ["pin"], ["unpin"], ["keep", "--priority=1"]):
        assert run("model", *words, "m@vision").exit_code != 2
    assert {path.split("/")[1] for _, path in answers.asked} == {"m@vision"}
    answers.asked.clear()
    for words in (["show", "m@"], ["pin", "@vision"], ["load", "m@../x"], ["rm", "m@vision"]):
        assert run("model", *words).exit_code == 2
    assert answers.asked == []


def test_a_bad_address_is_told() -> None:
    result = CliRunner().invoke(main, ["--admin", "nonsense", "status"])
    assert result.exit_code == 1
    assert result.stderr.startswith("error: config_error: ")


@pytest.mark.parametrize(
    "words",
    [
        ["frobnicate"],
        ["status", "--yaml"],
        ["push"],
        ["push", "/nowhere/at/all"],
        ["up", "--gateway-port", "99999999"],
        ["pack", "x:y", "-o", "/nowhere", "--max-batch", "0"],
        ["pack", "x:y"],
        ["model", "keep", "m"],
        ["model", "keep", "m", "--priority", "10"],
        ["model", "keep", "m", "--priority", "high"],
        ["model", "keep", "m", "--keep-alive", "-1"],
        ["model", "keep", "m", "--keep-alive", "nan"],
        ["model", "keep", "m", "--keep-alive", "31536001"],
        ["model", "keep", "m", "--keep-alive", "never"],
        ["model", "place", "m"],
        ["model", "place", "m", "--anywhere", "--pin", "cpu:0"],
        ["model", "place", "m", "--pin", "cpu:0", "--forbid", "cpu:1"],
        ["evict"],
        ["evict", "m", "--bytes", "1GB"],
        ["evict", "--bytes", "much"],
        ["evict", "--bytes", "0"],
        ["evict", "m", "--device", "cpu"],
        ["evict", "../m"],
        ["pin"],
        ["pin", "../m"],
        ["drain", "--timeout", "-1"],
        ["log-level", "loud"],
        ["top", "--interval", "0"],
        ["top", "--count", "-1"],
        ["top", "--sort", "colour"],
        ["quarantine", "lift"],
        ["quarantine", "lift", "0a", "--all"],
        ["quarantine", "lift", "../jobs"],
        ["completion"],
        ["completion", "tcsh"],
    ],
)
def test_wrong_usage_has_its_own_exit_code(answers: Answers, words: list[str]) -> None:
    assert run(*words).exit_code == 2
    assert answers.asked == []


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["--priority", "9"], {"priority": 9}),
        (["--keep-alive", "0"], {"keep_alive_s": 0.0}),
        (["--keep-alive", "forever"], {"keep_alive_s": None}),
        (["--priority", "0", "--keep-alive", "2.5"], {"priority": 0, "keep_alive_s": 2.5}),
    ],
)
def test_only_what_was_said_of_keeping_a_model_is_sent(answers: Answers, words: list[str], sent: dict[str, object]) -> None:
    answers.table["models/m/keep"] = MODEL | {"priority": 9, "keep_alive_s": 2.5}
    result = run("model", "keep", "m", *words)
    assert result.output == "m: priority 9, kept for 2.5 s without a request\n"
    assert (answers.asked, answers.sent) == ([("POST", "models/m/keep")], [sent])


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["--pin", "cpu:1"], {"allow": ["cpu:1"], "forbid": []}),
        (["--allow", "cpu:1", "--allow", "cpu:0"], {"allow": ["cpu:1", "cpu:0"], "forbid": []}),
        (["--forbid", "cuda:0"], {"allow": [], "forbid": ["cuda:0"]}),
        (["--anywhere"], {"allow": [], "forbid": []}),
    ],
)
def test_where_a_model_may_be_is_said_anew_each_time(answers: Answers, words: list[str], sent: dict[str, object]) -> None:
    answers.table["models/m/place"] = {"name": "m", "devices": ["cpu:0", "cpu:1"]}
    result = run("model", "place", "m", *words)
    assert result.output == "m: on cpu:0 and cpu:1\n"
    assert (answers.asked, answers.sent) == ([("POST", "models/m/place")], [sent])


def test_placement_tells_where_models_are_and_why(answers: Answers) -> None:
    entry = {"name": "m", "devices": ["cpu:0"], "moving_to": ["cpu:1"], "allow": [], "forbid": ["cuda:0"]}
    asked = {"rate": 57.53, "under_way": 1.2, "seconds": {"cpu:0": 0.0091, "cpu:1": 0.02}}
    pinned = {"name": "n", "devices": ["cpu:1"], "moving_to": [], "allow": ["cpu:1"], "forbid": []}
    devices = {"cpu:0": {"load": 0.634, "budget_bytes": 1, "under_way": 3}}
    answers.table["placement"] = {"devices": devices, "models": [entry | asked, pinned]}
    lines = [" ".join(line.split()) for line in run("placement").output.splitlines()]
    assert lines[0] == "cpu:0: 63 % of its time is asked for, 3 requests under way"
    assert "m cpu:0 > cpu:1 57.5 cpu:0 9.1, cpu:1 20.0 not cuda:0" in lines
    assert "n cpu:1 0.0 only cpu:1" in lines
    assert json.loads(run("placement", "--json").output)["devices"] == devices


def test_every_setting_has_the_flag_it_is_documented_with() -> None:
    flags = {name for option in serve.params for name in option.opts if isinstance(option, click.Option)}
    assert flags == {flag_of(field.name) for field in fields(Settings)} | {"--config", "--take-over", "--stay"}


def test_a_disk_that_refuses_a_bundle_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(*arguments: object, **named: object) -> list[str]:
        raise OSError(errno.ENOSPC, "No space left on device", "out/blobs/0")

    monkeypatch.setattr("sidecar.packing.pack", fail)
    result = run("pack", "x:y", "-o", str(tmp_path))
    assert result.exit_code == 1
    assert result.stderr == "error: store_error: out/blobs/0: No space left on device\n"


def test_packing_tells_size_operators_and_difference(tmp_path: Path) -> None:
    (tmp_path / "tiny.py").write_text(
        "import torch\n"
        "class Tiny(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.table = torch.nn.Embedding(5, 3)\n"
        "    def forward(self, ids):\n"
        "        return self.table(ids).sum(1)\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    return Tiny(), (torch.zeros(2, 4, dtype=torch.int64),)\n"
    )
    out = tmp_path / "tiny"
    source = f"{tmp_path}/tiny.py:make"
    options = ["--version", "7", "--max-batch", "16", "--dynamic", "ids:1=length:1..32", "--bounds", "ids=0..4"]
    result = run("pack", source, "-o", str(out), "--name", "tiny", *options)
    assert result.exit_code == 0, result.output
    assert re.search(r"tiny version 7: \d+ operators, 1 weights, 0.0 MB, written to ", result.output)
    assert "largest difference from the original" in result.output
    bundle = read_bundle(out)
    assert (bundle.name, bundle.version, bundle.batch) == ("tiny", "7", "batch")
    assert {(symbol.name, symbol.minimum, symbol.maximum) for symbol in bundle.graph.symbols} == {
        ("batch", 1, 16),
        ("length", 1, 32),
    }
    assert (bundle.graph.inputs[0].minimum, bundle.graph.inputs[0].maximum) == (0, 4)
    told = json.loads(run("pack", source, "-o", str(tmp_path / "again"), "--json").stdout)
    assert (told["name"], told["version"], told["weight_count"], told["weight_bytes"]) == ("again", "1", 1, 60)
    assert 0 <= told["max_rel"] <= told["tolerance"]
    refused = run("pack", source, "-o", str(out), "--dynamic", "ids=length")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("error: export_error: --dynamic 'ids=length' is not ")


def test_several_bundles_are_pushed_by_one_command(answers: Answers, tmp_path: Path) -> None:
    answers.table["blobs/missing"] = {"missing": []}
    for name in ("one", "two"):
        write_adding_bundle(tmp_path / name, name, [1.0])
    result = run("push", str(tmp_path / "one"), str(tmp_path / "two"))
    assert result.exit_code == 0, result.output
    assert "one: sent 0 of 1 blobs, 0 B of 4 B" in result.output
    assert ("PUT", "models/two") in answers.asked
    printed = run("push", str(tmp_path / "one"), str(tmp_path / "two"), "--json")
    assert [entry["name"] for entry in json.loads(printed.stdout)] == ["one", "two"]
    sent = {"name": "one", "sent_count": 0, "blob_count": 1, "sent_bytes": 0, "blob_bytes": 4, "release": None}
    assert json.loads(printed.stdout)[0] == sent


@pytest.mark.parametrize(
    ("words", "asked", "sent", "answer", "printed"),
    [
        (["evict", "m"], ("POST", "models/m/evict"), {}, MODEL | {"freed_bytes": 1500}, "m: resident, pinned, 1.5 kB freed\n"),
        (
            ["evict", "--bytes", "2GB"],
            ("POST", "evict"),
            {"bytes": 2 * 10**9},
            FREED,
            "cpu: 2.5 kB freed, 3.0 kB of 4.0 kB free\n",
        ),
        (["evict", "--bytes", "1", "--device", "c"], ("POST", "evict"), {"bytes": 1, "device": "c"}, {"devices": {}}, ""),
        (["pin", "m@d"], ("POST", "models/m@d/pin"), {}, MODEL, "m: resident, pinned\n"),
        (["unpin", "m"], ("POST", "models/m/unpin"), {}, MODEL | {"pinned": False}, "m: resident\n"),
        (["drain"], ("POST", "drain"), {}, DRAINED, DRAINING),
        (["drain", "--timeout", "1.5"], ("POST", "drain"), {"timeout_s": 1.5}, DRAINED, DRAINING),
        (["resume"], ("POST", "resume"), {}, DRAINED | {"draining": False}, "serving\n"),
        (["resume"], ("POST", "resume"), {}, DRAINED, "draining\n"),
        (["log-level"], ("GET", "log-level"), None, {"engine": "info", "http": "debug"}, "engine: info\nhttp: debug\n"),
        (["log-level", "error"], ("PUT", "log-level"), {"level": "error"}, {"engine": "error"}, "engine: error\n"),
    ],
)
def test_what_operators_say_is_sent_and_its_end_is_told(
    answers: Answers, words: list[str], asked: tuple[str, str], sent: Any, answer: Any, printed: str
) -> None:
    answers.table[asked[1]] = answer
    result = run(*words)
    assert (result.exit_code, result.output) == (0, printed)
    assert (answers.asked, answers.sent) == ([asked], [sent])
    assert answers.closed == 1


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_draining_fails_while_requests_are_left(answers: Answers, words: list[str]) -> None:
    answers.table["drain"] = DRAINED | {"drained": False, "waiting": 2, "running": 1}
    result = run("drain", *words)
    assert (result.exit_code, result.stderr) == (1, "")
    if words:
        assert json.loads(result.stdout)["waiting"] == 2
    else:
        assert result.stdout == "draining: no new requests are taken, 2 wait and 1 run still\n"


def lines_of(*words: str) -> list[str]:
    result = run(*words)
    assert result.exit_code == 0, result.output
    return [" ".join(line.split()) for line in result.output.splitlines() if line.strip()]


def test_sessions_are_listed_as_the_sidecar_tells_them(answers: Answers) -> None:
    entries = [
        {"session": 7, "tenant": "[red]", "arena_bytes": 1500, "models": ["a", "b"], "age_s": 1.25, "administrator": True},
        {"session": 8, "tenant": None, "arena_bytes": 0, "more": {"x_bytes": 2000, "y": 1}},
    ]
    answers.table["sessions?limit=1000"] = {"total": 5, "sessions": entries}
    lines = lines_of("sessions")
    assert "session tenant arena models age s administrator more" in lines
    assert "7 [red] 1.5 kB a, b 1.25 yes -" in lines
    assert "8 - 0 B - - - x_bytes 2.0 kB, y 1" in lines
    assert lines[-1] == "and 3 more"
    answers.table["sessions?limit=1000"] = {"total": 0, "sessions": []}
    assert lines_of("sessions") == ["no sessions"]


def test_what_is_in_quarantine_is_listed_and_lifted(answers: Answers) -> None:
    answers.table["quarantine"] = {"quarantine": [QUARANTINED]}
    assert f"{QUARANTINED['id']} vision embed@vision refused 1.5 yes" in lines_of("quarantine", "ls")
    answers.table["quarantine"] = {"lifted": [QUARANTINED]}
    assert lines_of("quarantine", "lift", "--all") == [f"{QUARANTINED['id']}: embed@vision of vision is served again"]
    answers.table["quarantine"] = {"quarantine": [], "lifted": []}
    assert lines_of("quarantine", "ls") == ["no requests in quarantine"]
    assert lines_of("quarantine", "lift", "--all") == ["nothing was held against anybody"]
    assert [method for method, _ in answers.asked] == ["GET", "DELETE", "GET", "DELETE"]


def test_leases_and_pins_are_listed_by_device(answers: Answers) -> None:
    lease = {"model": "m", "version": "1", "bytes": 1500, "leases": 2, "since_s": 0.25, "streaming": False}
    idle: dict[str, object] = {"leases": [], "pinned": []}
    answers.table["leases"] = {"devices": {"cuda:0": {"leases": [lease], "pinned": [{"model": "n"}]}, "cpu": idle}}
    lines = lines_of("leases")
    assert lines[0] == "cuda:0"
    assert "m 1 1.5 kB 2 0.25 no" in lines
    assert lines[-4:] == ["pinned: n", "cpu", "no leases", "pinned: nothing"]


def test_residency_tells_what_leaves_next(answers: Answers) -> None:
    tiers = [{"tier": "device", "budget_bytes": 4000, "used_bytes": 1000}]
    leaving = [{"models": ["m", "n"], "model_count": 2, "weights": 3, "bytes": 500, "priority": 5, "idle_s": 1.5}]
    told = {"tiers": tiers, "pinned_bytes": 10, "leaving_bytes": 500, "leaving": leaving}
    answers.table["residency?limit=1"] = {"devices": {"cpu": told}}
    lines = lines_of("residency", "--limit", "1")
    assert lines[:2] == ["cpu, 10 B pinned, 500 B may leave", f"device [{'#' * 8}{'.' * 22}] 1.0 kB of 4.0 kB"]
    assert "m, n 2 3 500 B 5 1.5" in lines


def test_a_table_that_is_too_wide_is_printed_in_lines(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.cli.printing.console", Console(width=40, soft_wrap=True, highlight=False))
    shown = run("model", "ls").output.splitlines()
    assert shown[:3] == ["model: m", "state: resident, pinned", "bytes: 3.0 MB"]
    assert "shared with: another-model-with-a-rather-long-name, third" in shown
    assert "shared with: field [/nodes] is [red]odd" in shown


def test_what_takes_long_to_load_is_loaded_by_a_job(answers: Answers) -> None:
    late = DeadlineExceeded("30 s are over")
    job = f"jobs/{done(MODEL)['id']}"
    running = done(None) | {"state": "running"}
    answers.table |= {"models/m/load": late, "models/m/load?wait=false": running, job: [running, done(MODEL)]}
    assert run("model", "load", "m").output == "m: resident, pinned\n"
    begun = [("POST", "models/m/load"), ("POST", "models/m/load?wait=false"), ("GET", job), ("GET", job)]
    assert answers.asked == begun
    # What is there is pinned at once.
    answers.asked.clear()
    answers.table |= {"models/m/pin": [late, MODEL], job: [running, done(MODEL | {"pinned": False})]}
    assert run("pin", "m").output == "m: resident, pinned\n"
    assert answers.asked == [("POST", "models/m/pin"), *begun[1:], ("POST", "models/m/pin")]
    answers.table[job] = running | {"state": "failed", "error": UnknownModel("no m").to_dict()}
    refused = run("model", "load", "m")
    assert (refused.exit_code, refused.stderr) == (1, "error: unknown_model: no m\n")
    # Nothing else loads.
    answers.asked.clear()
    answers.table["models/m/evict"] = late
    assert run("evict", "m").exit_code == 3
    assert answers.asked == [("POST", "models/m/evict")]


def test_how_far_a_load_is_is_drawn_for_who_sees_it(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[float, float]] = []
    looked = threading.Event()

    @contextlib.contextmanager
    def bytes_done(name: str) -> Iterator[Any]:
        def advance(done: float, total: float) -> None:
            told.append((done, total))
            looked.set()

        yield advance

    def post(client: AdminClient, path: str, body: object = None) -> Any:
        assert looked.wait(PATIENCE_S)
        return MODEL

    monkeypatch.setattr("sidecar.cli.loading._LOOK_S", 0.001)
    monkeypatch.setattr("sidecar.cli.bars.are_drawn", lambda: True)
    monkeypatch.setattr("sidecar.cli.bars.bytes_done", bytes_done)
    monkeypatch.setattr(AdminClient, "post", post)
    answers.table["models/m"] = {"resident_bytes": 3, "memory_bytes": 9}
    assert run("model", "load", "m").output == "m: resident, pinned\n"
    assert told[0] == (3, 9)


def test_a_look_that_fails_leaves_the_load_alone(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = threading.Event()

    def get(client: AdminClient, path: str) -> Any:
        looked.set()
        raise UnknownModel("no m")

    def post(client: AdminClient, path: str, body: object = None) -> Any:
        assert looked.wait(PATIENCE_S)
        return MODEL

    monkeypatch.setattr("sidecar.cli.loading._LOOK_S", 0.001)
    monkeypatch.setattr("sidecar.cli.bars.are_drawn", lambda: True)
    monkeypatch.setattr(AdminClient, "get", get)
    monkeypatch.setattr(AdminClient, "post", post)
    assert run("model", "load", "m").exit_code == 0


def test_bars_go_to_standard_error_and_leave(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sidecar.cli.bars.are_drawn", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "100")
    with bars.bytes_done("[m]") as advance:
        advance(1_000_000, 4_000_000)
    with bars.steps("begun") as step:
        step("looked for", None)
        step("compared", 0.5)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "[m]" in shown.err
    assert "1.0/4.0 MB" in shown.err
    assert "compared" in shown.err


def test_an_interrupt_is_no_traceback(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(client: AdminClient, path: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(AdminClient, "get", interrupted)
    result = run("status")
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str, tmp_path: Path) -> None:
    script = CliRunner().invoke(main, ["completion", shell]).stdout
    assert f"_TRUNKLINE_COMPLETE={shell}_complete" in script
    if program := shutil.which(shell):
        (tmp_path / "script").write_text(script)
        subprocess.run([program, "-n", str(tmp_path / "script")], check=True, timeout=PATIENCE_S)


def completed(*words: str) -> list[str]:
    """Return what is offered for the last of ``words``."""
    made = BashComplete(main, {}, "trunkline", "_TRUNKLINE_COMPLETE")
    return [item.value for item in made.get_completions(["--admin", "http://127.0.0.1:1", *words[:-1]], words[-1])]


def test_names_are_completed_from_what_the_sidecar_has(answers: Answers) -> None:
    answers.table["models"] = {"models": [{"name": "age@a"}, {"name": "age@b"}, {"name": "gender:2@a"}, {"name": "gender@a"}]}
    answers.table["tenants"] = {"tenants": [{"name": "few"}, {"name": "many"}]}
    answers.table["jobs"] = {"jobs": [{"id": "0a"}, {"id": "1b"}]}
    answers.table["quarantine"] = {"quarantine": [QUARANTINED]}
    assert completed("model", "show", "") == ["age@a", "age@b", "gender:2@a", "gender@a"]
    assert completed("evict", "g") == ["gender:2@a", "gender@a"]
    assert completed("pin", "ag") == ["age@a", "age@b"]
    assert completed("model", "rm", "") == ["age", "gender"]
    assert completed("tenant", "rotate", "m") == ["many"]
    assert completed("job", "cancel", "1") == ["1b"]
    assert completed("quarantine", "lift", "0") == [QUARANTINED["id"]]
    assert completed("sto") == ["store"]
    assert answers.closed == 7


@pytest.mark.parametrize(
    "answer", [SidecarUnavailable("nobody"), UnknownModel("odd"), {"models": [{}]}, {"other": 1}, {"models": 3}]
)
def test_completion_is_silent_where_nobody_answers(answers: Answers, answer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    answers.table["models"] = answer
    assert completed("model", "show", "") == []
    assert capfd.readouterr() == ("", "")


def test_completion_does_not_wait_for_long(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    made = AdminClient.__init__

    def noted(client: AdminClient, address: str, **options: Any) -> None:
        waited.append(options["timeout_s"])
        made(client, address, **options)

    monkeypatch.setattr(AdminClient, "__init__", noted)
    completed("model", "show", "")
    assert waited == [1.0]


def test_help_lists_what_belongs_together_beside_each_other() -> None:
    for words, group in (([], main), (["model"], main.commands["model"]), (["tenant"], main.commands["tenant"])):
        assert isinstance(group, click.Group)
        shown = CliRunner().invoke(main, [*words, "--help"]).output.partition("Commands:")[2]
        assert re.findall(r"^  ([a-z-]+)", shown, re.MULTILINE) == list(group.commands)


def test_help_comes_without_torch_and_without_a_server() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'flask', 'gunicorn'): sys.modules[name] = None\n"
        "from sidecar.cli.main import main\n"
        "sys.argv = ['trunkline', '--help']\n"
        "main()\n"
    )
    path = f"{ROOT}:{ROOT}/template/python3-trunkline"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE_S,
        env={"PYTHONPATH": path, "PATH": ""},
    )
    for command in main.commands:
        assert re.search(rf"^  {command} ", shown.stdout, re.MULTILINE)
