"""A JSON Patch (RFC 6902) that only adds, written while a document is looked at. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Additions:
    """Operations that add members and list items to a document, in an order in which they can be applied.

    Each member and each list may be added to once: what the document holds is looked at, not what it will hold.
    """

    def __init__(self) -> None:
        self.operations: list[dict[str, Any]] = []

    def put(self, parent: Sequence[str | int], key: str, value: object) -> None:
        """Add a member to the object at ``parent``; ``null`` that stands there is replaced."""
        self.operations.append({"op": "add", "path": pointer(*parent, key), "value": value})

    def extend(self, parent: Sequence[str | int], key: str, present: Sequence[object] | None, items: Sequence[object]) -> None:
        """Append to the list ``key`` of the object at ``parent``, which has the items ``present``, or is not there (None)."""
        if present is None and items:
            self.put(parent, key, list(items))
            return
        self.operations += [{"op": "add", "path": pointer(*parent, key, "-"), "value": item} for item in items]

    def update(
        self, parent: Sequence[str | int], key: str, present: Mapping[str, object] | None, members: Mapping[str, object]
    ) -> None:
        """Add members to the object ``key`` of that at ``parent``, which has those ``present``, or is not there (None)."""
        if present is None and members:
            self.put(parent, key, dict(members))
            return
        for name, value in members.items():
            self.put((*parent, key), name, value)


def pointer(*parts: str | int) -> str:
    """Return a JSON Pointer (RFC 6901): in its parts ``~`` is written ``~0``, and ``/`` is written ``~1``."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in parts)
