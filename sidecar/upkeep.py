"""Upkeep: what an engine looks through while it serves, so that what was altered is found before anybody is told nonsense.

Once a minute some of the weights in memory are compared with their checksums, each time the next ones. Nobody writes to them: one
that differs is a fault of the memory, or of a library, and the rest of it may be no better. Then this process ends; the next
engine compares every weight before its first use, drops what is altered, and clients repeat what was not answered. Once a day all
that is on disk is read, slowly. On a device that copies weights, what is compared is what the cache in host memory has.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Final

from sidecar.memory import Memory
from sidecar.mover import Mover

log = logging.getLogger("trunkline.engine")

_COMPARE_EVERY_S: Final = 60.0
# Some 25 ms in which nothing is brought in.
_COMPARED_BYTES: Final = 64 << 20
# What is on disk is read through once in so long, a MiB and then a pause: 20 MB/s at most.
_SCRUB_EVERY_S: Final = 24 * 3600.0
_SCRUB_PAUSE_S: Final = 0.05
# What an engine ends with that has found its memory altered.
ALTERED: Final = 70


def end_of_altered(keys: Sequence[str]) -> None:
    """End this process because weights in memory are not what they were."""
    log.critical(
        "%d weights were altered in memory, %s among them; this engine ends, and the next one drops what is altered. If it "
        "repeats, check the memory of this machine",
        *(len(keys), keys[0]),
    )
    logging.shutdown()
    os._exit(ALTERED)


def begin(
    memory: Memory, mover: Mover, ended: threading.Event, altered: Callable[[Sequence[str]], None] = end_of_altered
) -> None:
    """Begin to look, in threads that end with ``ended``; ``altered`` is told of weights, in the mover's thread."""

    def compare() -> None:
        while not ended.wait(_COMPARE_EVERY_S):
            mover.compare(_COMPARED_BYTES, altered)

    threading.Thread(target=compare, name="compare", daemon=True).start()
    threading.Thread(target=scrub, args=(memory.scrub, ended), name="scrub", daemon=True).start()


def scrub(what: Callable[[Callable[[], object]], object], ended: threading.Event) -> None:
    """Have something read that is on disk, once a day until ``ended``. The body of a thread."""
    while not ended.wait(_SCRUB_EVERY_S):
        what(lambda: ended.wait(_SCRUB_PAUSE_S))
