"""Rows of the matrix: nodes that are short of descriptors, of shared memory, of room for weights, or that have no true clock."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import numpy as np
import pytest
from trunkline import errors
from trunkline.client import Model

from tests.bundles import write_adding_bundle
from tests.fault import attacks, circumstances
from tests.fault.attacks import is_served, sessions
from tests.fault.launching import through
from tests.fault.matrix import EXPECTED, Neighbour, Row, held_by, left, pool_at, settled
from tests.fault.matrix import held as held_of
from tests.fault.wire import Refused, Wire, infer
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import until

X = np.ones((1, 8), np.float32)


@pytest.mark.row("F14")
def test_who_finds_no_descriptors_left_is_told_to_come_again(row: Row, tmp_path: Path, scaled: Path) -> None:
    with sidecar_process(tmp_path, through=through(circumstances.few_descriptors)) as box:
        box.admin.push(scaled)
        settled(box)
        before, engine = held_of(box), box.await_engine()
        refused = 0
        with Neighbour(row, box.socket) as neighbour:
            with contextlib.ExitStack() as opened:
                for _ in range(row.count(500)):
                    row.attempts += 1
                    try:
                        opened.callback(Wire(str(box.socket), "scaled").close)
                    except Refused as error:
                        assert error.fault.code == errors.QueueFull.code, error.fault
                        assert error.fault.retryable
                        refused += 1
                assert 0 < row.attempts - refused < circumstances.FEW / 3
                assert held_by(engine)[0] < circumstances.FEW
                neighbour.await_answers()
            # There is room again.
            until(lambda: _comes_in(box))
            neighbour.await_answers()
        row.leaked |= left(box, before)
        assert box.await_engine() == engine
        # It was never at its end, and did not ask in vain again and again.
        assert "could not be accepted" not in box.log.read_text()


def _comes_in(box: SidecarProcess) -> bool:
    try:
        return is_served(box)
    except Refused:
        return False


@pytest.mark.row("F15")
def test_memory_that_is_not_to_be_had_refuses_whoever_comes(
    row: Row, tmp_path: Path, scaled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = tmp_path / "short"
    monkeypatch.setenv(circumstances.SHORT, str(short))
    with sidecar_process(tmp_path, through=through(circumstances.memory_runs_out)) as box:
        box.admin.push(scaled)
        settled(box)
        before, engine = held_of(box), box.await_engine()
        attacks.shortages(row, box, row.count(100), short)
        row.leaked |= left(box, before)
        assert box.await_engine() == engine


@pytest.mark.row("F25", "T19")
def test_functions_that_ask_once_and_sleep_hold_no_weights(row: Row, tmp_path: Path, scaled: Path) -> None:
    for name, first in (("one", 1.0), ("other", 2.0)):
        write_adding_bundle(tmp_path / name, name, [first] * 16_384)
    # Room for one of the two, and for the neighbour's.
    with sidecar_process(tmp_path, "--memory-budget", str(100_000)) as box:
        for path in (scaled, tmp_path / "one", tmp_path / "other"):
            box.admin.push(path)
        settled(box)
        with Neighbour(row, box.socket) as neighbour:
            asked = Model("other", pool := pool_at(box.socket))
            with sessions(box, row.count(100), "one") as sleeping:
                for wire in sleeping:
                    row.attempts += 1
                    wire.ask(infer("one", "float32", (1, 16_384)))
                    # And another that is never read.
                    wire.sock.send(infer("one", "float32", (1, 16_384)))
                until(lambda: not _leases_of(box, "one"))
                # What they asked for leaves for what others ask for.
                assert (asked(np.zeros((1, 16_384), np.float32)) == 2).all()
                until(lambda: box.admin.get("models/one")["state"] != "resident")
                neighbour.await_answers()
            pool.close()
            until(lambda: len(box.admin.get("sessions")["sessions"]) <= 3)
            assert not _leases_of(box, "one")


def _leases_of(box: SidecarProcess, model: str) -> int:
    devices = box.admin.get("leases")["devices"].values()
    return sum(lease["leases"] for device in devices for lease in device["leases"] if lease["model"] == model)


@pytest.mark.row("F29")
def test_a_clock_that_jumps_changes_nothing(row: Row, tmp_path: Path, scaled: Path) -> None:
    with sidecar_process(tmp_path, through=through(circumstances.jumping_clock)) as box:
        box.admin.push(scaled)
        settled(box)
        engine = box.await_engine()
        pool = pool_at(box.socket)
        model = Model("scaled", pool)
        with Neighbour(row, box.socket, threads=2) as neighbour:
            end = time.monotonic() + 0.1 * row.count(20)
            while time.monotonic() < end or row.attempts < row.count(20):
                row.attempts += 1
                # A deadline that any jump would pass, or never let pass.
                answer = model.call({"x": X}, deadline_s=20)
                row.wrong += not np.array_equal(answer[0], EXPECTED)
                with contextlib.suppress(errors.DeadlineExceeded):
                    model.call({"x": X}, deadline_s=0.000_01)
                assert box.admin.get("status")["engine"]["pid"] == engine
            assert box.admin.get("models/scaled")["state"] == "resident"
            neighbour.await_answers()
        pool.close()
        ages = [session["age_s"] for session in box.admin.get("sessions")["sessions"]]
        assert all(0 <= age < circumstances.DAY_S / 2 for age in ages)
