"""The audit log: one line of JSON for each change that was asked for over HTTP, and for each refusal of who asked.

Lines go to the log, and to a file where the operator names one; several workers append to it, and the one that finds it too long
moves it aside. Refusals are told at a bounded rate, with how many were left out, so that nobody can fill a disk by being refused.
"""

from __future__ import annotations

import fcntl
import itertools
import json
import logging
import os
import re
import secrets
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Final

from flask import Response, current_app, g, request

from sidecar.errors import ConfigError
from sidecar.http.access import LOOKING, came_by_socket, needs_of, principal
from sidecar.logs import RateLimit
from sidecar.peers import peer_of
from sidecar.ratelimit import Bucket

log = logging.getLogger("trunkline.audit")
# Whatever else is logged or not.
log.setLevel(logging.INFO)
_lost = logging.getLogger("trunkline.admin.audit")
_lost.addFilter(RateLimit(1))

REFUSALS: Final = (401, 403, 429)
FILE_BYTES: Final = 16 << 20
_OLD_FILES: Final = 4
# Of refusals, in one worker: so many at once, and then so many a second.
_BURST: Final = 20
_PER_S: Final = 5.0
_CALL_ID: Final = re.compile(r"[\x21-\x7e]{1,128}")
_NOT_PRINTED: Final = re.compile(r"\x7f")


class SharedFile(RotatingFileHandler):
    """A file that several processes append lines to; the one that finds it full moves it aside, and the others follow."""

    def __init__(self, path: Path, limit_bytes: int = FILE_BYTES, old_count: int = _OLD_FILES) -> None:
        """Raises ConfigError when the file cannot be written to."""
        try:
            # Record locks: each process has its own, also of what it was forked with.
            self._alone = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640))
        except OSError as error:
            raise ConfigError(
                f"the audit file {path} cannot be written to ({os.strerror(error.errno or 0)}); correct --audit-file",
                key="audit_file",
            ) from error
        super().__init__(path, maxBytes=limit_bytes, backupCount=old_count, encoding="ascii", delay=True)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fcntl.lockf(self._alone, fcntl.LOCK_EX)
            try:
                self._follow()
                super().emit(record)
            finally:
                fcntl.lockf(self._alone, fcntl.LOCK_UN)
        except OSError:
            self.handleError(record)

    def _follow(self) -> None:
        """Close a file that another process has moved aside; the next line opens the one in its place."""
        if self.stream is None:
            return
        own = os.fstat(self.stream.fileno())
        try:
            now = os.stat(self.baseFilename)
        except FileNotFoundError:
            now = None
        if now is None or (own.st_dev, own.st_ino) != (now.st_dev, now.st_ino):
            self.stream.close()
            self.stream = None

    def close(self) -> None:
        """Close the file, and what it is locked by."""
        super().close()
        if self._alone >= 0:
            os.close(self._alone)
            self._alone = -1

    def handleError(self, record: logging.LogRecord) -> None:
        """Say that a line is missing in the file; it is in the log."""
        _lost.error("a line could not be appended to %s; make room there", self.baseFilename)


def append_to(path: Path) -> None:
    """Have all lines appended to a file as well. Raises ConfigError when it cannot be written to."""
    log.addHandler(SharedFile(path))


def note(**told: object) -> None:
    """Have the audit line of this request tell more of what it is about: for views, where the body says it. No secrets."""
    g.setdefault("audited", {}).update(told)


class Audit:
    """Writes the lines. Any thread."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._refusals = Bucket(_BURST, _PER_S)
        self._left_out = 0

    def record(self, response: Response) -> Response:
        """Write what has come of this request, if it is to be told; after each."""
        is_refused = response.status_code in REFUSALS
        declared = None if request.endpoint is None else needs_of(current_app, request.endpoint)
        if not is_refused and (request.method in LOOKING or declared is None or not declared.is_audited):
            return response
        call_id = g.setdefault("call_id", _call_id())
        # What is told to whoever asked, to be found here by.
        response.headers.setdefault("X-Call-Id", call_id)
        if is_refused and self._refusals.take():
            self._left_out += 1
            return response
        who = principal()
        line: dict[str, object] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "worker": os.getpid(),
            "sequence": next(self._numbers),
            "name": None if who is None else who.name,
            "role": None if who is None else who.role,
            **_whence(),
            "method": request.method[:16],
            "route": None if request.url_rule is None else request.url_rule.rule,
            "object": {key: str(value)[:128] for key, value in (request.view_args or {}).items()} | g.get("audited", {}),
            "status": response.status_code,
            "call_id": call_id,
        }
        if self._left_out:
            line["refusals_left_out"], self._left_out = self._left_out, 0
        log.info("%s", _NOT_PRINTED.sub(r"\\u007f", json.dumps(line)))
        return response


def _call_id() -> str:
    given = request.headers.get("X-Call-Id", "")
    return given if _CALL_ID.fullmatch(given) else secrets.token_hex(8)


def _whence() -> dict[str, object]:
    """Return where a request came from: the process at the other end of the socket, or an address."""
    if not came_by_socket():
        return {"address": request.environ.get("REMOTE_ADDR")}
    connection = request.environ.get("gunicorn.socket")
    if connection is None:
        return {}
    peer = peer_of(connection)
    return {"pid": peer.pid, "uid": peer.uid}
