"""docs/cli.md has every command of the program, and nothing else."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from sidecar.cli import exits
from sidecar.cli.main import main

DOCS = (Path(__file__).parents[2] / "docs" / "cli.md").read_text()
# Commands that print nothing a program would read: logs, and a script.
PROSE = {"serve", "up", "webhook", "device-plugin", "node-labels", "completion"}


def commands(group: click.Group, above: str = "") -> dict[str, click.Command]:
    found = {}
    for name, command in group.commands.items():
        found |= commands(command, f"{name} ") if isinstance(command, click.Group) else {above + name: command}
    return found


COMMANDS = commands(main)
GROUPS = {name: command for name, command in main.commands.items() if isinstance(command, click.Group)}
ROWS = {
    name: (what, example) for name, what, example in re.findall(r"^\| `([a-z -]+)` \| (.+) \| `trunkline (.+)` \|$", DOCS, re.M)
}


def test_every_command_is_documented_in_the_order_of_its_help() -> None:
    assert list(ROWS) == list(COMMANDS)


@pytest.mark.parametrize("name", ROWS)
def test_examples_use_what_there_is(name: str) -> None:
    words = shlex.split(ROWS[name][1])
    assert words[: len(name.split())] == name.split()
    options = {option for param in COMMANDS[name].params for option in param.opts}
    assert {word for word in words if word.startswith("-")} <= options


@pytest.mark.parametrize("name", COMMANDS)
def test_whatever_prints_can_print_json(name: str) -> None:
    assert any("--json" in param.opts for param in COMMANDS[name].params) == (name not in PROSE)


@pytest.mark.parametrize("name", [*COMMANDS, *GROUPS])
def test_help_says_in_a_line_what_a_command_does(name: str) -> None:
    shown = (COMMANDS | GROUPS)[name].get_short_help_str(64)
    assert shown
    assert not shown.endswith("...")


def test_exit_codes_are_documented() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCS, re.M)}
    assert codes == {0, exits.FAILED, 2, exits.UNREACHABLE, exits.INTERRUPTED}
