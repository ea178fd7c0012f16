"""How many connections a limit on open files lets in."""

from __future__ import annotations

import pytest

from sidecar.wiring import _connections_within, _descriptors_for


@pytest.mark.parametrize("limit", [*range(68, 2000, 7), 4096, 65536])
def test_as_many_connections_are_let_in_as_there_are_descriptors_for(limit: int) -> None:
    """Those included that have said nothing yet."""
    found = _connections_within(limit)
    assert _descriptors_for(found) <= limit < _descriptors_for(found + 1)


def test_one_is_let_in_whatever_the_limit() -> None:
    assert _connections_within(8) == 1
