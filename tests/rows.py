"""Which rows the fault matrix and the threat table have, and which tests try them: read from the sources, nothing is run.

A test says which rows it tries by ``@pytest.mark.row("F9", "T1")``. ``docs/reliability.md`` says how each fault is brought about,
``SECURITY.md`` what is done against each threat; ``python -m tests.rows`` writes into both which tests there are.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]

# How often things are tried: as with each push, where some counts are smaller because they take minutes; as the matrix has them;
# or as in a night.
Size = Literal["push", "full", "night"]

FAULTS: Final = {
    "F1": "malformed frames",
    "F2": "a function killed at any moment",
    "F3": "a function killed at each step of the protocol",
    "F4": "the engine killed under load",
    "F5": "the whole sidecar killed and started again",
    "F6": "a sidecar replaced by another under load",
    "F7": "told to end with calls under way",
    "F8": "an HTTP worker killed",
    "F9": "shared memory shrunk, punched, sealed, opened again",
    "F10": "inputs that change while they are read",
    "F11": "a call that is half there",
    "F12": "functions that do not read",
    "F13": "a thousand functions",
    "F14": "no descriptors left",
    "F15": "no memory left for arenas",
    "F16": "the n-th operation on memory or disk fails",
    "F17": "the device is out of memory",
    "F18": "damaged, truncated, exchanged bundles",
    "F19": "a bit of a stored weight flips",
    "F20": "the disk is full while a model is pulled",
    "F21": "an origin that is slow, broken, or lies",
    "F22": "killed while it pulls, evicts, reads",
    "F23": "a model that fails for some rows",
    "F24": "a model that does not end",
    "F25": "sessions that stay for ever",
    "F26": "eviction of what is used",
    "F27": "calls cancelled, late, abandoned",
    "F28": "a flood",
    "F29": "the clock is put back and forth",
    "F30": "what others have left in the run directory",
    "F31": "random lives in a simulation",
    "F32": "load without end",
}

THREATS: Final = {
    "T1": "shared memory shrunk under the sidecar",
    "T2": "inputs changed after they were checked",
    "T3": "names: guessed, taken before, told",
    "T4": "floods of descriptors",
    "T5": "malformed frames",
    "T6": "bombs in a frame",
    "T7": "code in a bundle",
    "T8": "hostile operators",
    "T9": "bombs in a bundle",
    "T10": "paths in a bundle",
    "T11": "malformed containers of weights",
    "T12": "an index beyond the table",
    "T13": "a row that alters its neighbours in a batch",
    "T14": "answers that reach somebody else",
    "T15": "what others left in memory",
    "T16": "shared weights altered",
    "T17": "finding out what others have loaded",
    "T18": "starving others",
    "T19": "holding on to what is shared",
    "T20": "never reading answers",
    "T21": "floods of connections",
    "T22": "guessing tokens by time",
    "T23": "the admin endpoint abused",
    "T24": "models from elsewhere",
}

ROWS: Final = FAULTS | THREATS
_MARK: Final = "pytest.mark.row"


class Trial(NamedTuple):
    """A test that tries rows: its file, seen from the project's folder, its name, its line, the rows."""

    path: str
    name: str
    line: int
    rows: tuple[str, ...]

    @property
    def node(self) -> str:
        """What pytest calls it, all its parameters together."""
        return f"{self.path}::{self.name}"


def trials(root: Path = ROOT) -> list[Trial]:
    """Return all tests that are marked with rows."""
    found: list[Trial] = []
    for path in sorted((root / "tests").rglob("test_*.py")):
        text = path.read_text()
        # Few have any, and to parse all of them takes seconds.
        for each in ast.parse(text).body if _MARK in text else ():
            if isinstance(each, ast.FunctionDef) and (rows := _rows(each)):
                found.append(Trial(str(path.relative_to(root)), each.name, each.lineno, rows))
    return found


def _rows(function: ast.FunctionDef) -> tuple[str, ...]:
    marks = [each for each in function.decorator_list if isinstance(each, ast.Call)]
    marks = [each for each in marks if ast.unparse(each.func) == _MARK]
    return tuple(ast.literal_eval(argument) for mark in marks for argument in mark.args)


def by_row(root: Path = ROOT) -> dict[str, list[Trial]]:
    """Return the tests of each row, none for one that nobody tries."""
    all_trials = trials(root)
    return {row: [each for each in all_trials if row in each.rows] for row in ROWS}


# Their tables with a last column TESTS have a line for each row, which begins with its id.
DOCUMENTS: Final = ("docs/reliability.md", "SECURITY.md")
TESTS: Final = "| tests |"
NONE_YET: Final = "none yet"


def linked(text: str, folder: str, by: Mapping[str, Sequence[Trial]]) -> str:
    """Return a document, which lies in ``folder``, with links to all tests in the lines of their rows."""
    lines = text.split("\n")
    is_ours = False
    for number, line in enumerate(lines):
        is_ours = line.startswith("|") and (is_ours or line.endswith(TESTS))
        if is_ours and (found := re.fullmatch(r"(\| ([FT]\d+) \|.*\|)[^|]*\|", line)):
            lines[number] = f"{found[1]} {_links(by[found[2]], folder)} |"
    return "\n".join(lines)


def _links(tried: Sequence[Trial], folder: str) -> str:
    files: dict[str, list[str]] = {}
    for trial in tried:
        files.setdefault(os.path.relpath(trial.path, folder or "."), []).append(trial.name)
    texts = {path: f"`{names[0]}`" if len(names) == 1 else f"{Path(path).stem}, {len(names)}" for path, names in files.items()}
    return ", ".join(f"[{text}]({path})" for path, text in texts.items()) or NONE_YET


def main() -> None:
    by = by_row()
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(linked(path.read_text(), os.path.dirname(name), by))


if __name__ == "__main__":
    main()
