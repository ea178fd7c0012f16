"""The token file of a running endpoint: read again when it changes. One with a mistake changes nothing.

What was in force then stays, for workers that are started after it, too: whoever reads the file without a mistake keeps a copy.
"""

from __future__ import annotations

import hmac
import logging
import os
import threading
from pathlib import Path

from sidecar.admintokens import KIND, Token, parse_tokens
from sidecar.errors import ConfigError
from sidecar.http.access import Principal
from sidecar.quotaedit import keep_copy
from sidecar.quotas import read_text
from sidecar.tenants import hash_of

log = logging.getLogger("trunkline.admin")


class TokenFile:
    """Whose tokens count. Any thread."""

    def __init__(self, path: Path, in_force: Path) -> None:
        """``in_force`` is where the copy is kept. Raises ConfigError where there is a mistake in the file, and no copy."""
        self._path = path
        self._in_force = in_force
        self._lock = threading.Lock()
        self._seen = self._look()
        try:
            self._tokens = self._read()
        except ConfigError as error:
            if not in_force.exists():
                raise
            log.error("%s; the tokens that were in force stay", error.message)
            self._tokens = parse_tokens(read_text(in_force, KIND), in_force.name)

    def holder(self, token: bytes) -> Principal | None:
        """Return whose token it is. Each hash there is gets compared, in constant time."""
        given, found = hash_of(token), None
        for each in self._current():
            if hmac.compare_digest(each.token_hash, given):
                found = Principal(each.name, each.role)
        return found

    def _current(self) -> tuple[Token, ...]:
        seen = self._look()
        if seen != self._seen:
            with self._lock:
                # Before it is read: what changes meanwhile is seen by the next.
                self._seen = seen
                try:
                    self._tokens = self._read()
                    log.info("%d tokens are in force, as %s says", len(self._tokens), self._path)
                except ConfigError as error:
                    log.error("%s; the tokens in force stay", error.message)
        return self._tokens

    def _look(self) -> tuple[int, ...]:
        """Return what is different when the file was changed."""
        try:
            found = os.stat(self._path)
        except OSError:
            return ()
        return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _read(self) -> tuple[Token, ...]:
        text = read_text(self._path, KIND)
        tokens = parse_tokens(text, self._path.name)
        try:
            keep_copy(self._in_force, text)
        except OSError as error:
            reason = os.strerror(error.errno or 0)
            log.warning("the tokens in force cannot be kept (%s); a worker that is started again reads %s", reason, self._path)
        return tokens
