"""Rows of the matrix and of the threat table: functions that die, stop, sleep, change their minds, or want too much."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from trunkline.client import Model

from sidecar.tenants import hash_of
from tests.fault import attacks
from tests.fault.attacks import Clients
from tests.fault.matrix import DESCRIPTORS_EACH, EXPECTED, Neighbour, Row, held, left, pool_at, tiers_of, until_tried
from tests.sidecar_process import SidecarProcess, sidecar_process
from tests.waiting import PATIENCE_S, until

# Far beyond what a victim of a flood waits for on a busy machine.
FAR_S = 5.0
REST_S = 0.02


@pytest.mark.row("F2")
def test_functions_killed_at_any_moment_leave_nothing_behind(row: Row, steady: SidecarProcess) -> None:
    attacks.deaths(row, steady, row.count(1000))


@pytest.mark.row("F3")
def test_functions_killed_at_each_step_leave_nothing_behind(row: Row, steady: SidecarProcess) -> None:
    attacks.deaths_at_steps(row, steady, row.count(20))


@pytest.mark.row("F11")
def test_functions_that_stop_hold_nobody_up(row: Row, steady: SidecarProcess) -> None:
    each = row.count(5)
    with Neighbour(row, steady.socket) as neighbour:
        before = held(steady)["engine descriptors"]
        clients = Clients("stopped", socket=str(steady.socket), each=each)
        row.attempts += clients.told()["stopped"]
        neighbour.await_answers(100)
        # Those that said nothing are gone. The others have two sessions each, and nothing is held for what they asked.
        until(lambda: held(steady)["engine descriptors"] <= before + DESCRIPTORS_EACH * 2 * 3 * each)
        until(lambda: not leased(steady))
        found = clients.found()
        assert found == {"-9": 2 * each, "-15": 2 * each}, found
        neighbour.await_answers()


def leased(box: SidecarProcess) -> int:
    devices = box.admin.get("leases")["devices"].values()
    return sum(lease["leases"] for device in devices for lease in device["leases"])


# Of 50 clients: 40,000 calls with a push, 100,000 took two minutes beside the other tests.
@pytest.mark.timeout(900)
@pytest.mark.row("F27", "T14")
def test_no_answer_is_ever_another_requests(row: Row, steady: SidecarProcess) -> None:
    found = attacks.canaries(row, steady, 50, row.count(2000, push=800))
    row.figures |= {what: found[what] for what in ("cancelled", "late", "died")}
    assert found["cancelled"] > 10
    assert found["died"] > 10
    assert found["late"] > 10


QUOTAS = """
[tenants.flood]
tokens = ["{flood}"]
models = ["*"]
domain = "base"

[tenants.victim]
tokens = ["{victim}"]
models = ["*"]
domain = "base"
"""


@pytest.mark.row("F28", "T18")
def test_a_flood_of_one_tenant_leaves_another_served(row: Row, tmp_path: Path, scaled: Path) -> None:
    """What the shares of tenants are is measured in benchmarks.tenancy; here the victim's own figures are recorded."""
    quotas = tmp_path / "quotas.toml"
    quotas.write_text(QUOTAS.format(**{name: f"sha256:{hash_of(name.encode())}" for name in ("flood", "victim")}))
    quotas.chmod(0o600)
    with sidecar_process(tmp_path, "--quotas", str(quotas)) as box:
        box.admin.push(scaled)
        pool = pool_at(box.socket, b"victim")
        model = Model("scaled", pool)
        alone_s = asked(row, model, row.count(100))
        until_tried(box, "scaled@base")
        until(lambda: all(tier["used_bytes"] for tier in tiers_of(box)))
        before = held(box)
        with Neighbour(row, box.socket, token=b"victim") as neighbour:
            flood = Clients("hammers", socket=str(box.socket), sessions=64, token="flood")
            flood.told()
            began_s = time.monotonic()
            beside_s = asked(row, model, row.count(200))
            flooded_s = time.monotonic() - began_s
            found = flood.found()
            neighbour.await_answers()
        pool.close()
        row.leaked |= left(box, before)
    row.attempts += sum(found.values())
    row.figures |= {
        "flood_per_s": round(row.attempts / flooded_s, 1),
        "victim_per_s": round(len(beside_s) / flooded_s, 1),
        "victim_alone_per_s": round(len(alone_s) / float(alone_s.sum() + REST_S * len(alone_s)), 1),
        "victim_p99_s": round(float(np.quantile(beside_s, 0.99)), 4),
        "victim_alone_p99_s": round(float(np.quantile(alone_s, 0.99)), 4),
    }
    assert found["Result"] > 10 * len(beside_s), found
    assert float(np.quantile(beside_s, 0.99)) < FAR_S


def asked(row: Row, model: Model, count: int) -> NDArray[np.float64]:
    """Ask so often, with rests; return how long each answer took."""
    taken_s = []
    for _ in range(count):
        began_s = time.monotonic()
        answer = model.call({"x": np.ones((1, 8), np.float32)}, deadline_s=PATIENCE_S)
        taken_s.append(time.monotonic() - began_s)
        row.answered += 1
        row.wrong += not np.array_equal(answer[0], EXPECTED)
        time.sleep(REST_S)
    return np.asarray(taken_s)
