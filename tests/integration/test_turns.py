"""Several tenants at one engine: whose requests run, who is charged, and what one cannot take from another.

The clock stands still but for what the device is said to take, and the device is held while requests are handed in, so that
their order is the engine's choice and nothing else's.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trunkline.errors import (
    BudgetExceeded,
    DeadlineExceeded,
    DeadlineUnreachable,
    DeviceFault,
    QuotaExceeded,
    SidecarFault,
    TrunklineError,
)

from sidecar.engine import Engine
from sidecar.pins import Pins
from sidecar.ports import OutputSpecs, Work
from sidecar.tenants import Quotas, Tenant
from tests.fakes import FakeDevice, FakeSource, bundle_of
from tests.waiting import PATIENCE_S

STAGE_S = 0.02


class Asker:
    """The session of one request: what became of it, and when it was told, in the order of all."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.bench, self.name = bench, name
        self.outcome: str | TrunklineError = ""

    def answer(self, request_id: int, specs: OutputSpecs, outputs: Sequence[Any], read: Callable[[Any, Any], None]) -> None:
        self._end("answered")

    def document(self, request_id: int, plain: object) -> None:
        self.document_: Any = plain
        self._end("document")

    def fail(self, request_id: int, error: TrunklineError) -> None:
        self._end(error)

    def released(self) -> None:
        self.bench.released.set()

    def _end(self, outcome: str | TrunklineError) -> None:
        self.outcome = outcome
        self.bench.ended.append(self.name)
        self.bench.told.release()


class Bench:
    """An engine with models "a" to "d", which have nothing in common, and a device that waits for ``go`` before each run."""

    def __init__(self, directory: Path, tenants: Sequence[Tenant], more: Mapping[str, Sequence[bytes]], **settings: Any) -> None:
        self.now = 0.0
        # How long the next run takes, and those after it.
        self.stage_s = self.later_s = STAGE_S
        self.device, self.source = FakeDevice(), FakeSource()
        for number, name in enumerate("abcd"):
            contents = [bytes([number + 1]) * 64]
            self.source.put(bundle_of(name, contents), contents)
        for name, contents in more.items():
            self.source.put(bundle_of(name, contents), contents)
        self.ran = threading.Semaphore(0)
        self.go = threading.Semaphore(0)
        self.free_running = False
        self.told = threading.Semaphore(0)
        self.ended: list[str] = []
        self.released = threading.Event()
        # The most that the calls under way were reckoned to take beside weights.
        self.most_activation_bytes = 0
        self.device.on_run = self._on_run
        self.engine = Engine(
            self.device,
            self.source,
            Pins(directory / "pins.json"),
            queue_limit=64,
            quotas=Quotas({tenant.name: tenant for tenant in tenants}),
            clock=lambda: self.now,
            **{"budget_bytes": 1 << 20, **settings},
        )
        self.engine.deploy_stored()
        self.thread = threading.Thread(target=self.engine.run)
        self.thread.start()
        # All weights are in memory, or requests would overtake those who wait for theirs.
        self.free_running = True
        for name in "abcd":
            self.answered(self.ask(tenants[0], name, -2.0))
        self.hold_again()

    def hold_again(self) -> None:
        self.free_running = False
        while self.ran.acquire(blocking=False):
            pass
        self.ended.clear()

    def _on_run(self) -> None:
        # Called in the engine's thread.
        taken = sum(call.work.activation_bytes for call in self.engine._under_way.calls())
        self.most_activation_bytes = max(self.most_activation_bytes, taken)
        self.ran.release()
        if not self.free_running:
            assert self.go.acquire(timeout=PATIENCE_S)
        self.now += self.stage_s
        self.stage_s = self.later_s

    def ask(self, tenant: Tenant, model: str, value: float = 0.0, deadline_s: float = 1e6, rows: int = 1) -> Asker:
        asker = Asker(self, f"{tenant.name}{value:g}")
        inputs = [np.full((rows, 3), value, np.float32)]
        signature = self.engine.signature(model)
        self.engine.submit(
            Work(asker, 1, model, self.now + deadline_s, "", inputs, signature, tenant, inputs[0].nbytes)  # type: ignore[arg-type]
        )
        return asker

    def answered(self, asker: Asker) -> Asker:
        """Wait for an answer, of a request that has the device for itself."""
        assert self.told.acquire(timeout=PATIENCE_S)
        assert asker.outcome
        return asker

    def hold(self, tenant: Tenant, model: str) -> Asker:
        """Have the device begin with a request, and stop there."""
        asker = self.ask(tenant, model, -1.0)
        assert self.ran.acquire(timeout=PATIENCE_S)
        return asker

    def let_go(self, count: int, held_s: float = STAGE_S) -> list[str]:
        """Let the device run, ``held_s`` in all for what is held; return the ends of ``count`` requests in order."""
        self.free_running = True
        self.now += held_s - STAGE_S
        self.go.release()
        for _ in range(count):
            assert self.told.acquire(timeout=PATIENCE_S)
        return self.ended


