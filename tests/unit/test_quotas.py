"""The quota file: what it says, and what is refused, with line and key."""

from __future__ import annotations

import math
import os
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sidecar import session
from sidecar.errors import ConfigError
from sidecar.quotas import _KEYS, FILE_LIMIT_BYTES, SMALLEST_CONNECTION_BYTES, line_of, parse_quotas, read_quotas
from sidecar.tenants import Quotas, Tenant, hash_of

PAGE = Path(__file__).parents[2] / "docs" / "tenancy.md"
HASH, OTHER, THIRD = (hash_of(bytes([number])) for number in range(3))
FULL = f"""\
# Box 7
[tenants.vision]
tokens = ["sha256:{HASH}"]
models = ["resnet-*", "embed"]

[tenants.trial]
tokens = [
  "sha256:{OTHER}",  # since May
  'sha256:{THIRD}',
]
models = []
domain = "base"
weight = 2
priority = 0
compute_once = false
in_flight = 4
queued = "8MB"
connections = 8
arena = "1MiB"
resident = 500_000_000
"""


def test_what_is_said_is_read_and_what_is_not_has_no_limit() -> None:
    quotas = parse_quotas(FULL, "quotas.toml")
    assert quotas.tenants == {
        "vision": Tenant(name="vision", domain="vision", token_hashes=(HASH,), models=("resnet-*", "embed")),
        "trial": Tenant(
            name="trial",
            domain="base",
            token_hashes=(OTHER, THIRD),
            models=(),
            weight=2.0,
            priority=0,
            compute_once=False,
            in_flight_limit=4,
            queued_limit_bytes=8_000_000,
            connection_limit=8,
            arena_limit_bytes=2**20,
            resident_limit_bytes=500_000_000,
        ),
    }
    assert quotas.tenants["vision"].connection_limit == math.inf


def test_models_are_public_only_where_an_operator_says_so() -> None:
    assert parse_quotas(FULL, "quotas.toml").public == ()
    assert parse_quotas(FULL + '[domains]\npublic = ["resnet*", "embed"]\n', "quotas.toml").public == ("resnet*", "embed")
    assert parse_quotas("[domains]\n", "quotas.toml").public == ()


def test_a_file_without_tenants_lets_nobody_in() -> None:
    assert parse_quotas("", "q") == Quotas({})
    assert parse_quotas("[tenants]", "q").holder("") is None


def test_an_arena_has_room_for_one_connection() -> None:
    assert SMALLEST_CONNECTION_BYTES == 3 * session._SMALLEST_ARENA_BYTES


def of(line: str) -> str:
    """Return a file whose line 4 is ``line``."""
    return f'[tenants.a]\nmodels = ["m"]\n# now\n{line}\n\n[tenants.b]\nmodels = []\n'


