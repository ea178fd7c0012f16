"""The quota file of a running sidecar: a mistake changes nothing, and what was in force outlives an engine."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sidecar.errors import ConfigError
from sidecar.reloading import QuotaFile
from sidecar.tenants import Quotas
from tests.waiting import PATIENCE_S

GOOD = "[tenants.a]\nmodels = []\n"
BAD = "[tenants.a]\nmodles = []\n"


def test_what_was_in_force_stays_for_the_next_engine(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, copy = tmp_path / "quotas.toml", tmp_path / "copy"
    path.write_text(BAD)
    made = QuotaFile(path, copy)
    with pytest.raises(ConfigError, match="cannot be read"):
        made.read_or_keep()
    path.write_text(GOOD)
    in_force = made.read()
    assert list(in_force.tenants) == ["a"]
    assert copy.stat().st_mode & 0o777 == 0o600
    path.write_text(BAD)
    with pytest.raises(ConfigError, match="line 2: tenants.a.modles"):
        made.read()
    assert QuotaFile(path, copy).read_or_keep() == in_force
    assert "line 2: tenants.a.modles" in caplog.text
    path.write_text(GOOD.replace("a]", "b]"))
    assert list(made.read_or_keep().tenants) == ["b"]


def test_a_disk_that_keeps_no_copy_is_told_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "quotas.toml").write_text(GOOD)
    made = QuotaFile(tmp_path / "quotas.toml", tmp_path / "none" / "copy")
    assert list(made.read().tenants) == ["a"]
    assert "cannot be kept (No such file or directory)" in caplog.text


def test_whoever_asks_is_told_what_is_in_force_or_what_is_wrong(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.quotas")
    path = tmp_path / "quotas.toml"
    path.write_text(GOOD)
    made = QuotaFile(path, tmp_path / "copy")
    used: list[Quotas] = []
    told: queue.SimpleQueue[object] = queue.SimpleQueue()
    # It has no end, as the sidecar has none.
    threading.Thread(target=made.run, args=(lambda quotas, done: (used.append(quotas), done()),), daemon=True).start()
    made.reload()
    made.reload(told.put)
    assert told.get(timeout=PATIENCE_S) == used[1] == used[0]
    assert "1 tenants are in force" in caplog.text
    path.write_text(BAD)
    made.reload(told.put)
    refused = told.get(timeout=PATIENCE_S)
    assert isinstance(refused, ConfigError)
    assert refused.details == {"line": 2, "key": "modles"}
    assert "the quotas in force stay" in caplog.text
    assert len(used) == 2
    path.write_text(GOOD)
    made.reload(told.put)
    assert told.get(timeout=PATIENCE_S) == used[2]


def test_nobody_is_told_before_all_is_deployed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "trunkline.quotas")
    (tmp_path / "quotas.toml").write_text(GOOD)
    made = QuotaFile(tmp_path / "quotas.toml", tmp_path / "copy")
    uses: queue.SimpleQueue[tuple[Quotas, Callable[[], None]]] = queue.SimpleQueue()
    threading.Thread(target=made.run, args=(lambda *use: uses.put(use),), daemon=True).start()
    told: list[object] = []
    for _ in range(2):
        made.reload(told.append)
    (first, first_is_done), (second, second_is_done) = uses.get(timeout=PATIENCE_S), uses.get(timeout=PATIENCE_S)
    # Nor does the one that reads wait for that.
    assert (told, caplog.text) == ([], "")
    second_is_done()
    assert told == [second]
    assert "1 tenants are in force" in caplog.text
    first_is_done()
    assert told == [second, first]
