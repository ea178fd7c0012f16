"""What operators said about keeping models, in a file so that it outlives the engine: pins, priorities, keep-alive times.

Models are known here by the names they are deployed under, one in each domain. Owned by the engine thread.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Final

from trunkline.errors import InvalidInput

from sidecar.jsonfile import read_json, replace_json
from sidecar.keeping import Keep
from sidecar.tenants import unqualified

log = logging.getLogger("trunkline.engine")

_DEFAULT: Final = Keep()


class Pins:
    """Names of pinned models, and how others than the default are kept, in a JSON file that is replaced as a whole.

    The file holds ``{"pinned": [name], "kept": {name: {"priority", "keep_alive_s"}}}``; or, from before there was more to say,
    the list of the pinned.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: set[str] = set()
        self._kept: dict[str, Keep] = {}
        try:
            stored = read_json(path, missing={})
        except (OSError, ValueError):
            # All of this is preference: losing it must not keep the node from serving.
            self._ignore("it cannot be read")
            return
        if isinstance(stored, list):
            stored = {"pinned": stored}
        if not isinstance(stored, dict):
            self._ignore("it holds no object")
            return
        pinned, kept = stored.get("pinned", []), stored.get("kept", {})
        if isinstance(pinned, list):
            self._names = {name for name in pinned if isinstance(name, str)}
        if not isinstance(pinned, list) or len(self._names) != len(pinned):
            self._ignore("its pins are not a list of names")
        if not isinstance(kept, dict):
            self._ignore("what it says of models is no object")
            return
        for name, plain in kept.items():
            try:
                self._kept[name] = _DEFAULT.changed(plain if isinstance(plain, dict) else {})
            except InvalidInput as error:
                self._ignore(f"for {name[:64]!r}, {error.message}")

    def _ignore(self, problem: str) -> None:
        log.warning("%s: %s; this is ignored, pin and keep those models again", self._path, problem)

    def names(self) -> list[str]:
        return sorted(self._names)

    def has(self, name: str) -> bool:
        """Say whether a model is pinned. Any thread."""
        return name in self._names

    def add(self, name: str) -> None:
        self._names.add(name)
        self._write()

    def discard(self, name: str) -> None:
        if name in self._names:
            self._names.discard(name)
            self._write()

    def kept(self, name: str) -> Keep:
        """Return how a model is to be kept, whether it is deployed or not."""
        return self._kept.get(name, _DEFAULT)

    def keep(self, name: str, keep: Keep) -> None:
        """Say how a model is to be kept."""
        self._kept[name] = keep
        self._write()

    def forget(self, model: str) -> None:
        """Forget all that was said of a model, in whichever domain."""
        gone = {name for name in (*self._names, *self._kept) if unqualified(name)[0] == model}
        if gone:
            self._names -= gone
            self._kept = {name: keep for name, keep in self._kept.items() if name not in gone}
            self._write()

    def _write(self) -> None:
        kept = {name: keep.to_plain() for name, keep in sorted(self._kept.items()) if keep != _DEFAULT}
        try:
            replace_json(self._path, {"pinned": self.names(), "kept": kept})
        except OSError as error:
            log.warning(
                "pins and how models are kept cannot be saved (%s); they hold until the engine restarts",
                os.strerror(error.errno or 0),
            )
