"""The quota file: what an operator says of tenants, in TOML, read strictly.

A key that does not exist, or a value out of its range, is refused with its line: a limit that is misspelt must not silently be
none. Pure, but for reading the one file.
"""

from __future__ import annotations

import functools
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from sidecar.config import parse_size
from sidecar.errors import ConfigError
from sidecar.keeping import HIGHEST_PRIORITY
from sidecar.tenants import ANYONE, MOST_TOKENS, NAME, Quotas, Tenant

# What is before the hash in the file: another kind of hash could stand beside it one day.
HASHED: Final = "sha256:"
FILE_LIMIT_BYTES: Final = 256 * 1024
# One connection has two arenas of 64 KiB at least, and a private copy of the first.
SMALLEST_CONNECTION_BYTES: Final = 3 * 64 * 1024
_LARGEST_BYTES: Final = 2**50
_LIGHTEST, _HEAVIEST = 0.001, 1000
# The next number is nobody's: -1 where a uid is expected.
_HIGHEST_ID: Final = 2**32 - 2
HASH: Final = re.compile(rf"{HASHED}([0-9a-f]{{64}})")
_PATTERN: Final = re.compile(r"[a-z0-9._*?\[\]!-]{1,128}")
_LINE: Final = re.compile(r"at line (\d+)")
# What stands in TOML without quotes.
_BARE: Final = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read_quotas(path: Path) -> Quotas:
    """Return what a quota file says. Raises ConfigError."""
    return parse_quotas(read_text(path), path.name)


def read_text(path: Path, kind: str = "quota file") -> str:
    """Return the text of a quota file, or of another that says who may do what.

    Raises ConfigError for one that is no file, too long, or everybody's to change; ``kind`` is what it is called then.
    """
    try:
        # Not to wait for the other end, should it be a pipe.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK | os.O_CLOEXEC)) as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(FILE_LIMIT_BYTES + 1) if stat.S_ISREG(mode) else b""
    except OSError as error:
        raise ConfigError(f"the {kind} {path.name} cannot be read ({os.strerror(error.errno or 0)})") from error
    if not stat.S_ISREG(mode):
        raise ConfigError(f"the {kind} {path.name} is no file")
    if mode & stat.S_IWOTH:
        raise ConfigError(f"the {kind} {path.name} may be written to by everybody; take that away with chmod o-w")
    if len(content) > FILE_LIMIT_BYTES:
        raise ConfigError(f"the {kind} {path.name} is longer than {FILE_LIMIT_BYTES} bytes, which is the limit")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"the {kind} {path.name} is not UTF-8 at byte {error.start}") from error


def parse_quotas(text: str, name: str) -> Quotas:
    """Return what the text of a quota file says; ``name`` is the file's, for messages.

    Raises ConfigError, with the line and the key of what is wrong.
    """
    return _Reading(text, name).quotas(parsed(text, name))


def parsed(text: str, name: str) -> dict[str, Any]:
    """Return what TOML says; ``name`` is the file's. Raises ConfigError with line and key, and without a value."""
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        line, key = _mistake(text, str(error))
        message = f"{name}, line {line}: {key or 'what stands there'} is not TOML: {str(error)[:200]}"
        raise ConfigError(message, line=line, key=key) from error


def refuse(text: str, name: str, keys: Sequence[str], problem: str, *, key: str = "") -> NoReturn:
    """Raise ConfigError, with the line, for the value of ``keys`` in the text of the file ``name``."""
    line = line_of(text, keys)
    where = ".".join(part if _BARE.fullmatch(part) else repr(part[:64]) for part in keys)
    raise ConfigError(f"{name}, line {line}: {where} {problem}", line=line, key=key or keys[-1][:64])


