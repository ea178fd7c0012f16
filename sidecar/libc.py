"""The C library, for what Python has no function for. Other threads run while it works. Loaded once, when this is imported.

Whoever calls a function says what it takes.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any, Final

LIBC: Final[Any] = ctypes.CDLL(None, use_errno=True)


def failed() -> OSError:
    """Return the error of the call that has just failed in this thread."""
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
