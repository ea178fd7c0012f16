"""Turns: which groups may run along with another's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from sidecar.scheduler import Scheduler
from sidecar.shares import QUANTUM_S
from sidecar.tenants import Tenant
from sidecar.turns import Turns
from sidecar.wavefront import Group, Ticket, _Row


@dataclass(eq=False)
class Request:
    tenant: Tenant
    deadline: float = 10.0
    input_bytes: int = 0


@dataclass(eq=False)
class Call:
    work: Any


def group_of(request: Request) -> Group[Any]:
    ticket = Ticket(Call(request), (), (), {}, 1, {})
    return Group(0, [_Row([ticket], 1)], {})


@pytest.mark.parametrize(
    ("domain", "served_s", "comes"),
    [("a", 0.0, True), ("a", QUANTUM_S, True), ("a", 1.1 * QUANTUM_S, False), ("b", 0.0, False)],
)
def test_who_has_had_as_much_comes_along_within_a_domain(domain: str, served_s: float, comes: bool) -> None:
    one, other = Request(Tenant(name="one", domain="a")), Request(Tenant(name="other", domain=domain))
    scheduler: Scheduler[Any] = Scheduler(8)
    for request in (one, other):
        scheduler.submit(request, 0.0)
    scheduler.charge(other, served_s)
    assert Turns[Call](scheduler, 4).comes_along(group_of(one), group_of(other)) is comes


def test_a_tenant_s_own_groups_come_along() -> None:
    one = Request(Tenant(name="one", domain="a"))
    scheduler: Scheduler[Any] = Scheduler(8)
    scheduler.submit(one, 0.0)
    assert Turns[Call](scheduler, 4).comes_along(group_of(one), group_of(one))
