"""`trunkline tenant`: what it writes, what it prints, and that it never loses a token. A sidecar is a table of answers here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from trunkline.errors import InvalidInput, SidecarUnavailable

from sidecar.cli.main import main
from sidecar.quotas import read_quotas
from sidecar.tenants import Tenant, hash_of
from tests.integration.test_cli import Answers


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    made = Answers(monkeypatch)
    made.table["quotas/reload"] = {"tenant_count": 1}
    return made


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "quotas.toml"


def run(path: Path | None, *words: str, **more: Any) -> Result:
    environment = {"TRUNKLINE_QUOTA_FILE": str(path) if path else None}
    return CliRunner().invoke(main, ["--admin", "http://127.0.0.1:1", "tenant", *words], env=environment, **more)


def test_a_tenant_is_added_rotated_and_removed(answers: Answers, path: Path) -> None:
    added = run(path, "add", "vision", "--models", "resnet-*, embed", "--weight", "3")
    assert added.exit_code == 0, added.output
    first = added.stdout.strip()
    assert added.stdout == f"{first}\n"
    assert "vision: added" in added.stderr
    assert read_quotas(path).tenants == {
        "vision": Tenant(
            name="vision", domain="vision", token_hashes=(hash_of(first.encode()),), models=("resnet-*", "embed"), weight=3.0
        )
    }
    second = run(path, "rotate", "vision").stdout.strip()
    assert read_quotas(path).tenants["vision"].token_hashes == (hash_of(first.encode()), hash_of(second.encode()))
    again = run(path, "rotate", "vision")
    assert again.exit_code == 1
    assert again.stdout == ""
    ended = run(path, "rotate", "vision", "--end")
    assert ended.stdout == ""
    assert ended.stderr == "vision: only the newer token counts\n"
    assert read_quotas(path).tenants["vision"].token_hashes == (hash_of(second.encode()),)
    assert run(path, "rm", "vision").stderr == "vision: removed\n"
    assert read_quotas(path).tenants == {}
    assert answers.asked == [("POST", "quotas/reload")] * 4
    assert not {first, second} & set(path.read_text().split('"'))


def test_everything_that_can_be_said_of_a_tenant_can_be_said_here(answers: Answers, path: Path) -> None:
    words = ["--models", "m", "--domain", "base", "--priority", "1", "--no-compute-once", "--in-flight", "4", "--queued", "8MB"]
    words += ["--connections", "8", "--arena", "1MiB", "--resident", "1GB", "--weight", "0.5"]
    assert run(path, "add", "trial", *words).exit_code == 0
    tenant = read_quotas(path).tenants["trial"]
    assert (tenant.domain, tenant.priority, tenant.compute_once, tenant.weight) == ("base", 1, False, 0.5)
    assert (tenant.in_flight_limit, tenant.queued_limit_bytes, tenant.connection_limit) == (4, 8_000_000, 8)
    assert (tenant.arena_limit_bytes, tenant.resident_limit_bytes) == (2**20, 10**9)


def test_a_token_goes_into_a_file_of_its_own(answers: Answers, path: Path, tmp_path: Path) -> None:
    token = tmp_path / "token"
    added = run(path, "add", "vision", "--models", "m", "--token-file", str(token))
    assert added.exit_code == 0, added.output
    assert added.stdout == ""
    assert token.stat().st_mode & 0o777 == 0o600
    first = token.read_text().strip()
    assert first not in added.output
    assert read_quotas(path).tenants["vision"].token_hashes == (hash_of(first.encode()),)
    # What cannot be made leaves the old one where it is.
    assert run(path, "add", "vision", "--models", "m", "--token-file", str(token)).exit_code == 1
    assert token.read_text().strip() == first
    before = path.read_text()
    assert run(path, "rotate", "vision", "--token-file", str(tmp_path / "none" / "token")).exit_code == 1
    assert path.read_text() == before


def test_tenants_are_changed_in_json(answers: Answers, path: Path, tmp_path: Path) -> None:
    added = run(path, "add", "vision", "--models", "m", "--json")
    assert added.stderr == ""
    told = json.loads(added.stdout)
    assert told == {"name": "vision", "action": "add", "reloaded": True, "token": told["token"]}
    assert read_quotas(path).tenants["vision"].token_hashes == (hash_of(told["token"].encode()),)
    rotated = run(path, "rotate", "vision", "--token-file", str(tmp_path / "token"), "--json")
    assert json.loads(rotated.stdout) == {"name": "vision", "action": "rotate", "reloaded": True}
    answers.table["quotas/reload"] = SidecarUnavailable("nobody")
    assert json.loads(run(path, "rm", "vision", "--json").stdout) == {"name": "vision", "action": "rm", "reloaded": False}


def test_a_token_is_handed_out_whatever_the_sidecar_says(answers: Answers, path: Path) -> None:
    answers.table["quotas/reload"] = SidecarUnavailable("no sidecar answers at http://127.0.0.1:1")
    added = run(path, "add", "vision", "--models", "m")
    assert added.exit_code == 0
    assert len(added.stdout.strip()) == 43
    assert f"not reloaded: no sidecar answers at http://127.0.0.1:1; a sidecar reads {path} when it starts" in added.stderr
    answers.table["quotas/reload"] = InvalidInput("this sidecar has no quota file; start it with --quotas FILE")
    rotated = run(path, "rotate", "vision")
    assert rotated.exit_code == 1
    assert len(rotated.stdout.strip()) == 43
    assert "error: invalid_input: this sidecar has no quota file" in rotated.stderr


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (["add", "Vision", "--models", "m"], 2, "no name of a tenant"),
        (["add", "a/b", "--models", "m"], 2, "no name of a tenant"),
        (["add", "vision"], 2, "--models"),
        (["add", "vision", "--models", "m", "--weight", "nan"], 1, "weight must be a number from 0.001 to 1000, is nan"),
        (["add", "vision", "--models", "m", "--weight", "0"], 1, "weight must be a number"),
        (["add", "vision", "--models", ""], 1, "models must be a list"),
        (["add", "anyone", "--models", "m"], 1, "is who asks where there is no quota file"),
        (["rotate", "vision"], 1, "cannot be read"),
        (["rotate", "vision", "--end", "--token-file", "t"], 2, "--end makes no token"),
        (["rm", "vision"], 1, "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(
    answers: Answers, path: Path, words: list[str], code: int, problem: str
) -> None:
    refused = run(path, *words)
    assert refused.exit_code == code
    assert problem in refused.stderr
    assert refused.stdout == ""
    assert not path.exists()
    assert answers.asked == []


def test_the_file_must_be_named(answers: Answers) -> None:
    refused = run(None, "add", "vision", "--models", "m")
    assert refused.exit_code == 2
    assert "--quotas" in refused.stderr


def test_tenants_are_listed_as_they_are_in_force(answers: Answers) -> None:
    few = Tenant(name="few", domain="base", models=("[ab]*",), connection_limit=8, arena_limit_bytes=64_000_000).to_plain()
    many = Tenant(name="many", domain="", models=()).to_plain()
    entries = [few | {"connections": 3, "arena_bytes": 589_824}, many | {"connections": 0, "arena_bytes": 0}]
    answers.table["tenants"] = {"tenants": entries}
    assert json.loads(run(None, "ls", "--json").stdout) == entries
    rows = [line.split() for line in run(None, "ls").stdout.splitlines()]
    assert [
        *("few", "base", "[ab]*", "0", "1", "5", "any", "any", "3", "of", "8", "589.8", "kB", "of", "64.0", "MB", "any")
    ] in rows
    assert [*("many", "-", "-", "0", "1", "5", "any", "any", "0", "of", "any", "0", "B", "of", "any", "any")] in rows
