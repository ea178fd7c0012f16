"""The number of lanes, chosen: measured once, followed when what is asked changes, and kept for the next start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from trunkline import model
from trunkline.errors import DeviceFault

from sidecar.devices import open_device
from sidecar.engine import Engine
from sidecar.graph import FusedGraph
from sidecar.stages import Staged
from sidecar.sweeps import Sweeps
from sidecar.trials import example_rows
from sidecar.verdicts import Verdicts
from tests.fakes import FakeSource, Running
from tests.integration.test_lanes import asked_by_many
from tests.integration.test_sharing import ask, deploy, serving
from tests.networks import Network, agrees, network
from tests.nodes import until

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def staged(made: Network) -> Staged:
    graph = FusedGraph()
    graph.add(made.bundle)
    return graph.staged(made.name)


@pytest.mark.parametrize("kind", ["resnet", "minilm", "pair"])
def test_a_model_is_measured_once_on_a_machine(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, source, device = network(kind), FakeSource(), open_device("cpu")
    made.put(source)
    verdicts = Verdicts(tmp_path, "test")
    found = Sweeps(device, source, verdicts).seconds(made.bundle, staged(made), ())
    assert found is not None
    assert found.keys() == {1, 2}
    assert all(seconds > 0 for seconds in found.values())
    monkeypatch.setattr(device, "run", None)
    again = Sweeps(device, source, verdicts).seconds(made.bundle, staged(made), ())
    assert again == pytest.approx(found, abs=1e-6)


def test_a_device_that_is_not_divided_is_not_measured(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    device = open_device("cpu")
    assert device.lane_counts == (1,)
    made = network("mlp")
    assert Sweeps(device, FakeSource(), Verdicts(tmp_path, "test")).seconds(made.bundle, staged(made), ()) is None


@pytest.mark.parametrize(("threads", "counts"), [(2, (1, 2)), (3, (1, 3)), (6, (1, 2, 6)), (16, (1, 2, 4, 8, 16))])
def test_lanes_have_half_the_threads_each_time(threads: int, counts: tuple[int, ...]) -> None:
    torch.set_num_threads(threads)
    assert open_device("cpu").lane_counts == counts


def test_what_cannot_be_measured_says_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made, verdicts = network("mlp"), Verdicts(tmp_path, "test")
    # Its weights are not there.
    assert Sweeps(open_device("cpu"), FakeSource(), verdicts).seconds(made.bundle, staged(made), ()) is None
    assert "says nothing of how many lanes there should be" in caplog.text


def test_a_lane_that_fails_ends_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, source, device = network("mlp"), FakeSource(), open_device("cpu")
    made.put(source)
    run, count = device.run, 0

    def broken(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        # Not the first one, which is no lane's.
        if count % 3 == 2:
            raise DeviceFault("broken")
        return run(*arguments)

    monkeypatch.setattr(device, "run", broken)
    assert Sweeps(device, source, Verdicts(tmp_path, "test")).seconds(made.bundle, staged(made), ()) is None


def test_a_sweep_that_the_engine_did_not_outlive_twice_is_not_held_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, source = network("mlp"), FakeSource()
    made.put(source)
    verdicts = Verdicts(tmp_path, "test")
    structures: list[str] = []
    begin = verdicts.begin
    monkeypatch.setattr(verdicts, "begin", lambda kind, structure: (structures.append(structure), begin(kind, structure)))
    sweeps = Sweeps(open_device("cpu"), source, verdicts)
    assert sweeps.seconds(made.bundle, staged(made), ()) is not None
    verdicts.end("lanes", structures[0], {"1": "no number"})
    for _ in range(2):
        begin("lanes", structures[0])
    assert sweeps.seconds(made.bundle, staged(made), ()) is None


def test_what_was_chosen_is_kept_if_it_still_suits_the_device(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path, "test")
    sweeps = Sweeps(open_device("cpu"), FakeSource(), verdicts)
    assert sweeps.last_count() == 1
    sweeps.keep_count(2)
    assert sweeps.last_count() == 2
    for plain in ({"count": 7}, {"count": "2"}, {}):
        verdicts.end("lanes", "count", plain)
        assert sweeps.last_count() == 1


def test_examples_are_of_one_row_and_within_bounds() -> None:
    made = network("minilm")
    for rows in example_rows(made.bundle):
        for array, spec in zip(rows, made.bundle.graph.inputs, strict=True):
            assert array.shape[0] == 1
            assert array.dtype.name == spec.dtype


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.lanecount.ENOUGH", 8)
    monkeypatch.setattr("sidecar.lanecount.LOOK_EVERY_S", 0.0)
    monkeypatch.setattr("sidecar.lanecount.CHANGE_EVERY_S", 0.0)


@pytest.fixture(autouse=True)
def never_busy_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.engine._IDLE_S", 0.01)


def promising(monkeypatch: pytest.MonkeyPatch, **seconds: dict[int, float]) -> None:
    """Have sweeps find what a test says, by model."""
    monkeypatch.setattr(Sweeps, "seconds", lambda self, bundle, staged, forms: seconds[bundle.name])


def lanes(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = ask(running, "status")["lanes"]
    return found


def measured(engine: Engine, *networks: Network) -> bool:
    choice = engine._division._choice
    return choice is not None and all(each.name in choice._costs for each in networks)


@pytest.mark.usefixtures("impatient")
def test_the_number_of_lanes_follows_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = network("mlp"), network("resnet")
    promising(monkeypatch, **{small.name: {1: 1.0, 2: 1.0}, large.name: {1: 1.0, 2: 4.0}})
    with serving(tmp_path, monkeypatch, lanes=None, batch_limit=1, compute_once=False) as running:
        deploy(running, small, large)
        until(lambda: measured(running.engine, small, large))
        assert lanes(running) == {"count": 1, "running": 0, "promised_rates": {}}

        def asks_until(made: Network, count: int) -> None:
            deadline = time.monotonic() + 60
            while lanes(running)["count"] != count:
                assert time.monotonic() < deadline
                for each, inputs, given in asked_by_many(running, [made], 4):
                    assert agrees(given, each.eager(inputs), exact=False)

        asks_until(small, 2)
        assert running.engine._runs._lanes is not None
        asks_until(large, 1)
        assert running.engine._runs._lanes is None
        asks_until(small, 2)
    # The next start begins with it.
    with serving(tmp_path, monkeypatch, source=running.source, lanes=None) as running:
        assert lanes(running)["count"] == 2
        assert agrees(model(small.name).call(small.inputs(1)), small.eager(small.inputs(1)), exact=False)
    # A number that an operator gave is not changed.
    with serving(tmp_path, monkeypatch, source=running.source, lanes=1) as running:
        asked_by_many(running, [small], 4)
        assert lanes(running) == {"count": 1, "running": 0, "promised_rates": {}}


def test_models_are_measured_as_they_are_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.trials._is_faster", lambda packed_s, base_s: True)
    made = [network("resnet"), network("minilm")]
    with serving(tmp_path, monkeypatch, lanes=None) as running:
        deploy(running, *made)
        until(lambda: measured(running.engine, *made))
        choice = running.engine._division._choice
        assert choice is not None
        assert all(choice._costs[each.name].keys() == {1, 2} for each in made)
    # After a restart they are known without another trial.
    with serving(tmp_path, monkeypatch, source=running.source, lanes=None) as running:
        until(lambda: measured(running.engine, *made))