@contextlib.contextmanager
def bench(directory: Path, *tenants: Tenant, more: Mapping[str, Sequence[bytes]] = {}, **settings: Any) -> Iterator[Bench]:
    made = Bench(directory, tenants, more, **settings)
    try:
        yield made
    finally:
        made.free_running = True
        made.go.release()
        made.engine.drain(lambda: None)
        made.thread.join(PATIENCE_S)
    assert not made.thread.is_alive()
    made.engine.check_invariants()


def tenant(name: str, **rest: Any) -> Tenant:
    return Tenant(name=name, domain="", models=("*",), **rest)


def test_a_flood_does_not_hold_up_another_tenant(tmp_path: Path) -> None:
    flood, other = tenant("flood"), tenant("other")
    with bench(tmp_path, flood, other) as made:
        # More than may be in the wavefront, so that some wait in the queue as well.
        made.hold(flood, "a")
        for number in range(30):
            made.ask(flood, "a", number)
        for number in range(3):
            made.ask(other, "b", number)
        ended = made.let_go(34, held_s=1.0)
    # Nothing but the run that was under way comes before; and then a quantum more for who has had nothing.
    assert ended[0] == "flood-1"
    assert set(ended[1:4]) == {"other0", "other1", "other2"}


def test_without_other_tenants_requests_run_in_the_order_they_came(tmp_path: Path) -> None:
    alone = tenant("alone")
    with bench(tmp_path, alone) as made:
        made.hold(alone, "a")
        for number in range(6):
            made.ask(alone, "abcd"[number % 4], number)
        ended = made.let_go(7)
    assert ended == ["alone-1", *(f"alone{number}" for number in range(6))]


def test_a_higher_priority_goes_first_at_the_next_stage(tmp_path: Path) -> None:
    low, high = tenant("low"), tenant("high", priority=9)
    with bench(tmp_path, low, high) as made:
        made.hold(low, "a")
        for number in range(4):
            made.ask(low, "b", number)
        for number in range(4):
            made.ask(high, "c", number)
        ended = made.let_go(9)
    assert ended == ["low-1", *(f"high{number}" for number in range(4)), *(f"low{number}" for number in range(4))]


def test_device_time_goes_by_weight(tmp_path: Path) -> None:
    heavy, light = tenant("heavy", weight=3.0), tenant("light", weight=1.0)
    with bench(tmp_path, heavy, light, batch_limit=1) as made:
        made.hold(heavy, "a")
        for number in range(60):
            made.ask(light, "b", number)
        for number in range(60):
            made.ask(heavy, "c", number)
        ended = made.let_go(121)
    among_the_first = sum(name.startswith("light") for name in ended[:60])
    assert 10 <= among_the_first <= 20


