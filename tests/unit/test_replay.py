"""Traces and their replay: the bound holds for every policy, and each generated trace is what it says."""

from __future__ import annotations

import itertools

import pytest

from benchmarks.replay import fetched_at_least, replay
from benchmarks.traces import FLEETS, WORKLOADS, Trace, generated
from sidecar.policies import POLICIES

TWO = {"a": {"a": 10}, "b": {"b": 10}, "c": {"c": 10}}


def test_a_cycle_defeats_lru_and_the_bound_keeps_what_comes_soonest() -> None:
    trace = Trace("cycle", TWO, [("a",), ("b",), ("c",)] * 4)
    assert replay(trace, 20, "lru").fetched_bytes == 12 * 10
    assert replay(trace, 20, "lru").missed_requests == 12
    # Of three models two fit: after the first round, at least every other request finds its model.
    assert fetched_at_least(trace, 20) == 30 + 4 * 10


def test_the_bound_counts_what_is_shared_once() -> None:
    models = {"a": {"t": 10, "a": 1}, "b": {"t": 10, "b": 1}}
    trace = Trace("pair", models, [("a",), ("b",)] * 3)
    assert fetched_at_least(trace, 12) == 12
    assert fetched_at_least(trace, 11) == 10 + 6
    assert fetched_at_least(trace.unshared(), 11) == 6 * 11
    assert (trace.unique_bytes, trace.largest_bytes) == (12, 11)
    assert Trace("joint", models, [("a", "b")]).largest_bytes == 12


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_no_policy_fetches_less_than_the_bound(policy: str) -> None:
    for trace in generated(1, model_count=12, length=120):
        budget_bytes = max(trace.unique_bytes // 3, trace.largest_bytes)
        assert replay(trace, budget_bytes, policy).fetched_bytes >= fetched_at_least(trace, budget_bytes)


def test_traces_are_as_long_as_asked_and_the_same_for_a_seed() -> None:
    traces, again = list(generated(5, 16, 160)), list(generated(5, 16, 160))
    assert [trace.name for trace in traces] == [f"{workload}_{fleet}" for fleet in FLEETS for workload in WORKLOADS]
    for trace, other in zip(traces, again, strict=True):
        assert (trace.models, trace.asked) == (other.models, other.asked)
        assert len(trace.asked) == 160
        assert len(trace.models) == 16
        assert {model for models in trace.asked for model in models} <= trace.models.keys()


def test_siblings_share_their_trunk_and_others_nothing() -> None:
    shared = next(trace for trace in generated(0, 16, 10) if trace.name == "scan_siblings")
    names = list(shared.models)
    for one, other in itertools.pairwise(names):
        same_family = names.index(one) // 8 == names.index(other) // 8
        assert bool(shared.models[one].keys() & shared.models[other].keys()) == same_family
    private = next(trace for trace in generated(0, 16, 10) if trace.name == "scan_private")
    assert sum(sum(weights.values()) for weights in private.models.values()) == private.unique_bytes