def line_of(text: str, keys: Sequence[str]) -> int:
    """Return the line, counted from 1, in which the statement begins that gives the value of ``keys``; the text must have one.

    The lines before it are TOML by themselves and lack the value, however it is written: quoted, dotted, in a table or inline.
    """
    lines = text.split("\n")

    @functools.cache
    def has(count: int) -> bool | None:
        """Say whether the first lines have it; None where they end within a statement."""
        try:
            found: Any = tomllib.loads("\n".join(lines[:count]) + "\n")
        except ValueError:
            return None
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                return False
            found = found[key]
        return True

    # All lines of a statement have it, or none.
    without, within = 0, len(lines)
    while within - without > 1:
        middle = end = (without + within) // 2
        while (answer := has(end)) is None:
            end += 1
        if answer:
            within = middle
        else:
            without = end
    return within


def _mistake(text: str, told: str) -> tuple[int, str]:
    """Return where the statement begins that is no TOML, and its key, if it has one. ``told`` is what tomllib says of it."""
    lines = text.split("\n")
    # Where it was found out, which may be well behind; some messages have no line at all.
    found = _LINE.search(told)
    line = min(int(found[1]), len(lines)) if found else len(lines)
    while line > 1 and not _is_toml(lines[: line - 1]):
        line -= 1
    while line < len(lines) and lines[line - 1].strip()[:1] in ("", "#"):
        line += 1
    # What is before a value, and no value: it may be a secret by mistake.
    key, given, _ = lines[line - 1].partition("=")
    return line, key.strip()[:64] if given or key.startswith("[") else ""


def _is_toml(lines: Sequence[str]) -> bool:
    try:
        tomllib.loads("\n".join(lines) + "\n")
    except (ValueError, RecursionError):
        return False
    return True


class _Reading:
    """One reading of a file: the text is kept so that a line can be found for whatever is wrong."""

    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._name = name

    def quotas(self, read: Mapping[str, Any]) -> Quotas:
        for key in read:
            if key not in ("tenants", "domains"):
                self._refuse(
                    (key,), "is no key of a quota file; it has one table [tenants.NAME] for each tenant, and [domains] perhaps"
                )
        tables = read.get("tenants", {})
        if not isinstance(tables, dict):
            self._refuse(("tenants",), "must have a table for each tenant: [tenants.NAME]")
        tenants: dict[str, Tenant] = {}
        holders: dict[str, str] = {}
        for name, table in tables.items():
            tenant = tenants[name] = self._tenant(name, table)
            for token_hash in tenant.token_hashes:
                if token_hash in holders:
                    other = holders[token_hash]
                    self._refuse(("tenants", name, "tokens"), f"has a token that is {other}'s already; make another")
                holders[token_hash] = name
        return Quotas(tenants, self._public(read.get("domains", {})))

    def _public(self, table: object) -> tuple[str, ...]:
        """Return the patterns of the models whose weights are shared by all domains."""
        if not isinstance(table, dict):
            self._refuse(("domains",), "must be a table: [domains]")
        for key in table:
            if key != "public":
                self._refuse(("domains", key), "is no key of [domains]; it has one key, public")
        try:
            return _models(table.get("public", []))
        except ValueError as error:
            self._refuse(("domains", "public"), f"must be {error}")

    def _tenant(self, name: str, table: object) -> Tenant:
        at = ("tenants", name)
        if not NAME.fullmatch(name):
            self._refuse(at, f"is no name of a tenant; it must be {NAME_RULE}")
        if name == ANYONE.name:
            self._refuse(at, "is who asks where there is no quota file; choose another name")
        if not isinstance(table, dict):
            self._refuse(at, f"must be a table: [tenants.{name}]")
        values: dict[str, Any] = {"domain": name}
        for key, value in table.items():
            if key not in _KEYS:
                self._refuse((*at, key), f"is no key of a tenant; the keys are {', '.join(_KEYS)}")
            field, check = _KEYS[key]
            try:
                values[field] = check(value)
            except ValueError as error:
                self._refuse((*at, key), f"must be {error}")
        if "models" not in table:
            self._refuse(at, "has no key models: the patterns of the names of those it may use", key="models")
        if "socket_gid" in table and not values.get("socket"):
            self._refuse((*at, "socket_gid"), "is the group of a socket of its own, which it has with socket = true")
        return Tenant(name=name, **values)

    def _refuse(self, keys: Sequence[str], problem: str, *, key: str = "") -> NoReturn:
        refuse(self._text, self._name, keys, problem, key=key)


