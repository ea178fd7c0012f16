"""The operator's pins, kept in a file so that they outlive the engine. Owned by the engine thread."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

log = logging.getLogger("trunkline.engine")


class Pins:
    """Names of pinned models, in a JSON file that is replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] = set()
        try:
            stored = json.loads(path.read_bytes())
        except FileNotFoundError:
            return
        except (OSError, ValueError):
            # Pins are a preference: losing them must not keep the node from serving.
            log.warning("the pins in %s cannot be read; no model is pinned", path)
            return
        if isinstance(stored, list):
            self._names = {name for name in stored if isinstance(name, str)}

    def names(self) -> list[str]:
        return sorted(self._names)

    def add(self, name: str) -> None:
        self._names.add(name)
        self._write()

    def discard(self, name: str) -> None:
        if name in self._names:
            self._names.discard(name)
            self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(self.names()))
            os.replace(temporary, self._path)
        except OSError as error:
            log.warning("the pins cannot be saved (%s); they hold until the engine restarts", os.strerror(error.errno or 0))
