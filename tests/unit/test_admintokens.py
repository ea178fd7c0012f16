"""The token file: what it may say, and what is told of a mistake in it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sidecar.__main__ import main
from sidecar.admintokens import OPERATE, READ, Token, parse_tokens, with_token, without_token
from sidecar.errors import ConfigError
from sidecar.tenants import hash_of

HASH = hash_of(b"secret")
GOOD = f"""# Who may.
[tokens.prometheus]
role = "read"
token = "sha256:{HASH}"
"""


def test_a_file_says_who_may_do_what() -> None:
    assert parse_tokens(GOOD, "t.toml") == (Token("prometheus", READ, HASH),)
    assert parse_tokens("", "t.toml") == ()


@pytest.mark.parametrize(
    ("text", "line", "key", "problem"),
    [
        ("x = 1", 1, "x", "no key of a token file"),
        ("tokens = 1", 1, "tokens", "must have a table"),
        ("\n[token.a]\nrole = 'read'", 2, "token", "no key of a token file"),
        ("[tokens]\na = 1", 2, "a", "must be a table"),
        ("[tokens.A]\nrole = 'read'", 1, "A", "is no name of a token"),
        (GOOD.replace("role", "rolle"), 3, "rolle", "the keys are role, token"),
        (GOOD.replace('role = "read"', ""), 2, "role", "has no key role"),
        (GOOD.replace("token = ", "# "), 2, "token", "has no key token"),
        (GOOD.replace('"read"', '"admin"'), 3, "role", "must be infer, read or operate"),
        (GOOD.replace('"read"', "[]"), 3, "role", "must be infer, read or operate"),
        (GOOD.replace('"read"', "read"), 3, "role", "is not TOML"),
        (GOOD.replace("sha256:", ""), 4, "token", "64 lower-case hexadecimal digits"),
        (GOOD.replace("sha256:", "md5:"), 4, "token", "64 lower-case hexadecimal digits"),
        (f"{GOOD}[tokens.other]\nrole = 'operate'\ntoken = 'sha256:{HASH}'\n", 7, "token", "is prometheus's already"),
    ],
)
def test_a_mistake_is_told_with_line_and_key_and_without_the_value(text: str, line: int, key: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"t.toml, line {line}: ") as raised:
        parse_tokens(text, "t.toml")
    assert problem in raised.value.message
    assert raised.value.details == {"line": line, "key": key}
    assert HASH not in raised.value.message


def test_a_token_is_added_and_taken_out_and_all_else_stays() -> None:
    more = with_token(GOOD, "t.toml", "alice", OPERATE, "x")
    assert more.startswith(GOOD)
    assert parse_tokens(more, "t.toml")[1] == Token("alice", OPERATE, hash_of(b"x"))
    assert without_token(more, "t.toml", "alice").rstrip() == GOOD.rstrip()
    assert [token.name for token in parse_tokens(without_token(more, "t.toml", "prometheus"), "t.toml")] == ["alice"]
    with pytest.raises(ConfigError, match="has a token alice already"):
        with_token(more, "t.toml", "alice", READ, "y")
    with pytest.raises(ConfigError, match="has no token bob; it has alice, prometheus"):
        without_token(more, "t.toml", "bob")
    with pytest.raises(ConfigError, match="it has none"):
        without_token("", "t.toml", "bob")


def test_a_file_that_is_laid_out_otherwise_is_left_to_its_owner() -> None:
    text = f'tokens.a = {{role = "read", token = "sha256:{HASH}"}}\ntokens.b = {{role = "read", token = "sha256:{"0" * 64}"}}\n'
    assert len(parse_tokens(text, "t.toml")) == 2
    with pytest.raises(ConfigError, match="take a out of it by hand"):
        without_token(text, "t.toml", "a")


def test_the_command_makes_lists_and_removes_tokens(tmp_path: Path) -> None:
    path = tmp_path / "tokens.toml"

    def run(*words: str) -> tuple[int, str, str]:
        found = CliRunner().invoke(main, ["token", *words], env={"TRUNKLINE_ADMIN_TOKENS": str(path)})
        return found.exit_code, found.stdout, found.stderr

    def listed() -> list[list[str]]:
        return [line.split() for line in run("ls")[1].splitlines() if line.split()[1:] in (["operate"], ["read"])]

    code, made, told = run("add", "alice", "--role", "operate")
    assert code == 0
    assert told.splitlines()[0] == "alice: may operate"
    assert parse_tokens(path.read_text(), "") == (Token("alice", OPERATE, hash_of(made.strip().encode())),)
    assert made.strip() not in path.read_text()
    assert run("add", "bob", "--role", "read", "--token-file", str(tmp_path / "bob"))[:2] == (0, "")
    assert (tmp_path / "bob").stat().st_mode & 0o777 == 0o600
    assert parse_tokens(path.read_text(), "")[1].token_hash == hash_of((tmp_path / "bob").read_bytes().strip())
    assert listed() == [["alice", "operate"], ["bob", "read"]]
    assert json.loads(run("ls", "--json")[1]) == [{"name": "alice", "role": "operate"}, {"name": "bob", "role": "read"}]
    assert run("rm", "alice")[0] == 0
    assert listed() == [["bob", "read"]]
    code, _, told = run("rm", "alice")
    assert (code, told.startswith("error: config_error: ")) == (1, True)
    assert json.loads(run("rm", "bob", "--json")[1]) == {"name": "bob", "action": "rm"}
    made = json.loads(run("add", "dora", "--role", "read", "--json")[1])
    assert parse_tokens(path.read_text(), "") == (Token("dora", READ, hash_of(made.pop("token").encode())),)
    assert made == {"name": "dora", "action": "add", "role": "read"}
    written = run("add", "emil", "--role", "read", "--token-file", str(tmp_path / "emil"), "--json")
    assert json.loads(written[1]) == made | {"name": "emil"}
    # Where its token cannot be written, nothing is added.
    before = path.read_text()
    assert run("add", "finn", "--role", "read", "--token-file", str(tmp_path / "none" / "finn"))[0] == 1
    assert path.read_text() == before
    assert run("add", "Alice", "--role", "read")[0] == 2
    assert run("add", "carol", "--role", "admin")[0] == 2
    path.chmod(0o666)
    assert "the token file tokens.toml may be written to by everybody" in run("ls")[2]
