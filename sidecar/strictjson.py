"""Decoding of JSON written by strangers: size, nesting, duplicates and types are checked before anything is believed.

Every refusal is a ``BundleError`` whose message starts with the place, such as ``graph.json: nodes[3].args[0]``.
Pure functions, callable from any thread. Must not import torch or anything that does I/O.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import NoReturn

from sidecar.errors import BundleError

# A container costs about 60 bytes of memory and two characters of text. Counting the characters that can open or
# extend one, which takes milliseconds, bounds what the decoder may allocate for a text within the size limit.
MAX_ELEMENT_COUNT = 6_000_000


def refuse(place: str, problem: str) -> NoReturn:
    """Raise the one error of this module."""
    raise BundleError(f"{place}: {problem}", place=place)


def shown(value: object) -> str:
    """Return a short form of ``value`` for a message. Containers are named by type only, as they may be huge."""
    if isinstance(value, (dict, list)):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value)}"
    return value[:40].__repr__() if isinstance(value, str) else repr(value)[:40]


def load_json(data: bytes, name: str, limit_bytes: int) -> object:
    """Decode UTF-8 JSON of at most ``limit_bytes``; ``name`` is the file that errors are reported against.

    Duplicate keys, ``NaN``, infinities, numbers that overflow and nesting deeper than Python's own limit are refused.
    """
    if len(data) > limit_bytes:
        refuse(name, f"is {len(data)} bytes long, the limit is {limit_bytes}")
    if sum(data.count(character) for character in b"[{,") > MAX_ELEMENT_COUNT:
        refuse(name, f"has more than {MAX_ELEMENT_COUNT} elements")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            refuse(name, f"key {shown(twice)} is given twice in one object")
        return found

    def finite(text: str) -> float:
        value = float(text)
        if value in (float("inf"), float("-inf")):
            refuse(name, f"number {text[:40]} is too large")
        return value

    def constant(text: str) -> NoReturn:
        refuse(name, f"the constant {text} is not allowed")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=unique, parse_float=finite, parse_constant=constant)
    except RecursionError as error:
        raise BundleError(f"{name}: is nested too deeply", place=name) from error
    except ValueError as error:  # covers bad UTF-8, bad JSON and integers of thousands of digits
        raise BundleError(f"{name}: is not JSON: {str(error)[:120]}", place=name) from error


def encode_json(value: object) -> bytes:
    """Return the canonical form: sorted keys, no spaces, ASCII, shortest floats that read back equal."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def members(value: object, place: str, required: Iterable[str], optional: Iterable[str] = ()) -> dict[str, object]:
    """Return ``value`` as an object that has all ``required`` fields and no field outside both lists."""
    if not isinstance(value, dict):
        refuse(place, f"must be an object, not {shown(value)}")
    for key in required:
        if key not in value:
            refuse(place, f"field {key!r} is missing")
    unknown = value.keys() - {*required, *optional}
    if unknown:
        refuse(place, f"has an unknown field {shown(min(unknown))}")
    return value


def elements(value: object, place: str, limit_count: int) -> list[object]:
    """Return ``value`` as a list of at most ``limit_count`` elements."""
    if not isinstance(value, list):
        refuse(place, f"must be a list, not {shown(value)}")
    if len(value) > limit_count:
        refuse(place, f"has {len(value)} elements, the limit is {limit_count}")
    return value


def integer(value: object, place: str, minimum: int, maximum: int) -> int:
    """Return ``value`` as an integer within both bounds, inclusive. True and false are not integers here."""
    if isinstance(value, bool) or not isinstance(value, int):
        refuse(place, f"must be an integer, not {shown(value)}")
    if not minimum <= value <= maximum:
        refuse(place, f"{shown(value)} is outside {minimum}..{maximum}")
    return value


def text(value: object, place: str, pattern: re.Pattern[str]) -> str:
    """Return ``value`` as a string that ``pattern`` matches as a whole."""
    if not isinstance(value, str):
        refuse(place, f"must be a string, not {shown(value)}")
    if not pattern.fullmatch(value):
        refuse(place, f"{shown(value)} does not match {pattern.pattern}")
    return value


def printable(value: object, place: str, limit_count: int) -> str:
    """Return ``value`` as one line of at most ``limit_count`` printable characters, for display only."""
    if not isinstance(value, str):
        refuse(place, f"must be a string, not {shown(value)}")
    if len(value) > limit_count or not value.isprintable():
        refuse(place, f"must be at most {limit_count} printable characters")
    return value


def choice(value: object, place: str, allowed: Iterable[str]) -> str:
    """Return ``value`` as one of the strings in ``allowed``."""
    if not isinstance(value, str) or value not in allowed:
        refuse(place, f"{shown(value)} is not one of the allowed names")
    return value
