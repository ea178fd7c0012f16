"""Verdicts: what trying a structure out has shown, kept on disk so that it is tried once on a machine and not at every start.

Each verdict is a small file named by what was tried and where: a graph, the device, the version of torch. In it are a checksum
and a line of JSON.
While something is tried a mark lies beside it, one byte long for each time. What the engine did not outlive twice is not tried
again. Callable from any thread; a folder that cannot be used costs nothing but time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("trunkline.trials")


class Verdicts:
    """JSON objects by key, under a folder. ``facts`` are what verdicts depend on beside the structure."""

    def __init__(self, folder: Path, *facts: str) -> None:
        self._folder = folder
        self._facts = facts
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            self._unusable(error)

    def _path(self, kind: str, structure: str) -> Path:
        name = hashlib.sha256("\n".join((kind, structure, *self._facts)).encode()).hexdigest()
        return self._folder / f"{kind}-{name}.json"

    def find(self, kind: str, structure: str) -> dict[str, Any] | None:
        """Return a verdict, None when there is none."""
        try:
            checksum, _, content = self._path(kind, structure).read_bytes().partition(b"\n")
            found = json.loads(content) if int(checksum, 16) == zlib.crc32(content) else None
        except (OSError, ValueError, RecursionError):
            # Found again, and written anew.
            return None
        return found if isinstance(found, dict) else None

    def unfinished(self, kind: str, structure: str) -> int:
        """Return how often a trial was begun and did not end."""
        try:
            return self._path(kind, structure).with_suffix(".trying").stat().st_size
        except OSError:
            return 0

    def begin(self, kind: str, structure: str) -> None:
        """Leave a mark that something is being tried."""
        try:
            with self._path(kind, structure).with_suffix(".trying").open("ab") as mark:
                mark.write(b".")
        except OSError as error:
            self._unusable(error)

    def end(self, kind: str, structure: str, verdict: Mapping[str, Any] | None) -> None:
        """Keep a verdict, if there is one, and take the mark away."""
        path = self._path(kind, structure)
        try:
            if verdict is not None:
                temporary = path.with_suffix(f".{threading.get_native_id()}.tmp")
                content = json.dumps(verdict).encode()
                temporary.write_bytes(b"%08x\n" % zlib.crc32(content) + content)
                os.replace(temporary, path)
            path.with_suffix(".trying").unlink(missing_ok=True)
        except OSError as error:
            self._unusable(error)

    def _unusable(self, error: OSError) -> None:
        log.warning("what trials show cannot be kept in %s (%s); it is found again", self._folder, os.strerror(error.errno or 0))
