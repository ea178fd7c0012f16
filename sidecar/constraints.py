"""What operators said about where models may be, in a file so that it outlives the engine.

Models are known here by the names they are deployed under, one in each domain. Changed by one thread; others may read.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from trunkline.errors import InvalidInput

from sidecar.jsonfile import read_json, replace_json
from sidecar.strictjson import shown

log = logging.getLogger("trunkline.engine")

_FIELDS: Final = ("allow", "forbid")


@dataclass(frozen=True)
class Constraint:
    """The devices where a model may be; ``allow`` empty: on all. What is in ``forbid`` is not, in any case."""

    allow: tuple[str, ...] = ()
    forbid: tuple[str, ...] = ()

    def of(self, devices: Collection[str]) -> list[str]:
        """Return those of some devices where the model may be."""
        return [name for name in devices if (not self.allow or name in self.allow) and name not in self.forbid]

    def changed(self, asked: Mapping[str, Any], devices: Collection[str]) -> Constraint:
        """Return this with what ``asked`` has for its fields. Raises InvalidInput: no device is left, or none is called so."""
        check(asked)
        made = Constraint(*(tuple(dict.fromkeys(asked.get(field, getattr(self, field)))) for field in _FIELDS))
        for name in (*made.allow, *made.forbid):
            if name not in devices:
                raise InvalidInput(f"there is no device {name[:64]!r} here; the devices are {', '.join(devices)}")
        if not made.of(devices):
            raise InvalidInput(f"that leaves none of the devices {', '.join(devices)}; allow one that is not forbidden")
        return made

    def to_plain(self) -> dict[str, object]:
        """Return the fields by name, as JSON has them."""
        return {"allow": list(self.allow), "forbid": list(self.forbid)}


def check(asked: Mapping[str, Any]) -> None:
    """Raise InvalidInput where something cannot be said of the devices of a model, whatever these are."""
    if not asked or asked.keys() - _FIELDS:
        raise InvalidInput(f"what can be said of where a model may be is {' and '.join(_FIELDS)}: one of them, or both")
    for field, names in asked.items():
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise InvalidInput(f"{field} is {shown(names)}; it must be a list of names of devices")


class Constraints:
    """Constraints by the name of a model, in a JSON file ``{name: {"allow", "forbid"}}`` that is replaced as a whole."""

    def __init__(self, path: Path, devices: Collection[str]) -> None:
        self._path = path
        self._devices = devices
        self._by_name: dict[str, Constraint] = {}
        # What was said with other devices, which may be back.
        self._ignored: dict[str, Any] = {}
        try:
            stored = read_json(path, missing={})
        except (OSError, ValueError):
            # Losing a constraint must not keep the node from serving.
            self._ignore("it cannot be read")
            return
        if not isinstance(stored, dict):
            self._ignore("it holds no object")
            return
        for name, plain in stored.items():
            try:
                self._by_name[name] = Constraint().changed(plain if isinstance(plain, dict) else {}, devices)
            except InvalidInput as error:
                # Of another set of devices, perhaps.
                self._ignored[name] = plain
                self._ignore(f"for {name[:64]!r}, {error.message}")

    def _ignore(self, problem: str) -> None:
        log.warning("%s: %s; this is ignored, say again where those models may be", self._path, problem)

    def devices_of(self, name: str) -> list[str]:
        """Return the devices where a model may be. Any thread."""
        return self.of(name).of(self._devices)

    def of(self, name: str) -> Constraint:
        """Return what was said of a model. Any thread."""
        return self._by_name.get(name, Constraint())

    def change(self, name: str, asked: Mapping[str, Any]) -> None:
        """Say where a model may be. Raises InvalidInput."""
        self._by_name[name] = self.of(name).changed(asked, self._devices)
        self._ignored.pop(name, None)
        kept = {name: each.to_plain() for name, each in sorted(self._by_name.items()) if each != Constraint()}
        try:
            replace_json(self._path, self._ignored | kept)
        except OSError as error:
            log.warning(
                "where models may be cannot be saved (%s); it holds until the engine restarts", os.strerror(error.errno or 0)
            )