@pytest.mark.parametrize(
    ("text", "line", "key", "problem"),
    [
        (of("wieght = 2"), 4, "wieght", "tenants.a.wieght is no key of a tenant; the keys are tokens, models, domain, weight"),
        (of("weight = 0"), 4, "weight", "must be a number from 0.001 to 1000, is 0"),
        (of("weight = -1.5"), 4, "weight", "is -1.5"),
        (of("weight = nan"), 4, "weight", "is nan"),
        (of("weight = inf"), 4, "weight", "is inf"),
        (of('weight = "2"'), 4, "weight", "is '2'"),
        (of("weight = true"), 4, "weight", "is True"),
        (of(f"weight = 0x{'f' * 5000}"), 4, "weight", "is far too large"),
        (of("priority = 10"), 4, "priority", "must be an integer from 0 to 9, is 10"),
        (of("priority = 5.0"), 4, "priority", "is 5.0"),
        (of("compute_once = 1"), 4, "compute_once", "must be true or false, is 1"),
        (of("in_flight = 0"), 4, "in_flight", "must be an integer from 1 to 1000000, is 0"),
        (of("in_flight = true"), 4, "in_flight", "is True"),
        (of("connections = [1]"), 4, "connections", "is a list"),
        (of("connections.most = 1"), 4, "connections", "is a table"),
        (of("connections = 1979-05-27"), 4, "connections", "is datetime.date"),
        (of('queued = "lots"'), 4, "queued", "must be a size from 1 bytes to 1125899906842624, such as"),
        (of("queued = 0"), 4, "queued", "is 0"),
        (of("queued = 1.5"), 4, "queued", "is 1.5"),
        (of("queued = -1"), 4, "queued", "is -1"),
        (of("queued = true"), 4, "queued", "is True"),
        (of('arena = "191KiB"'), 4, "arena", "a size from 196608 bytes"),
        (of('resident = "9999TiB"'), 4, "resident", "is '9999TiB'"),
        (of('domain = ""'), 4, "domain", "must be a name: up to 63 of"),
        (of('domain = "a@b"'), 4, "domain", "must be a name"),
        (of("domain = 7"), 4, "domain", "must be a name"),
        (of("tokens = 'sha256:0'"), 4, "tokens", "must be a list of at most 2 different texts"),
        (of("tokens = ['secret']"), 4, "tokens", "must be a list of at most 2 different texts"),
        (of(f"tokens = ['{HASH}']"), 4, "tokens", "must be a list"),
        (of(f"tokens = ['sha256:{HASH.upper()}']"), 4, "tokens", "lower-case"),
        (of(f"tokens = ['sha256:{HASH}', 'sha256:{HASH}']"), 4, "tokens", "different"),
        (of(f"tokens = ['sha256:{HASH}', 'sha256:{OTHER}', 'sha256:{THIRD}']"), 4, "tokens", "at most 2"),
        (of("tokens = [1]"), 4, "tokens", "must be a list"),
        (of("tokens = [\n'sha256:0',\n]"), 4, "tokens", "must be a list"),
        ("[tenants.a]\nmodels = 'm'\n", 2, "models", 'such as ["embed", "resnet-*"]'),
        ("[tenants.a]\nmodels = ['A']\n", 2, "models", "must be a list of different names or patterns"),
        ("[tenants.a]\nmodels = ['m@b']\n", 2, "models", "must be a list"),
        ("[tenants.a]\nmodels = ['m', 'm']\n", 2, "models", "different"),
        ("[tenants.a]\nmodels = [['m']]\n", 2, "models", "must be a list"),
        ("\n\n[tenants.a]\nweight = 1\n", 3, "models", "tenants.a has no key models"),
        ("\n[tenants.'A b']\nmodels = []\n", 2, "A b", "tenants.'A b' is no name of a tenant"),
        ("[tenants.anyone]\nmodels = []\n", 1, "anyone", "is who asks where there is no quota file"),
        ("[tenants]\na = 1\n", 2, "a", "tenants.a must be a table"),
        ("[[tenants]]\na = 1\n", 1, "tenants", "must have a table for each tenant"),
        ("\ntenants = 3", 2, "tenants", "must have a table for each tenant"),
        ("version = 1\n", 1, "version", "version is no key of a quota file"),
        ("[tenants.a]\nmodels = []\nuid = -1\n", 3, "uid", "tenants.a.uid must be an integer from 0 to 4294967294, is -1"),
        ("[tenants.a]\nmodels = []\ngid = 'root'\n", 3, "gid", "must be an integer"),
        ("[tenants.a]\nmodels = []\nsocket = 1\n", 3, "socket", "must be true or false"),
        ("[tenants.a]\nmodels = []\nsocket_gid = 7\n", 3, "socket_gid", "which it has with socket = true"),
        ("domains = 1\n", 1, "domains", "domains must be a table"),
        ("[domains]\nprivate = []\n", 2, "private", "domains.private is no key of [domains]"),
        ("[domains]\npublic = 'm'\n", 2, "public", "domains.public must be a list of different names"),
        ("[tenant.a]\nmodels = []\n", 1, "tenant", "tenant is no key of a quota file"),
        (
            f"[tenants.a]\nmodels = []\ntokens = ['sha256:{HASH}']\n[tenants.b]\nmodels = []\ntokens = [\n'sha256:{HASH}']",
            6,
            "tokens",
            "tenants.b.tokens has a token that is a's already",
        ),
    ],
)
def test_a_mistake_is_named_with_line_and_key(text: str, line: int, key: str, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_quotas(text, "quotas.toml")
    assert refused.value.message.startswith(f"quotas.toml, line {line}: ")
    assert problem in refused.value.message
    assert refused.value.details == {"line": line, "key": key}


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("[tenants.a", 1, "[tenants.a"),
        (of("weight = "), 4, "weight"),
        (of("weight = 1\nweight = 2"), 5, "weight"),
        ("[tenants.a]\nmodels = []\nmodels = []", 3, "models"),
        (of("models = [\n'm',\n\n# and"), 4, "models"),
        ("\n\n# models\nmodels = [\n'm',\n", 4, "models"),
        (of(f"weight = {'9' * 5000}"), 4, "weight"),
        (of(f"weight = {'[' * 5000}"), 4, "weight"),
        (of("[tenants.a]"), 4, "[tenants.a]"),
        (of("my-secret-token"), 4, ""),
        (of("domain = 'my-secret-token"), 4, "domain"),
        ("\0", 1, ""),
    ],
)
def test_what_is_not_toml_is_told_as_such(text: str, line: int, key: str) -> None:
    with pytest.raises(ConfigError, match="is not TOML: ") as refused:
        parse_quotas(text, "q")
    assert refused.value.message.startswith(f"q, line {line}: {key}")
    assert refused.value.details == {"line": line, "key": key}
    assert "secret" not in refused.value.message


def test_a_token_that_stands_there_by_mistake_is_not_repeated() -> None:
    with pytest.raises(ConfigError) as refused:
        parse_quotas(of("tokens = ['my-secret-token']"), "q")
    assert "my-secret" not in str(refused.value.to_dict())


