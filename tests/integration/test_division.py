"""The number of lanes, chosen while the sidecar serves: what is run is measured, trials divide the device, answers stay right."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trunkline import model
from trunkline.errors import DeviceFault

from sidecar.devices import TorchDevice, open_device
from sidecar.division import choice_for
from sidecar.lanecount import LaneChoice
from sidecar.verdicts import Verdicts
from tests.fakes import Running
from tests.integration.test_lanes import asked_by_many
from tests.integration.test_sharing import ask, deploy, serving
from tests.networks import Network, agrees, network
from tests.waiting import soon

pytestmark = pytest.mark.usefixtures("two_threads")


@pytest.fixture
def two_threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("threads", "counts"), [(1, (1,)), (2, (1, 2)), (3, (1, 3)), (6, (1, 2, 6)), (16, (1, 2, 4, 8, 16))])
def test_lanes_have_half_the_threads_each_time(threads: int, counts: tuple[int, ...], tmp_path: Path) -> None:
    torch.set_num_threads(threads)
    device = open_device("cpu")
    assert device.lane_counts == counts
    # What cannot be divided needs no choice.
    assert (choice_for(device, Verdicts(tmp_path, "test")) is None) == (threads == 1)


def test_what_was_chosen_is_where_the_next_start_begins_if_it_still_suits_the_device(tmp_path: Path) -> None:
    verdicts = Verdicts(tmp_path, "test")
    device = open_device("cpu")

    def begins_with() -> int:
        choice = choice_for(device, verdicts)
        assert choice is not None
        return choice.count

    assert begins_with() == 1
    verdicts.end("lanes", "count", {"count": 2})
    assert begins_with() == 2
    for plain in ({"count": 7}, {"count": "2"}, {}):
        verdicts.end("lanes", "count", plain)
        assert begins_with() == 1


class Scripted(LaneChoice):
    """Chooses what a test says."""

    def ran(self, *arguments: Any) -> None:
        pass


def lanes(running: Running) -> dict[str, Any]:
    found: dict[str, Any] = ask(running, "status")["lanes"]
    return found


def choice_of(running: Running) -> LaneChoice:
    choice = running.engine._division._choice
    assert choice is not None
    return choice


def asks_until(running: Running, made: Network, so: Callable[[], bool]) -> None:
    deadline = soon()
    while not so():
        assert time.monotonic() < deadline
        for each, inputs, given in asked_by_many(running, [made], 4):
            assert agrees(given, each.eager(inputs), exact=False)


def test_the_device_is_divided_as_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = network("mlp")
    with monkeypatch.context() as patched:
        patched.setattr("sidecar.division.LaneChoice", Scripted)
        with serving(tmp_path, monkeypatch, lanes=None, batch_limit=1, compute_once=False) as running:
            deploy(running, made)
            choice = choice_of(running)
            assert lanes(running) == {"count": 1, "chosen": 1, "running": 0, "measured_rates": {}}
            # A trial is not kept; what is chosen is.
            for count, chosen in ((2, 1), (1, 1), (2, 2), (1, 2), (2, 2)):
                choice.count, choice.chosen = count, chosen
                asks_until(running, made, lambda count=count: lanes(running)["count"] == count)  # type: ignore[misc]
                assert (running.engine._runs._lanes is not None) == (count == 2)
    # The next start begins with it.
    with serving(tmp_path, monkeypatch, source=running.source, lanes=None) as running:
        assert lanes(running)["count"] == 2
        assert agrees(model(made.name).call(made.inputs(1)), made.eager(made.inputs(1)), exact=False)
    # A number that an operator gave is not changed.
    with serving(tmp_path, monkeypatch, source=running.source, lanes=1) as running:
        asked_by_many(running, [made], 4)
        assert lanes(running) == {"count": 1, "chosen": 1, "running": 0, "measured_rates": {}}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sidecar.lanecount.WINDOW_S", 0.002)
    monkeypatch.setattr("sidecar.lanecount.SETTLE_S", 0.0)


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("settings", [{"batch_limit": 1, "compute_once": False}, {}], ids=["apart", "batched"])
def test_other_numbers_are_tried_on_what_is_served(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, monkeypatch, lanes=None, **settings) as running:
        made = network("resnet")
        deploy(running, made)
        asks_until(running, made, lambda: lanes(running)["measured_rates"].keys() == {"1", "2"})
        assert all(rate > 0 for rate in choice_of(running).rates.values())


@pytest.mark.usefixtures("hasty")
def test_a_device_that_cannot_be_divided_serves_on_undivided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(device: TorchDevice, count: int) -> None:
        raise DeviceFault("no room for a stream")

    monkeypatch.setattr(TorchDevice, "begin_lane", refuses)
    with serving(tmp_path, monkeypatch, lanes=None, batch_limit=1, compute_once=False) as running:
        made = network("mlp")
        deploy(running, made)
        asks_until(running, made, lambda: choice_of(running)._counts == [1])
        asks_until(running, made, lambda: lanes(running)["count"] == 1)
        assert not running.engine._division.is_due
