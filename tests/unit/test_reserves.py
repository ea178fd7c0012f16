"""Room to compute: nobody's growth takes what another was promised, and who waits is waited for."""

from __future__ import annotations

import random

import pytest

from sidecar.reserves import Reserves
from sidecar.tenants import Tenant


def reserves(budget_bytes: int, **weights: float) -> Reserves:
    made = Reserves(budget_bytes)
    made.use(Tenant(name=name, domain=name, weight=weight) for name, weight in weights.items())
    return made


def test_one_tenant_has_all_of_it() -> None:
    alone = reserves(100, a=1.0)
    assert alone.most_bytes("a") == 100
    assert alone.fits("a", 60, {"a": 40}, waiting=True)
    assert not alone.fits("a", 61, {"a": 40}, waiting=False)


def test_half_is_reserved_by_weight_and_half_is_common() -> None:
    two = reserves(100, a=3.0, b=2.0)
    assert (two.most_bytes("a"), two.most_bytes("b")) == (80, 70)
    assert two.fits("a", 80, {}, waiting=False)
    assert not two.fits("a", 81, {}, waiting=False)
    assert two.fits("b", 20, {"a": 80}, waiting=False)
    assert not two.fits("b", 21, {"a": 80}, waiting=False)


def test_what_is_common_is_kept_for_who_waits_for_it() -> None:
    two = reserves(100, a=1.0, b=1.0)
    assert two.fits("a", 25, {}, waiting=True)
    assert not two.fits("a", 26, {}, waiting=True)


def test_who_is_not_known_has_the_common_half() -> None:
    two = reserves(100, a=1.0, b=1.0)
    assert two.most_bytes("c") == 50
    assert two.fits("c", 50, {"a": 25, "b": 25}, waiting=False)
    assert not two.fits("c", 51, {}, waiting=False)


@pytest.mark.parametrize("seed", range(50))
def test_the_budget_is_kept_and_every_reserve_can_be_had(seed: int) -> None:
    chance = random.Random(seed)
    names = "abcd"[: chance.randint(1, 4)]
    made = reserves(1000, **{name: chance.choice([1.0, 0.3, 5.0]) for name in names})
    taken: dict[str, int] = {}
    for _ in range(300):
        name, size_bytes = chance.choice(names), chance.randint(1, 400)
        if chance.random() < 0.4:
            taken[name] = 0
        elif made.fits(name, size_bytes, taken, waiting=chance.random() < 0.5):
            taken[name] = taken.get(name, 0) + size_bytes
        assert sum(taken.values()) <= 1000
        for each in names:
            own = made.most_bytes(each) - (made.budget_bytes - sum(made._reserves.values()))
            left = own - taken.get(each, 0)
            assert left < 0 or made.fits(each, left, taken, waiting=True)
