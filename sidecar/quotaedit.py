"""Changes to a quota file: a tenant more or less, a token more or less. Nothing else in the text changes, comments least of all.

Each change is a function from a text to a text. What it gives is read again, and believed only if it says what it should: a file
that is laid out in an unusual way is left to its owner. ``edit`` makes a change to a file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from sidecar.disk import opened, write_at
from sidecar.errors import ConfigError
from sidecar.quotas import HASHED, line_of, parse_quotas, read_text
from sidecar.tenants import MOST_TOKENS, Quotas, Tenant, hash_of

_NEW_FILE: Final = "# Who may use this sidecar. `trunkline tenant` changes this file and leaves comments alone.\n"
_TOKEN_BYTES: Final = 32


def new_token() -> str:
    """Return a new token: 43 characters that need no quoting anywhere."""
    return secrets.token_urlsafe(_TOKEN_BYTES)


def with_tenant(text: str, file: str, name: str, token: str, values: Mapping[str, object]) -> str:
    """Return the text with a further tenant, who has ``token`` and, by the keys of the file, ``values``.

    Raises ConfigError when there is one of this name, or a value is out of its range.
    """
    if name in parse_quotas(text, file).tenants:
        raise ConfigError(f"{file} has a tenant {name} already; choose another name, or change it there", key=name)
    lines = [f"[tenants.{name}]", f'tokens = ["{HASHED}{hash_of(token.encode())}"]']
    lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    changed = f"{text.rstrip()}\n\n" + "\n".join(lines) + "\n"
    parse_quotas(changed, file)
    return changed


def without_tenant(text: str, file: str, name: str) -> str:
    """Return the text without a tenant. Comments before its table, and before the next, stay. Raises ConfigError."""
    quotas = parse_quotas(text, file)
    _known(quotas, file, name)
    changed = without_table(text, ("tenants", name))
    expected = {key: tenant for key, tenant in quotas.tenants.items() if key != name}
    return _verified([changed], file, expected, f"take {name} out of it")


def without_table(text: str, keys: Sequence[str]) -> str:
    """Return the text without the table of ``keys``, which it must have, if it is laid out as usual."""
    lines = text.split("\n")
    start = line_of(text, keys) - 1
    # Values begin with no bracket, be it on a line of their own.
    end = next((number for number in range(start + 1, len(lines)) if lines[number].lstrip().startswith("[")), len(lines))
    while end > start + 1 and lines[end - 1].lstrip()[:1] in ("", "#", "\r"):
        end -= 1
    # One empty line is between two tables, not two.
    if lines[end : end + 1] in ([""], ["\r"]) and end + 1 < len(lines) and (not start or not lines[start - 1].strip()):
        end += 1
    return "\n".join(lines[:start] + lines[end:])


def with_token(text: str, file: str, name: str, token: str) -> str:
    """Return the text with a further token of a tenant, valid beside the one there is. Raises ConfigError."""
    quotas = parse_quotas(text, file)
    tenant = _known(quotas, file, name)
    if len(tenant.token_hashes) == MOST_TOKENS:
        raise ConfigError(
            f"{name} has {MOST_TOKENS} valid tokens, which is the limit; when all its functions have the newer one, end the "
            f"older with `trunkline tenant rotate {name} --end`",
            key="tokens",
        )
    made = hash_of(token.encode())
    written = f'"{HASHED}{made}"'
    if tenant.token_hashes:
        candidates = [re.sub(_text_of(tenant.token_hashes[-1]), lambda match: f"{match[0]}, {written}", text, count=1)]
    else:
        lines = text.split("\n")
        start = line_of(text, ("tenants", name))
        head, rest = "\n".join(lines[:start]), "\n".join(lines[start:])
        replaced = re.sub(r"(?m)^([ \t]*tokens\s*=\s*)\[\s*\]", lambda match: f"{match[1]}[{written}]", rest, count=1)
        candidates = [f"{head}\n{replaced}", f"{head}\ntokens = [{written}]\n{rest}"]
    expected = dict(quotas.tenants) | {name: dataclasses.replace(tenant, token_hashes=(*tenant.token_hashes, made))}
    return _verified(candidates, file, expected, f"add {written} to the tokens of {name}")


def without_older_token(text: str, file: str, name: str) -> str:
    """Return the text with only the newer one of a tenant's two tokens. Raises ConfigError."""
    quotas = parse_quotas(text, file)
    tenant = _known(quotas, file, name)
    if len(tenant.token_hashes) < MOST_TOKENS:
        count = len(tenant.token_hashes)
        message = f"{name} has {count} valid tokens, so none is the older; `trunkline tenant rotate {name}` adds one"
        raise ConfigError(message, key="tokens")
    older, newer = tenant.token_hashes
    changed = re.sub(rf"{_text_of(older)}[ \t]*,?[ \t]*", "", text, count=1)
    expected = dict(quotas.tenants) | {name: dataclasses.replace(tenant, token_hashes=(newer,))}
    return _verified([changed], file, expected, f"take {HASHED}{older} out of the tokens of {name}")


def edit(
    path: Path, change: Callable[[str, str], str], *, create: bool = False, new: str = _NEW_FILE, kind: str = "quota file"
) -> None:
    """Replace a quota file as a whole by what ``change`` makes of its text and its name; one edit at a time.

    Where ``create`` is set and there is no file, ``new`` is what it is made of. Raises OSError, and ConfigError with the file as
    it was.
    """
    # What the name stands for is replaced, and not a link to it.
    path = path.resolve()
    with _alone_in(path.parent):
        is_new = create and not path.exists()
        changed = change(new if is_new else read_text(path, kind), path.name)
        with replaced(path, 0o644 if is_new else path.stat().st_mode & 0o777) as descriptor:
            if not is_new and os.geteuid() == 0:
                os.fchown(descriptor, path.stat().st_uid, path.stat().st_gid)
            write_at(descriptor, memoryview(changed.encode()), 0)


@contextlib.contextmanager
def replaced(path: Path, mode: int) -> Iterator[int]:
    """Yield the descriptor of a new file that takes the place of ``path`` when the block has ended well. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield descriptor
            os.fchmod(descriptor, mode)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def keep_copy(path: Path, text: str) -> None:
    """Keep the text of a file as it is in force, for this user alone, in place of what was kept before. Raises OSError."""
    with replaced(path, 0o600) as descriptor:
        write_at(descriptor, memoryview(text.encode()), 0)


@contextlib.contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    # The file itself is replaced, and a lock with it.
    with opened(folder, os.O_RDONLY | os.O_DIRECTORY) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _toml(value: object) -> str:
    # Of what JSON writes otherwise there are but numbers without end.
    return repr(value) if isinstance(value, float) else json.dumps(value)


def _known(quotas: Quotas, file: str, name: str) -> Tenant:
    if name not in quotas.tenants:
        known = ", ".join(sorted(quotas.tenants)[:8]) or "none"
        raise ConfigError(f"{file} has no tenant {name}; it has {known}", key=name)
    return quotas.tenants[name]


def _text_of(token_hash: str) -> str:
    return rf"([\"']){HASHED}{token_hash}\1"


def _verified(candidates: Sequence[str], file: str, expected: Mapping[str, Tenant], advice: str) -> str:
    """Return the first of ``candidates`` that says what is expected. Raises ConfigError."""
    for changed in candidates:
        try:
            if parse_quotas(changed, file).tenants == expected:
                return changed
        except ConfigError:
            continue
    raise ConfigError(f"{file} is laid out in a way that cannot be changed here; {advice} by hand, and reload")
