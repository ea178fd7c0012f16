"""The token file: who may infer over TCP, look at a sidecar, operate it. TOML, read strictly; tokens stand there hashed.

One table for each token: ``[tokens.NAME]`` with ``role`` and ``token``. Pure; files are read and changed as quota files are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from sidecar.errors import ConfigError
from sidecar.quotaedit import without_table
from sidecar.quotas import HASH, HASHED, NAME_RULE, parsed, refuse
from sidecar.tenants import NAME, hash_of

INFER: Final = "infer"
READ: Final = "read"
OPERATE: Final = "operate"
# Each may do what those before it may.
ROLES: Final = (INFER, READ, OPERATE)
KIND: Final = "token file"
NEW_FILE: Final = "# Who may infer over TCP, look at this sidecar, operate it. `trunkline token` changes this file.\n"


class Token(NamedTuple):
    """One token: whose it is, what it lets do, and its sha256 digest in hexadecimal."""

    name: str
    role: str
    token_hash: str


def parse_tokens(text: str, file: str) -> tuple[Token, ...]:
    """Return what the text of a token file says; ``file`` is its name. Raises ConfigError with line and key."""
    read = parsed(text, file)
    for key in read:
        if key != "tokens":
            refuse(text, file, (key,), "is no key of a token file; it has one table [tokens.NAME] for each token")
    tables = read.get("tokens", {})
    if not isinstance(tables, dict):
        refuse(text, file, ("tokens",), "must have a table for each token: [tokens.NAME]")
    found: list[Token] = []
    for name, table in tables.items():
        token = _token(text, file, name, table)
        for other in found:
            if other.token_hash == token.token_hash:
                refuse(text, file, ("tokens", name, "token"), f"is {other.name}'s already; make another")
        found.append(token)
    return tuple(found)


def _token(text: str, file: str, name: str, table: Any) -> Token:
    at = ("tokens", name)
    if not NAME.fullmatch(name):
        refuse(text, file, at, f"is no name of a token; it must be {NAME_RULE}")
    if not isinstance(table, dict):
        refuse(text, file, at, f"must be a table: [tokens.{name}]")
    for key in table:
        if key not in ("role", "token"):
            refuse(text, file, (*at, key), "is no key of a token; the keys are role, token")
    for key in ("role", "token"):
        if key not in table:
            refuse(text, file, at, f"has no key {key}", key=key)
    if table["role"] not in ROLES:
        refuse(text, file, (*at, "role"), f"must be {', '.join(ROLES[:-1])} or {ROLES[-1]}")
    # What stands there may be the token itself by mistake; it is not repeated in any message.
    match = HASH.fullmatch(table["token"]) if isinstance(table["token"], str) else None
    if match is None:
        refuse(text, file, (*at, "token"), f'must be "{HASHED}" and 64 lower-case hexadecimal digits')
    return Token(name, table["role"], match[1])


def with_token(text: str, file: str, name: str, role: str, token: str) -> str:
    """Return the text with a further token. Raises ConfigError when there is one of this name."""
    if any(each.name == name for each in parse_tokens(text, file)):
        raise ConfigError(f"{file} has a token {name} already; choose another name, or remove that one first", key=name)
    changed = f'{text.rstrip()}\n\n[tokens.{name}]\nrole = "{role}"\ntoken = "{HASHED}{hash_of(token.encode())}"\n'
    parse_tokens(changed, file)
    return changed


def without_token(text: str, file: str, name: str) -> str:
    """Return the text without a token. Raises ConfigError when there is none of this name, or it is laid out otherwise."""
    tokens = parse_tokens(text, file)
    expected = tuple(each for each in tokens if each.name != name)
    if expected == tokens:
        raise ConfigError(f"{file} has no token {name}; it has {_names(tokens)}", key=name)
    changed = without_table(text, ("tokens", name))
    try:
        if parse_tokens(changed, file) == expected:
            return changed
    except ConfigError:
        pass
    raise ConfigError(f"{file} is laid out in a way that cannot be changed here; take {name} out of it by hand", key=name)


def _names(tokens: Iterable[Token]) -> str:
    return ", ".join(sorted(each.name for each in tokens)[:8]) or "none"
