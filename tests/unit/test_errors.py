"""Every error has a stable code of its own, travels over the wire, and stands in docs/errors.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from trunkline import errors, protocol
from trunkline.errors import TrunklineError, from_wire

import sidecar.errors  # noqa: F401 - registers its classes

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def classes() -> list[type[TrunklineError]]:
    found = [TrunklineError]
    for base in found:
        found.extend(child for child in base.__subclasses__() if child.__module__ in ("trunkline.errors", "sidecar.errors"))
    return found


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.code)
def test_an_error_comes_back_as_what_it_was(kind: type[TrunklineError]) -> None:
    error = kind("17 of 12 bytes", asked_bytes=17, name="x")
    fault = protocol.Fault(1, error.code, error.message, error.retryable, error.details)
    decoded = protocol.decode(protocol.encode(fault))
    assert isinstance(decoded, protocol.Fault)
    back = from_wire(decoded.code, decoded.message, decoded.details)
    assert type(back) is kind
    assert back.to_dict() == error.to_dict()


def test_codes_are_unique() -> None:
    codes = [kind.code for kind in classes()]
    assert len(codes) == len(set(codes))


def test_an_unknown_code_of_a_newer_sidecar_is_still_an_error() -> None:
    error = from_wire("too_new", "what is this", {"a": 1})
    assert isinstance(error, errors.SidecarFault)
    assert "too_new: what is this" in error.message


def test_the_page_lists_every_error_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+) \| (yes|no) \|", PAGE.read_text(), re.MULTILINE)
    listed = {code: (name, int(status), retry == "yes") for code, name, status, retry in rows}
    expected = {kind.code: (kind.__name__, kind.http_status, kind.retryable) for kind in classes()}
    assert listed == expected
