"""The fault matrix and the threat table: every row is tried, and the documents say by which tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fault.matrix import NIGHTLY, Row
from tests.rows import DOCUMENTS, FAULTS, ROOT, ROWS, THREATS, Trial, by_row, linked, trials

RENEW = "python -m tests.rows writes the links anew"


def test_every_row_is_tried() -> None:
    assert [row for row, tests in by_row().items() if not tests] == []


def test_no_test_is_marked_with_a_row_that_does_not_exist() -> None:
    assert {row for trial in trials() for row in trial.rows} <= ROWS.keys()


def test_rows_are_numbered_without_gaps() -> None:
    assert list(FAULTS) == [f"F{number}" for number in range(1, 33)]
    assert list(THREATS) == [f"T{number}" for number in range(1, 25)]


@pytest.mark.parametrize(("name", "rows"), [(DOCUMENTS[0], FAULTS), (DOCUMENTS[1], THREATS)])
def test_a_document_has_a_line_for_each_row_with_links_to_its_tests(name: str, rows: dict[str, str]) -> None:
    text = (ROOT / name).read_text()
    table = next(part for part in text.split("\n\n") if part.splitlines()[0].endswith("| tests |"))
    assert re.findall(r"^\| ([FT]\d+) \|", table, re.MULTILINE) == list(rows)
    assert linked(text, str(Path(name).parent), by_row()) == text, RENEW


def test_promises_are_shown_by_rows_that_exist() -> None:
    section = (ROOT / "docs/reliability.md").read_text().partition("## What is promised")[2].partition("\n## ")[0]
    promises = re.findall(r"^\| (\d) \|.*\| ([^|]*) \|$", section, re.MULTILINE)
    assert [number for number, _ in promises] == list("12345678")
    for _, told in promises:
        assert re.fullmatch(r"([FT]\d+)(( to |, )[FT]\d+)*", told)
        assert set(re.findall(r"[FT]\d+", told)) <= ROWS.keys()


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / name).read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / name).parent / path if path else ROOT / name
        assert found.is_file(), target
        headings = re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings], target


def test_links_are_written_into_the_last_column_of_lines_of_rows_and_nowhere_else() -> None:
    text = (
        "| row | what | tests |\n|---|---|---|\n| F1 | a \\| b | old |\n| F2 | c | |\n\n| row | seconds |\n|---|---|\n| F1 | 3 |"
    )
    by = {"F1": [Trial("tests/fault/test_a.py", "test_b", 1, ("F1",))], "F2": []}
    assert linked(text, "docs", by) == text.replace("old", "[`test_b`](../tests/fault/test_a.py)").replace(
        "c | |", "c | none yet |"
    )
    by["F1"] *= 2
    assert "[test_a, 2](tests/fault/test_a.py)" in linked(text, "", by)


def test_marks_are_found_in_sources(tmp_path: Path) -> None:
    (tmp_path / "tests" / "fault").mkdir(parents=True)
    source = """
@pytest.mark.parametrize("x", [1])
@pytest.mark.row("F1", "T5")
def test_b(x): ...

@pytest.mark.gpu
def test_c(): ...
"""
    (tmp_path / "tests" / "fault" / "test_a.py").write_text(source)
    assert trials(tmp_path) == [Trial("tests/fault/test_a.py", "test_b", 4, ("F1", "T5"))]
    assert by_row(tmp_path)["T5"][0].node == "tests/fault/test_a.py::test_b"
    assert not by_row(tmp_path)["T6"]


def test_a_push_tries_less_often_where_it_is_said_so_and_a_night_more_often_everywhere() -> None:
    rows = [Row(("F1",), size) for size in ("push", "full", "night")]
    assert [each.count(50) for each in rows] == [50, 50, 50 * NIGHTLY]
    assert [each.count(50, push=5) for each in rows] == [5, 50, 50 * NIGHTLY]
