"""Rows of the matrix: requests that kill their engine, or never end. Each costs two engines, and others nothing."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from trunkline.client import Model
from trunkline.errors import Quarantined, TrunklineError
from trunkline.pool import Pool

from sidecar.errors import NotQuarantined
from sidecar.quarantine import FIRST_S
from sidecar.tenants import hash_of
from tests.fault import poisoned
from tests.fault.launching import through
from tests.fault.matrix import EXPECTED, Neighbour, Row, pool_at, settled, write_scaled
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import until

WATCHDOG_S = 1.0
# Each costs two engines, then it is refused, with its model.
KILLERS = 5
LOSERS = 2
HANGERS, PUSH_HANGERS = 10, 5
KILLS_BY_HAND = 12
CLIENTS = 4
TENANT_KILLS = 3
QUOTAS = """
[tenants.hostile]
tokens = ["{hostile}"]
models = ["scaled"]
domain = "all"

[tenants.good]
tokens = ["{good}"]
models = ["scaled"]
domain = "all"
"""
DEADLINE_S = 90.0
X = np.ones((1, 8), np.float32)


@pytest.fixture
def box(tmp_path: Path, scaled: Path, row: Row) -> Iterator[SidecarProcess]:
    """Give a sidecar for which some inputs are poison."""
    with sidecar_process(tmp_path, "--watchdog", str(WATCHDOG_S), through=through(poisoned.sidecar)) as made:
        made.admin.push(scaled)
        settled(made)
        yield made


@pytest.fixture
def pool(box: SidecarProcess) -> Iterator[Pool]:
    made = pool_at(box.socket)
    yield made
    made.close()


def generation(box: SidecarProcess) -> int:
    box.await_engine()
    return int(box.admin.get("status")["engine"]["generation"])


def told(box: SidecarProcess, name: str) -> int:
    """Return a counter of the metrics."""
    lines = [line for line in box.admin.metrics().splitlines() if line.startswith(f"trunkline_{name} ")]
    return int(float(lines[0].split()[1]))


def is_answered(name: str, pool: Pool) -> bool:
    return np.array_equal(Model(name, pool).call({"x": X}, deadline_s=DEADLINE_S), X * EXPECTED)


def check_poison(box: SidecarProcess, row: Row, pool: Pool, folder: Path, names: list[str], number: float) -> None:
    """Ask each model with a number that is poison: it costs two engines; others, also of the same tenant, lose nothing.

    And one engine more for each time that it was refused for, if its client comes back later than that.
    """
    poison = X.copy()
    poison[0, 3] = number
    for name in names:
        box.admin.push(write_scaled(folder, name))
        settled(box, name)
    with Neighbour(row, box.socket, threads=2) as neighbour:
        for name in names:
            before, before_refused = generation(box), told(box, "quarantines_total")
            row.attempts += 1
            with pytest.raises(Quarantined) as refused:
                Model(name, pool).call({"x": poison}, deadline_s=DEADLINE_S, call_id=f"poison of {name}")
            neighbour.await_answers()
            times, wait_s = told(box, "quarantines_total") - before_refused, float(refused.value.details["retry_after_s"])
            assert times
            assert 0 < wait_s <= FIRST_S * 2 ** (times - 1)
            assert generation(box) == before + 1 + times
            # The same tenant's other models; and with an input that is none, its client waits until one is let through.
            row.answered += 2
            row.wrong += not is_answered("scaled", pool)
            time.sleep(max(0.0, wait_s - FIRST_S))
            row.wrong += not is_answered(name, pool)
            assert generation(box) == before + 1 + times
    log = box.log.read_text()
    for name in names:
        assert f"while it computed {name} for anyone (call poison of {name})" in log


@pytest.mark.row("T12")
def test_a_request_that_kills_its_engine_costs_two_and_is_refused(
    box: SidecarProcess, row: Row, pool: Pool, tmp_path: Path
) -> None:
    names = [f"killer-{number}" for number in range(row.count(KILLERS))]
    check_poison(box, row, pool, tmp_path / "bundles", names, poisoned.KILLS)
    assert told(box, "watchdog_kills_total") == 0


@pytest.mark.row("T12")
def test_a_request_that_loses_the_device_costs_two_engines_and_is_refused(
    box: SidecarProcess, row: Row, pool: Pool, tmp_path: Path
) -> None:
    names = [f"loser-{number}" for number in range(row.count(LOSERS))]
    check_poison(box, row, pool, tmp_path / "bundles", names, poisoned.LOSES)
    assert "cpu can be used no more after this (device-side assert triggered)" in box.log.read_text()


@pytest.mark.row("T12")
def test_an_operator_sees_what_is_refused_and_has_it_forgotten(box: SidecarProcess, row: Row, pool: Pool) -> None:
    """Also by the engines to come."""
    poison = X.copy()
    poison[0, 3] = poisoned.KILLS
    row.attempts += 1
    assert box.admin.get("quarantine") == {"quarantine": []}
    for times in range(4):
        # Each time it is refused for twice as long: for eight seconds in the end, which no client waits out.
        until(lambda: all(each["state"] == "alone" for each in box.admin.get("quarantine")["quarantine"]))
        with pytest.raises(Quarantined):
            Model("scaled", pool).call({"x": poison}, deadline_s=DEADLINE_S, call_id=f"poison {times}")
    (found,) = box.admin.get("quarantine")["quarantine"]
    assert (found["tenant"], found["model"], found["state"], found["certain"]) == ("anyone", "scaled", "refused", True)
    # Once more for each time that its client came back later than that.
    assert 1 < found["refused_for_s"] <= FIRST_S * 2 ** (told(box, "quarantines_total") - 1)
    with pytest.raises(Quarantined):
        Model("scaled", pool).call({"x": X})
    assert box.admin.delete(f"quarantine/{found['id']}")["lifted"][0]["id"] == found["id"]
    row.answered += 1
    row.wrong += not is_answered("scaled", pool)
    with pytest.raises(NotQuarantined):
        box.admin.delete(f"quarantine/{found['id']}")
    engine = box.await_engine()
    os.kill(engine, signal.SIGKILL)
    until(lambda: box.await_engine() != engine)
    assert box.admin.get("quarantine") == {"quarantine": []}
    row.answered += 1
    row.wrong += not is_answered("scaled", pool)


@pytest.mark.row("T12")
def test_the_poison_of_one_tenant_is_none_of_another_that_asks_the_same_model(row: Row, scaled: Path, tmp_path: Path) -> None:
    """They share a domain, so that their requests are run as one batch while nothing speaks against it."""
    quotas = tmp_path / "quotas.toml"
    quotas.write_text(QUOTAS.format(**{name: f"sha256:{hash_of(name.encode())}" for name in ("hostile", "good")}))
    quotas.chmod(0o600)
    poison = X.copy()
    poison[0, 3] = poisoned.KILLS
    with sidecar_process(tmp_path, "--quotas", str(quotas), through=through(poisoned.sidecar)) as box:
        box.admin.push(scaled)
        pool = pool_at(box.socket, b"hostile")
        with Neighbour(row, box.socket, threads=3, token=b"good") as neighbour:
            for _ in range(row.count(TENANT_KILLS)):
                row.attempts += 1
                with pytest.raises(Quarantined):
                    Model("scaled", pool).call({"x": poison}, deadline_s=DEADLINE_S)
                neighbour.await_answers(20)
            # Two engines for the first time that it is refused, and one for each time that it was let through again.
            assert generation(box) == 2 + told(box, "quarantines_total")
        pool.close()


@pytest.mark.row("F24")
def test_a_request_that_does_not_end_is_ended_twice_and_is_refused(
    box: SidecarProcess, row: Row, pool: Pool, tmp_path: Path
) -> None:
    names = [f"hanger-{number}" for number in range(row.count(HANGERS, push=PUSH_HANGERS))]
    check_poison(box, row, pool, tmp_path / "bundles", names, poisoned.HANGS)
    assert told(box, "watchdog_kills_total") == len(names) + told(box, "quarantines_total")
    # As soon as it may: a stage that was tried has no ten times as long.
    assert row.longest_stall_s < 10 * WATCHDOG_S
    assert f"{WATCHDOG_S:.1f} s are allowed" in box.log.read_text()


@pytest.mark.row("F4")
def test_kills_by_hand_lose_nothing_however_slow_the_work(box: SidecarProcess, row: Row, pool: Pool) -> None:
    """The device is busy nearly all the time: most kills meet a request that is run alone after the one before.

    Three, one after the other, then everybody is answered: a client gives a request up that has cost it five connections.
    """
    stopping = threading.Event()
    errors: list[TrunklineError] = []

    def ask(seed: int) -> None:
        model, x = Model("scaled", pool), X.copy()
        x[0, :2] = seed, poisoned.IS_SLOW
        while not stopping.is_set():
            try:
                row.wrong += not np.array_equal(model.call({"x": x}, deadline_s=DEADLINE_S), x * EXPECTED)
                row.answered += 1
            except TrunklineError as error:
                errors.append(error)

    moments = random.Random(11)
    with ThreadPoolExecutor(CLIENTS) as threads:
        asking = [threads.submit(ask, seed) for seed in range(CLIENTS)]
        for number in range(row.count(KILLS_BY_HAND)):
            if number % 3 == 0:
                before = row.answered
                until(lambda before=before: row.answered > before + 2 * CLIENTS)
            engine, row.attempts = box.await_engine(), row.attempts + 1
            time.sleep(moments.uniform(0, 3 * poisoned.SLOW_S))
            os.kill(engine, signal.SIGKILL)
            until(lambda engine=engine: box.await_engine() != engine)
        stopping.set()
        for each in asking:
            each.result(DEADLINE_S)
    row.lose(*errors)
    assert not errors
    assert "the next such request is run alone" in box.log.read_text()
