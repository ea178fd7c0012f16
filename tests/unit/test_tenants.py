"""What an operator says of tenants, as plain data."""

from __future__ import annotations

import hmac
import json

import pytest

from sidecar.tenants import (
    ANYONE,
    DEPLOYED_NAME,
    Quotas,
    Tenant,
    as_asked,
    as_known_to,
    hash_of,
    qualified,
    unqualified,
)


def test_a_tenant_may_use_what_its_patterns_name() -> None:
    tenant = Tenant(name="vision", domain="vision", models=("resnet-*", "embed"))
    assert [tenant.allows(name) for name in ("resnet-18", "embed", "embed-2", "Embed", "")] == [True, True, False, False, False]
    assert not Tenant(name="new", domain="new").allows("embed")
    assert ANYONE.allows("anything")
    # Of each of them, all versions; and what only looks like one is not taken for one.
    assert [tenant.allows(name) for name in ("embed:2", "resnet-18:v1.0", "other:2", "embed:", "embed:a:b", "embed:2@x")] == [
        *(True, True, False, False, False, False)
    ]


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
        ("embed:2", True),
        ("embed:2.0-RC@vision", True),
        ("embed:@vision", False),
        ("embed:2+3", False),
        ("embed:../etc", False),
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


def test_messages_name_models_as_their_readers_do() -> None:
    assert as_known_to("vision", "age@vision takes x; age@vision+gender@vision do not") == "age takes x; age+gender do not"
    assert as_known_to("", "age@vision takes x") == "age@vision takes x"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("age@red2 and age@red", "age@red2 and age"),
        ("age@red-2, age@red--2, age@red-", "age@red-2, age@red--2, age-"),
        ("age@infrared, 'age@red'.", "age@infrared, 'age'."),
        ("red@red is red@red2", "red is red@red2"),
        # Somebody asked for "age@red", and for models without a name.
        ("age@red@red, age@red2@red, @red, age@@red", "age@red, age@red2, , age@"),
    ],
)
def test_names_that_only_look_like_those_of_a_domain_stay_as_they_are(text: str, expected: str) -> None:
    assert as_known_to("red", text) == expected


def test_a_token_is_compared_with_all_there_are_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither which tenant it is, nor whether there is one, can be told by what is done."""
    hashes = {name: hash_of(name.encode()) for name in ("old", "new", "other", "last")}
    quotas = Quotas(
        {
            "a": Tenant(name="a", domain="a", token_hashes=(hashes["old"], hashes["new"])),
            "b": Tenant(name="b", domain="b", token_hashes=(hashes["other"],)),
            "c": Tenant(name="c", domain="c", token_hashes=(hashes["last"],)),
        }
    )
    compared: list[tuple[str, str]] = []
    compare = hmac.compare_digest

    def counting(one: str, other: str) -> bool:
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr("sidecar.tenants.hmac.compare_digest", counting)
    for token, expected in {b"old": "a", b"new": "a", b"other": "b", b"last": "c", b"guess": None}.items():
        compared.clear()
        found = quotas.holder(hash_of(token))
        assert (found and found.name) == expected
        assert compared == [(known, hash_of(token)) for known in hashes.values()]
    assert quotas.holder("") is None


def test_nobody_needs_a_token_where_there_is_no_quota_file() -> None:
    assert Quotas().holder("") is ANYONE
    assert Quotas().holder(hash_of(b"guess")) is None
    assert Quotas({}).holder("") is None


def test_what_an_operator_sees_of_a_tenant_is_json_and_has_no_hash() -> None:
    token_hash = hash_of(b"secret")
    tenant = Tenant(name="a", domain="d", token_hashes=(token_hash,), models=("m-*",), weight=2.0, connection_limit=3)
    plain = json.loads(json.dumps(tenant.to_plain(), allow_nan=False))
    assert token_hash not in str(plain)
    assert plain == {
        "name": "a",
        "domain": "d",
        "models": ["m-*"],
        "token_count": 1,
        "weight": 2.0,
        "priority": 5,
        "compute_once": True,
        "uid": None,
        "gid": None,
        "socket": False,
        "socket_gid": None,
        "in_flight_limit": None,
        "queued_limit_bytes": None,
        "connection_limit": 3,
        "arena_limit_bytes": None,
        "resident_limit_bytes": None,
    }
