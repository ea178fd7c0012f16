"""The benchmark of the fault matrix: adding up what tests have found, and writing it into the document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import faults
from tests.rows import Trial

ONE = Trial("tests/fault/test_a.py", "test_one", 1, ("F1",))
OTHER = Trial("tests/fault/test_a.py", "test_other", 9, ("F1", "F2"))


def found(name: str, passed: bool = True, **row: Any) -> dict[str, Any]:
    """Return what ``--rows`` writes of a test; without figures for one that counts nothing."""
    return {"test": f"tests/fault/{name}", "passed": passed, "seconds": 1.5, "ids": ["F1"], **({"row": row} if row else {})}


def test_what_several_tests_have_found_is_added_up() -> None:
    figures = faults.figures_of(
        "what",
        [ONE, OTHER],
        [
            found("test_a.py::test_one[1]", attempts=3, answered=2, wrong=0, lost=1, leaked={"sessions": 2}, longest_stall_s=0.5),
            found(
                "test_a.py::test_one[2]", attempts=4, answered=4, wrong=1, lost=0, leaked={"sessions": 1}, longest_stall_s=0.25
            ),
            found("test_a.py::test_other"),
            found("test_b.py::test_one", attempts=100),
        ],
    )
    assert figures == faults.Figures("what", faults.PASSED, 3, 7, 6, 1, 1, {"sessions": 3}, 0.5, 4.5)
    assert figures.cells("F1") == ("F1", "what", "3", "7", "6", "1", "1", "3", "0.50", "4.5", "passed")


def test_a_row_is_what_its_tests_are() -> None:
    one, other = found("test_a.py::test_one"), found("test_a.py::test_other")
    assert faults.figures_of("", [], [one]).state == faults.MISSING
    assert faults.figures_of("", [ONE, OTHER], [one]).state == faults.NOT_RUN
    assert faults.figures_of("", [ONE, OTHER], [one, other]).state == faults.PASSED
    assert faults.figures_of("", [ONE, OTHER], [one | {"passed": False}]).state == faults.FAILED
    assert faults.figures_of("", [ONE], [one]).cells("F1")[3:8] == ("",) * 5
    assert faults.figures_of("nothing", [], []).cells("F2") == ("F2", "nothing", *[""] * 8, "missing")


def test_the_table_is_written_between_its_marker_lines() -> None:
    rows = {"F1": faults.Figures("frames", faults.PASSED, 1, 10, seconds=2.0), "F2": faults.Figures("kills", faults.MISSING)}
    table = faults.markdown(rows, "a machine").splitlines()
    assert table[0] == "a machine"
    assert table[4] == "| F1 | frames | 1 | 10 | 0 | 0 | 0 | 0 | | 2.0 | passed |"
    assert table[5] == "| F2 | kills | | | | | | | | | missing |"
    assert {line.count("|") for line in table[2:]} == {len(faults.HEADINGS) + 1}
    document = f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter"
    assert faults.renewed(document, "new") == document.replace("old", "new")
    with pytest.raises(ValueError, match="the document has no lines"):
        faults.renewed("before", "new")


def test_the_document_has_a_place_for_the_table() -> None:
    text = faults.DOCUMENT.read_text()
    assert faults.renewed(text, "x") != text


def test_a_quick_run_leaves_out_what_took_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    third = Trial("tests/fault/test_c.py", "test_third", 1, ("F3",))
    results = tmp_path / "faults.json"
    monkeypatch.setattr(faults, "RESULTS", results)
    assert faults.quick([ONE, OTHER, third]) == [ONE.node, OTHER.node, third.node]
    took = [found("test_a.py::test_one[1]"), found("test_a.py::test_other"), found("test_c.py::test_third")]
    took[1]["seconds"] = faults.QUICK_TEST_S + 1
    took[2]["seconds"] = 0.1
    results.write_text(json.dumps({"raw": {"tests": took}}))
    assert faults.quick([ONE, OTHER, third]) == [third.node, ONE.node]


def test_tests_that_are_marked_tell_what_they_found_and_those_that_count_nothing_that_they_passed(tmp_path: Path) -> None:
    tests = tmp_path / "test_example.py"
    tests.write_text(
        "import pytest\n\n"
        "@pytest.mark.row('F1', 'T5')\ndef test_counts(row):\n    row.attempts += 3\n\n"
        "@pytest.mark.row('F2')\ndef test_finds_something_wrong(row):\n    row.attempts = row.wrong = 1\n\n"
        "@pytest.mark.row('F3')\n@pytest.mark.parametrize('x', [1, 2])\ndef test_counts_nothing(x):\n    pass\n\n"
        "def test_is_no_row():\n    pass\n"
    )
    here = ["-c", "pyproject.toml", "-p", "tests.conftest", "-p", "tests.fault.conftest"]
    ran = faults.run([*here, str(tests)], "push", within_s=None)
    by_name = {each["test"].partition("::")[2]: each for each in ran}
    assert list(by_name) == ["test_counts", "test_finds_something_wrong", "test_counts_nothing[1]", "test_counts_nothing[2]"]
    assert (by_name["test_counts"]["passed"], by_name["test_counts"]["row"]["attempts"]) == (True, 3)
    assert by_name["test_counts"]["ids"] == ["F1", "T5"]
    assert (by_name["test_finds_something_wrong"]["passed"], by_name["test_finds_something_wrong"]["row"]["wrong"]) == (False, 1)
    assert by_name["test_counts_nothing[1]"]["passed"]
    assert "row" not in by_name["test_counts_nothing[1]"]
