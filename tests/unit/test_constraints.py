"""Where operators want models: kept in a file, which may be of another time, or damaged."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from trunkline.errors import InvalidInput

from sidecar.constraints import Constraint, Constraints

DEVICES = ["cpu:0", "cpu:1"]


def test_without_a_word_a_model_may_be_anywhere(tmp_path: Path) -> None:
    assert Constraints(tmp_path / "constraints.json", DEVICES).devices_of("m") == DEVICES


def test_what_is_said_outlives_the_engine(tmp_path: Path) -> None:
    made = Constraints(tmp_path / "constraints.json", DEVICES)
    made.change("m", {"allow": ["cpu:1"]})
    made.change("n", {"forbid": ["cpu:1"]})
    made.change("o", {"forbid": ["cpu:1"]})
    made.change("o", {"forbid": []})
    again = Constraints(tmp_path / "constraints.json", DEVICES)
    assert [again.devices_of(name) for name in "mno"] == [["cpu:1"], ["cpu:0"], DEVICES]
    assert json.loads((tmp_path / "constraints.json").read_text()).keys() == {"m", "n"}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({}, "one of them, or both"),
        ({"allow": ["cpu:0"], "only": True}, "one of them, or both"),
        ({"allow": "cpu:0"}, "allow is 'cpu:0'; it must be a list of names of devices"),
        ({"forbid": [0]}, "it must be a list of names of devices"),
        ({"forbid": DEVICES}, "that leaves none of the devices cpu:0, cpu:1"),
        ({"allow": ["cpu:0"], "forbid": ["cpu:0"]}, "that leaves none"),
    ],
)
def test_what_makes_no_sense_is_refused(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        Constraint().changed(asked, DEVICES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "it cannot be read"),
        (b"[]", "it holds no object"),
        (b"[" * 100_000, "it cannot be read"),
        (b'{"m": 3, "n": {"allow": ["cpu:1"]}}', "for 'm'"),
        (b'{"m": {"allow": ["cuda:0"]}, "n": {"allow": ["cpu:1"]}}', "there is no device 'cuda:0' here"),
    ],
)
def test_what_cannot_be_understood_is_ignored(
    tmp_path: Path, content: bytes, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "constraints.json").write_bytes(content)
    made = Constraints(tmp_path / "constraints.json", DEVICES)
    assert made.devices_of("m") == DEVICES
    assert made.devices_of("n") == (["cpu:1"] if b'"n"' in content else DEVICES)
    assert message in caplog.text


def test_what_cannot_be_saved_holds_until_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*names: object) -> None:
        raise OSError(28, os.strerror(28))

    made = Constraints(tmp_path / "constraints.json", DEVICES)
    monkeypatch.setattr(os, "replace", refuse)
    with caplog.at_level(logging.WARNING):
        made.change("m", {"allow": ["cpu:1"]})
    assert made.devices_of("m") == ["cpu:1"]
    assert "No space left on device" in caplog.text


def test_what_was_said_with_other_devices_is_there_when_they_are_back(tmp_path: Path) -> None:
    path = tmp_path / "constraints.json"
    Constraints(path, ["cpu:0", "cuda:0"]).change("m", {"allow": ["cuda:0"]})
    Constraints(path, DEVICES).change("n", {"allow": ["cpu:1"]})
    assert Constraints(path, ["cpu:0", "cuda:0"]).devices_of("m") == ["cuda:0"]
    # Said anew, it is what was said last.
    Constraints(path, DEVICES).change("m", {"allow": ["cpu:1"]})
    assert Constraints(path, DEVICES).devices_of("m") == ["cpu:1"]
