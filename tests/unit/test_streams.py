"""Models that stream: how long a run is predicted to take, and what of them is held while others wait for memory."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import cast

import pytest

from sidecar.catalog import Catalog, Deployed
from sidecar.devicememory import DeviceMemory
from sidecar.loads import Loads
from sidecar.pins import Pins
from sidecar.residency import Residency
from sidecar.streams import Streams
from sidecar.timeline import Leg, plan
from sidecar.trials import Verdict
from tests.fakes import FakeDevice, FakeSource, bundle_of

CONTENTS = [bytes([number]) * 100 for number in range(5)]
BUDGET_BYTES = 300
PACE = 1000.0
RUN_S = (0.5, 0.25, 0.125, 2.0, 1.0)


class Reads:
    """Loads whose weights come when ``arrive`` is told."""

    def __init__(self, residency: Residency) -> None:
        self.residency = residency
        self.asked: list[str] = []

    def fetch(self, deployed: Deployed, missing: Sequence[str]) -> None:
        self.asked += [digest for digest in missing if digest not in self.asked]

    def on_their_way(self, weights: Collection[str]) -> list[str]:
        return self.asked

    def arrive(self, count: int = 99) -> None:
        for digest in self.asked[:count]:
            self.residency.arrived(digest)
        del self.asked[:count]


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    residency = Residency(BUDGET_BYTES)
    return Streams(residency, cast(Loads, Reads(residency)), lambda digests: None, lambda: PACE, lambda: 0.0)


def deployed(streams: Streams, folder: Path, verdict: Verdict) -> Deployed:
    """Return a model of five stages whose trial has shown this."""
    source, device = FakeSource(), FakeDevice()
    source.put(bundle_of("m", CONTENTS), CONTENTS)
    catalog = Catalog(source, device, DeviceMemory(device, source), streams.residency, Pins(folder / "pins.json"))  # type: ignore[arg-type]
    catalog.deploy("m")
    made = catalog.deployed["m"]
    assert len(made.steps) == len(RUN_S)
    catalog.adopt(made, verdict)
    return catalog.deployed["m"]


def predicted_s(streams: Streams, model: Deployed) -> float:
    """Return what a run is predicted to take that ends before its first stage."""
    before_s = streams.counts.predicted_s
    assert streams.enter(model)
    streams.residency.release(model.plan)
    assert streams.move(())
    return streams.counts.predicted_s - before_s


def planned_s(*run_s: float) -> float:
    found = plan([Leg(100, 100 / PACE, each) for each in run_s], BUDGET_BYTES)
    assert found is not None
    return found.predicted_s


def test_the_first_run_is_predicted_by_the_trial_and_later_ones_by_those_before(streams: Streams, tmp_path: Path) -> None:
    model = deployed(streams, tmp_path, Verdict(None, "fixed", run_s=RUN_S))
    assert predicted_s(streams, model) == planned_s(*RUN_S) >= sum(RUN_S)
    streams.ran(model.steps[1], 8.0)
    assert predicted_s(streams, model) == pytest.approx(planned_s(0.5, 8.0, 0.125, 2.0, 1.0))


def test_what_no_trial_has_timed_is_predicted_by_its_reading_alone(streams: Streams, tmp_path: Path) -> None:
    model = deployed(streams, tmp_path, Verdict(None, "fixed"))
    assert predicted_s(streams, model) == planned_s(*[0.0] * len(RUN_S)) > 0


# --- what is held -----------------------------------------------------------------------------------------------------


def begun(streams: Streams, folder: Path, budget_bytes: int = 400) -> tuple[Deployed, Reads]:
    """Begin a run of a model of five stages in memory for four; return it, and its reads."""
    model = deployed(streams, folder, Verdict(None, "fixed", run_s=RUN_S))
    streams.residency.budget_bytes = budget_bytes
    streams.residency.add_plan("small", {"s": 100})
    assert streams.enter(model)
    return model, cast(Reads, streams.loads)


def held(streams: Streams, model: Deployed) -> list[int]:
    """Return the numbers of the stages that may not leave."""
    streams.residency.check_invariants()
    window = streams.residency.window(model.plan)
    return [number for number, step in enumerate(model.steps) if {weight.digest for weight in step.graph.weights} <= window]


def test_while_others_wait_no_more_is_held_than_two_stages_and_then_all_again(streams: Streams, tmp_path: Path) -> None:
    model, reads = begun(streams, tmp_path)
    streams.move({0})
    assert held(streams, model) == [0, 1, 2, 3]
    reads.arrive()
    assert streams.residency.lease("small") is None
    streams.move({0}, yields=True)
    assert (held(streams, model), streams.gave_way) == ([0, 1], True)
    # Nothing has left that nobody wants.
    assert streams.residency.committed_bytes == 400
    assert streams.residency.lease("small") is not None
    streams.move({0}, yields=True)
    assert not streams.gave_way
    streams.move({1}, yields=True)
    assert (held(streams, model), streams.gave_way) == ([1, 2], True)
    streams.residency.release("small")
    streams.move({1})
    assert held(streams, model) == [0, 1, 2, 3]
    assert not streams.starved


def test_what_is_being_read_stays_until_it_is_there(streams: Streams, tmp_path: Path) -> None:
    model, reads = begun(streams, tmp_path)
    streams.move({0})
    reads.arrive(3)
    streams.move({0}, yields=True)
    assert held(streams, model) == [0, 1, 3]
    assert streams.residency.lease("small") is not None
    streams.move({1}, yields=True)
    # The third has left for the small one, and comes back in place of the first.
    assert held(streams, model) == [1, 2, 3]
    reads.arrive()
    streams.move({1}, yields=True)
    assert held(streams, model) == [1, 2]


def test_a_stage_that_somebody_stands_before_stays_as_a_lane_may_be_at_it(streams: Streams, tmp_path: Path) -> None:
    model, reads = begun(streams, tmp_path)
    streams.move({0})
    reads.arrive()
    streams.move({0, 3}, yields=True)
    assert held(streams, model) == [0, 1, 3]
    assert streams.residency.lease("small") is not None
    assert held(streams, model) == [0, 1, 3]


def test_a_stream_that_has_no_room_waits_for_what_is_being_read_before_it_fails(streams: Streams, tmp_path: Path) -> None:
    model, reads = begun(streams, tmp_path)
    streams.move({0})
    reads.arrive(3)
    # As if all else had been pinned meanwhile.
    streams.residency.budget_bytes = 150
    streams.move({4}, yields=True)
    assert streams.starved
    reads.arrive()
    streams.move({4}, yields=True)
    assert (held(streams, model), streams.starved) == ([4], False)
