"""What an operator says of tenants, as plain data."""

from __future__ import annotations

import pytest

from sidecar.tenants import ANYONE, Quotas, Tenant, qualified, unqualified


def test_a_tenant_may_use_what_its_patterns_name() -> None:
    tenant = Tenant(name="vision", domain="vision", models=("resnet-*", "embed"))
    assert [tenant.allows(name) for name in ("resnet-18", "embed", "embed-2", "Embed", "")] == [True, True, False, False, False]
    assert not Tenant(name="new", domain="new").allows("embed")
    assert ANYONE.allows("anything")


@pytest.mark.parametrize(
    ("models", "domain", "expected"),
    [("embed", "", "embed"), ("embed", "vision", "embed@vision"), ("age+gender", "vision", "age@vision+gender@vision")],
)
def test_models_have_a_name_of_their_own_in_each_domain(models: str, domain: str, expected: str) -> None:
    assert qualified(models, domain) == expected
    assert unqualified(expected.split("+")[0]) == (models.split("+")[0], domain)


def test_a_domain_has_the_models_of_all_its_tenants() -> None:
    tenants = [
        Tenant(name="a", domain="shared", models=("embed", "age")),
        Tenant(name="b", domain="shared", models=("gender", "age")),
        Tenant(name="c", domain="c", models=("*",)),
    ]
    quotas = Quotas({tenant.name: tenant for tenant in tenants})
    assert quotas.domains() == {"shared": ("embed", "age", "gender"), "c": ("*",)}
    assert Quotas().domains() == {"": ("*",)}
