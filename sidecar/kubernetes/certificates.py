"""A certificate and its key in two files, read again when they are replaced: the server's end of TLS.

Whoever renews them may write one file after the other, so for a moment they may not belong together: until they do, what was
read last is served.
"""

from __future__ import annotations

import logging
import os
import ssl
import threading
from pathlib import Path

from sidecar.errors import ConfigError

log = logging.getLogger("trunkline.kubernetes")

_Seen = tuple[tuple[int, int, int], ...]


class Certificate:
    """The TLS context of a server, made anew when the files are others. Any thread."""

    def __init__(self, certificate: Path, key: Path, socket_class: type[ssl.SSLSocket] = ssl.SSLSocket) -> None:
        """Read both PEM files. Raises ConfigError."""
        self._files = (certificate, key)
        self._socket_class = socket_class
        self._lock = threading.Lock()
        # Before they are read: what is replaced meanwhile is read again.
        self._seen = self._look()
        try:
            self._context = self._load()
        except OSError as error:
            raise ConfigError(
                f"the certificate {certificate} and the key {key} cannot be used ({error.strerror or error}); "
                "correct --tls-cert and --tls-key",
                key="tls_cert",
            ) from error

    def context(self) -> ssl.SSLContext:
        """Return the context for a connection that begins now."""
        with self._lock:
            if (found := self._look()) != self._seen:
                # Noted in any case: what is unfit now is tried again when a file changes once more.
                self._seen = found
                try:
                    self._context = self._load()
                except OSError as error:
                    log.warning("the new certificate in %s is unfit (%s)", self._files[0], error.strerror or error)
                else:
                    log.info("the certificate in %s was replaced, and is used from now on", self._files[0])
            return self._context

    def _look(self) -> _Seen:
        """Return what changes with the files. A file that is not there, or not to be had, is like none that is."""
        found = []
        for path in self._files:
            try:
                stat = os.stat(path)
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((stat.st_ino, stat.st_size, stat.st_mtime_ns))
        return tuple(found)

    def _load(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.sslsocket_class = self._socket_class
        # With a password of no length: a key that demands one is refused, instead of asking at a terminal.
        context.load_cert_chain(*self._files, password="")
        return context
