"""How long a run of a model that streams is predicted to take: by its trial at first, by its runs from then on."""

from __future__ import annotations

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


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    # Nothing is read: the loads are not asked for anything before a run begins.
    return Streams(Residency(BUDGET_BYTES), cast(Loads, None), lambda digests: None, lambda: PACE, lambda: 0.0)


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
    assert streams.move(None)
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
