"""Which kind of memory suits a device, and how much of it there is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from sidecar.blockfiles import BlockFiles
from sidecar.devicememory import DeviceMemory
from sidecar.hostcache import HostCache
from sidecar.hosttier import HostTier
from sidecar.memory import Memory
from sidecar.ports import Device, Source
from sidecar.swapmemory import SwapMemory
from sidecar.tiermemory import TierMemory

log = logging.getLogger("trunkline.engine")

# Of what is free on a device, so much is for weights unless an operator says otherwise.
_SHARE: Final = 0.7


def memory_of(
    device: Device,
    source: Source,
    segment: int,
    folder: Path,
    budget_bytes: int | None = None,
    host_budget_bytes: int | None = None,
    block_files_limit_bytes: int | None = None,
) -> Memory:
    """Return the memory that suits a device: ``segment`` is a descriptor of what outlives us, ``folder`` for block files.

    Only a CPU works on the host tier in place, and packed weights only lie there where this torch can tell their bytes.
    ``budget_bytes`` are for weights to work on, ``host_budget_bytes`` for the cache of a device that copies them; the segment was
    made for the larger of what may lie in it, and so large is what is not given. ``block_files_limit_bytes`` are for block files,
    None: as ``BlockFiles`` has it. Raises ConfigError when a device has no room for its budget.
    """
    if not device.copies and not device.works_in_place:
        return DeviceMemory(device, source)
    files = BlockFiles(folder, *device.layout_facts(), limit_bytes=block_files_limit_bytes)
    if device.copies:
        cache = HostCache(device, source, HostTier(segment, host_budget_bytes), files)
        return SwapMemory(device.open_span(cache.budget_bytes if budget_bytes is None else budget_bytes), cache)
    return TierMemory(device, source, HostTier(segment, budget_bytes), files)


def budget_of(device: Device, asked_bytes: int, is_fixed: bool) -> int:
    """Return the bytes for weights on a device, of which an operator, or nobody (0), asked for ``asked_bytes``.

    They are taken as they are where weights lie in host memory, and where the device ``is_fixed``: it is for the operator to know
    how much it has. Else what was asked for may have been reckoned for host memory.
    """
    if not device.copies or (is_fixed and asked_bytes):
        return asked_bytes
    found = device.memory()
    most_bytes = max(1, int(_SHARE * found.get("free_bytes", found["total_bytes"])))
    if asked_bytes > most_bytes:
        log.warning(
            "%s is given %d bytes for weights instead of %d, %d %% of what it has free; name the device to have it otherwise",
            *(device.name, most_bytes, asked_bytes, 100 * _SHARE),
        )
    return min(asked_bytes or most_bytes, most_bytes)
