"""Small things around processes: pins, run directories, children and parents."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.errors import ConfigError
from sidecar.pins import Pins
from sidecar.processes import die_with_parent
from sidecar.supervisor import RunDirectory, _listen, write_token


def test_pins_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "pins.json"
    pins = Pins(path)
    pins.add("b")
    pins.add("a")
    pins.discard("b")
    pins.discard("never there")
    assert Pins(path).names() == ["a"]


@pytest.mark.parametrize("content", [b"{", b'{"a": 1}', b"[1, 2]"])
def test_pins_that_cannot_be_read_are_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "pins.json"
    path.write_bytes(content)
    assert Pins(path).names() == []


def test_pins_that_cannot_be_saved_hold_until_the_restart(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pins = Pins(tmp_path / "none" / "pins.json")
    pins.add("a")
    assert pins.names() == ["a"]
    assert "cannot be saved" in caplog.text


def test_a_child_whose_parent_is_gone_already_does_not_start() -> None:
    pid = os.fork()
    if not pid:
        try:
            die_with_parent(1 << 22)
        except ProcessLookupError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7


def test_a_socket_path_that_is_too_long_is_told(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / ("x" * 120))
    run.create()
    with pytest.raises(ConfigError, match="at most 107 characters"):
        _listen(run)


def test_a_token_is_private_and_new_each_time(tmp_path: Path) -> None:
    path = tmp_path / "token"
    first, second = write_token(path), write_token(path)
    assert first != second
    assert path.read_bytes() == second
    assert path.stat().st_mode & 0o777 == 0o600