def test_what_is_asked_beyond_a_quota_is_refused_and_the_rest_answered(tmp_path: Path) -> None:
    small, other = tenant("small", in_flight_limit=2), tenant("other")
    with bench(tmp_path, small, other) as made:
        first = made.hold(small, "a")
        asked = [made.ask(small, "a", number) for number in range(4)]
        fine = made.ask(other, "a", 7.0)
        made.let_go(6)
    outcomes = [each.outcome for each in (first, *asked, fine)]
    # They are looked at when the one that was held is answered.
    assert outcomes.count("answered") == 4
    refused = [outcome for outcome in outcomes if isinstance(outcome, QuotaExceeded)]
    assert len(refused) == 2
    assert refused[0].details["in_flight_count"] == 2
    assert fine.outcome == "answered"


def test_what_cannot_be_in_time_is_refused_before_it_runs(tmp_path: Path) -> None:
    one, other = tenant("one"), tenant("other")
    with bench(tmp_path, one, other) as made:
        held = made.hold(one, "a")
        waiting = [made.ask(one, "a", number) for number in range(3)]
        late = made.ask(one, "a", 9.0, deadline_s=2 * STAGE_S)
        in_time = made.ask(other, "a", 8.0, deadline_s=2.5 * STAGE_S + 0.06)
        made.let_go(6)
    assert isinstance(late.outcome, DeadlineUnreachable)
    assert late.outcome.details["predicted_s"] == pytest.approx(4 * STAGE_S, rel=0.05)
    assert {each.outcome for each in (held, *waiting, in_time)} == {"answered"}


def test_what_is_late_is_told_of_its_own_tenant_only(tmp_path: Path) -> None:
    one, other = tenant("one"), tenant("other")
    with bench(tmp_path, one, other) as made:
        made.hold(one, "a")
        # More than may be in the wavefront.
        for number in range(30):
            made.ask(one, "b", number)
        late = made.ask(other, "a", deadline_s=1.0)
        made.let_go(32, held_s=2.0)
    assert isinstance(late.outcome, DeadlineExceeded)
    assert late.outcome.details["waiting_count"] == 0
    assert "0 others of the same tenant wait" in late.outcome.message


def test_a_call_whose_models_run_in_turn_is_predicted_by_what_they_took(tmp_path: Path) -> None:
    one, other = tenant("one"), tenant("other")
    # Room for one model at a time.
    with bench(tmp_path, one, other, budget_bytes=100) as made:
        made.free_running = True
        for number in range(2):
            made.answered(made.ask(one, "a+b", number))
        late = made.answered(made.ask(one, "a+b", 7.0, deadline_s=1.5 * STAGE_S))
        in_time = made.answered(made.ask(one, "a+b", 8.0, deadline_s=2.5 * STAGE_S))
    assert isinstance(late.outcome, DeadlineUnreachable)
    assert late.outcome.details["predicted_s"] == pytest.approx(2 * STAGE_S, rel=0.05)
    assert in_time.outcome == "answered"


def test_models_that_take_too_much_to_compute_together_run_in_turn(tmp_path: Path) -> None:
    # A call takes 16 times its inputs of 12 bytes a row, where a dry run does not tell.
    one = tenant("one")
    with bench(tmp_path, one, activation_budget_bytes=3 * 192) as made:
        made.free_running = True
        before = made.engine._runs.counts.stages
        for rows in (1, 2, 3):
            assert made.answered(made.ask(one, "a+b", rows, rows=rows)).outcome == "answered"
        assert made.most_activation_bytes <= 3 * 192
        assert made.engine._runs.counts.stages - before == 6
        refused = made.answered(made.ask(one, "a+b", rows=4)).outcome
    assert isinstance(refused, BudgetExceeded)
    assert refused.details == {"needed_bytes": 4 * 192, "budget_bytes": 3 * 192}
    assert "a call of a with inputs of these sizes takes about 768 bytes" in refused.message


def test_a_request_that_cannot_be_taken_in_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = tenant("one")
    with bench(tmp_path, one) as made:
        made.free_running = True
        with monkeypatch.context() as patched:
            patched.setattr(made.engine, "_forecast", None)
            failed = made.answered(made.ask(one, "a"))
        assert made.answered(made.ask(one, "a")).outcome == "answered"
    assert isinstance(failed.outcome, SidecarFault)
    assert "incident" in failed.outcome.details