LAYOUTS = [
    "[tenants.a]\nmodels = []\n\nweight = 1",
    "[tenants]\n\n[tenants.'a']\n'weight' = 1\n",
    'tenants.a.models = []\ntenants . a . "weight" = 1',
    "[tenants]\nb = { models = [] }\na = { models = [], weight = 1 }\n",
    "tenants = { a = { weight = 1 } }",
    "[tenants.a]\r\nmodels = [\r\n 'weight = 1',\r\n]\r\n# weight = 1\r\nweight = 1 # two\r\n",
    '[tenants.b]\nmodels = """\nweight = 1\n[tenants.a]\nweight = 1\n"""\n[tenants.a]\nweight = 1',
    "[tenants.a.weight]\nx = 1",
    "[tenants.a]\nmodels = [\n\n\n\n\n\n\n\n]\nweight = [\n1,\n2,\n]\n[tenants.c]\nx = 1\n",
]


@pytest.mark.parametrize("text", LAYOUTS)
@pytest.mark.parametrize("before", [0, 1, 7])
def test_a_line_is_found_however_the_file_is_laid_out(text: str, before: int) -> None:
    text = "# x\n" * before + text
    # The naive way: the first line after which the file, cut there, has the value; its statement may have begun before.
    expected = 0
    for count in range(1, text.count("\n") + 2):
        try:
            read = tomllib.loads("\n".join(text.split("\n")[:count]) + "\n")
        except tomllib.TOMLDecodeError:
            continue
        if "weight" in read.get("tenants", {}).get("a", {}):
            break
        expected = count
    assert line_of(text, ("tenants", "a", "weight")) == expected + 1


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_whatever_stands_there_is_read_or_refused(data: st.DataObject) -> None:
    """A file with a mistake anywhere gives tenants within their bounds or a ConfigError, and nothing else."""
    lines = FULL.splitlines()
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["drop", "twice", "cut", "value", "insert"])):
            case "drop":
                del lines[number]
            case "twice":
                lines.insert(data.draw(st.integers(0, len(lines))), lines[number])
            case "cut":
                lines[number] = lines[number][: data.draw(st.integers(0, len(lines[number])))]
            case "value":
                values = ["-1", "0", "nan", "-inf", "1e400", "true", '""', "[]", "[[]]", "{}", "'\\u0000'", "07:32:00", '"9TB"']
                key = data.draw(st.sampled_from(list(_KEYS)))
                lines[number] = f"{key} = {data.draw(st.sampled_from(values))}"
            case "insert":
                lines.insert(number, data.draw(st.text(max_size=12)))
        if not lines:
            break
    try:
        quotas = parse_quotas("\n".join(lines), "q")
    except ConfigError as error:
        assert error.message.startswith("q, line ")
        assert 1 <= int(error.details["line"]) <= len(lines) + 12
        assert len(error.message) < 1000
        return
    hashes = [each for tenant in quotas.tenants.values() for each in tenant.token_hashes]
    assert len(set(hashes)) == len(hashes)
    for name, tenant in quotas.tenants.items():
        assert tenant.name == name
        assert tenant.domain
        assert 0.001 <= tenant.weight <= 1000
        assert 0 <= tenant.priority <= 9
        assert tenant.in_flight_limit >= 1
        assert tenant.queued_limit_bytes >= 1
        assert tenant.connection_limit >= 1
        assert tenant.arena_limit_bytes >= SMALLEST_CONNECTION_BYTES
        assert tenant.resident_limit_bytes >= 1


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "quotas.toml"
    path.write_text(FULL)
    assert read_quotas(path) == parse_quotas(FULL, "quotas.toml")


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (lambda path: None, r"quotas.toml cannot be read \(No such file"),
        (lambda path: path.mkdir(), "cannot be read|is no file"),
        (os.mkfifo, "is no file"),
        (lambda path: (path.write_text(""), path.chmod(0o646)), "may be written to by everybody; .* chmod o-w"),
        (lambda path: path.write_bytes(b"#" * (FILE_LIMIT_BYTES + 1)), f"longer than {FILE_LIMIT_BYTES} bytes"),
        (lambda path: path.write_bytes(b"# \xff"), "is not UTF-8 at byte 2"),
    ],
)
def test_a_file_that_cannot_be_trusted_is_refused(tmp_path: Path, make: object, problem: str) -> None:
    path = tmp_path / "quotas.toml"
    make(path)  # type: ignore[operator]
    with pytest.raises(ConfigError, match=problem) as refused:
        read_quotas(path)
    # The admin endpoint shows it, too.
    assert str(tmp_path) not in refused.value.message


def test_the_example_of_the_page_is_one() -> None:
    """Every key is in it, and it is what the commands above it make, but for what it says of tokens."""
    text = PAGE.read_text().split("```toml\n")[1].split("```")[0]
    for number, short in enumerate(("6b4c…", "90d2…", "f00b…", "17aa…")):
        text = text.replace(short, hash_of(bytes([number])))
    quotas = parse_quotas(text, "quotas.toml")
    assert list(quotas.tenants) == ["vision", "search", "trial"]
    assert quotas.tenants["search"].domain == "base"
    assert quotas.tenants["trial"].arena_limit_bytes == 64_000_000
    trial = quotas.tenants["trial"]
    assert (trial.uid, trial.gid, trial.socket, trial.socket_gid) == (10007, 10007, True, 10007)
    assert {key for key in _KEYS if f"\n{key} = " in text} == set(_KEYS)
