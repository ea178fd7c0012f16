"""The picture that an engine gives of itself: every block, who ends where, what of it is in memory, and what moved."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from trunkline import client
from trunkline.admin import AdminConnection

from sidecar import blocks, picture
from sidecar.sankey import laid_out
from tests.copying import CopyingNode
from tests.fakes import ADMIN_TOKEN, FakeDevice, FakeSource, Running, bundle_of, running_server
from tests.integration.test_sharing import ask
from tests.networks import network

TRUNK = [bytes([1] * 10), bytes([2] * 20)]


@pytest.fixture(autouse=True)
def a_block_for_each_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALLEST_BYTES", 1)


def served(source: FakeSource, **models: list[bytes]) -> None:
    for name, contents in models.items():
        source.put(bundle_of(name, contents), contents)


def seen(running: Running, device: str = "fake", **known: Any) -> dict[str, Any]:
    with closing(AdminConnection(running.path, ADMIN_TOKEN)) as admin:
        found: dict[str, Any] = admin.command("picture", {"of": {device: known}})["devices"]
        return found[device]


def test_blocks_are_told_once_and_what_changes_each_time(tmp_path: Path):
    source = FakeSource()
    served(source, one=[*TRUNK, b"head one"], two=[*TRUNK, b"head two!"], other=[b"alone"])
    with running_server(tmp_path, source) as running:
        first = seen(running)
        runs = first["runs"]
        graph = ask(running, "graph")
        assert first["block_count"] == len(graph["blocks"]) == len(runs)
        assert [run["id"] for run in runs] == [block["id"][:12] for block in graph["blocks"]]
        assert [run["bytes"] for run in runs] == [block["bytes"] for block in graph["blocks"]]
        assert sorted(name for run in runs for name in run["ends"]) == ["one", "other", "two"]
        lanes = laid_out(runs)
        for run, block in zip(lanes["runs"], graph["blocks"], strict=True):
            own = {lane["name"] for lane in lanes["lanes"][run["first"] : run["first"] + run["lanes"]]}
            assert own == set(block["models"])
        assert set(first["resident"]) == {0}
        assert first["moves"] == []
        ask(running, "load", name="one")
        second = seen(running, known=first["version"], since=first["last_move"])
        assert second["version"] == first["version"]
        assert "runs" not in second
        through_one = ["one" in block["models"] for block in graph["blocks"]]
        assert second["resident"] == [100 if each else 0 for each in through_one]
        assert [(move["reason"], move["models"], move["bytes"]) for move in second["moves"]] == [("fetch", ["one"], 38)]
        ask(running, "evict", name="one")
        third = seen(running, known=first["version"], since=second["last_move"])
        assert set(third["resident"]) == {0}
        assert [(move["reason"], move["models"], move["bytes"]) for move in third["moves"]] == [("operator", ["one"], 38)]


def test_a_changed_model_is_drawn_anew(tmp_path: Path):
    source = FakeSource()
    served(source, one=TRUNK)
    with running_server(tmp_path, source) as running:
        first = seen(running)
        served(source, two=[*TRUNK, b"more"])
        ask(running, "model_changed", name="two")
        second = seen(running, known=first["version"])
        assert second["version"] != first["version"]
        assert sorted(name for run in second["runs"] for name in run["ends"]) == ["one", "two"]
        del source.bundles["two"]
        ask(running, "model_removed", name="two")
        third = seen(running, known=second["version"])
        assert [run["ends"] for run in third["runs"]] == [run["ends"] for run in first["runs"]]


def test_looking_deploys_nothing(tmp_path: Path):
    source = FakeSource()
    served(source, one=TRUNK)
    with running_server(tmp_path, source) as running:
        catalog = running.engine._catalog
        deployments = []
        running.engine._deployments.complete_all = lambda: deployments.append(1)  # type: ignore[method-assign]
        seen(running)
        assert not deployments
        assert not catalog.awaited


@pytest.mark.parametrize("most", [1, 3, 6, 1000])
def test_of_very_many_blocks_what_is_shared_is_kept_and_no_byte_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
):
    source = FakeSource()
    for number in range(6):
        middle = [b"middle" * 5] if number % 2 else [b"centre" * 9]
        served(source, **{f"m{number}": [*TRUNK, *middle, *([bytes([number])] * 1), bytes([9, number]) * (number + 1)]})
    with running_server(tmp_path, source) as running:
        whole = seen(running)
        monkeypatch.setattr(picture, "MOST_RUNS", most)
        running.engine._catalog.changes += 1
        found = seen(running)
        runs = found["runs"]
        assert found["block_count"] == whole["block_count"]
        assert sum(run["blocks"] for run in runs) == whole["block_count"]
        assert sum(run["bytes"] for run in runs) == sum(run["bytes"] for run in whole["runs"])
        assert sorted(name for run in runs for name in run["ends"]) == [f"m{number}" for number in range(6)]
        assert len(runs) <= 2 * most + 1
        assert sum(not run["rest"] for run in runs) <= max(most, 1)
        # What all share is never in the rest.
        assert not runs[0]["rest"]
        assert all(run["parent"] is None or run["parent"] < place for place, run in enumerate(runs))
        ask(running, "load", name="m0")
        resident = seen(running, known=found["version"])["resident"]
        assert resident[0] == 100
        assert all(percent < 100 for percent, run in zip(resident, runs, strict=True) if run["rest"])


def test_each_device_tells_of_itself(tmp_path: Path):
    source = FakeSource()
    served(source, one=TRUNK)
    with running_server(tmp_path, source, device=FakeDevice("a"), beside=[FakeDevice("b")]) as running:
        a, b = (seen(running, device) for device in ("a", "b"))
        assert a["version"] != b["version"]
        assert [run["id"] for run in a["runs"]] == [run["id"] for run in b["runs"]]


def test_what_left_a_device_is_seen_in_host_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TRUNKLINE_SOCKET", str(tmp_path / "trunkline.sock"))
    node = CopyingNode(tmp_path, 8 << 20, 8 << 20)
    try:
        network("mlp").put(node.source)
        with node.serve() as running:
            name = running.engine.device_name
            ask(running, "load", name="mlp")
            there = seen(running, name)
            assert set(there["resident"]) == {100}
            # What is all on the device is not looked for below it.
            assert set(there["host"]) == {0}
            ask(running, "evict", name="mlp")
            gone = seen(running, name)
            assert (set(gone["resident"]), set(gone["host"])) == ({0}, {100})
    finally:
        client._pool.close()
        node.close()
