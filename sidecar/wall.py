"""A second wall around the engine: what it never does once it serves, Python itself refuses.

Nothing in a bundle is executed, evaluated or unpickled. Should that ever fail, what comes next is one of a few things: a class
out of a pickle, text that is run, another process, another library. An audit hook ends those with an error and a line in the log;
it cannot be taken away again. Text that is compiled is let be, because Python does that to show where an error happened; it does
nothing until it is run, which only a module may be that is being imported. No wall against native code.
"""

from __future__ import annotations

import logging
import sys
from types import FrameType
from typing import Any, Final

from sidecar.logs import RateLimit

log = logging.getLogger("trunkline.wall")

REFUSED: Final = frozenset(
    {
        *("pickle.find_class", "ctypes.dlopen"),
        *("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "pty.spawn"),
    }
)
_EXEC: Final = "exec"
# What runs a module's text on its import.
_IMPORTING: Final = sys.modules["_frozen_importlib"]._call_with_frames_removed.__code__
_TOLD_PER_S: Final = 5


def build() -> None:
    """Refuse all that from now on, in this process and for good. Not in one that has anything left to fork."""
    log.addFilter(RateLimit(_TOLD_PER_S))
    watched = REFUSED | {_EXEC}

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        # Some five events a request come here; all but the first line is for those that should not.
        if event not in watched or (event == _EXEC and _is_import(sys._getframe(1))):
            return
        log.error("%s was tried in the engine, which never does that, and is refused", event, stack_info=True)
        raise PermissionError(f"{event} is refused in the engine")

    sys.addaudithook(look)


def _is_import(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code is _IMPORTING:
            return True
        frame = frame.f_back
    return False
