"""The fault matrix and the threat table as figures: runs the tests of every row, one after another, and adds up what they found.

All is tried as often as the matrix asks for, also where a push makes do with less.

``--docs`` writes the table into docs/reliability.md. Exits with 1 when a test of a row has failed.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from benchmarks.report import Report
from tests.rows import ROOT, ROWS, Size, Trial, by_row

DOCUMENT: Final = ROOT / "docs" / "reliability.md"
RESULTS: Final = ROOT / "benchmarks" / "results" / "faults.json"
BEGIN: Final = "<!-- written by benchmarks/faults.py -->"
END: Final = "<!-- end of what is written -->"

MISSING: Final = "missing"
NOT_RUN: Final = "not run"
PASSED: Final = "passed"
FAILED: Final = "failed"

# Of --quick: no test is begun that took longer, and after so long those that are left are not run.
QUICK_TEST_S: Final = 15.0
QUICK_S: Final = 40.0
# From being told to end until it is killed, with what it has started.
_ENDING_S: Final = 15.0
_WIDTH: Final = 150

OPTIONS: Final[Mapping[Size, Sequence[str]]] = {"push": (), "full": ("--full",), "night": ("--nightly",)}

HEADINGS: Final = ("row", "what", "tests", "attempts", "answered", "wrong", "lost", "left behind", "stall, s", "seconds", "")


@dataclass
class Figures:
    """What the tests of a row have found together. Where none counts its attempts, they are 0."""

    what: str
    state: str
    tests: int = 0
    attempts: int = 0
    answered: int = 0
    wrong: int = 0
    lost: int = 0
    left_behind: dict[str, int] = field(default_factory=dict)
    longest_stall_s: float = 0.0
    seconds: float = 0.0

    def cells(self, row: str) -> tuple[str, ...]:
        """Return the line of the table."""
        if self.state in (MISSING, NOT_RUN):
            return (row, self.what, *[""] * (len(HEADINGS) - 3), self.state)
        counted = [str(count) for count in (self.attempts, self.answered, self.wrong, self.lost, sum(self.left_behind.values()))]
        stall = f"{self.longest_stall_s:.2f}" if self.longest_stall_s else ""
        return (
            row,
            self.what,
            str(self.tests),
            *(counted if self.attempts else [""] * len(counted)),
            stall,
            f"{self.seconds:.1f}",
            self.state,
        )


def figures_of(what: str, marked: Sequence[Trial], found: Sequence[Mapping[str, Any]]) -> Figures:
    """Add up what was found by the tests of one row. ``found`` has all tests, by parameters, as ``--rows`` writes them."""
    wanted = {trial.node for trial in marked}
    mine = [each for each in found if _node(each) in wanted]
    if not wanted:
        return Figures(what, MISSING)
    figures = Figures(what, PASSED, tests=len(mine))
    for each in mine:
        counted = each.get("row", {})
        figures.attempts += counted.get("attempts", 0)
        figures.answered += counted.get("answered", 0)
        figures.wrong += counted.get("wrong", 0)
        figures.lost += counted.get("lost", 0)
        for name, count in counted.get("leaked", {}).items():
            figures.left_behind[name] = figures.left_behind.get(name, 0) + count
        figures.longest_stall_s = max(figures.longest_stall_s, counted.get("longest_stall_s", 0.0))
        figures.seconds = round(figures.seconds + each["seconds"], 3)
    if not all(each["passed"] for each in mine):
        figures.state = FAILED
    elif {_node(each) for each in mine} != wanted:
        figures.state = NOT_RUN
    return figures


def _node(found: Mapping[str, Any]) -> str:
    return str(found["test"]).partition("[")[0]


def run(nodes: Sequence[str], size: Size, *, within_s: float | None) -> list[dict[str, Any]]:
    """Run tests one after another; return what ``--rows`` has of those that came to an end."""
    with tempfile.TemporaryDirectory(prefix="trunkline-faults-") as folder:
        rows = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--continue-on-collection-errors", "--rows", str(rows)]
        # What it says goes where it does not mix with the figures.
        process = subprocess.Popen([*command, *OPTIONS[size], *nodes], cwd=ROOT, stdout=sys.stderr)
        try:
            process.wait(within_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_ENDING_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return list(json.loads(rows.read_text())) if rows.exists() else []


def quick(marked: Sequence[Trial]) -> list[str]:
    """Return the tests that do not take long, by the figures there are, those of a file together, the quickest file first."""
    took_s: defaultdict[str, float] = defaultdict(float)
    if RESULTS.exists():
        for each in json.loads(RESULTS.read_text())["raw"]["tests"]:
            took_s[_node(each)] += each["seconds"]
    files: defaultdict[str, list[str]] = defaultdict(list)
    for trial in marked:
        if took_s[trial.node] <= QUICK_TEST_S:
            files[trial.path].append(trial.node)
    return [node for _, nodes in sorted(files.items(), key=lambda file: sum(took_s[each] for each in file[1])) for node in nodes]


def markdown(rows: Mapping[str, Figures], machine: str) -> str:
    """Return the table as it stands in the document."""
    lines = [" | ".join(cells) for cells in (HEADINGS, ["---"] * len(HEADINGS))]
    lines += [" | ".join(figures.cells(row)) for row, figures in rows.items()]
    return "\n".join([machine, "", *[f"| {line} |".replace("  |", " |") for line in lines]])


def renewed(document: str, written: str) -> str:
    """Return the document with what is between its two marker lines replaced."""
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"the document has no lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{written}\n{END}{after}"


def _show(rows: Mapping[str, Figures]) -> None:
    table = Table(title="faults")
    for heading in HEADINGS:
        table.add_column(heading, no_wrap=True)
    for row, figures in rows.items():
        table.add_row(*figures.cells(row))
    console = Console()
    # A file has no width.
    Console(width=None if console.is_terminal else _WIDTH).print(table)


def measure(report: Report, size: Size, wanted: Collection[str] = ROWS) -> dict[str, Figures]:
    """Run what is marked with rows that are wanted, and return the figures of each, of those that nobody tries, too."""
    by = {row: tests for row, tests in by_row().items() if row in wanted}
    marked = list({trial.node: trial for trials in by.values() for trial in trials}.values())
    marked.sort(key=lambda trial: (trial.path, trial.line))
    nodes = quick(marked) if report.quick else [trial.node for trial in marked]
    found = run(nodes, size, within_s=QUICK_S if report.quick else None)
    rows = {row: figures_of(ROWS[row], by[row], found) for row in by}
    # A test of two rows is counted once here.
    everything = figures_of("all", marked, found)
    report.figures |= {f"rows_{state.replace(' ', '_')}": _count(rows, state) for state in (PASSED, FAILED, NOT_RUN, MISSING)}
    report.figures |= {
        "tests": everything.tests,
        "attempts": everything.attempts,
        "answered": everything.answered,
        "wrong": everything.wrong,
        "lost": everything.lost,
        "left_behind": sum(everything.left_behind.values()),
        "longest_stall_s": everything.longest_stall_s,
        "seconds": everything.seconds,
    }
    report.raw |= {"rows": {row: asdict(figures) for row, figures in rows.items()}, "tests": found, "size": size}
    for state, reason in ((MISSING, "no test is marked with it"), (NOT_RUN, "not all of its tests were run")):
        report.lack(reason, *[row for row, figures in rows.items() if figures.state == state])
    return rows


def _count(rows: Mapping[str, Figures], state: str) -> int:
    return sum(figures.state == state for figures in rows.values())


def _machine(plain: Mapping[str, Any]) -> str:
    hardware, figures = plain["hardware"], plain["figures"]
    return (
        f"Commit {plain['commit']}, {hardware['cpu']}, {hardware['cores']} cores, Linux {hardware['kernel']}, Python "
        f"{plain['versions']['python']}, torch {plain['versions']['torch']}: {figures['tests']} tests one after another in "
        f"{figures['seconds']:.0f} s, {figures['attempts']} attempts, {figures['answered']} answers, {figures['wrong']} wrong, "
        f"{figures['lost']} lost, {figures['left_behind']} left behind."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="what does not take long; ends within 60 s")
    parser.add_argument("--nightly", action="store_true", help="everything twenty times as often")
    parser.add_argument(
        "--row", action="append", choices=ROWS, metavar="ROW", help="this row alone, or several: --row F5 --row F31"
    )
    parser.add_argument("--docs", action="store_true", help="write the table into docs/reliability.md")
    parser.add_argument("--json", metavar="PATH", help="write the figures there; '-': to standard output, and nothing else")
    chosen = parser.parse_args()
    if chosen.docs and (chosen.quick or chosen.row):
        parser.error("--docs takes a whole run: leave --quick and --row out")
    report = Report("faults", chosen.quick)
    rows = measure(report, "night" if chosen.nightly else "push" if chosen.quick else "full", chosen.row or ROWS)
    if chosen.docs:
        written = markdown(rows, _machine(report.to_plain()))
        DOCUMENT.write_text(renewed(DOCUMENT.read_text(), written))
    if chosen.json != "-":
        _show(rows)
    report.finish(chosen.json)
    sys.exit(_count(rows, FAILED) > 0)


if __name__ == "__main__":
    main()
