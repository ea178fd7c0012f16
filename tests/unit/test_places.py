"""Where models were asked last: for speed, so that nothing that is wrong with the file is more than a line in the log."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sidecar.places import read_places, write_places

DEVICES = ["cpu:0", "cpu:1"]


def test_what_was_written_is_read(tmp_path: Path) -> None:
    placed = {"a": frozenset(DEVICES), "b": frozenset({"cpu:1"})}
    write_places(tmp_path / "places.json", placed)
    assert read_places(tmp_path / "places.json", DEVICES) == placed


def test_devices_that_are_no_more_are_left_out(tmp_path: Path) -> None:
    write_places(tmp_path / "places.json", {"a": frozenset(DEVICES), "b": frozenset({"cpu:1"})})
    assert read_places(tmp_path / "places.json", ["cpu:0", "cuda:0"]) == {"a": frozenset({"cpu:0"})}


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"[]", b'{"a": "cpu:0", "b": [[]], "c": 3, "d": []}'])
def test_what_cannot_be_understood_is_nothing(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "places.json").write_bytes(content)
    assert read_places(tmp_path / "places.json", DEVICES) == {}


def test_without_a_file_there_is_nothing(tmp_path: Path) -> None:
    assert read_places(tmp_path / "places.json", DEVICES) == {}


def test_what_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*names: object) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "replace", refuse)
    write_places(tmp_path / "places.json", {"a": frozenset(DEVICES)})
    assert "No space left on device" in caplog.text
