"""The commands for versions: what they ask, what they print, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import UnknownModel

from tests.bundles import write_adding_bundle
from tests.integration.test_cli import MODEL, Answers, run

SPLIT = {"split": {"1": 90, "2": 10}, "sticky": False}
VERSIONS = {
    "name": "m",
    "release": SPLIT,
    "versions": [
        {
            "version": "1",
            "name": "m:1",
            "weight": 90,
            "deployed": [MODEL | {"name": "m:1@a"}, {"name": "m:1@b", "state": "corrupt", "error": {"message": "torn"}}],
        },
        {"version": "2", "name": "m:2", "weight": 10, "deployed": []},
        {"version": "", "name": "m", "weight": 0, "deployed": []},
    ],
}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers(monkeypatch)
    made.table |= {"models/m/versions": VERSIONS, "models/m/release": {"name": "m", "release": SPLIT}}
    return made


def test_versions_are_listed_with_what_they_cost(answers: Answers) -> None:
    result = run("model", "versions", "m")
    assert result.exit_code == 0, result.output
    assert "m: answered by 1 90 %, 2 10 %\n" in result.output
    rows = [line.split() for line in result.output.splitlines()[3:]]
    assert ["1", "90", "m:1@a", "resident", "1.0", "MB", "2.0", "MB", "7"] in rows
    assert ["m:1@b", "corrupt"] in rows
    assert ["2", "10", "m:2", "not", "deployed"] in rows
    assert ["?", "-", "m", "not", "deployed"] in rows
    assert json.loads(run("model", "versions", "m", "--json").output) == VERSIONS


@pytest.mark.parametrize(
    ("release", "text"),
    [
        (None, "m: nothing answers for the name alone"),
        ({"default": "2"}, "m: version 2 answers"),
        ({"split": {"1": 1, "2": 2}, "sticky": True}, "m: answered by 1 33.33 %, 2 66.67 %, by call id"),
    ],
)
def test_a_release_is_told_in_words(answers: Answers, release: dict[str, Any] | None, text: str) -> None:
    answers.table["models/m/versions"] = {"name": "m", "release": release, "versions": []}
    assert text in run("model", "versions", "m").output


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        (["2"], {"default": "2"}),
        (["2", "--no-load"], {"default": "2", "load": False}),
        (["1=90", "2=10"], {"split": {"1": 90, "2": 10}}),
        (["v1.0-rc=90", "b=10", "--sticky"], {"split": {"v1.0-rc": 90, "b": 10}, "sticky": True}),
        # Whether that is a weight the sidecar says.
        (["1=0", "2=10"], {"split": {"1": 0, "2": 10}}),
    ],
)
def test_a_release_is_asked_for_as_it_is_said(answers: Answers, words: list[str], sent: dict[str, object]) -> None:
    result = run("model", "release", "m", *words)
    assert result.exit_code == 0, result.output
    assert (answers.asked, answers.sent) == ([("PUT", "models/m/release")], [sent])
    assert "m: answered by 1 90 %, 2 10 %" in result.output


@pytest.mark.parametrize(
    "words",
    [
        ["release", "m"],
        ["release", "m", "1", "2"],
        ["release", "m", "1=1", "1=2"],
        ["release", "m", "1=-1", "2=1"],
        ["release", "m", "1=a"],
        ["release", "m", "1=0.5", "2=1"],
        ["release", "m", "a/b=1", "2=1"],
        ["release", "m", "1", "--sticky"],
        ["release", "m:1", "1"],
        ["versions", "UP"],
        ["rm-version", "m", "../1"],
        ["rm-version", "m"],
    ],
)
def test_wrong_usage_asks_nothing(answers: Answers, words: list[str]) -> None:
    result = run("model", *words)
    assert result.exit_code == 2, result.output
    assert not answers.asked


def test_a_version_is_removed(answers: Answers) -> None:
    assert "m: version 1 removed" in run("model", "rm-version", "m", "1").output
    assert answers.asked == [("DELETE", "models/m/versions/1")]
    answers.table["models/m/versions/9"] = UnknownModel("m has no version 9; it has 1")
    result = run("model", "rm-version", "m", "9")
    assert (result.exit_code, "m has no version 9" in result.output) == (1, True)


def test_a_bundle_is_pushed_as_a_version(answers: Answers, tmp_path: Path) -> None:
    write_adding_bundle(tmp_path / "m", "m", [1.0, 2.0])
    answers.table |= {"blobs/missing": {"missing": []}, "models/m": MODEL | {"release": {"default": "1"}}}
    result = run("push", str(tmp_path / "m"), "--version", "2")
    assert result.exit_code == 0, result.output
    assert "m: sent 0 of 1 blobs, 0 B of 8 B; version 1 answers" in result.output
    result = run("push", str(tmp_path / "m"))
    assert result.exit_code == 0, result.output
    assert "answers" not in result.output
    result = run("push", str(tmp_path / "m"), "--default")
    assert (result.exit_code, "--version" in result.output) == (2, True)