# --- what a key may be: each returns the value, or raises ValueError with what it must be ------------------------------

NAME_RULE: Final = "up to 63 of the characters a-z, 0-9 and '-', and start and end with a letter or digit"


def _texts(value: object, pattern: re.Pattern[str], rule: str) -> tuple[re.Match[str], ...]:
    matches = [pattern.fullmatch(entry) for entry in value if isinstance(entry, str)] if isinstance(value, list) else [None]
    found = tuple(match for match in matches if match is not None)
    if not isinstance(value, list) or len(found) != len(value) or len(set(value)) != len(value):
        raise ValueError(rule)
    return found


def _tokens(value: object) -> tuple[str, ...]:
    # What stands there may be a token by mistake; it is not repeated in any message.
    rule = f'a list of at most {MOST_TOKENS} different texts "{HASHED}" and 64 lower-case hexadecimal digits'
    matches = _texts(value, HASH, rule)
    if len(matches) > MOST_TOKENS:
        raise ValueError(rule)
    return tuple(match[1] for match in matches)


def _models(value: object) -> tuple[str, ...]:
    rule = 'a list of different names or patterns of models, such as ["embed", "resnet-*"]'
    return tuple(match[0] for match in _texts(value, _PATTERN, rule))


def _name(value: object) -> str:
    if not isinstance(value, str) or not NAME.fullmatch(value):
        raise ValueError(f"a name: {NAME_RULE}")
    return value


def _weight(value: object) -> float:
    # Not a number is within no bounds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not _LIGHTEST <= value <= _HEAVIEST:
        raise ValueError(f"a number from {_LIGHTEST} to {_HEAVIEST}, is {_shown(value)}")
    return float(value)


def _integer(minimum: int, maximum: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise ValueError(f"an integer from {minimum} to {maximum}, is {_shown(value)}")
        return value

    return check


def _size(minimum: int) -> Callable[[object], int]:
    rule = f'a size from {minimum} bytes to {_LARGEST_BYTES}, such as "64MB" or "2GiB"'

    def check(value: object) -> int:
        try:
            size_bytes = parse_size(value) if isinstance(value, (int, str)) else 0
        except ValueError:
            size_bytes = 0
        if not minimum <= size_bytes <= _LARGEST_BYTES:
            raise ValueError(f"{rule}, is {_shown(value)}")
        return size_bytes

    return check


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"true or false, is {_shown(value)}")
    return value


def _shown(value: object) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "a table"
    # Of a number of thousands of digits Python makes no text.
    return "far too large" if isinstance(value, int) and value.bit_length() > 64 else repr(value)[:40]


# By the key in the file: the field of a tenant, and its check.
_KEYS: Final[Mapping[str, tuple[str, Callable[[object], Any]]]] = {
    "tokens": ("token_hashes", _tokens),
    "models": ("models", _models),
    "domain": ("domain", _name),
    "weight": ("weight", _weight),
    "priority": ("priority", _integer(0, HIGHEST_PRIORITY)),
    "compute_once": ("compute_once", _switch),
    "in_flight": ("in_flight_limit", _integer(1, 1_000_000)),
    "queued": ("queued_limit_bytes", _size(1)),
    "connections": ("connection_limit", _integer(1, 100_000)),
    "arena": ("arena_limit_bytes", _size(SMALLEST_CONNECTION_BYTES)),
    "resident": ("resident_limit_bytes", _size(1)),
    "uid": ("uid", _integer(0, _HIGHEST_ID)),
    "gid": ("gid", _integer(0, _HIGHEST_ID)),
    "socket": ("socket", _switch),
    "socket_gid": ("socket_gid", _integer(0, _HIGHEST_ID)),
}
