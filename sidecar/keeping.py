"""How dear an operator holds a model: its priority, and for how long it is kept in memory without a request. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from trunkline.errors import InvalidInput

from sidecar.strictjson import shown

DEFAULT_PRIORITY: Final = 5
HIGHEST_PRIORITY: Final = 9
# A year. Who means longer means for ever, which is None.
LONGEST_KEEP_ALIVE_S: Final = 31_536_000
_FIELDS: Final = ("priority", "keep_alive_s")


@dataclass(frozen=True)
class Keep:
    """``priority`` is 0 to 9, what is lower leaves memory first; ``keep_alive_s`` None: as long as there is room."""

    priority: int = DEFAULT_PRIORITY
    keep_alive_s: float | None = None

    def changed(self, asked: Mapping[str, Any]) -> Keep:
        """Return this with the values that ``asked`` has for its fields. Raises InvalidInput with the range of what is bad."""
        if not asked or asked.keys() - _FIELDS:
            raise InvalidInput(f"what can be said of keeping a model is {' and '.join(_FIELDS)}: one of them, or both")
        priority, keep_alive_s = asked.get("priority", self.priority), asked.get("keep_alive_s", self.keep_alive_s)
        if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= HIGHEST_PRIORITY:
            raise InvalidInput(f"priority is {shown(priority)}; it must be an integer from 0 to {HIGHEST_PRIORITY}")
        if keep_alive_s is None:
            return Keep(priority)
        # Not a number is within no bounds.
        is_number = isinstance(keep_alive_s, (int, float)) and not isinstance(keep_alive_s, bool)
        if not is_number or not 0 <= keep_alive_s <= LONGEST_KEEP_ALIVE_S:
            raise InvalidInput(
                f"keep_alive_s is {shown(keep_alive_s)}; it must be a number of seconds from 0 to {LONGEST_KEEP_ALIVE_S}, or "
                "null for as long as there is room"
            )
        return Keep(priority, float(keep_alive_s))

    def to_plain(self) -> dict[str, object]:
        """Return the fields by name, as JSON has them."""
        return {"priority": self.priority, "keep_alive_s": self.keep_alive_s}
