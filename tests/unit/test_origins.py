"""Origins: written in one way only, compared exactly, and leading nowhere that the operator has not listed."""

from __future__ import annotations

from ipaddress import ip_network

import pytest
from trunkline.errors import InvalidInput

from sidecar.config import load_settings
from sidecar.errors import ConfigError, OriginRefused
from sidecar.origins import Policy, may_lead_to, parse_origin, parse_reference

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("https://models.example", "https://models.example"),
        ("HTTPS://Models.Example:443/a/b/", "https://models.example/a/b"),
        ("https://models.example:8443/a", "https://models.example:8443/a"),
        ("http://models.example:80", "http://models.example"),
        ("http://10.0.0.1:8000/x", "http://10.0.0.1:8000/x"),
        ("http://[2001:DB8::0:1]:8000", "http://[2001:db8::1]:8000"),
        ("file:///srv/models/", "file:///srv/models"),
        ("s3://bucket/models", "s3://bucket/models"),
        ("gs://my.bucket", "gs://my.bucket"),
        ("oci://Bucket@namespace/a", "oci://Bucket@namespace/a"),
    ],
)
def test_an_origin_is_written_in_one_way(text: str, url: str) -> None:
    assert parse_origin(text).url == url
    assert parse_origin(url) == parse_origin(text)


@pytest.mark.row("T23")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "models.example",
        "gopher://models.example/x",
        "ftp://models.example",
        "data://x",
        "javascript://x",
        "file://host/srv",
        "file://",
        "file:///srv/../etc",
        "file:///srv//models",
        "https://",
        "https://user@models.example",
        "https://user:password@models.example",
        "https://models.example@evil.example",
        "https://models.example\\@evil.example",
        "https://models.example#@evil.example",
        "https://models.example?x=1",
        "https://models.example/a?x",
        "https://models.example/a#x",
        "https://models.example/%2e%2e",
        "https://models.example/a/../b",
        "https://models.example/./a",
        "https://models.example//a",
        "https://models.example.",
        "https://models.example./a",
        "https://.models.example",
        "https://models..example",
        "https://-models.example",
        "https://models.example:0",
        "https://models.example:65536",
        "https://models.example:",
        "https://models.example:80:80",
        "https://models.example /a",
        "https://models.example\n/a",
        "https://mödels.example",
        "http://2852039166",
        "http://0xa9fea9fe",
        "http://0xa9.0xfe.0xa9.0xfe",
        "http://0251.0376.0251.0376",
        "http://169.254.43518",
        "http://127.1",
        "http://1.2.3.4.5",
        "http://256.0.0.1",
        "http://[::ffff:169.254.169.254]",
        "http://[::1",
        "http://[fe80::1%25eth0]",
        "http://[nonsense]",
        "s3://",
        "s3://user:password@bucket",
        "s3://-bucket",
        "https://" + "a" * 64 + ".example",
        "https://models.example/" + "a" * 2048,
    ],
)
def test_what_could_be_read_in_two_ways_is_no_origin(text: str) -> None:
    with pytest.raises(ValueError, match="."):
        parse_origin(text)
    with pytest.raises(InvalidInput):
        parse_reference(f"{text}/m@sha256:{DIGEST}")
    if text:
        with pytest.raises(ConfigError, match="--pull-origin"):
            load_settings({"pull_origins": (text,)}, {})


def test_a_reference_names_origin_model_and_digest() -> None:
    found = parse_reference(f"https://Models.example/team/bert-base.v2@sha256:{DIGEST}")
    assert found.origin.url == "https://models.example/team"
    assert (found.name, found.digest) == ("bert-base.v2", DIGEST)
    assert str(found) == f"https://models.example/team/bert-base.v2@sha256:{DIGEST}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "m",
        f"m@sha256:{DIGEST}",
        "https://models.example/m",
        "https://models.example/m@latest",
        f"https://models.example/m@sha256:{DIGEST[:-1]}",
        f"https://models.example/m@sha256:{DIGEST.upper()}",
        f"https://models.example/m@sha256:{DIGEST} ",
        f"https://models.example/M@sha256:{DIGEST}",
        f"https://models.example/a..b@sha256:{DIGEST}",
        f"https://models.example/@sha256:{DIGEST}",
        f"https://models.example/m@md5:{DIGEST}",
    ],
)
def test_what_does_not_pin_a_model_is_no_reference(text: str) -> None:
    with pytest.raises(InvalidInput):
        parse_reference(text)


@pytest.mark.parametrize(
    ("asked", "is_allowed"),
    [
        ("https://models.example/team", True),
        ("https://models.example/team/below", True),
        ("https://MODELS.example:443/team/", True),
        ("https://models.example/team2", False),
        ("https://models.example", False),
        ("https://models.example/other", False),
        ("http://models.example/team", False),
        ("https://models.example:8443/team", False),
        ("https://evil.models.example/team", False),
        ("https://models.example.evil.example/team", False),
        ("file:///srv/models", True),
        ("file:///srv/models-private", False),
        ("file:///srv", False),
        ("s3://bucket/a", False),
    ],
)
def test_only_what_is_listed_may_be_pulled_from(asked: str, is_allowed: bool) -> None:
    policy = Policy(origins=(parse_origin("https://models.example/team"), parse_origin("file:///srv/models")))
    if is_allowed:
        policy.check(parse_origin(asked))
    else:
        with pytest.raises(OriginRefused, match="none of the 2 origins"):
            policy.check(parse_origin(asked))


def test_without_a_list_nothing_may_be_pulled() -> None:
    with pytest.raises(OriginRefused, match="--pull-origin"):
        Policy().check(parse_origin("https://models.example"))


@pytest.mark.row("T23")
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.8.8.8",
        "0.0.0.0",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "100.64.0.1",
        "100.100.100.200",
        "169.254.169.254",
        "192.0.0.192",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "2002:a9fe:a9fe::1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::7f00:1",
        "64:ff9b:1::7f00:1",
        "::7f00:1",
        "fec0::1",
    ],
)
def test_a_name_leads_to_no_address_that_is_not_public(address: str) -> None:
    assert not may_lead_to("models.example", address, ())


@pytest.mark.parametrize("address", ["93.184.215.14", "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "64:ff9b::5db8:d70e"])
def test_public_addresses_are_what_names_lead_to(address: str) -> None:
    assert may_lead_to("models.example", address, ())


def test_an_operator_names_the_private_networks_that_origins_are_in() -> None:
    networks = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    assert may_lead_to("models.internal", "10.1.2.3", networks)
    assert may_lead_to("models.internal", "fd00::5", networks)
    assert not may_lead_to("models.internal", "192.168.1.1", networks)
    assert not may_lead_to("models.internal", "169.254.169.254", networks)


def test_localhost_is_this_machine_and_nothing_else() -> None:
    assert may_lead_to("localhost", "127.0.0.1", ())
    assert may_lead_to("localhost", "::1", ())
    assert not may_lead_to("localhost", "10.0.0.1", ())
    assert not may_lead_to("localhost.example", "127.0.0.1", ())