def test_a_tenant_without_compute_once_is_computed_for_by_itself(tmp_path: Path) -> None:
    shares, alone = tenant("shares"), tenant("alone", compute_once=False)
    counts = []
    for second in (shares, alone):
        with bench(tmp_path, shares, alone) as made:
            made.hold(shares, "a")
            before = made.engine._runs.counts.stages
            for number in range(2):
                made.ask(shares if number else second, "b", 5.0)
            made.let_go(3)
            counts.append(made.engine._runs.counts.stages - before)
    assert counts == [2, 3]


def test_room_to_compute_that_one_tenant_holds_is_not_taken_from_another(tmp_path: Path) -> None:
    # A call takes 16 times its inputs of 12 bytes a row, where a dry run does not tell.
    greedy, other = tenant("greedy"), tenant("other")
    with bench(tmp_path, greedy, other, activation_budget_bytes=8 * 192) as made:
        made.free_running = True
        for each in (greedy, other):
            # Until it is known what calls take, each goes alone.
            made.answered(made.ask(each, "a"))
        made.hold_again()
        # It may have all but what is reserved for the other: six rows, of which one is held.
        made.hold(greedy, "a")
        asked = [made.ask(greedy, "b", number) for number in range(10)]
        refused = made.ask(greedy, "c", 77.0, rows=7)
        for number in range(2):
            made.ask(other, "d", number)
        made.let_go(14)
        ended = made.ended
    assert isinstance(refused.outcome, BudgetExceeded)
    assert refused.outcome.details["budget_bytes"] == 6 * 192
    assert {each.outcome for each in asked} == {"answered"}
    assert [name for name in ended if name.startswith("other")] == ["other0", "other1"]
    assert ended.index("other1") < ended.index("greedy5")


def test_the_queues_tell_what_each_tenant_waits_for(tmp_path: Path) -> None:
    one, other = tenant("one"), tenant("other")
    with bench(tmp_path, one, other) as made:
        made.hold(one, "a")
        for number in range(3):
            made.ask(one, "a", number)
        administrator = Asker(made, "administrator")
        made.engine.command(administrator, 1, "queues", {}, made.now + 10)  # type: ignore[arg-type]
        made.let_go(5)
    found = administrator.document_["tenants"]
    # The one that was held is answered by then, as four were that warmed up.
    assert found["one"] == {
        "waiting": 3,
        "running": 0,
        "input_bytes": 36,
        "wait_s": pytest.approx(3 * STAGE_S),
        "device_s": pytest.approx(5 * STAGE_S),
    }
    assert found["other"] == {
        "waiting": 0,
        "running": 0,
        "input_bytes": 0,
        "wait_s": pytest.approx(0.05, abs=0.06),
        "device_s": 0.0,
    }


def test_what_has_become_late_is_not_computed_to_its_end(tmp_path: Path) -> None:
    one = tenant("one")
    with bench(tmp_path, one) as made:
        made.hold(one, "a")
        fine, late = made.ask(one, "b"), made.ask(one, "b", 1.0, deadline_s=10.0)
        before = made.engine._runs.counts.stages
        # Both are taken up, and while the first of them is computed the second one's time is over.
        made.later_s = 100.0
        made.let_go(3)
        assert made.engine._runs.counts.stages - before == 2
    assert fine.outcome == "answered"
    assert isinstance(late.outcome, DeadlineExceeded)
    assert "while the request was being computed" in late.outcome.message


def test_a_session_that_ends_leaves_nothing_of_its_tenant_behind(tmp_path: Path) -> None:
    one, other = tenant("one"), tenant("other")
    with bench(tmp_path, one, other) as made:
        made.hold(one, "a")
        gone = made.ask(other, "b")
        made.engine.session_opened()
        made.engine.session_closed(gone)  # type: ignore[arg-type]
        made.let_go(1)
        assert made.released.wait(PATIENCE_S)
        assert made.ended == ["one-1"]
        assert made.engine._queue.loads()["other"].running_count == 0


