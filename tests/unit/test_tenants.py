"""What an operator says of tenants, as plain data."""

from __future__ import annotations

import pytest

from sidecar.tenants import ANYONE, DEPLOYED_NAME, Quotas, Tenant, as_asked, qualified, unqualified


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
    assert as_asked(expected) == models


@pytest.mark.parametrize("domain", ["", "audio"])
@pytest.mark.parametrize("asked", ["embed@vision", "embed@vision+other", "@vision", "embed@"])
def test_whoever_names_a_domain_names_nothing(asked: str, domain: str) -> None:
    deployed = {"embed@vision", "embed", "other", "embed@audio", "other@audio"}
    names = qualified(asked, domain).split("+")
    assert names[0] not in deployed
    assert unqualified(names[0]) == (asked.split("+")[0], domain)


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("embed", True),
        ("embed@vision", True),
        ("embed-2.1@team-7", True),
        ("embed@", False),
        ("@vision", False),
        ("embed@vision@audio", False),
        ("embed@../etc", False),
        ("embed@Vision", False),
        ("em..bed@vision", False),
        ("embed@vision\n", False),
    ],
)
def test_names_of_deployed_models(name: str, is_one: bool) -> None:
    assert bool(DEPLOYED_NAME.fullmatch(name)) is is_one


def test_a_domain_has_the_models_of_all_its_tenants() -> None:
    tenants = [
        Tenant(name="a", domain="shared", models=("embed", "age")),
        Tenant(name="b", domain="shared", models=("gender", "age")),
        Tenant(name="c", domain="c", models=("*",)),
    ]
    quotas = Quotas({tenant.name: tenant for tenant in tenants})
    assert quotas.domains() == {"shared": ("embed", "age", "gender"), "c": ("*",)}
    assert Quotas().domains() == {"": ("*",)}
