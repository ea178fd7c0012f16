"""Where models were asked last, in a file: an engine that comes after this one finds their weights there.

Owned by one thread. All of this is for speed: what cannot be read or written is chosen anew.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from sidecar.jsonfile import read_json, replace_json

log = logging.getLogger("trunkline.engine")


def read_places(path: Path, devices: Collection[str]) -> dict[str, frozenset[str]]:
    """Return the devices of models, by name, as ``write_places`` wrote them, but for devices that are no more."""
    try:
        stored = read_json(path, missing={})
    except (OSError, ValueError):
        log.warning("%s cannot be read; models are placed anew", path)
        return {}
    found = {}
    for name, names in stored.items() if isinstance(stored, dict) else ():
        known = frozenset(device for device in devices if isinstance(names, list) and device in names)
        if known:
            found[name] = known
    return found


def write_places(path: Path, placed: Mapping[str, frozenset[str]]) -> None:
    """Write where models are asked, in place of what was written before."""
    try:
        replace_json(path, {name: sorted(where) for name, where in sorted(placed.items())})
    except OSError as error:
        log.warning(
            "where models are asked cannot be saved (%s); after a restart they are placed anew", os.strerror(error.errno or 0)
        )
