"""The scheduler: a queue for each tenant, bounded, fair by what the device did, nothing late is run."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from trunkline.errors import DeadlineUnreachable, QueueFull, QuotaExceeded

from sidecar.forecast import Forecast
from sidecar.scheduler import Scheduler
from sidecar.tenants import ANYONE, Quotas, Tenant


@dataclass(eq=False)
class Request:
    name: str
    deadline: float = 10.0
    tenant: Tenant = ANYONE
    input_bytes: int = 0


def tenants(*names: str, **rest: object) -> list[Tenant]:
    return [Tenant(name=name, domain=name, **rest) for name in names]  # type: ignore[arg-type]


def quotas(*all_of_them: Tenant) -> Quotas:
    return Quotas({tenant.name: tenant for tenant in all_of_them})


def taken(scheduler: Scheduler[Request], now: float = 0.0) -> Request:
    expired, request = scheduler.take(now)
    assert not expired
    assert request is not None
    return request


def test_first_come_first_served() -> None:
    scheduler: Scheduler[Request] = Scheduler(3)
    for name in "abc":
        scheduler.submit(Request(name), 0.0)
    assert [taken(scheduler).name for _ in range(3)] == ["a", "b", "c"]
    assert scheduler.take(0) == ([], None)


def test_a_full_queue_refuses_with_the_numbers() -> None:
    scheduler: Scheduler[Request] = Scheduler(1)
    scheduler.submit(Request("a"), 0.0)
    with pytest.raises(QueueFull, match="1 requests are waiting, the limit is 1") as refused:
        scheduler.submit(Request("b"), 0.0)
    assert refused.value.details["retry_after_s"] > 0  # type: ignore[operator]
    assert len(scheduler) == 1
    scheduler.check_invariants()


def test_a_tenant_fills_its_own_queue_only() -> None:
    one, other = tenants("one", "other")
    scheduler: Scheduler[Request] = Scheduler(1, quotas(one, other))
    scheduler.submit(Request("a", tenant=one), 0.0)
    with pytest.raises(QueueFull):
        scheduler.check_room(one)
    scheduler.submit(Request("b", tenant=other), 0.0)
    assert len(scheduler) == 2


def test_requests_under_way_are_bounded_by_the_quota() -> None:
    (tenant,) = tenants("one", in_flight_limit=2)
    scheduler: Scheduler[Request] = Scheduler(9, quotas(tenant))
    for name in "ab":
        scheduler.submit(Request(name, tenant=tenant), 0.0)
    first = taken(scheduler)
    with pytest.raises(QuotaExceeded, match="2 requests of one are under way, its quota is 2"):
        scheduler.submit(Request("c", tenant=tenant), 0.0)
    scheduler.leave(first, 1.0)
    scheduler.submit(Request("c", tenant=tenant), 0.0)
    scheduler.check_invariants()


def test_bytes_under_way_are_bounded_by_the_quota_but_one_request_is_always_taken() -> None:
    (tenant,) = tenants("one", queued_limit_bytes=100)
    scheduler: Scheduler[Request] = Scheduler(9, quotas(tenant))
    scheduler.submit(Request("a", tenant=tenant, input_bytes=150), 0.0)
    with pytest.raises(QuotaExceeded, match=r"150 bytes of inputs, with 1 more that is over its quota of 100"):
        scheduler.submit(Request("b", tenant=tenant, input_bytes=1), 0.0)
    scheduler.leave(taken(scheduler))
    scheduler.submit(Request("b", tenant=tenant, input_bytes=60), 0.0)
    scheduler.submit(Request("c", tenant=tenant, input_bytes=40), 0.0)


def test_what_is_late_is_told_and_not_run() -> None:
    scheduler: Scheduler[Request] = Scheduler(5)
    for name, deadline in (("late", 1.0), ("later", 2.0), ("good", 9.0)):
        scheduler.submit(Request(name, deadline), 0.0)
    expired, request = scheduler.take(2.0)
    assert [late.name for late in expired] == ["late", "later"]
    assert request is not None
    assert request.name == "good"


def test_what_could_not_start_comes_first_again() -> None:
    scheduler: Scheduler[Request] = Scheduler(2)
    scheduler.submit(Request("a"), 0.0)
    scheduler.submit(Request("b"), 0.0)
    first = taken(scheduler)
    scheduler.put_back(first)
    assert taken(scheduler) is first


def test_a_tenant_that_is_not_admitted_is_passed_over() -> None:
    one, other = tenants("one", "other")
    scheduler: Scheduler[Request] = Scheduler(2, quotas(one, other))
    scheduler.submit(Request("a", tenant=one), 0.0)
    assert not scheduler.can_take(lambda tenant: tenant is other)
    scheduler.submit(Request("b", tenant=other), 0.0)
    assert scheduler.can_take(lambda tenant: tenant is other)
    expired, request = scheduler.take(0.0, lambda tenant: tenant is other)
    assert (expired, request and request.name) == ([], "b")


def test_dropping_takes_only_what_was_meant() -> None:
    scheduler: Scheduler[Request] = Scheduler(3)
    for name in "aba":
        scheduler.submit(Request(name), 0.0)
    assert scheduler.drop(lambda request: request.name == "a") == 2
    assert len(scheduler) == 1
    scheduler.check_invariants()


def test_what_was_never_submitted_is_no_matter() -> None:
    scheduler: Scheduler[Request] = Scheduler(3)
    request = Request("a")
    scheduler.charge(request, 1.0)
    scheduler.leave(request)
    assert scheduler.order(request) == 0
    scheduler.check_invariants()


def test_what_cannot_be_in_time_is_refused_at_once_with_the_prediction() -> None:
    scheduler: Scheduler[Request] = Scheduler(9)
    first = Request("a")
    scheduler.submit(first, 0.0, "kind")
    scheduler.charge(taken(scheduler), 0.5)
    scheduler.leave(first, 0.5)
    # One that waits, and itself.
    scheduler.submit(Request("b"), 1.0, "kind")
    with pytest.raises(DeadlineUnreachable, match=r"about 1\.000 s, the deadline is in 0\.900 s and 1 requests of") as refused:
        scheduler.submit(Request("c", deadline=1.9), 1.0, "kind")
    assert refused.value.details == {"predicted_s": 1.0, "left_s": 0.9, "waiting_count": 1, "retry_after_s": 0.1}
    scheduler.submit(Request("d", deadline=2.1), 1.0, "kind")
    # Weights that are to be read count, and what others cost that nobody has seen does not.
    with pytest.raises(DeadlineUnreachable):
        scheduler.submit(Request("e", deadline=3.0), 1.0, "kind", load_s=1.0)
    scheduler.submit(Request("f", deadline=1.1), 1.0, "another kind")
    scheduler.check_invariants()


def test_nobody_is_told_how_much_others_wait_for() -> None:
    one, other = tenants("one", "other")
    scheduler: Scheduler[Request] = Scheduler(1, quotas(one, other))
    for tenant in (one, other):
        scheduler.submit(request := Request("first", tenant=tenant), 0.0, tenant.name)
        scheduler.charge(taken(scheduler), 1.0)
        scheduler.leave(request, 1.0)
    scheduler.submit(Request("a", 1e9, one), 1.0, "one")
    assert (scheduler.waiting_count(one), scheduler.waiting_count(other), len(scheduler)) == (1, 0, 1)
    with pytest.raises(DeadlineUnreachable, match="0 requests of the same tenant wait") as refused:
        scheduler.submit(Request("b", 1.5, other), 1.0, "other")
    assert refused.value.details["waiting_count"] == 0
    scheduler.submit(Request("b", 1e9, other), 1.0, "other")
    with pytest.raises(QueueFull) as full:
        scheduler.submit(Request("c", 1e9, other), 1.0, "other")
    assert full.value.details["waiting_count"] == 1


def test_what_the_parts_of_a_request_are_charged_is_its_cost() -> None:
    scheduler: Scheduler[Request] = Scheduler(9)
    for _ in range(2):
        whole = Request("whole")
        scheduler.submit(whole, 0.0, "kind")
        taken(scheduler)
        for seconds in (0.25, 0.5):
            part = Request("part")
            scheduler.follow(part, whole)
            assert taken(scheduler) is part
            scheduler.charge(part, seconds)
            scheduler.check_invariants()
            scheduler.leave(part, seconds)
        scheduler.leave(whole, 0.75)
    assert scheduler.forecast.cost_s("kind") == 0.75
    assert scheduler.loads()["anyone"].device_s == 1.5
    with pytest.raises(DeadlineUnreachable, match="about 0.750 s"):
        scheduler.submit(Request("late", 0.7), 0.0, "kind")
    # Of one whose caller left nothing is learned, and what its part takes still is on nobody's books.
    scheduler.submit(whole := Request("whole"), 0.0, "kind")
    taken(scheduler)
    scheduler.follow(part := Request("part"), whole)
    scheduler.leave(whole)
    scheduler.charge(taken(scheduler), 9.0)
    scheduler.check_invariants()
    scheduler.leave(part)
    assert scheduler.forecast.cost_s("kind") == 0.75


def test_a_part_of_a_call_came_when_the_call_did() -> None:
    scheduler: Scheduler[Request] = Scheduler(9)
    scheduler.submit(whole := Request("whole"), 3.0)
    assert list(scheduler.waiting()) == [whole]
    taken(scheduler)
    scheduler.follow(part := Request("part"), whole)
    assert (scheduler.came_s(whole), scheduler.came_s(part)) == (3.0, 3.0)
    assert list(scheduler.waiting()) == [part]
    scheduler.leave(whole)
    assert scheduler.came_s(part) is None
    assert scheduler.came_s(Request("nobody's")) is None


def test_what_others_have_to_get_first_counts_as_far_as_they_get_it() -> None:
    light, heavy, high = (*tenants("light", "heavy"), Tenant(name="high", domain="high", priority=9))
    scheduler: Scheduler[Request] = Scheduler(99, quotas(light, heavy, high))
    for tenant in (light, heavy, high):
        scheduler.submit(request := Request("first", tenant=tenant), 0.0, tenant.name)
        scheduler.charge(taken(scheduler), 1.0)
        scheduler.leave(request, 1.0)
    for _ in range(20):
        scheduler.submit(Request("flood", 1e9, heavy), 1.0, "heavy")
    # The light one has saved up two quanta, and one is what they may differ by: so the heavy one gets a second less one of them.
    assert scheduler.loads()["light"].wait_s == 0.0
    with pytest.raises(DeadlineUnreachable) as refused:
        scheduler.submit(Request("a", 1.5, light), 1.0, "light")
    assert refused.value.details["predicted_s"] == pytest.approx(1.95)
    # All that a higher priority wants.
    for _ in range(3):
        scheduler.submit(Request("urgent", 1e9, high), 1.0, "high")
    with pytest.raises(DeadlineUnreachable) as refused:
        scheduler.submit(Request("a", 1.5, light), 1.0, "light")
    assert refused.value.details["predicted_s"] == pytest.approx(4.95)


def test_other_quotas_hold_for_what_comes_and_what_is_under_way_ends() -> None:
    one, other = tenants("one", "other")
    scheduler: Scheduler[Request] = Scheduler(9, quotas(one, other))
    running = Request("a", tenant=one)
    scheduler.submit(running, 0.0)
    taken(scheduler)
    scheduler.submit(Request("b", tenant=one), 0.0)
    scheduler.use(quotas(other))
    scheduler.submit(Request("c", tenant=other), 0.0)
    scheduler.check_invariants()
    assert set(scheduler.loads()) == {"one", "other"}
    scheduler.leave(running, 1.0)
    for _ in range(2):
        scheduler.leave(taken(scheduler), 1.0)
    scheduler.check_invariants()
    assert set(scheduler.loads()) == {"other"}
    # Nor is anything kept of one that has nothing under way when it goes.
    scheduler.use(quotas(one))
    assert not scheduler._tenancies


def test_what_is_said_follows_what_happens() -> None:
    forecast = Forecast()
    assert forecast.cost_s("kind") is None
    for seconds in (1.0, 2.0):
        forecast.learn("kind", seconds)
    assert forecast.cost_s("kind") == pytest.approx(1.2)


def test_what_is_said_is_raised_by_how_wrong_such_predictions_were() -> None:
    forecast = Forecast()
    assert forecast.raised_s(1.0) == 1.0
    for number in range(256):
        forecast.compare(1.0, 1.0, 1.5 if number % 100 == 7 else 0.9)
    # The worst but one; and nothing of what takes much less, or much longer.
    forecast.compare(1.0, 1.0, 100.0)
    assert forecast.raised_s(1.2) == pytest.approx(1.8)
    assert forecast.raised_s(0.2) == 0.2
    assert forecast.raised_s(4.0) == 4.0
    for _ in range(256):
        forecast.compare(1.0, 1.0, 0.9)
    assert forecast.raised_s(1.0) == 1.0
    for _ in range(256):
        forecast.compare(1.0, 1.0, 100.0)
    assert forecast.raised_s(1.0) == 8.0
    assert forecast.raised_s(0.0) == 0.0


def served(scheduler: Scheduler[Request], now: float, cost_s: float, *, deadline_s: float, took_s: float | None = None) -> bool:
    """Have a request run by itself; return False when it was refused."""
    request = Request("a", now + deadline_s)
    try:
        scheduler.submit(request, now, "kind")
    except DeadlineUnreachable:
        return False
    scheduler.charge(taken(scheduler, now), cost_s)
    scheduler.leave(request, now + (took_s or cost_s))
    return True


def test_a_host_that_stood_still_once_is_not_held_against_what_comes() -> None:
    scheduler: Scheduler[Request] = Scheduler(9)
    for number in range(10):
        assert served(scheduler, number, 0.02, deadline_s=30.0)
    assert served(scheduler, 20.0, 600.0, deadline_s=30.0)
    assert all(served(scheduler, 700.0 + number, 0.02, deadline_s=1.0) for number in range(10))


def test_a_first_run_that_took_long_does_not_keep_its_kind_out_for_ever() -> None:
    scheduler: Scheduler[Request] = Scheduler(9)
    assert served(scheduler, 0.0, 5.0, deadline_s=30.0)
    outcomes = [served(scheduler, 10.0 + number, 0.02, deadline_s=1.0) for number in range(20)]
    assert outcomes == [False] * 7 + [True] * 13


def test_what_held_up_two_requests_is_not_held_against_one_that_has_the_device_for_itself() -> None:
    scheduler: Scheduler[Request] = Scheduler(9)
    for number in range(256):
        assert served(scheduler, number, 0.02, deadline_s=30.0, took_s=0.3 if number in (3, 5) else None)
    assert served(scheduler, 300.0, 0.02, deadline_s=0.1)
    # But behind another it is.
    scheduler.submit(Request("before", 400.0), 300.0, "another kind")
    assert not served(scheduler, 300.0, 0.02, deadline_s=0.1)


def test_weights_that_several_requests_wait_for_are_read_once() -> None:
    scheduler: Scheduler[Request] = Scheduler(64)
    assert served(scheduler, 0.0, 0.02, deadline_s=30.0)
    for number in range(40):
        scheduler.submit(Request(str(number), 30.0), 0.0, "kind", 2.0, "model")
    assert scheduler.loads()["anyone"].wait_s == pytest.approx(2.0 + 40 * 0.02)
    scheduler.submit(Request("other", 30.0), 0.0, "kind", 3.0, "another model")
    assert scheduler.loads()["anyone"].wait_s == pytest.approx(5.0 + 41 * 0.02)


def test_predictions_are_raised_by_how_late_ones_own_requests_were() -> None:
    forecast = Forecast()
    for _ in range(256):
        forecast.compare(1.0, 1.0, 100.0, "low")
        forecast.compare(1.0, 1.0, 1.0, "high")
    assert forecast.raised_s(1.0, "low") == 8.0
    assert forecast.raised_s(1.0, "high") == 1.0


def test_percentiles_of_what_was_said_and_what_came() -> None:
    forecast = Forecast()
    assert forecast.percentiles(0.99) == (0.0, 0.0)
    for number in range(1500):
        forecast.compare(1.0, number + 1.0, 2.0 * (number + 1))
    # Of the latest 1000.
    assert forecast.percentiles(0.5) == (1001.0, 2002.0)
    assert forecast.percentiles(0.99) == (1491.0, 2982.0)
    assert forecast.percentiles(1.0) == (1500.0, 3000.0)


def test_kinds_that_are_remembered_are_bounded() -> None:
    forecast = Forecast()
    for number in range(5000):
        forecast.learn(number, 1.0)
    assert forecast.cost_s(4999) == 1.0
    assert sum(forecast.cost_s(number) is not None for number in range(5000)) < 4097


def test_what_is_said_is_spread_as_what_came_of_what_was_reckoned() -> None:
    forecast = Forecast()
    assert forecast.likely_s(1.2) == 1.2
    for number in range(2000):
        said_s = forecast.likely_s(1.2)
        # Most take half as long as reckoned, some three times.
        forecast.compare(1.2, said_s, 1.2 * (3.0 if number % 40 == 7 else 0.5))
    assert forecast.percentiles(0.9) == pytest.approx((0.6, 0.6))
    assert forecast.percentiles(0.985) == pytest.approx((3.6, 3.6))
    # It is another matter what takes four times as long, and what somebody else is told.
    assert forecast.likely_s(4.0) == 4.0
    assert forecast.likely_s(1.2, "other") == 1.2
    # One that was held up for minutes is no measure.
    forecast = Forecast()
    forecast.compare(1.0, 1.0, 1000.0)
    assert forecast.likely_s(1.0) == 8.0