def test_who_asks_for_more_models_than_it_may_have_in_memory_pushes_out_its_own(tmp_path: Path) -> None:
    # Each model has a weight of 64 bytes.
    small, other = tenant("small", resident_limit_bytes=128), tenant("other")
    with bench(tmp_path, other, small) as made:
        made.free_running = True
        for name in "aba":
            made.answered(made.ask(small, name))
        for name in "cd":
            made.answered(made.ask(other, name))
        made.answered(made.ask(small, "c"))
        states = {name: made.engine._residency.is_ready(made.engine._catalog.deployed[name].plan) for name in "abcd"}
        # The other one has used all of them, so that none leaves; they are only no longer the small one's.
        assert states == dict.fromkeys("abcd", True)
        made.engine.use_quotas(Quotas({"small": small}))
        for name in "abd":
            made.answered(made.ask(small, name))
        states = {name: made.engine._residency.is_ready(made.engine._catalog.deployed[name].plan) for name in "abcd"}
        assert states == {"a": False, "b": True, "c": False, "d": True}
        refused = made.answered(made.ask(tenant("small", resident_limit_bytes=63), "a"))
    assert isinstance(refused.outcome, BudgetExceeded)
    assert "small may have 63 in memory" in refused.outcome.message


def test_models_that_are_only_named_count_in_the_quota_as_well(tmp_path: Path) -> None:
    small, other = tenant("small", resident_limit_bytes=64), tenant("other")
    with bench(tmp_path, other, small, budget_bytes=128) as made:
        made.free_running = True
        for name in "abcd":
            made.engine._post(lambda name=name: made.engine._drop(made.engine._residency.evict(plan_of(made, name))))  # type: ignore[misc]
        made.answered(made.ask(other, "a"))
        made.engine.session_opened(("b", "c", "d"), small)
        made.answered(made.ask(small, "d"))
        # Of its own models only one has room at a time, and another tenant's stays.
        states = {name: made.engine._residency.is_ready(plan_of(made, name)) for name in "abcd"}
    assert states == {"a": True, "b": False, "c": False, "d": True}


def test_who_waited_for_weights_has_not_saved_up_for_ever(tmp_path: Path) -> None:
    stuck, busy = tenant("stuck"), tenant("busy")
    with bench(tmp_path, stuck, busy, batch_limit=1) as made:
        arrive = threading.Event()
        made.source.before_read = lambda digest: arrive.wait(PATIENCE_S)
        made.free_running = True
        made.engine._post(lambda: made.engine._drop(made.engine._residency.evict(plan_of(made, "d"))))
        waiting = made.ask(stuck, "d", 99.0)
        # Seconds of device time, for whoever has something to run.
        made.stage_s = made.later_s = 0.06
        for number in range(60):
            made.answered(made.ask(busy, "a", number))
        made.stage_s = made.later_s = STAGE_S
        arrive.set()
        made.answered(waiting)
        made.hold_again()
        made.hold(stuck, "b")
        for number in range(40):
            made.ask(stuck, "b", number)
        for number in range(4):
            made.ask(busy, "a", number)
        ended = made.let_go(45)
    # Three quanta and the latest stage, and then each in turn.
    assert ended.index("busy0") <= 12


def test_runs_that_fail_are_charged_as_well(tmp_path: Path) -> None:
    broken, other = tenant("broken"), tenant("other")
    with bench(tmp_path, other, broken) as made:
        made.free_running = True

        def fail() -> None:
            made.now += 3.0
            raise DeviceFault("the input is of the wrong kind")

        made.device.on_run, on_run = fail, made.device.on_run
        asker = made.answered(made.ask(broken, "a"))
        made.device.on_run = on_run
        made.answered(made.ask(other, "b"))
        assert made.engine._queue.loads()["broken"].device_s == pytest.approx(3.0)
    assert isinstance(asker.outcome, DeviceFault)


def test_requests_for_a_model_that_streams_keep_only_their_own_tenant_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    streams, other = tenant("streams"), tenant("other")
    large = {"large": [bytes([number + 1]) * 100 for number in range(20)]}
    with bench(tmp_path, other, streams, more=large, budget_bytes=4 * 64 + 250, batch_limit=2) as made:
        # Else the run takes its room.
        made.engine._post(lambda: made.engine._residency.pin(plan_of(made, "b")))
        made.hold(streams, "large")
        made.go.release()
        assert made.ran.acquire(timeout=PATIENCE_S)
        # Its run has begun; whoever asks for the same now waits for the next one.
        for number in range(12):
            made.ask(streams, "large", number)
        made.go.release()
        assert made.ran.acquire(timeout=PATIENCE_S)
        for number in range(2):
            made.ask(other, "b", number)
        ended = made.let_go(15)
    assert set(ended[:2]) == {"other0", "other1"}


def test_who_waits_for_room_in_memory_keeps_nobody_waiting_for_a_model_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    greedy, other = tenant("greedy"), tenant("other")
    large = {"large": [bytes([number + 1]) * 100 for number in range(20)]}
    with bench(tmp_path, other, greedy, more=large, budget_bytes=2000 + 64) as made:
        made.engine._post(lambda: made.engine._residency.pin(plan_of(made, "c")))
        made.free_running = True
        made.answered(made.ask(greedy, "large"))
        made.hold_again()
        made.hold(greedy, "large")
        # It has no room beside the large one, which has twenty stages.
        made.ask(greedy, "d", 1.0)
        made.go.release()
        assert made.ran.acquire(timeout=PATIENCE_S)
        made.ask(other, "c")
        ended = made.let_go(3)
    assert ended[0] == "other0"


def test_a_stream_gives_way_between_two_stages_to_who_waits_for_room_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    greedy, other = tenant("greedy"), tenant("other")
    # Twenty stages, with room for ten, or for two and all small models.
    large = {"large": [bytes([number + 1]) * 100 for number in range(20)]}
    with bench(tmp_path, other, greedy, more=large, budget_bytes=1000) as made:
        made.hold(greedy, "large")
        asked = [made.ask(other, name, number) for number, name in enumerate("abcd")]
        ended = made.let_go(5)
        assert {each.outcome for each in asked} == {"answered"}
        assert ended[-1] == "greedy-1"


def test_neither_a_stream_nor_who_waits_for_room_beside_it_waits_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small models that push each other out, of which there is room for two beside a stream that yields."""
    monkeypatch.setattr("sidecar.blocks.SMALLEST_BYTES", 1)
    greedy, one, other = tenant("greedy"), tenant("one"), tenant("other")
    large = {"large": [bytes([number + 1]) * 100 for number in range(20)]}
    with bench(tmp_path, other, greedy, one, more=large, budget_bytes=330) as made:
        made.hold(greedy, "large")
        asked = [made.ask(greedy, "large", number) for number in range(3)]
        asked += [made.ask(each, "abcd"[number % 4], number) for number in range(12) for each in (one, other)]
        ended = made.let_go(28)
        assert {each.outcome for each in asked} == {"answered"}
        # Not all of them had to wait for an end of a run.
        assert ended.index("greedy-1") >= 2


def plan_of(made: Bench, name: str) -> str:
    return made.engine._catalog.deployed[name].plan


def test_other_quotas_hold_from_the_next_request_on(tmp_path: Path) -> None:
    with bench(tmp_path, tenant("one")) as made:
        made.free_running = True
        made.answered(made.ask(tenant("one"), "a"))
        less = tenant("one", in_flight_limit=0)
        made.engine.use_quotas(Quotas({"one": less}))
        made.answered(made.ask(tenant("one"), "a", 1.0))
        refused = made.ask(less, "a", 2.0)
        # Nothing of it is under way, and still it is one too many.
        assert isinstance(made.answered(refused).outcome, QuotaExceeded | str)
